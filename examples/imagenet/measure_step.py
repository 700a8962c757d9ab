"""Measures the peak memory of an in-core training step. Run by out_of_core.py in a child process.

Its argument is a JSON object with the arguments of ``measure``; it prints one with ``peak_bytes``.
"""

import launcher

launcher.exit_on_interrupt(None)  # the trainer says it
launcher.limit_threads()

import json  # noqa: E402
import sys  # noqa: E402

import chainer_ooc  # noqa: E402, F401  first: it makes stock Chainer importable

# isort: split

import chainer  # noqa: E402
import devices  # noqa: E402
import models  # noqa: E402
import numpy  # noqa: E402
import optimizers  # noqa: E402
import run  # noqa: E402, F401  what the trainer loads counts in its peak, too
from config import Config  # noqa: E402
from training import to_arrays  # noqa: E402


def measure(config: Config, gpu: int, with_mpi: bool) -> int:
    """Returns the peak of this process in bytes after two steps of training.

    The first step allocates the optimizer's state; the second one is like all that follow. MPI
    is loaded as in a rank, which counts in the peak; nothing is sent.
    """
    if with_mpi:
        import mpi4py.MPI  # noqa: F401
    device = chainer.get_device("@numpy" if gpu < 0 else f"@cupy:{gpu}")
    device.use()
    if config.dtype == "mixed16":
        chainer.global_config.dtype = chainer.mixed16
    model = models.create(config.arch, config.insize, config.n_classes)
    model.to_device(device)
    optimizer, _ = optimizers.create(config, 1, model)
    rng = numpy.random.default_rng(0)
    for _ in range(2):
        x = rng.random((config.batchsize, 3, config.insize, config.insize), numpy.float32) - 0.5
        t = rng.integers(config.n_classes, size=config.batchsize, dtype=numpy.int32)
        optimizer.update(model, *to_arrays(list(zip(x, t, strict=True)), device))
    return devices.peak_bytes(gpu >= 0)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    config = Config(**request.pop("config"))
    print(json.dumps({"peak_bytes": measure(config, **request)}))

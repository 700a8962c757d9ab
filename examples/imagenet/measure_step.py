"""Measures the peak memory of an in-core training step. Run by out_of_core.py in a child process.

Its argument is a JSON object with the arguments of ``measure``; it prints one with ``peak_bytes``.
"""

import launcher

launcher.limit_threads()

import json  # noqa: E402
import sys  # noqa: E402

import chainer_ooc  # noqa: E402, F401  first: it makes stock Chainer importable

# isort: split

import chainer  # noqa: E402
import devices  # noqa: E402
import models  # noqa: E402
import numpy  # noqa: E402
import run  # noqa: E402, F401  what the trainer loads counts in its peak, too


def measure(
    arch: str, insize: int, n_classes: int, batchsize: int, gpu: int, with_mpi: bool
) -> int:
    """Returns the peak of this process in bytes after two steps of training.

    The first step allocates the optimizer's state; the second one is like all that follow. MPI
    is loaded as in a rank, which counts in the peak; nothing is sent.
    """
    if with_mpi:
        import mpi4py.MPI  # noqa: F401
    device = chainer.get_device("@numpy" if gpu < 0 else f"@cupy:{gpu}")
    device.use()
    model = models.create(arch, insize, n_classes)
    model.to_device(device)
    optimizer = chainer.optimizers.MomentumSGD()
    optimizer.setup(model)
    rng = numpy.random.default_rng(0)
    for _ in range(2):
        x = rng.random((batchsize, 3, insize, insize), dtype=numpy.float32) - 0.5
        t = rng.integers(n_classes, size=batchsize, dtype=numpy.int32)
        optimizer.update(model, device.send(x), device.send(t))
    return devices.peak_bytes(gpu >= 0)


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": measure(**json.loads(sys.argv[1]))}))

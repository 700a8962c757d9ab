#!/usr/bin/env python
"""Trains a convolutional network on labelled images, in core or out of core.

    mpiexec -n 4 python examples/imagenet/train.py --ooc
    mpiexec -n 4 python examples/imagenet/train.py --ooc train.txt val.txt -R images -a resnet50

The first form needs no data: it trains on real handwritten digits. See docs/imagenet.md.
"""

import errno
import os
import signal
import sys

import launcher

if __name__ == "__main__":
    launcher.exit_on_interrupt("train.py: interrupted")
if "numpy" not in sys.modules:
    launcher.limit_threads()

import chainer_ooc  # noqa: F401  first: it makes stock Chainer importable

# isort: split

import config as config_module
import devices
import out_of_core
import stop_signals
import world as world_module
from config import Config
from datasets.iterators import start_worker_server
from errors import InputError
from run import Run


def start_ranks(config: Config) -> None:
    """Becomes an mpiexec of this script when ``--gpu`` has several ids and there was none.

    ``--gpu 0 1`` gives two ranks with a GPU each, ``--gpu -1 -1`` two ranks on NumPy.

    Raises:
        InputError: There is no mpiexec.
    """
    if config.gpu is None or len(config.gpu) == 1 or launcher.world_size() > 1:
        return
    if launcher.STARTED in os.environ:  # started as a rank, it would start ranks without end
        raise InputError(
            "--gpu with several ids: the mpiexec found does not say in its environment how many "
            "ranks there are; use the one of MPICH, Open MPI or MVAPICH2, or start it yourself"
        )
    devices.use_gpu(config.gpu, len(config.gpu))
    command = launcher.mpiexec_command(len(config.gpu), sys.argv)
    if command is None:
        raise InputError("--gpu with several ids needs mpiexec; run `pip install mpi4py mpich`")
    os.execve(command[0], command, launcher.environment_of_ranks())


def main() -> int:
    """Runs the command line; returns the exit status (2: an input cannot be used)."""
    config = config_module.parse_args()
    rank = launcher.rank()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start_ranks(config)
        stop_signals.start_resource_tracker()
        if config.iterator_name == "process":
            start_worker_server()
        gpu, device_text = devices.use_gpu(config.gpu, launcher.local_size())
        name, replaced = world_module.communicator_name(config.communicator, gpu)
        first = devices.gpu_id(config.gpu, 0) if gpu else -1  # rank 0's, which measures
        with out_of_core.measuring(config, first) as measurement:
            world = world_module.create_world(
                name, gpu, config.ooc and not gpu, config.allreduce_dtype
            )
            rank = world.rank
            if replaced and rank == 0:
                print(f"warning: {replaced}", flush=True)
            description = f"{launcher.threads()} thread(s) each; {device_text}"
            return Run(config, world, gpu, description, measurement).main()
    except InputError as e:
        # Every rank has the same error; one line is enough.
        if rank == 0:
            sys.stdout.flush()
            print(f"train.py: error: {e}", file=sys.stderr, flush=True)
        return 2
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"train.py: error: --out {config.out}: {e.strerror}; free space and continue with "
            f"--resume auto",
            file=sys.stderr,
            flush=True,
        )
        world_module.abort(2)  # the other ranks may be waiting
        return 2
    except KeyboardInterrupt:
        # Before the training takes over Ctrl-C, or pressed twice: other ranks may be waiting.
        if rank == 0:
            print("train.py: interrupted", file=sys.stderr, flush=True)
        world_module.abort(128 + signal.SIGINT)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())

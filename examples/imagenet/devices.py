"""Which device a rank trains on, and how much memory it has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import chainer
from errors import InputError
from world import World


def n_gpus() -> int:
    """Returns the number of GPUs that CuPy can use, 0 without CuPy or CUDA."""
    if not chainer.backends.cuda.available:
        return 0
    return int(chainer.backends.cuda.cupy.cuda.runtime.getDeviceCount())


def use_gpu(requested: tuple[int, ...] | None, local_ranks: int) -> tuple[bool, str]:
    """Decides between GPUs and NumPy.

    Args:
        requested: ``--gpu``; None: GPUs when there is one for each rank.
        local_ranks: Number of ranks on this machine.

    Returns:
        Whether to use GPUs, and a phrase that says so.

    Raises:
        InputError: A requested GPU does not exist, or there are fewer than ranks.
    """
    if requested is not None and set(requested) == {-1}:
        ids = " ".join(map(str, requested))
        return False, f"NumPy and the naive communicator (--gpu {ids})"
    available = n_gpus()
    if requested is None:
        if not available:
            return False, "no GPU found: NumPy and the naive communicator"
        if available < local_ranks:
            return False, (
                f"{local_ranks} ranks but {available} GPU(s): NumPy and the naive communicator "
                f"(start {available} rank(s) to use the GPU(s))"
            )
        return True, f"{min(available, local_ranks)} GPU(s)"
    ids = " ".join(map(str, requested))
    if not available:
        raise InputError(
            f"--gpu {ids}: no GPU can be used here; use --gpu -1, or see "
            f"`python -m chainer_ooc doctor` for what is missing"
        )
    if max(requested) >= available:
        raise InputError(f"--gpu {ids}: allowed are 0 to {available - 1} on this machine")
    if len(requested) < local_ranks:
        raise InputError(
            f"--gpu {ids}: {local_ranks} ranks on this machine need as many GPUs; "
            f"give one id per rank"
        )
    return True, f"GPU {ids}"


def device_name(requested: tuple[int, ...] | None, world: World, gpu: bool) -> str:
    """Returns this rank's device specifier for ``chainer.get_device``."""
    return f"@cupy:{gpu_id(requested, world.intra_rank)}" if gpu else "@numpy"


def gpu_id(requested: tuple[int, ...] | None, intra_rank: int) -> int:
    """Returns the number of the GPU that a rank of this machine takes."""
    return requested[intra_rank] if requested else intra_rank


def peak_bytes(gpu: bool) -> int:
    """Returns the most memory this process has held, in bytes.

    On a GPU that is what CuPy's pool holds (it grows to the peak and keeps it); on the CPU it is
    the largest resident set of this process as the operating system counts it.
    """
    if gpu:
        return int(chainer.backends.cuda.cupy.get_default_memory_pool().total_bytes())
    # VmHWM rather than ru_maxrss: the latter can be inherited from the parent process.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

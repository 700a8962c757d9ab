"""How many processes a launcher (MPI, Slurm) has started together, and which of them this is."""

from __future__ import annotations

import os

__all__ = ["rank", "ranks_of_this_node", "world_size"]


def rank() -> int:
    """Return this process's number among those started together, 0 without a launcher."""
    number = _first("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID", "MV2_COMM_WORLD_RANK")
    if number is None and _under_srun():
        number = _first("SLURM_PROCID")
    return number or 0


def world_size() -> int:
    """Return the number of processes started together, 1 without a launcher."""
    size = _first("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PALS_SIZE", "MV2_COMM_WORLD_SIZE")
    if size is None and _under_srun():
        size = _first("SLURM_STEP_NUM_TASKS")
    return size or 1


def ranks_of_this_node() -> int:
    """Return the number of processes started together on this machine, 1 without a launcher."""
    size = _first(
        "MPI_LOCALNRANKS",  # MPICH and its kin
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PALS_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    )
    if size is None and _under_srun():
        size = _first("SLURM_NTASKS_PER_NODE")
        if size is None:
            size = _of_node(
                os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""),
                _first("SLURM_NODEID") or 0,
            )
    return size or 1


def _under_srun() -> bool:
    # Slurm's batch scripts set the variables for a plain python, too; only srun starts steps of several tasks.
    return (_first("SLURM_STEP_NUM_TASKS") or 1) > 1


def _of_node(tasks: str, node: int) -> int | None:
    """Return this node's number of tasks from Slurm's list of them, such as ``2(x3),1``."""
    for part in tasks.split(","):
        count, _, times = part.partition("(x")
        if not count.isdigit():
            return None
        node -= int(times.rstrip(")") or 1)
        if node < 0:
            return int(count)
    return None


def _first(*names: str) -> int | None:
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None

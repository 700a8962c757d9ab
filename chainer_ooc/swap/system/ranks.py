"""How many processes a launcher (MPI, Slurm) has started together, and which of them this is.

This module loads no NumPy: how many ranks share the cores says how many threads its BLAS may have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["first_number", "rank", "ranks_of_this_node", "world_size"]

# What launchers tell a process: its rank, the number of ranks, and how many of them are on its machine.
_RANK, _SIZE, _LOCAL_SIZE = zip(
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # Hydra: MPICH, Intel MPI
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_SIZE"),  # HPE Cray
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),  # MVAPICH2
    strict=True,
)


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return this process's number among those started together, 0 without a launcher."""
    number = first_number(environ, *_RANK)
    if number is None and _under_srun(environ):
        number = first_number(environ, "SLURM_PROCID")
    return number or 0


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes started together, 1 without a launcher."""
    size = first_number(environ, *_SIZE)
    if size is None and _under_srun(environ):
        size = first_number(environ, "SLURM_STEP_NUM_TASKS")
    return size or 1


def ranks_of_this_node(environ: Mapping[str, str] = os.environ, unknown: int = 1) -> int:
    """Return the number of processes started together on this machine, ``unknown`` if no launcher tells it."""
    size = first_number(environ, *_LOCAL_SIZE)
    if size is None and _under_srun(environ):
        # Not SLURM_NTASKS_PER_NODE: that is the job's, of which this step may be a part.
        node = first_number(environ, "SLURM_NODEID") or 0
        size = _of_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), node)
    return size or unknown


def first_number(environ: Mapping[str, str], *names: str) -> int | None:
    """Return the value of the first of these variables that is a whole number, ``None`` if none is."""
    for name in names:
        value = environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None


def _under_srun(environ: Mapping[str, str]) -> bool:
    # Slurm's batch scripts set the variables for a plain python, too; only srun starts steps of several tasks.
    return (first_number(environ, "SLURM_STEP_NUM_TASKS") or 1) > 1


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

"""What a job needs of the machine: nodes, ranks, GPUs and the command that starts the ranks."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from config import Config, Job
from errors import InputError

GPUS_OF_NODETYPE = {
    # TSUBAME 3
    "f_node": 4,
    "h_node": 2,
    "q_node": 1,
    "s_gpu": 1,
    # TSUBAME 4; node_o and gpu_h have half a GPU each, that is one device
    "node_f": 4,
    "node_h": 2,
    "node_q": 1,
    "node_o": 1,
    "gpu_1": 1,
    "gpu_h": 1,
}
"""GPU devices of a node of each type, and so ranks on it."""

_LAUNCHERS = {
    "tsubame": ("openmpi", "mpich"),
    "age": ("openmpi", "mpich"),
    "slurm": ("srun", "openmpi", "mpich"),
    "pbs": ("openmpi", "mpich"),
    "local": ("openmpi", "mpich"),
}
"""Launchers that each scheduler has; the first is the default."""


@dataclass(frozen=True)
class Plan:
    """A job in numbers.

    Attributes:
        scheduler: tsubame, age, slurm, pbs or local.
        nodes: Number of nodes.
        ranks_per_node: MPI ranks on each.
        gpus_per_node: GPUs of each; 0: NumPy.
        cpus_per_rank: Cores of each rank, None: the scheduler's default.
        launcher: openmpi, mpich or srun.
    """

    scheduler: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int | None
    launcher: str

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.nodes * self.ranks_per_node


def make_plan(job: Job, config: Config, scheduler: str | None = None) -> Plan:
    """Returns the numbers of a job.

    Args:
        job: The configuration's part for the scheduler.
        config: Its part for the training.
        scheduler: Stands in for the configuration's.

    Raises:
        InputError: Settings contradict each other.
    """
    name = scheduler or job.scheduler
    given = job.model_fields_set
    if name == "tsubame":
        _refuse(given, ("ranks_per_node", "gpus_per_node", "queue", "parallel_environment"), name,
                "nodetype says how many GPUs and ranks a node has")  # fmt: skip
    elif name != "age":
        _refuse(given, ("parallel_environment",), name, "it is a key of scheduler age")
    on_gpus = config.gpu is None or -1 not in config.gpu
    # A file made for TSUBAME can be used elsewhere: its node type says how many ranks.
    of_nodetype = GPUS_OF_NODETYPE[job.nodetype]
    gpus = job.gpus_per_node
    if gpus is None:
        gpus = of_nodetype if on_gpus and (name == "tsubame" or "nodetype" in given) else 0
    ranks = job.ranks_per_node or gpus or (of_nodetype if "nodetype" in given else 1)
    if gpus and ranks > gpus:
        raise InputError(
            f"ranks_per_node: {ranks} is more than the {gpus} GPU(s) of a node; a rank needs a GPU"
        )
    if config.gpu is not None and on_gpus:
        raise InputError(
            "gpu: GPU ids are the scheduler's matter in a job; leave the key out, or set it to -1 "
            "to train without GPUs"
        )
    if name == "local" and job.nnodes > 1:
        raise InputError(f"nnodes: {job.nnodes} is not allowed with scheduler local; allowed is 1")
    launcher = job.launcher or _LAUNCHERS[name][0]
    if launcher not in _LAUNCHERS[name]:
        raise InputError(
            f"launcher: {launcher!r} is not allowed with scheduler {name}; allowed are "
            f"{', '.join(_LAUNCHERS[name])}"
        )
    return Plan(name, job.nnodes, ranks, gpus, job.cpus_per_rank, launcher)


def _refuse(given: set[str], keys: tuple[str, ...], scheduler: str, why: str) -> None:
    for key in keys:
        if key in given:
            raise InputError(f"{key}: not with scheduler {scheduler}: {why}; leave it out")


def launch_command(plan: Plan, job: Job) -> list[str]:
    """Returns the command, without the program, that starts all ranks.

    Raises:
        InputError: The ranks are to be started here, and there is no mpiexec.
    """
    ranks, per_node = str(plan.ranks), str(plan.ranks_per_node)
    if plan.scheduler == "local":
        return [] if plan.ranks == 1 else [find_mpiexec(), "-n", ranks]
    if plan.launcher == "srun":
        command = ["srun", f"--mpi={job.srun_mpi}", f"--ntasks-per-node={per_node}"]
        if plan.gpus_per_node:
            command.append(f"--gpus-per-node={plan.gpus_per_node}")
        # Without it, later versions of Slurm give a step one core per task.
        return [
            *command,
            *([f"--cpus-per-task={plan.cpus_per_rank}"] if plan.cpus_per_rank else []),
        ]
    if plan.launcher == "mpich":
        return ["mpiexec", "-n", ranks, "-ppn", per_node]
    # Open MPI passes only its own variables to other nodes.
    exported = ["PATH", "LD_LIBRARY_PATH", "PYTHONPATH", *job.environment]
    variables = [word for name in exported for word in ("-x", name)]
    return ["mpirun", "-np", ranks, "--map-by", f"ppr:{per_node}:node", *variables]


def find_mpiexec() -> str:
    """Returns the mpiexec of this Python's environment, or the one on the PATH.

    Raises:
        InputError: There is none.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise InputError("scheduler local: there is no mpiexec; run `pip install mpi4py mpich`")
    return found

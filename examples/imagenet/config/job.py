"""The keys of a configuration file that are for the job scheduler; train.py only checks them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Scheduler = Literal["tsubame", "age", "slurm", "pbs", "local"]
Launcher = Literal["openmpi", "mpich", "srun"]
NodeType = Literal[
    "f_node", "h_node", "q_node", "s_gpu",  # TSUBAME 3
    "node_f", "node_h", "node_q", "node_o", "gpu_1", "gpu_h",  # TSUBAME 4
]  # fmt: skip


def _walltime(value: Any) -> Any:
    # YAML 1.1 reads 12:30:00 as a number to base 60.
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return f"{value // 3600:02d}:{value // 60 % 60:02d}:{value % 60:02d}"
    if isinstance(value, str) and re.fullmatch(r"\d{1,4}:[0-5]\d:[0-5]\d", value):
        return value
    raise PydanticCustomError("walltime", "is not a time; allowed is hh:mm:ss, such as 02:30:00")


def _line(value: Any) -> Any:
    # A line break would end a directive, and start a command.
    if isinstance(value, str) and not value.isprintable():
        raise PydanticCustomError("line", "is not one line of printable characters")
    return value


Line = Annotated[str, BeforeValidator(_line), Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:+-]*$")]
"""What schedulers take as a name, without quotation marks."""


class Job(BaseModel):
    """What a job script asks of the scheduler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheduler: Scheduler = "tsubame"
    nodetype: NodeType = "q_node"
    nnodes: int = Field(1, ge=1)
    walltime: Annotated[str, BeforeValidator(_walltime)] = "02:30:00"
    jobname: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.+-]{0,62}$")] = "imagenet"
    stdout: Line = "$JOB_ID.o.log"
    stderr: Line = "$JOB_ID.e.log"
    others: dict[Word, Annotated[str, BeforeValidator(_line)] | int | None] = {"j": "y"}
    modules: Path | None = Path("./modules.sh")
    group: Word | None = None
    queue: Word | None = None
    ranks_per_node: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    cpus_per_rank: int | None = Field(None, ge=1)
    memory: Annotated[str, Field(pattern=r"^[1-9][0-9]*[MGT]$")] | None = None
    parallel_environment: Word = "mpi"
    launcher: Launcher | None = None
    srun_mpi: Word = "pmix"
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str | int] = {}
    python: Line | None = None

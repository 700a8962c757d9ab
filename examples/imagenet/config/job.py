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


NULLS = ("modules",)
"""Keys for which null is a value of its own, and not what is used when nothing is said."""


def _walltime(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\d{1,4}:[0-5]\d:[0-5]\d", value):
        return value
    raise PydanticCustomError("walltime", "is not a time; allowed is hh:mm:ss, such as 02:30:00")


def _line(value: Any) -> Any:
    # A line break would end a directive, and start a command.
    if not isinstance(value, str) or not value.isprintable():
        raise PydanticCustomError("line", "is not one line of printable characters")
    return value


def _option_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("switch", 'is not text; put it in quotes, such as "y"')
    return value


def _matching(pattern: str, words: str) -> BeforeValidator:
    """Accepts text that matches a pattern; ``words`` say what that is."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return value
        raise PydanticCustomError("pattern", "is not {words}", {"words": words})

    return BeforeValidator(check)


Line = Annotated[str, BeforeValidator(_line), Field(min_length=1)]
Word = Annotated[
    str,
    _matching(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]*", "a word of letters, digits and _.:+-"),
]
"""What schedulers take as a name, without quotation marks."""

Options = dict[
    Word,
    Annotated[Annotated[str, BeforeValidator(_line)] | int | None, BeforeValidator(_option_value)],
]
"""More options of a scheduler."""


class Job(BaseModel):
    """What a job script asks of the scheduler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheduler: Scheduler = "tsubame"
    nodetype: NodeType = "q_node"
    nnodes: int = Field(1, ge=1)
    walltime: Annotated[str, BeforeValidator(_walltime)] = "02:30:00"
    jobname: Annotated[
        str,
        _matching(
            r"[A-Za-z][A-Za-z0-9_.+-]{0,62}",
            "a name of at most 63 letters, digits and _.+-, the first of them a letter",
        ),
    ] = "imagenet"
    stdout: Line = "$JOB_ID.o.log"
    stderr: Line = "$JOB_ID.e.log"
    others: Options = {"j": "y"}
    modules: Path | None = Path("./modules.sh")
    group: Word | None = None
    queue: Word | None = None
    ranks_per_node: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    cpus_per_rank: int | None = Field(None, ge=1)
    memory: Annotated[str, _matching(r"[1-9][0-9]*[MGT]", "a size such as 200G")] | None = None
    parallel_environment: Word = "mpi"
    launcher: Launcher | None = None
    srun_mpi: Word = "pmix"
    environment: dict[
        Annotated[str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "a name of a variable")],
        Annotated[str | int, BeforeValidator(_option_value)],
    ] = {}
    python: Line | None = None

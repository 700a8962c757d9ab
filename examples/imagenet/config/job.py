"""The keys of a configuration file that are for the job scheduler; train.py only checks them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

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


class Job(BaseModel):
    """What a job script asks of the scheduler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodetype: NodeType = "q_node"
    nnodes: int = Field(1, ge=1)
    walltime: Annotated[str, BeforeValidator(_walltime)] = "02:30:00"
    jobname: str = Field("imagenet", min_length=1)
    stdout: str = "$JOB_ID.o.log"
    stderr: str = "$JOB_ID.e.log"
    others: dict[str, str | int | None] = {"j": "y"}
    modules: Path | None = Path("./modules.sh")

"""Job scripts from templates."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from config import Job
from errors import InputError

from cluster.plan import Plan, launch_command

TEMPLATES = Path(__file__).with_name("templates")
JOB_ID = "$JOB_ID"
"""Stands for the job's number in ``stdout`` and ``stderr``, whatever the scheduler calls it."""


def render(
    plan: Plan,
    job: Job,
    *,
    conf: Path,
    settings: str,
    folder: Path,
    cwd: Path,
    modules: Path | None,
    python: str,
) -> str:
    """Returns the text of a job script.

    Args:
        plan: The numbers of the job.
        job: The configuration's part for the scheduler.
        conf: The configuration, for a comment.
        settings: Name of its copy in ``folder``, which the trainer reads.
        folder: Folder of the job, with the ``code`` in it.
        cwd: Where the job runs: what relative paths in the configuration start from.
        modules: File to source, or None.
        python: The interpreter.

    Raises:
        InputError: A key of ``others`` is none of the scheduler's, or says something that another
            key says.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(
        sh=lambda value: shlex.quote(str(value)),
        shjoin=_shell_join,
        comment=lambda value: "".join(c if c.isprintable() else "?" for c in str(value)),
        directive=_directive_value,
        option=_option,
        shell_path=_shell_path,
        slurm_path=lambda value: value.replace("%", "%%").replace(JOB_ID, "%j"),
    )
    return environment.get_template(f"{plan.scheduler}.sh.j2").render(
        plan=plan,
        job=job,
        others=_others(plan, job),
        conf=conf,
        settings=settings,
        folder=folder,
        cwd=cwd,
        modules=modules,
        python=python,
        launch=launch_command(plan, job),
    )


def submit_command(plan: Plan, job: Job, script: Path) -> list[str]:
    """Returns the command that submits a job script, or runs it for scheduler local."""
    if plan.scheduler == "local":
        return ["bash", str(script)]
    if plan.scheduler == "slurm":
        return ["sbatch", str(script)]
    group = ["-g", job.group] if plan.scheduler == "tsubame" and job.group else []
    return ["qsub", *group, str(script)]


_TAKEN = {
    "tsubame": {"N": "jobname", "o": "stdout", "e": "stderr", "S": None, "cwd": None},
    "age": {"N": "jobname", "o": "stdout", "e": "stderr", "S": None, "cwd": None,
            "pe": "parallel_environment", "P": "group", "q": "queue"},
    "slurm": {"J": "jobname", "job-name": "jobname", "o": "stdout", "output": "stdout",
              "e": "stderr", "error": "stderr", "N": "nnodes", "nodes": "nnodes",
              "n": "ranks_per_node", "ntasks": "ranks_per_node",
              "ntasks-per-node": "ranks_per_node", "t": "walltime", "time": "walltime",
              "A": "group", "account": "group", "p": "queue", "partition": "queue",
              "c": "cpus_per_rank", "cpus-per-task": "cpus_per_rank", "mem": "memory",
              "gpus-per-node": "gpus_per_node", "D": None, "chdir": None},
    "pbs": {"N": "jobname", "o": "stdout", "e": "stderr", "A": "group", "q": "queue", "S": None},
    "local": {},
}  # fmt: skip
"""Options that the templates write, and the keys that say them."""


def _others(plan: Plan, job: Job) -> dict[str, Any]:
    # What is for one scheduler does not fit another; the default, j: "y", is Grid Engine's.
    grid_engine = ("tsubame", "age")
    given = "others" in job.model_fields_set
    if plan.scheduler != job.scheduler if given else plan.scheduler not in grid_engine:
        return {}
    if plan.scheduler == "local" and job.others:
        raise InputError("others: there is no scheduler to read it with scheduler local; remove it")
    for name in job.others:
        if name in _TAKEN[plan.scheduler]:
            key = _TAKEN[plan.scheduler][name]
            hint = f"use the key {key}" if key else "the job script needs its own"
            raise InputError(f"others: {name} is not allowed with {plan.scheduler}; {hint}")
    return job.others


def _shell_join(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _directive_value(value: str) -> str:
    """Quotes a value in a directive if it needs that. Schedulers read quotation marks, not $."""
    if not any(c in value for c in " \"'\\#"):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _option(value: Any, separator: str = " ") -> str:
    return "" if value is None or value == "" else f"{separator}{_directive_value(str(value))}"


def _shell_path(value: str) -> str:
    """Quotes a path in which ``$JOB_ID`` is to be replaced by the shell."""
    return '"$JOB_ID"'.join(shlex.quote(part) if part else "" for part in value.split(JOB_ID))

"""What would fail when the job at last runs, found before it is submitted."""

from __future__ import annotations

import importlib
from pathlib import Path

from config import Config, Job
from errors import InputError

from cluster.plan import Plan


def check_time(plan: Plan, job: Job) -> None:
    """Raises InputError when the wall time is none.

    Raises:
        InputError: It is zero.
    """
    if plan.scheduler != "local" and not any(int(part) for part in job.walltime.split(":")):
        raise InputError(f"walltime: {job.walltime} is no time; give hh:mm:ss of more than 0")


def check_logs(plan: Plan, job: Job) -> None:
    """Raises InputError when a log could not be written: schedulers end such a job without a word.

    Raises:
        InputError: The folder of ``stdout`` or ``stderr`` is not there.
    """
    if plan.scheduler == "local":
        return
    for key in ("stdout", "stderr"):
        path = Path(getattr(job, key))
        if not path.parent.is_dir():
            raise InputError(f"{key}: {path}: there is no folder {path.parent}; create it")


def check_network(config: Config) -> None:
    """Raises InputError when the network does not take images of that size.

    Where Chainer cannot be imported, such as on some login nodes, the job will check it.
    """
    try:
        importlib.import_module("chainer_ooc")  # first: it makes stock Chainer importable
        models = importlib.import_module("models")
    except ImportError:
        return
    models.check_insize(config.arch, config.insize)


def check_files(config: Config) -> None:
    """Raises InputError when a file that the configuration names is not there.

    Raises:
        InputError: A list, the mean file, a model or a snapshot is missing.
    """
    if config.digits or config.dataset not in (None, "files"):
        return
    train, val = config.lists
    needed: list[tuple[str, Path | None]] = [
        ("train: list file", train),
        ("val: list file", val),
        ("mean:", config.mean),
        ("initmodel:", config.initmodel),
    ]
    for what, path in needed:
        if path is not None and not path.is_file():
            raise InputError(f"{what} {path}: no such file in {Path.cwd()}; correct the path")
    if not config.root.is_dir():
        raise InputError(f"root: {config.root}: no such folder in {Path.cwd()}; correct the path")
    resume = config.resume
    if resume is not None and str(resume) != "auto" and not resume.is_dir():
        raise InputError(f"resume: {resume}: no such folder; give a folder snapshot_iter_N or auto")

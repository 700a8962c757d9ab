"""The folder of a job: its script, its configuration, and the code as it was at submission."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from errors import InputError

CODE_SUFFIXES = (".py", ".j2", ".sh", ".yaml", ".json")
_NOT_CODE = ("__pycache__", "result", "results", "out", "data")


def make_folder(out: Path) -> Path:
    """Makes ``out/<time>`` for a job and returns its absolute path; an existing one stays alone.

    Raises:
        InputError: It cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = out / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not out.is_dir():
                raise InputError(f"out {out}: is a file; choose another folder") from None
            continue
        except OSError as e:
            raise InputError(
                f"out {out}: cannot make this folder ({e.strerror}); choose another"
            ) from e
        return folder.resolve()
    raise InputError(f"out {out}: too many jobs in one second")


def copy_code(trainer: Path, package: Path, folder: Path) -> None:
    """Copies the trainer and the package ``chainer_ooc`` to ``folder/code``.

    Args:
        trainer: The folder ``examples/imagenet``.
        package: The folder of ``chainer_ooc``.
        folder: The job's folder.
    """
    code = folder / "code"
    for source, target in ((trainer, code / "imagenet"), (package, code / "chainer_ooc")):
        shutil.copytree(source, target, ignore=_ignore)


def _ignore(folder: str, names: list[str]) -> list[str]:
    def is_code(name: str) -> bool:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            return name not in _NOT_CODE and (not name.startswith(".") or name == ".config")
        # `submit` has no suffix.
        return name.endswith(CODE_SUFFIXES) or name == "submit"

    return [name for name in names if not is_code(name)]

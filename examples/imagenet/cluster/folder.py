"""The folder of a job: its script, its configuration, and the code as it was at submission."""

from __future__ import annotations

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

    Results and data beside the code stay out: only files of code are copied, and neither links to
    folders nor the folder that the job's own folder is in.

    Args:
        trainer: The folder ``examples/imagenet``.
        package: The folder of ``chainer_ooc``.
        folder: The job's folder, which may be below ``trainer``.
    """
    results = folder.resolve().parent

    def ignore(source: str, names: list[str]) -> list[str]:
        return [name for name in names if not _is_code(Path(source, name), results)]

    for source, name in ((trainer, "imagenet"), (package, "chainer_ooc")):
        shutil.copytree(source, folder / "code" / name, ignore=ignore)


def _is_code(path: Path, results: Path) -> bool:
    if path.is_dir():
        hidden = path.name.startswith(".") and path.name != ".config"
        own = path.name not in _NOT_CODE and not path.is_symlink() and path.resolve() != results
        return own and not hidden
    return path.suffix in CODE_SUFFIXES or path.name == "submit"  # which has no suffix

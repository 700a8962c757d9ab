"""The index of a database of images: its keys and labels, in a JSON file beside it.

Labels of Caffe's Datum are in the database, those of image files are in the index only, or told by
the folders in the keys. Size, time of change, and first and last key of the database tell whether
an index is of it. Where they differ (the database was copied, or made anew) the database is looked at.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from errors import InputError
from files import write_text
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from datasets import datum
from datasets.classes import Names, numbers_are_no_names

if TYPE_CHECKING:
    from datasets.lmdb_images import Database

RAW: Literal["images"] = "images"
DATUM: Literal["datum"] = "datum"
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
_TICK = 2_000_000_000
"""Nanoseconds in which a file system may not tell two times of change apart."""


def index_path(path: Path) -> Path:
    """Returns where the index of a database is."""
    return path.with_name(path.name + ".json")


class Index(BaseModel):
    """What is in a database.

    Attributes:
        kind: Whether the values are image files or Caffe's Datum.
        classes: Names of the classes.
        samples: Keys and labels.
        numbered: Whether the classes have only numbers; None: an older index does not say.
        derived: Whether it was made of the database alone, and can be again.
        database: Bytes, time of change (ns), and first and last key of the database; None: unknown.
    """

    model_config = ConfigDict(strict=True)

    kind: Literal["images", "datum"]
    classes: list[str]
    samples: list[tuple[str, Annotated[int, Field(ge=-(2**31), lt=2**31)]]]
    numbered: bool | None = None
    derived: bool = False
    database: tuple[int, int, str, str] | None = None

    def names(self) -> Names:
        """Returns the names of the classes; None if they have only numbers."""
        if self.numbered is None:
            return numbers_are_no_names(self.classes)
        return None if self.numbered else self.classes

    def note(self, file: Path) -> None:
        """Notes what tells whether ``file``, a database of these keys, has changed."""
        status = file.stat()
        keys = [key for key, _ in self.samples]
        ends = (min(keys), max(keys)) if keys else ("", "")  # UTF-8 keeps the order
        self.database = status.st_size, status.st_mtime_ns, *ends


def read_index(path: Path) -> Index | None:
    """Returns the index of the database ``path``; None if there is none.

    Raises:
        InputError: It is damaged.
    """
    try:
        return Index.model_validate_json(index_path(path).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as e:
        problem = e.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise _unfit(path, f"{where}: {problem['msg']}") from e
    except OSError as e:
        raise _unfit(path, e.strerror or str(e)) from e


def find_index(path: Path, file: Path, open_database: Callable[[], Database]) -> Index:
    """Returns the index of a database, from the file beside it if that is of this database.

    Args:
        path: The database.
        file: Its file of data.
        open_database: Opens it.

    Raises:
        InputError: It cannot be read, or what is beside it is not its index.
    """
    found = read_index(path)
    database = open_database()
    if found is not None and found.database is not None:
        noted = found.database
        found.note(file)
        if found.database == noted and len(found.samples) == database.n_entries:
            return found
    if found is None or not _confirms(database, found, path):
        found = _derive(database, path)
    if time.time_ns() - file.stat().st_mtime_ns > _TICK:
        found.note(file)
    else:
        found.database = None  # it could change again without showing it
    # in a folder that cannot be written to it is made again the next time
    with contextlib.suppress(InputError):
        write_text(index_path(path), found.model_dump_json())
    return found


def _confirms(database: Database, found: Index, path: Path) -> bool:
    """Tells whether a database is that of an index.

    Raises:
        InputError: It is not, and has not the labels.
    """
    if found.kind == DATUM:
        with contextlib.suppress(InputError):
            return sorted(found.samples) == _derive(database, path).samples
        return False
    with database.begin() as txn:
        keys = [bytes(key) for key in txn.cursor().iternext(values=False)]
        first = next(txn.cursor().iternext(keys=False), b"")
        same = sorted(key.encode() for key, _ in found.samples) == keys
        if same and (not keys or _kind(first) == RAW):
            return True
    if found.derived:
        return False
    raise _unfit(path, f"it does not fit the {len(keys)} entries of the database")


def _unfit(path: Path, reason: str) -> InputError:
    return InputError(
        f"{index_path(path)}: not the index of {path} ({' '.join(reason.split())}); remove it, and it "
        f"is made again"
    )


def _kind(value: memoryview | bytes) -> Literal["images", "datum"]:
    return RAW if bytes(value[:4]).startswith(_MAGIC) else DATUM


def _derive(database: Database, path: Path) -> Index:
    """Returns the index that a database alone tells: labels of Caffe's Datum, or folders in keys."""
    samples: list[tuple[str, int]] = []
    kind = None
    with database.begin() as txn:
        for key, value in txn.cursor():
            try:
                name = bytes(key).decode()
                kind = kind or _kind(value)
                samples.append((name, 0 if kind == RAW else datum.parse(value).label))
            except ValueError as e:
                raise InputError(
                    f"LMDB {path}: entry {bytes(key)[:60]!r} is neither an image file nor "
                    f"a Caffe Datum ({e})"
                ) from e
    if kind == DATUM:
        bad = next((s for s in samples if not -(2**31) <= s[1] < 2**31), None)
        if bad is not None:
            raise InputError(f"LMDB {path}: the label {bad[1]} of {bad[0]} is out of range")
        classes = [str(i) for i in range(max(label for _, label in samples) + 1)]
        return Index(kind=DATUM, classes=classes, samples=samples, numbered=True, derived=True)
    folders = [os.path.basename(os.path.dirname(name)) for name, _ in samples]
    if "" in folders:
        raise InputError(
            f"LMDB {path}: the key {samples[folders.index('')][0]!r} has no folder to "
            f"tell the class; make the database with make_lmdb.py, which writes an index"
        )
    classes = sorted(set(folders))
    numbers = {name: i for i, name in enumerate(classes)}
    samples = [(name, numbers[folder]) for (name, _), folder in zip(samples, folders, strict=True)]
    return Index(kind=RAW, classes=classes, samples=samples, numbered=False, derived=True)

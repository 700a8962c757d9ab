"""Images in a Lightning Memory-Mapped Database.

Two contents are read: the files of images under their paths as keys, and Caffe's Datum. Keys and
labels are in an index, a JSON file beside the database that ``make_lmdb.py`` writes; without one
they are taken from the database once: of paths the class is the folder, in the order of the names.
A pickled index (``.lmdb.pt``) is never opened: unpickling can run anything.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from errors import InputError

from datasets import datum
from datasets.decoding import DAMAGE, Need, Size, damaged, decode, encoded_size
from datasets.labeled import allowed_labels, file_version
from datasets.lmdb_index import RAW, find_index


def data_file(path: Path) -> Path:
    """Returns the file of a database, which may be a folder."""
    return path / "data.mdb" if path.is_dir() else path


class Database:
    """A database that is open for reading; LMDB allows one in a process for each path.

    Args:
        path: Folder or file of the database.

    Raises:
        InputError: There is none, it is damaged, or truncated: a truncated one would end the
            process when it is read.
    """

    def __init__(self, path: Path) -> None:
        try:
            import lmdb
        except ImportError as e:
            raise InputError(f"{path}: needs the package lmdb; run `pip install lmdb`") from e
        self._env: Any = None
        self._path = path
        self._pid = os.getpid()
        file = data_file(path)
        if not file.is_file():
            raise InputError(f"LMDB {path}: no such database; give its folder or its file")
        try:
            self._env = lmdb.open(
                str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False,
                max_spare_txns=64,
            )  # fmt: skip
            self.n_entries: int = self._env.stat()["entries"]
            needed = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        except (lmdb.Error, OSError) as e:
            raise InputError(f"LMDB {path}: damaged or not a database ({e}); make it again") from e
        if file.stat().st_size < needed:
            raise InputError(
                f"LMDB {path}: truncated: it has {file.stat().st_size} bytes and should have at "
                f"least {needed}; copy or make it again"
            )

    @contextlib.contextmanager
    def begin(self) -> Iterator[Any]:
        """Begins a transaction that reads; values are views of the database.

        Raises:
            InputError: A page of the database that is needed is damaged.
        """
        import lmdb

        try:
            with self._env.begin(buffers=True) as txn:
                yield txn
        except lmdb.Error as e:
            raise InputError(
                f"LMDB {self._path}: damaged ({' '.join(str(e).split())}); copy or make it again"
            ) from e

    def __del__(self) -> None:
        if self._env is not None and self._pid == os.getpid():
            self._env.close()


_open: weakref.WeakValueDictionary[tuple[int, Path], Database] = weakref.WeakValueDictionary()
_open_lock = threading.Lock()


def database(path: Path) -> Database:
    """Returns the open database of this process, which must not be used across a fork."""
    key = os.getpid(), path.resolve()
    with _open_lock:
        found = _open.get(key)
        if found is None:
            found = _open[key] = Database(path)
        return found


class LmdbImages:
    """Images of a database, read and decoded on demand.

    Args:
        path: Folder or file of the database.
        n_classes: Labels must be below it; None: any from 0.

    Attributes:
        classes: Names of the classes; their numbers where the database has no names.
        names: The same, but None where it has no names.

    Raises:
        InputError: The database, its index or a label cannot be used.
    """

    def __init__(self, path: str | Path, n_classes: int | None = None) -> None:
        self.path = Path(path)
        self._database: Database | None = None
        self._pid = 0
        index = find_index(self.path, data_file(self.path), self._open)
        self.kind: str = index.kind
        self.classes = index.classes
        self.names = index.names()
        keys = [key.encode() for key, _ in index.samples]
        self.labels = numpy.array([label for _, label in index.samples], dtype=numpy.int32)
        self._keys = b"".join(keys)
        self._ends = numpy.cumsum([0, *map(len, keys)], dtype=numpy.int64)
        if not len(self):
            raise InputError(f"LMDB {path}: no images in it")
        self.check_labels(n_classes)

    def check_labels(self, n_classes: int | None) -> None:
        """Raises InputError if a label is negative, or not below ``n_classes``."""
        bad = (self.labels < 0) | (self.labels >= (n_classes or 2**31))
        if bad.any():
            i = int(bad.argmax())
            raise InputError(
                f"{self.name(i)}: label {self.labels[i]} is out of range; allowed are "
                f"{allowed_labels(n_classes)}"
            )

    # -- reading ---------------------------------------------------------------------------------

    def _open(self) -> Database:
        if self._database is None or self._pid != os.getpid():
            self._database, self._pid = database(self.path), os.getpid()
        return self._database

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_database": None}

    def _key(self, i: int) -> bytes:
        return self._keys[self._ends[i] : self._ends[i + 1]]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image: its key."""
        return f"{self._key(i).decode()} in {self.path}"

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image."""
        return int(self.labels[i])

    def version(self, i: int) -> tuple[int, ...]:
        """Returns bytes and time of change of the database."""
        return file_version(data_file(self.path))

    def _read(self, i: int, use: Any) -> Any:
        with self._open().begin() as txn:
            value = txn.get(self._key(i))
            if value is None:
                raise InputError(
                    f"{self.name(i)}: is in the index, but not in the database; remove the index"
                )
            try:
                return use(value)
            except InputError:
                raise
            except DAMAGE as e:
                raise damaged(self.name(i), e) from e

    def image_size(self, i: int) -> Size:
        """Returns the width and height of the ``i``-th image, from its header."""
        if self.kind == RAW:
            return self._read(i, encoded_size)
        return self._read(i, lambda value: datum.parse(value).size())

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image, uint8 RGB (height, width, 3); see ``decoding.decode``."""
        if self.kind == RAW:
            data = self._read(i, bytes)
            return decode(data, self.name(i), need)
        return self._read(i, lambda value: datum.parse(value).image(self.name(i), need))

"""A folder of results belongs to one run at a time.

The run locks a file in the folder, in which its host and pid stand. The kernel takes the lock away when the process
is dead. Where the file system has no locks, or knows only those of one host, the file itself says who has it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from errors import InputError

FILE = "run.lock"

_DYING = 5.0
"""Seconds after which a process that was killed has let go of its lock, unless it has very much memory."""
_SETTLED = 0.5
"""Seconds after which, without locks, the last of those that have written the file at the same time is known."""
_SAME_START = 2.0
"""Start times of one process differ by less (seconds): they are reckoned from the clock, which may be set."""


class _Owner(NamedTuple):
    host: str
    pid: int
    started: float

    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_dead(self) -> bool:
        """Whether it is certain that this process has ended."""
        if not self.is_here():
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _SAME_START
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class FolderLock:
    """The lock of a folder.

    Args:
        folder: Folder of the results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE
        self._me = _Owner(socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self._file: int | None = None

    def acquire(self) -> None:
        """Takes the lock; that of a dead run is taken over.

        Raises:
            InputError: Another run has it, or it cannot be told whether that still runs.
        """
        deadline = time.monotonic() + _DYING
        try:
            while not self._try(patient=time.monotonic() < deadline):
                time.sleep(0.1)
        except OSError as e:
            raise InputError(
                f"--out {self._folder}: cannot lock {self._path} ({e.strerror}); correct the folder, or "
                f"choose another"
            ) from e

    def release(self) -> None:
        """Gives the lock back, if this process has it."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _try(self, patient: bool) -> bool:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _flock(file)
            owner = _read(file)
            if locked is False:
                if patient and (owner is None or owner.is_dead()):
                    return False  # it is being killed, or has not written yet who it is
                raise self._refusal(owner)
            if owner is not None and not owner.is_dead():
                if owner.is_here():  # the lock was on a view of the folder that this is not
                    raise self._refusal(owner)
                if locked is None:
                    raise self._unknown(owner)
            if not _is_file_of(file, self._path):
                return False  # its run has just ended
            os.pwrite(file, json.dumps(self._me).encode().ljust(1000) + b"\n", 0)
            os.fsync(file)
            if locked is None:
                time.sleep(_SETTLED)
                owner = _read_path(self._path)
                if owner != self._me:
                    raise self._refusal(owner)
            self._file, file = file, -1
            return True
        finally:
            if file >= 0:
                os.close(file)

    def _refusal(self, owner: _Owner | None) -> InputError:
        who = "another run" if owner is None else f"a run on host {owner.host} with pid {owner.pid}"
        return InputError(
            f"--out {self._folder}: {who} is writing there; wait for its end, or choose another folder"
        )

    def _unknown(self, owner: _Owner) -> InputError:
        return InputError(
            f"--out {self._folder}: belongs to a run on host {owner.host} with pid {owner.pid}, and this "
            f"file system does not tell whether that still runs; if it does not, remove {self._path}, "
            f"else choose another folder"
        )


def _flock(file: int) -> bool | None:
    """Locks a file; returns False if another process has, None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _read(file: int) -> _Owner | None:
    try:
        host, pid, started = json.loads(os.pread(file, 4096, 0))
        return _Owner(str(host), int(pid), float(started))
    except (ValueError, TypeError):
        return None


def _read_path(path: Path) -> _Owner | None:
    file = os.open(path, os.O_RDONLY)  # opened anew: NFS shows what others have written then
    try:
        return _read(file)
    finally:
        os.close(file)


def _is_file_of(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False

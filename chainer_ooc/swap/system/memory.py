"""Ask the kernel how much memory the process has and can have, and give freed memory back (Linux)."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import resource
from typing import NamedTuple

import psutil

__all__ = [
    "ResidentMemory",
    "attainable_bytes",
    "available_bytes",
    "cgroup_limit",
    "keep_less_freed_memory",
    "physical_bytes",
    "trim",
    "ucx_keeps_freed_memory",
]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_ROOT = "/"  # tests put files of their own in place of the kernel's


class ResidentMemory:
    """Read this process's resident memory (RSS) in about a microsecond, its peak in ten."""

    #: The highest peak before it was reset (bytes), and in which process.
    _before_reset = (0, 0)

    def __init__(self) -> None:
        self._pid, self._fd = 0, -1

    def bytes(self) -> int:
        """Return the resident memory (bytes)."""
        if self._pid != os.getpid():  # after a fork the open file still describes the parent
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._pid = (
                os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC),
                os.getpid(),
            )
        return int(os.pread(self._fd, 128, 0).split()[1]) * _PAGE

    @classmethod
    def peak_bytes(cls) -> int:
        """Return the highest resident memory since the process began (bytes)."""
        pid, before = cls._before_reset
        now = cls.peak_since_reset()
        return max(before, now) if pid == os.getpid() else now

    @staticmethod
    def peak_since_reset() -> int:
        """Return the highest resident memory since :meth:`reset_peak` (bytes), the kernel's ``VmHWM``."""
        with open("/proc/self/status", "rb", buffering=0) as file:
            status = file.read(8192)
        start = status.find(b"VmHWM:")
        return int(status[start + 6 : status.index(b"kB", start)]) << 10 if start >= 0 else 0

    @classmethod
    def reset_peak(cls) -> bool:
        """Reset the kernel's peak. Return whether the kernel can do that."""
        cls._before_reset = os.getpid(), cls.peak_bytes()
        try:
            with open("/proc/self/clear_refs", "wb", buffering=0) as file:
                file.write(b"5")
        except OSError:
            return False
        return True


def physical_bytes() -> int:
    """Return the most memory that this process could ever have (bytes): by machine, cgroups and rlimit."""
    return min([psutil.virtual_memory().total, *(group.limit for group in _cgroups()), *_rlimit()])


def cgroup_limit() -> int | None:
    """Return the least limit of the cgroups that hold this process (bytes), ``None`` if there is none."""
    return min((group.limit for group in _cgroups()), default=None)


def available_bytes() -> int:
    """Return how much more memory this process could take now (bytes).

    Cached files count as available, even this process's own libraries: the kernel takes that memory back.
    """
    room = [psutil.virtual_memory().available]
    room += [max(group.limit - group.used, 0) for group in _cgroups()]
    address_space = _rlimit()
    if address_space:
        room.append(max(address_space[0] - psutil.Process().memory_info().vms, 0))
    return min(room)


def attainable_bytes(reserve: float, sharers: int = 1) -> int:
    """Return how much resident memory this process could come to have (bytes).

    That is its own memory plus the available memory. Pages of files, which resident memory includes, are
    not added: they are already in the available memory, or charged to another cgroup, as those of shared
    libraries may be.

    Args:
        reserve: The share of the available memory to leave alone.
        sharers: The number of processes that share the available memory.
    """
    own = _own_bytes("RssAnon") + _own_bytes("RssShmem") // sharers
    attainable = own + int(available_bytes() * (1 - reserve)) // sharers
    # Its memory may be charged to an earlier cgroup of the process.
    return min(attainable, physical_bytes())


def _own_bytes(name: str) -> int:
    for line in _read_lines("/proc/self/status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def _rlimit() -> list[int]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [soft]


class _Cgroup(NamedTuple):
    limit: int  #: the most that its processes may have (bytes)
    used: int  #: what they have, but for cached files (bytes)


def _cgroups() -> list[_Cgroup]:
    """Return the visible cgroups with a limit that hold this process, their ancestors included."""
    found = []
    for directory in _cgroup_directories():
        limits = [
            _read_int(directory, name)
            # Version 2's hard limit and the one beyond which a process is throttled; version 1's limit.
            for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        ]
        statistics = _read_statistics(directory)
        # Version 1: the least limit of this cgroup and its ancestors, invisible ones included.
        limits.append(statistics.get("hierarchical_memory_limit"))
        real = [limit for limit in limits if limit is not None and limit < 1 << 60]
        if not real:
            continue
        used = _read_int(directory, "memory.current")
        prefix = ""
        if used is None:
            used = _read_int(directory, "memory.usage_in_bytes")
            prefix = "total_"  # child cgroups included
        files = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        found.append(_Cgroup(min(real), max((used or 0) - files, 0)))
    return found


def _cgroup_directories() -> list[str]:
    """Return the directories of the cgroups that bound this process's memory, the innermost first."""
    directories: dict[str, None] = {}
    mounts = _cgroup_mounts()
    for line in _read_lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for root, mounted in mounts["memory" if controllers else ""]:
            # In a container what is mounted may begin at its own cgroup, while the path is the host's.
            relative = os.path.relpath(path, root)
            parts = [part for part in relative.split("/") if part not in (".", "")]
            if (
                ".." in parts
            ):  # neither is of use for the other: the path from the top, as far as it is there
                parts = [part for part in path.split("/") if part not in ("..", "")]
            for count in range(len(parts), -1, -1):
                directories[os.path.join(mounted, *parts[:count])] = None
    return [directory for directory in directories if os.path.isdir(_below_root(directory))]


def _cgroup_mounts() -> dict[str, list[tuple[str, str]]]:
    """Return the mount points of cgroups version 2 (``""``) and version 1's memory, with their root cgroups."""
    mounts: dict[str, list[tuple[str, str]]] = {"": [], "memory": []}
    for line in _read_lines("/proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, mounted = (_unescape(field) for field in before.split(" ")[3:5])
        if kind == "cgroup2":
            mounts[""].append((root, mounted))
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts["memory"].append((root, mounted))
    mounts[""] = mounts[""] or [("/", "/sys/fs/cgroup")]
    mounts["memory"] = mounts["memory"] or [("/", "/sys/fs/cgroup/memory")]
    return mounts


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _below_root(path: str) -> str:
    return os.path.join(_ROOT, path.lstrip("/"))


def _read_lines(path: str) -> list[str]:
    try:
        with open(_below_root(path)) as file:
            return file.read().splitlines()
    except OSError:
        return []


def _read_int(directory: str, name: str) -> int | None:
    lines = _read_lines(os.path.join(directory, name))
    return int(lines[0]) if lines and lines[0].isdigit() else None  # else it is "max"


def _read_statistics(directory: str) -> dict[str, int]:
    lines = map(str.split, _read_lines(os.path.join(directory, "memory.stat")))
    return {fields[0]: int(fields[1]) for fields in lines if len(fields) == 2}


@functools.cache
def _libc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def ucx_keeps_freed_memory() -> bool:
    """Return whether UCX, a transport of MPI, is loaded and intercepts malloc.

    It keeps freed memory from going back to the system. A process that allocates and frees large arrays in
    turn then grows from iteration to iteration.
    """
    if os.environ.get("UCX_MEM_EVENTS", "").lower() in ("n", "no", "0", "off", "false"):
        return False
    with open("/proc/self/maps") as maps:
        return any("libucm" in line for line in maps)


def trim() -> None:
    """Give free memory inside malloc's heaps back to the system (glibc; elsewhere do nothing)."""
    library = _libc()
    if library:
        library.malloc_trim(0)


def keep_less_freed_memory(threshold: int) -> None:
    """Make malloc give blocks of ``threshold`` bytes and more back to the system when freed (glibc).

    By default malloc raises that threshold up to 32 MiB as the program frees larger blocks. That is faster,
    but the freed memory stays in its heaps and counts as resident.
    """
    library = _libc()
    if library:
        library.mallopt(_M_MMAP_THRESHOLD, threshold)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * threshold)

"""What the system says of this process's memory, and how to give freed memory back to it (Linux)."""

from __future__ import annotations

import ctypes
import functools
import os
import resource

import psutil

__all__ = [
    "ResidentMemory",
    "available_bytes",
    "keep_less_freed_memory",
    "physical_bytes",
    "trim",
    "ucx_keeps_freed_memory",
]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_CGROUP = "/sys/fs/cgroup"


class ResidentMemory:
    """Reads this process's resident memory (RSS) in about a microsecond, its peak in ten."""

    #: The highest peak before it was reset (bytes), and in which process.
    _before_reset = (0, 0)

    def __init__(self) -> None:
        self._pid, self._fd = 0, -1

    def bytes(self) -> int:
        """Return the resident memory (bytes)."""
        if self._pid != os.getpid():  # a fork's file would tell of its parent
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._pid = (
                os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC),
                os.getpid(),
            )
        return int(os.pread(self._fd, 128, 0).split()[1]) * _PAGE

    @classmethod
    def peak_bytes(cls) -> int:
        """Return the most that it has been since the process began (bytes)."""
        pid, before = cls._before_reset
        now = cls.peak_since_reset()
        return max(before, now) if pid == os.getpid() else now

    @staticmethod
    def peak_since_reset() -> int:
        """Return the most that it has been since :meth:`reset_peak` (bytes), the kernel's ``VmHWM``."""
        with open("/proc/self/status", "rb", buffering=0) as file:
            status = file.read(8192)
        start = status.find(b"VmHWM:")
        return int(status[start + 6 : status.index(b"kB", start)]) << 10 if start >= 0 else 0

    @classmethod
    def reset_peak(cls) -> bool:
        """Let the kernel begin its peak anew from here. Return whether it does that."""
        cls._before_reset = os.getpid(), cls.peak_bytes()
        try:
            with open("/proc/self/clear_refs", "wb", buffering=0) as file:
                file.write(b"5")
        except OSError:
            return False
        return True


def physical_bytes() -> int:
    """Return the memory this process could have at all (bytes): the machine's, its cgroups', its rlimit's."""
    return min([psutil.virtual_memory().total, *_cgroup_limits(), *_rlimit()])


def available_bytes() -> int:
    """Return the memory this process could take more of now (bytes)."""
    room = [psutil.virtual_memory().available]
    room += [max(limit - used, 0) for limit, used in _cgroups()]
    address_space = _rlimit()
    if address_space:
        room.append(max(address_space[0] - psutil.Process().memory_info().vms, 0))
    return min(room)


def _rlimit() -> list[int]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [soft]


def _cgroup_limits() -> list[int]:
    return [limit for limit, _ in _cgroups()]


def _cgroups() -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of this process's cgroup and those above it, where there is a limit."""
    found = []
    for directory in _cgroup_directories():
        for limit_name, used_name in (
            ("memory.max", "memory.current"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
        ):
            limit, used = (
                _read_int(os.path.join(directory, name)) for name in (limit_name, used_name)
            )
            if limit is not None and limit < 1 << 60:
                found.append((limit, used or 0))
    return found


@functools.cache
def _cgroup_directories() -> list[str]:
    directories = []
    try:
        with open("/proc/self/cgroup") as lines:
            for line in lines:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                if controllers and "memory" not in controllers.split(","):
                    continue
                root = os.path.join(_CGROUP, "memory") if controllers else _CGROUP
                # In a container the path may be the host's, which is not mounted: its parts that are.
                parts = path.strip("/").split("/") if path.strip("/") else []
                directories += [os.path.join(root, *parts[:n]) for n in range(len(parts), -1, -1)]
    except OSError:
        pass
    return [directory for directory in dict.fromkeys(directories) if os.path.isdir(directory)]


def _read_int(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # "max", in version 2
        return None


@functools.cache
def _libc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def ucx_keeps_freed_memory() -> bool:
    """Tell whether UCX, a transport of MPI, is loaded and watches malloc.

    What is freed then does not go back to the system: the memory of a process that takes and frees large
    arrays in turn grows from iteration to iteration.
    """
    if os.environ.get("UCX_MEM_EVENTS", "").lower() in ("n", "no", "0", "off", "false"):
        return False
    with open("/proc/self/maps") as maps:
        return any("libucm" in line for line in maps)


def trim() -> None:
    """Give free memory inside malloc's heaps back to the system (glibc; elsewhere nothing)."""
    library = _libc()
    if library:
        library.malloc_trim(0)


def keep_less_freed_memory(threshold: int) -> None:
    """Let allocations of ``threshold`` bytes and more go back to the system when they are freed (glibc).

    By default malloc raises that threshold up to 32 MiB as the program frees larger blocks, which is
    faster, but what is freed then stays in its heaps and counts as resident.
    """
    library = _libc()
    if library:
        library.mallopt(_M_MMAP_THRESHOLD, threshold)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * threshold)

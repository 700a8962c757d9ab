"""The default limit is no more than what the machine and the cgroups let a process have."""

from __future__ import annotations

import resource
import types

import pytest

from chainer_ooc import settings
from chainer_ooc.swap.budget import MemoryBudget
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.devices.ram import device as ram_device
from chainer_ooc.swap.system import memory

MIB = 1 << 20
NONE = (1 << 63) - 4096  # version 1's word for "max"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "38 31 0:41 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
OTHERS = (
    "23 0 8:1 / / rw - ext4 /dev/sda rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
)


class Machine:
    """Files of the kernel under a root of their own. All numbers are MiB."""

    def __init__(self, root, monkeypatch):
        self.root = root
        monkeypatch.setattr(memory, "_ROOT", str(root))
        self.process(anonymous=100, files=200)
        self._monkeypatch = monkeypatch
        virtual = types.SimpleNamespace(total=128 << 30, available=64 << 30)
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: virtual)
        self.virtual = virtual

    def put(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def process(self, anonymous, files, shared=0):
        self.put(
            "proc/self/status",
            f"Name:\tpython\nVmRSS:\t{(anonymous + files + shared) << 10} kB\nRssAnon:\t{anonymous << 10} kB\n"
            f"RssFile:\t{files << 10} kB\nRssShmem:\t{shared << 10} kB\n",
        )

    def in_cgroup(self, line, mounts):
        self.put("proc/self/cgroup", line)
        self.put("proc/self/mountinfo", OTHERS + mounts)

    def v2(self, directory, limit, used, files=0, high=None):
        at = f"sys/fs/cgroup/{directory}"
        self.put(f"{at}/memory.max", "max\n" if limit is None else f"{limit * MIB}\n")
        self.put(f"{at}/memory.high", "max\n" if high is None else f"{high * MIB}\n")
        self.put(f"{at}/memory.current", f"{used * MIB}\n")
        self.put(
            f"{at}/memory.stat",
            f"anon 5\nfile {files * MIB}\nactive_file {files // 4 * MIB}\n"
            f"inactive_file {(files - files // 4) * MIB}\n",
        )

    def v1(self, directory, limit, used, files=0, above=NONE // MIB):
        at = f"sys/fs/cgroup/memory/{directory}"
        bytes_of = NONE if limit is None else limit * MIB
        self.put(f"{at}/memory.limit_in_bytes", f"{bytes_of}\n")
        self.put(f"{at}/memory.usage_in_bytes", f"{used * MIB}\n")
        self.put(
            f"{at}/memory.stat",
            f"cache 1\ninactive_file 0\nactive_file 0\nhierarchical_memory_limit {min(above * MIB, bytes_of)}\n"
            f"total_inactive_file {(files - files // 4) * MIB}\ntotal_active_file {files // 4 * MIB}\n",
        )

    def default_limit(self, ranks=1):
        """Return what a limit of None means (MiB)."""
        self._monkeypatch.setattr(ram_device, "ranks_of_this_node", lambda: ranks)
        return MemoryBudget(RamDevice("/tmp"), settings.Settings).limit / MIB


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def close(found, expected):
    return abs(found - expected) < 1


def test_without_cgroups_it_is_what_it_has_and_most_of_what_is_available(machine):
    assert close(machine.default_limit(), 100 + 0.95 * (64 << 10))
    machine.virtual.available = 50 * MIB
    assert close(machine.default_limit(), 100 + 0.95 * 50)


# The process has 100 MiB of its own, and 200 MiB of files that others have read before.
PLACES = {
    "version 2": lambda m, **k: (m.in_cgroup("0::/job\n", V2.format(root="/")), m.v2("job", **k)),
    "version 2, nested": lambda m, **k: (
        m.in_cgroup("0::/a.slice/job/step\n", V2.format(root="/")),
        m.v2("a.slice", None, 5000),
        m.v2("a.slice/job", **k),
        m.v2("a.slice/job/step", None, 100),
    ),
    "version 2, in a container": lambda m, **k: (
        m.in_cgroup("0::/\n", V2.format(root="/")),
        m.v2("", **k),
    ),
    "version 2, nested in a container": lambda m, **k: (
        m.in_cgroup("0::/sub/step\n", V2.format(root="/")),
        m.v2("", None, 5000),
        m.v2("sub", **k),
        m.v2("sub/step", None, 100),
    ),
    "version 2, in a container that shows its host's path": lambda m, **k: (
        m.in_cgroup("0::/docker/abc/sub\n", V2.format(root="/docker/abc")),
        m.v2("sub", **k),
    ),
    "version 2, a soft limit": lambda m, limit, used, **k: (
        m.in_cgroup("0::/job\n", V2.format(root="/")),
        m.v2("job", 50000, used, high=limit, **k),
    ),
    "version 1": lambda m, **k: (
        m.in_cgroup("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n", V1.format(root="/") + HYBRID),
        m.v1("job", **k),
    ),
    "version 1, nested": lambda m, **k: (
        m.in_cgroup("4:memory:/a/job/step\n", V1.format(root="/")),
        m.v1("a", None, 5000),
        m.v1("a/job", **k),
        m.v1("a/job/step", None, 100, above=k["limit"]),
    ),
    "version 1, in a container": lambda m, **k: (
        m.in_cgroup("4:memory:/docker/abc\n", V1.format(root="/docker/abc")),
        m.v1("", **k),
    ),
    "version 1, nested in a container": lambda m, **k: (
        m.in_cgroup("4:memory:/docker/abc/sub\n", V1.format(root="/docker/abc")),
        m.v1("", None, 5000),
        m.v1("sub", **k),
    ),
    "version 1, in a container that does not tell": lambda m, **k: (
        m.in_cgroup("4:memory:/kubepods/pod/abc\n", V1.format(root="/")),
        m.v1("", **k),
    ),
    "version 1, elsewhere": lambda m, **k: (
        m.in_cgroup(
            "4:memory:/job\n",
            V1.format(root="/").replace(
                "/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/my\\040own"
            ),
        ),
        m.v1("my own/job", **k),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_in_a_cgroup_it_is_never_more_than_the_limit(machine, place):
    """Of 1,000 MiB, others have 300. What the process has read of files was charged to another cgroup."""
    PLACES[place](machine, limit=1000, used=400)
    assert close(machine.default_limit(), 100 + 0.95 * 600)
    assert RamDevice("/tmp").total_bytes() == 1000 * MIB
    machine.process(anonymous=900, files=800)  # charged elsewhere, for the most part
    assert machine.default_limit() <= 1000


@pytest.mark.parametrize("place", PLACES)
def test_cached_files_are_available(machine, place):
    """They are taken back when memory is short: those of the process's own libraries, and data read of late."""
    PLACES[place](machine, limit=1000, used=1000, files=500)
    assert close(machine.default_limit(), 100 + 0.95 * 500)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_all_ranks_together_have_no_more_than_the_limit(machine, place, ranks):
    machine.process(anonymous=100, files=200, shared=40)  # which they share
    PLACES[place](machine, limit=2000, used=100 * ranks + 40 + 60, files=60)
    assert ranks * machine.default_limit(ranks) <= 2000


def test_the_least_limit_of_all_above_counts(machine):
    machine.in_cgroup("0::/a/b/c\n", V2.format(root="/"))
    machine.v2("a", 3000, 2900)
    machine.v2("a/b", 1000, 200)
    machine.v2("a/b/c", 2000, 100)
    assert close(machine.default_limit(), 100 + 0.95 * 100)
    assert RamDevice("/tmp").total_bytes() == 1000 * MIB


def test_a_limit_above_what_can_be_seen_counts(machine):
    """Version 1 tells of the limits outside of a container."""
    machine.in_cgroup("4:memory:/docker/abc\n", V1.format(root="/docker/abc"))
    machine.v1("", None, 100, above=1000)
    assert close(machine.default_limit(), 100 + 0.95 * 900)


def test_no_limit_is_no_limit(machine):
    expected = machine.default_limit()
    for line, mounts, make in (
        ("0::/job\n", V2, machine.v2),
        ("4:memory:/job\n", V1, machine.v1),
    ):
        machine.in_cgroup(line, mounts.format(root="/"))
        make("job", None, 400)
        assert machine.default_limit() == expected
    machine.in_cgroup("0::/gone\n", V2.format(root="/"))
    assert machine.default_limit() == expected


def test_a_process_that_moves_has_the_limits_of_where_it_is(machine):
    PLACES["version 2"](machine, limit=1000, used=400)
    before = machine.default_limit()
    machine.in_cgroup("0::/other\n", V2.format(root="/"))
    machine.v2("other", 500, 400)
    assert machine.default_limit() < before


def test_more_in_use_than_the_limit_leaves_what_there_is(machine):
    PLACES["version 2"](machine, limit=1000, used=1200)
    assert close(machine.default_limit(), 100)


def test_an_address_space_that_is_limited(machine, monkeypatch):
    vms = memory.psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (vms + 200 * MIB, resource.RLIM_INFINITY))
    assert 100 <= machine.default_limit() <= 100 + 0.95 * 210


def test_this_machine_has_some():
    assert 0 < memory.attainable_bytes(0.05) <= memory.physical_bytes()


@pytest.mark.parametrize(
    "line, files, limit",
    [
        ("0::/a/b", {"a/memory.max": "4096", "a/b/memory.max": "max"}, 4096),
        ("0::/a/b", {"a/memory.max": "4096", "a/b/memory.max": "1024"}, 1024),
        ("0::/a", {"a/memory.max": "max"}, None),
        ("0::/a", {"a/memory.max": "max", "a/memory.high": "2048"}, 2048),
        ("0::/gone", {"memory.max": "512"}, 512),
        ("5:memory:/a", {"memory/a/memory.limit_in_bytes": "2048"}, 2048),
        ("5:cpu:/a", {"a/memory.max": "2048"}, None),
        ("", {"memory.max": "512"}, None),
    ],
)
def test_the_limit_of_the_cgroups_is_the_least_up_to_the_root(machine, line, files, limit):
    machine.put("proc/self/cgroup", line)
    for name, text in files.items():
        machine.put(f"sys/fs/cgroup/{name}", text)
    assert memory.cgroup_limit() == limit

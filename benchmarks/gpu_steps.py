"""The steps of ``gpu_check.py``, each for a process of its own: ``python benchmarks/gpu_steps.py NAME [ARGUMENTS]``.

A step writes lines of JSON to the file that ``GPU_CHECK_RECORDS`` names, as soon as it knows something: what it has
measured before it is ended in the middle is kept. On CUDA's double nothing that was measured is written.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from typing import Any

from cuda_common import timed
from gpu_check import ROOT, SKIPPED

DOUBLE = os.environ.get("GPU_CHECK_ON_DOUBLE") == "1"
#: When this process is ended (``time.monotonic()``).
END = float(os.environ.get("GPU_CHECK_END", time.monotonic() + 600))
MIB = 1 << 20
#: Iterations until a plan has been made, made again from better times, and tried; then those that are timed.
SETTLED, TIMED = (1, 1) if DOUBLE else (8, 5)
#: Images of each size (pixels): 64 of the small ones take 7 GiB in core.
BATCHES = {224: 64, 1120: 2}

#: What this process has written down; of that, what failed.
_noted: list[str] = []
_failed: list[str] = []


class Skip(Exception):
    """Raised where a step cannot run here, with the reason."""


def note(what: str, text: str = "", error: str = "", skipped: str = "", **measured: Any) -> None:
    """Write down one thing. With ``error`` the step goes on, and fails at its end."""
    record: dict[str, Any] = {"what": what, "measured": None if DOUBLE else measured}
    given = {"text": text, "error": error[-1500:], "skipped": skipped[:500]}
    _noted.append(what)
    write({**record, **{key: value for key, value in given.items() if value}})
    if error:
        _failed.append(what)


def write(record: dict[str, Any]) -> None:
    line = json.dumps(record, default=float)
    path = os.environ.get("GPU_CHECK_RECORDS")
    if path is None:
        print(line, flush=True)
    else:
        with open(path, "a") as file:
            file.write(line + "\n")


def attempt(what: str, function: Callable[[], dict[str, Any]], least: float = 5) -> None:
    """Measure one of several things. An error is written down, and the next one's turn comes.

    Args:
        what: Its name.
        function: Measures it.
        least: Seconds that it needs. With less left it is left out.
    """
    if END - time.monotonic() < least and not DOUBLE:
        note(what, skipped="no time was left")
        return
    try:
        note(what, **function())
    except Skip as reason:
        note(what, skipped=str(reason))
    except Exception as error:
        note(what, error=f"{type(error).__name__}: {error}")
    gc.collect()


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def missing_packages() -> list[str]:
    """Return what ``pip install chainer_ooc`` would have brought and is not here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w.-]+", one)[0] for one in project["dependencies"]]
    imported = {"protobuf": "google.protobuf", "typing-extensions": "typing_extensions"}
    return [name for name in names if not has(imported.get(name, name))]


def machine() -> None:
    """What the numbers depend on. This step comes first, and fails where nothing can run."""
    if missing := missing_packages():
        sys.exit(f"These packages are not here: {', '.join(missing)}")
    import cuda_common
    import numpy
    import psutil

    cuda_common.need_gpu()
    names = ("chainer", "cuda", "cupy", "mpi4py", "nvidia", "torch")
    packages = [
        f"{one.name} {one.version}"
        for one in importlib.metadata.distributions()
        if one.name and one.name.startswith(names)
    ]
    found = cuda_common.machine() | {
        "numpy": numpy.__version__,
        "cores": os.cpu_count(),
        "host_memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "packages": ", ".join(sorted(set(packages))),
    }
    if DOUBLE:  # its answers are not a GPU's, and nothing is measured on this machine
        found = {
            name: found[name] for name in ("date", "gpu", "cupy", "numpy", "python", "packages")
        }
    elif tool := shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,pcie.link.gen.current"
        query += ",pcie.link.width.current,ecc.mode.current,mig.mode.current"
        done = subprocess.run(
            [tool, f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        found["nvidia_smi"] = f"{query}: {done.stdout.strip() or done.stderr.strip()}"
    write({"what": "machine", "measured": found})


def doctor() -> None:
    """The doctor's lines. It also asks for MPI, without which the rest of this check can do."""
    done = subprocess.run(
        [sys.executable, "-m", "chainer_ooc", "doctor"], capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    lines = [
        line.split(maxsplit=2)
        for line in done.stdout.splitlines()
        if line[:5] in ("  ok ", "  NO ", "  -- ")
    ]
    for mark, name, *text in lines:
        missing = mark != "ok" and name in ("CuPy", "CUDA", "cuDNN", "GPU")
        note(name, text=mark, error=" ".join(text) if missing else "", found=" ".join(text))
    missing = {"CuPy", "CUDA", "cuDNN", "GPU"} - {name for _, name, *_ in lines}
    if missing:
        note("report", error=f"no line for {', '.join(sorted(missing))}")


def pytest_run(*arguments: str) -> None:
    """Run tests; write down each failure when it comes, and at the end how many there were."""
    if not has("pytest"):
        raise Skip("pytest is not installed")
    import pytest

    class Recorder:
        def __init__(self) -> None:
            self.outcomes: collections.Counter[str] = collections.Counter()
            self.collected = 0

        def pytest_collection_finish(self, session: Any) -> None:
            self.collected = len(session.items)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.outcomes["failed"] += 1
                note(report.nodeid, error=report.longreprtext)
            elif report.skipped:
                reason = (
                    report.longrepr[2]
                    if isinstance(report.longrepr, tuple)
                    else str(report.longrepr)
                )
                self.outcomes[reason.removeprefix("Skipped: ").split("(")[0]] += 1
            elif report.when == "call":
                self.outcomes["passed"] += 1

    recorder = Recorder()
    code = pytest.main(
        ["-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:faulthandler", *arguments],
        plugins=[recorder],
    )
    counts = [f"{count} {outcome}" for outcome, count in recorder.outcomes.most_common(8)]
    note("tests", text=", ".join([f"{recorder.collected} collected", *counts]))
    if code not in (0, 1):
        note("pytest", error=f"exit status {code!r}")
    from tests.doubles import cuda_runtime

    if cuda_runtime.is_installed() and not DOUBLE:  # tests/conftest.py found no GPU
        note("pytest", error="these tests ran on the double of CUDA: there is no /dev/nvidia0")


def stream_rules() -> None:
    pytest_run("tests/gpu/test_out_of_core_rules.py")


def out_of_core() -> None:
    few = ["-k", "given_back or cannot_fit"] if DOUBLE else []
    pytest_run("tests/gpu/test_out_of_core.py", "tests/gpu/test_cudnn_installation.py", *few)


def cudnn() -> None:
    few = ["--collect-only"] if DOUBLE else ["-k", "not recurrent"]
    pytest_run("tests/gpu/test_cudnn_functions.py", *few)


def maker(net: str, side: int, batch: int, mixed: bool = False) -> Callable[[], Any]:
    """Return a function that makes a :class:`gpu_training.Trainer`."""
    import gpu_training

    if DOUBLE:
        from tests.doubles import cuda_runtime

        cuda_runtime.setup(data=False)
    return functools.partial(gpu_training.Trainer, net, side, batch, mixed)


def equal_bits() -> None:
    """Parameters after a few iterations, in core twice and then under limits."""
    import gpu_training

    import chainer_ooc

    import chainer  # isort: skip

    make = maker("resnet50", 128, 64)

    def train(mode: Any) -> str:
        gpu_training.empty_pool()
        with chainer.using_config("cudnn_deterministic", True), mode:
            one = make()
            for _ in range(1 if DOUBLE else 8):
                one.step()
            return one.digest()

    needed = gpu_training.peak_in_core(make, 1)
    expected = train(contextlib.nullcontext())

    def check(mode: Any) -> dict[str, Any]:
        before = chainer_ooc.stats()
        equal = train(mode) == expected
        after = chainer_ooc.stats()
        if not equal and not DOUBLE:
            raise AssertionError("the parameters have other bits than in core")
        names = ("bytes_out", "bytes_in", "storages_remade")
        moved = {name: getattr(after, name) - getattr(before, name) for name in names}
        return {**moved, "equal_bits": equal}

    attempt("in core again", lambda: check(contextlib.nullcontext()))
    cases: list[tuple[float, dict[str, Any]]] = [(0.8, {}), (0.6, {}), (0.7, {"host_limit": 0})]
    cases.append((0.6, {"single_backward": True, "recompute": "auto"}))
    for share, settings in cases[2:] if DOUBLE else cases:
        given = {"limit": int(needed * share), **settings}
        name = f"limit {share} {settings or ''}".strip()
        mode = functools.partial(chainer_ooc.out_of_core_mode, **given)
        attempt(name, lambda mode=mode: fitting(lambda: check(mode())))


class Taken(threading.Thread):
    """The most bytes of the GPU that are not free, as the driver says, every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self) -> None:
        import cupy

        while not self.ended.wait(0.001):
            free, total = cupy.cuda.runtime.memGetInfo()
            self.peak = max(self.peak, total - free)

    def __enter__(self) -> Taken:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.join()


def gpu_memory() -> None:
    """Whether CuPy's pool serves under a limit: it answers a refusal by a full collection, and may be in pieces."""
    import cupy
    import gpu_training

    import chainer_ooc

    cupy.zeros(1)
    free, total = cupy.cuda.runtime.memGetInfo()
    before = total - free
    make = maker("resnet50", 224, BATCHES[224])
    needed = gpu_training.peak_in_core(make)
    note("in core", peak_mib=needed / MIB, taken_before_mib=before / MIB)
    collect, collections_made = gc.collect, [0]

    def counted(*given: Any) -> int:
        collections_made[0] += 1
        return collect(*given)

    def under(limit: int) -> dict[str, Any]:
        gpu_training.empty_pool()
        steps, gc.collect = [], counted
        try:
            with Taken() as taken, chainer_ooc.out_of_core_mode(limit=limit):
                one = make()
                for _ in range(1 if DOUBLE else 8):
                    start, collected = time.perf_counter(), collections_made[0]
                    one.step()
                    cupy.cuda.Device().synchronize()
                    steps.append(
                        (1000 * (time.perf_counter() - start), collections_made[0] - collected)
                    )
                pool = cupy.get_default_memory_pool().total_bytes()
        finally:
            gc.collect = collect
        return {
            "limit_mib": limit / MIB,
            "collections": sum(made for _, made in steps[1:]),
            "pool_mib": pool / MIB,
            "taken_mib": (taken.peak - before) / MIB,
            "ms_each": [round(ms, 1) for ms, _ in steps],
        }

    for share in (0.5, 0.3):
        attempt(f"limit {share}", lambda share=share: fitting(lambda: under(int(needed * share))))


def fitting(function: Callable[[], dict[str, Any]], known: bool = True) -> dict[str, Any]:
    """Do what should fit into memory. On the double nobody knows that, and where it is not ``known`` nobody does."""
    try:
        return function()
    except MemoryError as error:
        if known and not DOUBLE:
            raise
        raise Skip(f"does not fit: {error}") from None


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = [
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", _Location),
        ("meta", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


def pages() -> None:
    """Time the driver's virtual memory in pages of 2 MiB, call by call, while the GPU computes and while it is idle."""
    import cupy

    cupy.zeros(1)
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *given: Any) -> None:
        status = getattr(driver, name)(*given)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    size, address, integer = ctypes.c_size_t, ctypes.c_ulonglong, ctypes.c_ulonglong
    device = _Location(1, cupy.cuda.Device().id)
    properties = _Properties(1, 0, device)
    page = size()
    call("cuMemGetAllocationGranularity", ctypes.byref(page), ctypes.byref(properties), 0)
    note("granularity", bytes=page.value)
    most = 4 if DOUBLE else 100
    start = address()
    call(
        "cuMemAddressReserve",
        ctypes.byref(start),
        size(most * page.value),
        size(0),
        address(0),
        integer(0),
    )
    handles = [integer() for _ in range(most)]
    for handle in handles:
        call("cuMemCreate", ctypes.byref(handle), page, ctypes.byref(properties), integer(0))
    access = _Access(device, 3)
    spin = cupy.RawKernel(SPIN, "spin")
    stream = cupy.cuda.Stream(non_blocking=True)

    def at(number: int) -> Any:
        return address(start.value + number * page.value)

    def microseconds(function: Callable[[], None]) -> float:
        before = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - before)

    def map_pages(count: int) -> None:
        for number in range(count):
            call("cuMemMap", at(number), page, size(0), handles[number], integer(0))

    def allow(count: int) -> None:
        call("cuMemSetAccess", start, size(count * page.value), ctypes.byref(access), size(1))

    def unmap(count: int) -> None:
        call("cuMemUnmap", start, size(count * page.value))

    def unmap_each(count: int) -> None:
        for number in range(count):
            call("cuMemUnmap", at(number), page)

    def times(count: int, busy: bool, unmap: Callable[[int], None] = unmap) -> dict[str, Any]:
        told = collections.defaultdict(list)
        ran_on = []
        for _ in range(2 if DOUBLE else 20):
            if busy:
                spin((1,), (1,), (cupy.int64(1 if DOUBLE else 40_000_000),), stream=stream)
            for name, function in (
                ("map_us", map_pages),
                ("access_us", allow),
                ("unmap_us", unmap),
            ):
                told[name].append(microseconds(functools.partial(function, count)))
            ran_on.append(not stream.done)
            stream.synchronize()
        found: dict[str, Any] = {name: statistics.median(all_) for name, all_ in told.items()}
        found |= {f"{name}_most": max(all_) for name, all_ in told.items()}
        # False: one of the calls has waited for the GPU.
        return found | ({"gpu_still_busy": statistics.mean(ran_on)} if busy else {})

    spin((1,), (1,), (cupy.int64(1),), stream=stream)  # compiled
    stream.synchronize()
    for count in (1, most // 10 or 2, most):
        for busy in (False, True):
            name = f"{count} pages, {'busy' if busy else 'idle'}"
            attempt(name, functools.partial(times, count, busy), 2)
    attempt(
        f"{most} pages, busy, unmapped each", functools.partial(times, most, True, unmap_each), 2
    )
    for handle in handles:
        call("cuMemRelease", handle)
    call("cuMemAddressFree", start, size(most * page.value))
    made = [integer() for _ in range(most)]

    def create() -> dict[str, Any]:
        told = microseconds(
            lambda: [
                call("cuMemCreate", ctypes.byref(one), page, ctypes.byref(properties), integer(0))
                for one in made
            ]
        )
        gone = microseconds(lambda: [call("cuMemRelease", one) for one in made])
        return {"create_us": told / most, "release_us": gone / most}

    attempt("a page, made and released", create, 1)


SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def run_again() -> None:
    """What ``_TRUSTS_LIBRARIES`` in graph/recompute.py waits for: first as if it were on, then the tests."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    attempt("training that trusts cuDNN and cuBLAS", _train_trusting)
    pytest_run("tests/gpu/test_recompute.py", *(["--collect-only"] if DOUBLE else []))


def _train_trusting() -> dict[str, Any]:
    """Let all products run again where a library promises equal bits: a promise that is not kept is an error."""
    import chainer_ooc
    from chainer_ooc.graph import recompute

    import gpu_training  # isort: skip

    make = maker("resnet50", 128, 64)
    limit = gpu_training.peak_in_core(make, 1) // 2
    recompute._TRUSTS_LIBRARIES = True
    try:
        settings = {"host_limit": 0, "single_backward": True, "recompute": "auto"}
        with chainer_ooc.out_of_core_mode(limit=limit, **settings):
            one = make()
            for _ in range(1 if DOUBLE else 10):
                one.step()
    finally:
        recompute._TRUSTS_LIBRARIES = False
    return {"storages_remade": chainer_ooc.stats().storages_remade}


def times(net: str, side: str) -> None:
    """Iterations in core, at shares of what they need there, and with tensor cores."""
    import gpu_training

    batch = BATCHES[int(side)]
    make = maker(net, int(side), batch)
    few = DOUBLE and (net, side) != ("resnet50", "224")
    needed = gpu_training.peak_in_core(make, 1 if DOUBLE else 2)
    note("in core, memory", batch=batch, peak_mib=needed / MIB)
    settled = 0 if DOUBLE else 2
    attempt("in core", lambda: gpu_training.time_in_core(make, settled, TIMED))

    def under(share: float, **settings: Any) -> dict[str, Any]:
        limit = int(needed * share)
        return gpu_training.time_under_limit(make, limit, SETTLED, TIMED, **settings)

    limits = [("1/2", 0.5, {}), ("1/4", 0.25, {}), ("1/8", 0.125, {})]
    limits.append(("1/4", 0.25, {"recompute": "auto"}))
    if DOUBLE:
        limits = limits[:1] if few else limits[::3]
    for name, share, settings in limits:
        what = f"limit {name}{', recompute' if settings else ''}"
        run = functools.partial(under, share, **settings)
        attempt(what, functools.partial(fitting, run, share >= 0.5), 8)
    if side == "224" and not few:
        for what, mixed in (("in core, tf32", False), ("in core, mixed16", True)):
            attempt(what, functools.partial(_time_math, net, batch, mixed, settled))


def _time_math(net: str, batch: int, mixed: bool, settled: int) -> dict[str, float]:
    """Time iterations in core with tensor cores."""
    import cupy
    import gpu_training

    if not hasattr(cupy.cudnn, "set_math_mode"):
        raise Skip("CuPy's own modules have no math mode")
    cupy.cudnn.set_math_mode("fp32" if mixed else "tf32")
    try:
        return gpu_training.time_in_core(maker(net, 224, batch, mixed), settled, TIMED)
    finally:
        cupy.cudnn.set_math_mode("fp32")


def unified() -> None:
    """Stock Chainer in unified memory with half of what it needs in core: nobody knows how long that takes."""
    import gpu_training

    settled = 0 if DOUBLE else 1
    for side, batch in BATCHES.items():
        for net in gpu_training.NETS:
            if DOUBLE and (net, side) != ("resnet50", 224):
                continue
            make = maker(net, side, batch)
            left = gpu_training.peak_in_core(make, 1) // 2
            run = functools.partial(gpu_training.time_in_unified_memory, make, left, settled, 1)
            attempt(f"{net} {side}", run, 10)


def torch_times(net: str, side: str) -> None:
    """The same network in torch, in a process of its own: it brings a cuDNN of its own."""
    if not has("torch"):
        raise Skip("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Skip("torch finds no GPU")
    import torch_nets

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    batch = BATCHES[int(side)]
    ways = torch_nets.steps(net, int(side), batch, "cuda")

    def one(step: Callable[[], Any]) -> dict[str, float]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = timed(step, torch.cuda.synchronize, 3, TIMED)
        return {"batch": batch, **found, "peak_mib": torch.cuda.max_memory_allocated() / MIB}

    for name, step in ways.items():
        if side == "224" or name in ("eager", "checkpoint", "save_on_cpu"):
            attempt(name, functools.partial(one, step), 4)


def link() -> None:
    """Copies between pinned memory and the GPU, each way and both at once; and what it takes to lock memory."""
    import cupy

    sizes = (1,) if DOUBLE else (1, 16, 256)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]

    def bandwidth(nbytes: int, ways: str) -> dict[str, float]:
        hosts = [cupy.cuda.alloc_pinned_memory(nbytes) for _ in ways]
        devices = [cupy.cuda.alloc(nbytes) for _ in ways]
        count = max(1, (1 if DOUBLE else 512) * MIB // nbytes)
        best = 0.0
        for _ in range(1 if DOUBLE else 5):
            start, ends = cupy.cuda.Event(), [cupy.cuda.Event() for _ in ways]
            cupy.cuda.Device().synchronize()
            start.record(streams[0])
            streams[1].wait_event(start)
            for _ in range(count):
                for way, host, device, stream in zip(ways, hosts, devices, streams, strict=False):
                    if way == "i":
                        device.copy_from_host_async(ctypes.c_void_p(host.ptr), nbytes, stream)
                    else:
                        device.copy_to_host_async(ctypes.c_void_p(host.ptr), nbytes, stream)
            for end, stream in zip(ends, streams, strict=False):
                end.record(stream)
            cupy.cuda.Device().synchronize()
            ms = max(cupy.cuda.get_elapsed_time(start, end) for end in ends)
            best = max(best, count * len(ways) * nbytes / ms / 1e6 if ms else 0.0)
        return {"gb_per_second": best}

    for size in sizes:
        for name, ways in (("in", "i"), ("out", "o"), ("both together", "io")):
            attempt(
                f"{name}, copies of {size} MiB", functools.partial(bandwidth, size * MIB, ways), 2
            )

    def locked() -> dict[str, float]:
        nbytes = (16 if DOUBLE else 1024) * MIB
        start = time.perf_counter()
        pointer = cupy.cuda.runtime.hostAlloc(nbytes, 0)
        middle = time.perf_counter()
        cupy.cuda.runtime.freeHost(pointer)
        end = time.perf_counter()
        return {
            "lock_gb_per_second": nbytes / (middle - start) / 1e9,
            "unlock_gb_per_second": nbytes / (end - middle) / 1e9,
        }

    attempt("page-locked memory", locked, 2)


def workspace() -> None:
    """What more workspace gives, by cuDNN's heuristics and by its timed search."""
    import cupy
    import gpu_training

    import chainer  # isort: skip

    make = maker("resnet50", 224, BATCHES[224])

    def with_limit(mib: int, autotune: bool) -> dict[str, float]:
        chainer.backends.cuda.set_max_workspace_size(mib * MIB)
        with chainer.using_config("autotune", autotune):
            found = gpu_training.time_in_core(make, 0 if DOUBLE else 3, TIMED)
        return {**found, "pool_mib": cupy.get_default_memory_pool().total_bytes() / MIB}

    for autotune in (False,) if DOUBLE else (False, True):
        for mib in (8, 64, 512):
            attempt(
                f"{mib} MiB{', autotune' if autotune else ''}",
                functools.partial(with_limit, mib, autotune),
            )


def rnn() -> None:
    """Recurrent networks through cuDNN's v8 calls, which are off by default, against CuPy's kernels."""
    import cupy
    import numpy as np

    import chainer_ooc  # noqa: F401

    import chainer  # isort: skip

    size, steps, batch = (16, 3, 2) if DOUBLE else (512, 50, 64)
    np.random.seed(0)
    rng = np.random.RandomState(0)
    xs = [chainer.Variable(cupy.asarray(rng.rand(steps, size).astype("f"))) for _ in range(batch)]

    def results(net: Any) -> list[Any]:
        for variable in xs:
            variable.cleargrad()
        net.cleargrads()
        *states, ys = net(*[None] * (2 if "LSTM" in type(net).__name__ else 1), xs)
        loss = sum(chainer.functions.sum(y * y) for y in (*states, *ys)) / batch
        loss.backward()
        return [*(y.array for y in ys), xs[0].grad, *(p.grad for p in net.params())]

    def compare(name: str) -> dict[str, Any]:
        net = getattr(chainer.links, name)(2, size, size, 0.0)
        net.to_device("@cupy:0")
        found: dict[str, Any] = {}
        values = {}
        for setting in "0" if DOUBLE else "01":  # the double has no recurrent networks
            os.environ["CHAINER_OOC_CUDNN_RNN"] = setting
            values[setting] = [cupy.asnumpy(value) for value in results(net)]
            clock = timed(lambda: results(net), cupy.cuda.Device().synchronize, 1, TIMED)
            found |= {
                f"{key}_{'cudnn' if setting == '1' else 'cupy'}": value
                for key, value in clock.items()
            }
        if DOUBLE:
            return found
        pairs = list(zip(values["0"], values["1"], strict=True))
        worst = max(float(abs(a - b).max() / max(1e-6, abs(a).max())) for a, b in pairs)
        if not worst < 1e-3:
            raise AssertionError(f"results differ by {worst:.2g} of the largest")
        return {**found, "largest_difference": worst}

    for name in ("NStepLSTM", "NStepGRU", "NStepBiLSTM")[: 1 if DOUBLE else None]:
        attempt(name, functools.partial(compare, name), 4)
    if has("pytest") and not DOUBLE:
        pytest_run("tests/gpu/test_cudnn_functions.py", "-k", "recurrent")


def nccl() -> None:
    """NCCL, and ChainerMN's communicator on it, with one rank: sums and means of one are what they were."""
    import chainer_ooc  # noqa: F401

    import chainer  # isort: skip
    import cupy  # isort: skip

    try:
        from cupy.cuda import nccl as library

        version = library.get_version()
    except Exception as error:
        missing = isinstance(error, AttributeError)  # CuPy has told the reason as it was imported
        raise Skip(f"CuPy finds no NCCL{'' if missing else f': {error}'}") from None

    def all_reduce() -> dict[str, Any]:
        communicator = library.NcclCommunicator(1, library.get_unique_id(), 0)
        x, y = cupy.arange(1 << 20, dtype="f"), cupy.zeros(1 << 20, "f")
        stream = cupy.cuda.get_current_stream()
        communicator.allReduce(
            x.data.ptr, y.data.ptr, x.size, library.NCCL_FLOAT, library.NCCL_SUM, stream.ptr
        )
        stream.synchronize()
        assert bool((x == y).all()) or DOUBLE, "the sum of one differs from it"
        return {"version": version}

    def pure_nccl() -> dict[str, Any]:
        if not has("mpi4py"):
            raise Skip("mpi4py is not installed")
        import chainermn
        import numpy as np

        for dtype in (None, "float16"):
            communicator = chainermn.create_communicator("pure_nccl", allreduce_grad_dtype=dtype)
            link = chainer.links.Linear(64, 64)
            link.to_device("@cupy:0")
            link.W.grad = cupy.asarray(np.arange(64 * 64).reshape(64, 64) % 7, "f")
            link.b.grad = cupy.ones(64, "f")
            expected = link.W.grad.get()
            communicator.multi_node_mean_grad(link)
            assert (link.W.grad.get() == expected).all() or DOUBLE, (
                f"{dtype}: the mean of one differs from it"
            )
        return {"rank": communicator.rank, "size": communicator.size}

    attempt("ncclAllReduce", all_reduce)
    attempt("pure_nccl", pure_nccl)


STEPS = {
    function.__name__: function
    for function in (
        machine, doctor, stream_rules, equal_bits, out_of_core, gpu_memory, pages, cudnn, run_again, times, torch_times,
        unified, link, workspace, rnn, nccl,
    )
}  # fmt: skip


def main(name: str, *arguments: str) -> int:
    """Run a step. Return the exit status."""
    # Where it crashes, or hangs before it is ended: pytest takes what is written to the usual stderr.
    errors = os.fdopen(os.dup(2), "w")
    faulthandler.enable(errors)
    faulthandler.dump_traceback_later(max(END - time.monotonic() - 0.5, 0.1), file=errors)
    sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]
    try:
        STEPS[name](*arguments)
    except Skip as reason:
        if not _noted:
            write({"reason": str(reason)})
            return SKIPPED
        note("the rest", skipped=str(reason))
    faulthandler.cancel_dump_traceback_later()
    if _failed:
        print(f"\nfailed: {'; '.join(_failed)}", file=sys.stderr)
    return int(bool(_failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

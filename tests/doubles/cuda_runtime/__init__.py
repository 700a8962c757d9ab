"""Real CuPy on a machine without a GPU: the CUDA runtime, the driver, cuBLAS and cuRAND, on host memory.

CuPy's wheels contain CUDA's runtime and keep its symbols. :func:`install` puts a jump to this double's function at the
beginning of each; it loads a ``libcuda.so.1``, and stand-ins for the libraries that CuPy's modules link to. CuPy itself
(its pools, streams, events, checks of arguments) and NVRTC are the real ones.

* Device memory is host memory, and counts against the total. Copies copy. Streams do their work at once.
* Kernels, products and random numbers compute nothing: what they were to write stays as it is.
* ``setup(data=False)`` moves no data either: sizes of an H200 cost nothing then.
* Calls are counted (:func:`counts`) and can be made to fail (:func:`fail`, :func:`break_device`).
* What is wrong but may go well on hardware, such as a stream that is used after it was destroyed, is an error,
  and is noted: :func:`complaints`.

The driver's virtual memory (``cuMemCreate``, ``cuMemMap``, ...) is there as well, and strict: see ``virtual_memory.c``.
Pytest runs on it where CuPy is installed and no GPU is there (``tests/conftest.py``), and so do the processes that
tests start; a script does with ``python -m tests.doubles.cuda_runtime SCRIPT ARGUMENTS``. Linux on x86-64 only.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

from tests.doubles.cuda_runtime import cudnn
from tests.doubles.cuda_runtime.redirection import compiled, cuda_major, make_stand_ins, redirect

__all__ = [
    "H200",
    "SITE",
    "allow_in_child",
    "break_device",
    "complaints",
    "counts",
    "fail",
    "find_unchanged",
    "install",
    "is_installed",
    "is_needed",
    "is_supported",
    "kernels",
    "library",
    "memory",
    "reset",
    "setup",
]

FOLDER = Path(__file__).parent
#: With this folder and the repository's root in PYTHONPATH each Python process runs CuPy on the double.
SITE = FOLDER / "site"
#: The memory of an H200 (bytes).
H200 = 143771 << 20

#: What calls fail with unless :func:`fail` is told; all others with ``cudaErrorUnknown``.
_ERRORS = {
    "cudaMalloc": 2,
    "cudaMallocAsync": 2,
    "cudaHostAlloc": 2,
    "cudaHostRegister": 2,
    "cudaEventCreateWithFlags": 2,
    "cuMemCreate": 2,
    "cuMemAddressReserve": 2,
    "cuMemMap": 2,
    "cudaMemcpy": 1,
    "cudaMemcpyAsync": 1,
}

_MEMORY = (
    "total",
    "used",
    "peak",
    "allocated",
    "pool_used",
    "pool_reserved",
    "physical",
    "mapped",
    "reserved",
    "pinned",
    "pinned_peak",
    "copied_in",
    "copied_out",
    "copied_within",
    "copied_pageable",
)

_library: ctypes.CDLL | None = None
_stand_ins: list[ctypes.CDLL] = []


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MEMORY]


def is_supported() -> bool:
    """Tell whether the double knows this platform: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def is_needed() -> bool:
    """Tell whether CuPy is installed and no GPU is there, so that :func:`install` lets CuPy run."""
    if importlib.util.find_spec("cupy") is None or not is_supported():
        return False
    return not any(Path("/dev").glob("nvidia[0-9]*"))


def is_installed() -> bool:
    """Tell whether CuPy runs on the double in this process."""
    return bool(_stand_ins)


def install() -> None:
    """Let CuPy run on the double. CuPy must not have been imported. A second call does nothing.

    Raises:
        RuntimeError: If CuPy has been imported, there is no C compiler, or CuPy's wheel is not as it must be.
    """
    if _stand_ins:
        return
    if "cupy" in sys.modules:
        raise RuntimeError("CuPy has been imported: call install() before")
    # CuPy's own kernels only: those of CUB contain another copy of the runtime.
    os.environ.setdefault("CUPY_ACCELERATORS", "")
    double = library()
    # The double is a cuDNN, too. A path of it is needed, since it is not named as one.
    os.environ.setdefault("CHAINER_OOC_CUDNN", double._name)
    found = importlib.util.find_spec("cupy")
    if found is None or found.origin is None:
        raise RuntimeError("CuPy is not installed: make test-cuda installs it")
    site = Path(found.origin).parents[1]
    for path in make_stand_ins(site):
        _stand_ins.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    for path in site.glob("nvidia/*/lib/libnvrtc.so.*"):  # CuPy 13 does not look into wheels
        ctypes.CDLL(str(path))
    runtime = importlib.import_module("cupy_backends.cuda.api.runtime")
    double.double_set_version(1000 * cuda_major(site))
    redirect(Path(str(runtime.__file__)).resolve(), double)


def library() -> ctypes.CDLL:
    """Return the double, which is compiled at the first call: a ``libcuda.so.1`` for the whole process."""
    global _library
    if _library is None:
        files = sorted(FOLDER.glob("*.[ch]"))
        written = "".join(path.read_text() for path in files)
        generated = cudnn.functions(written)
        exported = FOLDER / "exported.txt"
        flags = ["-std=gnu11", "-O1", "-Wall", "-Wl,-soname,libcuda.so.1", "-lpthread", "-ldl"]
        flags += [f"-I{FOLDER}", f"-Wl,--version-script={exported}"]
        sources = [str(path) for path in files if path.suffix == ".c"]
        text = written + generated + exported.read_text()
        path = compiled("libcuda.so.1", text, [*sources, "-xc", "-", "-xnone"], flags, generated)
        _library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        _library.double_memory.restype = ctypes.POINTER(_Memory)
        for name in ("double_call_name", "double_complaint", "double_kernel"):
            getattr(_library, name).restype = ctypes.c_char_p
        _library.double_call_count.restype = ctypes.c_long
    return _library


def setup(
    total: int = H200,
    data: bool = True,
    lag: int = 0,
    workspace: int = 16 << 20,
    simulates_time: bool = False,
) -> None:
    """Set what the device is like.

    Args:
        total: Its memory (bytes).
        data: Whether copies copy. Without, only those below 4 KiB do.
        lag: After how many queries of events and streams work is said to be done, unless somebody waits for it.
        workspace: What the first algorithm that cuDNN offers for a convolution takes (bytes). The other takes none.
        simulates_time: Whether the times between events are simulated, and so the same in each run: 0.05 ms for each
            kernel, 0.5 ms for each convolution and product, copies at 50 GB/s. By default they are the host's.
    """
    library().double_simulate_time(int(simulates_time))
    library().double_set_workspace(ctypes.c_size_t(workspace))
    library().double_setup(ctypes.c_size_t(total), int(data))
    library().double_set_lag(lag)


def find_unchanged() -> None:
    """Let arrays be found unchanged, though no kernel computes fingerprints, or compares them."""
    fingerprints = importlib.import_module("chainer_ooc.swap.devices.cuda.fingerprints")
    equal = fingerprints._Comparison.equal
    fingerprints._Comparison.equal = lambda self: equal(self) or True


def counts() -> collections.Counter[str]:
    """Return how often each function of CUDA was called since :func:`reset`, by name."""
    double = library()
    names = range(double.double_number_of_calls())
    table = {double.double_call_name(i).decode(): double.double_call_count(i) for i in names}
    return collections.Counter({name: count for name, count in table.items() if count})


def kernels() -> collections.Counter[str]:
    """Return how often each kernel was launched since :func:`reset`, by name."""
    double, launches, index = library(), ctypes.c_long(), 0
    table: collections.Counter[str] = collections.Counter()
    while (name := double.double_kernel(index, ctypes.byref(launches))) is not None:
        table[name.decode()] += launches.value
        index += 1
    return +table


def memory() -> dict[str, int]:
    """Return the device's memory (bytes): ``total``, ``used``, ``peak`` and what it is used for.

    ``allocated`` by cudaMalloc; ``pool_used`` and ``pool_reserved`` of cudaMallocAsync; ``physical`` by cuMemCreate,
    ``mapped`` of it (twice where it is mapped twice), and ``reserved`` addresses. ``pinned`` and ``pinned_peak`` are
    page-locked host memory. Since :func:`reset` were ``copied_in``, ``copied_out`` and ``copied_within``, and
    ``copied_pageable`` of the first two from or to memory that is not page-locked.
    """
    now = library().double_memory().contents
    return {name: getattr(now, name) for name in _MEMORY}


def reset() -> None:
    """Begin to count anew; forget failures, complaints, peaks and a broken device."""
    library().double_reset()
    library().double_reset_kernels()


def fail(name: str, at: int = 1, times: int = 1, error: int | None = None) -> None:
    """Let calls of a function fail.

    Args:
        name: The function of CUDA, such as ``"cudaMalloc"``.
        at: Which call from now on is the first to fail: 1 is the next.
        times: How many fail from there on.
        error: The ``cudaError_t``. By default what that function runs into most likely.
    """
    error = _ERRORS.get(name, 999) if error is None else error
    library().double_fail(name.encode(), ctypes.c_long(at), ctypes.c_long(times), error)


def break_device(error: int = 719, after: tuple[str, int] | None = None) -> None:
    """Fail as a kernel does: all calls return the error, ``cudaErrorLaunchFailure`` by default, until :func:`reset`.

    Args:
        error: The ``cudaError_t``.
        after: The name of a function, and which call of it from now on is the last that succeeds. By default now.
    """
    if after is None:
        library().double_break(error)
    else:
        library().double_break_after(after[0].encode(), ctypes.c_long(after[1]), error)


def allow_in_child() -> None:
    """Let CUDA work in this forked child, as it never does: for tests that want a fresh process at little cost."""
    library().double_allow_child()


def complaints() -> list[str]:
    """Return the mistakes of the caller since :func:`reset`, the first 64.

    With ``CUDA_DOUBLE_ABORTS=1`` in the environment the first one aborts: ``python -X faulthandler`` shows where.
    """
    double = library()
    return [
        double.double_complaint(i).decode() for i in range(double.double_number_of_complaints())
    ]

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
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.doubles.cuda_runtime import cudnn

__all__ = [
    "H200",
    "SITE",
    "allow_in_child",
    "break_device",
    "complaints",
    "counts",
    "fail",
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

#: The libraries that CuPy's modules link to: the beginning of their functions' names, and the error
#: "not supported" of each.
_LIBRARIES = {"cublas": 15, "curand": 204, "cusolver": 9, "cusparse": 10, "cufft": 16}
_UNDERLYING = ("cublasLt", "nvJitLink")
_MODULES = ("cupy_backends/cuda/libs/*.so", "cupy/cuda/cufft*.so", "cupyx/_cusolver*.so")

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
        RuntimeError: If there is no C compiler, or CuPy's wheel is not as it must be.
    """
    if _stand_ins:
        return
    # CuPy's own kernels only: those of CUB contain another copy of the runtime.
    os.environ.setdefault("CUPY_ACCELERATORS", "")
    double = library()
    # The double is a cuDNN, too. A path of it is needed, since it is not named as one.
    os.environ.setdefault("CHAINER_OOC_CUDNN", double._name)
    found = importlib.util.find_spec("cupy")
    if found is None or found.origin is None:
        raise RuntimeError("CuPy is not installed: make test-cuda installs it")
    site = Path(found.origin).parents[1]
    for path in _make_stand_ins(site):
        _stand_ins.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    runtime = importlib.import_module("cupy_backends.cuda.api.runtime")
    double.double_set_version(1000 * _cuda_major(site))
    _redirect(Path(str(runtime.__file__)).resolve())


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
        path = _compiled("libcuda.so.1", text, [*sources, "-xc", "-", "-xnone"], flags, generated)
        _library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        _library.double_memory.restype = ctypes.POINTER(_Memory)
        for name in ("double_call_name", "double_complaint", "double_kernel"):
            getattr(_library, name).restype = ctypes.c_char_p
        _library.double_call_count.restype = ctypes.c_long
    return _library


def setup(total: int = H200, data: bool = True, lag: int = 0, workspace: int = 16 << 20) -> None:
    """Set what the device is like.

    Args:
        total: Its memory (bytes).
        data: Whether copies copy. Without, only those below 4 KiB do.
        lag: After how many queries of events and streams work is said to be done, unless somebody waits for it.
        workspace: What the first algorithm that cuDNN offers for a convolution takes (bytes). The other takes none.
    """
    library().double_set_workspace(ctypes.c_size_t(workspace))
    library().double_setup(ctypes.c_size_t(total), int(data))
    library().double_set_lag(lag)


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


def break_device(error: int = 719) -> None:
    """Fail as a kernel does: from now on all calls return the error, ``cudaErrorLaunchFailure`` by default."""
    library().double_break(error)


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


def _cuda_major(site: Path) -> int:
    """Return the major version of the CUDA that CuPy's wheel is for."""
    for path in site.glob("cupy_cuda*.dist-info"):
        return int(path.name[len("cupy_cuda") :].split("x")[0])
    raise RuntimeError(f"{site} has no CuPy from a wheel, such as cupy-cuda13x")


def _compiled(
    name: str, text: str, sources: list[str], flags: list[str], entered: str = ""
) -> Path:
    """Return a shared library, which is kept for the next process.

    Args:
        name: Its name.
        text: All that it is made of.
        sources: The compiler's arguments before ``flags``.
        flags: Those that change the result.
        entered: What the compiler reads from its standard input.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("the double of CUDA needs a C compiler: cc was not found")
    key = hashlib.sha256(" ".join([text, compiler, *flags]).encode()).hexdigest()[:16]
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(user) / "chainer_ooc" / "cuda_double" / key
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            command = [compiler, "-shared", "-fPIC", "-o", str(made), *sources, *flags]
            result = subprocess.run(
                command, input=entered, capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
            os.replace(made, path)  # other processes may be at it as well
    return path


def _nm(*arguments: str) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        raise RuntimeError("the double of CUDA needs nm (binutils), which was not found")
    return subprocess.run(
        [nm, *arguments], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def _make_stand_ins(site: Path) -> list[Path]:
    """Make libraries with the functions that CuPy's modules need to be loaded.

    Those that the double has are found in it first. The others return an error, and complain.
    """
    needed: dict[str, set[str]] = {}
    for pattern in _MODULES:
        for module in site.glob(pattern):
            for line in _nm("-D", "--undefined-only", str(module)):
                found = re.match(r"\s*U (\w+)@(lib(\w+)\.so\.\d+)$", line)
                if found and found[3] in _LIBRARIES:
                    needed.setdefault(found[2], set()).add(found[1])
    for name in _UNDERLYING:  # CuPy looks for them before those that depend on them
        needed[f"lib{name}.so.{_cuda_major(site)}"] = {f"{name}_is_a_stand_in"}
    made = []
    for name, functions in sorted(needed.items()):
        error = _LIBRARIES.get(name[3:].split(".")[0], 1)
        lines = [_stand_in(function, error) for function in sorted(functions)]
        text = "\n".join(["int double_unsupported(const char *, int);", *lines])
        with tempfile.TemporaryDirectory() as scratch:
            source, versions = Path(scratch) / "stand_in.c", Path(scratch) / "versions"
            source.write_text(text)
            versions.write_text(f"{name} {{ global: *; }};")
            flags = [f"-Wl,-soname,{name}", "-O1", "-w"]
            sources = [str(source), f"-Wl,--version-script={versions}"]
            made.append(_compiled(name, text, sources, flags))
    return made


def _stand_in(function: str, error: int) -> str:
    if re.search("Get(Error|Status)(Name|String)", function):
        return f'const char *{function}(int status) {{ return status == {error} ? "not in the double" : "error"; }}'
    return f'int {function}(void) {{ return double_unsupported("{function}", {error}); }}'


def _redirect(path: Path) -> None:
    """Overwrite the beginning of each ``cudaXxx`` in a loaded module with a jump to the double's function."""
    double = library()
    with open("/proc/self/maps") as maps:
        bases = [int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(str(path))]
    unsupported = ctypes.cast(double.double_unsupported, ctypes.c_void_p).value
    redirected = 0
    for line in _nm(str(path)):
        found = re.match(r"([0-9a-f]+) [tT] (cuda[A-Z]\w*)$", line)
        if not found:
            continue
        start = min(bases) + int(found[1], 16)
        function = getattr(double, found[2], None)
        if function is not None:
            address = ctypes.cast(function, ctypes.c_void_p).value
            redirected += 1
        else:
            address = _thunk(found[2], unsupported)
        _make_writable(start)
        ctypes.memmove(start, _jump(address), 14)
    if not redirected:
        raise RuntimeError(
            f"{path} has no symbols of CUDA's runtime: this CuPy cannot be redirected"
        )


def _jump(address: int | None) -> bytes:
    return b"\xff\x25\0\0\0\0" + struct.pack("<Q", address)  # jmp *0(%rip)


_thunks: list[object] = []


def _thunk(name: str, unsupported: int | None) -> int:
    """Return the address of code that calls ``double_unsupported(name, cudaErrorNotSupported)``."""
    import mmap

    text = ctypes.create_string_buffer(name.encode())
    if not _thunks or _thunks[-1][1] + 64 > mmap.PAGESIZE:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        _thunks.append([page, 0, []])
    page, used, names = _thunks[-1]
    code = b"\x48\xbf" + struct.pack("<Q", ctypes.addressof(text))  # mov $name, %rdi
    code += b"\xbe" + struct.pack("<I", 801) + _jump(unsupported)  # mov $801, %esi
    page[used : used + len(code)] = code
    names.append(text)
    _thunks[-1][1] += 64
    return ctypes.addressof(ctypes.c_char.from_buffer(page)) + used


def _make_writable(address: int) -> None:
    page = address & -4096
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(8192), 7):
        raise RuntimeError("CuPy's code cannot be changed: mprotect failed")

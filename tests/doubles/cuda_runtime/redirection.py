"""How CuPy gets onto the double: libraries that are compiled when they are needed, and jumps in its CUDA runtime."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

__all__ = ["compiled", "cuda_major", "make_stand_ins", "redirect"]

#: The libraries that CuPy's modules link to: the beginning of their functions' names, and the error
#: "not supported" of each.
_LIBRARIES = {"cublas": 15, "curand": 204, "cusolver": 9, "cusparse": 10, "cufft": 16}
#: What CuPy looks for before some of them.
_UNDERLYING = ("cublasLt", "nvJitLink")
_MODULES = ("cupy_backends/cuda/libs/*.so", "cupy/cuda/cufft*.so", "cupyx/_cusolver*.so")

#: What code refers to by address only.
_kept: list[object] = []


def cuda_major(site: Path) -> int:
    """Return the major version of the CUDA that CuPy's wheel is for."""
    for path in site.glob("cupy_cuda*.dist-info"):
        return int(path.name[len("cupy_cuda") :].split("x")[0])
    raise RuntimeError(f"{site} has no CuPy from a wheel, such as cupy-cuda13x")


def compiled(name: str, text: str, sources: list[str], flags: list[str], entered: str = "") -> Path:
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


def make_stand_ins(site: Path) -> list[Path]:
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
    for name in _UNDERLYING:
        needed[f"lib{name}.so.{cuda_major(site)}"] = {f"{name}_is_a_stand_in"}
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
            made.append(compiled(name, text, sources, flags))
    return made


def _stand_in(function: str, error: int) -> str:
    if re.search("Get(Error|Status)(Name|String)", function):
        return f'const char *{function}(int status) {{ return status == {error} ? "not in the double" : "error"; }}'
    return f'int {function}(void) {{ return double_unsupported("{function}", {error}); }}'


def redirect(path: Path, double: ctypes.CDLL) -> None:
    """Overwrite the beginning of each ``cudaXxx`` in a loaded module with a jump to the double's function.

    Raises:
        RuntimeError: If the module has no such symbols, or cannot be changed.
    """
    with open("/proc/self/maps") as maps:
        start = min(
            int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(str(path))
        )
    symbols = [re.match(r"([0-9a-f]+) [tT] (cuda[A-Z]\w*)$", line) for line in _nm(str(path))]
    places = {found[2]: start + int(found[1], 16) for found in symbols if found}
    if not places:
        raise RuntimeError(
            f"{path} has no symbols of CUDA's runtime: this CuPy cannot be redirected"
        )
    targets = {name: getattr(double, name) for name in places if hasattr(double, name)}
    addresses = {
        name: ctypes.cast(target, ctypes.c_void_p).value or 0 for name, target in targets.items()
    }
    addresses |= _refusals([name for name in places if name not in targets], double)
    for name, place in places.items():
        _make_writable(place)
        jump = _jump(addresses[name])
        ctypes.memmove(place, jump, len(jump))


def _jump(address: int) -> bytes:
    return b"\xff\x25\0\0\0\0" + struct.pack("<Q", address)  # jmp *0(%rip)


def _refusals(names: list[str], double: ctypes.CDLL) -> dict[str, int]:
    """Make code for functions that the double does not have. Return its addresses.

    Each calls ``double_unsupported(name, cudaErrorNotSupported)``.
    """
    unsupported = ctypes.cast(double.double_unsupported, ctypes.c_void_p).value or 0
    access = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    page = mmap.mmap(-1, 64 * max(len(names), 1), prot=access)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    for number, name in enumerate(names):
        text = ctypes.create_string_buffer(name.encode())
        code = b"\x48\xbf" + struct.pack("<Q", ctypes.addressof(text))  # mov $text, %rdi
        code += b"\xbe" + struct.pack("<I", 801) + _jump(unsupported)  # mov $801, %esi
        page[64 * number : 64 * number + len(code)] = code
        _kept.append(text)
    _kept.append(page)
    return {name: start + 64 * number for number, name in enumerate(names)}


def _make_writable(address: int) -> None:
    page = address & -mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), 7):
        raise RuntimeError("CuPy's code cannot be changed: mprotect failed")

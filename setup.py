"""Builds the C extension where that can be done, and adds ``chainer_ooc.pth`` to the wheel.

The rest is in pyproject.toml, and backend/ adds Chainer. An install never fails for want of the extension: without it
the package works, and its wheel is one for any machine.
"""

import atexit
import contextlib
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PTH = ROOT / "chainer_ooc.pth"
EXTENSION = "chainer_ooc.swap.devices.ram._allocator"
IN_PLACE = ROOT / f"{EXTENSION.replace('.', '/')}.abi3.so"

# The stable ABI of Python 3.11: one wheel for it and all later versions.
LIMITED_API, PYTHON_TAG = "0x030b0000", "cp311"
FLAGS = [
    *("-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-shared", "-Wall", "-Wextra"),
    "-Werror=implicit-function-declaration",  # what the limited API has not is not declared
    *("-D_GNU_SOURCE", f"-DPy_LIMITED_API={LIMITED_API}"),
]
# zig brings the headers of a C library along, and Debian's Python.h includes one that lies beside the system's own.
ZIG_FLAGS = ["-fno-sanitize=undefined", "-g0", "-idirafter", "/usr/include"]
ZIG_TARGETS = {
    "x86_64": "x86_64-linux-gnu.2.17",
    "aarch64": "aarch64-linux-gnu.2.17",
}
SECONDS = 600  # for one command


class NotBuilt(Exception):
    """Says why the extension cannot be built here."""


def c_files(ends="c"):
    """Return the sources of the extension, from the root on."""
    found = [path for end in ends for path in (ROOT / "chainer_ooc").rglob(f"*.{end}")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@functools.cache
def library():
    """Build the extension and return its path; say why and return ``None`` where that cannot be done."""
    folder = Path(tempfile.mkdtemp(prefix="chainer_ooc-build-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return compile_into(folder)
    except NotBuilt as reason:
        print(f"chainer_ooc is built without its C extension: {reason}", file=sys.stderr)
        return None


def compile_into(folder):
    """Build the extension in a folder, by the first compiler that can, and return its path."""
    if sys.platform != "linux" or sys.implementation.name != "cpython":
        raise NotBuilt("it is for CPython on Linux")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NotBuilt("free-threaded builds of Python have no stable ABI")
    if not c_files():
        raise NotBuilt("its sources are missing")
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise NotBuilt(f"{include}/Python.h is missing (Debian and Ubuntu: python3-dev)")
    reasons = []
    for compiler in compilers():
        try:
            return compile_with(compiler, include, folder)
        except NotBuilt as reason:
            reasons.append(str(reason))
    if not os.environ.get("CC"):  # else somebody wants that one, or none
        try:
            return compile_with(zig(folder / "zig"), include, folder)
        except NotBuilt as reason:
            reasons.append(str(reason))
    raise NotBuilt("; ".join(reasons))


def compilers():
    """Return the commands of the C compilers there are."""
    if os.environ.get("CC"):
        return [shlex.split(os.environ["CC"])]
    found = [path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    return [[path] for path in {os.path.realpath(path): path for path in found}.values()]


def zig(folder):
    """Install ziglang, a compiler that is a wheel, into a folder and return its command.

    It is not among the build's requirements: where it cannot be had, with no network say, the build goes on.
    """
    target = ZIG_TARGETS.get(platform.machine())
    if target is None or platform.libc_ver()[0] != "glibc" or sys.maxsize < 1 << 32:
        raise NotBuilt("there is no C compiler")
    asked = ["--target", str(folder), "--only-binary", ":all:", "--no-deps", "ziglang>=0.13"]
    pip = ["-I", "-m", "pip", "install", "-q", "--timeout", "15", "--retries", "1"]
    # -I: pip and build hide the environment's own packages, pip among them, by PYTHONPATH.
    installers = [[python, *pip] for python in (sys.executable, sys._base_executable)]
    if os.environ.get("UV"):
        installers.append([os.environ["UV"], "pip", "install", "-q", "--python", sys.executable])
    # Constraints are files, named as seen from where pip was called; --user and --target exclude each other.
    given = {"PIP_USER": "0", "PIP_CONSTRAINT": "", "PIP_BUILD_CONSTRAINT": ""}
    for installer in installers:
        with contextlib.suppress(NotBuilt):
            call([*installer, *asked], os.environ | given)
            return [str(folder / "ziglang" / "zig"), "cc", "-target", target, *ZIG_FLAGS]
    raise NotBuilt("there is no C compiler, and ziglang, which is one, cannot be installed")


def compile_with(compiler, include, folder):
    """Build the extension with a compiler; load it, to see that nothing is missing."""
    path = folder / f"{EXTENSION.rpartition('.')[2]}.abi3.so"
    given = " ".join(os.environ.get(name, "") for name in ("CPPFLAGS", "CFLAGS", "LDFLAGS"))
    caches = {
        name: str(folder / "cache") for name in ("ZIG_LOCAL_CACHE_DIR", "ZIG_GLOBAL_CACHE_DIR")
    }
    command = [
        *compiler,
        *FLAGS,
        f"-I{include}",
        *shlex.split(given),
        *c_files(),
        "-ldl",
        "-o",
        str(path),
    ]
    call(command, os.environ | caches)
    try:
        call([sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1], 2)", str(path)])
    except NotBuilt as reason:
        raise NotBuilt(f"what {compiler[0]} made does not load: {reason}") from None
    return path


def call(command, env=None):
    """Run a command; say its name and its first error where it fails."""
    try:
        done = subprocess.run(
            command, env=env, cwd=ROOT, timeout=SECONDS, capture_output=True, text=True, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]}: {error}") from None
    sys.stderr.write(done.stderr)  # a compiler's warnings
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        status = f"status {done.returncode}"
        raise NotBuilt(f"{command[0]}: {(errors or lines[-1:] or [status])[0].strip()}")


def add_extension(distribution):
    """Let a distribution have the extension if it can be built. Asked for late: not for metadata or sources."""
    if distribution.ext_modules is None and library() is not None:
        extension = Extension(EXTENSION, c_files(), py_limited_api=True)
        distribution.ext_modules = [extension]
    return distribution.ext_modules


class Build(build):
    """Builds the extension, too."""

    def run(self):
        if add_extension(self.distribution) and self.build_lib == self.build_purelib:
            # Chosen before anybody knew; a later wheel for any machine takes all that lies in the other one.
            self.build_lib = self.build_platlib
        super().run()


class BuildExt(build_ext):
    """Puts the extension where it belongs: it has been built already, or there is none."""

    def run(self):
        if self.extensions:
            super().run()

    def build_extension(self, ext):
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library(), path)


class BdistWheel(bdist_wheel):
    """Tags the wheel: for the stable ABI with the extension, for any machine without it."""

    def finalize_options(self):
        if self.distribution.ext_modules:
            self.py_limited_api = PYTHON_TAG
        super().finalize_options()

    def run(self):
        if add_extension(self.distribution):
            self.py_limited_api, self.root_is_pure = PYTHON_TAG, False
        super().run()


class BuildPy(build_py):
    """Copies the ``.pth`` file beside the packages: Python reads it there when it starts."""

    def run(self):
        super().run()
        if not self.editable_mode:
            Path(self.build_lib).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PTH, Path(self.build_lib, PTH.name))

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, PTH.name))]

    def get_source_files(self):
        backend = [str(path) for path in Path("backend").glob("*.py")]
        return [*super().get_source_files(), PTH.name, *c_files("ch"), *backend]


class EditableWheel(editable_wheel):
    """Builds the extension into the tree, or removes one of an earlier install, which may be of other sources."""

    def run(self):
        if not add_extension(self.distribution):
            IN_PLACE.unlink(missing_ok=True)
        super().run()


setup(
    cmdclass={
        "bdist_wheel": BdistWheel,
        "build": Build,
        "build_ext": BuildExt,
        "build_py": BuildPy,
        "editable_wheel": EditableWheel,
    }
)

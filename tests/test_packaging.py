"""The wheels, normal and editable, carry what makes ``import chainer`` work, and the C extension if it can be built."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import re
import shutil
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import chainer_ooc
from chainer_ooc.swap import native

ROOT = Path(chainer_ooc.__file__).resolve().parents[1]
SETUPTOOLS = int(importlib.metadata.version("setuptools").split(".")[0])

EXTENSION = "chainer_ooc/swap/devices/ram/_allocator.abi3.so"
C_FILES = {
    path.relative_to(ROOT).as_posix()
    for end in "ch"
    for path in (ROOT / EXTENSION).parent.glob(f"*.{end}")
}
HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
MISSING = [
    name
    for name, is_there in (
        ("a C compiler", any(map(shutil.which, ("cc", "gcc", "clang")))),
        (str(HEADER), HEADER.exists()),
    )
    if not is_there
]
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SETUPTOOLS < 77, reason="needs setuptools 77"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a copy of what the build reads, so that it writes nothing into the tree."""
    target = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "chainer_ooc.pth"):
        shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / "_chainer_ooc_startup.py", target)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "chainer_ooc", target / "chainer_ooc", ignore=ignore)
    return target


@pytest.fixture
def build(run_python, source, tmp_path):
    """Return a function that builds a "wheel", an "editable" one or an "sdist": its path, and what was said."""

    def call(kind, before="", **env):
        target = tmp_path / "built"
        shutil.rmtree(target, ignore_errors=True)
        code = (
            f"import os; os.chdir({str(source)!r}); {before}\n"
            f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
        )
        done = run_python("-c", code, env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **env})
        assert done.returncode == 0, done.stderr
        (path,) = target.glob("chainer_ooc-*")
        return path, done.stderr

    return call


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_wheel_installs_the_startup_hook(build, kind):
    wheel, _ = build(kind)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        recorded = [row[0] for row in csv.reader(io.StringIO(archive.read(record).decode()))]
        pth = archive.read("chainer_ooc.pth")
    assert sorted(recorded) == sorted(names)
    assert pth == (ROOT / "chainer_ooc.pth").read_bytes()
    if kind == "wheel":
        expected = {
            path.relative_to(ROOT).as_posix() for path in (ROOT / "chainer_ooc").rglob("*.py")
        }
        assert expected | {"_chainer_ooc_startup.py"} <= set(names)
        assert not [name for name in names if name.startswith(("tests", "examples", "docs"))]
        assert not [name for name in names if name.endswith((".c", ".h"))]


@needs_compiler
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_one_wheel_with_the_extension_is_for_all_versions(build, run_python, source, kind):
    wheel, said = build(kind)
    assert re.search(r"-cp311-abi3-linux_\w+\.whl$", wheel.name)
    assert "warning:" not in said.replace("warning: BuildPy", "").replace("warning: install", "")
    place = source
    if kind == "wheel":
        place = wheel.parent / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            (dist_info,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
            assert b"Root-Is-Purelib: false" in archive.read(dist_info)
            archive.extractall(place)
    code = (
        f"import sys; sys.path.insert(0, {str(place)!r})\n"
        "from chainer_ooc.swap import native; print(native.allocator.__file__)"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == str(place / EXTENSION), done.stderr


NO_HEADER = (
    "import sysconfig; paths = sysconfig.get_paths; "
    "sysconfig.get_paths = lambda *a, **k: paths(*a, **k) | {'include': '/nowhere'}"
)
FREE_THREADED = "import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize(
    ("before", "env", "reason"),
    [
        ("", {"CC": "/bin/false"}, "/bin/false: status 1"),
        ("", {"CC": "/no/such/compiler -O"}, "/no/such/compiler: "),
        ("", {"CC": "true"}, "what true made does not load"),  # ends well and makes nothing
        ("", {"PATH": "/nowhere"}, "no C compiler, and ziglang, which is one, cannot be installed"),
        pytest.param(
            *("", {"CC": "cc -nostdinc"}, "fatal error"), marks=needs_compiler, id="no headers of C"
        ),
        (NO_HEADER, {}, "/nowhere/Python.h is missing"),
        (FREE_THREADED, {}, "free-threaded"),
    ],
)
def test_without_a_compiler_the_wheel_is_for_any_machine(build, source, kind, before, env, reason):
    if reason.startswith(("no C", "fatal")) and not HEADER.exists():
        pytest.skip(f"needs {HEADER}")
    stale = source / EXTENSION
    stale.write_bytes(b"of an earlier install, from other sources")
    try:
        wheel, said = build(kind, before, **env)
        assert stale.exists() == (kind == "wheel")
    finally:
        stale.unlink(missing_ok=True)
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = (line for line in said.splitlines() if "without its C extension" in line)
    assert reason in line
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".c", ".h"))]
        (dist_info,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert b"Root-Is-Purelib: true" in archive.read(dist_info)


def test_the_source_distribution_builds_wheels(build, run_python, source, tmp_path):
    (source / EXTENSION).write_bytes(b"of an editable install")
    try:
        sdist, _ = build("sdist")
    finally:
        (source / EXTENSION).unlink()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= C_FILES | {"setup.py", "chainer_ooc.pth", "_chainer_ooc_startup.py"}
    assert EXTENSION not in names
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", tmp_path)
    # `make test` names these files as seen from where it runs.
    env = {"PIP_CONSTRAINT": "", "PIP_BUILD_CONSTRAINT": ""}
    done = run_python("-m", "pip", "wheel", *options, sdist, env=env)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert ("-abi3-" in wheel.name) is not bool(MISSING)


@pytest.mark.extension
def test_the_extension_uses_the_stable_abi_of_python_3_11_only():
    import abi3info
    from abi3info.models import PyVersion, Symbol

    stable = {**abi3info.FUNCTIONS, **abi3info.DATAS}
    library = Path(native.allocator.__file__).read_bytes()
    names = {name.decode() for name in re.findall(rb"(?<=\0)_?Py[A-Z_]\w+(?=\0)", library)}
    names -= {"PyInit__allocator"}
    assert "PyModule_Create2" in names  # what names are is found
    unstable = {
        name
        for name in names
        if (found := stable.get(Symbol(name))) is None or found.added > PyVersion(3, 11)
    }
    assert not unstable

"""The wheels, normal and editable, carry Chainer and what makes it work, and the C extension if it can be built.

``install_matrix.py`` installs them with each client.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import chainer_ooc
from chainer_ooc.compat import installation
from chainer_ooc.swap.devices.ram import native

ROOT = Path(chainer_ooc.__file__).resolve().parents[1]
SETUPTOOLS = int(importlib.metadata.version("setuptools").split(".")[0])

EXTENSION = "chainer_ooc/swap/devices/ram/_allocator.abi3.so"
C_FILES = {
    path.relative_to(ROOT).as_posix()
    for end in "ch"
    for path in Path(chainer_ooc.__file__).parent.rglob(f"*.{end}")
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
    for name in ("chainer_ooc", "backend"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


ONE_FILE = {"chainer/__init__.py": b"one file"}
PURELIB = f"chainer_ooc-{chainer_ooc.__version__}.data/purelib/"


@pytest.fixture
def build(run_python, source, tmp_path):
    """Return a function that builds a "wheel", an "editable" one or an "sdist": its path, and what was said.

    It does so with no package index, and with one file of Chainer unless all is asked for.
    """

    def call(kind, before="", chainer=False, fails=False, **env):
        target = tmp_path / "built"
        shutil.rmtree(target, ignore_errors=True)
        code = (
            f"import os, sys; os.chdir({str(source)!r}); sys.path.insert(0, 'backend'); {before}\n"
            f"import chainer_ooc_build as backend\nif not {chainer}: backend.built_chainer = lambda: {ONE_FILE}\n"
            f"backend.build_{kind}({str(target)!r})"
        )
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1", "UV": ""}
        done = run_python("-c", code, env=offline | env)
        assert bool(done.returncode) is fails, done.stderr
        return (None if fails else next(target.glob("chainer_ooc-*"))), done.stderr

    return call


@pytest.fixture(scope="module")
def chainers_wheel(tmp_path_factory):
    """Return the wheel that an old setuptools makes of Chainer's source."""
    folder = tmp_path_factory.mktemp("chainer")
    constraints = folder / "constraints.txt"
    constraints.write_text("setuptools==80.9.0\n")
    env = os.environ | {
        "PIP_CONSTRAINT": str(constraints),
        "PIP_BUILD_CONSTRAINT": str(constraints),
    }
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, "chainer==7.8.1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"needs the package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source, chainers_wheel, tmp_path_factory):
    """Return chainer_ooc's wheel with Chainer in it, without the extension."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    env = os.environ | {"CC": "/bin/false"}
    done = subprocess.run(
        [*command, "-w", folder, source], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def contents(wheel):
    """Return the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_chainers_wheel(wheel, chainers_wheel):
    held = {
        name.removeprefix(PURELIB): data
        for name, data in contents(wheel).items()
        if name.startswith(PURELIB)
    }
    stock = contents(chainers_wheel)
    info = "chainer-7.8.1.dist-info/"
    # What installers leave there of a stock Chainer goes with ours.
    assert set(held) - set(stock) == {
        info + name for name in ("INSTALLER", "LICENSE", "REQUESTED", "uv_build.json")
    }
    assert held[info + "LICENSE"] == stock[info + "licenses/LICENSE"]
    assert held.pop(info + "RECORD") == b""  # the files are chainer_ooc's
    metadata = stock[info + "METADATA"].decode().splitlines(keepends=True)
    metadata.remove("Requires-Dist: setuptools\n")
    stock[info + "METADATA"] = "".join(metadata).encode()
    del stock[info + "RECORD"]
    assert [name for name in stock if held[name] != stock[name]] == []


class Environment:
    """An empty virtual environment, into which ``pip`` of this one installs."""

    def __init__(self, folder):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
        self.python = folder / "env" / "bin" / "python"
        self.folder = folder
        self.site_packages = next((folder / "env" / "lib").glob("python3*/site-packages"))
        pip = folder / "bin" / "pip"
        pip.parent.mkdir()
        pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {self.python} "$@"\n')
        pip.chmod(0o755)
        self.path = f"{pip.parent}:{os.environ['PATH']}"

    def shell(self, command):
        """Run a shell command, in which ``pip`` installs here. Returns what it printed."""
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            ["sh", "-ec", command],
            env=env | {"PATH": self.path, "PIP_NO_COMPILE": "1"},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def find(self):
        """Return what the first import of Chainer would say, "found" where that is nothing."""
        code = "try: print('found' if u.find_spec('chainer') else None)\nexcept ImportError as e: print(e)"
        return self.shell(f'{self.python} -c "import importlib.util as u\n{code}"').strip()

    def left(self):
        """Return what there is of Chainer and chainer_ooc."""
        return sorted(path.name for path in self.site_packages.glob("*chainer*"))


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


@pytest.fixture
def another_version(tmp_path):
    """Return a wheel of Chainer 7.7.0."""
    path = tmp_path / "chainer-7.7.0-py3-none-any.whl"
    info = "chainer-7.7.0.dist-info/"
    files = {
        "chainer/__init__.py": "",
        "chainer/_version.py": "__version__ = '7.7.0'\n",
        "chainer/of_7_7_0.py": "",
        info + "METADATA": "Metadata-Version: 2.1\nName: chainer\nVersion: 7.7.0\n",
        info + "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[info + "RECORD"] = "".join(f"{name},,\n" for name in [*files, info + "RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_nothing_is_left_of_a_stock_chainer_that_was_there(environment, wheel, chainers_wheel):
    links = f"--no-deps --no-index --find-links {chainers_wheel.parent} chainer"
    environment.shell(f"pip install {links}; pip install --no-deps {wheel}")
    assert environment.find() == "found"
    environment.shell("pip uninstall -y chainer_ooc")
    assert environment.left() == []


def test_what_stays_of_a_stock_chainer_from_a_file_is_named(environment, wheel, chainers_wheel):
    environment.shell(f"pip install --no-deps {chainers_wheel}; pip install --no-deps {wheel}")
    origin = environment.site_packages / "chainer-7.8.1.dist-info" / "direct_url.json"
    assert installation.leftovers(str(environment.site_packages)) == [str(origin)]
    origin.unlink()  # as the doctor advises
    environment.shell("pip uninstall -y chainer_ooc")
    assert environment.left() == []


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_version_is_named_with_commands_that_mend_it(
    environment, wheel, another_version, order
):
    both = (another_version, wheel) if order == "before" else (wheel, another_version)
    for path in both:
        environment.shell(f"pip install --no-deps {path}")
    said = environment.find()
    assert said.startswith(
        "chainer_ooc works with Chainer 7.8.1, but Chainer 7.7.0 is installed in"
    )
    environment.shell(said.partition("; ")[2])
    assert environment.find() == "found"
    assert not (environment.site_packages / "chainer" / "of_7_7_0.py").exists()
    assert "chainer-7.7.0.dist-info" not in environment.left()


def test_chainer_goes_with_chainer_ooc_only(environment, wheel, chainers_wheel):
    environment.shell(f"pip install --no-deps {wheel}; pip uninstall -y chainer")
    assert environment.find() == "found"
    # Of a stock Chainer over it the files are its own.
    environment.shell(f"pip install --no-deps --force-reinstall {chainers_wheel}")
    environment.shell("pip uninstall -y chainer")
    said = environment.find()
    assert said.startswith("chainer is missing: it comes with chainer_ooc and has been removed; ")
    environment.shell(said.partition("; ")[2])
    assert environment.find() == "found"


def test_the_wheel_requires_what_chainer_requires(chainers_wheel):
    metadata = contents(chainers_wheel)["chainer-7.8.1.dist-info/METADATA"].decode()
    needed = set(re.findall(r"(?m)^Requires-Dist: ([\w-]+)[^;\n]*$", metadata)) - {"setuptools"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needed == {"filelock", "numpy", "protobuf", "six", "typing_extensions"}
    assert needed <= {re.split(r"\W", one)[0] for one in project["dependencies"]}


@pytest.mark.parametrize(
    "kind, links, reason",
    [
        ("wheel", "empty", "requirement chainer==7.8.1 (from versions: none)"),
        ("editable", "changed", "DO NOT MATCH THE HASHES"),
        ("wheel", "alone", "Cannot install setuptools>=40.8.0"),
    ],
)
def test_without_chainers_source_one_line_says_what_is_missing(
    build, tmp_path, kind, links, reason
):
    folder = tmp_path / links
    folder.mkdir()
    before = ""
    if links != "empty":
        archive = folder / "chainer-7.8.1.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(ROOT / "setup.py", "chainer-7.8.1/setup.py")
        if links == "alone":
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            before = f"import chainer_ooc_build; chainer_ooc_build.SHA256 = {digest!r}"
    _, said = build(kind, before, chainer=True, fails=True, PIP_FIND_LINKS=str(folder))
    last = said.splitlines()[-1]
    assert last.startswith(
        "chainer_ooc cannot be built: it takes Chainer from chainer-7.8.1.tar.gz"
    )
    assert "setuptools<81 to build that with, from the package index, but python" in last
    assert reason in last
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_wheel_installs_the_startup_hook_and_chainer(build, kind):
    wheel, _ = build(kind)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        recorded = [row[0] for row in csv.reader(io.StringIO(archive.read(record).decode()))]
        pth = archive.read("chainer_ooc.pth")
        assert archive.read(f"{PURELIB}chainer/__init__.py") == b"one file"
    assert sorted(recorded) == sorted(names)
    assert pth == (ROOT / "chainer_ooc.pth").read_bytes()
    if kind == "wheel":
        expected = {
            path.relative_to(ROOT).as_posix() for path in (ROOT / "chainer_ooc").rglob("*.py")
        }
        assert expected | {"_chainer_ooc_startup.py", "chainer_ooc/py.typed"} <= set(names)
        assert not [name for name in names if name.startswith(("tests", "examples", "docs"))]
        assert not [name for name in names if name.endswith((".c", ".h"))]


TYPED = """\
import chainer_ooc
from chainer_ooc import plans
chainer_ooc.enable(limit="8GiB", strict=True)
reveal_type((chainer_ooc.stats().bytes_out, plans(), chainer_ooc.explain()))
reveal_type(chainer_ooc.extensions.OutOfCoreReport())
"""
MISTAKEN = """\
import chainer_ooc
chainer_ooc.enabel()
chainer_ooc.enable(limits=1)
chainer_ooc.stats().bytes_out.decode()
"""


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_type_checker_sees_the_types_of_what_is_installed(build, environment, kind):
    wheel, _ = build(kind, CC="/bin/false")
    environment.shell(f"pip install --no-deps {wheel}")

    def mypy(text, pattern):
        (environment.folder / "script.py").write_text(text)
        options = f"--strict --python-executable {environment.python}"
        return re.findall(
            rf"(?m)^script\.py:(\d+: {pattern})",
            environment.shell(f"{sys.executable} -m mypy {options} script.py || true"),
        )

    revealed = [re.sub(r"[\w.]+\.(?=\w)", "", line) for line in mypy(TYPED, ".*")]
    assert revealed == [
        '4: note: Revealed type is "tuple[int, PlanReports, Explanation]"',
        '5: note: Revealed type is "OutOfCoreReport"',
    ]
    errors = [line.split()[0] + line.split()[-1] for line in mypy(MISTAKEN, "error: .*")]
    assert errors == ["2:[attr-defined]", "3:[call-arg]", "4:[attr-defined]"]


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
        "from chainer_ooc.swap.devices.ram import native; print(native.allocator.__file__)"
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
    if reason not in ("/nowhere/Python.h is missing", "free-threaded") and not HEADER.exists():
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


def test_the_source_distribution_builds_wheels(build, run_python, source, chainers_wheel, tmp_path):
    (source / EXTENSION).write_bytes(b"of an editable install")
    try:
        sdist, _ = build("sdist")
    finally:
        (source / EXTENSION).unlink()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= C_FILES | {
        "setup.py",
        "backend/chainer_ooc_build.py",
        "chainer_ooc.pth",
        "_chainer_ooc_startup.py",
    }
    assert EXTENSION not in names
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", tmp_path)
    done = run_python("-m", "pip", "wheel", *options, sdist)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert ("-abi3-" in wheel.name) is not bool(MISSING)
    assert set(contents(chainers_wheel)) <= {name.removeprefix(PURELIB) for name in contents(wheel)}


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

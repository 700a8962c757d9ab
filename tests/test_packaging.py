"""The wheels, normal and editable, carry what makes ``import chainer`` work."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import shutil
import zipfile
from pathlib import Path

import pytest

import chainer_ooc

ROOT = Path(chainer_ooc.__file__).resolve().parents[1]
SETUPTOOLS = int(importlib.metadata.version("setuptools").split(".")[0])

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


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_wheel_installs_the_startup_hook(run_python, source, tmp_path, kind):
    code = (
        f"import os; os.chdir({str(source)!r}); from setuptools import build_meta;"
        f"build_meta.build_{kind}({str(tmp_path)!r})"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
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

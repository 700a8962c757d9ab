"""Makes the trainer's modules importable, and runs it as a user does."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from imagenet_cli import IMAGENET, Lists, command, environment, write_lists

from tests import forked_python

sys.path.insert(0, str(IMAGENET))

import chainer_ooc  # noqa: F401  makes stock Chainer importable

#: What the trainer imports, and the process that draws its pictures.
PRELOADED = ("preloaded",)


@pytest.fixture
def lists(tmp_path: Path) -> Lists:
    root = tmp_path / "images"
    root.mkdir()
    return write_lists(root)


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """An interpreter that has imported the trainer already."""
    with (
        tempfile.TemporaryDirectory() as folder,
        forked_python.installed(
            Path(folder), PRELOADED, [IMAGENET, Path(__file__).parent], environment()
        ) as program,
    ):
        yield str(program)


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(python: str) -> Train:
    """Runs train.py to its end; fails on another exit status than ``status``."""

    def run(
        *args: object, ranks: int = 1, status: int = 0, script: Path = IMAGENET / "train.py"
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command([str(a) for a in args], ranks, script, python),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,  # seconds alone; minutes on a busy machine
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run

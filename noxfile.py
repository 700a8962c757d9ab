"""Run the tests on each supported Python, with the oldest and the newest NumPy: ``nox``, or ``make matrix``.

    nox --list
    nox -s "tests(3.12, oldest NumPy)" -- tests/swap -q

What follows ``--`` is for pytest. Each session has its own environment and a copy of the working tree, so that it
leaves the tree's C extension alone. An interpreter that is missing is named, and its sessions are skipped.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.11.12"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False

if shutil.which("pyenv"):  # which hides the versions that are not selected
    versions = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
    os.environ.setdefault("PYENV_VERSION", ":".join(versions.stdout.split()[::-1]))

NUMPY = {"oldest": "numpy==1.26.*", "newest": "numpy>=2"}
#: NumPy 1.26 has wheels up to Python 3.12.
CELLS = [
    *(("3.11", "oldest"), ("3.11", "newest"), ("3.12", "oldest"), ("3.12", "newest")),
    *(("3.13", "newest"), ("3.14", "newest")),
]


@nox.session
@nox.parametrize(
    "python,numpy", [nox.param(*cell, id=f"{cell[0]}, {cell[1]} NumPy") for cell in CELLS]
)
def tests(session, numpy):
    """Install the package and what its tests need, and run pytest."""
    tree = Path(session.create_tmp(), "tree")
    shutil.rmtree(tree, ignore_errors=True)
    listed = session.run(
        *("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"),
        external=True,
        silent=True,
    )
    for name in filter(None, listed.split("\0")):
        if Path(name).is_file():  # else it has been deleted
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, tree / name)
    session.chdir(tree)
    session.install("-e", ".[mpi,examples,dev]", NUMPY[numpy])
    session.run("python", "-c", "import numpy; print('NumPy', numpy.__version__)")
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *session.posargs)

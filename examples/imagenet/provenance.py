"""What a run was: its settings, versions and place, saved with the results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chainer
import launcher
import yaml
from config import Config
from datasets.classes import Names
from errors import InputError
from files import write_text
from pydantic import TypeAdapter, ValidationError
from world import World

import chainer_ooc

CONFIG_FILE = "config.resolved.yaml"
ENVIRONMENT_FILE = "environment.json"
CLASSES_FILE = "classes.json"

PACKAGES = ("numpy", "chainer", "mpi4py", "pillow", "simplejpeg", "pydantic", "PyYAML")


def settings(config: Config) -> dict[str, Any]:
    """Returns the settings as values of JSON; what is None is left out."""
    return config.model_dump(mode="json", exclude_none=True)


def git_commit() -> str | None:
    """Returns the commit of the trainer's files, with "+" when they were changed since."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def versions(gpu: bool) -> dict[str, str | None]:
    """Returns the versions of what takes part; None for what is not there."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "chainer_ooc": chainer_ooc.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cupy"] = chainer.backends.cuda.cupy.__version__ if gpu else None
    found["mpi"] = None
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        found["mpi"] = " ".join(MPI.Get_library_version().split())[:100]
    found["git"] = git_commit()
    return found


def environment(world: World, gpu: bool) -> dict[str, Any]:
    """Returns versions, and where and how the run was started."""
    return {
        "versions": versions(gpu),
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": platform.node(),
        "platform": platform.platform(),
        "ranks": world.size,
        "threads per rank": launcher.threads(),
        "device": _device_name(gpu),
        "variables": {k: v for k, v in os.environ.items() if k.startswith("CHAINER_")},
    }


def _device_name(gpu: bool) -> str:
    if not gpu:
        return platform.processor() or platform.machine()
    runtime = chainer.backends.cuda.cupy.cuda.runtime
    return str(runtime.getDeviceProperties(runtime.getDevice())["name"].decode())


def save(config: Config, found: dict[str, Any], out: Path) -> None:
    """Writes both files to ``out``; ``--config`` takes the first one to start the same run."""
    text = yaml.safe_dump(settings(config), sort_keys=False)
    write_text(out / CONFIG_FILE, f"# resolved settings; start it again with --config\n{text}")
    write_text(out / ENVIRONMENT_FILE, json.dumps(found, indent=1) + "\n")


def save_classes(classes: Names, out: Path) -> None:
    """Writes the names of the classes by their numbers to ``out``, for evaluate.py."""
    if classes is None:
        (out / CLASSES_FILE).unlink(missing_ok=True)
    else:
        write_text(out / CLASSES_FILE, json.dumps(classes, indent=0) + "\n")


def read_classes(out: Path) -> Names:
    """Returns what ``save_classes`` has written; None if there is nothing.

    Raises:
        InputError: It is damaged.
    """
    try:
        return TypeAdapter(list[str]).validate_json((out / CLASSES_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as e:
        raise InputError(
            f"{out / CLASSES_FILE}: is no list of names; copy the folder of results again"
        ) from e

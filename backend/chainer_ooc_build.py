"""Builds chainer_ooc's wheels, normal and editable, with stock Chainer in them.

Chainer is published as a source distribution only, whose setup script needs a setuptools older than 81. A project
cannot tell pip so about one of its requirements, and pip fails unless it is told. So Chainer is no requirement: its
wheel is built here, and what it holds is added to ours, as a distribution of its own that other libraries may require.

All else is left to setuptools.
"""

import base64
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not below)

VERSION = "7.8.1"
SHA256 = "179f06176f8d7a42385bc7811956db04e68213cfe30f5081491b9e2b6ff70de8"
SETUPTOOLS = "setuptools<81"  # later ones lack pkg_resources

DIST_INFO = f"chainer-{VERSION}.dist-info"
# What installers write into it.
INSTALLERS = ("INSTALLER", "REQUESTED", "RECORD", "uv_build.json", "uv_cache.json")

# What would build something else, or in another way: settings, and how our own backend is found.
UNWANTED = re.compile(
    "CHAINER_BUILD_CHAINERX|(PIP|UV)_NO_BUILD_ISOLATION|UV_NO_VERIFY_HASHES|(_PYPROJECT_HOOKS|PEP517)_.*"
)

PTH = "chainer_ooc.pth"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build the wheel. Returns its name."""
    chainer = built_chainer()
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    add(Path(wheel_directory, name), chainer)
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build the editable wheel. Returns its name. Setuptools has no hook that would add the ``.pth`` file to it."""
    chainer = built_chainer()
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    add(Path(wheel_directory, name), chainer, {PTH: Path(PTH).read_bytes()})
    return name


def built_chainer():
    """Return the files of Chainer's wheel, of our own metadata for it, and their contents.

    Raises:
        SystemExit: With one line, if the source or the setuptools to build it with cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="chainer_ooc-build-") as folder:
        tree = install_chainer(Path(folder))
        paths = sorted(path for path in tree.rglob("*") if path.is_file())
        files = {path.relative_to(tree).as_posix(): path.read_bytes() for path in paths}
    for name in INSTALLERS:
        files.pop(f"{DIST_INFO}/{name}", None)
    metadata = files[f"{DIST_INFO}/METADATA"].decode()
    # Only the setup script needs it: nothing that pip should install beside Chainer, or miss.
    metadata = re.sub("(?m)^Requires-Dist: setuptools\n", "", metadata)
    own = {
        "METADATA": metadata.encode(),
        # Every file belongs to chainer_ooc. What removes distributions that nobody asked for, such as `uv sync` and
        # pip-sync, takes Chainer for one of them, and finds nothing to remove.
        "RECORD": b"",
        # All that a stock Chainer may have, so that no part of its metadata outlives ours if it was there before.
        "INSTALLER": b"chainer_ooc\n",
        "LICENSE": files[f"{DIST_INFO}/licenses/LICENSE"],  # its place until setuptools 77
        "REQUESTED": b"",
        "uv_build.json": b"{}",
    }
    return files | {f"{DIST_INFO}/{name}": data for name, data in own.items()}


def install_chainer(folder):
    """Let the ordinary client get Chainer's source and build it: the user's indexes, caches and proxies are respected.

    Returns the folder in which it is installed.
    """
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{SETUPTOOLS}\n")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"chainer=={VERSION} --hash=sha256:{SHA256}\n")
    options = ["-q", "--no-deps", "--no-binary", "chainer", "--require-hashes", "-r", str(wanted)]
    env = {name: value for name, value in os.environ.items() if not UNWANTED.fullmatch(name)}
    # The first is read up to pip 25.2, the second from 25.3 on.
    env |= {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
    tree = folder / "tree"
    if uv := env.get("UV"):  # it calls us, and knows of its own settings
        command = [uv, "pip", "install", "--python", sys.executable, "--target", str(tree)]
        call([*command, *options, "--build-constraints", str(constraints)], env, folder)
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check"]
        call([*command, *options, "-w", str(folder)], env, folder)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree)
    return tree


def call(command, env, folder):
    """Run a command; end with one line that says what is missing where it fails."""
    done = subprocess.run(
        command, env=env, cwd=folder, stderr=subprocess.PIPE, text=True, check=False
    )
    sys.stderr.write(done.stderr)
    if done.returncode:
        reasons = re.findall(r"(?m)^ *(?:ERROR|cause): (.+)", done.stderr)  # of pip, of uv
        reason = "; ".join(reasons[:2]) or done.stderr.strip().rpartition("\n")[2]
        raise SystemExit(
            f"chainer_ooc cannot be built: it takes Chainer from chainer-{VERSION}.tar.gz (SHA-256 {SHA256}), and "
            f"{SETUPTOOLS} to build that with, from the package index, but {Path(command[0]).name}: {reason}"
        )


def add(wheel, chainer, files=None):
    """Add Chainer's files, and others, to a finished wheel."""
    with zipfile.ZipFile(wheel) as old:
        members = {info.filename: (info, old.read(info)) for info in old.infolist()}
    (record,) = (name for name in members if name.endswith(".dist-info/RECORD"))
    # A wheel has one .dist-info at its root; what is here goes to the same place.
    purelib = record.replace(".dist-info/RECORD", ".data/purelib/")
    added = {purelib + name: data for name, data in chainer.items()} | (files or {})
    info, rows = members.pop(record)
    for name, data in added.items():
        member = zipfile.ZipInfo(name, info.date_time)
        member.compress_type, member.external_attr = info.compress_type, info.external_attr
        members[name] = member, data
    members[record] = info, rows + b"".join(map(row, added, added.values()))
    with zipfile.ZipFile(wheel, "w") as new:
        for info, data in members.values():
            new.writestr(info, data)


def row(name, data):
    """Return a file's line in a RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n".encode()

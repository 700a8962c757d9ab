"""``python -m chainer_ooc doctor``: list what this machine has, and the commands that install the rest.

Checks that can crash or hang (MPI, the GPU's libraries) run in child processes with a timeout.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from chainer_ooc.compat import installation
from chainer_ooc.swap.system import memory

#: Packages of the extras in pyproject.toml, by extra.
PACKAGES = {
    "mpi": ("mpi4py>=4", "mpich>=4"),
    "examples": (
        *("h5py", "jinja2", "lmdb", "matplotlib", "pillow", "pydantic>=2", "pyyaml"),
        *("scikit-learn", "simplejpeg", "tensorboardX", "tqdm"),
    ),
    "cuda12": ("cupy-cuda12x[ctk]>=14", "nvidia-cudnn-cu12>=9", "nvidia-nccl-cu12"),
    "cuda13": ("cupy-cuda13x[ctk]>=14", "nvidia-cudnn-cu13>=9", "nvidia-nccl-cu13"),
}
MAIN_JOB = "mpiexec -n 4 python examples/imagenet/train.py --ooc"

_IMPORT_NAMES = {
    "pillow": "PIL",
    "pydantic>=2": "pydantic",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
_GIB = 2**30
_TIMEOUT = 60  # seconds for one child process


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: The name of the thing.
        text: The result of the search.
        ok: It exists and works.
        required: The main job needs it.
        fix: The command, or advice, if it is not ok.
    """

    name: str
    text: str
    ok: bool = True
    required: bool = False
    fix: str = ""


def main(as_json: bool = False) -> int:
    """Print the report, as text or as JSON. Return 0 if the main job can run here, else 1."""
    import chainer_ooc

    if as_json:
        findings = list(examine())
        blocking = [f.name for f in findings if f.required and not f.ok]
        document = {
            "chainer_ooc": chainer_ooc.__version__,
            "main_job": MAIN_JOB,
            "can_run": not blocking,
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        print(json.dumps(document, indent=2))
        return int(bool(blocking))
    print(f"chainer_ooc {chainer_ooc.__version__}\n")
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"  {_mark(finding)} {finding.name:<10} {finding.text}", flush=True)

    _print_advice("Missing", [f for f in findings if f.fix and f.required])
    _print_advice("Optional", [f for f in findings if f.fix and not f.required])

    blocking = [f.name for f in findings if f.required and not f.ok]
    if blocking:
        print(f"\nThe main job cannot run here yet, because of: {', '.join(blocking)}.")
        return 1
    print(f"\nThe main job can run here:\n\n  {MAIN_JOB}")
    return 0


def _print_advice(title: str, findings: list[Finding]) -> None:
    advice: dict[str, list[str]] = {}
    for finding in findings:
        advice.setdefault(finding.fix, []).append(finding.name)
    if advice:
        print(f"\n{title}:\n")
        width = max(len(", ".join(names)) for names in advice.values())
        for fix, names in advice.items():
            print(f"  {', '.join(names):<{width}}  {fix}")


def _mark(finding: Finding) -> str:
    mark, colour = ("ok", 32) if finding.ok else ("NO", 31) if finding.required else ("--", 33)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return f"\033[{colour}m{mark}\033[0m"
    return mark


def examine() -> Iterator[Finding]:
    """Examine the machine and return the findings."""
    yield _python()
    yield _numpy()
    yield from _chainer()
    yield _extension()
    yield from _mpi()
    yield _examples()
    yield from _gpu()
    yield _cpu()
    yield _memory()
    yield _swap_disk()
    yield _settings()


def _python() -> Finding:
    text = f"{platform.python_version()}  {sys.executable}"
    return Finding("Python", text, sys.version_info >= (3, 11), True)


def _numpy() -> Finding:
    fix = pip_install("numpy>=1.26")
    try:
        import numpy
    except Exception as error:
        return Finding("NumPy", _first_line(error), False, True, fix)
    version = numpy.__version__
    recent = tuple(map(int, version.split(".")[:2])) >= (1, 26)
    return Finding("NumPy", version, recent, True, "" if recent else fix)


def _chainer() -> Iterator[Finding]:
    try:
        import chainer
    except Exception as error:
        # The import hook's message about a missing or another Chainer ends with the command.
        said = re.fullmatch(r"(.*?); ((?:uv )?pip .*)", str(error))
        text, fix = said.groups() if said else (_first_line(error), installation.reinstall())
        yield Finding("Chainer", text, False, True, fix)
        return
    folder = Path(chainer.__file__).parent
    yield Finding("Chainer", f"{chainer.__version__}  {folder}", True, True)
    if "_chainer_ooc_startup" not in sys.modules:
        yield Finding(
            "start-up",
            "chainer_ooc.pth is in no folder that Python reads such files from: import chainer_ooc before chainer",
            False,
            False,
            f"export PYTHONPATH={shlex.quote(installation.SITE)}:$PYTHONPATH",
        )
    for path in installation.leftovers(str(folder.parent)):
        text = f"{Path(path).name} of a Chainer that was there before stays when chainer_ooc goes"
        yield Finding("metadata", text, False, False, f"rm {shlex.quote(path)}")


def _extension() -> Finding:
    from chainer_ooc.swap.devices.ram import native

    if native.allocator is None:
        text = f"not built: {native.WITHOUT_IT}"
        return Finding("extension", text, False, False, native.HOW_TO_GET_IT)
    return Finding("extension", "NumPy's allocations are announced before they are made")


def _mpi() -> Iterator[Finding]:
    install = pip_install(*PACKAGES["mpi"])
    if importlib.util.find_spec("mpi4py") is None:
        yield Finding("mpi4py", "not installed", False, True, install)
    else:
        code = "from mpi4py import MPI; print(MPI.Get_library_version())"
        rc, out, err = _child([sys.executable, "-c", code])
        library = out.strip("\0\n ").splitlines()[0].strip() if rc == 0 and out.strip() else ""
        text = f"{importlib.metadata.version('mpi4py')}, {' '.join(library.split())}"
        if rc == 0:
            yield Finding("mpi4py", text, True, True)
        else:
            yield Finding("mpi4py", f"does not import: {_last_line(err)}", False, True, install)

    # First beside the interpreter, where the mpich package puts it, even if the environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpiexec = shutil.which("mpiexec", path=path)
    if mpiexec is None:
        yield Finding("mpiexec", "not found", False, True, install)
        return
    code = "from mpi4py import MPI; import sys; sys.stdout.write('size %d;' % MPI.COMM_WORLD.size)"
    rc, out, err = _child([mpiexec, "-n", "4", sys.executable, "-c", code])
    if rc == 0 and out.count("size 4;") == 4:
        yield Finding("mpiexec", f"{mpiexec}, 4 ranks tried", True, True)
    elif "run as root" in err + out or "not enough slots" in err + out:
        fix = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
        fix += "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"
        text = f"{mpiexec} refuses root or more ranks than cores"
        yield Finding("mpiexec", text, False, True, fix)
    elif rc == 0 and "size 1;" in out:
        text = f"{mpiexec} belongs to another MPI than mpi4py: each rank sees itself alone"
        yield Finding("mpiexec", text, False, True, install)
    else:
        text = f"{mpiexec} fails with 4 ranks: {_last_line(err or out)}"
        yield Finding("mpiexec", text, False, True, install)


def _examples() -> Finding:
    missing = [
        name
        for name in PACKAGES["examples"]
        if importlib.util.find_spec(_IMPORT_NAMES.get(name, name)) is None
    ]
    if missing:
        return Finding(
            "examples", f"without {', '.join(missing)}", False, True, pip_install(*missing)
        )
    return Finding("examples", f"all {len(PACKAGES['examples'])} packages they need", True, True)


def _gpu() -> Iterator[Finding]:
    driver = _driver_cuda_version()
    extra = "cuda13" if driver >= (13, 0) else "cuda12"
    cupy, cudnn, nccl = PACKAGES[extra]
    if driver == (0, 0):
        yield Finding("GPU", "no NVIDIA driver: arrays are NumPy's, ranks talk by MPI", False)
    rc, out, err = _child([sys.executable, "-c", "import chainer_ooc.doctor as d; d.probe_gpu()"])
    found: dict[str, Any] = json.loads(out.splitlines()[-1]) if rc == 0 and out else {}
    if not found:
        found = {"cupy_error": _last_line(err) or f"the probe ended with status {rc}"}
    if "cupy" not in found:
        yield Finding("CuPy", found["cupy_error"], False, False, pip_install(cupy))
    else:
        yield Finding("CuPy", found["cupy"])
    for key, name, package in (
        ("cuda", "CUDA", cupy),
        ("cudnn", "cuDNN", cudnn),
        ("nccl", "NCCL", nccl),
    ):
        if key in found:
            yield Finding(name, found[key])
        else:
            text = found.get(f"{key}_error", "not found")
            yield Finding(name, text, False, False, pip_install(package))
    if found.get("arenas"):
        yield Finding("GPU memory", f"from CuPy's pool: {found['arenas']}", False)
    if driver != (0, 0):
        devices = found.get("devices", [])
        text = ", ".join(devices) if devices else "none usable by CuPy"
        yield Finding("GPU", f"{text} (driver: CUDA {driver[0]}.{driver[1]})", bool(devices))


def probe_gpu() -> None:
    """Print CuPy's view of the GPUs as JSON. It runs in a child process, which a broken driver may end."""
    found: dict[str, Any] = {}
    try:
        import cupy

        found["cupy"] = cupy.__version__
    except Exception as error:
        found["cupy_error"] = _import_error_text(error)
        print(json.dumps(found))
        return
    try:
        from cupy.cuda import cublas, runtime  # noqa: F401

        found["cuda"] = _dotted(runtime.runtimeGetVersion())
    except Exception as error:
        found["cuda_error"] = _import_error_text(error)
    try:
        import cupy.cuda.cudnn
        import cupy.cudnn

        found["cudnn"] = str(cupy.cuda.cudnn.getVersion())
    except Exception as error:
        found["cudnn_error"] = _import_error_text(error)
    try:
        from cupy.cuda import nccl

        found["nccl"] = _dotted(nccl.get_version(), 10000, 100)
    except Exception as error:
        found["nccl_error"] = _import_error_text(error)
    try:
        found["devices"] = []
        for i in range(cupy.cuda.runtime.getDeviceCount()):
            properties = cupy.cuda.runtime.getDeviceProperties(i)
            size = properties["totalGlobalMem"] / _GIB
            found["devices"].append(f"{properties['name'].decode()} {size:.0f} GiB")
    except Exception as error:
        found["devices_error"] = _first_line(error)
    try:
        from chainer_ooc.swap.devices.cuda.arenas import why_no_arenas

        if found["devices"]:
            found["arenas"] = why_no_arenas(cupy)
    except Exception as error:
        found["arenas"] = _first_line(error)
    print(json.dumps(found))


def _driver_cuda_version() -> tuple[int, int]:
    """Return the newest CUDA version the NVIDIA driver can run, ``(0, 0)`` without a driver."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return (0, 0)
    except OSError:
        return (0, 0)
    return (version.value // 1000, version.value % 1000 // 10)


def _cpu() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding("CPU", f"{cores} of {os.cpu_count()} cores usable")


def _memory() -> Finding:
    machine = psutil.virtual_memory()
    text = f"{machine.total / _GIB:.1f} GiB, {machine.available / _GIB:.1f} GiB available"
    cgroup = memory.cgroup_limit()
    if cgroup is not None and cgroup < machine.total:
        text += f", cgroup limit {cgroup / _GIB:.1f} GiB"
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        text += f", address space limit {address_space / _GIB:.1f} GiB"
    return Finding("memory", text)


def _swap_disk() -> Finding:
    directory = os.environ.get("CHAINER_OOC_SWAP_DIR") or tempfile.gettempdir()
    advice = "export CHAINER_OOC_SWAP_DIR=/a/directory/on/a/disk"
    if not os.path.isdir(directory):
        text = f"{directory} (CHAINER_OOC_SWAP_DIR) is not a directory"
        return Finding("swap disk", text, False, True, advice)
    if not os.access(directory, os.W_OK):
        return Finding("swap disk", f"{directory} is not writable", False, True, advice)
    free = shutil.disk_usage(directory).free
    kind = _filesystem(directory)
    text = f"{directory}, {free / _GIB:.1f} GiB free" + (f", {kind}" if kind else "")
    if kind in ("tmpfs", "ramfs"):
        return Finding("swap disk", f"{text}: that is memory, not a disk", False, False, advice)
    if free < _GIB:
        return Finding("swap disk", f"{text}: too little", False, True, advice)
    return Finding("swap disk", text)


def _settings() -> Finding:
    """Look at the settings that the environment gives."""
    from chainer_ooc.errors import SettingError
    from chainer_ooc.settings import Arguments, Settings, variable_of

    variables = {name: variable_of(name) for name in Arguments.__annotations__}
    given = {name for name, variable in variables.items() if os.environ.get(variable)}
    try:
        with warnings.catch_warnings(action="ignore"):  # the line of the swap disk says it
            settings = Settings.resolve({})
    except SettingError as error:
        found = re.search(r"CHAINER\w+", str(error))
        fix = f"unset {found[0]}" if found else "unset the variable"
        return Finding("settings", str(error), False, True, fix)
    in_force = [f"{variables[n]}: {n}={getattr(settings, n)!r}" for n in variables if n in given]
    return Finding("settings", ", ".join(in_force) or "no CHAINER_OOC_* variable: the defaults")


def _filesystem(directory: str) -> str:
    real = Path(directory).resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if real.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else ""


def pip_install(*packages: str) -> str:
    """Return the shell command that installs ``packages``."""
    quoted = (f"'{p}'" if any(c in p for c in "<>=[") else p for p in packages)
    return f"pip install {' '.join(quoted)}"


def _child(command: list[str]) -> tuple[int, str, str]:
    """Run a command. Return its exit status, standard output and standard error."""
    # This package's place, if it was found by PYTHONPATH or in the current directory.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {_TIMEOUT} s"
    except OSError as error:
        return 127, "", str(error)
    return done.returncode, done.stdout, done.stderr


def _dotted(version: int, major: int = 1000, minor: int = 10) -> str:
    parts = [version // major, version % major // minor]
    if minor > 10:
        parts.append(version % minor)
    return ".".join(map(str, parts))


def _import_error_text(error: Exception) -> str:
    missing = isinstance(error, ModuleNotFoundError)
    return "not installed" if missing else _first_line(error)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip(" =")]
    return lines[0].strip()[:100] if lines else type(error).__name__


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:100] if lines else ""

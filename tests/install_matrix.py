"""Install chainer_ooc in every way that there is, into empty environments, and print a table of what worked.

    python tests/install_matrix.py [--python /path/to/python3.13] [--client pip==25.3] [--client uv]

tries each client (by default pip 23.2, 25.2, 25.3, the newest, and uv) with each way to install: from inside the clone
and outside, editable, from a wheel, from a source distribution, and by ``uv sync``. Each time it is installed and
checked, trains a step out of core and is uninstalled. Commands run without the environment but for what leads to the
package index, without pip's configuration and without caches. It takes half a minute for each, and no more than the
interpreters with their ensurepip.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ("pip==23.2", "pip==25.2", "pip==25.3", "pip", "uv")
WAYS = ("inside", "outside", "editable", "wheel", "sdist", "sync")
#: What leads to the package index.
INDEX = (
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "PIP_PROXY", "PIP_TRUSTED_HOST"),
    *("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    "CC",  # none, to see that it works without a compiler
)
TRAIN = """
import sys
import chainer, chainer.functions as F, chainer.links as L, chainermn, numpy as np
import chainer_ooc
assert "_chainer_ooc_startup" in sys.modules
chainer_ooc.enable(limit=0.9, swap_all=True, min_bytes=0)
model = L.Classifier(chainer.Sequential(L.Linear(8, 4096), F.relu, L.Linear(4096, 3)))
optimizer = chainer.optimizers.MomentumSGD().setup(model)
before = model.predictor[0].W.array.copy()
optimizer.update(model, np.ones((64, 8), "f"), np.arange(64, dtype="i") % 3)
assert chainer_ooc.stats().bytes_out > 0, chainer_ooc.stats()
assert not np.array_equal(before, model.predictor[0].W.array)
"""


class Environment:
    """An empty virtual environment, and the client that installs into it."""

    def __init__(self, folder, python, client):
        self.folder, self.client = folder, client
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "LANG": "C.UTF-8"}
        self.env |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1"}
        self.env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_NO_CONFIG": "1"}
        self.env |= {name: os.environ[name] for name in INDEX if name in os.environ}
        (folder / "home").mkdir()
        self.python = folder / "env" / "bin" / "python"
        if client == "uv":
            self.call(python, "-m", "venv", folder / "uv")
            self.call(folder / "uv" / "bin" / "python", "-m", "pip", "install", "-q", "uv")
            self.uv = folder / "uv" / "bin" / "uv"
            self.env["UV_PROJECT_ENVIRONMENT"] = str(folder / "env")
            self.call(self.uv, "venv", "-q", "--python", python, folder / "env")
        else:
            self.call(python, "-m", "venv", folder / "env")
            self.call(self.python, "-m", "pip", "install", "-q", "--upgrade", client)

    def call(self, *command, cwd=None):
        """Run a command. Returns what it printed."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env,
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def pip(self, command, *arguments, cwd=None):
        """Run a command of pip, or the same one of uv."""
        if self.client != "uv":
            return self.call(self.python, "-m", "pip", command, *arguments, cwd=cwd)
        return self.call(self.uv, "pip", command, "--python", self.python, *arguments, cwd=cwd)

    def install(self, way, source):
        """Install chainer_ooc in one of ``WAYS`` from a folder that has its clone."""
        if way == "inside":
            self.pip("install", ".", cwd=source)
        elif way == "outside":
            self.pip("install", source)
        elif way == "editable":
            self.pip("install", "-e", ".", cwd=source)
        elif way == "sync":
            for _ in range(2):  # the second time it removes what nobody asked for
                self.call(self.uv, "sync", "--python", self.python, cwd=source)
        else:
            self.pip("install", self.build(way, source))

    def build(self, way, source):
        """Build a wheel or a source distribution. Returns its path."""
        built = self.folder / f"built-{way}"
        if self.client == "uv":
            self.call(self.uv, "build", f"--{way}", "-o", built, "--python", self.python, source)
        elif way == "wheel":
            self.pip("wheel", "--no-deps", "-w", built, source)
        else:  # pip has no command for that
            tools = self.folder / "tools"
            self.pip("install", "-q", "--target", tools, "build")
            code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import build.__main__ as m; m.main(sys.argv[1:])"
            self.call(self.python, "-c", code, tools, "--sdist", "-o", built, source)
        (path,) = (path for path in built.iterdir() if path.suffix in (".whl", ".gz"))
        return path

    def check(self):
        """Check what is installed, install a library that requires Chainer, and train a step out of core."""
        self.pip("check")
        assert "Version: 7.8.1\n" in self.pip("show", "chainer")
        self.pip("install", "--no-index", library(self.folder))
        self.pip("check")
        self.pip("uninstall", *([] if self.client == "uv" else ["-y"]), "needs_chainer")
        self.call(self.python, "-c", TRAIN)

    def uninstall(self):
        """Uninstall chainer_ooc, and see that nothing is left."""
        self.pip("uninstall", *([] if self.client == "uv" else ["-y"]), "chainer_ooc")
        (site_packages,) = (self.folder / "env" / "lib").glob("python3*/site-packages")
        left = [path.name for path in site_packages.iterdir() if "chainer" in path.name.lower()]
        assert not left, f"left behind: {left}"
        self.pip("check")


def library(folder):
    """Make the wheel of a library that requires Chainer. Returns its path."""
    path = folder / "needs_chainer-1-py3-none-any.whl"
    info = "needs_chainer-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        metadata = (
            "Metadata-Version: 2.1\nName: needs_chainer\nVersion: 1\nRequires-Dist: chainer>=6\n"
        )
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/RECORD", "".join(f"{info}/{n},,\n" for n in ("METADATA", "WHEEL", "RECORD"))
        )
    return path


def clone(target):
    """Copy what git would clone."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)


def main():
    """Print a line for each client and way. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="interpreter (default: this one)")
    parser.add_argument("--client", action="append", help=f"default: {' '.join(CLIENTS)}")
    parser.add_argument("--way", action="append", choices=WAYS, help=f"default: {' '.join(WAYS)}")
    asked = parser.parse_args()
    failed = False
    for python in asked.python or [sys.executable]:
        for client in asked.client or CLIENTS:
            with tempfile.TemporaryDirectory(prefix="chainer_ooc-matrix-") as name:
                environment = Environment(Path(name), python, client)
                version = environment.call(environment.python, "-V").strip()
                for way in asked.way or WAYS:
                    if way == "sync" and client != "uv":
                        continue
                    source = Path(name, f"clone {way}")
                    clone(source)
                    try:
                        environment.install(way, source)
                        environment.check()
                        environment.uninstall()
                        result = "ok"
                    except (RuntimeError, AssertionError) as error:
                        failed, result = True, f"FAILED: {error}"
                    print(f"{version:<16}{client:<12}{way:<10}{result}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

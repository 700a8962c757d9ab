"""``import chainer`` works in every process, and costs nothing where Chainer is not imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

import chainer_ooc

ROOT = Path(chainer_ooc.__file__).resolve().parents[1]
PTH = (ROOT / "chainer_ooc.pth").read_text()

TRAIN = """
import multiprocessing, sys
import numpy as np
import chainer
from chainer import datasets, iterators, training
from chainer.training import extensions
import chainer.links as L


def main(method):
    multiprocessing.set_start_method(method)
    x = np.random.RandomState(0).randn(24, 5).astype('f')
    data = datasets.TupleDataset(x, np.arange(24, dtype='i') % 3)
    iterator = iterators.MultiprocessIterator(data, 8, n_processes=2)
    model = L.Classifier(L.Linear(5, 3))
    optimizer = chainer.optimizers.SGD().setup(model)
    updater = training.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (2, 'epoch'), out='out')
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.snapshot())
    trainer.run()
    iterator.finalize()
    print('updates', optimizer.t)


if __name__ == '__main__':
    main(sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocess_iterator_trains_from_an_unmodified_script(run_python, tmp_path, method):
    (tmp_path / "train.py").write_text(TRAIN)
    done = run_python("-m", "chainer_ooc", "run", "--in-core", "train.py", method, timeout=60)
    assert done.stdout == "updates 6\n", done.stderr
    assert done.stderr == ""


def test_importing_the_package_imports_neither_chainer_nor_numpy(run_python):
    names = "('chainer', 'numpy', 'cupy')"
    code = f"import sys, chainer_ooc; print([m for m in {names} if m in sys.modules])"
    assert run_python("-c", code).stdout == "[]\n"


def test_the_startup_module_imports_nothing(run_python):
    code = (
        "import sys; before = set(sys.modules); import _chainer_ooc_startup; import json;"
        "new = set(sys.modules) - before; print(sorted(m for m in new if 'chainer' in m))"
    )
    assert run_python("-S", "-c", code).stdout == "['_chainer_ooc_startup']\n"


def test_the_startup_module_alone_makes_chainer_importable(run_python):
    code = f"{PTH}\nimport chainer, sys; print(chainer.__version__, 'chainer_ooc' in sys.modules)"
    done = run_python("-c", code)
    assert done.stdout == "7.8.1 True\n", done.stderr


def test_the_pth_line_tolerates_that_the_package_is_gone(run_python):
    assert PTH.startswith("import ")  # or Python would take it for a directory
    assert PTH.count("\n") == 1
    code = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n{PTH}\nprint(1)"
    done = run_python("-S", "-c", code)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_every_module_imports_without_a_warning_of_any_kind(run_python, tmp_path):
    code = """
import importlib, pkgutil, warnings
import chainer_ooc
warnings.filterwarnings("error", module=r"chainer(mn)?(\\.|$)")
import chainer, chainermn
for package in chainer, chainermn:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""
    # Compiled anew, as the compiler warns too.
    done = run_python("-c", code, env={"PYTHONPYCACHEPREFIX": str(tmp_path / "cache")})
    assert (done.returncode, done.stderr) == (0, "")


def test_another_sitecustomize_still_runs(run_python, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')\n")
    site = ROOT / "chainer_ooc" / "compat" / "site"
    env = {"PYTHONPATH": f"{site}:{tmp_path}"}
    done = run_python("-c", "import chainer; print(chainer.__version__)", env=env)
    assert done.stdout == "theirs\n7.8.1\n", done.stderr
    assert str(site) not in sys.path


@pytest.fixture
def target(tmp_path):
    """An interpreter, and the PYTHONPATH with what ``pip install --target`` makes: there Python reads no .pth file."""
    folder = tmp_path / "target"
    folder.mkdir()
    for name in ("chainer_ooc", "_chainer_ooc_startup.py", "chainer_ooc.pth"):
        (folder / name).symlink_to(ROOT / name)
    venv.create(tmp_path / "env", symlinks=True)
    others = str(Path(np.__file__).parents[1])  # Chainer and what it requires
    return str(tmp_path / "env" / "bin" / "python"), [str(folder), others]


SCRIPT = "import subprocess, sys\nimport chainer\nprint(chainer.__version__, flush=True)\n"
CHILD = "subprocess.run([sys.executable, '-c', 'import chainer; print(2)'], check=True)\n"


def run_in(target, arguments, before=()):
    python, paths = target
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([*before, *paths]))
    return subprocess.run(
        [python, *arguments], env=env, capture_output=True, text=True, check=False
    )


def test_in_a_target_folder_the_package_comes_first(target):
    done = run_in(target, ["-c", f"import chainer_ooc\n{SCRIPT}"])
    assert done.stdout == "7.8.1\n", done.stderr


def test_in_a_target_folder_scripts_run(target, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT + CHILD)
    done = run_in(target, ["-m", "chainer_ooc", "run", "--in-core", tmp_path / "script.py"])
    assert done.stdout == "7.8.1\n2\n", done.stderr


def test_in_a_target_folder_the_doctor_says_what_lets_all_scripts_run(target):
    findings = run_in(target, ["-m", "chainer_ooc", "doctor"]).stdout
    (site,) = re.findall("start-up +export PYTHONPATH=(.*):[$]PYTHONPATH", findings)
    done = run_in(target, ["-c", SCRIPT + CHILD], [site])
    assert done.stdout == "7.8.1\n2\n", done.stderr


def test_elsewhere_the_doctor_says_nothing_of_it(run_python):
    assert (
        "start-up"
        not in run_python("-c", f"{PTH}\nfrom chainer_ooc import doctor\ndoctor.main()").stdout
    )

"""``import chainer`` works in every process, and costs nothing where Chainer is not imported."""

from __future__ import annotations

import sys
from pathlib import Path

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

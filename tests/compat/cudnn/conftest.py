"""The cuDNN modules, imported on the stand-ins for CuPy and libcudnn."""

from __future__ import annotations

import importlib
import sys
import types

import fake_cupy
import pytest
from fake_cudnn import FakeCuDNN

PACKAGE = "chainer_ooc.compat.cudnn"
MODULES = (
    "activation", "algorithms", "convolution", "descriptors", "device", "dropout", "handles",
    "library", "math_mode", "normalization", "pooling", "rnn", "rnn_weights", "spatial",
    "workspace", "cupy_cudnn", "cupy_cuda_cudnn",
)  # fmt: skip


def _forget() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture(scope="session")
def _stand_ins():
    """The modules on the stand-ins, kept apart from those that other tests import."""
    previous_cupy, previous = fake_cupy.install(), _forget()
    fake = FakeCuDNN()
    try:
        library = importlib.import_module(PACKAGE + ".library")
        library._library = library.Library(fake, "the double")
        found = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES}
        used = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] == "cupy"}
        used |= {name: sys.modules[name] for name in sys.modules if name.startswith(PACKAGE)}
    finally:
        _forget()
        fake_cupy.restore(previous_cupy)
        sys.modules.update(previous)
    return types.SimpleNamespace(fake=fake, cupy=used["cupy"], used=used, **found)


@pytest.fixture
def cudnn(_stand_ins, monkeypatch):
    """The package's modules by name, ``fake`` (the library) and ``cupy``, with nothing recorded."""
    for name, module in _stand_ins.used.items():
        monkeypatch.setitem(sys.modules, name, module)
    _stand_ins.convolution._plan.cache_clear()
    _stand_ins.fake.reset()
    fake_cupy.memory.refuse_above = None
    fake_cupy.memory.allocated.clear()
    _stand_ins.workspace.set_max_workspace_size(1 << 20)
    _stand_ins.math_mode.set_math_mode("fp32")
    yield _stand_ins
    fake_cupy.memory.refuse_above = None

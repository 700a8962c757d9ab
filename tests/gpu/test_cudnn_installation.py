"""What Chainer got, and that it is the library that was meant."""

from __future__ import annotations

import os

import pytest

cupy = pytest.importorskip("cupy")

pytestmark = pytest.mark.on_double


def test_chainer_uses_cudnn(chainer_gpu):
    """Fails rather than skips: on a machine for these tests cuDNN must be there."""
    assert chainer_gpu.backends.cuda.cudnn_enabled
    assert chainer_gpu.backends.cuda._cudnn_version >= 7000


def test_version_and_origin(chainer_gpu, record_property):
    from chainer_ooc.compat.cudnn import choice, library

    own = cupy.cudnn.__name__.startswith("chainer_ooc")
    if choice.setting() == "native":
        assert not own
    elif choice.setting() not in ("auto",) or int(cupy.__version__.split(".")[0]) >= 14:
        assert own
    if own:
        loaded = library.loaded()
        assert loaded.version // 10000 == 9
        assert loaded.cuda_version // 1000 == cupy.cuda.runtime.runtimeGetVersion() // 1000
        record_property("cudnn", repr(loaded))


def test_no_cudnn_without_the_variable(chainer_gpu):
    """Recurrent networks stay off cuDNN until they are switched on."""
    if not hasattr(cupy.cudnn, "rnn_enabled"):
        pytest.skip("CuPy's own modules")
    if "CHAINER_OOC_CUDNN_RNN" in os.environ:
        pytest.skip("switched on by the environment")
    assert not cupy.cudnn.rnn_enabled()

"""Streams of CuPy's that the engine must not use, or not now."""

from __future__ import annotations

import pytest

import chainer_ooc
from chainer_ooc import state

cupy = pytest.importorskip("cupy")

KIB = 1 << 10
NBYTES = 256 * KIB


def all_right(seen):
    return seen == dict.fromkeys(range(13), True)


@pytest.mark.filterwarnings("ignore:ExternalStream is deprecated")
@pytest.mark.parametrize("host_limit", [None, 0], ids=["pinned", "swap file"])
@pytest.mark.parametrize("is_held", [False, True], ids=["forgotten", "referred to"])
def test_external_streams_are_destroyed_by_their_owners(tmp_path, host_limit, is_held):
    """The fixture finds the use of a stream after that."""
    from tests.real_cupy.known_net import step

    runtime, held = cupy.cuda.runtime, []
    settings = {"min_bytes": 1, "swap_dir": str(tmp_path), "host_limit": host_limit}
    with chainer_ooc.out_of_core_mode(limit=5 * NBYTES, **settings):
        for _ in range(3):
            number = runtime.streamCreate()
            external = cupy.cuda.ExternalStream(number)
            with external:
                assert all_right(step())
            if is_held:
                held.append(external)
            del external
            runtime.streamDestroy(number)
            assert all_right(step())
    assert state.process.gpus.managers[0].counters.bytes_out

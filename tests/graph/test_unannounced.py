"""Without the C extension: the same bits, and the limit is held from the second iteration on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from chainer_ooc.swap.system.memory import ResidentMemory

CHILD = Path(__file__).with_name("unannounced_child.py")

pytestmark = pytest.mark.skipif(
    not ResidentMemory.reset_peak(), reason="this kernel keeps no peak that can be reset"
)


@pytest.fixture
def run(run_python):
    def run(*arguments):
        done = run_python(CHILD, *arguments, timeout=300)
        assert done.returncode == 0, done.stderr
        return SimpleNamespace(**json.loads(done.stdout))

    return run


def test_what_words_a_message_raises_nothing(run_python):
    code = (
        "from tests.graph import test_wording\n"
        "for program in test_wording.PROGRAMS.values(): test_wording.both(program)"
    )
    done = run_python("-c", code, env={"_CHAINER_OOC_WITHOUT_EXTENSION": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def of_run_in_core():
    return []


@pytest.fixture
def in_core(run, of_run_in_core):
    """What a run takes that moves nothing: one for all tests."""
    if not of_run_in_core:
        of_run_in_core.append(run("none"))
    return of_run_in_core[0]


def test_the_limit_is_held_between_functions_from_the_second_iteration_on(run, in_core):
    assert in_core.warned == []
    limit = int(0.6 * max(in_core.peaks))
    done = run(limit)
    assert done.digest == in_core.digest
    assert done.bytes_out > limit // 4
    assert done.peaks[0] > 1.02 * limit  # nobody had seen a function yet
    assert max(done.peaks[1:]) <= 1.02 * limit
    # The engine makes the kernel forget its peak, and reports it all the same.
    assert done.reported_peak >= max(done.peaks)
    # What each kind takes is known at last: then the peak is the kernel's again.
    assert done.resets[0] > 40
    assert done.resets[-1] <= 2  # the sum and its gradient run once in an iteration


def test_it_is_said_once_where_it_is_turned_on_and_costs_nothing_far_from_the_limit(run):
    done = run("200GiB")
    (message,) = done.warned
    assert "between functions only" in message
    assert "C compiler" in message
    assert done.files == [str(CHILD)]
    # And far from the limit nothing is measured.
    assert set(done.resets) == {0}
    assert done.bytes_out == 0
    assert done.error is None


@pytest.mark.parametrize("split", ["never", "exact"])
def test_strict_is_an_error_before_the_function_that_was_seen_not_to_fit(run, in_core, split):
    limit = int(0.4 * max(in_core.peaks))  # enough for all but the convolutions
    done = run(limit, "strict=1", f"split={split}")
    if split == "exact":  # what can run in pieces asks for itself
        assert done.error is None
        assert done.digest == in_core.digest
    else:
        assert "Convolution2DFunction((1, 16, 320, 320), (16, 16, 3, 3), (16,))" in done.error
        assert "limit=" in done.error


def test_with_recompute_and_single_backward_the_bits_are_the_same(run, in_core):
    limit = int(0.6 * max(in_core.peaks))
    for settings in (["recompute=auto", "discard_all=1"], ["single_backward=1", "plan=0"]):
        done = run(limit, *settings)
        assert done.digest == in_core.digest
        assert max(done.peaks[1:]) <= 1.02 * limit

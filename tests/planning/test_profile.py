import dataclasses
import random

import pytest

from chainer_ooc.planning.profile import (
    BACKWARD,
    FORWARD,
    OTHER,
    Profile,
    Rerun,
    SavedTensor,
    Step,
    describe_input,
)

from .instances import chain_of


def small(**changes):
    """conv -> relu and back: relu's output is saved, conv's as well."""
    steps = (
        Step("conv", FORWARD, 1.0, 10, 0, (describe_input("float32", (2, 3)),), -1, Rerun(1.0, 3, (), (0,))),
        Step("relu", FORWARD, 0.5, 0, 2, (describe_input("float32", (2, 3), 0),)),
        Step("relu", BACKWARD, 0.5, 0, 5, (), 1),
        Step("conv", BACKWARD, 2.0, 20, 5, (), 0),
        Step("update", OTHER, 0.25),
    )  # fmt: skip
    storages = (SavedTensor(8, 0, 2, (3,), "conv"), SavedTensor(6, 1, 3, (2,), "relu"))
    return dataclasses.replace(Profile("small", "cpu", False, 100, steps, storages), **changes)


def test_json_round_trip():
    for profile in (small(), chain_of(random.Random(0), 6)):
        assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no profile"),
        ("{", "no profile"),
        ('{"version": 7}', "version 7"),
        ('{"version": 1}', "not complete"),
    ],
)
def test_what_is_no_profile_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Profile.from_json(text)


def test_json_of_another_graph_is_refused():
    text = small().to_json().replace("float32[2,3]@0", "float32[2,4]@0")
    with pytest.raises(ValueError, match="signature"):
        Profile.from_json(text)


def test_signature_tells_functions_shapes_dtypes_and_wiring_apart():
    first, second, *rest = small().steps
    others = [
        dataclasses.replace(second, label="tanh"),
        dataclasses.replace(second, inputs=(describe_input("float32", (2, 4), 0),)),
        dataclasses.replace(second, inputs=(describe_input("float16", (2, 3), 0),)),
        dataclasses.replace(second, inputs=(describe_input("float32", (2, 3)),)),
    ]
    signatures = {small(steps=(first, step, *rest)).signature for step in (second, *others)}
    assert len(signatures) == 5
    slower = dataclasses.replace(second, seconds=9.0, workspace_bytes=1)
    assert small(steps=(first, slower, *rest)).signature == small().signature


def test_peaks_and_floor_of_an_iteration_done_by_hand():
    profile = small()
    assert profile.compute_seconds == 4.25
    # relu's forward holds 8 + 6 + 2; conv's backward needs 8 + 5 + 20, and stock Chainer has relu's 6 still.
    assert profile.in_core_bytes == 100 + 8 + 6 + 5 + 20
    assert profile.resident_peak(single_backward=True) == 100 + 8 + 5 + 20
    assert profile.floor_bytes == 100 + 8 + 5 + 20
    # relu's output is held until step 3, so that it is pinned in step 2; conv's is free there.
    assert [profile.pinned(n) for n in range(5)] == [8, 14, 6, 8, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fixed_bytes": -1}, "fixed_bytes=-1"),
        ({"storages": (SavedTensor(8, 9, 10, (3,)),)}, "producer=9"),
        ({"storages": (SavedTensor(8, 0, 0, (3,)),)}, "free_from=0"),
        ({"storages": (SavedTensor(8, 0, 1, (3, 2)),)}, "uses="),
        ({"storages": (SavedTensor(8, 1, 2, (1,)),)}, "uses="),
        ({"storages": (SavedTensor(-8, 0, 1, (3,)),)}, "nbytes=-8"),
        ({"storages": ()}, "storage 0, which is not there"),
        ({"steps": (Step("f", "sideways", 1.0),), "storages": ()}, "sideways"),
        ({"steps": (Step("f", FORWARD, float("nan")),), "storages": ()}, "seconds=nan"),
    ],
)
def test_inconsistent_profiles_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)

import pytest

from chainer_ooc.planning.links import Link
from chainer_ooc.planning.system import System, Tier


def ends(tier, copies):
    """Begin copies (nbytes, inward, time); return when each ends."""
    link = Link(tier)
    begun = [link.begin(n, nbytes, inward, now) for n, (nbytes, inward, now) in enumerate(copies)]
    return [link.wait(copy) for copy in begun]


def test_directions_do_not_hinder_each_other():
    tier = Tier("host", 10.0, 20.0)
    assert ends(tier, [(100, False, 0.0), (100, True, 0.0)]) == [10.0, 5.0]


def test_copies_of_one_direction_wait_for_each_other():
    tier = Tier("host", 10.0, 20.0)
    assert ends(tier, [(100, False, 0.0), (50, False, 2.0), (10, False, 40.0)]) == [
        10.0,
        15.0,
        41.0,
    ]


def test_shared_bandwidth_slows_both_only_while_both_are_busy():
    # 10 and 10 alone, 10 together: each at 5 until the shorter has ended.
    tier = Tier("host", 10.0, 10.0, both_bandwidth=10.0)
    assert ends(tier, [(100, False, 0.0), (50, True, 0.0)]) == pytest.approx([15.0, 10.0])


def test_one_queue_serves_both_directions_in_turn():
    tier = Tier("disk", 10.0, 20.0, one_queue=True)
    assert ends(tier, [(100, False, 0.0), (100, True, 0.0)]) == [10.0, 15.0]


def test_latency_is_paid_by_each_copy():
    tier = Tier("disk", 10.0, 10.0, latency=0.5)
    assert ends(tier, [(10, False, 0.0), (10, False, 0.0)]) == pytest.approx([1.5, 3.0])


def test_only_what_has_not_begun_to_move_can_be_cancelled():
    link = Link(Tier("host", 10.0, 10.0))
    first, second = link.begin(0, 100, False, 0.0), link.begin(1, 100, False, 0.0)
    link.advance(1.0)
    assert not link.cancel(first)
    assert link.cancel(second)
    assert link.wait(first) == 10.0
    assert not link.busy


@pytest.mark.parametrize("name", ["out_bandwidth", "in_bandwidth", "both_bandwidth", "latency"])
def test_impossible_tiers_are_refused(name):
    values = {"out_bandwidth": 1.0, "in_bandwidth": 1.0, name: -1.0}
    with pytest.raises(ValueError, match=f"{name}=-1.0"):
        Tier("host", **values)


def test_impossible_systems_are_refused():
    tier = Tier("host", 1.0, 1.0)
    with pytest.raises(ValueError, match="limit_bytes=0"):
        System(0, (tier,))
    with pytest.raises(ValueError, match="at least one Tier"):
        System(1, ())
    with pytest.raises(ValueError, match="margin=1"):
        System(1, (tier,), margin=1)

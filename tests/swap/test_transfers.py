"""What dying storages leave: their space is given back once nothing reads or writes it, and only once. Bandwidth."""

from __future__ import annotations

import pytest

from chainer_ooc.swap.events import Copied
from chainer_ooc.swap.transfers import Transfers


class Copy:
    freed = 0

    def free(self):
        self.freed += 1


class Transfer:
    def __init__(self, copy, span=None):
        self.copy = copy
        self.ended = False
        self._span = span

    def span(self):
        return self._span

    def done(self):
        return self.ended

    def wait(self):
        self.ended = True


@pytest.fixture
def transfers():
    return Transfers(None, lambda nbytes: None)


@pytest.mark.parametrize("own", [True, False], ids=["coming in", "going out"])
def test_space_under_transfer_is_given_back_after_it(transfers, own):
    copy = Copy()
    transfer = Transfer(copy)
    transfers.deferred_frees.append((copy if own else None, transfer, 0))
    transfers.run_deferred_frees()
    transfers.run_deferred_frees()
    assert copy.freed == 0
    transfer.ended = True
    transfers.run_deferred_frees()
    transfers.run_deferred_frees()
    assert copy.freed == 1


def test_waiting_for_the_graves_empties_them(transfers):
    copies = [Copy(), Copy()]
    transfers.deferred_frees.append((copies[0], Transfer(copies[0]), 0))
    transfers.deferred_frees.append((copies[1], None, 0))
    transfers.wait_for_deferred_frees()
    assert [copy.freed for copy in copies] == [1, 1]


def test_time_in_which_copies_overlap_counts_once_and_a_copy_of_no_page_holds_up_none(transfers):
    spans = (0.0, 2.0), None, (1.0, 3.0), (1.5, 2.5), (10.0, 11.0)
    under_way = [Transfer(Copy(), span) for span in spans]
    copied = Copied("RAM", "f", 0, 10, True)
    transfers._copies.extend((copied, transfer) for transfer in under_way)
    transfers._take_times()
    assert transfers.counters.copy_seconds == 0
    for transfer in under_way:
        transfer.ended = True
    transfers._take_times()
    assert transfers.counters.copy_seconds == 4
    assert transfers.bandwidth(out=True) == 40 / 4


@pytest.mark.parametrize("out", [True, False])
def test_nobody_knows_the_bandwidth_before_a_copy_took_time(transfers, out):
    assert transfers.bandwidth(out) is None
    transfers._links[out].note(10, (1.0, 1.0))
    assert transfers.bandwidth(out) is None


def test_bandwidth_is_over_the_time_in_which_any_copy_was_under_way(transfers):
    for span in ((0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (10.0, 11.0)):
        transfers._links[1].note(10, span)
    assert transfers.bandwidth(out=True) == 40 / 4
    assert transfers.bandwidth(out=False) is None

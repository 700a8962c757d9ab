"""Scaling on paper: the formulas, and that the document shows what the program prints."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import scaling_model  # noqa: E402
from scaling_model import Node, Step, allreduce_seconds, iteration, ring_seconds, tree_seconds  # noqa: E402


def ring_by_steps(n: int, nbytes: float, latency: float, bandwidth: float) -> float:
    """Passes chunks around a ring, and counts the time of the steps until all ranks have all sums."""
    have = [[{rank} for _ in range(n)] for rank in range(n)]  # whose parts are in chunk c of a rank
    seconds, step = 0.0, 0
    while any(len(chunk) < n for chunks in have for chunk in chunks):
        sent = [(rank, (rank - step) % n) for rank in range(n)]
        news = [((rank + 1) % n, chunk, set(have[rank][chunk])) for rank, chunk in sent]
        for rank, chunk, parts in news:
            have[rank][chunk] |= parts
        seconds += latency + nbytes / n / bandwidth
        step += 1
    return seconds


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_ring_formula_is_that_of_the_steps(n):
    assert ring_seconds(n, 1e8, 5e-6, 1e10) == pytest.approx(ring_by_steps(n, 1e8, 5e-6, 1e10))


def test_bandwidth_term_is_the_same_for_ring_and_tree():
    ring, tree = (f(1024, 1e8, 0.0, 1e10) for f in (ring_seconds, tree_seconds))
    assert ring == tree == pytest.approx(2 * 1023 / 1024 * 1e-2)
    assert tree_seconds(1024, 0, 1e-6, 1e10) == pytest.approx(20e-6)


def test_card_of_a_node_carries_the_gradients_once():
    node = Node(ranks=4, link=1e20, network=1e10, latency=0)
    assert allreduce_seconds(4, 1e8, node) == pytest.approx(0, abs=1e-9)
    assert allreduce_seconds(8, 1e8, node) == pytest.approx(1e-2)  # 2(M-1)/M = 1


def test_swapping_is_shared_by_the_ranks_of_a_node_and_not_by_nodes():
    node, step = Node(ranks=4, disk=1e9), Step(compute=0.1, gradients=0, images=0, swap_disk=1e9)
    totals = [iteration(n, step, node, storage=1e9)["total"] for n in (1, 2, 4, 400)]
    assert totals == pytest.approx([1, 2, 4, 4], abs=0.01)


def test_document_shows_what_the_program_prints():
    done = subprocess.run(
        [sys.executable, scaling_model.__file__], capture_output=True, text=True, check=True
    )
    assert done.stdout in (ROOT / "docs" / "scaling.md").read_text()

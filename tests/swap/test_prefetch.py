"""UseOrder: what backward will use next, by rank or as it was learned."""

from __future__ import annotations

import gc
import random

import pytest

from chainer_ooc.swap.prefetch import UseOrder
from chainer_ooc.swap.storage import Storage


class Manager:
    def defer_free(self, storage):
        storage.saved_sequence.living -= 1


@pytest.fixture
def graph():
    """Return a function that saves storages of the given (label, rank)."""
    order, manager, count = UseOrder(), Manager(), iter(range(10**6))

    def save(functions):
        storages = []
        for label, rank in functions:
            storage = Storage(manager, next(count), object(), 10, 0, label)
            storage.rank = rank
            order.save(storage)
            storages.append(storage)
        return storages

    save.order = order
    return save


def expected(order, storages):
    return [storage.label for storage in order.use(storages)]


def test_the_first_time_it_goes_by_falling_rank_then_from_the_last(graph):
    functions = [("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 2)]
    storages = graph(functions)
    assert expected(graph.order, storages[4:]) == ["d", "b", "c", "a"]
    graph([("x", 0)])
    storages = graph(functions)
    assert expected(graph.order, storages[1:2]) == ["c", "a"]


def test_the_second_time_it_goes_as_it_went(graph):
    functions = [(name, 0) for name in "abcdef"]
    used = [4, 5, 0, 3]
    storages = graph(functions)
    for index in used:
        graph.order.use([storages[index]])
    del storages
    storages = graph(functions)
    assert expected(graph.order, [storages[4]]) == ["f", "a", "d", "c", "b"]


def test_graphs_are_told_apart(graph):
    first, second = [("a", 0), ("b", 0), ("c", 0)], [("a", 0), ("b", 0), ("d", 0)]
    for functions, used in ((first, [0, 2, 1]), (second, [1, 2, 0])):
        storages = graph(functions)
        for index in used:
            graph.order.use([storages[index]])
    for functions, used, rest in ((first, 0, ["c", "b"]), (second, 1, ["d", "a"])) * 2:
        storages = graph(functions)
        assert expected(graph.order, [storages[used]]) == rest
        for index in (0, 2, 1) if functions is first else (1, 2, 0):
            graph.order.use([storages[index]])


def test_another_living_graph_is_not_fetched(graph):
    one = graph([("a", 0), ("b", 1)])
    graph.order.use(one[1:])
    other = graph([("c", 0), ("d", 1)])
    assert expected(graph.order, other[1:]) == ["c"]
    assert expected(graph.order, one[1:]) == ["a"]


def test_what_was_begun_is_passed_over_until_it_is_out_again(graph):
    storages = graph([("a", 0), ("b", 1), ("c", 2), ("d", 3)])
    coming = graph.order.use(storages[3:])
    assert [next(coming).label, next(coming).label] == ["c", "b"]
    coming.close()
    # ``b`` was only looked at: it is looked at again.
    assert next(graph.order.use(storages[3:])).label == "b"
    storages[2].saved_sequence.requeue(storages[2])
    assert expected(graph.order, storages[3:]) == ["c", "b", "a"]


def test_what_was_learned_holds_for_the_whole_backward(graph):
    functions = [(name, 0) for name in "abcdef"]
    storages = graph(functions)
    for index in (4, 5, 0, 3):
        graph.order.use([storages[index]])
    del storages
    storages = graph(functions)
    graph.order.use([storages[4]])
    assert expected(graph.order, [storages[5]]) == ["a", "d", "c", "b"]


@pytest.mark.parametrize("turn", [1, -1], ids=["older first", "younger first"])
def test_of_two_graphs_that_are_used_at_once_the_younger_goes_on(graph, turn):
    one = graph([(name, rank) for rank, name in enumerate("abcd")])
    graph.order.use(one[3:])
    other = graph([(name, rank) for rank, name in enumerate("efgh")])
    assert expected(graph.order, [one[0], other[3]][::turn]) == ["g", "f", "e"]


def test_a_graph_of_many_that_live_is_one(graph):
    storages = graph([(str(rank), rank) for rank in range(100)])
    assert len(expected(graph.order, storages[-1:])) == 99


def test_a_few_that_die_do_not_end_a_graph(graph):
    storages = graph([("a", 0), ("b", 1), ("c", 2), ("d", 3)])
    del storages[1:]
    more = graph([("e", 4)])
    assert expected(graph.order, more) == ["a"]


def test_a_dead_storage_is_passed_over(graph):
    storages = graph([("a", 0), ("b", 1), ("c", 2)])
    del storages[1]
    assert expected(graph.order, storages[1:]) == ["a"]


def test_predictions_do_not_pile_up(graph):
    alive = []
    for _ in range(1000):
        alive = [*alive, *graph([("a", 0), ("b", 1)])][-6:]
        gc.collect(0)
    assert len(graph.order._saved_sequence._storages) < 200


def test_orders_are_forgotten_after_many_graphs(graph):
    numbers = random.Random(0)
    for number in range(100):
        storages = graph([(f"{number}", 0)] * numbers.randint(1, 5))
        graph.order.use(storages)
    assert len(graph.order._learned) == 32

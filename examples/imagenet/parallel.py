"""Work on many items in threads."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result | InputError]]:
    """Yields each item with its result, or with the InputError it raised, in order.

    It reads only a few items ahead, and leaves none running when the consumer stops.

    Args:
        function: Runs in threads.
        items: Its arguments.
        workers: Number of threads.
    """

    def call(item: Item) -> Result | InputError:
        try:
            return function(item)
        except InputError as e:
            return e

    pending: collections.deque[tuple[Item, Future[Result | InputError]]] = collections.deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append((item, pool.submit(call, item)))
            if len(pending) >= 4 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)

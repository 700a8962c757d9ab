"""Forks in the midst of a graph, on stock Chainer and then out of core: prints what each process has computed.

python fork_child.py SCENARIO
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import os
import sys
import threading

import chainer
import chainer.functions as F
import numpy as np

import chainer_ooc

SHAPE = 256, 1024  # 1 MiB


def graph(seed=0, depth=3, shape=SHAPE):
    x = chainer.Variable(np.random.RandomState(seed).rand(*shape).astype("f"))
    h = x
    for _ in range(depth):
        h = F.tanh(F.exp(F.sin(h)))
    return x, F.sum(h)


def gradient(x, loss):
    loss.backward()
    return hashlib.sha256(x.grad.tobytes()).hexdigest()[:16]


def use_space(times=2):
    """Write to blocks of the file that are free."""
    for seed in range(times):
        graph(100 + seed)[1].backward()


class Line:
    """A pipe of texts of 16 characters, between any of the processes."""

    def __init__(self):
        self._reading, self._writing = os.pipe()

    def put(self, text="go"):
        os.write(self._writing, text.ljust(16).encode())

    def get(self):
        return os.read(self._reading, 16).decode()


def let_all_go(start, children):
    for _ in children:
        start.put()
    for child in children:
        os.waitpid(child, 0)


def fork(function, *arguments):
    """Run a function in a forked child, which ends then. Returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        function(*arguments)
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        status = 1
    os._exit(status)


def enable_if(wanted):
    """Turn the mode on in a forked child, where it is off."""
    if wanted:
        chainer_ooc.enable(swap_all=True)


def report(out, start, x, loss):
    start.get()
    out.put(gradient(x, loss))


def parent_trains_on():
    x, loss = graph()
    out, start = Line(), Line()
    child = fork(report, out, start, x, loss)
    loss.backward()
    del x, loss
    use_space()
    start.put()
    os.waitpid(child, 0)
    return out.get()


def parent_frees_its_graph():
    x, loss = graph()
    out, start = Line(), Line()
    child = fork(report, out, start, x, loss)
    del x, loss
    gc.collect()
    use_space()
    start.put()
    os.waitpid(child, 0)
    return out.get()


def copies_are_coming_in():
    """Both go on with the backward pass in the midst of which the process forks."""
    x, loss = graph(depth=5, shape=(1 << 10, 1 << 11))
    out, start, seen, children = Line(), Line(), [], []

    class Hook(chainer.FunctionHook):
        name = "fork"

        def backward_preprocess(self, function, in_data, grads):
            seen.append(function)
            if len(seen) == 5 and os.fork() == 0:
                children.append(True)
                start.get()

    with Hook():
        result = gradient(x, loss)
    if children:
        out.put(result)
        os._exit(0)
    del loss, x
    use_space()
    start.put()
    os.wait()
    return result, out.get()


def several_children():
    """Two of each moment, the graphs of which overlap."""
    out, start, children = Line(), Line(), []
    first = graph(1)
    children += [fork(report, out, start, *first) for _ in range(2)]
    second = graph(2)
    children.append(fork(report, out, start, *second))
    children.append(fork(report, out, start, *first))
    first[1].backward()
    del first
    use_space(1)
    children.append(fork(report, out, start, *second))
    del second
    use_space()
    let_all_go(start, children)
    return sorted(out.get() for _ in children)


def grandchild():
    """The child ends first, then the parent uses the space."""
    kept = [graph()]
    out, start = Line(), Line()

    def child():
        fork(report, out, start, *kept[0])

    os.waitpid(fork(child), 0)
    kept.clear()
    use_space()
    start.put()
    return out.get()


def child_outlives_its_parent():
    out, start = Line(), Line()

    def parent():
        enable_if(is_enabled)
        x, loss = graph()
        fork(report, out, start, x, loss)
        del x, loss
        use_space()
        assert (chainer_ooc.stats().bytes_in > 0) == is_enabled

    is_enabled = chainer_ooc.is_enabled()
    assert os.waitpid(fork(parent), 0)[1] == 0
    start.put()
    return out.get()


def child_trains_and_forks():
    """The child enables it again, has a graph of its own, and forks in the midst of that."""
    x, loss = graph()
    out, start = Line(), Line()

    def child():
        enable_if(is_enabled)
        mine = graph(7)
        children = fork(report, out, start, *mine), fork(report, out, start, x, loss)
        mine[1].backward()
        del mine
        use_space()
        let_all_go(start, children)
        out.put(gradient(x, loss))

    is_enabled = chainer_ooc.is_enabled()
    one = fork(child)
    use_space()
    os.waitpid(one, 0)
    return sorted(out.get() for _ in range(3))


def _work(queue, start, x, loss):
    start.wait()
    queue.put(gradient(x, loss))


def multiprocessing_fork():
    context = multiprocessing.get_context("fork")
    x, loss = graph()
    queue, start = context.SimpleQueue(), context.Event()
    process = context.Process(target=_work, args=(queue, start, x, loss))
    process.start()
    loss.backward()
    del x, loss
    use_space()
    start.set()
    result = queue.get()
    process.join()
    return result


def copies_are_going_out():
    """What the last function has saved is large: it is being written when the process forks."""
    out, start, shape = Line(), Line(), (8, 1 << 20)
    x, loss = graph(shape=shape, depth=1)
    child = fork(report, out, start, x, loss)
    loss.backward()
    mine = hashlib.sha256(x.grad.tobytes()).hexdigest()[:16]
    start.put()
    os.waitpid(child, 0)
    return mine, out.get()


def from_a_thread():
    kept = [graph()]
    out, start, children = Line(), Line(), []

    def run():
        for _ in range(3):
            children.append(fork(report, out, start, *kept[0]))

    thread = threading.Thread(target=run)
    thread.start()
    use_space(5)  # beside it
    thread.join()
    kept.clear()
    use_space()
    let_all_go(start, children)
    return [out.get() for _ in children]


def from_two_threads_at_once():
    graphs = [graph(seed, depth=1) for seed in range(2)]
    out, start, children = Line(), Line(), []

    def run(number):
        left = 4  # from each, or what is told depends on who is faster
        while left:
            # filelock, which Chainer imports, may refuse a second fork beside one.
            with contextlib.suppress(RuntimeError):
                children.append(fork(report, out, start, *graphs[number]))
                left -= 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    use_space(3)
    for thread in threads:
        thread.join()
    graphs.clear()
    use_space()
    let_all_go(start, children)
    return sorted({out.get() for _ in children})


SCENARIOS = [
    parent_trains_on,
    parent_frees_its_graph,
    several_children,
    grandchild,
    child_outlives_its_parent,
    child_trains_and_forks,
    multiprocessing_fork,
    copies_are_going_out,
    copies_are_coming_in,
    from_a_thread,
    from_two_threads_at_once,
]

if __name__ == "__main__":
    for scenario in SCENARIOS:
        if scenario.__name__ == sys.argv[1]:
            print(scenario(), flush=True)
            chainer_ooc.enable(swap_all=True)
            print(scenario(), flush=True)
            use_space(1)
            print(chainer_ooc.stats().bytes_in > 0)

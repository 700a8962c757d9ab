"""NumPy's allocations in C: exceptions pass as they are, errors arrive as themselves, and nobody is asked in vain."""

from __future__ import annotations

import functools
import gc
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.swap.devices.ram import RamDevice, native

if native.allocator is None:
    pytest.skip("the C extension is not built here", allow_module_level=True)
KIB, MIB = 1 << 10, 1 << 20
NUMPY_1 = np.__version__.startswith("1.")


class Mine(BaseException):
    """An error of whoever is asked."""


class Asked:
    """Who is asked for room: takes note of it, and does what a test wants.

    Attributes:
        sizes: What was asked for.
        pool: Where the arrays lie.
        answer: Called each time.
    """

    def __init__(self):
        self.sizes = []
        self.answer = lambda: None

    def __call__(self, nbytes):
        self.sizes.append(nbytes)
        self.answer()


@pytest.fixture
def asked():
    """Announce this thread's allocations of 16 KiB and more."""
    device = RamDevice("/tmp")
    device.set_cached_limit(1 << 62)
    asked = Asked()
    asked.pool = device.keep_pages()
    native.allocator.configure(asked, 16 * KIB, asked.pool, 64 * KIB)
    native.allocator.install()
    yield asked
    native.allocator.uninstall()
    native.allocator.configure(None, 1 << 62, device.pages, 64 * KIB)
    state.process.announced, state.local.hooked = None, False
    device.close()


def raising(error):
    def answer():
        raise error

    return answer


# Who is asked.


def test_large_allocations_are_announced_and_small_ones_are_not(asked):
    np.empty(15 * KIB, np.uint8)
    np.empty(16 * KIB, np.uint8)
    np.zeros(MIB, np.uint8)
    np.empty(32 * KIB, np.uint8).resize(MIB, refcheck=False)
    assert asked.sizes == [16 * KIB, MIB, 32 * KIB, MIB]


def test_below_its_level_a_thread_asks_nobody_until_levels_are_void(asked):
    used = native.allocator.resident_bytes()
    native.allocator.set_level(used + 64 * MIB)
    np.empty(MIB, np.uint8)
    assert not asked.sizes
    np.empty(128 * MIB, np.uint8)
    assert asked.sizes == [128 * MIB]
    native.allocator.ask_again()
    np.empty(MIB, np.uint8)
    assert asked.sizes == [128 * MIB, MIB]


def test_levels_are_a_threads_own(asked):
    native.allocator.set_level(1 << 62)

    def work():
        native.allocator.install()
        np.empty(MIB, np.uint8)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.empty(MIB, np.uint8)
    assert asked.sizes == [MIB]


def test_who_is_asked_may_allocate(asked):
    asked.answer = lambda: np.ones(MIB)
    np.empty(2 * MIB, np.uint8)
    assert asked.sizes == [2 * MIB]


def test_the_peak_is_that_of_what_was_granted_with_nobody_asked(asked):
    native.allocator.take_peak()  # of others
    np.empty(MIB, np.uint8)
    assert native.allocator.take_peak() == 0
    native.allocator.set_level(1 << 62)
    native.allocator.set_moved_bytes(-5 * MIB)  # without moves it would be more
    used = asked.pool.used_bytes()
    np.empty(32 * MIB, np.uint8)
    np.empty(MIB, np.uint8)
    native.allocator.set_moved_bytes(0)
    assert abs(native.allocator.take_peak() - used - 37 * MIB) < 2 * MIB
    assert native.allocator.take_peak() == 0


def test_what_is_no_pool_or_another_one_is_refused(asked):
    with pytest.raises(ValueError, match="another one than before"):
        native.allocator.configure(asked, 1, native.allocator.PagePool(MIB), 1)
    with pytest.raises(ValueError, match="another one"):
        native.allocator.configure(asked, 1, None, 1)


# What passes.


def temporaries(nbytes):
    return np.ones(nbytes, np.uint8)


def refuse(*_):
    raise KeyError("mine")


def add(a, b):
    return a


@pytest.mark.parametrize("nbytes", [4, 1000, 20 * KIB, 100 * KIB, 2 * MIB])
@pytest.mark.parametrize(
    "passes",
    [
        lambda n: add(temporaries(n), refuse()),
        lambda n: [add(temporaries(n), refuse()) for _ in range(2)],
        lambda n: sum(add(temporaries(n), refuse()) for _ in range(2)),
        lambda n: {"a": temporaries(n), "b": refuse()},
        lambda n: add(temporaries(n) + temporaries(n) * refuse(), 1),
        lambda n: max([temporaries(n)], key=refuse),
        lambda n: next(map(refuse, [temporaries(n)])),
    ],
)
def test_an_exception_passes_temporaries_as_it_is(asked, passes, nbytes):
    """NumPy frees them while it is on its way."""
    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            passes(nbytes)


def test_an_exception_passes_temporaries_while_memory_is_short(asked):
    asked.answer = gc.collect
    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            add(temporaries(MIB) + temporaries(MIB), refuse())


def test_a_generator_says_why_it_ends(asked):
    def batches():
        yield temporaries(MIB)
        yield add(temporaries(MIB), refuse())

    with pytest.raises(KeyError, match="mine"):
        for _ in batches():
            pass


def test_arrays_are_freed_by_any_thread(asked):
    arrays = [temporaries(MIB) for _ in range(8)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert temporaries(MIB).sum() == MIB


# What arrives.


@pytest.mark.skipif(NUMPY_1, reason="NumPy 1 cannot be refused memory")
@pytest.mark.parametrize("in_thread", [False, True])
def test_an_error_arrives_as_itself_and_nothing_is_allocated(asked, in_thread):
    error = Mine("mine")
    asked.answer = raising(error)
    arrived = []

    def work():
        native.allocator.install()
        try:
            np.ones(MIB) + 1
        except BaseException as caught:
            arrived.append(caught)
        finally:
            native.allocator.uninstall()

    if in_thread:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert arrived == [error]
    assert error.__traceback__ is not None
    assert not hasattr(error, "__notes__")
    assert error.__cause__ is error.__context__ is None
    assert asked.sizes == [8 * MIB]


def test_where_memory_cannot_be_refused_the_error_comes_a_moment_later(asked):
    array = np.ones(32 * KIB, np.uint8)
    asked.answer = raising(Mine("mine"))
    with pytest.raises(Mine, match="mine") as caught:
        array.resize(MIB, refcheck=False)
        for _ in range(1000):
            pass
    assert not hasattr(caught.value, "__notes__")
    asked.answer = lambda: None
    assert np.ones(MIB, np.uint8).sum() == MIB


def test_an_error_that_comes_later_comes_once_and_before_the_next_one(asked):
    arrays = [np.ones(32 * KIB, np.uint8) for _ in range(2)]
    left = [ValueError("1"), ValueError("2")]
    asked.answer = lambda: raising(left.pop(0))()
    resize = functools.partial(np.ndarray.resize, refcheck=False)
    with pytest.raises(ValueError, match="1"):
        list(map(resize, arrays, (MIB, MIB)))  # with no bytecode between the two
        for _ in range(1000):
            pass
    for _ in range(1000):
        pass
    assert [str(error) for error in left] == ["2"]


@pytest.mark.skipif(NUMPY_1, reason="NumPy 1 cannot be refused memory")
def test_an_error_that_numpy_did_not_pass_on_is_forgotten(asked):
    state = (1, (MIB,), np.dtype(">f8"), False, bytes(8 * MIB))  # NumPy 1 and 2 copy the bytes
    array = np.empty(0, np.uint8)
    asked.answer = raising(Mine("old"))
    with pytest.raises(
        MemoryError
    ) as caught:  # one of NumPy's own, in which ours is not looked for
        array.__setstate__(state)
    assert type(caught.value) is MemoryError
    asked.answer = lambda: None
    native.allocator.set_level(1 << 62)
    np.empty(10)
    with pytest.raises(MemoryError, match="Unable to allocate"):
        np.empty(1 << 55, np.uint8)


def test_numpys_own_memory_error_is_numpys(asked):
    with pytest.raises(MemoryError, match="Unable to allocate 32"):
        np.empty(1 << 55, np.uint8)


def test_what_is_asked_while_an_exception_is_on_its_way_does_not_lose_it(asked):
    """A finalizer allocates while another error unwinds."""
    seen = []

    class Late:
        def __del__(self):
            seen.append(np.ones(MIB, np.uint8).sum())

    def work():
        late = Late()
        refuse(late)

    with pytest.raises(KeyError, match="mine"):
        work()
    gc.collect()
    assert seen == [MIB]


# The same, as a program meets it.

TWIN = """
import sys, numpy as np, chainer, chainer.functions as F
if sys.argv[1] == "ooc":
    import chainer_ooc, logging
    logging.disable()  # that nothing fits
    chainer_ooc.enable(limit="1MiB")
x = chainer.Variable(np.ones((64, 1024), "f"))
y = F.tanh(F.exp(x))
"""


@pytest.mark.parametrize(
    "program",
    [
        "np.minimum(np.ones((64, 1024), 'f'), {}['k'])",
        "F.softmax_cross_entropy(F.exp(x), np.zeros((64, 7), 'i'))",
        "np.tensordot(np.ones((64, 1024), 'f') + 1, np.ones((3, 1024), 'f') * 2, 1)",
        "with np.errstate(all='raise'): np.ones((64, 1024), 'f') / np.zeros((64, 1024), 'f')",
        "with np.errstate(all='raise'): F.log(F.exp(x) * 0)",
        "F.exp(x) + F.reshape(x, (3, 5))",
        "sys.exit('as it is')",
        "np.add(np.ones((64, 1024)), np.sort(np.ones((64, 1024)), axis=0))[10 ** 9]",
        "raise KeyboardInterrupt",
        "it = iter([np.ones((64, 1024))])\nwhile True: np.add(np.ones((64, 1024)) * 3, next(it))",
    ],
)
def test_a_program_ends_as_with_stock_chainer(run_python, forked_python, tmp_path, program):
    script = tmp_path / "script.py"
    script.write_text(f"{TWIN}\n{program}\n")
    stock, ooc = (run_python(script, kind, python=forked_python) for kind in ("stock", "ooc"))
    assert ooc.returncode == stock.returncode != 0
    assert (ooc.stdout, without_our_frames(ooc.stderr)) == (stock.stdout, stock.stderr)


def without_our_frames(text):
    """Leave the frames of a traceback out that are in this package."""
    ours = re.escape(str(Path(chainer_ooc.__file__).parent))
    return re.sub(rf'  File "{ours}/.*\n(    .*\n)*', "", text)


STRICT = """
import sys, threading, numpy as np, chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import OutOfMemoryError
from chainer_ooc.swap.devices.ram import native
MIB = 1 << 20

def work():
    try:
        for _ in range(2):  # where NumPy cannot be refused memory, it comes a moment later
            np.ones(256 * MIB, np.uint8)
    except OutOfMemoryError as error:
        print("needs 256 MiB more" in str(error))
    print(np.ones(MIB, np.uint8).sum() == MIB)

limit = native.allocator.resident_bytes() + 64 * MIB
chainer_ooc.enable(limit=limit, strict=True, swap_dir=sys.argv[1])
state.hook_allocations()
work()
thread = threading.Thread(target=lambda: (state.hook_allocations(), work()))
thread.start()
thread.join()
chainer_ooc.disable()
print(np.ones(128 * MIB, np.uint8).sum() == 128 * MIB)
"""


def test_strict_says_what_does_not_fit_between_functions_and_in_threads(run_python, tmp_path):
    """In a process of its own: what other tests have freed would make room."""
    script = tmp_path / "script.py"
    script.write_text(STRICT)
    ended = run_python(script, tmp_path)
    assert (ended.stdout.split(), ended.stderr, ended.returncode) == (["True"] * 5, "", 0)


def test_no_reference_is_lost_whatever_happens(asked):
    error = Mine("mine")
    counted = [error, asked]
    if sys.version_info < (3, 12):  # later ones do not count the references to None
        counted.append(None)
    array = np.ones(32 * KIB, np.uint8)
    for answer in (lambda: None, raising(error)):
        asked.answer = answer
        before = [sys.getrefcount(one) for one in counted]
        for _ in range(200):
            try:
                np.empty(MIB, np.uint8)
                array.resize(2 * MIB, refcheck=False)
                array.resize(32 * KIB, refcheck=False)
            except Mine as caught:
                caught.__traceback__ = caught.__context__ = None
        after = [sys.getrefcount(one) for one in counted]
        assert all(abs(b - a) < 20 for a, b in zip(before, after, strict=True)), (before, after)

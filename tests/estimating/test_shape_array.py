"""Arrays without elements have the shapes, dtypes and layouts that NumPy's results have."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from chainer_ooc.estimating.errors import EstimateError
from chainer_ooc.estimating.ledger import Ledger
from chainer_ooc.estimating.shape_array import ShapeArray, layout_axes, memory_of, new
from chainer_ooc.estimating.without_data import without_data

MASK = np.array([True, False, True])

OPERATIONS = {
    "sum": lambda x: x.sum(),
    "sum axis": lambda x: x.sum(axis=(0, 2), keepdims=True),
    "mean": lambda x: x.mean(axis=1),
    "std": lambda x: np.std(x, axis=0),
    "half": lambda x: x.astype(np.float16) + x.astype(np.float16),
    "promotion": lambda x: x * np.float64(2) + 1,
    "weak scalar": lambda x: x * 2.5,
    "comparison": lambda x: (x > 0) & (x < 1),
    "permuted": lambda x: x.transpose(2, 0, 1) * 2,
    "permuted with C": lambda x: x.transpose(2, 0, 1) + np.ones((4, 2, 3), np.float32),
    "broadcast": lambda x: x + x[:, :1],
    "reduce permuted": lambda x: x.transpose(2, 0, 1).sum(axis=1),
    "reshape view": lambda x: x.reshape(6, 4)[:, ::2],
    "reshape copy": lambda x: x.transpose(2, 1, 0).reshape(-1, 2),
    "ravel": lambda x: x.T.ravel(),
    "matmul": lambda x: x @ x.swapaxes(1, 2),
    "tensordot": lambda x: np.tensordot(x, x, ((0, 2), (0, 2))),
    "dot": lambda x: x.dot(np.ones((4, 5), np.float32)),
    "einsum": lambda x: np.einsum("ijk,ilk->jl", x, x),
    "concatenate": lambda x: np.concatenate([x, x.astype(np.float64)], axis=1),
    "concatenate permuted": lambda x: np.concatenate([x.transpose(1, 2, 0)] * 2, axis=0),
    "stack": lambda x: np.stack([x, x], axis=2),
    "split": lambda x: np.split(x, 2, axis=2)[1],
    "where": lambda x: np.where(x > 0, x, 0),
    "pad": lambda x: np.pad(x, ((0, 0), (1, 2), (0, 3)), mode="constant"),
    "tile": lambda x: np.tile(x, (1, 2, 1)),
    "repeat": lambda x: x.repeat(3, axis=1),
    "take": lambda x: x.take([0, 2, 1], axis=2),
    "index arrays": lambda x: x[:, [0, 2], :],
    "index arrays apart": lambda x: x[[0, 1], :, [1, 3]],
    "index array and number": lambda x: x[0, [2, 1]],
    "real mask": lambda x: x[:, MASK],
    "newaxis": lambda x: x[:, None, ..., 1:3],
    "element": lambda x: x[1, 2, 3],
    "argmax": lambda x: x.argmax(axis=1),
    "cumsum": lambda x: x.cumsum(axis=1),
    "clip": lambda x: x.clip(0, 1),
    "exp": lambda x: np.exp(x, dtype=np.float64),
    "modf": lambda x: np.modf(x)[1],
    "zeros_like": lambda x: np.zeros_like(x.transpose(1, 0, 2)),
    "empty_like": lambda x: np.empty_like(x, dtype=bool, shape=(2, 7)),
    "copy": lambda x: x.transpose(2, 0, 1).copy(),
    "copy K": lambda x: np.copy(x.transpose(2, 0, 1)),
    "broadcast_to": lambda x: np.broadcast_to(x[:, :1], (5, 2, 3, 4)) * 1,
    "rollaxis": lambda x: np.rollaxis(x, 2) + 0,
    "flip": lambda x: np.flip(x, 1) + 0,
    "outer": lambda x: np.multiply.outer(x[0, 0], x[0, :, 0]),
    "accumulate": lambda x: np.maximum.accumulate(x, axis=2),
    "norm": lambda x: np.linalg.norm(x, axis=2),
    "inverse": lambda x: np.linalg.inv(x[:, :, :3]),
    "asarray": lambda x: np.asarray(x, dtype=np.float64),
    "ascontiguousarray": lambda x: np.ascontiguousarray(x.T),
}


def real():
    return np.random.RandomState(0).rand(2, 3, 4).astype(np.float32)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_as_numpy(operation):
    expected = np.asarray(operation(real()))
    ledger = Ledger()
    with without_data(ledger):
        result = operation(new((2, 3, 4), np.float32, ledger))
    assert type(result) is ShapeArray
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    lengths = [n > 1 for n in expected.shape]
    assert [s for s, n in zip(result.strides, lengths, strict=True) if n] == [
        s for s, n in zip(expected.strides, lengths, strict=True) if n
    ]


WRONG = {
    "shapes": lambda x: x + x[:, :, :3],
    "reshape": lambda x: x.reshape(5, 5),
    "matmul": lambda x: x @ x,
    "concatenate": lambda x: np.concatenate([x, x[:, :, :2]], axis=0),
    "axis": lambda x: x.sum(axis=3),
    "out": lambda x: np.add(x, x, out=x[0]),
    "tensordot": lambda x: np.tensordot(x, x, (1, 2)),
}


@pytest.mark.parametrize("operation", WRONG.values(), ids=WRONG)
def test_errors_as_numpy(operation):
    with pytest.raises(ValueError):
        operation(real())
    ledger = Ledger()
    with without_data(ledger), pytest.raises(ValueError):
        operation(new((2, 3, 4), np.float32, ledger))


def test_views_share_one_allocation_and_it_dies_with_the_last():
    ledger = Ledger()
    x = new((256, 256), np.float32, ledger)
    view = x.T[3:].reshape(253, 16, 16)
    assert memory_of(view) is memory_of(x)
    assert ledger.live_bytes == x.nbytes
    copied = x.T.reshape(-1)
    assert ledger.live_bytes == 2 * x.nbytes
    del x, copied
    gc.collect()
    assert ledger.live_bytes == 256 * 256 * 4
    del view
    assert (ledger.live_bytes, ledger.peak_bytes) == (0, 2 * 256 * 256 * 4)


def test_work_in_place_allocates_nothing():
    ledger = Ledger()
    x = new((64, 64), np.float32, ledger)
    x += 1
    x[:, 3] = x[:, 4]
    np.multiply(x, x, out=x)
    assert len(ledger.events) == 1


def test_it_takes_no_memory():
    ledger = Ledger()
    before = _rss()
    with without_data(ledger):
        x = np.ones((1 << 30,), np.float32)
        y = np.exp(x * 2).reshape(1 << 15, -1)
        y += np.random.rand(1 << 15, 1 << 15)
        z = y @ y
    assert z.nbytes == 4 << 30
    assert ledger.peak_bytes >= 16 << 30
    assert _rss() - before < 64 << 20


def _rss():
    import psutil

    return psutil.Process().memory_info().rss


def test_what_depends_on_data_is_an_error_or_a_note():
    ledger = Ledger()
    x = new((8, 8), np.float32, ledger)
    with pytest.raises(EstimateError, match="depend on data"):
        x.nonzero()
    with pytest.raises(EstimateError, match="depend on data"):
        np.unique(x)
    assert x[x > 0].shape == (64,)
    assert float(x[0, 0]) == 0
    assert len(ledger.notes) == 2


def test_functions_without_a_rule_run_on_zeros_while_small():
    ledger = Ledger()
    with without_data(ledger):
        result = np.fft.fft(new((4, 6), np.float32, ledger))
        assert type(result) is ShapeArray
        assert (result.shape, result.dtype.kind) == ((4, 6), "c")
        assert any("fft" in note for note in ledger.notes)
        with pytest.raises(EstimateError, match=r"numpy's fft .* 128 MiB"):
            np.fft.fft(new((32, 1 << 20), np.float32, ledger))


def test_numpy_is_itself_afterwards_and_meanwhile_for_other_threads():
    import threading

    stock = (np.empty, np.zeros, np.random.rand, np.array)
    found = []
    with without_data(Ledger()):
        assert type(np.zeros((256, 256))) is ShapeArray
        thread = threading.Thread(target=lambda: found.append(np.zeros((256, 256))))
        thread.start()
        thread.join()
    assert (np.empty, np.zeros, np.random.rand, np.array) == stock
    assert type(found[0]) is np.ndarray
    assert layout_axes(np.zeros((2, 3)).T) == [1, 0]


def test_inference_itself_counts_nothing():
    ledger = Ledger()
    with without_data(ledger):
        x = new((3, 5, 7), np.float16, ledger)
        for _ in range(2):
            before = len(ledger.events)
            y = np.hypot(x.T, x.T)
            assert len(ledger.events) == before + 1
            del y
    assert new((2, 2), np.float32, ledger).tolist() == [[0, 0], [0, 0]]


def test_products_count_the_copies_that_numpy_makes():
    ledger = Ledger()

    def made(operation):
        first = len(ledger.events)
        result = operation()
        sizes = [nbytes for _, nbytes in ledger.events[first:] if nbytes > 0]
        del result
        return sizes

    columns = new((2, 3, 5, 5, 8, 8), np.float32, ledger)
    weights = new((4, 3, 5, 5), np.float32, ledger)
    axes = ((1, 2, 3), (1, 2, 3))
    result = 2 * 8 * 8 * 4 * 4
    # The columns are transposed for the product; the weights are as they lie, read transposed.
    assert made(lambda: np.tensordot(columns, weights, axes)) == [columns.nbytes, result]
    last = new((2, 8, 8, 3, 5, 5), np.float32, ledger)
    assert made(lambda: np.tensordot(last, weights, ((3, 4, 5), (1, 2, 3)))) == [result]
    a, b = new((6, 7), np.float32, ledger), new((7, 8), np.float64, ledger)
    assert made(lambda: a @ b) == [6 * 8 * 8]
    assert made(lambda: np.dot(a, b)) == [6 * 7 * 8, 6 * 8 * 8]  # one dtype for BLAS
    assert made(lambda: np.dot(b.T[::2], b[:, :3])) == [4 * 7 * 8, 7 * 3 * 8, 4 * 3 * 8]

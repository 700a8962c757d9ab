"""Functions in pieces have the bits, the strides and the attributes of the whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import SettingError
from chainer_ooc.graph.splitting import gemm, pieces
from chainer_ooc.testing.equality import assert_same_bits

CHILD = Path(__file__).with_name("splitting_child.py")


@pytest.fixture
def split(monkeypatch):
    """Return a function that runs another with temporaries limited to a share; and how many were split."""
    count = [0]
    run = pieces._run

    def counted(work, steps):
        count[0] += 1
        assert steps[0][0] == 0
        assert steps[-1][1] == work.units
        return run(work, steps)

    monkeypatch.setattr(pieces, "_run", counted)

    def call(function, share=0.3, **settings):
        count[0] = 0
        settings.setdefault("split", "exact")
        monkeypatch.setattr(
            pieces, "_room", lambda manager, work: int(share * work.units * work.unit_bytes)
        )
        with chainer_ooc.out_of_core_mode(**settings):
            state.hook_allocations()
            return function(), count[0]

    return call


def gradients(function, *arrays, double=False):
    """Return outputs, gradients and, where asked for, gradients of these; and the strides of all."""
    variables = [chainer.Variable(array) for array in arrays]
    y = function(*variables)
    y.grad = np.random.RandomState(1).standard_normal(y.shape).astype(y.dtype)
    y.backward(enable_double_backprop=double, retain_grad=True)
    found = [y.array, *(v.grad for v in variables)]
    if double:
        firsts = [v.grad_var for v in variables]
        for v in variables:
            v.cleargrad()
        sum(F.sum(g * g) for g in firsts).backward()
        found += [v.grad for v in variables]
    return found, [(a.strides, a.dtype) for a in found if a is not None]


def random(*shape, dtype=np.float32):
    return np.random.standard_normal(shape).astype(dtype)


def blas_keeps_bits():
    """Tell whether parts of a product in single precision have the bits of the whole, with this BLAS on this CPU.

    OpenBLAS's code for AVX-512 does that, that for AVX2 does not.
    """
    free, fixed = random(4096, 288), random(288, 32)
    cuts = range(512, 4096, 528)
    whole, across = free @ fixed, fixed.T @ free.T
    return all(
        (np.concatenate([free[:cut] @ fixed, free[cut:] @ fixed]) == whole).all()
        and (np.hstack([fixed.T @ free[:cut].T, fixed.T @ free[cut:].T]) == across).all()
        for cut in cuts
    )


CONVOLUTIONS = {
    "plain": (F.convolution_2d, (7, 32, 32, 32), (48, 32, 3, 3), {"pad": 1}),
    "no padding, odd sizes": (F.convolution_2d, (65, 32, 11, 13), (17, 32, 3, 3), {}),
    "stride": (F.convolution_2d, (50, 32, 17, 17), (32, 32, 5, 5), {"stride": 2, "pad": 2}),
    "dilate": (F.convolution_2d, (8, 32, 24, 24), (40, 32, 3, 3), {"pad": 2, "dilate": 2}),
    "cover all": (
        F.convolution_2d,
        (33, 32, 18, 18),
        (24, 32, 3, 3),
        {"stride": 2, "cover_all": True},
    ),
    "up": (F.deconvolution_2d, (8, 32, 16, 16), (32, 24, 4, 4), {"stride": 2, "pad": 1}),
    "three dimensions": (F.convolution_nd, (6, 32, 8, 16, 8), (32, 32, 3, 3, 3), {"pad": 1}),
    "three, up": (F.deconvolution_nd, (6, 32, 4, 8, 8), (32, 24, 2, 2, 2), {"stride": 2}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients_have_the_same_bits(split, name, dtype, bias):
    function, x, w, arguments = CONVOLUTIONS[name]
    arrays = [random(*x, dtype=dtype), random(*w, dtype=dtype)]
    if bias:
        arrays.append(random(w[1] if "up" in name else w[0], dtype=dtype))

    def run():
        return gradients(lambda *a: function(*a, **arguments), *arrays)

    expected = run()
    actual, count = split(run)
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
    if w[0] % 16 == 0 and "odd" not in name and "cover" not in name:
        if dtype is np.float32:
            assert bool(count) == blas_keeps_bits()
        else:
            assert count


def test_half_precision_is_split_too(split):
    arrays = random(3, 4, 6, 6, dtype="e"), random(5, 4, 3, 3, dtype="e")

    def run():
        return gradients(F.convolution_2d, *arrays)

    expected = run()
    actual, count = split(run)
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
    assert count == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pooling_2d(x, 2),
        lambda x: F.max_pooling_2d(x, 3, stride=2, pad=1),
        lambda x: F.average_pooling_2d(x, 3, stride=1, pad=1),
        lambda x: F.average_pooling_2d(x, x.shape[2]),
        lambda x: F.max_pooling_nd(F.reshape(x, (*x.shape[:2], x.shape[2], 3, -1)), 3, pad=1),
    ],
)
def test_poolings_have_the_same_bits(split, pool, size, dtype):
    x = random(5, 40, 3 * size, 3 * size, dtype=dtype)

    def run():
        return gradients(pool, x, double=True)

    expected = run()
    actual, count = split(run)
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
    assert count >= 2


GROUPED = {
    "two groups": (F.convolution_2d, (5, 6, 9, 11), (4, 3, 3, 3), {"groups": 2, "pad": 1}),
    "stride, dilate": (
        F.convolution_2d,
        (3, 9, 13, 12),
        (6, 3, 3, 2),
        {"groups": 3, "stride": (2, 1), "pad": (1, 2), "dilate": (1, 2)},
    ),
    "cover all": (
        F.convolution_2d,
        (7, 8, 10, 9),
        (8, 2, 3, 3),
        {"groups": 4, "stride": 2, "cover_all": True},
    ),
    "depthwise": (F.depthwise_convolution_2d, (3, 10, 8, 8), (1, 10, 3, 3), {"pad": 1}),
    "depthwise, several": (F.depthwise_convolution_2d, (3, 5, 8, 7), (2, 5, 3, 3), {}),
    "one image": (F.convolution_2d, (1, 6, 9, 9), (6, 2, 3, 3), {"groups": 3}),
    "points": (F.convolution_2d, (5, 6, 1, 1), (6, 2, 1, 1), {"groups": 3}),
    "up": (F.deconvolution_2d, (5, 6, 5, 4), (6, 2, 4, 4), {"groups": 3, "stride": 2, "pad": 1}),
    "up, no crop": (F.deconvolution_2d, (3, 4, 5, 5), (4, 3, 3, 3), {"groups": 2}),
    "up, dilate": (F.deconvolution_2d, (3, 4, 5, 5), (4, 3, 3, 3), {"groups": 2, "dilate": 2}),
    "one dimension": (F.convolution_nd, (5, 6, 20), (6, 2, 3), {"groups": 3, "pad": 1}),
    "one, up": (F.deconvolution_nd, (5, 6, 9), (6, 2, 4), {"groups": 3, "stride": 2, "pad": 1}),
    "three dimensions": (
        F.convolution_nd,
        (3, 4, 5, 6, 5),
        (6, 2, 3, 3, 3),
        {"groups": 2, "stride": 2, "pad": 1},
    ),
    "three, up": (
        F.deconvolution_nd,
        (3, 4, 3, 3, 4),
        (4, 2, 2, 3, 2),
        {"groups": 2, "stride": 2, "pad": (0, 1, 0)},
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", GROUPED)
def test_convolutions_with_groups_have_the_same_bits(split, name, dtype, bias):
    function, x, w, arguments = GROUPED[name]
    double = dtype is not np.float16  # squares of gradients overflow
    arrays = [random(*x, dtype=dtype), random(*w, dtype=dtype)]
    if bias:
        arrays.append(random(function(*arrays, **arguments).shape[1], dtype=dtype))

    def run():
        return gradients(lambda *a: function(*a, **arguments), *arrays, double=double)

    expected = run()
    actual, count = split(run)
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
    assert count >= (7 if double else 3)


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("function", "x", "w", "arguments"),
    [
        (F.convolution_2d, (7, 64, 16, 16), (64, 32, 3, 3), {"pad": 1}),
        (F.deconvolution_2d, (8, 64, 8, 8), (64, 16, 4, 4), {"stride": 2, "pad": 1}),
        (F.convolution_nd, (3, 64, 8, 8, 8), (64, 32, 3, 3, 3), {"pad": 1}),
    ],
)
def test_a_group_too_large_is_split_too(split, function, x, w, arguments, dtype, share):
    if dtype is np.float16:
        x, w = (3, 4, 6, 6, *x[4:]), (4, 2, *w[2:])
    arrays = random(*x, dtype=dtype), random(*w, dtype=dtype)

    def run():
        return gradients(lambda *a: function(*a, groups=2, **arguments), *arrays)

    expected = run()
    actual, count = split(run, share)
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
    if dtype is np.float32:
        assert count > 3 or not blas_keeps_bits()
    else:
        assert count > 3
    always, count = split(run, share, split="always")
    assert always[1] == expected[1]
    assert count == 9


def test_groups_that_do_not_divide_the_channels_are_an_error_as_ever(split):
    arrays = random(2, 5, 8), random(4, 2, 3)
    with pytest.raises(TypeError, match="must be a divisor"):
        split(lambda: F.convolution_nd(*arrays, groups=2))


def through_indexes(x, **arguments):
    y, indexes = F.max_pooling_2d(x, 3, stride=2, pad=1, return_indices=True, **arguments)
    return F.upsampling_2d(y, indexes, 3, stride=2, pad=1, outsize=x.shape[2:], **arguments)


IMAGES = {
    "mean, one dimension": (lambda x: F.average_pooling_1d(x, 3, pad=1), (5, 4, 20), True),
    "mean": (lambda x: F.average_pooling_nd(x, 3, stride=2, pad=1), (7, 3, 9, 8), True),
    "mean, everything": (lambda x: F.average_pooling_nd(x, x.shape[2:]), (7, 3, 31, 29), True),
    "mean, three": (lambda x: F.average_pooling_3d(x, (2, 3, 1), 1), (3, 4, 6, 5, 4), True),
    "mean, padding apart": (
        lambda x: F.average_pooling_nd(x, 3, stride=(2, 1), pad=(1, 0), pad_value=None),
        (5, 4, 9, 8),
        True,
    ),
    "mean, padding apart, three": (
        lambda x: F.average_pooling_nd(x, 3, 2, 1, pad_value=None),
        (5, 4, 7, 6, 5),
        True,
    ),
    "unpooling": (lambda x: F.unpooling_2d(x, 3, stride=2, pad=1), (7, 4, 6, 5), True),
    "unpooling, all": (
        lambda x: F.unpooling_2d(x, (3, 2), stride=2, cover_all=False),
        (5, 4, 6, 5),
        True,
    ),
    "unpooling, size": (lambda x: F.unpooling_2d(x, 3, 2, 1, (12, 11)), (5, 4, 7, 6), True),
    "unpooling, one": (lambda x: F.unpooling_1d(x, 3, stride=2), (5, 4, 9), True),
    "unpooling, three": (
        lambda x: F.unpooling_3d(x, 2, stride=(1, 2, 2), pad=(0, 1, 0)),
        (3, 2, 4, 5, 3),
        True,
    ),
    "unpooling, three, size": (
        lambda x: F.unpooling_3d(x, 2, outsize=(7, 10, 6)),
        (3, 2, 4, 5, 3),
        True,
    ),
    "indexes": (through_indexes, (5, 4, 9, 10), True),
    "indexes, not all": (lambda x: through_indexes(x, cover_all=False), (5, 4, 9, 10), True),
    "lrn": (F.local_response_normalization, (7, 9, 6, 5), False),
    "lrn, few channels": (lambda x: F.local_response_normalization(x, n=7), (5, 2, 6, 5), False),
    "lrn, wide": (
        lambda x: F.local_response_normalization(x, n=3, k=1, alpha=0.1, beta=0.5),
        (5, 8, 33, 37),
        False,
    ),
    "lrn, vectors": (F.local_response_normalization, (7, 9), False),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["as made", "channels last", "channels first", "images last"])
@pytest.mark.parametrize("name", IMAGES)
def test_functions_of_single_images_have_the_same_bits(split, name, order, dtype):
    function, shape, double = IMAGES[name]
    x = random(*shape, dtype=dtype)
    if order == "channels last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    elif order == "channels first":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, 0)), 0, 1)
    elif order == "images last":
        x = np.asfortranarray(x)

    def run():
        return gradients(function, x, double=double)

    expected = run()
    for share in (0.01, 0.3, 0.6):
        actual, count = split(run, share)
        assert_same_bits(actual[0], expected[0])
        assert actual[1] == expected[1]
        assert count >= 2 + double


def sampled(x):
    return F.spatial_transformer_sampler(x, random(len(x), 2, 32, 32))


RECKONED = {
    "maximum": lambda x: F.max_pooling_2d(x, 3, stride=1),
    "mean": lambda x: F.average_pooling_nd(x, 3, stride=2, pad=1),
    "mean, padding apart": lambda x: F.average_pooling_nd(x, 3, 1, 1, pad_value=None),
    "unpooling": lambda x: F.unpooling_2d(x, 3, stride=2, pad=1),
    "indexes": through_indexes,
    "lrn": F.local_response_normalization,
    "lrn, double": lambda x: F.local_response_normalization(F.cast(x, "d")),
    "resizing": lambda x: F.resize_images(x, (48, 48)),
    "sampling": sampled,
    "convolution": lambda x: F.convolution_2d(x, random(32, 16, 3, 3), pad=1),
    "deconvolution": lambda x: F.deconvolution_2d(x, random(16, 16, 3, 3), pad=1),
}


@pytest.mark.parametrize("images", [8, 16])
@pytest.mark.parametrize("name", RECKONED)
def test_pieces_take_no_more_than_is_reckoned(split, monkeypatch, name, images):
    """However the interpreter is built: of arrays below 256 KiB NumPy never uses the memory of temporaries again."""
    excess = []
    run = pieces._run

    def measured(work, steps):
        tracemalloc.start()
        try:
            found = run(work, steps)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        most = max(stop - start for start, stop in steps)
        excess.append(peak - work.out_bytes - most * work.unit_bytes)
        return found

    monkeypatch.setattr(pieces, "_run", measured)
    x = random(images, 16, 32, 32)
    _, count = split(lambda: gradients(RECKONED[name], x), split="always")
    assert count == len(excess) >= 1
    assert max(excess) < 96 << 10


@pytest.mark.parametrize(
    "name", ["mean", "mean, padding apart", "unpooling", "indexes", "lrn", "maximum", "mean, 2"]
)
def test_the_attributes_are_those_of_the_whole(split, name):
    others = {
        "maximum": lambda x: F.max_pooling_2d(x, 3),
        "mean, 2": lambda x: F.average_pooling_2d(x, 3),
    }
    function = others.get(name) or IMAGES[name][0]
    x = chainer.Variable(random(7, 3, 9, 8))

    def run():
        creator = function(x).creator
        return {
            key: value
            for key, value in vars(creator).items()
            if isinstance(value, np.ndarray | np.dtype | tuple | int)
            and key not in ("inputs", "outputs")
            and not key.startswith("_ooc_")
        }

    expected = run()
    actual, count = split(run)
    assert count
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value)


def test_repeating_pixels_is_not_split(split):
    x = random(5, 3, 4, 4)
    assert split(lambda: gradients(lambda x: F.unpooling_2d(x, 2, cover_all=False), x))[1] == 0


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("sizes", [((9, 7), (20, 15)), ((20, 15), (9, 7)), ((1, 1), (3, 4))])
def test_the_gradient_of_resizing_has_the_same_bits(split, sizes, mode):
    x = random(5, 3, *sizes[0])

    def run():
        return gradients(
            lambda x: F.resize_images(x, sizes[1], mode=mode, align_corners=False), x, double=True
        )

    expected = run()
    actual, count = split(run)
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
    assert count


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(5, 3, 9, 8), (3, 1, 1, 1), (4, 30, 5, 5)])
@pytest.mark.parametrize("points", [(6, 7), (1, 1)])
def test_sampling_has_the_same_bits(split, points, shape, order, dtype):
    x = np.array(random(*shape, dtype=dtype), order=order)
    grid = random(shape[0], 2, *points, dtype=dtype)

    def run():
        return gradients(F.spatial_transformer_sampler, x, grid)

    expected = run()
    for share in (0.01, 0.3, 0.6):
        actual, count = split(run, share)
        assert_same_bits(actual[0], expected[0])
        assert actual[1] == expected[1]
        assert count == 2 - x.flags.fnc


def test_double_backprop_has_the_same_bits(split):
    arrays = random(6, 32, 16, 16), random(32, 32, 3, 3), random(32)

    def run():
        return gradients(lambda *a: F.convolution_2d(*a, pad=1), *arrays, double=True)

    expected = run()
    actual, count = split(run)
    assert_same_bits(actual[0], expected[0])
    assert count > 3 or (count == 0 and not blas_keeps_bits())


def test_what_would_not_have_the_same_bits_is_split_only_on_request(split):
    arrays = random(5, 3, 15, 15), random(1, 3, 3, 3)

    def run():
        return gradients(F.convolution_2d, *arrays)

    expected = run()
    (actual, _), count = split(run)
    assert not count
    assert_same_bits(actual, expected[0])
    (actual, strides), count = split(run, split="always")
    assert count == 3
    assert strides == expected[1]
    for a, b in zip(actual, expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not split(run, split="never")[1]
    with pytest.raises(SettingError, match="split='some' is not allowed"):
        chainer_ooc.enable(split="some")


@pytest.mark.parametrize(
    "differs",
    [
        lambda rows: np.full(len(rows), len(rows) > 250),
        lambda rows: (rows >= 504) & (rows < 1008),  # between the seams of panels
    ],
    ids=["by the size", "by the place"],
)
def test_a_blas_whose_sums_depend_on_the_cut_is_found_out(monkeypatch, differs):
    product = gemm.Product("rows", 1024, 800, 32, np.dtype("f"))

    def verdict(differs):
        monkeypatch.setattr(np, "dot", lambda a, b: differs(np.arange(len(a)))[:, None] + b[:1] * 0)
        gemm._keeps_bits.cache_clear()
        return product.can_be_split(7)

    try:
        assert verdict(lambda rows: rows * 0)
        assert not verdict(differs)
    finally:
        gemm._keeps_bits.cache_clear()


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(400))
def test_random_convolutions_have_the_same_bits(split, seed):
    random_state = np.random.RandomState(seed)
    images, channels, outs = (int(random_state.randint(*r)) for r in ((2, 70), (1, 80), (1, 70)))
    kernel, size = int(random_state.choice([1, 3, 5, 7])), int(random_state.randint(7, 33))
    stride = int(random_state.randint(1, 3))
    dtype = random_state.choice(["f", "d"])
    if images * channels * kernel**2 * size**2 > 2e7:
        pytest.skip("large")
    x = random(images, channels, size, size, dtype=dtype)
    w = random(outs, channels, kernel, kernel, dtype=dtype)

    def run():
        return gradients(lambda *a: F.convolution_2d(*a, stride=stride, pad=kernel // 2), x, w)

    expected = run()
    (actual, strides), _ = split(run, share=random_state.uniform(0.05, 0.6))
    assert_same_bits(actual, expected[0])
    assert strides == expected[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(200))
def test_random_convolutions_with_groups_have_the_same_bits(split, seed):
    random_state = np.random.RandomState(seed)
    groups = int(random_state.randint(2, 20))
    images, channels, outs = (int(random_state.randint(*r)) for r in ((1, 30), (1, 20), (1, 20)))
    kernel, size = int(random_state.choice([1, 3, 5, 7])), int(random_state.randint(7, 40))
    arguments = {
        "groups": groups,
        "stride": int(random_state.randint(1, 3)),
        "pad": kernel // 2,
        "dilate": int(random_state.randint(1, 3)) if kernel < 5 else 1,
    }
    dtype = random_state.choice(["f", "d"])
    if images * groups * channels * kernel**2 * size**2 > 2e7:
        pytest.skip("large")
    x = random(images, groups * channels, size, size, dtype=dtype)
    function = random_state.choice([F.convolution_2d, F.deconvolution_2d])
    down = function is F.convolution_2d
    w = random(groups * (outs if down else channels), channels if down else outs, kernel, kernel)

    def run():
        return gradients(lambda *a: function(*a, **arguments), x, w.astype(dtype))

    expected = run()
    (actual, strides), count = split(run, share=random_state.uniform(0.05, 0.6))
    assert_same_bits(actual, expected[0])
    assert strides == expected[1]
    assert count >= 3


def run_network(run_python, *arguments):
    """Return a network's peak over its limit, a digest of what it learned, and how many warnings there were."""
    done = run_python(CHILD, *arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, limit, digest, warned = done.stdout.split()
    return int(peak) / max(int(limit), 1), digest, int(warned)


def test_a_network_whose_largest_function_does_not_fit_stays_under_the_limit(run_python):
    def run(*arguments):
        return run_network(run_python, "convolutions", *arguments)

    in_core = run("none")
    room = 153 << 20
    whole = run(room, "split=never")
    assert whole[0] > 1.1
    assert whole[2] == 1
    exact, always = run(room, "split=exact"), run(room, "split=always")
    assert exact[1] == whole[1] == in_core[1]
    for peak, _, warned in (exact, always) if blas_keeps_bits() else (always,):
        assert peak <= 1.02
        assert warned == 0


@pytest.mark.parametrize(
    ("network", "mebibytes"),
    [
        *(("groups", 103), ("averages", 83), ("lrn", 108), ("unpooling", 83)),
        *(("indexes", 83), ("resizing", 83), ("sampling", 113)),
    ],
)
def test_what_never_needs_the_blas_stays_under_the_limit(run_python, network, mebibytes):
    room = mebibytes << 20
    whole = run_network(run_python, network, room, "split=never")
    pieces = run_network(run_python, network, room, "split=exact")
    assert whole[0] > 1.1
    assert pieces[0] <= 1.02
    assert pieces[1:] == (whole[1], 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(30))
def test_cut_products_have_the_same_bits(seed):
    random_state = np.random.RandomState(seed)
    done = 0
    while done < 6:
        side, dtype = (
            random_state.choice(["rows", "columns"]),
            np.dtype(random_state.choice(list("fd"))),
        )
        each = int(random_state.choice([1, 9, 25, 49, 121, 169, 196, 289, 784, 1024, 1369]))
        units = int(random_state.randint(2, max(3, 5000 // each)))
        depth, other = int(random_state.randint(2, 900)), int(random_state.randint(2, 200))
        if dtype.char == "d":
            other, units = (
                16 * random_state.randint(1, 13),
                16 * random_state.randint(1, max(2, 300 // each)),
            )
        product = gemm.Product(side, each, depth, other, dtype)
        grain = product.grain
        cut = -(-product.least // grain) * grain
        cut += grain * random_state.randint(4)
        if units - cut < product.least or units * each * max(depth, other) > 2e6:
            continue
        if not product.can_be_split(units):
            continue
        done += 1
        order = random_state.choice(["C", "F"])
        free = random(units * each, depth, dtype=dtype)
        fixed = np.array(random(other, depth, dtype=dtype), order=random_state.choice(["C", "F"]))
        cut *= each
        parts = [np.array(part, order=order) for part in (free, free[:cut], free[cut:])]
        if side == "rows":
            whole, *parts = (np.dot(part, fixed.T) for part in parts)
        else:
            whole, *parts = (np.dot(fixed, part.T).T for part in parts)
        assert_same_bits(
            np.concatenate(parts), whole, f"{product} of {units}, cut at {cut}, {order}"
        )

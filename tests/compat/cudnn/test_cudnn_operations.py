"""Pooling, activations, softmax, batch normalization, dropout: results, shapes, layouts, memory."""

from __future__ import annotations

import gc

import numpy
import pytest

TOLERANCE = {"e": 1e-2, "f": 1e-5, "d": 1e-12}


def randoms(cudnn, dtype, *shapes, seed=0):
    rng = numpy.random.default_rng(seed)
    return [cudnn.cupy.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    numpy.testing.assert_allclose(
        numpy.asarray(actual, float), expected, TOLERANCE[dtype], TOLERANCE[dtype]
    )


# Pooling


def pooled(x, ksize, stride, pad, out, mode):
    """Return the definition's result."""
    n, c = x.shape[:2]
    y = numpy.empty((n, c, *out))
    for where in numpy.ndindex(*out):
        lower = [w * s - p for w, s, p in zip(where, stride, pad, strict=True)]
        inside = tuple(
            slice(max(a, 0), min(a + k, size))
            for a, k, size in zip(lower, ksize, x.shape[2:], strict=True)
        )
        window = numpy.asarray(x, float)[(slice(None), slice(None), *inside)].reshape(n, c, -1)
        if mode in (0, 3):
            value = window.max(axis=2)
        else:
            count = numpy.prod(ksize) if mode == 1 else window.shape[2]
            value = window.sum(axis=2) / count
        y[(slice(None), slice(None), *where)] = value
    return y


@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("spatial", [2, 3])
def test_pooling(cudnn, dtype, mode, spatial):
    sizes, ksize, stride, pad = (
        (6, 5, 4)[:spatial],
        (3, 2, 2)[:spatial],
        (2, 1, 2)[:spatial],
        (1, 0, 1)[:spatial],
    )
    out = tuple(
        (n + 2 * p - k) // s + 1 for n, k, s, p in zip(sizes, ksize, stride, pad, strict=True)
    )
    x, gy = randoms(cudnn, dtype, (2, 3, *sizes), (2, 3, *out))
    y = cudnn.cupy.empty(gy.shape, dtype)
    assert cudnn.cupy_cudnn.pooling_forward(x, y, ksize, stride, pad, mode) is y
    close(y, pooled(x, ksize, stride, pad, out, mode), dtype)
    gx = cudnn.cupy_cudnn.pooling_backward(x, y, gy, ksize, stride, pad, mode)
    assert gx.shape == x.shape and gx.dtype == x.dtype
    # The gradient's sum over a window is the window's gradient; averages with padding lose some.
    if mode != 1:
        close(gx.sum(dtype=float).astype(dtype), gy.sum(dtype=float), dtype)
    desc = cudnn.fake.things[cudnn.fake.named("cudnnPoolingForward")[0].arguments["poolingDesc"]]
    assert (desc.ksize, desc.stride, desc.pad) == (list(ksize), list(stride), list(pad))


@pytest.mark.parametrize("strict", [False, True])
def test_max_pooling_that_covers_all(cudnn, strict):
    """Windows that reach beyond the padded input, whether or not cuDNN takes such an output."""
    cudnn.fake.strict_pooling = strict
    x, gy = randoms(cudnn, "f", (2, 3, 6, 5), (2, 3, 4, 3))
    y = cudnn.cupy.empty(gy.shape, "f")
    arguments = ((3, 3), (2, 2), (1, 0), 0)
    cudnn.cupy_cudnn.pooling_forward(x, y, *arguments)
    close(y, pooled(x, *arguments[:3], (4, 3), 0), "f")
    gx = cudnn.cupy_cudnn.pooling_backward(x, y, gy, *arguments)
    assert gx.shape == x.shape and gx.flags.c_contiguous
    for index in numpy.ndindex(2, 3):
        hit = numpy.isin(x[index], y[index])
        assert (gx[index][~hit] == 0).all()
        numpy.testing.assert_allclose(gx[index].sum(), gy[index].sum(), 1e-5)


def test_average_pooling_beyond_the_input_is_refused(cudnn):
    cudnn.fake.strict_pooling = True
    (x,) = randoms(cudnn, "f", (1, 1, 6, 6))
    y = cudnn.cupy.empty((1, 1, 4, 4), "f")
    with pytest.raises(cudnn.library.CuDNNError, match=r"\(2000\)") as info:
        cudnn.cupy_cudnn.pooling_forward(x, y, (3, 3), (2, 2), (0, 0), 1)
    assert info.value.bad_parameter and info.value.function == "cudnnPoolingForward"


# Activations and softmax

ACTIVATIONS = {
    # mode: value, slope
    0: (lambda x: 1 / (1 + numpy.exp(-x)), lambda x, y: y * (1 - y)),
    1: (lambda x: numpy.maximum(x, 0), lambda x, y: x > 0),
    2: (numpy.tanh, lambda x, y: 1 - y**2),
    3: (lambda x: numpy.clip(x, 0, 0.7), lambda x, y: (x > 0) & (x < 0.7)),
}


@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("mode", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (7,), (3, 4), (), (2, 1, 2, 1, 3)])
def test_activations(cudnn, dtype, mode, shape):
    x, gy = randoms(cudnn, dtype, shape, shape)
    x, gy = cudnn.cupy.asarray(x), cudnn.cupy.asarray(gy)
    value, slope = ACTIVATIONS[mode]
    coef = 0.7 if mode == 3 else 0.0
    y = cudnn.cupy_cudnn.activation_forward(x, mode, coef)
    close(y, value(numpy.asarray(x, float)), dtype)
    gx = cudnn.cupy_cudnn.activation_backward(x, y, gy, mode, coef)
    exact = numpy.asarray(gy, float) * slope(numpy.asarray(x, float), numpy.asarray(y, float))
    close(gx, exact, dtype)


def test_activations_of_one_kind_share_descriptors(cudnn):
    for shape in ((2, 3), (2, 3), (4, 5)):
        (x,) = randoms(cudnn, "f", shape)
        cudnn.cupy_cudnn.activation_forward(x, 3, 20.0)
    assert len(cudnn.fake.named("cudnnCreateActivationDescriptor")) <= 1
    calls = cudnn.fake.named("cudnnActivationForward")
    assert calls[0].arguments["xDesc"] == calls[1].arguments["xDesc"]
    assert calls[0].arguments["xDesc"] != calls[2].arguments["xDesc"]


@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 4), 1), ((3, 4), -1), ((2, 3, 4, 5), 1), ((2, 3, 4), 0), ((5,), 0)]
)
def test_softmax(cudnn, dtype, algorithm, shape, axis):
    x, gy = randoms(cudnn, dtype, shape, shape)
    v, g = numpy.asarray(x, float), numpy.asarray(gy, float)
    e = numpy.exp(v - v.max(axis=axis, keepdims=True))
    soft = e / e.sum(axis=axis, keepdims=True)
    y = cudnn.cupy_cudnn.softmax_forward(x, axis, algorithm)
    close(y, numpy.log(soft) if algorithm == 2 else soft, dtype)
    gx = cudnn.cupy_cudnn.softmax_backward(y, gy, axis, algorithm)
    if algorithm == 2:
        expected = g - soft * g.sum(axis=axis, keepdims=True)
    else:
        expected = soft * (g - (soft * g).sum(axis=axis, keepdims=True))
    close(gx, expected, dtype)


def test_softmax_axis_is_checked(cudnn):
    (x,) = randoms(cudnn, "f", (2, 3))
    with pytest.raises(ValueError, match="axis 2 does not exist in an array of 2 dimensions"):
        cudnn.cupy_cudnn.softmax_forward(x, 2, 1)


@pytest.mark.parametrize("function", ["activation_forward", "softmax_forward"])
def test_integers_are_refused(cudnn, function):
    x = cudnn.cupy.asarray(numpy.arange(6).reshape(2, 3))
    with pytest.raises(TypeError, match="float16, float32 and float64 here, not for int64"):
        getattr(cudnn.cupy_cudnn, function)(x, 1, 1)


def test_mixed_dtypes_are_refused(cudnn):
    x, gy = randoms(cudnn, "f", (2, 3), (2, 3))
    with pytest.raises(TypeError, match="one dtype here, got float32 and float64"):
        cudnn.cupy_cudnn.activation_backward(x, x, gy.astype("d"), 1)


# Batch normalization


def normalized(x, axes, eps):
    x = numpy.asarray(x, float)
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    return (x - mean) / numpy.sqrt(var + eps), mean, var


BN = {
    # is_for_conv2d, mode, layout: shape, axes of the statistics, shape of the parameters
    (True, 1, 0): ((4, 3, 5, 2), (0, 2, 3), (1, 3, 1, 1)),
    (True, 2, 0): ((4, 3, 5, 2), (0, 2, 3), (1, 3, 1, 1)),
    (True, 2, 1): ((4, 5, 2, 3), (0, 1, 2), (1, 1, 1, 3)),
    (False, 0, 0): ((6, 3), (0,), (1, 3)),
    (False, 0, 7): ((2, 5, 3), (0, 1), (1, 1, 3)),
}


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("dtypes", ["ff", "dd", "ee", "ef"])
@pytest.mark.parametrize("case", BN)
def test_batch_normalization(cudnn, extended, dtypes, case):
    (conv2d, mode, layout), (shape, axes, broadcast) = case, BN[case]
    layout %= 7
    dtype, param = dtypes
    xp, module, eps, decay = cudnn.cupy, cudnn.cupy_cudnn, 1e-3, 0.75
    x, gy = randoms(cudnn, dtype, shape, shape)
    gamma, beta, running_mean, running_var = randoms(cudnn, param, *[(3,)] * 4, seed=1)
    running_var[...] = abs(running_var) + 1
    old_mean, old_var = numpy.array(running_mean, float), numpy.array(running_var, float)
    forward = (
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        None,
        None,
        eps,
        decay,
        conv2d,
        mode,
        False,
    )
    reserve = None
    if extended:
        reserve, y, mean, inv_std = module.batch_normalization_forward_training_ex(
            *forward, d_layout=layout
        )
    else:
        y, mean, inv_std = module.batch_normalization_forward_training(*forward, d_layout=layout)
    statistic = "d" if dtype == "d" else "f"
    assert mean.dtype == inv_std.dtype == statistic
    x_hat, exact_mean, exact_var = normalized(x, axes, eps)
    scale = numpy.asarray(gamma, float).reshape(broadcast)
    close(y, x_hat * scale + numpy.asarray(beta, float).reshape(broadcast), dtype)
    close(mean, exact_mean.ravel(), statistic)
    close(inv_std, 1 / numpy.sqrt(exact_var.ravel() + eps), statistic)
    count = x.size // 3
    close(running_mean, 0.75 * old_mean + 0.25 * exact_mean.ravel(), param)
    close(running_var, 0.75 * old_var + 0.25 * exact_var.ravel() * count / (count - 1), param)

    gx, ggamma, gbeta = module.batch_normalization_backward(
        x,
        gamma,
        gy,
        mean,
        inv_std,
        eps,
        conv2d,
        mode,
        False,
        d_layout=layout,
        reserve_space=reserve,
    )
    g = numpy.asarray(gy, float)
    exact_ggamma, exact_gbeta = ((a.sum(axis=axes, keepdims=True)) for a in (g * x_hat, g))
    slope = scale / numpy.sqrt(exact_var + eps)
    close(gx, slope * (g - (exact_gbeta + x_hat * exact_ggamma) / count), dtype)
    close(ggamma, exact_ggamma.ravel(), param)
    close(gbeta, exact_gbeta.ravel(), param)

    fixed = module.batch_normalization_forward_inference(
        x, gamma, beta, running_mean, running_var, eps, conv2d, mode, d_layout=layout
    )
    inverse = 1 / numpy.sqrt(numpy.asarray(running_var, float) + eps)
    shifted = numpy.asarray(x, float) - numpy.asarray(running_mean, float).reshape(broadcast)
    exact = shifted * inverse.reshape(broadcast) * scale + numpy.asarray(beta, float).reshape(
        broadcast
    )
    close(fixed, exact, dtype)
    assert xp is cudnn.cupy


def test_batch_normalization_without_running_statistics(cudnn):
    (x,) = randoms(cudnn, "f", (4, 3, 2, 2))
    gamma, beta = randoms(cudnn, "f", (3,), (3,))
    common = (1e-5, 0.9, True, 1, False)
    function = cudnn.cupy_cudnn.batch_normalization_forward_training
    y, _, _ = function(x, gamma, beta, None, None, None, None, *common)
    assert numpy.isfinite(y).all()
    with pytest.raises(ValueError, match="both running_mean and running_var"):
        function(x, gamma, beta, gamma, None, None, None, *common)


def test_batch_normalization_into_given_arrays(cudnn):
    (x,) = randoms(cudnn, "f", (4, 3, 2, 2))
    gamma, beta, mean, inv_std = randoms(cudnn, "f", *[(3,)] * 4)
    rest = (1e-5, 0.9, True, 1, False)
    given = (x, gamma, beta, None, None, mean, inv_std, *rest)
    y = cudnn.cupy_cudnn.batch_normalization_forward_training(*given)
    assert y.shape == x.shape
    close(mean, numpy.asarray(x, float).mean(axis=(0, 2, 3)), "f")
    assert len(cudnn.cupy_cudnn.batch_normalization_forward_training_ex(*given)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 4}, "gamma has 4 elements but x of shape .* has 3 channels"),
        ({"mode": 9}, "not 9"),
        ({"ndim": 3}, "four dimensions"),
    ],
)
def test_batch_normalization_arguments_are_checked(cudnn, change, message):
    (x,) = randoms(cudnn, "f", (4, 3, 2, 2)[: change.get("ndim", 4)])
    gamma, mean = randoms(cudnn, "f", (change.get("gamma", 3),), (3,))
    with pytest.raises(ValueError, match=message):
        cudnn.cupy_cudnn.batch_normalization_forward_inference(
            x, gamma, gamma, mean, mean, 1e-5, True, change.get("mode", 1)
        )


def test_overflow_of_the_persistent_mode_is_told_in_debug_mode(cudnn):
    (x,) = randoms(cudnn, "f", (4, 3, 2, 2))
    gamma, beta = randoms(cudnn, "f", (3,), (3,))
    function = cudnn.cupy_cudnn.batch_normalization_forward_training_ex
    function(x, gamma, beta, None, None, None, None, 1e-5, 0.9, True, 2, True)
    cudnn.fake.overflow = 1007
    with pytest.warns(RuntimeWarning, match=r"status 1007.*cudnn_fast_batch_normalization = False"):
        function(x, gamma, beta, None, None, None, None, 1e-5, 0.9, True, 2, True)


# Dropout


@pytest.mark.parametrize("dtype", "efd")
def test_dropout(cudnn, dtype):
    x, gy = randoms(cudnn, dtype, (6, 50), (6, 50))
    states = cudnn.cupy_cudnn.DropoutStates(None, numpy.uint64(2**63 + 5))
    mask, y = states.forward(None, x, 0.25)
    kept = numpy.asarray(y) != 0
    assert 0.5 < kept.mean() < 0.95
    close(y, numpy.where(kept, numpy.asarray(x, float) / 0.75, 0), dtype)
    gx = states.backward(None, gy, 0.25, mask)
    close(gx, numpy.where(kept, numpy.asarray(gy, float) / 0.75, 0), dtype)
    call = cudnn.fake.named("cudnnSetDropoutDescriptor")[0]
    assert call.arguments["seed"] == 2**63 + 5


def test_dropout_goes_on_when_the_ratio_changes(cudnn):
    (x,) = randoms(cudnn, "f", (200,))
    states = cudnn.cupy_cudnn.DropoutStates(None, 1)
    masks = [
        numpy.asarray(states.forward(None, x, ratio)[1]) != 0 for ratio in (0.5, 0.5, 0.2, 0.5)
    ]
    assert len(cudnn.fake.named("cudnnSetDropoutDescriptor")) == 1
    assert len(cudnn.fake.named("cudnnRestoreDropoutDescriptor")) == 3
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[3]).any()
    assert masks[2].mean() > 0.7 > masks[3].mean()


def test_dropout_is_reproducible_from_its_seed(cudnn):
    (x,) = randoms(cudnn, "f", (64,))
    first, second, other = (
        numpy.asarray(cudnn.cupy_cudnn.DropoutStates(None, seed).forward(None, x, 0.5)[1])
        for seed in (3, 3, 4)
    )
    assert (first == second).all() and (first != other).any()


def test_dropout_states_live_as_long_as_the_object(cudnn):
    import fake_cupy

    states = cudnn.cupy_cudnn.DropoutStates(None, 3)
    address = states._states.ptr
    alive, blocks = cudnn.fake.alive("Dropout"), fake_cupy.memory.blocks
    assert address in blocks
    del states
    gc.collect()
    assert cudnn.fake.alive("Dropout") == alive - 1
    assert address not in blocks

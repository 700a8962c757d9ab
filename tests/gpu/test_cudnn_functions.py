"""Every function of Chainer that uses cuDNN, on a GPU, against the CPU in float64, and repeatability.

``CHAINER_OOC_CUDNN=native`` runs the same tests on CuPy 13's own modules, the oracle for this package's.
"""

from __future__ import annotations

import contextlib

import numpy
import pytest

cupy = pytest.importorskip("cupy")

#: Relative and absolute tolerance, for sums of a few hundred products.
TOLERANCE = {"e": 2e-2, "f": 1e-4, "d": 1e-10}


def run(chainer, function, arrays, dtype, gpu, **config):
    """Return the outputs and all gradients of ``function(*arrays)``, as float64 on the host."""
    xp = cupy if gpu else numpy
    variables = [chainer.Variable(xp.asarray(a.astype(dtype))) for a in arrays]
    with contextlib.ExitStack() as stack:
        for name, value in config.items():
            stack.enter_context(chainer.using_config(name, value))
        outputs = function(*variables)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        rng = numpy.random.default_rng(1)
        for y in outputs:
            y.grad = xp.asarray(rng.uniform(-1, 1, y.shape).astype(dtype))
        chainer.backward(outputs)
    values = [y.array for y in outputs] + [v.grad for v in variables]
    return [numpy.asarray(chainer.cuda.to_cpu(v), float) for v in values]


def inputs(shapes, dtype, seed=0):
    """Return random arrays that float16 represents exactly when that is the dtype."""
    rng = numpy.random.default_rng(seed)
    return [rng.uniform(-1, 1, shape).astype(dtype).astype(float) for shape in shapes]


def check(chainer, function, shapes, dtype="f", factor=1.0, **config):
    arrays = inputs(shapes, dtype)
    actual = run(chainer, function, arrays, dtype, True, **config)
    expected = run(chainer, function, arrays, "d", False)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        bound = TOLERANCE[dtype] * factor
        scale = max(1.0, float(abs(e).max()))
        numpy.testing.assert_allclose(a / scale, e / scale, bound, bound, err_msg=f"value {k}")


CONVOLUTIONS = {
    "3x3": (dict(pad=1), (8, 16, 14, 14), (32, 16, 3, 3)),
    "strided": (dict(stride=2, pad=3), (4, 3, 32, 32), (16, 3, 7, 7)),
    "1x1": ({}, (8, 64, 7, 7), (32, 64, 1, 1)),
    "dilated": (dict(pad=2, dilate=2), (4, 8, 15, 13), (8, 8, 3, 3)),
    "grouped": (dict(pad=1, groups=4), (4, 16, 9, 9), (32, 4, 3, 3)),
    "depthwise": (dict(pad=1, groups=16), (4, 16, 9, 9), (16, 1, 3, 3)),
    "uneven": (dict(stride=(2, 1), pad=(0, 2)), (3, 5, 11, 8), (7, 5, 2, 5)),
}


@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_2d(chainer_gpu, name, bias, dtype):
    options, x, w = CONVOLUTIONS[name]
    shapes = [x, w, (w[0],)] if bias else [x, w]
    check(
        chainer_gpu, lambda *a: chainer_gpu.functions.convolution_2d(*a, **options), shapes, dtype
    )


@pytest.mark.parametrize("dtype", "efd")
def test_convolution_3d(chainer_gpu, dtype):
    shapes = [(2, 4, 6, 7, 5), (6, 4, 3, 3, 3), (6,)]
    check(
        chainer_gpu,
        lambda *a: chainer_gpu.functions.convolution_nd(*a, stride=(1, 2, 1), pad=1),
        shapes,
        dtype,
    )


@pytest.mark.parametrize("dtype", "efd")
def test_deconvolution(chainer_gpu, dtype):
    functions = chainer_gpu.functions
    shapes = [(4, 8, 6, 6), (8, 5, 4, 4), (5,)]
    check(chainer_gpu, lambda *a: functions.deconvolution_2d(*a, stride=2, pad=1), shapes, dtype)
    shapes = [(2, 4, 3, 3, 3), (4, 3, 2, 2, 2), (3,)]
    check(chainer_gpu, lambda *a: functions.deconvolution_nd(*a, stride=2), shapes, dtype)


POOLINGS = {
    "max": lambda F, x: F.max_pooling_2d(x, 3, 2, pad=1, cover_all=False),
    "max covers all": lambda F, x: F.max_pooling_2d(x, 3, 2, cover_all=True),
    "max covers all, uneven": lambda F, x: F.max_pooling_2d(x, (2, 3), (3, 2), pad=(0, 1)),
    "average": lambda F, x: F.average_pooling_2d(x, 3, 2, pad=1),
    "average of all": lambda F, x: F.average_pooling_2d(x, x.shape[2:]),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_2d(chainer_gpu, name, dtype, deterministic):
    function = POOLINGS[name]
    check(
        chainer_gpu,
        lambda x: function(chainer_gpu.functions, x),
        [(4, 6, 14, 11)],
        dtype,
        cudnn_deterministic=deterministic,
    )


@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("kind", ["max", "average 0", "average None"])
def test_pooling_3d(chainer_gpu, kind, dtype):
    functions = chainer_gpu.functions

    def function(x):
        if kind == "max":
            return functions.max_pooling_nd(x, 3, 2)
        return functions.average_pooling_nd(x, 3, 2, pad=1, pad_value=None if "None" in kind else 0)

    check(chainer_gpu, function, [(2, 3, 8, 7, 6)], dtype)


@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize(
    "name", ["relu", "sigmoid", "tanh", "clipped_relu", "softmax", "log_softmax"]
)
def test_activations(chainer_gpu, name, dtype):
    function = getattr(chainer_gpu.functions, name)
    for shape in ((16, 10), (4, 8, 7, 5)):
        check(chainer_gpu, function, [shape], dtype, use_cudnn="always")


@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(16, 8, 7, 5), (32, 24)])
def test_batch_normalization(chainer_gpu, shape, fast, dtype):
    if dtype == "e" and len(shape) == 2:
        pytest.skip("Chainer does not use cuDNN for this")
    channels = (shape[1],)
    check(
        chainer_gpu,
        lambda x, g, b: chainer_gpu.functions.batch_normalization(x, g, b),
        [shape, channels, channels],
        dtype,
        factor=5,
        cudnn_fast_batch_normalization=fast,
    )


def test_batch_normalization_in_mixed_precision(chainer_gpu):
    """float16 data with float32 parameters and running statistics, in training and in testing."""
    x, gamma, beta = inputs([(16, 8, 6, 6), (8,), (8,)], "e")
    functions = chainer_gpu.functions

    def results(xp, kind):
        mean, var = xp.zeros(8, "f"), xp.ones(8, "f")
        g, b = (xp.asarray(a.astype("f")) for a in (gamma, beta))
        data = xp.asarray(x.astype(kind))
        y = functions.batch_normalization(data, g, b, running_mean=mean, running_var=var)
        fixed = functions.fixed_batch_normalization(data, g, b, mean, var)
        return [chainer_gpu.cuda.to_cpu(a) for a in (y.array, fixed.array, mean, var)]

    actual = results(cupy, "e")
    assert [a.dtype.char for a in actual] == ["e", "e", "f", "f"]
    for a, e in zip(actual, results(numpy, "f"), strict=True):
        numpy.testing.assert_allclose(a, e, 2e-2, 2e-2)


@pytest.mark.parametrize("dtype", "fd")
def test_group_normalization(chainer_gpu, dtype):
    check(
        chainer_gpu,
        lambda x, g, b: chainer_gpu.functions.group_normalization(x, 2, g, b),
        [(4, 8, 6, 5), (8,), (8,)],
        dtype,
        factor=5,
    )


@pytest.mark.parametrize("dtype", "efd")
def test_dropout(chainer_gpu, dtype):
    functions = chainer_gpu.functions
    x = chainer_gpu.Variable(cupy.ones((64, 1000), dtype))
    y, other = functions.dropout(x, 0.3), functions.dropout(x, 0.3)
    y.grad = cupy.ones_like(y.array)
    y.backward()
    kept = y.array != 0
    assert abs(float(kept.mean()) - 0.7) < 0.01
    cupy.testing.assert_allclose(y.array[kept].astype("f"), 1 / 0.7, 1e-3)
    cupy.testing.assert_array_equal(x.grad, y.array)
    assert bool((kept != (other.array != 0)).any()), "the generator does not go on"
    assert abs(float((functions.dropout(x, 0.6).array != 0).mean()) - 0.4) < 0.01
    assert abs(float((functions.dropout(x, 0.3).array != 0).mean()) - 0.7) < 0.01


def test_spatial_transformer(chainer_gpu):
    functions = chainer_gpu.functions
    check(
        chainer_gpu,
        lambda theta: functions.spatial_transformer_grid(theta * 0.3, (6, 5)),
        [(3, 2, 3)],
    )
    check(
        chainer_gpu,
        lambda x, grid: functions.spatial_transformer_sampler(x, grid * 0.9),
        [(3, 4, 7, 8), (3, 2, 6, 5)],
    )


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru", "birnn", "bilstm", "bigru"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", "fd")
def test_recurrent_networks(chainer_gpu, monkeypatch, kind, layers, dtype):
    """The v8 calls; on cuDNN only because the variable says so."""
    monkeypatch.setenv("CHAINER_OOC_CUDNN_RNN", "1")
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind.removeprefix("bi")]
    directions, hidden, size, batches = 2 if kind.startswith("bi") else 1, 7, 5, (4, 3, 3, 1)
    states = 2 if kind.endswith("lstm") else 1
    shapes = [(layers * directions, batches[0], hidden)] * states
    for layer in range(layers * directions):
        width = size if layer < directions else hidden * directions
        shapes += [(hidden, width if k < gates else hidden) for k in range(2 * gates)]
        shapes += [(hidden,)] * (2 * gates)
    weights = len(shapes)
    shapes += [(n, size) for n in batches]
    function = getattr(chainer_gpu.functions, f"n_step_{kind}")

    def network(*arrays):
        parts = [arrays[k : k + 2 * gates] for k in range(states, weights, 2 * gates)]
        ws, bs, xs = parts[::2], parts[1::2], arrays[weights:]
        results = function(layers, 0.0, *arrays[:states], ws, bs, xs)
        return [*results[:-1], *results[-1]]

    check(chainer_gpu, network, shapes, dtype, factor=5)


def test_channels_last(chainer_gpu):
    """Convolution and batch normalization in NHWC give what they give in NCHW."""
    links, functions = chainer_gpu.links, chainer_gpu.functions
    data = inputs([(8, 16, 10, 9)], "f")[0].astype("f")

    def results(mode):
        numpy.random.seed(0)
        cupy.random.seed(0)
        with chainer_gpu.using_config("compute_mode", mode):
            conv, norm = (
                links.Convolution2D(16, 32, 3, pad=1, nobias=True),
                links.BatchNormalization(32),
            )
        net = chainer_gpu.Sequential(conv, norm, functions.relu)
        net.to_device("@cupy:0")
        net.cleargrads()
        x = chainer_gpu.Variable(cupy.asarray(data))
        layout = chainer_gpu.memory_layouts.CUDNN_CHANNEL_LAST_X if mode else None
        with chainer_gpu.using_config("compute_mode", mode):
            h = net(x.as_layout(layout)).as_layout(None)
            functions.sum(h * h).backward()
        return [h.array, x.grad, norm.gamma.grad]

    for a, e in zip(results("cudnn_fast"), results(None), strict=True):
        cupy.testing.assert_allclose(a, e, 1e-3, 1e-3)


# Repeatability, math mode, memory


def _training_step(chainer, **config):
    """Return the bits of a small network's output and gradients."""
    functions = chainer.functions
    arrays = inputs([(16, 8, 20, 20), (32, 8, 3, 3), (32,), (32,), (32,), (16, 32, 3, 3)], "f")

    def network(x, w, b, gamma, beta, w2):
        h = functions.convolution_2d(x, w, b, pad=1)
        h = functions.relu(functions.batch_normalization(h, gamma, beta))
        h = functions.max_pooling_2d(h, 3, 2)
        return functions.convolution_2d(h, w2, pad=1, stride=2)

    return [v.tobytes() for v in run(chainer, network, arrays, "f", True, **config)]


@pytest.mark.parametrize("autotune", [False, True])
def test_deterministic_mode_gives_the_same_bits(chainer_gpu, autotune):
    first = _training_step(chainer_gpu, cudnn_deterministic=True, autotune=autotune)
    for _ in range(5):
        again = _training_step(chainer_gpu, cudnn_deterministic=True, autotune=autotune)
        assert again == first


@pytest.mark.parametrize("direction", ["y", "gx", "gw"])
def test_strict_math_is_float32_and_tf32_is_not(chainer_gpu, direction):
    """Errors of long sums tell the two apart: TF32 keeps 10 bits of each factor, float32 23."""
    if not hasattr(cupy.cudnn, "set_math_mode"):
        pytest.skip("CuPy's own modules have no math mode")
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("TF32 needs compute capability 8.0")
    arrays = inputs([(8, 256, 14, 14), (256, 256, 3, 3)], "f")

    def error(mode, tensor_core="auto"):
        cupy.cudnn.set_math_mode(mode)
        values = run(
            chainer_gpu,
            lambda x, w: chainer_gpu.functions.convolution_2d(x, w, pad=1),
            arrays,
            "f",
            True,
            use_cudnn_tensor_core=tensor_core,
        )
        return values[["y", "gx", "gw"].index(direction)]

    exact = run(
        chainer_gpu,
        lambda x, w: chainer_gpu.functions.convolution_2d(x, w, pad=1),
        arrays,
        "d",
        True,
    )[["y", "gx", "gw"].index(direction)]
    scale = numpy.sqrt((exact**2).mean())

    def size(values):
        return float(numpy.sqrt(((values - exact) ** 2).mean()) / scale)

    strict, fast = size(error("fp32")), size(error("tf32"))
    assert strict < 5e-6
    assert 5e-5 < fast < 5e-3
    assert size(error("tf32", "never")) < 5e-6
    assert size(error("fp32", "always")) > 5e-5


def test_a_tiny_workspace_limit_still_works(chainer_gpu):
    before = chainer_gpu.backends.cuda.get_max_workspace_size()
    try:
        chainer_gpu.backends.cuda.set_max_workspace_size(0)
        check(
            chainer_gpu,
            lambda x, w: chainer_gpu.functions.convolution_2d(x, w, pad=1),
            [(8, 16, 14, 14), (32, 16, 3, 3)],
        )
    finally:
        chainer_gpu.backends.cuda.set_max_workspace_size(before)


@pytest.mark.filterwarnings("ignore:convolution")
def test_convolution_under_a_memory_limit(chainer_gpu):
    """With hardly more room than the arrays need, smaller workspaces serve."""
    x, w = (cupy.asarray(a.astype("f")) for a in inputs([(64, 64, 56, 56), (64, 64, 3, 3)], "f"))
    pool = cupy.get_default_memory_pool()
    y = chainer_gpu.functions.convolution_2d(x, w, pad=1).array
    expected = y.copy()
    del y
    pool.free_all_blocks()
    try:
        pool.set_limit(size=pool.used_bytes() + expected.nbytes + (4 << 20))
        y = chainer_gpu.functions.convolution_2d(x, w, pad=1).array
    finally:
        pool.set_limit(size=0)
    cupy.testing.assert_allclose(y, expected, 1e-3, 1e-3)


def test_work_follows_the_current_stream(chainer_gpu):
    """A convolution on a busy stream waits for what that stream did before."""
    functions = chainer_gpu.functions
    w = cupy.ones((8, 8, 3, 3), "f")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        big = cupy.random.uniform(size=(4096, 4096)).astype("f")
        for _ in range(20):
            big = big @ big
            big /= big.max()
        x = cupy.full((4, 8, 32, 32), 0.5, "f") + 0 * big[0, 0]
        y = functions.convolution_2d(x, w).array
    stream.synchronize()
    cupy.testing.assert_allclose(y, 36.0, 1e-5)


def test_threads_have_their_own_handles(chainer_gpu):
    from concurrent.futures import ThreadPoolExecutor

    functions = chainer_gpu.functions
    x, w = (cupy.asarray(a.astype("f")) for a in inputs([(8, 16, 32, 32), (16, 16, 3, 3)], "f"))
    expected = functions.convolution_2d(x, w).array

    def work(_):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            y = functions.convolution_2d(x, w).array
            stream.synchronize()
        return float(abs(y - expected).max())

    cupy.cuda.Device().synchronize()
    with ThreadPoolExecutor(4) as threads:
        assert max(threads.map(work, range(32))) < 1e-3


# Against another framework on the same cuDNN


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_against_torch(chainer_gpu, name):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    torch.backends.cudnn.allow_tf32 = False
    options, x_shape, w_shape = CONVOLUTIONS[name]
    arrays = inputs([x_shape, w_shape], "f")
    y, gx, gw = run(
        chainer_gpu,
        lambda x, w: chainer_gpu.functions.convolution_2d(x, w, **options),
        arrays,
        "f",
        True,
    )
    x, w = (torch.tensor(a.astype("f"), device="cuda", requires_grad=True) for a in arrays)
    other = torch.nn.functional.conv2d(
        x, w, stride=options.get("stride", 1), padding=options.get("pad", 0),
        dilation=options.get("dilate", 1), groups=options.get("groups", 1),
    )  # fmt: skip
    gradient = numpy.random.default_rng(1).uniform(-1, 1, other.shape).astype("f")
    other.backward(torch.tensor(gradient, device="cuda"))
    for a, e in ((y, other), (gx, x.grad), (gw, w.grad)):
        e = e.detach().cpu().numpy()
        scale = max(1.0, float(abs(e).max()))
        numpy.testing.assert_allclose(a / scale, e / scale, 1e-5, 1e-5)

"""Run Chainer's own GPU code on the stand-ins for CuPy and libcudnn, and compare with its CPU code.

A program of its own, because Chainer decides at import whether there is a GPU. Prints one JSON
object per case: its name, the C functions that were called, and what differed (``null`` when
nothing did).
"""

from __future__ import annotations

import contextlib
import json
import sys
import types

import fake_cupy
import numpy
from fake_cudnn import FakeCuDNN


def _cupy_for_chainer() -> None:
    """Give the stand-in for CuPy the names that Chainer imports besides those of the cuDNN
    modules."""
    cupy, cuda = sys.modules["cupy"], sys.modules["cupy.cuda"]

    def module(name: str, **names: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        made.__path__ = []
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)
        return made

    def memoize(for_each_device: bool = False):
        def decorate(function):
            known: dict[object, object] = {}

            def remember(*arguments):
                if arguments not in known:
                    known[arguments] = function(*arguments)
                return known[arguments]

            return remember

        return decorate

    module("cupy._util", PerformanceWarning=Warning, memoize=memoize, clear_memo=lambda: None)
    module("cupy.cuda.cublas")
    module("cupy.cuda.memory_hook")
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.linalg", "cupyx.scipy.special"):
        module(name)
    cuda.Event = cuda.MemoryPool = type("Unused", (), {})
    cupy.memoize, cupy.clear_memo = memoize, lambda: None
    cupy.get_default_pinned_memory_pool = lambda: None
    cupy.fuse = lambda *args, **kwargs: args[0] if args else lambda function: function
    cupy.get_array_module = lambda *arrays: (
        cupy if any(isinstance(a, fake_cupy.ndarray) for a in arrays) else numpy
    )

    def no_kernel(*_args: object, **_kwargs: object):
        def run(*_a: object, **_k: object):
            raise AssertionError("a CUDA kernel was launched where cuDNN was expected")

        return run

    cupy.ElementwiseKernel = cupy.ReductionKernel = cupy.RawKernel = no_kernel


fake_cupy.install()
_cupy_for_chainer()
fake = FakeCuDNN()

from chainer_ooc.compat import finder  # noqa: E402
from chainer_ooc.compat.cudnn import library  # noqa: E402

finder.install()
library._library = library.Library(fake, "the double")

import chainer  # noqa: E402
import chainer.functions as F  # noqa: E402
import chainer.links as L  # noqa: E402

cupy = sys.modules["cupy"]


def run(function, arrays, gpu, config):
    """Return outputs and gradients of ``function(*arrays)``."""
    xp = cupy if gpu else numpy
    variables = [None if a is None else chainer.Variable(xp.asarray(a.copy())) for a in arrays]
    with contextlib.ExitStack() as stack:
        for name, value in config.items():
            stack.enter_context(chainer.using_config(name, value))
        outputs = function(*variables)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        rng = numpy.random.default_rng(1)
        for y in outputs:
            y.grad = xp.asarray(rng.standard_normal(y.shape).astype(y.dtype))
        chainer.backward(outputs)
    values = [y.array for y in outputs] + [v.grad for v in variables if v is not None]
    return [None if v is None else numpy.array(v, copy=True) for v in values]


def compare(name, function, shapes, dtype="f", tolerance=1e-4, seed=0, **config):
    if not name.startswith(tuple(sys.argv[1:]) or ("",)):
        return
    rng = numpy.random.default_rng(seed)
    arrays = [None if s is None else rng.standard_normal(s).astype(dtype) for s in shapes]
    fake.reset()
    problem = None
    try:
        actual = run(function, arrays, True, config)
        called = sorted({call.function for call in fake.calls})
        expected = run(function, arrays, False, config)
        for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
            numpy.testing.assert_allclose(
                a, e, tolerance, tolerance, err_msg=f"value {k} of {name}"
            )
    except Exception as error:
        import traceback

        problem = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
        called = sorted({call.function for call in fake.calls})
    print(json.dumps({"case": name, "called": called, "problem": problem}))


def main() -> None:
    assert chainer.backends.cuda.cudnn_enabled, chainer.backends.cuda._resolution_error
    x, w, b = (2, 4, 7, 6), (6, 2, 3, 3), (6,)
    for dtype, tolerance in (("f", 1e-4), ("d", 1e-8), ("e", 5e-2)):
        options = {"dtype": dtype, "tolerance": tolerance}
        compare(
            f"convolution_2d {dtype}",
            lambda x, w, b: F.convolution_2d(
                x, w, b, stride=(2, 1), pad=1, dilate=(1, 2), groups=2
            ),
            [x, w, b],
            **options,
        )
        compare(f"relu {dtype}", F.relu, [x], **options)
        compare(f"softmax {dtype}", lambda x: F.softmax(x, axis=1), [x], **options)
        compare(
            f"max_pooling_2d {dtype}",
            lambda x: F.max_pooling_2d(x, 3, 2, cover_all=True),
            [x],
            **options,
        )
    compare("convolution_2d without bias", lambda x, w: F.convolution_2d(x, w, groups=2), [x, w])
    compare(
        "convolution_2d autotune",
        lambda x, w: F.convolution_2d(x, w, groups=2),
        [x, w],
        autotune=True,
    )
    compare(
        "convolution_2d deterministic", lambda x, w: F.convolution_2d(x, w, groups=2), [x, w],
        cudnn_deterministic=True,
    )  # fmt: skip
    compare(
        "convolution_nd 3d", lambda x, w, b: F.convolution_nd(x, w, b, stride=2, pad=1),
        [(2, 2, 5, 4, 3), (3, 2, 2, 2, 2), (3,)],
    )  # fmt: skip
    compare(
        "deconvolution_2d", lambda x, w, b: F.deconvolution_2d(x, w, b, stride=2, pad=1),
        [(2, 4, 3, 3), (4, 3, 3, 3), (3,)],
    )  # fmt: skip
    compare(
        "deconvolution_nd 3d", lambda x, w, b: F.deconvolution_nd(x, w, b, stride=2),
        [(2, 2, 3, 2, 2), (2, 3, 2, 2, 2), (3,)],
    )  # fmt: skip
    compare("max_pooling_2d deterministic", lambda x: F.max_pooling_2d(x, 3, 2, pad=1), [x],
            cudnn_deterministic=True)  # fmt: skip
    compare("average_pooling_2d", lambda x: F.average_pooling_2d(x, 3, 2, pad=1), [x])
    compare("max_pooling_nd", lambda x: F.max_pooling_nd(x, 2, 2), [(2, 3, 5, 4, 4)])
    for padded in (0, None):
        compare(
            f"average_pooling_nd {padded}",
            lambda x, p=padded: F.average_pooling_nd(x, 2, 2, pad=1, pad_value=p), [(2, 3, 5, 4,
            4)],
        )  # fmt: skip
    # Chainer uses cuDNN for these only when told to.
    for function in (F.sigmoid, F.tanh, F.clipped_relu):
        compare(function.__name__, function, [x], use_cudnn="always")
    compare("log_softmax", lambda x: F.log_softmax(x), [(5, 7)])
    for fast in (False, True):
        compare(
            f"batch_normalization fast={fast}", lambda x, g, b: F.batch_normalization(x, g, b),
            [x, (4,), (4,)], cudnn_fast_batch_normalization=fast,
        )  # fmt: skip
    compare("batch_normalization linear", lambda x, g, b: F.batch_normalization(x, g, b),
            [(6, 5), (5,), (5,)])  # fmt: skip
    compare(
        "batch_normalization 3d linear", lambda x, g, b: F.batch_normalization(x, g, b, axis=(0,
        1)), [(3, 4, 5), (5,), (5,)],
    )  # fmt: skip
    compare(
        "spatial_transformer_grid", lambda t: F.spatial_transformer_grid(t, (4, 5)), [(2, 2, 3)]
    )
    compare("spatial_transformer_sampler", F.spatial_transformer_sampler, [(2, 3, 5, 4), (2, 2, 4,
    5)],
            tolerance=1e-3)  # fmt: skip

    for kind, function, gates in (
        ("rnn tanh", F.n_step_rnn, 1), ("lstm", F.n_step_lstm, 4), ("gru", F.n_step_gru, 3),
        ("bi-rnn", F.n_step_birnn, 1), ("bi-lstm", F.n_step_bilstm, 4), ("bi-gru", F.n_step_bigru,
        3),
    ):  # fmt: skip
        for layers in (1, 2):
            compare(
                f"{kind} {layers} layers", *network(kind, function, gates, layers), tolerance=1e-3
            )
    if not sys.argv[1:]:
        dropout()
        channels_last()


def network(kind, function, gates, layers):
    """Return a function of all arrays of a recurrent network, and their shapes."""
    directions, hidden, size, batches = 2 if kind.startswith("bi") else 1, 3, 2, (3, 2, 1)
    lstm = "lstm" in kind
    shapes = [(layers * directions, 3, hidden)] * (2 if lstm else 1)
    states = len(shapes)
    for layer in range(layers * directions):
        inputs = size if layer < directions else hidden * directions
        shapes += [(hidden, inputs if k < gates else hidden) for k in range(2 * gates)]
        shapes += [(hidden,)] * (2 * gates)
    weights = len(shapes)
    shapes += [(n, size) for n in batches]

    def run(*arrays):
        parts = [arrays[k : k + 2 * gates] for k in range(states, weights, 2 * gates)]
        # In training mode: cuDNN has no backward otherwise.
        results = function(layers, 0.0, *arrays[:states], parts[::2], parts[1::2], arrays[weights:])
        return [*results[:-1], *results[-1]]

    return run, shapes


def dropout():
    """The mask of forward is that of backward, and another one comes next."""
    fake.reset()
    problem = None
    x = chainer.Variable(cupy.asarray(numpy.full((8, 16), 3, "f")))
    y, z = F.dropout(x, 0.25), F.dropout(x, 0.25)
    y.grad = cupy.asarray(numpy.full((8, 16), 3, "f"))
    y.backward()
    kept = numpy.asarray(y.array) != 0
    if not (numpy.asarray(x.grad) == numpy.asarray(y.array)).all():
        problem = "backward used another mask"
    elif not numpy.allclose(numpy.asarray(y.array)[kept], 4) or not 0.5 < kept.mean() < 0.95:
        problem = "values or ratio"
    elif (kept == (numpy.asarray(z.array) != 0)).all():
        problem = "the second mask is the first"
    called = sorted({call.function for call in fake.calls})
    print(json.dumps({"case": "dropout", "called": called, "problem": problem}))


def channels_last():
    """A convolution, its batch normalization and their gradients in NHWC, as ``cudnn_fast`` runs
    them."""
    rng = numpy.random.default_rng(0)
    data = rng.standard_normal((2, 4, 6, 5)).astype("f")

    def results(mode, gpu):
        numpy.random.seed(0)
        with chainer.using_config("compute_mode", mode):
            # Stock Chainer cannot sum a bias's gradient over this layout.
            net = chainer.Sequential(
                L.Convolution2D(4, 8, 3, pad=1, nobias=True), L.BatchNormalization(8), F.relu
            )
            if gpu:
                net.to_device("@cupy:0")
            x = chainer.Variable((cupy if gpu else numpy).asarray(data))
            net.cleargrads()
            layout = chainer.memory_layouts.CUDNN_CHANNEL_LAST_X if mode else None
            h = net(x.as_layout(layout)).as_layout(None)
            y = F.sum(h * h)
            y.backward()
        grads = [numpy.array(v.grad_var.as_layout(None).array) for v in (x, *net.params())]
        if mode:  # Chainer keeps the filter's gradient as the filter lies in memory
            grads[1:] = [numpy.moveaxis(g, -1, 1) if g.ndim == 4 else g for g in grads[1:]]
        return [numpy.array(y.array), *grads]

    fake.reset()
    problem = None
    try:
        for a, e in zip(results("cudnn_fast", True), results(None, False), strict=True):
            numpy.testing.assert_allclose(a, e, 1e-3, 1e-3)
        assert any(t.values.get("format") == 1 for t in fake.things.values()), "no NHWC filter"
    except Exception as error:
        import traceback

        problem = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    called = sorted({call.function for call in fake.calls})
    print(json.dumps({"case": "channels last", "called": called, "problem": problem}))


if __name__ == "__main__":
    main()

"""The table of cases over ``chainer.functions``: what is called, with which inputs, what is differentiable."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import chainer.functions as F
import numpy as np
import scipy.sparse
from chainer.utils import CooMatrix

Make = Callable[[np.random.RandomState], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a function.

    Attributes:
        name: The function's name in ``chainer.functions``, and what sets the case apart from others of it.
        call: Called with the inputs, floating point ones as variables. Returns a variable or several.
        makes: Each makes one input.
        double: Stock Chainer can differentiate it twice.
        still: Why no array comes back, if that is so.
        kept: Names of attributes whose arrays are not saved, with good reason.
    """

    name: str
    call: Callable[..., Any]
    makes: tuple[Make, ...]
    double: bool = True
    still: str = ""
    kept: tuple[str, ...] = ()

    def inputs(self) -> list[Any]:
        """Return new inputs, the same each time."""
        rng = np.random.RandomState(zlib.crc32(self.name.encode()))
        return [make(rng) for make in self.makes]


def n(*shape: int, dtype: Any = np.float32) -> Make:
    """Normal numbers."""
    return lambda rng: np.asarray(rng.standard_normal(shape), dtype)


def u(low: float, high: float, *shape: int, dtype: Any = np.float32) -> Make:
    """Uniform numbers."""
    return lambda rng: np.asarray(rng.uniform(low, high, shape), dtype)


def i(high: int, *shape: int) -> Make:
    """Integers from 0 to ``high`` - 1."""
    return lambda rng: np.asarray(rng.randint(0, high, shape), np.int32)


def c(value: Any) -> Make:
    """A constant."""
    return lambda rng: value() if callable(value) else value


def spd(size: int, batch: int = 0) -> Make:
    """Symmetric positive definite matrices."""

    def make(rng: np.random.RandomState) -> np.ndarray:
        a = rng.standard_normal((*([batch] if batch else []), size, size))
        return (a @ a.swapaxes(-1, -2) + size * np.eye(size)).astype(np.float32)

    return make


def lower(size: int) -> Make:
    return lambda rng: np.linalg.cholesky(spd(size)(rng)).astype(np.float32)


def sparse(rng: np.random.RandomState) -> CooMatrix:
    matrix = scipy.sparse.random(4, 3, 0.5, "coo", np.float32, rng)
    return CooMatrix(
        matrix.data, matrix.row.astype(np.int32), matrix.col.astype(np.int32), matrix.shape
    )


def sampler(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.randint(0, 5, shape).astype(np.int32)


NO_BACKWARD = "it has no backward"
NO_GRAPH = "it makes no node of the graph"

CASES: list[Case] = []


def case(name: str, call: Callable[..., Any], *makes: Make, **options: Any) -> None:
    CASES.append(Case(name, call, makes, **options))


def each(names: str, *makes: Make, **options: Any) -> None:
    """One case for each of several functions that take the same inputs."""
    for name in names.split():
        case(name, getattr(F, name), *makes, **options)


def batch_norm(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
        y = function(*inputs, running_mean=mean, running_var=var, **options)
        return y, mean, var

    return call


# Activations.
each(
    "clipped_relu relu6 crelu elu hard_sigmoid leaky_relu log_softmax relu rrelu selu sigmoid softmax "
    "softplus tanh",
    n(3, 4),
)
case("relu float16", F.relu, n(3, 4, dtype=np.float16))
case("relu of no element", F.relu, n(0, 4), still="there is no byte")
case("relu 0-d", F.relu, n())
case("sigmoid float64", F.sigmoid, n(3, 4, dtype=np.float64))
case("softmax axis", lambda x: F.softmax(x, axis=0), n(3, 4, 2))
case("rrelu r", lambda x: F.rrelu(x, return_r=True), n(3, 4))
case("maxout", lambda x: F.maxout(x, 2), n(3, 6))
case("prelu", F.prelu, n(3, 4), n(4))
case("swish", F.swish, n(3, 4), n(4))
case("slstm", F.slstm, n(2, 3), n(2, 3), n(2, 12), n(2, 12))
case("lstm", F.lstm, n(2, 3), n(2, 12))
case("tree_lstm", F.tree_lstm, n(2, 3), n(2, 3), n(2, 15))

# Arrays.
case("as_strided", lambda x: F.as_strided(x, (3, 2), (2, 1), 1), n(3, 4), double=False)
case("broadcast", F.broadcast, n(3, 1), n(1, 4))
case("broadcast_to", lambda x: F.broadcast_to(x, (3, 4)), n(1, 4))
case("cast", lambda x: F.cast(x, np.float64), n(3, 4))
case("concat", lambda *xs: F.concat(xs), n(3, 4), n(3, 2))
case("copy", lambda x: F.copy(x, -1), n(3, 4))
case("depth2space", lambda x: F.depth2space(x, 2), n(1, 8, 2, 3))
case("space2depth", lambda x: F.space2depth(x, 2), n(1, 2, 4, 6))
case("diagonal", lambda x: F.diagonal(x, 1), n(3, 4))
case("dstack", lambda *xs: F.dstack(xs), n(3, 4), n(3, 4))
case("expand_dims", lambda x: F.expand_dims(x, 1), n(3, 4))
case("flatten", F.flatten, n(3, 4))
case("flip", lambda x: F.flip(x, 1), n(3, 4))
each("fliplr flipud", n(3, 4))
case("get_item", lambda x: x[1:, ::2], n(3, 4))
case("get_item indexes", lambda x: F.get_item(x, ([0, 2, 0], [1, 1, 3])), n(3, 4))
case("get_item array", lambda x, t: F.get_item(x, t), n(3, 4), i(3, 5))
case("hstack", lambda *xs: F.hstack(xs), n(3, 4), n(3, 4))
case("vstack", lambda *xs: F.vstack(xs), n(3, 4), n(3, 4))
case("stack", lambda *xs: F.stack(xs, 1), n(3, 4), n(3, 4))
case("im2col", lambda x: F.im2col(x, 3, pad=1), n(1, 2, 4, 4))
case("moveaxis", lambda x: F.moveaxis(x, 0, 2), n(2, 3, 4))
case("pad", lambda x: F.pad(x, 2, "constant"), n(3, 4))
case("pad_sequence", lambda *xs: F.pad_sequence(xs), n(3, 2), n(1, 2), n(2, 2))
case("permutate", lambda x: F.permutate(x, np.array([2, 0, 1], np.int32)), n(3, 4))
case("repeat", lambda x: F.repeat(x, 2, 1), n(3, 4))
case("reshape", lambda x: F.reshape(x, (2, 6)), n(3, 4))
case("resize_images", lambda x: F.resize_images(x, (5, 3)), n(1, 2, 3, 4))
case("resize_images nearest", lambda x: F.resize_images(x, (5, 3), mode="nearest"), n(1, 2, 3, 4))
case("rollaxis", lambda x: F.rollaxis(x, 2), n(2, 3, 4))
case("scatter_add", lambda a, b: F.scatter_add(a, ([0, 1], [2, 3]), b), n(3, 4), n(2))
case("select_item", F.select_item, n(3, 4), i(4, 3))
case("separate", lambda x: F.separate(x, 1), n(3, 2))
case(
    "spatial_transformer_grid",
    lambda t: F.spatial_transformer_grid(t, (3, 4)),
    n(2, 2, 3),
    double=False,
)
case(
    "spatial_transformer_sampler",
    F.spatial_transformer_sampler,
    n(2, 3, 4, 4),
    u(-0.9, 0.9, 2, 2, 3, 3),
    double=False,
)
case("split_axis", lambda x: F.split_axis(x, 2, 1), n(3, 4))
case("split_axis indexes", lambda x: F.split_axis(x, [1, 3], 1), n(3, 4))
case("squeeze", F.squeeze, n(3, 1, 4))
case("swapaxes", lambda x: F.swapaxes(x, 0, 1), n(3, 4))
case("tile", lambda x: F.tile(x, (2, 1)), n(3, 4))
case("transpose", F.transpose, n(2, 3, 4))
case("transpose_sequence", lambda *xs: F.transpose_sequence(xs), n(3, 2), n(2, 2), n(1, 2))
case("where", lambda t, x, y: F.where(t > 0, x, y), i(2, 3, 4), n(3, 4), n(3, 4))

# Connections.
case("bilinear", F.bilinear, n(2, 3), n(2, 4), n(3, 4, 2), n(3, 2), n(4, 2), n(2))
case("convolution_1d", lambda *a: F.convolution_1d(*a, pad=1), n(2, 3, 5), n(2, 3, 3), n(2))
case("convolution_2d", lambda *a: F.convolution_2d(*a, pad=1), n(2, 3, 5, 4), n(2, 3, 3, 3), n(2))
case(
    "convolution_2d stride, dilation, groups",
    lambda *a: F.convolution_2d(*a, stride=2, pad=2, dilate=2, groups=2),
    n(2, 4, 6, 5),
    n(4, 2, 3, 3),
)
case(
    "convolution_2d float16",
    F.convolution_2d,
    n(1, 2, 4, 4, dtype=np.float16),
    n(2, 2, 3, 3, dtype=np.float16),
)
case("convolution_3d", F.convolution_3d, n(1, 2, 3, 4, 3), n(2, 2, 2, 2, 2), n(2))
case("convolution_nd", F.convolution_nd, n(1, 2, 4, 4), n(2, 2, 3, 3), n(2))
case("deconvolution_1d", F.deconvolution_1d, n(2, 3, 5), n(3, 2, 3), n(2))
case(
    "deconvolution_2d",
    lambda *a: F.deconvolution_2d(*a, stride=2, pad=1),
    n(2, 3, 4, 4),
    n(3, 2, 3, 3),
    n(2),
)
case("deconvolution_3d", F.deconvolution_3d, n(1, 2, 2, 3, 2), n(2, 2, 2, 2, 2), n(2))
case("deconvolution_nd", F.deconvolution_nd, n(1, 2, 4, 4), n(2, 2, 3, 3), n(2))
case(
    "deformable_convolution_2d_sampler",
    lambda *a: F.deformable_convolution_2d_sampler(*a, pad=1),
    n(1, 2, 4, 4),
    u(-0.4, 0.4, 1, 18, 4, 4),
    n(3, 2, 3, 3),
    n(3),
    double=False,
)
case("depthwise_convolution_2d", F.depthwise_convolution_2d, n(1, 2, 5, 5), n(2, 2, 3, 3), n(4))
case(
    "dilated_convolution_2d",
    lambda *a: F.dilated_convolution_2d(*a, dilate=2),
    n(1, 2, 6, 6),
    n(2, 2, 2, 2),
    n(2),
)
case("embed_id", F.embed_id, i(5, 2, 3), n(5, 4))
case("embed_id ignore", lambda t, w: F.embed_id(t, w, ignore_label=0), i(5, 6), n(5, 4))
case("linear", F.linear, n(3, 4), n(2, 4), n(2))
case("linear batch axes", lambda *a: F.linear(*a, n_batch_axes=2), n(2, 3, 4), n(2, 4))
case("local_convolution_2d", F.local_convolution_2d, n(2, 2, 4, 4), n(3, 2, 2, 2, 3, 3), n(3, 2, 2))
case("shift", lambda x: F.shift(x, ksize=3), n(1, 9, 4, 4))

# Evaluation.
case("accuracy", F.accuracy, n(4, 3), i(3, 4))
case("binary_accuracy", F.binary_accuracy, n(4), i(2, 4))
each("classification_summary f1_score precision recall", n(4, 3), i(3, 4))
case("r2_score", F.r2_score, n(4), n(4))

# Losses.
each("absolute_error squared_difference squared_error", n(3, 4), n(3, 4))
each("mean_absolute_error mean_squared_error", n(3, 4), n(3, 4))
case("black_out", F.black_out, n(3, 4), i(5, 3), n(5, 4), i(5, 3, 2))
case("contrastive", F.contrastive, n(4, 3), n(4, 3), i(2, 4))
case(
    "crf1d",
    lambda cost, a, b, *ts: F.crf1d(cost, [a, b], list(ts)),
    n(3, 3),
    n(3, 3),
    n(2, 3),
    i(3, 3),
    i(3, 2),
)
case("argmax_crf1d", lambda cost, a, b: F.argmax_crf1d(cost, [a, b])[0], n(3, 3), n(3, 3), n(2, 3))
case("cross_covariance", F.cross_covariance, n(4, 3), n(4, 2))
case(
    "cross_covariance no reduction",
    lambda *a: F.cross_covariance(*a, reduce="no"),
    n(4, 3),
    n(4, 2),
)
case(
    "connectionist_temporal_classification",
    lambda *a: F.connectionist_temporal_classification(a[:4], a[4], 0),
    *[n(2, 4)] * 4,
    lambda rng: rng.randint(1, 4, (2, 2)).astype(np.int32),
    double=False,
)
case("decov", F.decov, n(4, 3))
case("decov no reduction", lambda x: F.decov(x, reduce="no"), n(4, 3))
case(
    "discriminative_margin_based_clustering_loss",
    lambda x, t: F.discriminative_margin_based_clustering_loss(x, t, 0.5, 1.5, 3),
    n(3, 3, 4, 4),
    i(3, 3, 4, 4),
)
case("hinge", F.hinge, n(4, 3), i(3, 4))
case("hinge L2 no reduction", lambda *a: F.hinge(*a, norm="L2", reduce="no"), n(4, 3), i(3, 4))
case("huber_loss", lambda x, t: F.huber_loss(x, t, 1.0), n(4, 3), n(4, 3))
case(
    "negative_sampling",
    lambda x, t, w: F.negative_sampling(x, t, w, sampler, 2),
    n(3, 4),
    i(5, 3),
    n(5, 4),
)
case(
    "negative_sampling samples",
    lambda x, t, w: F.negative_sampling(x, t, w, sampler, 2, return_samples=True),
    n(3, 4),
    i(5, 3),
    n(5, 4),
)
case("sigmoid_cross_entropy", F.sigmoid_cross_entropy, n(4, 3), i(2, 4, 3))
case("softmax_cross_entropy", F.softmax_cross_entropy, n(4, 3), i(3, 4), double=False)
case(
    "softmax_cross_entropy double backprop",
    lambda x, t: F.softmax_cross_entropy(x, t, enable_double_backprop=True, reduce="no"),
    n(4, 3),
    i(3, 4),
)
case(
    "softmax_cross_entropy weights",
    lambda x, t: F.softmax_cross_entropy(
        x, t, class_weight=np.array([1, 2, 3], np.float32), ignore_label=0
    ),
    n(4, 3),
    i(3, 4),
    double=False,
)
case("triplet", F.triplet, n(4, 3), n(4, 3), n(4, 3))
case("bernoulli_nll", F.bernoulli_nll, u(0, 1, 3, 4), n(3, 4))
each("gaussian_kl_divergence", n(3, 4), n(3, 4))
case("gaussian_nll", F.gaussian_nll, n(3, 4), n(3, 4), n(3, 4))

# Mathematics.
UNARY = (
    "absolute arctan cos cosh erf erfc erfcx exp expm1 sin sinh square tan log_ndtr ndtr "
    "batch_l2_norm_squared cumsum cumprod logsumexp max min prod sum average"
)
each(UNARY, n(3, 4))
each("arccos arcsin arctanh erfinv", u(-0.9, 0.9, 3, 4))
each("erfcinv ndtri", u(0.1, 0.9, 3, 4))
each("digamma lgamma log log10 log1p log2 rsqrt sqrt", u(0.3, 2, 3, 4))
each("ceil fix floor sign", n(3, 4), still=NO_GRAPH)
each("argmax argmin", n(3, 4), still=NO_BACKWARD)
each("arctan2 fmod maximum minimum", u(0.3, 2, 3, 4), u(0.3, 2, 3, 4))
each("add identity", n(3, 4), n(3, 4))
case("add three", F.add, n(3, 4), n(3, 4), n(3, 4))
case("average weights", lambda x, w: F.average(x, 1, w), n(3, 4), u(0.3, 2, 4))
case("average axes", lambda x: F.average(x, axis=(0, 2)), n(3, 4, 2))
case("batch_det", F.batch_det, spd(3, 2))
case("det", F.det, spd(3))
case("batch_inv", F.batch_inv, spd(3, 2))
case("inv", F.inv, spd(3))
case("batch_matmul", F.batch_matmul, n(2, 3, 4), n(2, 4, 2))
case("bias", F.bias, n(3, 4), n(4))
case("scale", F.scale, n(3, 4), n(4))
case("cholesky", F.cholesky, spd(3))
case("clip", lambda x: F.clip(x, -0.5, 0.5), n(3, 4))
case("cumsum axis", lambda x: F.cumsum(x, 1), n(3, 4))
case("einsum", lambda a, b: F.einsum("ij,jk->ik", a, b), n(3, 4), n(4, 2))
case("fft", lambda *a: F.fft(a), n(3, 4), n(3, 4))
case("ifft", lambda *a: F.ifft(a), n(3, 4), n(3, 4))
case("linear_interpolate", F.linear_interpolate, n(3, 4), n(3, 4), n(3, 4))
case("matmul", F.matmul, n(3, 4), n(4, 2))
case("matmul transposed", lambda a, b: F.matmul(a, b, transa=True, transb=True), n(4, 3), n(2, 4))
case("max axis", lambda x: F.max(x, axis=1, keepdims=True), n(3, 4))
case("polygamma", F.polygamma, c(lambda: np.ones((3, 4), np.int32)), u(0.5, 2, 3, 4))
case("zeta", lambda q: F.zeta(np.full((3, 4), 2.0, np.float32), q), u(1.5, 3, 3, 4))
case("prod axis", lambda x: F.prod(x, axis=1), n(3, 4))
case("sparse_matmul", lambda a, b: F.sparse_matmul(a, b), sparse, n(3, 2))
case("sum axis", lambda x: F.sum(x, axis=1), n(3, 4))
case("sum_to", lambda x: F.sum_to(x, (1, 4)), n(3, 4))
case("tensordot", lambda a, b: F.tensordot(a, b, axes=1), n(3, 4), n(4, 2))
for operator, operate in {
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: abs(a) ** b,
    "neg": lambda a, b: -a + 2 * b - 1,
    "constants": lambda a, b: (2 / (abs(a) + 1)) ** 3 + 2 ** (b * 0.5),
    "matmul operator": lambda a, b: a @ b.T,
    "the same twice": lambda a, b: a * a + a * b,
}.items():
    case(f"operator {operator}", operate, n(3, 4), u(0.3, 2, 3, 4))
case("operator floordiv", lambda a, b: a // b, n(3, 4), u(0.3, 2, 3, 4), still=NO_BACKWARD)

# Noise.
case("dropout", F.dropout, n(3, 4))
case("dropout mask", lambda x: F.dropout(x, return_mask=True), n(3, 4))
case("gaussian", F.gaussian, n(3, 4), n(3, 4))
case("gaussian eps", lambda *a: F.gaussian(*a, return_eps=True), n(3, 4), n(3, 4))
case("gumbel_softmax", F.gumbel_softmax, n(3, 4))
case("simplified_dropconnect", F.simplified_dropconnect, n(3, 4), n(2, 4), n(2))
case(
    "simplified_dropconnect mask",
    lambda x, w, b, m: F.simplified_dropconnect(x, w, b, mask=m > 0),
    n(3, 4),
    n(2, 4),
    n(2),
    i(2, 3, 2, 4),
)
case("zoneout", F.zoneout, n(3, 4), n(3, 4))

# Normalization.
case("batch_normalization", batch_norm(F.batch_normalization), n(4, 3), n(3), n(3))
case(
    "batch_normalization images",
    batch_norm(F.batch_normalization, axis=(0, 2, 3)),
    n(2, 3, 3, 2),
    n(3),
    n(3),
)
case("batch_normalization float16", F.batch_normalization, n(4, 3, dtype=np.float16), n(3), n(3))
case(
    "fixed_batch_normalization",
    F.fixed_batch_normalization,
    n(4, 3),
    n(3),
    n(3),
    n(3),
    u(0.3, 2, 3),
)
case(
    "batch_renormalization",
    lambda x, g, b: F.batch_renormalization(
        x, g, b, 3.0, 5.0, running_mean=np.zeros(3, "f"), running_var=np.ones(3, "f")
    ),
    n(4, 3),
    n(3),
    n(3),
    double=False,
)
case(
    "fixed_batch_renormalization",
    F.fixed_batch_renormalization,
    n(4, 3),
    n(3),
    n(3),
    n(3),
    u(0.3, 2, 3),
)
case(
    "decorrelated_batch_normalization",
    lambda x: F.decorrelated_batch_normalization(x, groups=1),
    n(6, 3),
    double=False,
)
case(
    "fixed_decorrelated_batch_normalization",
    lambda *a: F.fixed_decorrelated_batch_normalization(*a, groups=1),
    n(3, 3),
    n(1, 3),
    n(1, 3, 3),
    double=False,
)
case(
    "group_normalization", lambda x, g, b: F.group_normalization(x, 2, g, b), n(2, 4, 3), n(4), n(4)
)
case("normalize", F.normalize, n(3, 4))
case("layer_normalization", F.layer_normalization, n(3, 4), n(4), n(4))
case("local_response_normalization", F.local_response_normalization, n(2, 6, 3, 3), double=False)

# Recurrent networks over sequences of different lengths.
SEQUENCES = [n(3, 2), n(2, 2), n(2, 2)]


def recurrent(
    function: Callable[..., Any], gates: int, directions: int, cell: bool, **options: Any
) -> tuple:
    """Return a call of an ``F.n_step_*`` with two layers, and what makes its inputs."""
    layers, size = 2, 3
    weights = []
    for layer in range(layers):
        for _ in range(directions):
            inputs = 2 if layer == 0 else directions * size
            weights += [n(size, inputs)] * (gates // 2) + [n(size, size)] * (gates // 2)
            weights += [n(size)] * gates
    per_layer = 2 * gates

    def call(*arrays: Any) -> list[Any]:
        states, arrays = arrays[: 1 + cell], arrays[1 + cell :]
        xs, arrays = list(arrays[:3]), arrays[3:]
        parts = [arrays[k : k + per_layer] for k in range(0, len(arrays), per_layer)]
        ws, bs = [list(p[:gates]) for p in parts], [list(p[gates:]) for p in parts]
        *states, ys = function(layers, 0.3, *states, ws, bs, xs, **options)
        return [*states, *ys]

    state = [n(layers * directions, 3, size)] * (1 + cell)
    return call, *state, *SEQUENCES, *weights


case("n_step_lstm", *recurrent(F.n_step_lstm, 8, 1, True))
case("n_step_bilstm", *recurrent(F.n_step_bilstm, 8, 2, True))
case("n_step_gru", *recurrent(F.n_step_gru, 6, 1, False))
case("n_step_bigru", *recurrent(F.n_step_bigru, 6, 2, False))
case("n_step_rnn", *recurrent(F.n_step_rnn, 2, 1, False, activation="tanh"))
case("n_step_birnn", *recurrent(F.n_step_birnn, 2, 2, False, activation="relu"))

# Pooling.
case("average_pooling_1d", lambda x: F.average_pooling_1d(x, 2), n(1, 2, 4))
case("average_pooling_2d", lambda x: F.average_pooling_2d(x, 2), n(1, 2, 4, 4))
case("average_pooling_3d", lambda x: F.average_pooling_3d(x, 2), n(1, 2, 4, 4, 2))
case(
    "average_pooling_nd", lambda x: F.average_pooling_nd(x, 2, pad=1, pad_value=None), n(1, 2, 4, 4)
)
case("max_pooling_1d", lambda x: F.max_pooling_1d(x, 2), n(1, 2, 4))
case("max_pooling_2d", lambda x: F.max_pooling_2d(x, 3, 2, 1), n(1, 2, 5, 4))
case("max_pooling_2d indices", lambda x: F.max_pooling_2d(x, 2, return_indices=True), n(1, 2, 4, 4))
case("max_pooling_3d", lambda x: F.max_pooling_3d(x, 2), n(1, 2, 4, 4, 2))
case("max_pooling_nd", lambda x: F.max_pooling_nd(x, 2, return_indices=True), n(1, 2, 4, 4))
ROIS = c(lambda: np.array([[0, 0, 3, 3], [1, 0, 3, 2]], np.float32))
ROI_INDEX = c(lambda: np.array([0, 1], np.int32))
each(
    "roi_average_pooling_2d roi_max_pooling_2d",
    n(2, 2, 4, 4),
    ROIS,
    ROI_INDEX,
    c(2),
    c(1.0),
    double=False,
)
each(
    "roi_average_align_2d roi_max_align_2d",
    n(2, 2, 4, 4),
    ROIS,
    ROI_INDEX,
    c(2),
    c(1.0),
    c(2),
    double=False,
)
case(
    "roi_pooling_2d",
    F.roi_pooling_2d,
    n(2, 2, 4, 4),
    c(lambda: np.array([[0, 0, 0, 3, 3], [1, 1, 0, 3, 2]], np.float32)),
    c(2),
    c(2),
    c(1.0),
    double=False,
)
case(
    "spatial_pyramid_pooling_2d", lambda x: F.spatial_pyramid_pooling_2d(x, 2, "max"), n(1, 2, 4, 4)
)
case("unpooling_1d", lambda x: F.unpooling_1d(x, 2), n(1, 2, 3))
case("unpooling_2d", lambda x: F.unpooling_2d(x, 2), n(1, 2, 3, 3))
case("unpooling_3d", lambda x: F.unpooling_3d(x, 2), n(1, 2, 2, 3, 2))
case("unpooling_nd", lambda x: F.unpooling_nd(x, 2), n(1, 2, 3, 3))


def upsampling(x: Any) -> Any:
    y, indices = F.max_pooling_2d(x, 2, return_indices=True)
    return F.upsampling_2d(y, indices, 2, outsize=(4, 4))


case("upsampling_2d", upsampling, n(1, 2, 4, 4))

# What recomputes.
case("forget", lambda x: F.forget(lambda h: F.sigmoid(F.tanh(h) * h), x), n(3, 4), double=False)
case(
    "forget inside",
    lambda x, w: F.relu(F.forget(lambda h, v: F.dropout(F.linear(F.tanh(h), v), 0.0), F.exp(x), w)),
    n(3, 4),
    n(2, 4),
    double=False,
)

"""Spatial transformers and recurrent networks, called as Chainer calls them."""

from __future__ import annotations

import numpy
import pytest

#: Kind of cell: cuDNN's number, gates.
CELLS = {"relu": (0, 1), "tanh": (1, 1), "lstm": (2, 4), "gru": (3, 3)}


def test_spatial_transformer(cudnn):
    xp, high, low = cudnn.cupy, cudnn.cupy_cudnn, cudnn.cupy_cuda_cudnn
    rng = numpy.random.default_rng(0)
    x, gy = (xp.asarray(rng.standard_normal(s).astype("f")) for s in ((2, 3, 5, 4), (2, 3, 5, 4)))
    identity = numpy.tile(numpy.array([[1, 0, 0], [0, 1, 0]], "f"), (2, 1, 1))
    theta = xp.asarray(identity)
    grid, y, gx, ggrid = (xp.empty(s, "f") for s in ((2, 5, 4, 2), x.shape, x.shape, (2, 5, 4, 2)))
    shape = numpy.array(y.shape, numpy.int32)
    desc = high.create_spatial_transformer_descriptor(
        low.CUDNN_SAMPLER_BILINEAR, x.dtype, 4, shape.ctypes.data
    )
    shape[...] = -1
    handle = high.get_handle()
    low.spatialTfGridGeneratorForward(handle, desc.value, theta.data.ptr, grid.data.ptr)
    images = high.create_tensor_descriptor(x)
    one, zero = numpy.array(1, "f").ctypes, numpy.array(0, "f").ctypes
    low.spatialTfSamplerForward(
        handle, desc.value, one.data, images.value, x.data.ptr, grid.data.ptr, zero.data,
        images.value, y.data.ptr,
    )  # fmt: skip
    numpy.testing.assert_allclose(y, x, 1e-5, 1e-5)  # the identity
    low.spatialTfSamplerBackward(
        handle, desc.value, one.data, images.value, x.data.ptr, zero.data, images.value,
        gx.data.ptr, one.data, images.value, gy.data.ptr, grid.data.ptr, zero.data, ggrid.data.ptr,
    )  # fmt: skip
    numpy.testing.assert_allclose(gx, gy, 1e-4, 1e-4)
    gtheta = xp.empty(theta.shape, "f")
    low.spatialTfGridGeneratorBackward(handle, desc.value, ggrid.data.ptr, gtheta.data.ptr)
    numpy.testing.assert_allclose(gtheta[..., 2], ggrid.sum(axis=(1, 2)), 1e-4, 1e-4)


def test_descriptors_need_contiguous_arrays(cudnn):
    array = cudnn.cupy.asarray(numpy.zeros((2, 3, 4, 5), "f").transpose(1, 0, 2, 3))
    for name in (
        "create_tensor_descriptor",
        "create_tensor_nd_descriptor",
        "create_filter_descriptor",
    ):
        with pytest.raises(ValueError, match="must be C-contiguous"):
            getattr(cudnn.cupy_cudnn, name)(array)


class Network:
    """A network whose weights are packed as Chainer packs them."""

    def __init__(self, cudnn, kind, layers=2, directions=1, dtype="d"):
        self.cudnn, self.dtype = cudnn, numpy.dtype(dtype)
        self.mode, self.gates = CELLS[kind]
        self.layers, self.directions, self.hidden, self.size = layers, directions, 3, 2
        self.lengths = [3, 2, 1]  # batch sizes of the steps
        rng = numpy.random.default_rng(0)
        low, high, xp = cudnn.cupy_cuda_cudnn, cudnn.cupy_cudnn, cudnn.cupy
        self.states = high.DropoutStates(None, 1)
        self.rnn = high.create_rnn_descriptor(
            self.hidden, layers, self.states._desc, low.CUDNN_LINEAR_INPUT, directions - 1,
            self.mode, high.get_data_type(self.dtype),
        )  # fmt: skip
        x_desc = high.create_tensor_nd_descriptor(xp.empty((1, self.size, 1), dtype))
        handle = high.get_handle()
        size = low.getRNNParamsSize(
            handle, self.rnn.value, x_desc.value, high.get_data_type(self.dtype)
        )
        self.w = xp.empty((size // self.dtype.itemsize, 1, 1), dtype)
        w_desc = high.create_filter_descriptor(self.w)
        self.parts = {}
        for layer in range(layers * directions):
            for k in range(2 * self.gates):
                arguments = (handle, self.rnn, layer, x_desc, w_desc, self.w, k)
                matrix = high.get_rnn_lin_layer_matrix_params(*arguments)
                bias = high.get_rnn_lin_layer_bias_params(*arguments)
                columns = self.hidden
                if k < self.gates:
                    columns = self.size if layer < directions else self.hidden * directions
                matrix = matrix.reshape(matrix.size)
                assert (matrix.size, bias.size) == (self.hidden * columns, self.hidden)
                matrix[...] = 0.5 * rng.standard_normal(matrix.size)
                bias.reshape(bias.size)[...] = rng.standard_normal(bias.size)
                self.parts[layer, k] = (matrix.reshape(self.hidden, columns), bias.ravel())
        state = (layers * directions, 3, self.hidden)
        self.xs = xp.asarray(rng.standard_normal((6, self.size)).astype(dtype))
        self.hx, cx = (xp.asarray(rng.standard_normal(state).astype(dtype)) for _ in range(2))
        self.cx = cx if kind == "lstm" else None

    def run(self, training):
        high = self.cudnn.cupy_cudnn
        function = high.rnn_forward_training if training else high.rnn_forward_inference
        return function(
            self.states,
            self.directions - 1,
            self.mode,
            self.hx,
            self.cx,
            self.w,
            self.xs,
            self.lengths,
        )


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("directions", [1, 2])
def test_weights_are_where_the_parts_say(cudnn, kind, directions):
    network = Network(cudnn, kind, directions=directions)
    assert numpy.isfinite(network.w).all(), "every element belongs to a matrix or a bias"
    total = sum(matrix.size + bias.size for matrix, bias in network.parts.values())
    assert total == network.w.size


@pytest.mark.parametrize("dtype", "fd")
def test_one_lstm_step_by_hand(cudnn, dtype):
    network = Network(cudnn, "lstm", layers=1, dtype=dtype)
    hy, cy, ys = network.run(training=False)
    p, x, h, c = network.parts, network.xs[2], network.hx[0, 2], network.cx[0, 2]
    i, f, g, o = (
        p[0, k][0] @ x + p[0, k][1] + p[0, k + 4][0] @ h + p[0, k + 4][1] for k in range(4)
    )
    i, f, o = (1 / (1 + numpy.exp(-v)) for v in (i, f, o))
    c = f * c + i * numpy.tanh(g)
    # The third sequence has one step only.
    numpy.testing.assert_allclose(cy[0, 2], c, 1e-4)
    numpy.testing.assert_allclose(hy[0, 2], o * numpy.tanh(c), 1e-4)
    numpy.testing.assert_allclose(ys[2], hy[0, 2], 1e-6)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("directions", [1, 2])
def test_backward(cudnn, kind, directions):
    network = Network(cudnn, kind, layers=1, directions=directions)
    high, xp = cudnn.cupy_cudnn, cudnn.cupy
    reserve, hy, cy, ys = network.run(training=True)
    assert (cy is None) == (kind != "lstm")
    numpy.testing.assert_array_equal(ys, network.run(training=False)[2])
    dhy, dys = xp.asarray(numpy.ones_like(hy)), xp.asarray(numpy.ones_like(ys))
    dcy = None if cy is None else xp.asarray(numpy.ones_like(cy))
    common = (network.states, directions - 1, network.mode)
    reserve2, *_ = network.run(training=True)
    dhx, dcx, dxs = high.rnn_backward_data(
        *common, network.hx, network.cx, network.w, network.xs, ys, reserve2, dhy, dcy, dys,
        network.lengths,
    )  # fmt: skip
    dw = high.rnn_backward_weights(
        *common, network.xs, network.hx, ys, network.w, reserve2, network.lengths
    )
    assert dw.shape == network.w.shape and (dcx is None) == (kind != "lstm")

    def total():
        hy, cy, ys = network.run(training=False)
        return hy.sum() + ys.sum() + (0 if cy is None else cy.sum())

    for array, gradient in ((network.xs, dxs), (network.hx, dhx), (network.w, dw)):
        flat, step = array.reshape(-1), 1e-4
        for k in (0, flat.size // 2, flat.size - 1):
            flat[k] += step
            upper = total()
            flat[k] -= 2 * step
            slope = (upper - total()) / (2 * step)
            flat[k] += step
            numpy.testing.assert_allclose(gradient.reshape(-1)[k], slope, 1e-3, 1e-6)
    assert reserve.nbytes == reserve2.nbytes == 96


def test_lengths_are_checked(cudnn):
    network = Network(cudnn, "tanh")
    network.lengths = [3, 1, 2]
    with pytest.raises(ValueError, match=r"must not increase: \[3, 1, 2\]"):
        network.run(training=False)
    network.lengths = [2, 2, 2]
    with pytest.raises(ValueError, match=r"\[2, 2, 2\] do not fit hx of shape \(2, 3, 3\)"):
        network.run(training=False)


def test_off_by_default(cudnn, monkeypatch):
    monkeypatch.delenv("CHAINER_OOC_CUDNN_RNN", raising=False)
    assert cudnn.cupy_cudnn.rnn_enabled() is False
    monkeypatch.setenv("CHAINER_OOC_CUDNN_RNN", "1")
    assert cudnn.cupy_cudnn.rnn_enabled() is True
    monkeypatch.setenv("CHAINER_OOC_CUDNN_RNN", "yes")
    with pytest.raises(ValueError, match="'yes' is not understood: use 1"):
        cudnn.cupy_cudnn.rnn_enabled()


@pytest.mark.parametrize(
    ("dtype", "mode", "tensor_core", "expected"),
    [
        ("f", "fp32", "auto", 3),
        ("f", "tf32", "auto", 0),
        ("f", "fp32", "always", 0),
        ("f", "tf32", "never", 3),
        ("d", "tf32", "always", 0),
    ],
)
def test_math_type_follows_the_configuration(cudnn, dtype, mode, tensor_core, expected):
    import chainer

    cudnn.cupy_cudnn.set_math_mode(mode)
    with chainer.using_config("use_cudnn_tensor_core", tensor_core):
        Network(cudnn, "lstm", layers=1, dtype=dtype).run(training=False)
    calls = cudnn.fake.named("cudnnSetRNNDescriptor_v8")
    assert {call.arguments["mathType"] for call in calls} == {expected}

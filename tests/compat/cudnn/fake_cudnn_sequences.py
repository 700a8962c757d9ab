"""What the stand-in for libcudnn computes for spatial transformers and recurrent networks."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy

_DTYPES = {0: numpy.float32, 1: numpy.float64, 2: numpy.float16}


def _floats(address: int, shape: Any, data_type: int) -> numpy.ndarray:
    """Return the packed array at an address."""
    import fake_cupy

    dtype = numpy.dtype(_DTYPES[data_type])
    size = int(numpy.prod(shape)) * dtype.itemsize
    fake_cupy.memory.check(address, size, f"array {shape}")
    return numpy.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + numpy.exp(-x))


class SpatialTransformer:
    def do_SetSpatialTransformerNdDescriptor(
        self, stDesc: int, samplerType: int, dataType: int, nbDims: int, dimA: int
    ) -> None:
        assert samplerType == 0 and nbDims == 4
        shape = list((ctypes.c_int * 4).from_address(dimA))
        self.get(stDesc, "SpatialTransformer").values = {"dtype": dataType, "shape": shape}

    def _coordinates(self, shape: Any) -> numpy.ndarray:
        h, w = shape[2:]
        ys, xs = numpy.meshgrid(numpy.linspace(-1, 1, h), numpy.linspace(-1, 1, w), indexing="ij")
        return numpy.stack([xs, ys, numpy.ones_like(xs)], axis=-1)

    def do_SpatialTfGridGeneratorForward(
        self, handle: int, stDesc: int, theta: int, grid: int
    ) -> None:
        st = self.get(stDesc, "SpatialTransformer")
        n, _, h, w = st.shape
        matrices = _floats(theta, (n, 2, 3), st.dtype)
        out = _floats(grid, (n, h, w, 2), st.dtype)
        out[...] = numpy.einsum("nij,hwj->nhwi", matrices, self._coordinates(st.shape))

    def do_SpatialTfGridGeneratorBackward(
        self, handle: int, stDesc: int, dgrid: int, dtheta: int
    ) -> None:
        st = self.get(stDesc, "SpatialTransformer")
        n, _, h, w = st.shape
        g = _floats(dgrid, (n, h, w, 2), st.dtype)
        out = _floats(dtheta, (n, 2, 3), st.dtype)
        out[...] = numpy.einsum("nhwi,hwj->nij", g, self._coordinates(st.shape))

    def _corners(self, image: Any, grid: Any) -> Any:
        """Yield the four neighbours of each point: rows, columns, inside, weights and their
        slopes."""
        height, width = image.shape[2:]
        u, v = (grid[..., 0] + 1) * (width - 1) / 2, (grid[..., 1] + 1) * (height - 1) / 2
        for dv, du in itertools.product((0, 1), (0, 1)):
            column, row = numpy.floor(u).astype(int) + du, numpy.floor(v).astype(int) + dv
            wu, wv = 1 - abs(u - column), 1 - abs(v - row)
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            yield (
                row.clip(0, height - 1), column.clip(0, width - 1), inside, wu, wv,
                numpy.where(du, 1, -1) * (width - 1) / 2, numpy.where(dv, 1, -1) * (height - 1) / 2,
            )  # fmt: skip

    def do_SpatialTfSamplerForward(self, **g: Any) -> None:
        st = self.get(g["stDesc"], "SpatialTransformer")
        image = self.array(g["xDesc"], g["x"]).astype(float)
        n, _, h, w = st.shape
        assert self.things[g["yDesc"]].shape == st.shape
        grid = _floats(g["grid"], (n, h, w, 2), st.dtype).astype(float)
        batch = numpy.arange(n)[:, None, None]
        value = sum(
            (image[batch, :, row, column] * (inside * wu * wv)[..., None]).transpose(0, 3, 1, 2)
            for row, column, inside, wu, wv, _, _ in self._corners(image, grid)
        )
        self.blend(g["alpha"], value, g["beta"], g["yDesc"], g["y"])

    def do_SpatialTfSamplerBackward(self, **g: Any) -> None:
        st = self.get(g["stDesc"], "SpatialTransformer")
        image = self.array(g["xDesc"], g["x"]).astype(float)
        n, _, h, w = st.shape
        grid = _floats(g["grid"], (n, h, w, 2), st.dtype).astype(float)
        gy = self.array(g["dyDesc"], g["dy"]).astype(float).transpose(0, 2, 3, 1)
        batch = numpy.arange(n)[:, None, None]
        gx, ggrid = numpy.zeros_like(image.transpose(0, 2, 3, 1)), numpy.zeros_like(grid)
        for row, column, inside, wu, wv, su, sv in self._corners(image, grid):
            numpy.add.at(gx, (batch, row, column), gy * (inside * wu * wv)[..., None])
            along = (gy * image[batch, :, row, column]).sum(axis=-1) * inside
            ggrid[..., 0] += along * wv * su
            ggrid[..., 1] += along * wu * sv
        self.blend(g["alpha"], gx.transpose(0, 3, 1, 2), g["beta"], g["dxDesc"], g["dx"])
        kind = ctypes.c_double if st.dtype == 1 else ctypes.c_float
        a, b = (kind.from_address(g[name]).value for name in ("alphaDgrid", "betaDgrid"))
        assert (a, b) == (1, 0)
        _floats(g["dgrid"], (n, h, w, 2), st.dtype)[...] = ggrid


#: Gates of each kind of cell: ReLU, tanh, LSTM, GRU.
_GATES = {0: 1, 1: 1, 2: 4, 3: 3}


def cell(mode: int, inputs: Any, recurrent: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """Return the next state and cell of one step from W x + b and R h + b', a row per gate."""
    if mode == 0:
        return numpy.maximum(inputs[0] + recurrent[0], 0), c
    if mode == 1:
        return numpy.tanh(inputs[0] + recurrent[0]), c
    if mode == 2:
        i, f, o = (_sigmoid(inputs[k] + recurrent[k]) for k in (0, 1, 3))
        c = f * c + i * numpy.tanh(inputs[2] + recurrent[2])
        return o * numpy.tanh(c), c
    r, z = (_sigmoid(inputs[k] + recurrent[k]) for k in (0, 1))
    return (1 - z) * numpy.tanh(inputs[2] + r * recurrent[2]) + z * h, c


class Recurrent:
    """Forward by the definition; backward by central differences of it, in float64."""

    def do_SetRNNDescriptor_v8(self, rnnDesc: int, dropoutDesc: int, **given: Any) -> None:
        assert self.get(dropoutDesc, "Dropout").ratio == 0, (
            "the double has no dropout between layers"
        )
        assert given["algo"] == 0 and given["biasMode"] == 2 and given["inputMode"] == 0
        assert given["projSize"] == given["hiddenSize"] and given["auxFlags"] == 0
        assert given["mathPrec"] == (1 if given["dataType"] == 1 else 0)
        self.get(rnnDesc, "RNN").values = dict(given)

    def do_SetRNNDataDescriptor(
        self, rnnDataDesc: int, dataType: int, layout: int, maxSeqLength: int, batchSize: int,
        vectorSize: int, seqLengthArray: int, paddingFill: int | None,
    ) -> None:  # fmt: skip
        lengths = list((ctypes.c_int * batchSize).from_address(seqLengthArray))
        assert layout == 1 and maxSeqLength == max(lengths)
        assert lengths == sorted(lengths, reverse=True), "packed sequences must be sorted"
        self.get(rnnDataDesc, "RNNData").values = {
            "dtype": dataType, "lengths": lengths, "size": vectorSize
        }  # fmt: skip

    def _parts(self, rnn: Any) -> list[tuple[Any, Any]]:
        """Return, per pseudo-layer and gate, where its matrix and its bias lie: (start, shape)."""
        directions, gates, hidden = rnn.dirMode + 1, _GATES[rnn.cellMode], rnn.hiddenSize
        parts, start = [], 0
        for layer in range(rnn.numLayers * directions):
            size = rnn.inputSize if layer < directions else hidden * directions
            for k in range(2 * gates):
                shape = (hidden, size if k < gates else hidden)
                parts.append([(start, shape), None])
                start += shape[0] * shape[1]
        for part in parts:  # the biases come after all matrices
            part[1] = (start, (hidden,))
            start += hidden
        return parts

    def _size(self, rnn: Any) -> int:
        start, shape = self._parts(rnn)[-1][1]
        return start + shape[0]

    def _itemsize(self, rnn: Any) -> int:
        return numpy.dtype(_DTYPES[rnn.dataType]).itemsize

    def do_GetRNNWeightSpaceSize(self, handle: int, rnnDesc: int, weightSpaceSize: int) -> None:
        rnn = self.get(rnnDesc, "RNN")
        size = self._size(rnn) * self._itemsize(rnn)
        ctypes.c_size_t.from_address(weightSpaceSize).value = size

    def do_GetRNNWeightParams(
        self, handle: int, rnnDesc: int, pseudoLayer: int, weightSpaceSize: int, weightSpace: int,
        linLayerID: int, mDesc: int, mAddr: int, bDesc: int, bAddr: int,
    ) -> None:  # fmt: skip
        rnn = self.get(rnnDesc, "RNN")
        assert weightSpaceSize == self._size(rnn) * self._itemsize(rnn)
        part = self._parts(rnn)[pseudoLayer * 2 * _GATES[rnn.cellMode] + linLayerID]
        for (start, shape), desc, address in ((part[0], mDesc, mAddr), (part[1], bDesc, bAddr)):
            dims = [1, shape[0], shape[1] if len(shape) > 1 else 1]
            self.get(desc, "Tensor").values = {
                "dtype": rnn.dataType, "shape": dims, "strides": [dims[1] * dims[2], dims[2], 1]
            }  # fmt: skip
            pointer = weightSpace + start * self._itemsize(rnn)
            ctypes.c_void_p.from_address(address).value = pointer

    def do_GetRNNTempSpaceSizes(
        self,
        handle: int,
        rnnDesc: int,
        fwdMode: int,
        xDesc: int,
        workSpaceSize: int,
        reserveSpaceSize: int,
    ) -> None:
        self.get(rnnDesc, "RNN"), self.get(xDesc, "RNNData")
        ctypes.c_size_t.from_address(workSpaceSize).value = 192
        ctypes.c_size_t.from_address(reserveSpaceSize).value = 96 if fwdMode == 1 else 0

    def _run(self, rnn: Any, weights: Any, x: Any, hx: Any, cx: Any, lengths: Any) -> Any:
        directions, gates, hidden = rnn.dirMode + 1, _GATES[rnn.cellMode], rnn.hiddenSize
        parts = self._parts(rnn)
        steps = [sum(n > t for n in lengths) for t in range(max(lengths))]
        starts = numpy.cumsum([0, *steps])
        hy, cy = hx.copy(), cx.copy()
        for layer in range(rnn.numLayers):
            out = numpy.zeros((len(x), directions * hidden))
            for direction in range(directions):
                pseudo = layer * directions + direction
                own = parts[pseudo * 2 * gates : (pseudo + 1) * 2 * gates]
                matrices = [weights[s : s + a * b].reshape(a, b) for (s, (a, b)), _ in own]
                biases = [weights[s : s + n] for _, (s, (n,)) in own]
                for item, length in enumerate(lengths):
                    h, c = hx[pseudo, item], cx[pseudo, item]
                    for t in range(length) if direction == 0 else reversed(range(length)):
                        row = starts[t] + item
                        inputs = [matrices[k] @ x[row] + biases[k] for k in range(gates)]
                        again = [matrices[k] @ h + biases[k] for k in range(gates, 2 * gates)]
                        h, c = cell(rnn.cellMode, inputs, again, h, c)
                        out[row, direction * hidden : (direction + 1) * hidden] = h
                    hy[pseudo, item], cy[pseudo, item] = h, c
            x = out
        return x, hy, cy

    def _sequence(self, desc: int, address: int) -> numpy.ndarray:
        data = self.get(desc, "RNNData")
        return _floats(address, (sum(data.lengths), data.size), data.dtype)

    def _common(self, g: dict[str, Any], weights: str = "weightSpace") -> Any:
        rnn, data = self.get(g["rnnDesc"], "RNN"), self.get(g["xDesc"], "RNNData")
        assert data.lengths == self.get(g["yDesc"], "RNNData").lengths
        on_device = (ctypes.c_int32 * len(data.lengths)).from_address(g["devSeqLengths"])
        assert list(on_device) == data.lengths, "lengths on the device"
        self.workspace(g["workSpace"], g["workSpaceSize"], 192)
        w = _floats(g[weights], (g["weightSpaceSize"] // self._itemsize(rnn),), rnn.dataType)
        assert w.size == self._size(rnn)
        shape = self.get(g["hDesc"], "Tensor").shape[:3]
        assert shape == [rnn.numLayers * (rnn.dirMode + 1), len(data.lengths), rnn.hiddenSize]

        def state(name: str) -> Any:
            return _floats(g[name], shape, rnn.dataType) if g.get(name) else None

        return rnn, data.lengths, w, state

    def do_RNNForward(self, **g: Any) -> None:
        rnn, lengths, w, state = self._common(g)
        x, hx, cx = self._sequence(g["xDesc"], g["x"]), state("hx"), state("cx")
        assert (cx is not None) == (rnn.cellMode == 2)
        given = [a.astype(float) for a in (w, x, hx, numpy.zeros_like(hx) if cx is None else cx)]
        y, hy, cy = self._run(rnn, *given, lengths)
        self._sequence(g["yDesc"], g["y"])[...] = y
        state("hy")[...] = hy
        if cx is not None:
            state("cy")[...] = cy
        if g["fwdMode"] == 1:
            self.workspace(g["reserveSpace"], g["reserveSpaceSize"], 96)
            self.kept = {g["reserveSpace"]: given}
        else:
            assert not g["reserveSpace"]

    def _slopes(self, rnn: Any, given: list[Any], lengths: Any, index: int, gys: list[Any]) -> Any:
        """Return the gradient of sum(gys * outputs) by central differences of one of the inputs."""
        varied = [a.copy() for a in given]
        result, flat = numpy.zeros_like(varied[index]), varied[index].reshape(-1)
        for k in range(flat.size):
            sums = []
            for step in (1e-5, -2e-5):
                flat[k] += step
                sums.append(
                    sum(
                        (gy * y).sum()
                        for gy, y in zip(gys, self._run(rnn, *varied, lengths), strict=True)
                    )
                )
            flat[k] += 1e-5
            result.reshape(-1)[k] = (sums[0] - sums[1]) / 2e-5
        return result

    def do_RNNBackwardData_v8(self, **g: Any) -> None:
        rnn, lengths, _, state = self._common(g)
        self.workspace(g["reserveSpace"], g["reserveSpaceSize"], 96)
        given = self.kept[g["reserveSpace"]]
        dcy = state("dcy")
        gys = [self._sequence(g["yDesc"], g["dy"]), state("dhy")]
        gys = [a.astype(float) for a in [*gys, numpy.zeros_like(gys[1]) if dcy is None else dcy]]
        self.kept_gradients = gys
        self._sequence(g["xDesc"], g["dx"])[...] = self._slopes(rnn, given, lengths, 1, gys)
        state("dhx")[...] = self._slopes(rnn, given, lengths, 2, gys)
        if dcy is not None:
            state("dcx")[...] = self._slopes(rnn, given, lengths, 3, gys)

    def do_RNNBackwardWeights_v8(self, **g: Any) -> None:
        rnn, lengths, dw, _ = self._common(g, "dweightSpace")
        assert g["addGrad"] == 0, "cuDNN can only add"
        given = self.kept[g["reserveSpace"]]
        dw += self._slopes(rnn, given, lengths, 0, self.kept_gradients).astype(dw.dtype)

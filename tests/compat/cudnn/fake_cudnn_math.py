"""What the stand-in for libcudnn computes: every operation in float64 with NumPy, for small
arrays."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy


def _windows(shape: Any, ksize: Any, stride: Any, dilation: Any) -> Any:
    """Yield each position in a kernel and the slices of the padded input that it meets."""
    for position in itertools.product(*map(range, ksize)):
        yield (
            position,
            tuple(
                slice(k * d, k * d + (out - 1) * s + 1, s)
                for k, out, s, d in zip(position, shape, stride, dilation, strict=True)
            ),
        )


def _padded(x: Any, pad: Any, value: float, extra: Any = None) -> Any:
    extra = [0] * len(pad) if extra is None else extra
    widths = [(0, 0), (0, 0)] + [(p, p + e) for p, e in zip(pad, extra, strict=True)]
    return numpy.pad(numpy.asarray(x, float), widths, constant_values=value)


def _crop(x: Any, pad: Any, shape: Any) -> Any:
    return x[
        (slice(None), slice(None), *(slice(p, p + n) for p, n in zip(pad, shape, strict=True)))
    ]


def convolve(x: Any, w: Any, out: Any, conv: Any) -> Any:
    x, g = _padded(x, conv.pad, 0), conv.groups
    n, o, c = x.shape[0], w.shape[0], w.shape[1]
    y = numpy.zeros((n, g, o // g, *out))
    for k, where in _windows(out, w.shape[2:], conv.stride, conv.dilation):
        part = x[(slice(None), slice(None), *where)].reshape(n, g, c, *out)
        taps = w[(slice(None), slice(None), *k)].astype(float).reshape(g, o // g, c)
        y += numpy.einsum("ngc...,goc->ngo...", part, taps)
    return y.reshape(n, o, *out)


def convolve_back(w: Any, gy: Any, shape: Any, conv: Any) -> Any:
    g, n, o, c = conv.groups, gy.shape[0], w.shape[0], w.shape[1]
    gx = _padded(numpy.zeros((n, c * g, *shape)), conv.pad, 0)
    out = gy.shape[2:]
    gy = gy.astype(float).reshape(n, g, o // g, *out)
    for k, where in _windows(out, w.shape[2:], conv.stride, conv.dilation):
        taps = w[(slice(None), slice(None), *k)].astype(float).reshape(g, o // g, c)
        part = numpy.einsum("ngo...,goc->ngc...", gy, taps).reshape(n, g * c, *out)
        gx[(slice(None), slice(None), *where)] += part
    return _crop(gx, conv.pad, shape)


def convolve_filter(x: Any, gy: Any, w_shape: Any, conv: Any) -> Any:
    x, g, n = _padded(x, conv.pad, 0), conv.groups, gy.shape[0]
    out, (o, c) = gy.shape[2:], w_shape[:2]
    gw = numpy.zeros(w_shape)
    gy = gy.astype(float).reshape(n, g, o // g, -1)
    for k, where in _windows(out, w_shape[2:], conv.stride, conv.dilation):
        part = x[(slice(None), slice(None), *where)].reshape(n, g, c, -1)
        taps = numpy.einsum("ngcs,ngos->goc", part, gy)
        gw[(slice(None), slice(None), *k)] = taps.reshape(o, c)
    return gw


class Mathematics:
    """The computing functions of the double."""

    # Tensors and convolution

    def do_AddTensor(
        self, handle: int, alpha: int, aDesc: int, A: int, beta: int, cDesc: int, C: int
    ) -> None:
        a = self.array(aDesc, A).astype(float)
        self.blend(alpha, numpy.broadcast_to(a, self.things[cDesc].shape), beta, cDesc, C)

    def do_ConvolutionForward(self, **g: Any) -> None:
        conv = self._convolution(g["xDesc"], g["wDesc"], g["yDesc"], g["convDesc"])
        self._ready("Forward", g["algo"], g["workSpace"], g["workSpaceSizeInBytes"])
        x, w = self.array(g["xDesc"], g["x"]), self.array(g["wDesc"], g["w"])
        y = convolve(x, w, self.things[g["yDesc"]].shape[2:], conv)
        self.blend(g["alpha"], y, g["beta"], g["yDesc"], g["y"])

    def do_ConvolutionBackwardData(self, **g: Any) -> None:
        conv = self._convolution(g["dxDesc"], g["wDesc"], g["dyDesc"], g["convDesc"])
        self._ready("BackwardData", g["algo"], g["workSpace"], g["workSpaceSizeInBytes"])
        w, gy = self.array(g["wDesc"], g["w"]), self.array(g["dyDesc"], g["dy"])
        gx = convolve_back(w, gy, self.things[g["dxDesc"]].shape[2:], conv)
        self.blend(g["alpha"], gx, g["beta"], g["dxDesc"], g["dx"])

    def do_ConvolutionBackwardFilter(self, **g: Any) -> None:
        conv = self._convolution(g["xDesc"], g["dwDesc"], g["dyDesc"], g["convDesc"])
        self._ready("BackwardFilter", g["algo"], g["workSpace"], g["workSpaceSizeInBytes"])
        x, gy = self.array(g["xDesc"], g["x"]), self.array(g["dyDesc"], g["dy"])
        gw = convolve_filter(x, gy, self.things[g["dwDesc"]].shape, conv)
        self.blend(g["alpha"], gw, g["beta"], g["dwDesc"], g["dw"])

    # Pooling

    def _pooled(self, desc: int, x_shape: Any, y_shape: Any) -> tuple[Any, Any]:
        pool = self.get(desc, "Pooling")
        formula = [
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(x_shape[2:], pool.ksize, pool.stride, pool.pad, strict=True)
        ]
        assert x_shape[:2] == y_shape[:2]
        if self.strict_pooling and list(y_shape[2:]) != formula:
            from fake_cudnn import Refused

            raise Refused(2000, f"output {y_shape}, formula {formula}")
        extra = [
            max(0, (out - 1) * s + k - n - 2 * p)
            for n, out, k, s, p in zip(
                x_shape[2:], y_shape[2:], pool.ksize, pool.stride, pool.pad, strict=True
            )
        ]
        return pool, extra

    def _counts(self, pool: Any, shape: Any, out: Any, extra: Any) -> Any:
        if pool.mode == 1:
            return numpy.prod(pool.ksize)
        ones = _padded(numpy.ones((1, 1, *shape)), pool.pad, 0, extra)
        one = [1] * len(pool.ksize)
        return sum(
            ones[(slice(None), slice(None), *where)]
            for _, where in _windows(out, pool.ksize, pool.stride, one)
        )

    def do_PoolingForward(
        self,
        handle: int,
        poolingDesc: int,
        alpha: int,
        xDesc: int,
        x: int,
        beta: int,
        yDesc: int,
        y: int,
    ) -> None:
        shape, out = self.things[xDesc].shape, self.things[yDesc].shape[2:]
        pool, extra = self._pooled(poolingDesc, shape, self.things[yDesc].shape)
        maximum = pool.mode in (0, 3)
        wide = _padded(self.array(xDesc, x), pool.pad, -numpy.inf if maximum else 0, extra)
        parts = [
            wide[(slice(None), slice(None), *where)]
            for _, where in _windows(out, pool.ksize, pool.stride, [1] * len(out))
        ]
        value = (
            numpy.max(parts, axis=0)
            if maximum
            else sum(parts) / self._counts(pool, shape[2:], out, extra)
        )
        self.blend(alpha, value, beta, yDesc, y)

    def do_PoolingBackward(
        self, handle: int, poolingDesc: int, alpha: int, yDesc: int, y: int, dyDesc: int, dy: int,
        xDesc: int, x: int, beta: int, dxDesc: int, dx: int,
    ) -> None:  # fmt: skip
        shape, out = self.things[xDesc].shape, self.things[yDesc].shape[2:]
        pool, extra = self._pooled(poolingDesc, shape, self.things[yDesc].shape)
        gy, value = self.array(dyDesc, dy).astype(float), self.array(yDesc, y).astype(float)
        wide = _padded(self.array(xDesc, x), pool.pad, -numpy.inf, extra)
        gwide = numpy.zeros_like(wide)
        free = numpy.ones(value.shape, bool)  # windows whose maximum was not met yet
        for _, where in _windows(out, pool.ksize, pool.stride, [1] * len(out)):
            index = (slice(None), slice(None), *where)
            if pool.mode in (0, 3):
                hit = free & (wide[index] == value)
                free &= ~hit
                gwide[index] += hit * gy
            else:
                gwide[index] += gy / self._counts(pool, shape[2:], out, extra)
        self.blend(alpha, _crop(gwide, pool.pad, shape[2:]), beta, dxDesc, dx)

    # Element-wise

    def do_ActivationForward(
        self,
        handle: int,
        activationDesc: int,
        alpha: int,
        xDesc: int,
        x: int,
        beta: int,
        yDesc: int,
        y: int,
    ) -> None:
        a, v = self.get(activationDesc, "Activation"), self.array(xDesc, x).astype(float)
        value = {
            0: lambda: 1 / (1 + numpy.exp(-v)),
            1: lambda: numpy.maximum(v, 0),
            2: lambda: numpy.tanh(v),
            3: lambda: numpy.clip(v, 0, a.coef),
            4: lambda: numpy.where(v > 0, v, a.coef * numpy.expm1(v)),
        }[a.mode]()
        self.blend(alpha, value, beta, yDesc, y)

    def do_ActivationBackward(
        self, handle: int, activationDesc: int, alpha: int, yDesc: int, y: int, dyDesc: int,
        dy: int, xDesc: int, x: int, beta: int, dxDesc: int, dx: int,
    ) -> None:  # fmt: skip
        a, v = self.get(activationDesc, "Activation"), self.array(xDesc, x).astype(float)
        out, g = self.array(yDesc, y).astype(float), self.array(dyDesc, dy).astype(float)
        value = {
            0: lambda: g * out * (1 - out),
            1: lambda: g * (v > 0),
            2: lambda: g * (1 - out * out),
            3: lambda: g * ((v > 0) & (v < a.coef)),
            4: lambda: g * numpy.where(v > 0, 1, out + a.coef),
        }[a.mode]()
        self.blend(alpha, value, beta, dxDesc, dx)

    def _softmax_axes(self, mode: int) -> Any:
        return (1,) if mode == 1 else (1, 2, 3)

    def do_SoftmaxForward(
        self,
        handle: int,
        algo: int,
        mode: int,
        alpha: int,
        xDesc: int,
        x: int,
        beta: int,
        yDesc: int,
        y: int,
    ) -> None:
        v, axes = self.array(xDesc, x).astype(float), self._softmax_axes(mode)
        v = v - v.max(axis=axes, keepdims=True)
        total = numpy.exp(v).sum(axis=axes, keepdims=True)
        value = v - numpy.log(total) if algo == 2 else numpy.exp(v) / total
        self.blend(alpha, value, beta, yDesc, y)

    def do_SoftmaxBackward(
        self, handle: int, algo: int, mode: int, alpha: int, yDesc: int, y: int, dyDesc: int,
        dy: int, beta: int, dxDesc: int, dx: int,
    ) -> None:  # fmt: skip
        out, g = self.array(yDesc, y).astype(float), self.array(dyDesc, dy).astype(float)
        axes = self._softmax_axes(mode)
        if algo == 2:
            value = g - numpy.exp(out) * g.sum(axis=axes, keepdims=True)
        else:
            value = out * (g - (out * g).sum(axis=axes, keepdims=True))
        self.blend(alpha, value, beta, dxDesc, dx)

    # Batch normalization

    def _statistics(self, mode: int, x: Any) -> tuple[Any, Any]:
        return ((0,) if mode == 0 else (0, *range(2, x.ndim))), x.astype(float)

    def do_BatchNormalizationForwardTraining(
        self, handle: int, mode: int, alpha: int, beta: int, xDesc: int, x: int, yDesc: int, y: int,
        bnScaleBiasMeanVarDesc: int, bnScale: int, bnBias: int, exponentialAverageFactor: float,
        resultRunningMean: int, resultRunningVariance: int, epsilon: float, resultSaveMean: int,
        resultSaveInvVariance: int,
    ) -> None:  # fmt: skip
        desc = bnScaleBiasMeanVarDesc
        axes, v = self._statistics(mode, self.array(xDesc, x))
        assert self.things[desc].dtype == (1 if self.things[xDesc].dtype == 1 else 0)
        mean, var = v.mean(axis=axes, keepdims=True), v.var(axis=axes, keepdims=True)
        assert list(mean.shape) == self.things[desc].shape, "parameters' shape"
        inv = 1 / numpy.sqrt(var + epsilon)
        value = (v - mean) * inv * self.array(desc, bnScale) + self.array(desc, bnBias)
        count = v.size // mean.size
        unbiased = var * count / max(count - 1, 1)
        for pointer, new in ((resultRunningMean, mean), (resultRunningVariance, unbiased)):
            if pointer:
                old = self.array(desc, pointer)
                old[...] = old * (1 - exponentialAverageFactor) + new * exponentialAverageFactor
        self.array(desc, resultSaveMean)[...] = mean
        self.array(desc, resultSaveInvVariance)[...] = inv
        self.blend(alpha, value, beta, yDesc, y)

    def do_GetBatchNormalizationForwardTrainingExWorkspaceSize(self, **g: Any) -> None:
        ctypes.c_size_t.from_address(g["sizeInBytes"]).value = 256

    def do_GetBatchNormalizationBackwardExWorkspaceSize(self, **g: Any) -> None:
        ctypes.c_size_t.from_address(g["sizeInBytes"]).value = 384

    def do_GetBatchNormalizationTrainingExReserveSpaceSize(self, **g: Any) -> None:
        ctypes.c_size_t.from_address(g["sizeInBytes"]).value = 64

    def do_BatchNormalizationForwardTrainingEx(self, **g: Any) -> None:
        assert g["bnOps"] == 0 and not (g["zDesc"] or g["zData"] or g["activationDesc"])
        self.workspace(g["workspace"], g["workSpaceSizeInBytes"], 256)
        self.workspace(g["reserveSpace"], g["reserveSpaceSizeInBytes"], 64)
        (ctypes.c_char * 64).from_address(g["reserveSpace"])[:] = b"R" * 64
        self.do_BatchNormalizationForwardTraining(
            g["handle"], g["mode"], g["alpha"], g["beta"], g["xDesc"], g["xData"], g["yDesc"],
            g["yData"], g["bnScaleBiasMeanVarDesc"], g["bnScale"], g["bnBias"],
            g["exponentialAverageFactor"], g["resultRunningMean"], g["resultRunningVariance"],
            g["epsilon"], g["resultSaveMean"], g["resultSaveInvVariance"],
        )  # fmt: skip

    def do_BatchNormalizationForwardInference(
        self, handle: int, mode: int, alpha: int, beta: int, xDesc: int, x: int, yDesc: int, y: int,
        bnScaleBiasMeanVarDesc: int, bnScale: int, bnBias: int, estimatedMean: int,
        estimatedVariance: int, epsilon: float,
    ) -> None:  # fmt: skip
        desc = bnScaleBiasMeanVarDesc
        scale, bias, mean, var = (
            self.array(desc, p) for p in (bnScale, bnBias, estimatedMean, estimatedVariance)
        )
        v = self.array(xDesc, x).astype(float)
        value = (v - mean) / numpy.sqrt(var + epsilon) * scale + bias
        self.blend(alpha, value, beta, yDesc, y)

    def do_BatchNormalizationBackward(
        self, handle: int, mode: int, alphaDataDiff: int, betaDataDiff: int, alphaParamDiff: int,
        betaParamDiff: int, xDesc: int, x: int, dyDesc: int, dy: int, dxDesc: int, dx: int,
        dBnScaleBiasDesc: int, bnScale: int, dBnScaleResult: int, dBnBiasResult: int,
        epsilon: float, savedMean: int, savedInvVariance: int,
    ) -> None:  # fmt: skip
        desc = dBnScaleBiasDesc
        axes, v = self._statistics(mode, self.array(xDesc, x))
        g = self.array(dyDesc, dy).astype(float)
        inv = self.array(desc, savedInvVariance).astype(float)
        normal = (v - self.array(desc, savedMean)) * inv
        gscale = (g * normal).sum(axis=axes, keepdims=True)
        gbias = g.sum(axis=axes, keepdims=True)
        count = v.size // gbias.size
        value = self.array(desc, bnScale) * inv * (g - (gbias + normal * gscale) / count)
        self.blend(alphaDataDiff, value, betaDataDiff, dxDesc, dx)
        self.blend(alphaParamDiff, gscale, betaParamDiff, desc, dBnScaleResult)
        self.blend(alphaParamDiff, gbias, betaParamDiff, desc, dBnBiasResult)

    def do_BatchNormalizationBackwardEx(self, **g: Any) -> None:
        assert g["bnOps"] == 0
        unused = ("yDesc", "yData", "dzDesc", "dzData", "bnBiasData", "activationDesc")
        assert not any(g[name] for name in unused)
        self.workspace(g["workSpace"], g["workSpaceSizeInBytes"], 384)
        self.workspace(g["reserveSpace"], g["reserveSpaceSizeInBytes"], 64)
        kept = bytes((ctypes.c_char * 64).from_address(g["reserveSpace"]))
        assert kept == b"R" * 64, "not the reserve space of the forward computation"
        self.do_BatchNormalizationBackward(
            g["handle"], g["mode"], g["alphaDataDiff"], g["betaDataDiff"], g["alphaParamDiff"],
            g["betaParamDiff"], g["xDesc"], g["xData"], g["dyDesc"], g["dyData"], g["dxDesc"],
            g["dxData"], g["dBnScaleBiasDesc"], g["bnScaleData"], g["dBnScaleData"],
            g["dBnBiasData"], g["epsilon"], g["savedMean"], g["savedInvVariance"],
        )  # fmt: skip

    # Dropout: the states are a counter and the seed, the mask is a byte per element

    def do_DropoutGetStatesSize(self, handle: int, sizeInBytes: int) -> None:
        ctypes.c_size_t.from_address(sizeInBytes).value = 16

    def do_DropoutGetReserveSpaceSize(self, xdesc: int, sizeInBytes: int) -> None:
        size = int(numpy.prod(self.get(xdesc, "Tensor").shape))
        ctypes.c_size_t.from_address(sizeInBytes).value = size

    def do_SetDropoutDescriptor(
        self,
        dropoutDesc: int,
        handle: int,
        dropout: float,
        states: int,
        stateSizeInBytes: int,
        seed: int,
    ) -> None:
        self.workspace(states, stateSizeInBytes, 16)
        (ctypes.c_uint64 * 2).from_address(states)[:] = [seed, 0]
        self.do_RestoreDropoutDescriptor(
            dropoutDesc, handle, dropout, states, stateSizeInBytes, seed
        )

    def do_RestoreDropoutDescriptor(
        self,
        dropoutDesc: int,
        handle: int,
        dropout: float,
        states: int,
        stateSizeInBytes: int,
        seed: int,
    ) -> None:
        self.workspace(states, stateSizeInBytes, 16)
        self.get(dropoutDesc, "Dropout").values = {"ratio": dropout, "states": states}

    def do_DropoutForward(
        self, handle: int, dropoutDesc: int, xdesc: int, x: int, ydesc: int, y: int,
        reserveSpace: int, reserveSpaceSizeInBytes: int,
    ) -> None:  # fmt: skip
        d, v = self.get(dropoutDesc, "Dropout"), self.array(xdesc, x)
        self.workspace(reserveSpace, reserveSpaceSizeInBytes, v.size)
        state = (ctypes.c_uint64 * 2).from_address(d.states)
        mask = numpy.random.default_rng(list(state)).random(v.shape) >= d.ratio
        state[1] += 1
        (ctypes.c_uint8 * v.size).from_address(reserveSpace)[:] = mask.ravel().astype("B").tolist()
        self.array(ydesc, y)[...] = v * mask / (1 - d.ratio)

    def do_DropoutBackward(
        self, handle: int, dropoutDesc: int, dydesc: int, dy: int, dxdesc: int, dx: int,
        reserveSpace: int, reserveSpaceSizeInBytes: int,
    ) -> None:  # fmt: skip
        d, g = self.get(dropoutDesc, "Dropout"), self.array(dydesc, dy)
        self.workspace(reserveSpace, reserveSpaceSizeInBytes, g.size)
        mask = numpy.array((ctypes.c_uint8 * g.size).from_address(reserveSpace)).reshape(g.shape)
        self.array(dxdesc, dx)[...] = g * mask / (1 - d.ratio)

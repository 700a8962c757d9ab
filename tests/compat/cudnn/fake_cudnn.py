"""A stand-in for ``libcudnn.so.9`` that is called through the C ABI, records every call and
computes with NumPy.

The functions have the parameter types that ``header_facts.json`` gives, transcribed from the
headers. What is not allowed raises inside the double; the caller gets an internal error with the
message, as from the real library.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import pathlib
from dataclasses import dataclass, field
from typing import Any

import fake_cupy
import numpy
from fake_cudnn_math import Mathematics
from fake_cudnn_sequences import Recurrent, SpatialTransformer

_FACTS = json.loads((pathlib.Path(__file__).parent / "header_facts.json").read_text())

_CTYPES = {
    "ptr": ctypes.c_void_p,
    "int": ctypes.c_int,
    "uint": ctypes.c_uint32,
    "size": ctypes.c_size_t,
    "ull": ctypes.c_ulonglong,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_DTYPES = {0: numpy.float32, 1: numpy.float64, 2: numpy.float16}


class Refused(Exception):
    """The function returns this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class AlgorithmPerformance(ctypes.Structure):
    _fields_ = (
        ("algo", ctypes.c_int),
        ("status", ctypes.c_int),
        ("time", ctypes.c_float),
        ("memory", ctypes.c_size_t),
        ("determinism", ctypes.c_int),
        ("mathType", ctypes.c_int),
        ("reserved", ctypes.c_int * 3),
    )


@dataclass
class Thing:
    """A handle or a descriptor."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AssertionError(f"{self.kind} descriptor has no {name}: not set") from None


@dataclass(frozen=True)
class Offer:
    """An algorithm that the double has for every convolution."""

    algo: int
    memory: int
    math_type: int = 3
    deterministic: bool = True
    status: int = 0
    runs: bool = True


@dataclass(frozen=True)
class Call:
    function: str
    arguments: dict[str, Any]
    stream: int | None


def ints(address: int, count: int) -> list[int]:
    return list((ctypes.c_int * count).from_address(address))


class FakeCuDNN(Mathematics, SpatialTransformer, Recurrent):
    """Attributes are what a :class:`ctypes.CDLL` would have: function pointers without types."""

    def __init__(self, version: int = 92800, cuda_version: int = 12090) -> None:
        self.version, self.cuda_version = version, cuda_version
        self.calls: list[Call] = []
        self.things: dict[int, Thing] = {}
        self.next_address = itertools.count(0x10000, 0x40)
        self.message = b""
        self.functions: dict[str, Any] = {}  # the callbacks must live as long as their addresses
        self.reset()

    def reset(self) -> None:
        """Forget calls and put the choices of behaviour back; handles and descriptors stay."""
        self.calls.clear()
        #: Per direction; best first.
        self.offers = {
            name: [Offer(1, 4096), Offer(0, 0)]
            for name in ("Forward", "BackwardData", "BackwardFilter")
        }
        self.strict_pooling = False  # whether an output that is not the formula's is refused
        self.overflow = 0

    # The C ABI

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cudnn"):
            raise AttributeError(name)
        if name not in self.functions:
            self.functions[name] = self._make(name)
        address = ctypes.cast(self.functions[name], ctypes.c_void_p).value
        # A function without types, as getattr(CDLL, name) gives.
        return ctypes.CFUNCTYPE(ctypes.c_int)(address)

    def _make(self, name: str) -> Any:
        if name in ("cudnnGetVersion", "cudnnGetCudartVersion"):
            value = self.version if name == "cudnnGetVersion" else self.cuda_version
            return ctypes.CFUNCTYPE(ctypes.c_size_t)(lambda: value)
        if name == "cudnnGetErrorString":
            text = ctypes.create_string_buffer(b"CUDNN_STATUS_OF_THE_DOUBLE")
            self.functions["text"] = text
            return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)(
                lambda _s: ctypes.addressof(text)
            )
        if name == "cudnnGetLastErrorString":
            return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)(self._last_error)
        parameters = [p.split(":") for p in _FACTS["functions"][name].split()]
        names = [parameter for parameter, _ in parameters]

        def function(*arguments: Any) -> int:
            given = dict(zip(names, arguments, strict=True))
            handle = self.things.get(given.get("handle") or 0)
            stream = handle.values.get("stream") if handle is not None else None
            self.calls.append(Call(name, given, stream))
            try:
                self._handle_in_order(name, given)
                getattr(self, "do_" + name.removeprefix("cudnn"))(**given)
            except Refused as error:
                self.message = str(error).encode()
                return error.status
            except BaseException as error:
                self.message = f"{type(error).__name__}: {error}".encode()
                return 4000
            return 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *[_CTYPES[kind] for _, kind in parameters])(function)

    def _last_error(self, buffer: int, size: int) -> None:
        text = self.message[: size - 1] + b"\0"
        ctypes.memmove(buffer, text, len(text))
        self.message = b""

    def _handle_in_order(self, name: str, given: dict[str, Any]) -> None:
        if "handle" not in given or name in ("cudnnCreate", "cudnnDestroy", "cudnnSetStream"):
            return
        handle = self.get(given["handle"], "Handle")
        assert handle.stream == fake_cupy.Stream.current.ptr, "not on CuPy's current stream"

    # What tests ask

    def named(self, function: str) -> list[Call]:
        return [call for call in self.calls if call.function == function]

    def alive(self, kind: str) -> int:
        return sum(thing.kind == kind for thing in self.things.values())

    # Memory and descriptors

    def get(self, address: int | None, kind: str) -> Thing:
        thing = self.things.get(address or 0)
        assert thing is not None, f"{kind} at {address} does not exist (any more)"
        assert thing.kind == kind, f"{kind} expected, got {thing.kind}"
        return thing

    def array(self, desc: int, pointer: int) -> numpy.ndarray:
        """Return the memory at ``pointer`` as the tensor or filter descriptor describes it."""
        thing = self.things[desc]
        dtype = numpy.dtype(_DTYPES[thing.dtype])
        last = sum((n - 1) * s for n, s in zip(thing.shape, thing.strides, strict=True))
        fake_cupy.memory.check(pointer, (last + 1) * dtype.itemsize, f"tensor {thing.shape}")
        flat = numpy.frombuffer(
            (ctypes.c_char * ((last + 1) * dtype.itemsize)).from_address(pointer), dtype
        )
        strides = [s * dtype.itemsize for s in thing.strides]
        return numpy.lib.stride_tricks.as_strided(flat, thing.shape, strides)

    def scalar(self, pointer: int, desc: int) -> float:
        kind = ctypes.c_double if self.things[desc].dtype == 1 else ctypes.c_float
        return kind.from_address(pointer).value

    def blend(self, alpha: int, value: Any, beta: int, desc: int, pointer: int) -> None:
        """Do ``out = alpha * value + beta * out``; with beta 0 what was there does not matter."""
        out = self.array(desc, pointer)
        a, b = self.scalar(alpha, desc), self.scalar(beta, desc)
        out[...] = a * value + (b * out if b else 0)

    def workspace(self, pointer: int | None, size: int, needed: int) -> None:
        assert size >= needed, f"workspace of {size} bytes, {needed} needed"
        if size:
            fake_cupy.memory.check(pointer or 0, size, "workspace")

    def _create(self, kind: str, address: int) -> None:
        value = next(self.next_address)
        self.things[value] = Thing(kind)
        ctypes.c_void_p.from_address(address).value = value

    def _destroy(self, kind: str, address: int) -> None:
        self.get(address, kind)
        del self.things[address]

    def do_Create(self, handle: int) -> None:
        self._create("Handle", handle)

    def do_Destroy(self, handle: int) -> None:
        self._destroy("Handle", handle)

    def do_SetStream(self, handle: int, streamId: int | None) -> None:
        self.get(handle, "Handle").values["stream"] = streamId or 0

    def do_QueryRuntimeError(self, handle: int, rstatus: int, mode: int, tag: int) -> None:
        ctypes.c_int.from_address(rstatus).value = self.overflow

    def do_SetTensorNdDescriptor(
        self, tensorDesc: int, dataType: int, nbDims: int, dimA: int, strideA: int
    ) -> None:
        shape, strides = ints(dimA, nbDims), ints(strideA, nbDims)
        assert nbDims >= 4, "cuDNN wants four dimensions or more"
        assert min(shape) > 0 and min(strides) > 0, (shape, strides)
        assert dataType in _DTYPES
        self.get(tensorDesc, "Tensor").values = {
            "dtype": dataType, "shape": shape, "strides": strides
        }  # fmt: skip

    def do_GetTensorNdDescriptor(
        self,
        tensorDesc: int,
        nbDimsRequested: int,
        dataType: int,
        nbDims: int,
        dimA: int,
        strideA: int,
    ) -> None:
        tensor = self.get(tensorDesc, "Tensor")
        ctypes.c_int.from_address(dataType).value = tensor.dtype
        ctypes.c_int.from_address(nbDims).value = len(tensor.shape)
        for address, values in ((dimA, tensor.shape), (strideA, tensor.strides)):
            count = min(len(values), nbDimsRequested)
            (ctypes.c_int * count).from_address(address)[:] = values[:count]

    def do_SetFilterNdDescriptor(
        self, filterDesc: int, dataType: int, format: int, nbDims: int, filterDimA: int
    ) -> None:
        shape = ints(filterDimA, nbDims)
        in_memory = shape if format == 0 else [shape[0], *shape[2:], shape[1]]
        strides = [int(numpy.prod(in_memory[axis + 1 :])) for axis in range(nbDims)]
        if format == 1:
            strides = [strides[0], strides[-1], *strides[1:-1]]
        self.get(filterDesc, "Filter").values = {
            "dtype": dataType, "shape": shape, "strides": strides, "format": format
        }  # fmt: skip

    def do_SetConvolutionNdDescriptor(
        self, convDesc: int, arrayLength: int, padA: int, filterStrideA: int, dilationA: int,
        mode: int, computeType: int,
    ) -> None:  # fmt: skip
        assert mode == 1, "cross-correlation expected"
        self.get(convDesc, "Convolution").values.update(
            pad=ints(padA, arrayLength), stride=ints(filterStrideA, arrayLength),
            dilation=ints(dilationA, arrayLength), compute=computeType,
        )  # fmt: skip

    def do_SetConvolutionGroupCount(self, convDesc: int, groupCount: int) -> None:
        self.get(convDesc, "Convolution").values["groups"] = groupCount

    def do_SetConvolutionMathType(self, convDesc: int, mathType: int) -> None:
        self.get(convDesc, "Convolution").values["math_type"] = mathType

    def do_SetPoolingNdDescriptor(
        self, poolingDesc: int, mode: int, maxpoolingNanOpt: int, nbDims: int, windowDimA: int,
        paddingA: int, strideA: int,
    ) -> None:  # fmt: skip
        self.get(poolingDesc, "Pooling").values = {
            "mode": mode, "nan": maxpoolingNanOpt, "ksize": ints(windowDimA, nbDims),
            "pad": ints(paddingA, nbDims), "stride": ints(strideA, nbDims),
        }  # fmt: skip

    def do_SetActivationDescriptor(
        self, activationDesc: int, mode: int, reluNanOpt: int, coef: float
    ) -> None:
        self.get(activationDesc, "Activation").values = {"mode": mode, "coef": coef}

    # Choosing convolution algorithms

    def _offers(
        self, direction: str, count: int, returned: int, results: int, limit: int | None
    ) -> None:
        offers = [o for o in self.offers[direction] if limit is None or o.memory <= limit][:count]
        entries = (AlgorithmPerformance * count).from_address(results)
        for entry, offer in zip(entries, offers, strict=False):
            entry.algo, entry.status, entry.time = offer.algo, offer.status, 1.0
            entry.memory, entry.mathType = offer.memory, offer.math_type
            entry.determinism = int(offer.deterministic)
        ctypes.c_int.from_address(returned).value = len(offers)

    def _offer(self, direction: str, algo: int) -> Offer:
        for offer in self.offers[direction]:
            if offer.algo == algo:
                return offer
        raise Refused(3000, f"{direction}: no algorithm {algo}")

    def _workspace_of(self, direction: str, algo: int, size: int) -> None:
        ctypes.c_size_t.from_address(size).value = self._offer(direction, algo).memory

    def _convolution(self, x: int, w: int, y: int, conv: int) -> Thing:
        """Check that the four descriptors fit each other."""
        x_, w_, y_ = (self.things[d] for d in (x, w, y))
        c = self.get(conv, "Convolution")
        assert x_.dtype == w_.dtype == y_.dtype, "dtypes differ"
        assert c.compute == (1 if x_.dtype == 1 else 0), "compute type"
        expected = [x_.shape[0], w_.shape[0]] + [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, p, s, d in zip(
                x_.shape[2:], w_.shape[2:], c.pad, c.stride, c.dilation, strict=True
            )
        ]
        assert y_.shape == expected, f"output {y_.shape}, should be {expected}"
        assert x_.shape[1] == w_.shape[1] * c.groups, "channels and groups"
        return c

    def _ready(self, direction: str, algo: int, pointer: int, size: int) -> None:
        offer = self._offer(direction, algo)
        if not offer.runs:
            raise Refused(3000, f"algorithm {algo} does not run")
        self.workspace(pointer, size, offer.memory)


def _kinds() -> None:
    """Give the double the plain functions that exist for every kind of descriptor and direction."""
    for kind in (
        "Tensor", "Filter", "Convolution", "Pooling", "Activation", "Dropout", "SpatialTransformer",
        "RNN", "RNNData",
    ):  # fmt: skip
        parameter = _FACTS["functions"][f"cudnnCreate{kind}Descriptor"].partition(":")[0]

        def create(self: FakeCuDNN, _kind: str = kind, **given: int) -> None:
            self._create(_kind, next(iter(given.values())))

        def destroy(self: FakeCuDNN, _kind: str = kind, **given: int) -> None:
            self._destroy(_kind, next(iter(given.values())))

        assert parameter
        setattr(FakeCuDNN, f"do_Create{kind}Descriptor", create)
        setattr(FakeCuDNN, f"do_Destroy{kind}Descriptor", destroy)
    for direction in ("Forward", "BackwardData", "BackwardFilter"):

        def heuristics(self: FakeCuDNN, _d: str = direction, **g: Any) -> None:
            self._offers(
                _d, g["requestedAlgoCount"], g["returnedAlgoCount"], g["perfResults"], None
            )

        def search(self: FakeCuDNN, _d: str = direction, **g: Any) -> None:
            self.workspace(g["workSpace"], g["workSpaceSizeInBytes"], 0)
            self._offers(
                _d, g["requestedAlgoCount"], g["returnedAlgoCount"], g["perfResults"],
                g["workSpaceSizeInBytes"],
            )  # fmt: skip
            # The search leaves garbage in the output.
            desc, out = list(g.values())[6:8]
            self.array(desc, out)[...] = numpy.nan

        def size(self: FakeCuDNN, _d: str = direction, **g: Any) -> None:
            self._workspace_of(_d, g["algo"], g["sizeInBytes"])

        setattr(FakeCuDNN, f"do_GetConvolution{direction}Algorithm_v7", heuristics)
        setattr(FakeCuDNN, f"do_FindConvolution{direction}AlgorithmEx", search)
        setattr(FakeCuDNN, f"do_GetConvolution{direction}WorkspaceSize", size)


_kinds()

"""Convolutions: results, descriptors, algorithm choice, workspaces, caching."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import numpy
import pytest
from fake_cudnn import Offer, Refused
from fake_cudnn_math import convolve, convolve_back, convolve_filter
from fake_cupy import OutOfMemoryError, Stream, memory

TOLERANCE = {"e": 5e-2, "f": 1e-4, "d": 1e-9}


class Case:
    """A small convolution and what it must give."""

    def __init__(self, cudnn, dtype="f", sizes=(7, 6), ksize=(3, 2), pad=(1, 0), stride=(2, 1),
                 dilation=(1, 2), groups=2, nhwc=False, seed=0):  # fmt: skip
        self.cudnn, self.nhwc, xp = cudnn, nhwc, cudnn.cupy
        rng = numpy.random.default_rng(seed)
        self.pad, self.stride, self.dilation, self.groups = pad, stride, dilation, groups
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, p, s, d in zip(sizes, ksize, pad, stride, dilation, strict=True)
        )
        x = rng.standard_normal((2, 4, *sizes)).astype(dtype)
        w = rng.standard_normal((6, 4 // groups, *ksize)).astype(dtype)
        gy = rng.standard_normal((2, 6, *out)).astype(dtype)
        self.bias, self.back_bias = (rng.standard_normal(n).astype(dtype) for n in (6, 4))
        self.y, self.gx = convolve(x, w, out, self), convolve_back(w, gy, sizes, self)
        self.gw = convolve_filter(x, gy, w.shape, self)
        self.x, self.w, self.g = (xp.asarray(self._raw(a)) for a in (x, w, gy))
        self.tolerance = TOLERANCE[dtype]

    def _raw(self, array):
        """Return the array as it lies in memory."""
        return numpy.ascontiguousarray(numpy.moveaxis(array, 1, -1)) if self.nhwc else array

    def run(self, direction="forward", bias=None, **options):
        xp, module = self.cudnn.cupy, self.cudnn.cupy_cudnn
        given = {"auto_tune": False, "tensor_core": "auto"}
        layout = {"d_layout": 1, "w_layout": 1} if self.nhwc else {}
        given |= layout | options
        parameters = (self.pad, self.stride, self.dilation, self.groups)
        b = None if bias is None else xp.asarray(bias)
        if direction == "forward":
            out = xp.empty(self._raw(self.y).shape, self.x.dtype)
            module.convolution_forward(self.x, self.w, b, out, *parameters, **given)
            return out
        given.setdefault("deterministic", False)
        if direction == "data":
            out = xp.empty(self.x.shape, self.x.dtype)
            module.convolution_backward_data(self.w, self.g, b, out, *parameters, **given)
        else:
            out = xp.empty(self.w.shape, self.x.dtype)
            module.convolution_backward_filter(self.x, self.g, out, *parameters, **given)
        return out

    def check(self, direction="forward", **options):
        expected = {"forward": self.y, "data": self.gx, "filter": self.gw}[direction]
        if "bias" in options:
            expected = expected + options["bias"].reshape(1, -1, *([1] * (expected.ndim - 2)))
        numpy.testing.assert_allclose(
            self.run(direction, **options), self._raw(expected), self.tolerance, self.tolerance
        )


DIRECTIONS = ("forward", "data", "filter")
FUNCTION = {
    "forward": "cudnnConvolutionForward",
    "data": "cudnnConvolutionBackwardData",
    "filter": "cudnnConvolutionBackwardFilter",
}
OFFERS = {"forward": "Forward", "data": "BackwardData", "filter": "BackwardFilter"}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("nhwc", [False, True])
def test_results(cudnn, direction, dtype, nhwc):
    Case(cudnn, dtype, nhwc=nhwc).check(direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_three_dimensions(cudnn, direction, groups):
    case = Case(
        cudnn, sizes=(5, 4, 6), ksize=(3, 1, 2), pad=(1, 0, 1), stride=(2, 1, 2), dilation=(1, 1,
        2), groups=groups,
    )  # fmt: skip
    case.check(direction)


@pytest.mark.parametrize("nhwc", [False, True])
def test_bias_is_added_per_channel(cudnn, nhwc):
    case = Case(cudnn, nhwc=nhwc)
    case.check("forward", bias=case.bias)
    case.check("data", bias=case.back_bias)


def test_inputs_need_not_be_contiguous(cudnn):
    case = Case(cudnn)
    case.x = cudnn.cupy.asarray(numpy.asfortranarray(case.x))
    assert not case.x.flags.c_contiguous
    case.check()


def test_output_must_be_contiguous(cudnn):
    case = Case(cudnn)
    y = cudnn.cupy.asarray(numpy.empty(case.y.shape, "f").T)
    with pytest.raises(ValueError, match=r"y must be C-contiguous"):
        cudnn.cupy_cudnn.convolution_forward(
            case.x, case.w, None, y, (1, 0), (2, 1), (1, 2), 2, auto_tune=False, tensor_core="auto"
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pad": (1, 0, 0)}, ValueError, r"pad must have 2 values .* \(1, 0, 0\)"),
        ({"tensor_core": "yes"}, ValueError, "tensor_core must be 'auto', 'always' or 'never'"),
        ({"w": "d"}, TypeError, "one dtype here, got float32 and float64"),
        ({"all": "i"}, TypeError, "not for int32"),
    ],
)
def test_bad_arguments(cudnn, change, error, message):
    case = Case(cudnn)
    case.pad = change.get("pad", case.pad)
    if "w" in change:
        case.w = case.w.astype(change["w"])
    if "all" in change:
        case.x, case.w = case.x.astype("i"), case.w.astype("i")
    with pytest.raises(error, match=message):
        case.run(**{k: v for k, v in change.items() if k == "tensor_core"})


def test_array_on_another_device(cudnn, monkeypatch):
    case = Case(cudnn)
    monkeypatch.setattr(cudnn.device, "current_device", lambda: 1)
    with pytest.raises(ValueError, match="on device 0 but the current device is 1"):
        case.run()


# Choosing


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_first_within_the_limit_runs(cudnn, direction):
    cudnn.fake.offers[OFFERS[direction]] = [Offer(2, 4 << 20), Offer(1, 512), Offer(0, 0)]
    Case(cudnn).check(direction)
    (call,) = cudnn.fake.named(FUNCTION[direction])
    assert (call.arguments["algo"], call.arguments["workSpaceSizeInBytes"]) == (1, 512)
    assert memory.allocated == [512]


def test_limit_follows_the_setting(cudnn):
    cudnn.fake.offers["Forward"] = [Offer(2, 4 << 20), Offer(1, 512)]
    case = Case(cudnn)
    case.run()
    cudnn.cupy_cudnn.set_max_workspace_size(8 << 20)
    assert cudnn.cupy_cudnn.get_max_workspace_size() == 8 << 20
    case.run()
    algos = [c.arguments["algo"] for c in cudnn.fake.named("cudnnConvolutionForward")]
    assert algos == [1, 2]


def test_smallest_runs_when_all_exceed_the_limit(cudnn):
    cudnn.fake.offers["Forward"] = [Offer(2, 8 << 20), Offer(3, 4 << 20), Offer(4, 6 << 20)]
    Case(cudnn).check()
    assert cudnn.fake.named("cudnnConvolutionForward")[0].arguments["algo"] == 3


def test_failed_and_unfit_offers_are_left_out(cudnn):
    cudnn.fake.offers["BackwardFilter"] = [
        Offer(5, 0, status=3000),
        Offer(0, 0, deterministic=False),
        Offer(3, 0, math_type=1),
        Offer(1, 64),
    ]
    Case(cudnn).check("filter", deterministic=True)
    assert cudnn.fake.named("cudnnConvolutionBackwardFilter")[0].arguments["algo"] == 1
    Case(cudnn).check("filter", deterministic=False)
    assert cudnn.fake.named("cudnnConvolutionBackwardFilter")[1].arguments["algo"] == 0


def test_algorithm_that_does_not_run_gives_way_for_good(cudnn):
    cudnn.fake.offers["Forward"] = [Offer(6, 0, runs=False), Offer(1, 64)]
    case = Case(cudnn)
    case.check()
    case.check()
    algos = [c.arguments["algo"] for c in cudnn.fake.named("cudnnConvolutionForward")]
    assert algos == [6, 1, 1]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_algorithms_that_cudnn_does_not_recommend_are_tried_last(cudnn, direction):
    """Strict float32 where all recommendations are for tensor cores, or there are none."""
    cudnn.fake.offers[OFFERS[direction]] = [Offer(2, 64, math_type=1)]
    case = Case(cudnn)
    case.check(direction)
    call = cudnn.fake.named(FUNCTION[direction])[0].arguments
    assert call["algo"] == 2
    assert cudnn.fake.things[call["convDesc"]].math_type == 3


def test_only_deterministic_ones_are_tried_in_deterministic_mode(cudnn):
    cudnn.fake.offers["BackwardFilter"] = [Offer(0, 0, deterministic=False)]
    case = Case(cudnn)
    with pytest.raises(cudnn.library.CuDNNError, match="no algorithm of cuDNN serves"):
        case.run("filter", deterministic=True)
    case.check("filter", deterministic=False)


def test_heuristics_that_refuse_leave_the_choice_to_us(cudnn, monkeypatch):
    def refuse(self, **_given):
        raise Refused(3002, "no heuristics")

    monkeypatch.setattr(type(cudnn.fake), "do_GetConvolutionForwardAlgorithm_v7", refuse)
    Case(cudnn).check()
    assert cudnn.fake.named("cudnnConvolutionForward")[0].arguments["algo"] == 1


def test_no_algorithm_is_an_error_that_names_the_shapes(cudnn):
    cudnn.fake.offers["Forward"] = []
    with pytest.raises(cudnn.library.CuDNNError, match=r"no algorithm.*x \(2, 4, 7, 6\)") as info:
        Case(cudnn).run()
    assert info.value.not_supported


def test_less_workspace_when_memory_is_short(cudnn):
    cudnn.fake.offers["Forward"] = [Offer(2, 4096), Offer(7, 8192), Offer(1, 512), Offer(0, 0)]
    memory.refuse_above = 600
    case = Case(cudnn)
    with pytest.warns(
        RuntimeWarning,
        match=r"no memory for a workspace of 4096 bytes, algorithm 1 with a workspace of 512 bytes",
    ):
        case.check()
    case.check()  # announced once
    memory.refuse_above = None
    case.check()
    algos = [c.arguments["algo"] for c in cudnn.fake.named("cudnnConvolutionForward")]
    assert algos == [1, 1, 2], (
        "7 needs more than what was refused; 2 comes back when there is memory"
    )


def test_out_of_memory_when_nothing_fits(cudnn):
    cudnn.fake.offers["Forward"] = [Offer(2, 4096), Offer(1, 512)]
    memory.refuse_above = 100
    with pytest.raises(OutOfMemoryError):
        Case(cudnn).run()
    assert cudnn.fake.named("cudnnConvolutionForward") == []


@pytest.fixture
def hungry(cudnn, monkeypatch):
    """Convolutions fail for want of memory of cuDNN's own so often as this list says, by algorithm."""
    failures = {}
    compute = type(cudnn.fake).do_ConvolutionForward

    def want(self, algo, **given):
        if failures.get(algo, 0):
            failures[algo] -= 1
            raise Refused(4004, "no memory for a kernel")
        compute(self, algo=algo, **given)

    monkeypatch.setattr(type(cudnn.fake), "do_ConvolutionForward", want)
    cudnn.fake.offers["Forward"] = [Offer(2, 512), Offer(1, 0)]
    return failures


def algorithms_run(cudnn):
    return [c.arguments["algo"] for c in cudnn.fake.named("cudnnConvolutionForward")]


def test_room_is_made_for_what_cudnn_allocates_itself(cudnn, hungry):
    """The allocator is asked for a block, so that it reclaims; what the pool has then goes to CUDA."""
    hungry[2] = 1
    cached, before = memory.freed_cache, set(memory.blocks)
    case = Case(cudnn)
    case.check()
    assert algorithms_run(cudnn) == [2, 2]
    assert memory.allocated == [512, 64 << 20]
    assert memory.freed_cache == cached + 1
    del case
    gc.collect()
    assert set(memory.blocks) <= before, "the block that made room was given back"


def test_another_algorithm_serves_when_no_room_can_be_made(cudnn, hungry):
    hungry[2] = 2
    memory.refuse_above = 1 << 20
    with pytest.warns(RuntimeWarning, match="no memory for what cuDNN allocates itself"):
        Case(cudnn).check()
    assert algorithms_run(cudnn) == [2, 2, 1]


def test_no_memory_for_cudnn_at_all_is_cupys_error(cudnn, hungry):
    hungry.update({2: 2, 1: 1})
    with pytest.raises(
        OutOfMemoryError, match=r"cudnnConvolutionForward .*\(4004\).*a kernel"
    ) as info:
        Case(cudnn).run()
    assert isinstance(info.value, cudnn.library.CuDNNError)
    assert isinstance(info.value, MemoryError)
    assert info.value.status == 4004


@pytest.mark.parametrize("short", ["workspace", "cuDNN"])
def test_an_error_holds_no_arrays(cudnn, hungry, short):
    """Else the memory that is short would come back with the next garbage collection only."""
    cudnn.fake.offers["Forward"] = [Offer(2, 512)]
    if short == "workspace":
        memory.refuse_above = 100
    else:
        hungry[2] = 2
    case = Case(cudnn)
    x = weakref.ref(case.x)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(OutOfMemoryError):
            case.run()
        del case
        assert x() is None
    finally:
        gc.enable()


# Autotune


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_autotune_searches_once_per_shape(cudnn, direction):
    case = Case(cudnn)
    for _ in range(2):
        case.check(direction, auto_tune=True)
    search = f"cudnnFindConvolution{OFFERS[direction]}AlgorithmEx"
    assert len(cudnn.fake.named(search)) == 1
    assert cudnn.fake.named(search)[0].arguments["workSpaceSizeInBytes"] == 1 << 20
    Case(cudnn, sizes=(9, 9)).check(direction, auto_tune=True)
    assert len(cudnn.fake.named(search)) == 2


def test_autotune_without_memory_uses_the_heuristics_and_tries_again(cudnn):
    case = Case(cudnn)
    memory.refuse_above = 1 << 19
    case.check(auto_tune=True)
    assert cudnn.fake.named("cudnnFindConvolutionForwardAlgorithmEx") == []
    memory.refuse_above = None
    case.check(auto_tune=True)
    assert len(cudnn.fake.named("cudnnFindConvolutionForwardAlgorithmEx")) == 1


@pytest.mark.parametrize("status", [3000, 4004])
def test_heuristics_answer_where_the_search_fails(cudnn, monkeypatch, status):
    def refuse(self, **_given):
        raise Refused(status, "no search")

    monkeypatch.setattr(type(cudnn.fake), "do_FindConvolutionForwardAlgorithmEx", refuse)
    Case(cudnn).check(auto_tune=True)
    assert algorithms_run(cudnn) == [1]


def test_deterministic_runs_do_not_search(cudnn):
    Case(cudnn).check("data", auto_tune=True, deterministic=True)
    assert cudnn.fake.named("cudnnFindConvolutionBackwardDataAlgorithmEx") == []
    assert len(cudnn.fake.named("cudnnGetConvolutionBackwardDataAlgorithm_v7")) == 1


# Math mode

MATH = {
    # (dtype, tensor_core, mode): asked for, offered and accepted, run with
    ("f", "auto", "fp32"): (3, 0, 3),
    ("f", "never", "tf32"): (3, 3, 3),
    ("f", "auto", "tf32"): (0, 1, 1),
    ("f", "always", "fp32"): (0, 0, 0),
    ("e", "auto", "fp32"): (1, 1, 1),
    ("e", "never", "fp32"): (3, 3, 3),
    ("d", "auto", "fp32"): (0, 0, 0),
}


@pytest.mark.parametrize(("given", "expected"), MATH.items())
def test_math_types(cudnn, given, expected):
    (dtype, tensor_core, mode), (asked, offered, run) = given, expected
    cudnn.cupy_cudnn.set_math_mode(mode)
    # Float32 rounded to float16 (2) and tensor cores (1) must not serve a strict request.
    refused = [Offer(7, 0, math_type=2)] if dtype == "f" else []
    refused += [Offer(6, 0, math_type=1)] if asked == 3 else []
    cudnn.fake.offers["Forward"] = [*refused, Offer(1, 0, math_type=offered)]
    Case(cudnn, dtype).check(tensor_core=tensor_core)
    search, call = cudnn.fake.calls, cudnn.fake.named("cudnnConvolutionForward")[0]
    heuristic = next(c for c in search if c.function.endswith("Algorithm_v7"))
    assert cudnn.fake.things[heuristic.arguments["convDesc"]].math_type == asked
    assert cudnn.fake.things[call.arguments["convDesc"]].math_type == run
    assert call.arguments["algo"] == 1


def test_math_mode_is_checked(cudnn):
    with pytest.raises(ValueError, match="'bf16' is not understood"):
        cudnn.cupy_cudnn.set_math_mode("bf16")
    assert cudnn.cupy_cudnn.get_math_mode() == "fp32"


def test_math_mode_of_the_environment(cudnn, monkeypatch):
    monkeypatch.delenv("CHAINER_OOC_CUDNN_MATH", raising=False)
    assert cudnn.math_mode._from_environment() == "fp32"
    monkeypatch.setenv("CHAINER_OOC_CUDNN_MATH", "tf32")
    assert cudnn.math_mode._from_environment() == "tf32"
    monkeypatch.setenv("CHAINER_OOC_CUDNN_MATH", "bf16")
    with (
        pytest.warns(RuntimeWarning, match="CHAINER_OOC_CUDNN_MATH='bf16' is not understood"),
        pytest.raises(ImportError, match="'bf16'"),
    ):
        cudnn.math_mode._from_environment()


def test_tensor_cores_take_float16_from_7_0_on(cudnn, monkeypatch):
    assert cudnn.cupy_cudnn.is_tensor_core_available(numpy.dtype("e"))
    assert not cudnn.cupy_cudnn.is_tensor_core_available(numpy.dtype("f"))
    monkeypatch.setattr(cudnn.device, "compute_capability", lambda _device: 61)
    assert not cudnn.cupy_cudnn.is_tensor_core_available(numpy.dtype("e"))


# Caching, descriptors, streams


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_second_call_asks_and_creates_nothing(cudnn, direction):
    case = Case(cudnn)
    case.run(direction)
    cudnn.fake.calls.clear()
    case.run(direction)
    assert [c.function for c in cudnn.fake.calls] == ["cudnnSetStream", FUNCTION[direction]]


def test_filter_layouts(cudnn):
    case = Case(cudnn, nhwc=True)
    case.run()
    call = cudnn.fake.named("cudnnConvolutionForward")[0].arguments
    filter_ = cudnn.fake.things[call["wDesc"]]
    assert (filter_.format, filter_.shape) == (1, [6, 2, 3, 2])
    x = cudnn.fake.things[call["xDesc"]]
    assert (x.shape, x.strides) == ([2, 4, 7, 6], [7 * 6 * 4, 1, 6 * 4, 4])


def test_runs_on_the_current_stream(cudnn):
    case = Case(cudnn)
    with Stream(0x77):
        case.check()
    case.check()
    streams = [c.stream for c in cudnn.fake.named("cudnnConvolutionForward")]
    assert streams == [0x77, 0]


def test_descriptors_die_with_their_last_user(cudnn):
    before = cudnn.fake.alive("Convolution")
    cudnn.descriptors.convolution.cache_clear()
    Case(cudnn, dilation=(1, 1), pad=(2, 2)).run()
    assert cudnn.fake.alive("Convolution") >= 1
    cudnn.descriptors.convolution.cache_clear()
    cudnn.convolution._plan.cache_clear()
    assert cudnn.fake.alive("Convolution") <= before


def test_workspace_setting_is_checked(cudnn, monkeypatch):
    with pytest.raises(ValueError, match="not -1"):
        cudnn.cupy_cudnn.set_max_workspace_size(-1)
    monkeypatch.setenv("CHAINER_OOC_CUDNN_WORKSPACE", "8M")
    with (
        pytest.warns(RuntimeWarning, match="'8M' is not understood"),
        pytest.raises(ImportError, match="'8M' is not understood"),
    ):
        cudnn.workspace._from_environment()
    monkeypatch.setenv("CHAINER_OOC_CUDNN_WORKSPACE", str(8 << 20))
    assert cudnn.workspace._from_environment() == 8 << 20


# The same again


def test_what_made_an_array_is_known_to_its_thread_until_the_next(cudnn):
    cudnn.fake.offers["Forward"] = [Offer(6, 64, deterministic=False), Offer(1, 0)]
    case, that_made = Case(cudnn), cudnn.algorithms.that_made
    y = case.run()
    assert (that_made(y).number, that_made(y).memory, that_made(y).deterministic) == (6, 64, False)
    assert that_made(y.copy()) is None
    found = []
    thread = threading.Thread(target=lambda: found.append(that_made(y)))
    thread.start()
    thread.join()
    assert found == [None]
    z = case.run()
    assert (that_made(y), that_made(z).number) == (None, 6)
    del z
    gc.collect()
    assert that_made(None) is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_cudnn_calls_deterministic_is(cudnn, direction):
    for same in (True, False):
        cudnn.convolution._plan.cache_clear()
        cudnn.fake.offers[OFFERS[direction]] = [Offer(1, 64, deterministic=same)]
        assert cudnn.algorithms.that_made(Case(cudnn).run(direction)).deterministic is same


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_cudnn_does_not_recommend_is_as_its_headers_say(cudnn, monkeypatch, direction):
    """Number 0 adds up atomically, but forward."""

    def refuse(self, **_given):
        raise Refused(3000, "no heuristics")

    name = f"do_GetConvolution{OFFERS[direction]}Algorithm_v7"
    monkeypatch.setattr(type(cudnn.fake), name, refuse)
    for number in (1, 0):
        cudnn.convolution._plan.cache_clear()
        cudnn.fake.offers[OFFERS[direction]] = [Offer(number, 0)]
        found = cudnn.algorithms.that_made(Case(cudnn).run(direction))
        assert (found.number, found.deterministic) == (
            number,
            number == 1 or direction == "forward",
        )


CHANGES = {
    "a lower limit": lambda cudnn: cudnn.cupy_cudnn.set_max_workspace_size(100),
    "other advice": lambda cudnn: (
        cudnn.convolution._plan.cache_clear(),
        cudnn.fake.offers["Forward"].reverse(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("auto_tune", [False, True])
def test_a_pinned_algorithm_runs_whatever_has_changed(cudnn, change, auto_tune):
    cudnn.fake.offers["Forward"] = [Offer(6, 4000), Offer(1, 5000), Offer(0, 0)]
    case = Case(cudnn)
    first = cudnn.algorithms.that_made(case.run(auto_tune=auto_tune))
    CHANGES[change](cudnn)
    for pinned in (True, False):
        with cudnn.algorithms.pinned(first) if pinned else contextlib.nullcontext():
            case.check(auto_tune=auto_tune)
    algos = [c.arguments["algo"] for c in cudnn.fake.named("cudnnConvolutionForward")]
    assert algos[:2] == [6, 6]
    assert algos[2] == 0


def test_without_memory_for_a_pinned_algorithm_no_other_runs(cudnn):
    cudnn.fake.offers["Forward"] = [Offer(6, 4000), Offer(0, 0)]
    case = Case(cudnn)
    first = cudnn.algorithms.that_made(case.run())
    memory.refuse_above = 100
    with cudnn.algorithms.pinned(first), pytest.raises(OutOfMemoryError):
        case.run()
    with pytest.warns(RuntimeWarning, match="no memory for a workspace"):
        case.check()
    algos = [c.arguments["algo"] for c in cudnn.fake.named("cudnnConvolutionForward")]
    assert algos == [6, 0]

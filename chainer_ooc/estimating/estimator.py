"""Estimate, before a run and without a GPU, whether a model fits, how fast it trains, and why."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any

import psutil

from chainer_ooc import wording
from chainer_ooc.estimating import calibration, devices, heap, nets, on_gpu, profiles
from chainer_ooc.estimating import inputs as inputs_module
from chainer_ooc.estimating.errors import DependsOnDataError, EstimateError
from chainer_ooc.estimating.inputs import Inputs
from chainer_ooc.estimating.result import Estimate
from chainer_ooc.estimating.search import Fits, largest
from chainer_ooc.estimating.shape_array import MASK
from chainer_ooc.estimating.step import Recording, record
from chainer_ooc.planning.plan_cache import Conditions, plan_for
from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System, Tier
from chainer_ooc.planning.timeline import Timeline
from chainer_ooc.settings import Settings, parse_limit
from chainer_ooc.tables import format_bytes

__all__ = ["bytes_again", "estimate"]

#: The note that a shape depends on the values of inputs.
VALUES = "a shape depends on values: those of the given float arrays were used"


def estimate(
    model: Any,
    inputs: Any,
    *,
    limit: int | float | str | None = None,
    device: str = "cpu",
    optimizer: Any = "momentum_sgd",
    single_backward: bool = False,
    recompute: str = "auto",
    search: bool = True,
) -> Estimate:
    """Estimate a training step of a model: memory, traffic, time, and the largest sizes that fit.

    The model's own code runs, forward, backward and update, with arrays that have shapes but no elements.
    So no data, no memory for arrays and no GPU are needed, and functions keep and NumPy allocates the same
    sizes as in a real step. Times come from a quick calibration of this machine (``device="cpu"``) or from
    the data sheet of a GPU.

    Args:
        model: A :class:`chainer.Link` that takes the inputs and returns its loss, or the name of a network
            (``"resnet50"``, ``"file.py:callable"``). It is left as it is, uninitialized parameters
            included.
        inputs: ``(insize, batchsize)`` for images (batchsize, 3, insize, insize), float32, and labels
            (batchsize,), int32; or the model's arguments: arrays, ``(shape, dtype)`` pairs, lists of them.
            Of float arrays only the shape counts; integers keep their values.
        limit: As in :func:`chainer_ooc.enable`. ``None``: the memory that the device has.
        device: ``"cpu"``, or a GPU's name such as ``"h200"`` or ``"v100"``.
        optimizer: The name of one of ``chainer.optimizers`` (``"momentum_sgd"``, ``"adam"``), its class, or
            ``None``: no update.
        single_backward: As in :func:`chainer_ooc.enable`.
        recompute: As in :func:`chainer_ooc.enable`.
        search: Search for the largest batchsize and insize that fit. It takes a few times longer.

    Returns:
        The estimate; print it.

    Raises:
        EstimateError: If the device, the network or the optimizer is unknown, the network does not accept
            the insize, the limit is below the floor, a function has no rule, or, for a GPU, the environment's
            limit of cuDNN's workspace is not understood.
        SettingError: If the limit, ``single_backward`` or ``recompute`` is not allowed.
    """
    gpu = devices.find(device)
    how = Settings.resolve({"single_backward": single_backward, "recompute": recompute}, Settings())
    settings = (gpu, limit, optimizer, how)
    given = inputs_module.parse(inputs)
    if isinstance(model, str):
        net = nets.find(model)
        if given.insize is None or given.batchsize is None:
            raise EstimateError(
                f"inputs={inputs!r} is not allowed for {model}; give (insize, batchsize)"
            )
        net.check(given.insize)
        asked = (given.insize, given.batchsize)
        _, given = net.build(*asked)
        return _Estimator(net, *settings, asked=asked).run(given, search)
    import chainer

    if not isinstance(model, chainer.Link):
        raise EstimateError(
            f"model is of type {type(model).__name__}; give a chainer.Link, or the name of a network: "
            f"{', '.join(nets.names())}"
        )
    net = nets.Net(type(model).__name__, "given", lambda *_: (model, given), lambda insize: None)
    return _Estimator(net, *settings, model=model).run(given, search)


@dataclasses.dataclass(frozen=True)
class _Point:
    """The step of one batch size and insize."""

    recording: Recording
    recorded: Profile  # as the engine records it, and plans from it
    profile: Profile  # without the graph of the step before
    in_core_bytes: int


class _Estimator:
    def __init__(
        self,
        net: nets.Net,
        gpu: devices.Gpu | None,
        limit: Any,
        optimizer: Any,
        settings: Settings,
        model: Any = None,
        asked: tuple[int, int] = (0, 0),
    ) -> None:
        self.net = net
        self.gpu = gpu
        self.model = model
        self.asked = asked
        self.optimizer = _optimizer(optimizer)
        self.optimizer_name = (
            optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", optimizer)
        )
        self.settings = settings
        self.process_bytes = 0 if gpu else _process_bytes(model)
        self.limit = self._limit(limit)
        if gpu is None:
            rates = calibration.calibrate()
            self.cost = profiles.on_cpu(rates)
            out, back = calibration.disk_rates()
            self.tier = Tier("disk", out, back, one_queue=True)
        else:
            on_gpu.workspace_limit()  # raises before anything runs
            self.cost = profiles.on_gpu_seconds(gpu)
            link = gpu.link * devices.LINK_SHARE
            self.tier = Tier("host", link, link, None, 20e-6)

    def _limit(self, limit: Any) -> int:
        parsed = parse_limit(limit)
        if self.gpu is not None:
            total = self.gpu.memory_bytes
            if parsed is None:
                return total
            return int(parsed * total) if isinstance(parsed, float) else parsed
        from chainer_ooc.swap.system import memory

        if parsed is None:
            return memory.attainable_bytes(0.05)
        return int(parsed * memory.physical_bytes()) if isinstance(parsed, float) else parsed

    def point(self, given: Inputs, batchsize: int | None, insize: int | None) -> _Point:
        """Run a step without data."""
        model, inputs = self.model, given
        if model is None:
            # A network with its own inputs may ignore these sizes: they are scaled below.
            model, inputs = self.net.build(insize or self.asked[0], batchsize or self.asked[1])
        recording = self._record(model, inputs, batchsize, insize)
        device = self.gpu.name if self.gpu else "cpu"
        recorded = profiles.make_profile(recording, self.cost, self.net.name, device)
        profile = profiles.without_left_over(recorded, recording)
        if self.gpu is None:
            in_core = self.process_bytes + heap.resident_peak(recording.ledger.events)
        else:
            in_core = profile.in_core_bytes
        return _Point(recording, recorded, profile, in_core)

    def _record(
        self, model: Any, inputs: Inputs, batchsize: int | None, insize: int | None
    ) -> Recording:
        def recorded(values: bool) -> Recording:
            make = inputs.make(batchsize, insize, values)
            return record(model, make, self.optimizer, self.gpu is not None, self.process_bytes)

        try:
            try:
                found = recorded(False)
                depends = any(note.endswith(MASK) for note in found.notes)
            except DependsOnDataError:
                if not inputs.has_values:
                    raise
                depends = True
            if depends and inputs.has_values:
                found = recorded(True)
                found.notes.append(VALUES)
            return found
        except EstimateError:
            raise
        except Exception as error:  # the model's own code may raise anything
            size = f" with insize={insize}, batchsize={batchsize}" if insize else ""
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise EstimateError(
                f"{self.net.name} does not run on these inputs{size}: {said}; give an insize that it takes, or the "
                "arguments that it is called with"
            ) from error

    def run(self, given: Inputs, search: bool) -> Estimate:
        """Make the estimate."""
        point = self.point(given, given.batchsize, given.insize)
        profile = point.profile
        in_core = point.in_core_bytes <= self.limit
        floor = profile.floor_bytes
        if not in_core and floor > self.limit:
            raise EstimateError(self._below_floor(profile))
        system = System(self.limit, (self.tier,), self.settings.single_backward)
        timeline = plan = planned = None
        if not in_core:
            timeline = simulate(profile, system, OnDemand(), detailed=True)
            now = Conditions(system, self.settings.recompute != "never")
            plan = plan_for(point.recorded, now)
            planned = simulate(point.recorded, system, Planned(plan))
        seconds = timeline.seconds if timeline else profile.compute_seconds
        found = self._search(given, point) if search else {}
        return Estimate(
            name=self.net.name,
            device=self.gpu.name if self.gpu else "cpu",
            batchsize=given.batchsize,
            insize=given.insize,
            limit_bytes=self.limit,
            peak_in_core_bytes=point.in_core_bytes,
            peak_bytes=timeline.peak_bytes if timeline else point.in_core_bytes,
            floor_bytes=min(floor, point.in_core_bytes),
            floor_function=_floor_step(profile),
            process_bytes=self.process_bytes,
            parameter_bytes=point.recording.parameter_bytes,
            state_bytes=point.recording.state_bytes,
            saved_bytes=profile.saved_bytes,
            bytes_out=timeline.bytes_out if timeline else 0,
            bytes_in=timeline.bytes_in if timeline else 0,
            swap_bytes=_room_outside(timeline, profile) if timeline else 0,
            in_core_step_seconds=profile.compute_seconds,
            step_seconds=seconds,
            planned_step_seconds=min(plan.seconds, seconds) if plan else seconds,
            planned_bytes_out=planned.bytes_out if planned else 0,
            planned_bytes_in=planned.bytes_in if planned else 0,
            planned_bytes_again=bytes_again(profile, planned) if planned else 0,
            bound_step_seconds=min(plan.bound_seconds, seconds) if plan else seconds,
            stall_out_seconds=timeline.wait_out_seconds if timeline else 0.0,
            stall_in_seconds=timeline.wait_in_seconds if timeline else 0.0,
            flops=_flops(point.recording),
            bottleneck=self._bottleneck(profile, timeline),
            largest=found,
            functions=_functions(profile),
            assumed=tuple(self._assumed(point)),
        )

    def _below_floor(self, profile: Profile) -> str:
        number = _floor_number(profile)
        step = profile.steps[number]
        pinned = profile.pinned(number)
        return (
            f"limit={format_bytes(self.limit)} is below the {format_bytes(profile.floor_bytes)} that a step of "
            f"{self.net.name} takes at the least: {_floor_step(profile)} needs {format_bytes(pinned)} of what it "
            f"saved, {format_bytes(step.workspace_bytes)} for itself and what it makes, beside "
            f"{format_bytes(step.held_bytes)} that live then (gradients, outputs) and "
            f"{format_bytes(profile.fixed_bytes)} that always live (parameters, optimizer state, inputs"
            f"{', the process' if self.process_bytes else ''}); give a higher limit, or a smaller batch or insize"
        )

    def _bottleneck(self, profile: Profile, timeline: Timeline | None) -> str:
        if timeline is None or timeline.seconds <= 1.02 * profile.compute_seconds:
            by_label: dict[str, float] = {}
            for step in profile.steps:
                by_label[step.label] = by_label.get(step.label, 0.0) + step.seconds
            label = max(by_label, key=by_label.__getitem__)
            share = by_label[label] / max(profile.compute_seconds, 1e-12)
            return f"computation: {label} takes {share:.0%} of it; copies hide behind it"
        waits = {"out": timeline.wait_out_seconds, "in": timeline.wait_in_seconds}
        worst = max(waits, key=waits.__getitem__)
        rate = self.tier.out_bandwidth if worst == "out" else self.tier.in_bandwidth
        where = (
            "the swap file's disk" if self.gpu is None else f"{self.gpu.link_name} to host memory"
        )
        return (
            f"copies {worst}: {where} at {rate / 1e9:.3g} GB/s; computing waits {sum(waits.values()):.3g} s of "
            f"{timeline.seconds:.3g} s"
        )

    def _search(self, given: Inputs, point: _Point) -> dict[str, dict[str, int | None]]:
        found: dict[str, dict[str, int | None]] = {}
        here = Fits(point.in_core_bytes, point.profile.floor_bytes)

        def fits(batchsize: int | None, insize: int | None) -> Fits | None:
            size = f"batchsize {batchsize}" + (f", insize {insize}" if insize else "")
            wording.logger.info("looking for the largest sizes that fit: %s", size)
            try:
                if insize is not None:
                    self.net.check(insize)
                other = self.point(given, batchsize, insize)
            except EstimateError:
                return None
            return Fits(other.in_core_bytes, other.profile.floor_bytes)

        if given.batchsize:
            found["batchsize"] = largest(
                lambda n: fits(n, given.insize), given.batchsize, here, self.limit, 1, power=1
            )
        if given.insize:
            multiple = self.net.multiple if self.net.multiple > 1 else 32
            found["insize"] = largest(
                lambda n: fits(given.batchsize, n),
                given.insize,
                here,
                self.limit,
                multiple,
                power=2,
            )
        return found

    def _assumed(self, point: _Point) -> list[str]:
        recording = point.recording
        name = self.optimizer_name or "none"
        lines = [
            f"optimizer {name}; training mode; the second iteration (later ones are alike)",
            "moves, step and bottleneck: on demand, as in the first iteration; by a plan: as from the third one on, "
            f"with recompute={self.settings.recompute!r}",
        ]
        if not self.settings.single_backward:
            lines.append("copies are kept for a second backward; single_backward=True moves less")
        if self.gpu is None:
            out, back = self.tier.out_bandwidth / 1e9, self.tier.in_bandwidth / 1e9
            lines.append(
                f"this machine, measured now on as many threads as NumPy uses: swap file {out:.2g} GB/s out, "
                f"{back:.2g} GB/s in; under other load times are longer"
            )
            lines.append(
                f"the process itself takes {format_bytes(self.process_bytes)}, measured here; malloc is glibc's"
            )
        else:
            gpu = self.gpu
            lines.append(
                f"{gpu.name}: {gpu.flops / 1e12:.3g} TFLOP/s float32, {gpu.bandwidth / 1e9:.4g} GB/s, {gpu.link_name} "
                f"{gpu.link / 1e9:.3g} GB/s each way ({gpu.source}); of them {devices.COMPUTE_SHARE:.0%}, "
                f"{devices.MEMORY_SHARE:.0%} and {devices.LINK_SHARE:.0%} are reached; not measured"
            )
            lines.append(
                f"cuDNN: {format_bytes(on_gpu.workspace_limit())} of workspace for a convolution, the most that it "
                "may take; poolings keep input and output; fragments of the memory pool and CUDA's own memory are "
                "not counted"
            )
        return [*lines, *recording.notes]


def _optimizer(given: Any) -> Callable[[], Any] | None:
    from chainer import optimizers

    if given is None or given == "none":
        return None
    known = {
        _plain(name): cls
        for name, cls in vars(optimizers).items()
        if inspect.isclass(cls) and name[0].isupper()
    }
    if isinstance(given, str):
        cls = known.get(_plain(given))
        if cls is None:
            near = difflib.get_close_matches(_plain(given), known, 1)
            hint = f" (did you mean {known[near[0]].__name__!r}?)" if near else ""
            raise EstimateError(
                f"optimizer={given!r} is not known{hint}; choose one of none, "
                f"{', '.join(sorted(c.__name__ for c in known.values()))}"
            )
        return cls
    if callable(given):
        return given
    return type(given)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _process_bytes(model: Any) -> int:
    """Return the memory of this process besides the model's arrays. The training process will take as much."""
    arrays = 0
    if model is not None:
        arrays = sum(
            a.nbytes for p in model.params() for a in (p.array, p.__dict__.get("_grad")) if a is not None
        )  # fmt: skip
    return max(psutil.Process().memory_info().rss - arrays, 64 << 20)


def _flops(recording: Recording) -> float:
    return sum(
        segment.flops
        + sum(2.0 * m * n * k * count for (m, n, k, _), count in segment.gemms.items())
        for segment in recording.segments
    )


def _floor_number(profile: Profile) -> int:
    steps = profile.steps
    return max(
        range(len(steps)),
        key=lambda n: profile.pinned(n) + steps[n].held_bytes + steps[n].workspace_bytes,
    )


def _floor_step(profile: Profile) -> str:
    number = _floor_number(profile)
    step = profile.steps[number]
    shapes = step.inputs
    if not shapes and step.function >= 0:
        shapes = profile.steps[step.function].inputs
    sizes = ", ".join(text.split("@")[0] for text in shapes[:3])
    return f"{step.label} {step.phase} ({sizes})" if sizes else f"{step.label} ({step.phase})"


def _functions(profile: Profile, most: int = 8) -> tuple[tuple[str, int, float, int, int], ...]:
    rows: dict[str, list[float]] = {}
    for step in profile.steps:
        row = rows.setdefault(step.label, [0, 0.0, 0, 0])
        row[0] += step.phase == "forward"
        row[1] += step.seconds
        row[3] = max(row[3], step.workspace_bytes)
    for storage in profile.storages:
        rows[storage.label][2] += storage.nbytes
    ordered = sorted(rows.items(), key=lambda item: -item[1][1])[:most]
    return tuple(
        (name, int(n), seconds, int(saved), int(own)) for name, (n, seconds, saved, own) in ordered
    )


def _room_outside(timeline: Timeline, profile: Profile) -> int:
    """Return the most space that copies take at one time (bytes)."""
    return min(timeline.bytes_out, profile.saved_bytes)


def bytes_again(profile: Profile, timeline: Timeline) -> int:
    """Return the size of what the functions make that run again in a simulated iteration (bytes)."""
    reruns = (profile.steps[number].rerun for _, again in timeline.reruns for number in again)
    writes = (i for rerun in reruns if rerun is not None for i in rerun.writes)
    return sum(profile.storages[i].nbytes for i in writes)

"""plan: what measuring, and the whole flow, would make, fit and take, without measuring anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch

from aquabit.budget import OTHERS
from aquabit.cost import CostModel
from aquabit.graph import dense_macs
from aquabit.graph import layers as graph_layers
from aquabit.measuring.evaluator import PROBE_IMAGES, Evaluator
from aquabit.measuring.fitting import GRADIENTS, SCORED, source_of
from aquabit.measuring.gradient_damages import IMAGES, PASSES
from aquabit.measuring.model import open_model
from aquabit.measuring.pools import local_evaluator
from aquabit.measuring.session import uniform_references
from aquabit.measuring.settings import AS_BEGUN, MeasureOptions, meter_of, settings
from aquabit.measuring.where import HERE, Where
from aquabit.memory import measuring_bytes
from aquabit.pipelines import Pipeline, scheduled
from aquabit.quant.bank import Bank
from aquabit.quant.calibration.fitting import FitRequest
from aquabit.quant.fit_costs import FitCost, fit_costs
from aquabit.runtime import out_of_memory, single_thread
from aquabit.scheme import FP, AquabitError, Budget, Progress, Protocol, Scheme, no_progress
from aquabit.sensitivity.designs import DEFAULT, Design, shard_of
from aquabit.sensitivity.effects.predicted import named_swap
from aquabit.space import SearchSpace
from aquabit.study import Study

MOST_SAMPLES = 1_000_000  # all are drawn before the first is measured
TRIED = 2  # steps of the sampler, at most those of the protocol, through which one backward pass is timed
MEASURING = 1.15  # a measurement over its denoiser calls (benchmarks/flow.py)
CALIBRATING = 3.0  # calls that calibration costs over those that it records: they are replayed
# measurements' worth of a search with its own settings, fresh seeds included, and measurements of a swap,
# whose ends are shared; counted in runs on the bundled models. Each other budget of the front is A_BUDGET of
# the search's
SEARCH, A_BUDGET, PER_SWAP = 170, 7, 1.6
OUTPUTS = 15  # output errors that a measurement is worth
STARTING = 8.0  # seconds until a process has loaded its libraries
EXPLAINING, EXPLAINING_LAYER = 20.0, 0.2  # seconds, and a layer
ALL, WANTED = "all", "wanted"  # which additive formats are fitted
WANTED_SHARE = 0.45  # of the time of additive fits that is left where only wanted ones are made
PARTS = tuple(f"{part}_seconds" for part in ("loading", "fitting", "probing", "measuring", "contexts"))
HEADER = 400  # bytes of a file of the bank besides its tensors, about
WARM_SECONDS = 10.0  # a first call that took longer is not repeated: what it takes once hardly matters


@dataclass(frozen=True)
class SampleOptions:
    """Which configurations are measured: ``samples`` of a design (``designs.DESIGNS``, as near:0.75) in
    total, drawn with ``seed``, of which the part ``shard`` (i/n; None: all) is measured here.

    Raises AquabitError for an unknown design, and for a shard of one that depends on what was measured.
    """

    samples: int = 120
    seed: int = 0
    design: str = DEFAULT
    shard: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.samples <= MOST_SAMPLES:
            raise AquabitError(
                f"samples is {self.samples}; it must be at least 0 and at most {MOST_SAMPLES:,}"
            )
        if not 0 <= self.seed < 1 << 63:
            raise AquabitError(f"seed is {self.seed}; it must be at least 0 and below 2^63")
        if self.adaptive and self.shard is not None:
            raise AquabitError(
                f"design disagreement chooses by all measurements, so shard {self.shard} cannot be made"
                " alone; shard another design"
            )

    @property
    def name(self) -> str:
        """The design without its share."""
        return Design.parse(self.design).name

    @property
    def adaptive(self) -> bool:
        """Whether what is drawn depends on what was measured."""
        return self.name == "disagreement"


@dataclass(frozen=True)
class Plan:
    """What ``measure`` would do. Seconds are an estimate from unit costs that were timed here (``Units``);
    ``fits`` are (layer, scheme) that the bank lacks. ``memory_bytes``: of each process at its peak.
    """

    measurements: int
    known: int
    fits: int
    probes: int
    backward_passes: int  # through one denoiser call of 8 images, where damages come from gradients
    bank_bytes: int  # of these fits
    bank_free: int  # bytes of the bank's limit that are left
    call_seconds: float
    measuring_seconds: float
    probing_seconds: float  # of probes and backward passes
    fitting_seconds: float  # calibration included
    loading_seconds: float
    memory_bytes: int | None
    workers: int
    contexts_seconds: float = 0.0  # of swaps on stored inputs

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(value for name, value in asdict(self).items() if name in PARTS)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class Units:
    """What things cost on this machine in seconds, timed once: opening the model; one denoiser ``call`` of a
    full-precision micro-batch; one of PROBE_IMAGES images (``few``); a ``backward`` pass through that (0
    where damages come from probes); ``fits``, from a few rows."""

    loading: float
    call: float
    few: float
    backward: float
    fits: Mapping[Scheme, FitCost]
    memory: int | None

    def measurements(self, count: float, calls: float, corrected: bool = False) -> float:
        """Seconds of one worker, each of so many calls (and as many of full precision where it is
        corrected)."""
        return count * calls * (1 + corrected) * self.call * MEASURING


@dataclass(frozen=True)
class RunPlan:
    """What ``run`` would take: ``parts`` {name: seconds}, estimated, and what ``measure`` does of it;
    ``calls`` are those of ``run_calls``, of ``macs`` multiply-adds each."""

    measuring: Plan
    parts: dict[str, float]
    calls: dict[str, int]
    macs: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        calls = {"calls": self.calls, "operations": operations(self.calls, self.macs)}
        return {**self.measuring.to_dict(), "parts": self.parts, **calls, "seconds": self.seconds}


def searching(front: int) -> int:
    """Measurements that a search with so many other budgets is worth."""
    return SEARCH - A_BUDGET * (OTHERS - front)


def run_calls(
    space: SearchSpace, protocol: Protocol, sample: SampleOptions, swaps: int, front: int = OTHERS
) -> dict[str, int]:
    """Calls of the denoiser with one sample that each part of a new run makes, told from its settings alone:
    a backward pass counts as two calls beside the one that it goes through, guidance as another."""
    a_run = (2 if protocol.guidance != 1.0 else 1) * protocol.steps  # of one sample
    each = a_run * protocol.images * (2 if space.correction else 1)  # of a measurement
    calibrated = any(s.calibrated for row in space.choices.values() for s in row)
    fits = CALIBRATING * space.calibration.images * a_run if calibrated and space.calibration else 0
    found = {
        "fits": fits,
        "gradients": 3 * PASSES * IMAGES * a_run + SCORED * PROBE_IMAGES * a_run,
        "sample": (1 + len(uniform_references(space)) + sample.samples) * each,
        "search": searching(front) * each,
        "checks by swaps": PER_SWAP * swaps * each,
    }
    return {part: round(count) for part, count in found.items()}


def operations(calls: Mapping[str, int], macs: int) -> int:
    """Floating-point operations of the layers in these calls, of ``macs`` multiply-adds each."""
    return 2 * macs * sum(calls.values())


class Planner:
    """A model, opened and timed once, whose plans for different settings cost nothing more. Nothing is
    written."""

    def __init__(
        self,
        model: str | Pipeline,
        study: Study | None,
        options: MeasureOptions = AS_BEGUN,
        where: Where = HERE,
        progress: Progress = no_progress,
        front: int = OTHERS,
    ):
        began = time.perf_counter()
        if where.ray is not None:
            raise AquabitError(
                f"a plan times this machine, not the cluster at --ray {where.ray}; plan with --workers N, its"
                " number of slots"
            )
        self.source, self.study, self.where = source_of(study, options.damages), study, where
        self.front = front  # other budgets of a search
        self.opened, self.store = open_model(model), Bank(where.bank)
        self.meter = meter_of(self.opened, study, options.quality, self.store, where.device)
        self.protocol, self.space = settings(self.opened, study, options, where.dtype, self.meter)
        if study is not None and "fingerprint" in study:
            study.check(self.opened.reference, self.opened.fingerprint, self.space.to_dict(), self.protocol)
        here = replace(where, dtype=self.protocol.dtype)
        self.evaluator = local_evaluator(self.opened, self.store, here, self.meter.options)
        loading = time.perf_counter() - began
        progress("timing calls of the denoiser", 0, 2)
        call = _call_seconds(self.evaluator, self.protocol, where.device)
        batch = min(PROBE_IMAGES, self.protocol.micro_batch)
        few = call if batch == self.protocol.micro_batch else 0.0
        few = few or _call_seconds(self.evaluator, replace(self.protocol, micro_batch=batch), where.device)
        back = 0.0
        if self.source == GRADIENTS:
            back = _backward_seconds(self.evaluator, self.protocol, self.space)
        progress("timing fits of a few rows", 1, 2)
        shapes: dict[Scheme, list[tuple[int, ...]]] = {}
        for layer, scheme in self._absent(self.space):
            shapes.setdefault(scheme, []).append(tuple(self.evaluator.quantized.layers[layer].shape))
        with single_thread(where.device):
            costs = fit_costs(shapes, where.device)
        progress("timing fits of a few rows", 2, 2)
        memory = measuring_bytes(self.opened.graph, self.protocol, gradients=self.source == GRADIENTS)
        self.units = Units(
            loading, call, few * PROBE_IMAGES / batch, back * PROBE_IMAGES / batch, costs, memory
        )

    def check(self, bits: float, swap: str | None = None) -> None:
        """Raise AquabitError for a budget that the space cannot meet, and for a swap that no layer can
        make."""
        costs = CostModel(self.opened.graph, self.space)
        costs.check(Budget(bits=bits), self.space.closest_act)
        named_swap(self.space, swap)

    def _evened(self, protocol: Protocol | None) -> Protocol:
        return self.protocol if protocol is None or protocol == self.protocol else protocol.evened()

    def _runs(self, protocol: Protocol) -> tuple[int, float]:
        """Steps of a protocol that run, and how many ``Units.call`` its images take."""
        adapter, pipe = self.evaluator.adapter, self.evaluator.pipe
        share = 1.0 if adapter.alone(protocol) else protocol.micro_batch / self.protocol.micro_batch
        with scheduled(pipe, self.evaluator.scheduler, protocol.scheduler):
            return protocol.steps - adapter.first_step(protocol), adapter.calls(protocol) * share

    def _absent(self, space: SearchSpace) -> list[tuple[str, Scheme]]:
        """Fits that the bank lacks."""
        fitter, rows = self.evaluator.quantized.fitter, space.choices.items()
        cells = [(layer, s) for layer, row in rows for s in row if s != FP]
        return [c for c in cells if not fitter.has(FitRequest(*c), space.calibration)]

    def measuring(
        self,
        sample: SampleOptions,
        protocol: Protocol | None = None,
        space: SearchSpace | None = None,
        fits: str = ALL,
        contexts: int = 0,
    ) -> Plan:
        """What ``measure`` does with these, or with the protocol and space that the planner was made for."""
        given, made, study = self._evened(protocol), space or self.space, self.study
        steps, calls = self._runs(given)
        chosen, workers, units = Design.parse(sample.design), self.where.workers, self.units
        first = {c.digest for c in (made.full_precision(), *uniform_references(made))}
        known = study.known(given) if study is not None else frozenset()
        # these two know what to draw only once something is probed or measured
        fixed = chosen.name not in ("near", "disagreement")
        every = [made.full_precision()] * sample.samples
        if fixed:
            every = chosen.draw(made, sample.samples, sample.seed)
        drawn = shard_of(every, sample.shard)
        asked = first | {c.digest for c in drawn} if fixed else first
        done = len(study.measurements(given, "sample", failed=True)) if study is not None else 0
        missing = len(asked - known) + (0 if fixed else max(0, len(drawn) - done))
        absent = self._absent(made)
        shapes = [(tuple(self.evaluator.quantized.layers[k].shape), s) for k, s in absent]
        size = sum(sum(scheme.stored_bytes(shape)) + HEADER for shape, scheme in shapes)
        probes, passes = _probes(study, made), 0
        if self.source == GRADIENTS and probes:
            probes, passes = min(probes, SCORED), ceil(IMAGES / PROBE_IMAGES) * PASSES * steps
            passes *= 2 if fits == WANTED else 1  # of what tells which formats are wanted, and of these
        share = {True: WANTED_SHARE if fits == WANTED else 1.0, False: 1.0}
        timed = [(shape, scheme) for shape, scheme in shapes if scheme in units.fits]
        fitting = sum(share[s.additive] * units.fits[s].seconds(shape) for shape, s in timed)
        if any(scheme.calibrated for _, scheme in absent) and made.calibration is not None:
            recorded = made.calibration.protocol(self.protocol.micro_batch)
            batch = 1 if self.evaluator.adapter.alone(recorded) else recorded.micro_batch
            runs = recorded.images * self._runs(recorded)[0] / batch
            fitting += CALIBRATING * runs * units.call
        inside = _in_context(contexts, sample.samples, len(made.choices)) if contexts else 0.0
        free = self.store.limit - sum(p.stat().st_size for p in self.store.folder.glob("*.safetensors"))
        return Plan(
            missing,
            len(asked & known) + (0 if fixed else min(done, len(drawn))),
            len(absent),
            probes,
            passes,
            size,
            free,
            units.call,
            units.measurements(missing, calls, bool(made.correction)) / workers,
            (probes * steps * units.few + passes * units.backward) / workers,
            fitting / workers,
            units.loading,
            units.memory,
            workers,
            units.measurements(inside, calls, bool(made.correction)) / workers,
        )

    def run(
        self,
        sample: SampleOptions,
        swaps: int,
        protocol: Protocol | None = None,
        space: SearchSpace | None = None,
        fits: str = ALL,
    ) -> RunPlan:
        """What the whole flow does with these."""
        given, made = self._evened(protocol), space or self.space
        steps, calls = self._runs(given)
        measuring, workers, layers = (
            self.measuring(sample, given, made, fits),
            self.where.workers,
            len(made.choices),
        )
        checks = self.units.measurements(PER_SWAP * swaps, calls, bool(made.correction))
        parts = {
            "loading": measuring.loading_seconds + STARTING,
            "first look": 2 * steps * self.units.backward / min(workers, 2),
            "fits and gradients": measuring.fitting_seconds + measuring.probing_seconds,
            "sample": measuring.measuring_seconds,
            "search": self.units.measurements(searching(self.front), calls, bool(made.correction)) / workers,
            "checks by swaps": checks / workers,
            "explaining and pages": EXPLAINING + EXPLAINING_LAYER * layers,
        }
        made_calls = run_calls(made, replace(given, steps=steps), sample, swaps, self.front)
        return RunPlan(measuring, parts, made_calls, self._macs())

    def _macs(self) -> int:
        """Of a denoiser call with one sample: one of several denoisers runs in a step; 0 where what is
        quantized does not tell, as a text encoder."""
        graph = self.opened.graph
        if self.opened.encoders:
            return 0
        every = dense_macs(graph) + sum(int(node["macs"]) for node in graph_layers(graph).values())
        return every // max(1, len(graph.graph.get("parts", ())))


def plan(
    model: str | Pipeline,
    study: Study | None,
    sample: SampleOptions,
    options: MeasureOptions = AS_BEGUN,
    where: Where = HERE,
    progress: Progress = no_progress,
) -> Plan:
    """What ``measure`` with the same arguments would do; nothing is written. ``study=None``: one that is
    not there yet."""
    return Planner(model, study, options, where, progress).measuring(sample)


def _in_context(contexts: int, samples: int, layers: int) -> float:
    """Measurements that every layer's swap in so many contexts is worth, and the output errors of the samples
    that are learned from."""
    return (samples + 2 * layers * contexts) / OUTPUTS


def _probes(study: Study | None, space: SearchSpace) -> int:
    """Runs of PROBE_IMAGES images that say what a scheme, or an activation choice, does alone."""
    known = study.features() if study is not None else {}
    return sum("damage" not in known.get(cell, {}) for cell in space.cells())


def _backward_seconds(evaluator: Evaluator, protocol: Protocol, space: SearchSpace) -> float:
    """Seconds of one backward pass through one denoiser call of at most PROBE_IMAGES images, on one thread;
    its share of making the images is in it."""
    layers = dict.fromkeys((k for k, row in space.choices.items() if row != (FP,)), ())
    tried = replace(protocol, steps=min(protocol.steps, ceil(TRIED / (protocol.strength or 1.0))))
    ran = tried.steps - evaluator.adapter.first_step(tried)
    given = (layers, [a for a in space.activations if a != 16], tried, 0, 1)

    def timed() -> float:
        began = time.perf_counter()
        evaluator.sketches(*given, space.full_precision())
        return (time.perf_counter() - began) / ran

    first = timed()
    return first if first > WARM_SECONDS else min(first, timed())


def _call_seconds(evaluator: Evaluator, protocol: Protocol, device: str) -> float:
    """Seconds of one denoiser call of a full-precision micro-batch, on one thread."""

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    with single_thread(device):
        try:
            call = evaluator.adapter.step_call(protocol)
            first = timed(call)
            return first if first > WARM_SECONDS else min(timed(call), timed(call))
        except (RuntimeError, TypeError, ValueError) as fault:
            if isinstance(fault, AquabitError) or out_of_memory(fault):
                raise
            said = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
            raise AquabitError(
                f"one call of the denoiser could not be timed ({said:.200}); a plan needs a pipeline that"
                " runs, perhaps with other --prompts, --resolution or --guidance"
            ) from fault

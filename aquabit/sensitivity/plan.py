"""plan: what measuring would make, fit and take, without measuring anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch
from diffusers import DiffusionPipeline

from aquabit.measuring.evaluator import PROBE_IMAGES, Evaluator
from aquabit.measuring.fitting import GRADIENTS, SCORED, source_of
from aquabit.measuring.gradient_damages import IMAGES, PASSES
from aquabit.measuring.model import open_model
from aquabit.measuring.pools import local_evaluator
from aquabit.measuring.session import uniform_references
from aquabit.measuring.settings import AS_BEGUN, MeasureOptions, meter_of, settings
from aquabit.measuring.where import HERE, Where
from aquabit.quant.bank import Bank
from aquabit.quant.calibration.fitting import FitRequest
from aquabit.runtime import single_thread
from aquabit.scheme import FP, AquabitError, Protocol, Scheme, act_text
from aquabit.sensitivity.designs import DEFAULT, Design, shard_of
from aquabit.space import SearchSpace
from aquabit.study import Study

MOST_SAMPLES = 1_000_000  # all are drawn before the first is measured
BACKWARD = 3  # denoiser calls that a backward pass costs, with the products of every layer's samples
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
    """What ``measure`` would do. Seconds are an estimate: one denoiser call of a full-precision micro-batch
    was timed, and every image is taken to cost as much (a backward pass BACKWARD calls); ``fits`` are (layer,
    scheme, activation bits) that the bank lacks, whose own time is not in it.
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
    probing_seconds: float
    workers: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    model: str | DiffusionPipeline,
    study: Study | None,
    sample: SampleOptions,
    options: MeasureOptions = AS_BEGUN,
    where: Where = HERE,
) -> Plan:
    """What ``measure`` with the same arguments would do; nothing is written. ``study=None``: one that is
    not there yet."""
    source = source_of(study, options.damages)
    opened, store, chosen = open_model(model), Bank(where.bank), Design.parse(sample.design)
    meter = meter_of(opened, study, options.quality, store, where.device)
    given, made = settings(opened, study, options, where.dtype, meter)
    if study is not None and "fingerprint" in study:
        study.check(opened.reference, opened.fingerprint, made.to_dict(), given)
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
    evaluator = local_evaluator(opened, store, replace(where, dtype=given.dtype), meter.options)
    fits, size = _fits(evaluator, made)
    probes, passes = _probes(study, made), 0
    if source == GRADIENTS and probes:
        probes, passes = min(probes, SCORED), ceil(IMAGES / PROBE_IMAGES) * PASSES * given.steps
    call = _call_seconds(evaluator, given, where.device)
    calls = given.steps * ceil(given.images / given.micro_batch) * (2 if made.correction else 1)
    # a call takes ``micro_batch`` images: a probe's images are several calls, or part of one
    probing = (probes * given.steps + passes * BACKWARD) * call * PROBE_IMAGES / given.micro_batch
    free = store.limit - sum(p.stat().st_size for p in store.folder.glob("*.safetensors"))
    there = len(asked & known) + (0 if fixed else min(done, len(drawn)))
    seconds = missing * calls * call / where.workers, probing / where.workers
    return Plan(missing, there, fits, probes, passes, size, free, call, *seconds, where.workers)


def _fits(evaluator: Evaluator, space: SearchSpace) -> tuple[int, int]:
    """Fits that the bank lacks, and their bytes."""
    fitter, count, size = evaluator.quantized.fitter, 0, 0
    for layer, row in space.choices.items():
        for scheme in row:
            if scheme != FP and not fitter.has(FitRequest(layer, scheme), space.calibration):
                count, size = count + 1, size + _bytes(evaluator, layer, scheme)
    return count, size


def _bytes(evaluator: Evaluator, layer: str, scheme: Scheme) -> int:
    return sum(scheme.stored_bytes(tuple(evaluator.quantized.layers[layer].shape))) + HEADER


def _probes(study: Study | None, space: SearchSpace) -> int:
    """Runs of PROBE_IMAGES images that say what a scheme, or an activation choice, does alone."""
    known = study.features() if study is not None else {}
    cells = [(k, str(s)) for k, row in space.choices.items() for s in row if s != FP]
    acts = [act_text(a) for a in space.act_choices if a != 16]
    asked = [(k, a) for k, row in space.choices.items() if row != (FP,) for a in acts]
    schemes = sum("damage" not in known.get(cell, {}) for cell in cells)
    return schemes + sum("damage" not in known.get(cell, {}) for cell in asked)


def _call_seconds(evaluator: Evaluator, protocol: Protocol, device: str) -> float:
    """Seconds of one denoiser call of a full-precision micro-batch, on one thread."""

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    with single_thread(device):
        call = evaluator.adapter.first_call(protocol)
        first = timed(call)
        return first if first > WARM_SECONDS else min(timed(call), timed(call))

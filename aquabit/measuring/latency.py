"""Latency of a denoiser call: of every layer at every choice, as a cost of the search; and of whole packed
configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import Latency
from aquabit.kernels.time_requests import interleaved, measure_missing
from aquabit.measuring.evaluator import Evaluator
from aquabit.quant.kernel_tuning import Asked, at_scheme, example_call, milliseconds, requests_of, tune
from aquabit.quant.model import QuantizedDenoiser
from aquabit.scheme import FP, Progress, Protocol, QuantConfig, Rounding, no_progress
from aquabit.scheme_kinds import UNIFORM
from aquabit.space import SearchSpace

# whole denoiser calls of one configuration: at least, at most; and the time after which they end
CALLS, SECONDS = (7, 60), 1.0
# the whole call of a configuration near it tells what calls take besides their layers
TYPICAL = UNIFORM.name, 4.0


def latency_table(
    evaluator: Evaluator,
    space: SearchSpace,
    progress: Progress = no_progress,
    protocol: Protocol | None = None,
) -> Latency:
    """Milliseconds of each (layer, scheme, activation bits) of a space in a call with one sample at the
    model's own size, by this machine's kernel timings with torch's threads, measured where they are missing;
    and what a call takes besides, from one whole call.
    """
    model = evaluator.quantized
    model.apply(QuantConfig(evaluator.fingerprint, {}))
    asked = requests_of(model.layers, _one_call(evaluator, protocol))
    activations = tuple(dict.fromkeys((16, *space.activations)))
    layers = _layer_table(asked, space, activations, progress)
    known = Latency(layers, activations, 0.0)
    config = space.level(*TYPICAL, space.closest_act)
    whole = packed_latencies(evaluator, [config], progress, protocol)[0]
    return Latency(layers, activations, max(0.0, whole - float(known.of(Choices.of(space, [config])).sum())))


def _layer_table(
    asked: Asked, space: SearchSpace, activations: tuple[Rounding, ...], progress: Progress
) -> np.ndarray:
    """[layers, schemes, activations] milliseconds, NaN where a layer may not take it."""
    cells = []
    for i, (layer, row) in enumerate(space.choices.items()):
        for scheme in row:
            for a, act in enumerate(activations):
                if act in space.activations if row != (FP,) else act == 16:
                    wanted = {at_scheme(r, scheme, act): n for r, n in asked[layer].items()}
                    cells.append(((i, space.schemes.index(scheme), a), wanted))
    times = measure_missing((r for _, wanted in cells for r in wanted), progress)
    table = np.full((len(space.choices), len(space.schemes), len(activations)), np.nan)
    for place, wanted in cells:
        table[place] = milliseconds(wanted, times)
    return table


def _phases(config: QuantConfig) -> list[tuple[int, float]]:
    """A step of each group of steps, and the group's share."""
    if config.steps is None:
        return [(0, 1.0)]
    return list(zip(config.steps.starts, config.steps.shares, strict=True))


def _seconds(
    evaluator: Evaluator, model: QuantizedDenoiser, config: QuantConfig, call: Callable[[], object], step: int
) -> float:
    """Median seconds of ``call`` as it is in a step."""
    for watcher in model.watchers(config):
        watcher.before(step)
    return median(interleaved({"call": call}, evaluator.device.split(":")[0], CALLS, SECONDS)["call"])


def _one_call(evaluator: Evaluator, protocol: Protocol | None) -> Callable[[], object]:
    """A call with one sample at the model's own size; of a class that does not tell its inputs, the first
    call that its pipeline makes for one image of ``protocol``."""
    model = evaluator.quantized
    if model.inputs is None or protocol is None:
        return example_call(model.denoiser, model.inputs)
    return evaluator.adapter.first_call(replace(protocol, images=1, micro_batch=1))


def packed_latencies(
    evaluator: Evaluator,
    configs: Sequence[QuantConfig],
    progress: Progress = no_progress,
    protocol: Protocol | None = None,
) -> list[float]:
    """Median milliseconds of a denoiser call with one sample at the model's own size, for each
    configuration packed, on the kernels that are fastest on this machine with torch's threads; averaged
    over steps between which activation bits change. Kernels are timed first where that is missing."""
    found = []
    for done, config in enumerate(configs):
        progress("latency of packed models", done, len(configs))
        with evaluator.packed(config) as model:
            call = _one_call(evaluator, protocol)
            tune(model.layers, call)
            phases = _phases(config)
            mean = sum(share * _seconds(evaluator, model, config, call, step) for step, share in phases)
            found.append(1e3 * mean)
    progress("latency of packed models", len(configs), len(configs))
    return found

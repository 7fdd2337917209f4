"""Measuring the noise of a quantized model beside full precision, at the inputs that sampling meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aquabit.quant.calibration.recording import output_tensor
from aquabit.quant.correction.guidance import (
    doubled,
    guidance_weights,
    noise_channels,
    noise_part,
    step_arguments,
)
from aquabit.quant.correction.noise import NoiseEstimate, NoiseSums, bootstrap, estimate
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.quant.correction.statistics import About, Statistics, sampler_facts, timesteps
from aquabit.scheme import AquabitError, Progress, no_progress


class _Recorder(Watcher):
    """Inputs and raw outputs of every denoiser call of one batch, and how guidance combined them."""

    needs_steps = True

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]] = []
        self.weights: list[tuple[float, ...]] = []
        self.facts: dict[str, Any] = {}
        self.times: tuple[float, ...] = ()
        self.channels = self.images = 0
        self._input: Any = None

    def begin(self, scheduler: Any) -> None:
        self.facts, self.times = sampler_facts(scheduler), timesteps(scheduler)
        self.calls, self.weights = [], []

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = _kept(args), _kept(kwargs)

    def output(self, step: int, call: int, output: Tensor) -> Tensor:
        if call == 0:
            self.calls.append([])
        self.calls[-1].append((*self._input, output.clone()))
        return output

    def advance(self, step: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        combined, _, sample = step_arguments(args, kwargs)
        self.channels = noise_channels(
            self.calls[-1][0][2], sample.shape[-1] if sample.ndim == 3 else sample.shape[1]
        )
        combined, *outputs = (
            noise_part(x, self.channels) for x in (combined, *(output for _, _, output in self.calls[-1]))
        )
        self.images = len(sample) // 2 if doubled(outputs, combined, sample) else len(sample)
        branches = [part for output in outputs for part in output.split(self.images)]
        self.weights.append(guidance_weights(branches, combined[: self.images])[0])
        return run(*args, **kwargs)

    def check_steps(self, first: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """What a batch's steps were; raises AquabitError where that is not as in the ``first`` batch, or
        where guidance acts in some of them only."""
        ran = self.times[max(0, len(self.times) - len(self.calls)) :]  # from a picture, the last ones
        seen = (self.facts, ran, len(self.calls), len(self.calls[0]))
        if first is not None and seen != first:
            raise AquabitError(
                "the sampler's steps change from batch to batch; its noise statistics are not defined"
            )
        counts = {(len(step), len(weights)) for step, weights in zip(self.calls, self.weights, strict=True)}
        if len(counts) > 1:
            raise AquabitError(
                "guidance does not act in every step; its noise statistics are not defined, use the same"
                " in all steps"
            )
        return seen


def _kept(value: Any) -> Any:
    """A copy of what a denoiser was given: pipelines may go on to change it in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _kept(v) for k, v in value.items()}
    return type(value)(_kept(v) for v in value) if type(value) in (tuple, list) else value


def measure_noise(
    denoiser: nn.Module,
    scheduler: Any,
    runs: Sequence[tuple[Callable[[], object], int]],
    full: Callable[[], AbstractContextManager[nn.Module]],
    fingerprint: str,
    config: str,
    watchers: Sequence[Watcher] = (),
    progress: Progress = no_progress,
) -> Statistics:
    """Statistics of a quantized denoiser: each of ``runs`` (what makes one batch of images, and how many of
    them count) samples with it, then full precision sees the same inputs.

    ``full`` opens a context in which the module that it gives is the full-precision denoiser; it may be the
    same one, switched. ``watchers`` take part in the sampling; they see outputs after they were recorded.
    Raises AquabitError for outputs that are not finite, for samplers whose steps change from batch to batch,
    and for fewer than two images.
    """
    recorder, sums, counted = _Recorder(denoiser), list[NoiseSums](), 0
    handle = denoiser.register_forward_pre_hook(recorder.see, with_kwargs=True)
    first: tuple[Any, ...] | None = None
    try:
        for done, (run, count) in enumerate(runs):
            progress("measuring quantization noise", done, len(runs))
            with following(denoiser, scheduler, [recorder, *watchers]):
                run()
            first = recorder.check_steps(first)
            sums = sums or [NoiseSums() for _ in recorder.calls]
            calls, recorder.calls = recorder.calls, []  # replaying must not record
            with full() as teacher:
                _replay(teacher, calls, sums, recorder, count)
            counted += count
    finally:
        handle.remove()
    progress("measuring quantization noise", len(runs), len(runs))
    if first is None:
        raise AquabitError("noise statistics need at least one batch of images")
    about = About(
        fingerprint,
        config,
        **recorder.facts,
        timesteps=first[1],
        weights=tuple(recorder.weights),
        calls=first[3],
        images=counted,
    )
    return _statistics(about, sums)


def _replay(
    teacher: nn.Module, calls: Sequence[Any], sums: Sequence[NoiseSums], recorder: _Recorder, count: int
) -> None:
    for into, step in zip(sums, calls, strict=True):
        eps: list[Tensor] = []
        quantized: list[Tensor] = []
        for args, kwargs, output in step:
            with torch.inference_mode():
                exact = output_tensor(teacher(*args, **kwargs))
            for parts, whole in ((eps, exact), (quantized, output)):
                parts += [
                    noise_part(part, recorder.channels)[:count] for part in whole.split(recorder.images)
                ]
        into.add(torch.stack(eps), torch.stack(quantized))


def _statistics(about: About, sums: Sequence[NoiseSums]) -> Statistics:
    found, lows, highs = [], [], []
    for step in sums:
        own, cross = step.joined()
        found.append(estimate(own.sum(0), cross.sum(0)))
        low, high = bootstrap(own, cross)
        lows.append(low)
        highs.append(high)
    stacked = [
        NoiseEstimate(*(np.stack([getattr(e, f.name) for e in part]) for f in fields(NoiseEstimate)))
        for part in (found, lows, highs)
    ]
    return Statistics(about, *stacked).checked()

"""Noise statistics of a quantized model under one sampler: measured beside full precision at the inputs
that sampling meets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aquabit.quant.correction.noise import NoiseEstimate, NoiseSums, bootstrap, estimate
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.scheme import AquabitError, Progress, digest, no_progress

SAME = 0.02  # relative difference of guidance weights that rounding may make


def sampler_facts(scheduler: Any) -> dict[str, Any]:
    """What identifies a sampler: its class and a digest of its configuration."""
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    settings = json.dumps(
        config, default=str, sort_keys=True
    )  # a text: DPM-Solver has a setting of -inf, which ``digest`` refuses
    return {"sampler": type(scheduler).__name__, "settings": digest(settings)}


@dataclass(frozen=True)
class About:
    """What statistics belong to: a model's fingerprint, a configuration (its digest without correction), a
    sampler with its timesteps, the weights by which guidance combines the branches at each step [steps,
    branches], in how many ``calls`` of the denoiser a step makes them, and how many images they were
    measured on."""

    fingerprint: str
    config: str
    sampler: str
    settings: str
    timesteps: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    calls: int
    images: int

    @property
    def guidance(self) -> float:
        """The guidance scale at the first step; 1 without guidance."""
        return max(self.weights[0])


@dataclass(frozen=True)
class Statistics:
    """The noise of one quantized model under one sampler: estimates stacked over the T steps, [T, ...]
    where ``NoiseEstimate`` has [...], and the ends of their 95 % intervals."""

    about: About
    estimate: NoiseEstimate
    low: NoiseEstimate
    high: NoiseEstimate

    @property
    def branches(self) -> int:
        return int(self.estimate.k.shape[1])

    @property
    def digest(self) -> str:
        """Changes with everything that a correction reads."""
        values = {
            f.name: getattr(self.estimate, f.name) for f in fields(NoiseEstimate) if f.name != "snr"
        }  # which may be infinite
        return digest([asdict(self.about), {k: v.tolist() for k, v in values.items()}])

    def table(self) -> pd.DataFrame:
        """One row a step and branch: step, timestep, branch, weight (of guidance), k, r2, kurtosis, snr
        with the ends of their intervals (k_low, k_high, ...), bias (root mean square over channels) and
        variance (mean over channels) of the residual; their ends are the extremes over all channels'
        intervals, which is wider than an interval of the mean."""
        return _frame(self)

    def combined(self, step: int, with_slope: bool = True) -> np.ndarray:
        """Variance [C] that the residual leaves in the output after guidance: w^T Sigma w, with w / (1 +
        k) where slopes are corrected."""
        weights = np.array(self.about.weights[step])
        if with_slope:
            weights = weights / (1 + self.estimate.k[step])
        return np.asarray(np.einsum("a,b,abc->c", weights, weights, self.estimate.covariance[step]))

    def save(self, path: Path) -> None:
        """Write a safetensors file; what they belong to is its metadata."""
        try:
            tensors, about = self.tensors()
            save_file(tensors, path, about)
        except (OSError, SafetensorError) as error:
            raise AquabitError(f"the statistics could not be written to {path}: {error}") from error

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is stored: tensors, and the metadata beside them."""
        parts = {"": self.estimate, "low.": self.low, "high.": self.high}
        named = {
            f"{head}{f.name}": getattr(p, f.name) for head, p in parts.items() for f in fields(NoiseEstimate)
        }
        return {k: torch.from_numpy(np.array(v)) for k, v in named.items()}, {
            "about": json.dumps(asdict(self.about))
        }

    @staticmethod
    def load(path: Path) -> Statistics:
        """Raises AquabitError for a file that is missing, truncated, or holds no such statistics."""
        try:
            with safe_open(path, "np") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                about = json.loads((file.metadata() or {})["about"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise AquabitError(
                f"{path} holds no usable noise statistics ({error}); run `aquabit quantize --correct` again"
            ) from error
        return Statistics.of(tensors, about, str(path))

    @staticmethod
    def of(tensors: Mapping[str, np.ndarray], about: Any, source: str) -> Statistics:
        """Statistics from what ``tensors`` gave; raises AquabitError, naming ``source``, where that is not
        usable."""
        try:
            return Statistics(
                _about(about), *(_estimate(tensors, head) for head in ("", "low.", "high."))
            ).checked()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AquabitError(
                f"{source} holds no usable noise statistics ({error}); run `aquabit quantize --correct` again"
            ) from error

    def checked(self) -> Statistics:
        """Itself; raises AquabitError where shapes do not fit or numbers are not finite (the SNR may be
        infinite)."""
        steps, (branches, channels) = len(self.about.timesteps), self.estimate.bias.shape[1:]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("k", "r2", "kurtosis", "snr"), (steps, branches))
        shapes |= {"covariance": (steps, branches, branches, channels)}
        for part in (self.estimate, self.low, self.high):
            for field in fields(NoiseEstimate):
                value, shape = getattr(part, field.name), shapes.get(field.name, (steps, branches, channels))
                finite = ~np.isnan(value) if field.name == "snr" else np.isfinite(value)
                if value.shape != shape or not finite.all():
                    raise AquabitError(
                        f"noise statistics hold {field.name} {list(value.shape)}; finite numbers"
                        f" {list(shape)} are needed"
                    )
        weights, times, calls = self.about.weights, self.about.timesteps, self.about.calls
        if (
            not steps
            or len(weights) != steps
            or any(len(w) != branches for w in weights)
            or not np.isfinite([*times, *np.ravel(weights)]).all()
        ):
            raise AquabitError(
                f"noise statistics of {steps} steps and {branches} branches name other timesteps or weights"
            )
        if calls < 1 or branches % calls:
            raise AquabitError(
                f"noise statistics name {calls} denoiser calls for {branches} branches of guidance"
            )
        return self

    def check(self, fingerprint: str | None = None, config: str | None = None) -> None:
        """Raise AquabitError where they are of another model or configuration."""
        for what, own, given in (
            ("model", self.about.fingerprint, fingerprint),
            ("configuration", self.about.config, config),
        ):
            if given is not None and own != given:
                raise AquabitError(
                    f"the noise statistics are of {what} {own}, this is {what} {given}; measure them for"
                    " this one"
                )

    def check_sampler(self, scheduler: Any) -> None:
        """Raise AquabitError where a sampler, or its steps, are not those that they were measured with."""
        facts = sampler_facts(scheduler)
        if facts["sampler"] != self.about.sampler:
            raise AquabitError(
                f"the noise statistics are of {self.about.sampler}, the pipeline samples with"
                f" {facts['sampler']}; use that one"
            )
        times = _times(scheduler)
        if len(times) != len(self.about.timesteps):
            raise AquabitError(
                f"the noise statistics are of {len(self.about.timesteps)} steps, the sampler makes"
                f" {len(times)}; use as many"
            )
        if times != self.about.timesteps or facts["settings"] != self.about.settings:
            raise AquabitError(
                f"the noise statistics are of a {self.about.sampler} with other settings or timesteps;"
                " measure them for this one"
            )


def _times(scheduler: Any) -> tuple[float, ...]:
    return tuple(float(t) for t in scheduler.timesteps)


def _about(value: Mapping[str, Any]) -> About:
    texts = {k: str(value[k]) for k in ("fingerprint", "config", "sampler", "settings")}
    weights = tuple(tuple(float(w) for w in row) for row in value["weights"])
    return About(
        **texts,
        timesteps=tuple(float(t) for t in value["timesteps"]),
        weights=weights,
        calls=int(value["calls"]),
        images=int(value["images"]),
    )


def _estimate(tensors: Mapping[str, np.ndarray], head: str) -> NoiseEstimate:
    return NoiseEstimate(**{f.name: tensors[head + f.name].astype(np.float64) for f in fields(NoiseEstimate)})


# ---- guidance


def guidance_weights(branches: Sequence[Tensor], combined: Tensor) -> tuple[tuple[float, ...], float]:
    """Weights, adding up to 1, by which ``combined`` was made of ``branches``, and the relative error of
    that; 1 without guidance.

    They are solved for, so that no family's order of branches has to be known. Branches that are equal share
    their weight.
    """
    if len(branches) == 1:
        return (1.0,), 0.0
    if not all(bool(torch.isfinite(x).all()) for x in (*branches, combined)):
        return (1.0, *[0.0] * (len(branches) - 1)), float("nan")
    base = branches[0].double().flatten()
    apart = torch.stack([b.double().flatten() - base for b in branches[1:]], 1)
    wanted = combined.double().flatten() - base
    found = (
        torch.linalg.lstsq(apart.T @ apart, apart.T @ wanted, driver="gelsd").solution
        if bool(apart.any())
        else apart.new_zeros(apart.shape[1])
    )
    scale = torch.linalg.vector_norm(combined.double())
    error = float(torch.linalg.vector_norm(apart @ found - wanted) / scale) if scale > 0 else 0.0
    rest = [float(w) for w in found]
    return (1 - sum(rest), *rest), error


def doubled(outputs: Sequence[Tensor], combined: Tensor, sample: Tensor) -> bool:
    """Whether a pipeline steps every image twice (DiTPipeline): both halves of its batch are one image,
    their outputs two branches."""
    half = len(sample) // 2
    if len(sample) % 2 or sum(map(len, outputs)) != len(sample):
        return False
    whole = torch.cat(list(outputs))
    same = all(torch.equal(x[:half], x[half:]) for x in (sample, combined))
    return same and not torch.equal(whole[:half], whole[half:])


def noise_channels(output: Tensor, sample_channels: int) -> int:
    """How many channels of a denoiser's output are noise: those that the sample has, or all where there
    are fewer; the rest is variance."""
    channels = output.shape[-1] if output.ndim == 3 else output.shape[1]
    return sample_channels if channels == 2 * sample_channels else channels


def noise_part(output: Tensor, count: int) -> Tensor:
    """The first ``count`` channels of [n, c, ...] or of tokens [n, tokens, c]."""
    return output[..., :count] if output.ndim == 3 else output[:, :count]


def _frame(statistics: Statistics) -> pd.DataFrame:
    e, low, high, rows = statistics.estimate, statistics.low, statistics.high, []
    for step, time in enumerate(statistics.about.timesteps):
        for b in range(statistics.branches):
            row: dict[str, Any] = {
                "step": step,
                "timestep": time,
                "branch": b,
                "weight": statistics.about.weights[step][b],
            }
            for name in ("k", "r2", "kurtosis", "snr"):
                row[name] = getattr(e, name)[step, b]
                row |= {
                    f"{name}_{end}": getattr(part, name)[step, b]
                    for end, part in (("low", low), ("high", high))
                }
            for name in ("bias", "variance"):  # per channel in the file, root mean square and mean here
                values, ends = (
                    getattr(e, name)[step, b],
                    [np.asarray(getattr(part, name)[step, b]) for part in (low, high)],
                )
                if name == "bias":
                    ends = [
                        np.maximum(np.maximum(ends[0], -ends[1]), 0),
                        np.maximum(-ends[0], ends[1]),
                    ]  # nearest to and farthest from 0
                summary = _root_mean_square if name == "bias" else _mean_variance
                row |= {
                    key: summary(v)
                    for key, v in zip((name, f"{name}_low", f"{name}_high"), (values, *ends), strict=True)
                }
            rows.append(row)
    return pd.DataFrame(rows)


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _mean_variance(values: np.ndarray) -> float:
    return float(np.maximum(values, 0).mean())


# ---- measuring


class _Recorder(Watcher):
    """Inputs and raw outputs of every denoiser call of one batch, and how guidance combined them."""

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]] = []
        self.weights: list[tuple[float, ...]] = []
        self.facts: dict[str, Any] = {}
        self.times: tuple[float, ...] = ()
        self.channels = self.images = 0
        self._input: Any = None

    def begin(self, scheduler: Any) -> None:
        self.facts, self.times = sampler_facts(scheduler), _times(scheduler)
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


def _kept(value: Any) -> Any:
    """A copy of what a denoiser was given: pipelines may go on to change it in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _kept(v) for k, v in value.items()}
    return type(value)(_kept(v) for v in value) if type(value) in (tuple, list) else value


def step_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor]:
    """model_output, timestep and sample of a call of a scheduler's ``step``."""
    names = ("model_output", "timestep", "sample")[len(args) :]
    return tuple((*args, *(kwargs[k] for k in names))[:3])


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
            seen = (recorder.facts, recorder.times, len(recorder.calls), len(recorder.calls[0]))
            if first is not None and seen != first:
                raise AquabitError(
                    "the sampler's steps change from batch to batch; its noise statistics are not defined"
                )
            first = seen
            if (
                len(
                    {
                        (len(step), len(weights))
                        for step, weights in zip(recorder.calls, recorder.weights, strict=True)
                    }
                )
                > 1
            ):
                raise AquabitError(
                    "guidance does not act in every step; its noise statistics are not defined, use the same"
                    " in all steps"
                )
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
        timesteps=recorder.times,
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
                result = teacher(*args, **kwargs)
            exact = result if isinstance(result, Tensor) else result[0]
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

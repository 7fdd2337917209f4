"""Noise statistics of a quantized model under one sampler, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquabit.files import writing
from aquabit.quant.bank import content_digest
from aquabit.quant.correction.noise import NoiseEstimate
from aquabit.scheme import AquabitError, digest


def sampler_facts(scheduler: Any) -> dict[str, Any]:
    """What identifies a sampler: its class and a digest of its configuration."""
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    # a text: DPM-Solver has a setting of -inf, which ``digest`` refuses
    settings = json.dumps(config, default=str, sort_keys=True)
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
        # without the SNR, which may be infinite
        values = {f.name: getattr(self.estimate, f.name) for f in fields(NoiseEstimate) if f.name != "snr"}
        return digest([asdict(self.about), {k: v.tolist() for k, v in values.items()}])

    def table(self) -> pd.DataFrame:
        """One row a step and branch: step, timestep, branch, weight (of guidance), k, r2, kurtosis, snr
        with the ends of their intervals (k_low, k_high, ...), bias (root mean square over channels) and
        variance (mean over channels) of the residual; their ends are the extremes over all channels'
        intervals, which is wider than an interval of the mean."""
        parts = {"": self.estimate, "_low": self.low, "_high": self.high}
        rows = []
        for (step, time), b in product(enumerate(self.about.timesteps), range(self.branches)):
            row = {"step": step, "timestep": time, "branch": b, "weight": self.about.weights[step][b]}
            for name in ("k", "r2", "kurtosis", "snr"):
                row |= {name + end: getattr(part, name)[step, b] for end, part in parts.items()}
            bias, low, high = (part.bias[step, b] for part in parts.values())
            nearest, farthest = np.maximum(np.maximum(low, -high), 0), np.maximum(-low, high)  # to and from 0
            row |= {
                f"bias{end}": float(np.sqrt(np.mean(values**2)))
                for end, values in zip(parts, (bias, nearest, farthest), strict=True)
            }
            row |= {
                f"variance{end}": float(np.maximum(part.variance[step, b], 0).mean())
                for end, part in parts.items()
            }
            rows.append(row)
        return pd.DataFrame(rows)

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
            tensors, about = self.stored()
            with writing(path) as temporary:
                save_file(tensors, temporary, about)
        except (OSError, SafetensorError, AquabitError) as error:
            raise AquabitError(f"the statistics could not be written to {path}: {error}") from error

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is stored: tensors, and the metadata beside them."""
        parts = {"": self.estimate, "low.": self.low, "high.": self.high}
        named = {
            f"{head}{f.name}": getattr(p, f.name) for head, p in parts.items() for f in fields(NoiseEstimate)
        }
        about = json.dumps(asdict(self.about))
        return {k: torch.from_numpy(np.array(v)) for k, v in named.items()}, {"about": about}

    def stored(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """As ``tensors``, with a digest of both: what a file of their own holds."""
        tensors, metadata = self.tensors()
        about = json.loads(metadata["about"])
        return tensors, {"about": json.dumps({**about, "digest": content_digest(about, tensors)})}

    @staticmethod
    def load(path: Path) -> Statistics:
        """Raises AquabitError for a file that is missing, truncated, or holds no such statistics."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                about = json.loads((file.metadata() or {})["about"])
            stated = about.pop("digest", None) if isinstance(about, dict) else None
            if stated is not None and stated != content_digest(about, tensors):  # files of before had none
                raise ValueError("they are not what was written")
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise AquabitError(
                f"{path} holds no usable noise statistics ({error}); run `aquabit quantize --correct` again"
            ) from error
        return Statistics.of({k: v.numpy() for k, v in tensors.items()}, about, str(path))

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
        times, own = timesteps(scheduler), self.about.timesteps
        same = times[max(0, len(times) - len(own)) :] == own  # from pictures, the last ones
        if not same and len(times) != len(own):
            raise AquabitError(
                f"the noise statistics are of {len(self.about.timesteps)} steps, the sampler makes"
                f" {len(times)}; use as many"
            )
        if not same or facts["settings"] != self.about.settings:
            raise AquabitError(
                f"the noise statistics are of a {self.about.sampler} with other settings or timesteps;"
                " measure them for this one"
            )


def timesteps(scheduler: Any) -> tuple[float, ...]:
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

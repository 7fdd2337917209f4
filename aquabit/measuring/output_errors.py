"""Output errors: how far a denoiser's outputs are from full precision on stored inputs of a few trajectories,
for a few per cent of the cost of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from aquabit.quant.calibration.recording import mapped, output_tensor
from aquabit.quant.correction.sampling import Watcher
from aquabit.quant.finetuning.replay import Recording, Replay
from aquabit.scheme import Calibration, Protocol

# stored trajectories, and the most steps of each: 80 calls of one sample, 1,280 make a measurement's images
IMAGES, STEPS = 8, 10
SEED = 700_000_001  # seeds that no measurement uses
BATCH = 96  # samples of one call
FLOOR = 1e-7  # relative error of what is not quantized, so that logarithms are finite


def stored(protocol: Protocol, part: int = 0) -> tuple[Calibration, int]:
    """What is recorded for a protocol, and in batches of how many images: trajectories of IMAGES seeds of
    their own, others for each ``part``."""
    own = replace(Calibration.of(protocol), images=IMAGES, seed=SEED + part * IMAGES)
    return own, min(IMAGES // 2, protocol.micro_batch)


def output_features(values: Sequence[Mapping[str, Sequence[float]]]) -> np.ndarray:
    """Output errors of n configurations as features [n, 3 x steps]: logarithms of the error and of its
    common part, and the gain."""
    if not values:
        return np.zeros((0, 0))
    error, common, gain = (np.array([v[name] for v in values], float) for name in ("error", "common", "gain"))
    return np.concatenate([np.log10(np.maximum(error, FLOOR)), np.log10(np.maximum(common, FLOOR)), gain], 1)


class StepErrors(TypedDict):
    """A number for each recorded step, see ``OutputErrors``; a study stores it as it is."""

    error: list[float]
    common: list[float]
    gain: list[float]


class OutputErrors:
    """Stored denoiser calls of at most STEPS evenly spread steps; called, what a quantized denoiser's outputs
    differ by.

    The result has a number for each of ``steps``, in order, all relative to the mean square of the
    full-precision output there (means over networks, where several are called in a step): "error", the mean
    square of the difference; "common", that of its mean over images, less what chance leaves of a mean (it
    may be negative); and "gain", the slope of the difference on the output (PTQD's k, without intercept).
    Values that are not finite become 1e6.
    """

    def __init__(self, recording: Recording, denoiser: nn.Module):
        self.denoiser, self.replay = denoiser, Replay(recording, denoiser)
        taken = sorted({step for _, _, step in self.replay.places})
        self.steps = [
            taken[i]
            for i in np.unique(np.linspace(0, len(taken) - 1, min(STEPS, len(taken))).round().astype(int))
        ]
        self.samples = [self._alike(s) for s in self.steps]  # of each step, those of one output together

    def _alike(self, step: int) -> list[list[int]]:
        found: dict[Any, list[int]] = {}
        for i, place in enumerate(self.replay.places):
            if place[2] == step:
                found.setdefault(self.replay.output_of(i), []).append(i)
        return list(found.values())

    @torch.no_grad()
    def __call__(self, watchers: Sequence[Watcher] = ()) -> StepErrors:
        """``watchers`` are those of the configuration that the denoiser runs; with any, a call holds one
        step."""
        change, full = {}, {}
        for part, output, target in self._outputs(watchers):
            for i, row, wanted in zip(part, output.float().cpu(), target.float().cpu(), strict=True):
                change[i], full[i] = row - wanted, wanted
        found = [
            [
                self._of_output(
                    torch.stack([change[i] for i in own]).flatten(1),
                    torch.stack([full[i] for i in own]).flatten(1),
                )
                for own in groups
            ]
            for groups in self.samples
        ]
        error, common, gain = (
            [round(fmean(row[name] for row in rows), 9) for rows in found]
            for name in ("error", "common", "gain")
        )
        return {"error": error, "common": common, "gain": gain}

    @torch.enable_grad()
    def backward(self, weights: Sequence[float], watchers: Sequence[Watcher] = ()) -> float:
        """The relative errors of the steps, weighted and added up; its gradient is left in whatever asks
        for one."""
        share = dict(zip(self.steps, weights, strict=True))
        size = {
            i: (self._scale(own), len(own) * len(groups))
            for groups in self.samples
            for own in groups
            for i in own
        }
        value = 0.0
        for part, output, target in self._outputs(watchers):
            per_sample = [share[self.replay.places[i][2]] / (size[i][0] * size[i][1]) for i in part]
            squared = (output.float() - target.float()).square().flatten(1).mean(1)
            loss = (squared * squared.new_tensor(per_sample)).sum()
            loss.backward()
            value += float(loss.detach())
        return value

    def _scale(self, samples: Sequence[int]) -> float:
        """The mean square of the full-precision outputs of samples of one step and network."""
        return float(self.replay.batch(samples, torch.device("cpu"))[1].double().square().mean())

    def _outputs(self, watchers: Sequence[Watcher]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Samples, what the denoiser answers for them, and what it should."""
        device = next(chain(self.denoiser.parameters(), self.denoiser.buffers())).device
        every = [own for groups in self.samples for own in groups]
        for part in every if watchers else self._batches():
            for watcher in watchers:
                watcher.before(self.replay.places[part[0]][2])
            call, target = self.replay.batch(part, device)
            args, kwargs = mapped(call, _usable) if torch.is_grad_enabled() else call
            yield part, output_tensor(self.denoiser(*args, **kwargs)), target

    def _batches(self) -> list[list[int]]:
        """All samples in calls of at most BATCH; those of one call are of one kind."""
        kinds: dict[int, list[int]] = {}
        for groups in self.samples:
            for i in chain(*groups):
                kinds.setdefault(self.replay.kind(i), []).append(i)
        return [row[i : i + BATCH] for row in kinds.values() for i in range(0, len(row), BATCH)]

    @staticmethod
    def _of_output(change: Tensor, full: Tensor) -> dict[str, float]:
        change, full = change.double(), full.double()
        scale, n = full.square().mean(), len(change)
        mean = change.mean(0)
        # of a mean over images that have nothing in common
        chance = (change - mean).square().mean() / max(n - 1, 1)
        found = {
            "error": change.square().mean() / scale,
            "common": (mean.square().mean() - chance) / scale,
            "gain": (change * full).mean() / scale,
        }
        return {k: round(float(v), 9) if bool(torch.isfinite(v)) else 1e6 for k, v in found.items()}


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it was recorded in inference mode, which gradients cannot pass."""
    return tensor.clone() if tensor.is_inference() else tensor

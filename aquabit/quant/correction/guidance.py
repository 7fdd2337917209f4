"""How guidance combines the branches of a denoiser's output, found from what a scheduler is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SAME = 0.02  # relative difference of guidance weights that rounding may make


def guidance_weights(branches: Sequence[Tensor], combined: Tensor) -> tuple[tuple[float, ...], float]:
    """Weights, adding up to 1, by which ``combined`` was made of ``branches``, and the relative error of
    that (NaN where they are not finite, infinite where they have other sizes); 1 without guidance.

    They are solved for, so that no family's order of branches has to be known. Branches that are equal share
    their weight.
    """
    if len(branches) == 1:
        return (1.0,), 0.0
    first = (1.0, *[0.0] * (len(branches) - 1))
    if any(x.numel() != combined.numel() for x in branches):
        return first, float("inf")
    if not all(bool(torch.isfinite(x).all()) for x in (*branches, combined)):
        return first, float("nan")
    base = branches[0].double().flatten()
    apart = torch.stack([b.double().flatten() - base for b in branches[1:]], 1)
    wanted = combined.double().flatten() - base
    if bool(apart.any()):
        found = torch.linalg.lstsq(apart.T @ apart, apart.T @ wanted, driver="gelsd").solution
    else:
        found = apart.new_zeros(apart.shape[1])
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


def step_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor]:
    """model_output, timestep and sample of a call of a scheduler's ``step``."""
    names = ("model_output", "timestep", "sample")[len(args) :]
    return tuple((*args, *(kwargs[k] for k in names))[:3])

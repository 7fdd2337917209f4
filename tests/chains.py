"""Sampling by hand, and noise statistics that are known instead of measured: what the tests of corrections
share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from aquabit.quant.correction.noise import NoiseEstimate
from aquabit.quant.correction.statistics import About, Statistics, sampler_facts

OPEN = {"clip_sample": False}
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}


@dataclass(frozen=True)
class Sampler:
    name: str
    settings: dict[str, Any]
    eta: float = 0.0

    def made(self, steps: int) -> Any:
        scheduler = getattr(diffusers, self.name)(**self.settings)
        scheduler.set_timesteps(steps)
        return scheduler

    def __str__(self) -> str:
        return "-".join(
            [self.name.removesuffix("Scheduler"), *map(str, self.settings.values()), str(self.eta)]
        )


NOISY = [
    Sampler("DDPMScheduler", OPEN),
    Sampler("DDIMScheduler", OPEN, 1.0),
    Sampler("DDIMScheduler", OPEN, 0.5),
    Sampler("EulerAncestralDiscreteScheduler", {}),
    Sampler("DPMSolverMultistepScheduler", SDE),
    Sampler("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]
STILL = [
    Sampler("DDIMScheduler", OPEN),
    Sampler("EulerDiscreteScheduler", {}),
    Sampler("DPMSolverMultistepScheduler", {}),
    Sampler("FlowMatchEulerDiscreteScheduler", {}),
]


def known(
    scheduler: Any,
    k: Any = 0.0,
    bias: Any = 0.0,
    variance: Any = 0.0,
    *,
    channels: int = 2,
    weights: Sequence[float] = (1.0,),
    covariance: np.ndarray | None = None,
    calls: int = 1,
    mean_eps: float = 0.0,
    var_eps: float = 1.0,
) -> Statistics:
    """Statistics of the scheduler's steps; numbers are broadcast to [T, B] and [T, B, C]."""
    steps, branches = len(scheduler.timesteps), len(weights)
    slope = np.broadcast_to(np.asarray(k, float), (steps, branches)).copy()
    shape = (steps, branches, channels)
    shift, spread, e, vee = (
        np.broadcast_to(np.asarray(v, float), shape).copy() for v in (bias, variance, mean_eps, var_eps)
    )
    both = np.zeros((steps, branches, branches, channels))
    for b in range(branches):
        both[:, b, b] = spread[:, b]
    if covariance is not None:
        both = np.broadcast_to(covariance, both.shape).copy()
    ones, wide = np.ones((steps, branches)), slope[..., None]
    estimate = NoiseEstimate(
        slope,
        shift,
        spread,
        both,
        ones,
        0 * ones,
        ones,
        e,
        shift + wide * e,
        vee,
        wide * vee,
        wide**2 * vee + spread,
    )
    about = About(
        "model",
        "config",
        **sampler_facts(scheduler),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        weights=(tuple(weights),) * steps,
        calls=calls,
        images=64,
    )
    return Statistics(about, estimate, estimate, estimate).checked()


class Given(nn.Module):
    """A denoiser that returns what it is told to."""

    def __init__(self, give: Any):
        super().__init__()
        self.give = give

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.give(x, t)


def sampled(
    denoiser: nn.Module,
    scheduler: Any,
    x: Tensor,
    steps: int,
    eta: float = 0.0,
    generator: Any = None,
    guidance: float | None = None,
) -> Tensor:
    """Sampling as pipelines do it; with guidance, conditional and unconditional branch in one batch."""
    scheduler.set_timesteps(steps)
    extra = {"eta": eta} if type(scheduler).__name__ == "DDIMScheduler" else {}
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(
                x, t
            )  # which Euler asks for; the denoisers here read the sample itself
        output = denoiser(x if guidance is None else torch.cat([x, x]), t)
        if guidance is not None:
            uncond, cond = output.chunk(2)
            output = uncond + guidance * (cond - uncond)
        x = scheduler.step(output, t, x, generator=generator, **extra).prev_sample
    return x


@contextmanager
def drawing(noise: Tensor):
    """What samplers, and corrections, draw instead of random numbers."""
    places = [
        f"diffusers.schedulers.scheduling_{part}.randn_tensor"
        for part in (
            "ddpm",
            "ddim",
            "euler_ancestral_discrete",
            "dpmsolver_multistep",
            "flow_match_euler_discrete",
        )
    ]
    with ExitStack() as stack:
        for place in (*places, "aquabit.quant.correction.corrector.randn_tensor"):
            stack.enter_context(patch(place, lambda *args, **kwargs: noise.to(kwargs.get("dtype"))))
        yield

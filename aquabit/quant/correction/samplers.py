"""What a step of diffusers' samplers does with the denoiser's output: the noise level it starts from and ends
at, the coefficient C of the output in the next sample, and the standard deviation s of the noise that it adds
(PTQD, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from aquabit.scheme import AquabitError


@dataclass(frozen=True)
class StepFacts:
    """One step of a sampler. x = alpha x0 + sigma eps before it; ``alpha_next`` and ``sigma_next`` after it
    (with all noise that is added).

    ``gain`` is d eps / d output: 1 where the denoiser predicts eps. ``coefficient`` (C) is d next sample / d
    output and ``noise`` (s) the standard deviation of what is added, a number, or a tensor where the model
    predicts its own variance.
    """

    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    gain: float
    coefficient: float
    noise: float | Tensor = 0.0

    def eps(self, output: Tensor, sample: Tensor, prediction: str) -> Tensor:
        """The noise that the denoiser's output stands for, as ``gain`` counts it."""
        if prediction == "epsilon":
            return output
        if prediction == "v_prediction":
            # 1, or that of a sampler which does not keep the variance
            scale = (self.alpha**2 + self.sigma**2) ** 0.5
            return (self.alpha / scale) * output + (self.sigma / scale**2) * sample
        if prediction in ("flow", "flow_prediction"):
            return sample + self.alpha * output  # the output is eps - x0, and alpha = 1 - sigma
        return (sample - self.alpha * output) / self.sigma


def prediction_type(scheduler: Any) -> str:
    """epsilon, v_prediction, sample, flow or flow_prediction."""
    return (
        "flow" if type(scheduler).__name__.startswith("FlowMatch") else str(scheduler.config.prediction_type)
    )


def step_facts(scheduler: Any, timestep: Any, eta: float = 0.0, output: Tensor | None = None) -> StepFacts:
    """Facts of the step that starts at ``timestep``, before it is made; ``output`` is needed where its
    variance channels are.

    Raises AquabitError for a sampler that is not known.
    """
    return _known(scheduler)(scheduler, timestep, eta, output)


def _known(scheduler: Any) -> Callable[[Any, Any, float, Tensor | None], StepFacts]:
    name = type(scheduler).__name__
    if name not in SAMPLERS:
        raise AquabitError(f"corrections are not defined for {name}; known samplers: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _gain(prediction: str, alpha: float, sigma: float) -> float:
    """d eps / d output for x = alpha x0 + sigma eps (v_prediction scaled as diffusers does where alpha =
    1)."""
    if prediction == "epsilon":
        return 1.0
    if prediction == "v_prediction":
        return alpha / sqrt(alpha**2 + sigma**2)
    if prediction == "sample":
        return -alpha / sigma
    raise AquabitError(
        f"corrections are not defined for a denoiser that predicts {prediction!r}, only for epsilon,"
        " v_prediction and sample"
    )


def _x0_gain(prediction: str, alpha: float, sigma: float) -> float:
    """d x0 / d output: what ``_gain`` implies, in a form that also holds without signal (alpha = 0), but
    for epsilon."""
    if prediction == "epsilon":
        if alpha == 0:
            raise AquabitError(
                "a denoiser that predicts epsilon says nothing at zero signal (rescale_betas_zero_snr); use"
                " v_prediction"
            )
        return -sigma / alpha
    return 1.0 if prediction == "sample" else -sigma / sqrt(alpha**2 + sigma**2)


def _ddim(scheduler: Any, timestep: Any, eta: float, output: Tensor | None) -> StepFacts:
    t = int(timestep)
    before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    now = float(scheduler.alphas_cumprod[t])
    then = float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod)
    # as DDIM itself has it; calling it changes nothing
    s = eta * sqrt(max(float(scheduler._get_variance(t, before)), 0.0))
    kind, alpha, sigma = scheduler.config.prediction_type, sqrt(now), sqrt(1 - now)
    gain = _gain(kind, alpha, sigma)
    coefficient = sqrt(max(1 - then - s * s, 0.0)) * gain + sqrt(then) * _x0_gain(kind, alpha, sigma)
    return StepFacts(alpha, sigma, sqrt(then), sqrt(1 - then), gain, coefficient, s)


def _ddpm(scheduler: Any, timestep: Any, eta: float, output: Tensor | None) -> StepFacts:
    t = int(timestep)
    before = int(scheduler.previous_timestep(t))
    now = float(scheduler.alphas_cumprod[t])
    then = float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.one)
    kind, alpha, sigma = scheduler.config.prediction_type, sqrt(now), sqrt(1 - now)
    gain = _gain(kind, alpha, sigma)
    # DDPM, eq. 7: only x0 holds the output
    coefficient = sqrt(then) * (1 - now / then) / (1 - now) * _x0_gain(kind, alpha, sigma)
    return StepFacts(
        alpha, sigma, sqrt(then), sqrt(1 - then), gain, coefficient, _ddpm_noise(scheduler, t, output)
    )


def _ddpm_noise(scheduler: Any, t: int, output: Tensor | None) -> float | Tensor:
    """The standard deviation that DDPM's variance types mean."""
    if t <= 0:
        return 0.0
    if scheduler.variance_type == "fixed_large_log":
        raise AquabitError(
            "DDPM with variance_type 'fixed_large_log' has no noise of its own (the root of a logarithm); use"
            " fixed_large"
        )
    learned = scheduler.variance_type in ("learned", "learned_range")
    if learned and (output is None or output.shape[1] % 2):
        raise AquabitError(
            f"DDPM with variance_type {scheduler.variance_type!r} needs a denoiser that predicts its variance"
        )
    predicted = output[:, output.shape[1] // 2 :] if learned and output is not None else None
    variance = scheduler._get_variance(t, predicted_variance=predicted)
    if scheduler.variance_type == "fixed_small_log":
        return float(variance)  # a standard deviation already
    if scheduler.variance_type == "learned_range":
        return torch.exp(0.5 * variance)
    return variance.sqrt() if learned else sqrt(float(variance))


def _sigmas(scheduler: Any, timestep: Any) -> tuple[float, float]:
    index = scheduler.step_index
    if index is None:
        if scheduler.begin_index is not None:
            index = scheduler.begin_index
        else:
            index = scheduler.index_for_timestep(timestep)
    return float(scheduler.sigmas[index]), float(scheduler.sigmas[index + 1])


def _euler(scheduler: Any, timestep: Any, eta: float, output: Tensor | None) -> StepFacts:
    now, then = _sigmas(scheduler, timestep)
    gain = _gain(scheduler.config.prediction_type, 1.0, now)
    return StepFacts(1.0, now, 1.0, then, gain, gain * (then - now))


def _euler_ancestral(scheduler: Any, timestep: Any, eta: float, output: Tensor | None) -> StepFacts:
    now, then = _sigmas(scheduler, timestep)
    up = sqrt(max(then**2 * (now**2 - then**2) / now**2, 0.0))
    gain = _gain(scheduler.config.prediction_type, 1.0, now)
    return StepFacts(1.0, now, 1.0, then, gain, gain * (sqrt(max(then**2 - up**2, 0.0)) - now), up)


def _dpm(scheduler: Any, timestep: Any, eta: float, output: Tensor | None) -> StepFacts:
    """First order; the coefficient of a multistep update's newest output is another, see ``refuses``."""
    if scheduler.config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        raise AquabitError(
            "corrections are defined for dpmsolver++ and sde-dpmsolver++, not for"
            f" {scheduler.config.algorithm_type!r}"
        )
    (alpha, sigma), (alpha_next, sigma_next) = (
        tuple(float(v) for v in scheduler._sigma_to_alpha_sigma_t(torch.tensor(s, dtype=torch.float64)))
        for s in _sigmas(scheduler, timestep)
    )
    kind = scheduler.config.prediction_type
    flow = kind == "flow_prediction"
    gain = alpha if flow else _gain(kind, alpha, sigma)
    to_x0 = -sigma if flow else _x0_gain(kind, alpha, sigma)
    decay = sigma_next * alpha / (alpha_next * sigma)  # e^-h
    sde = scheduler.config.algorithm_type == "sde-dpmsolver++"
    weight = alpha_next * (1 - (decay**2 if sde else decay))
    noise = sigma_next * sqrt(max(1 - decay**2, 0.0)) if sde else 0.0
    return StepFacts(alpha, sigma, alpha_next, sigma_next, gain, weight * to_x0, noise)


def _flow(scheduler: Any, timestep: Any, eta: float, output: Tensor | None) -> StepFacts:
    now, then = _sigmas(scheduler, timestep)
    if scheduler.config.stochastic_sampling:  # x0 = x - now * output; (1 - then) x0 + then * noise
        return StepFacts(1 - now, now, 1 - then, then, 1 - now, -(1 - then) * now, then)
    return StepFacts(1 - now, now, 1 - then, then, 1 - now, then - now)


SAMPLERS: dict[str, Callable[[Any, Any, float, Tensor | None], StepFacts]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "DPMSolverMultistepScheduler": _dpm,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
ADDS_NOISE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
# a deterministic step of the form sqrt(sigma_next^2 - s^2) eps
MATCHED = ("DDIMScheduler", "EulerDiscreteScheduler")


def refuses(scheduler: Any, corrections: tuple[str, ...]) -> str | None:
    """Why a sampler cannot be corrected so, or None."""
    name = type(scheduler).__name__
    if not corrections:
        return None
    if not hasattr(scheduler, "config"):
        return (
            "corrections of noise need a scheduler of diffusers, whose steps they know; a sampler of one's"
            " own has no scheduler: leave the correction out"
        )
    if name not in SAMPLERS:
        return f"corrections are not defined for {name}; known samplers: {', '.join(SAMPLERS)}"
    residual = [c for c in corrections if c in ("vsc", "match", "qdrift")]
    clipped = [k for k in ("clip_sample", "thresholding") if scheduler.config.get(k)]
    if residual and clipped:
        return (
            f"{residual[0]} needs samples that are not clipped, but {name} has {clipped[0]}=True; set it to"
            " False"
        )
    if "vsc" in corrections:
        return _refuses_vsc(scheduler, name)
    if residual and name not in MATCHED:
        return f"{residual[0]} is defined for DDIM at eta 0 and Euler, not for {name}; use cnc+bc"
    return None


def refuses_eta(scheduler: Any, corrections: tuple[str, ...], eta: float) -> str | None:
    """Why DDIM with ``eta`` cannot be corrected so, or None; other samplers have no eta."""
    if type(scheduler).__name__ != "DDIMScheduler":
        return None
    if "vsc" in corrections and not eta:
        return (
            "vsc takes variance from the noise that a sampler adds, and DDIM with eta 0 adds none; use cnc+bc"
            " or match"
        )
    residual = [c for c in corrections if c in ("match", "qdrift")]
    if residual and eta:
        return f"{residual[0]} is defined for a deterministic sampler, but eta is {eta:g}; use eta 0, or vsc"
    return None


def _refuses_vsc(scheduler: Any, name: str) -> str | None:
    if name not in ADDS_NOISE:
        return f"vsc takes variance from the noise that a sampler adds, and {name} adds none; use cnc+bc"
    if name == "DPMSolverMultistepScheduler":
        if not str(scheduler.config.algorithm_type).startswith("sde"):
            return (
                f"vsc needs a sampler that adds noise, and {scheduler.config.algorithm_type} adds none; use"
                " sde-dpmsolver++ or cnc+bc"
            )
        if scheduler.config.solver_order != 1:
            return (
                f"vsc is defined for first-order steps: in a step of order {scheduler.config.solver_order}"
                " the noise of earlier outputs comes again; use solver_order=1 or cnc+bc"
            )
    if name == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling:
        return (
            f"vsc needs a sampler that adds noise, and {name} adds none unless stochastic_sampling; use"
            " cnc+bc"
        )
    return None

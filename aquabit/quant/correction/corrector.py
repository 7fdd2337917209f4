"""Correcting the noise that quantization adds (PTQD): what acts on the denoiser's output and on the sampler's
noise.

CNC + BC    u = (eps_q - bias) / (1 + k)                       always defined
VSC         s'^2 = max(0, s^2 - C^2 v), v = Var(r) / (1 + k)^2   where the sampler adds noise of standard
            deviation s
match       the residual stands for the sampler's noise: s^2 = C(s)^2 v, the direction term of s, nothing
            injected (DDIM eta 0, Euler)
qdrift      Q-Drift (arXiv 2603.18095): conditional mean subtracted, the step in x / alpha scaled by 1 + Var /
            (sigma_s^2 - sigma_t^2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from aquabit.quant.correction.guidance import SAME, doubled, guidance_weights, noise_part, step_arguments
from aquabit.quant.correction.noise import NoiseEstimate, Uncorrectable
from aquabit.quant.correction.samplers import StepFacts, prediction_type, refuses, refuses_eta, step_facts
from aquabit.quant.correction.sampling import Watcher, follow_, watchers_of
from aquabit.quant.correction.statistics import Statistics, timesteps
from aquabit.scheme import AquabitError, parse_correction

DEFAULT_CORRECTION = "cnc+bc"  # defined for every sampler
MIN_DIVISOR = 0.1  # 1 + k below this is not divided by


class Corrector(Watcher):
    """Applies corrections of ``statistics`` while a pipeline samples: to the raw output, before guidance, and
    to the sampler's noise.

    Raises AquabitError for corrections that would divide by nearly nothing; and, when sampling begins or at
    its first step, for another sampler, step count or guidance scale than the statistics', and for what is
    not defined for the sampler.
    """

    needs_steps = True

    def __init__(self, statistics: Statistics, correction: str | None):
        self.statistics, self.which = statistics, parse_correction(correction)
        self.slope, self.shift = _output_correction(statistics, self.which)
        self.scheduler: Any = None
        self.seen: list[Tensor] = []  # this step's corrected outputs, one a branch
        self.first = 0  # the step that the statistics begin with: not that of noise, where it is of pictures

    def begin(self, scheduler: Any) -> None:
        if not self.which:
            return
        self.statistics.check_sampler(scheduler)
        reason = refuses(scheduler, self.which)
        if reason:
            raise AquabitError(reason)
        self.scheduler, self.seen = scheduler, []
        self.first = len(timesteps(scheduler)) - len(self.slope)

    def output(self, step: int, call: int, output: Tensor) -> Tensor:
        if call == 0:
            self.seen = []
        step = self._row(step)
        if self._idle(step):
            return output
        channels = self.slope.shape[2]
        parts = self._branches(output)
        corrected = [
            self._corrected(part, step, len(self.seen) + i, channels) for i, part in enumerate(parts)
        ]
        self.seen += [noise_part(part, channels) for part in corrected]
        return torch.cat(corrected)

    def _row(self, step: int) -> int:
        """Where the statistics of a step are; raises AquabitError for one before them."""
        if self.which and self.scheduler is not None and step < self.first:
            raise AquabitError(
                f"the noise statistics begin with step {self.first + 1}, sampling is at step {step + 1}; use"
                " the strength that they were measured with"
            )
        return step - self.first

    def _idle(self, step: int) -> bool:
        """Nothing is corrected, or the denoiser is called outside of sampling."""
        return not self.which or self.scheduler is None or step >= len(self.slope)

    def _branches(self, output: Tensor) -> Sequence[Tensor]:
        """The branches of guidance in one call: all of them, or, where a pipeline calls once per branch,
        that one."""
        about = self.statistics.about
        together = self.statistics.branches // about.calls
        if len(output) % together:
            raise AquabitError(
                f"the noise statistics are of {together} guidance branches in a batch, but the denoiser was"
                f" given {len(output)} samples; use guidance {about.guidance:g}"
            )
        return output.chunk(together)

    def _corrected(self, output: Tensor, step: int, branch: int, channels: int) -> Tensor:
        """(output - shift) / slope on the channels that are noise."""
        if branch >= self.slope.shape[1]:
            raise AquabitError(
                f"the denoiser ran more often in step {step + 1} than when the noise statistics were measured"
            )
        noise = noise_part(output, channels)
        slope, shift = (_per_channel(v[step, branch], noise) for v in (self.slope, self.shift))
        fixed = ((noise.to(shift.dtype) - shift) / slope).to(output.dtype)
        dim = 2 if output.ndim == 3 else 1
        rest = output.narrow(dim, channels, output.shape[dim] - channels)  # learned variances
        return torch.cat([fixed, rest], dim) if rest.numel() else fixed

    def advance(self, step: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, timestep, sample = step_arguments(args, kwargs)
        if self.which and self.scheduler is None:
            raise AquabitError(
                "the sampler's timesteps were set before corrections were attached to it; set them again"
            )
        step = self._row(step)
        if self._idle(step):
            return run(*args, **kwargs)
        self._check_time(step, timestep)
        self._check_guidance(step, noise_part(output, self.slope.shape[2]), sample)
        residual = next((c for c in self.which if c in ("vsc", "match", "qdrift")), None)
        if residual is None:
            return run(*args, **kwargs)
        eta = float(
            kwargs.get(
                "eta", args[3] if len(args) > 3 and type(self.scheduler).__name__ == "DDIMScheduler" else 0.0
            )
        )
        check_correction(self.scheduler, residual, eta)
        facts = step_facts(self.scheduler, timestep, eta, output)
        if residual == "vsc":
            return self._less_noise(step, facts, run, args, kwargs, output)
        change = self._matched if residual == "match" else self._drifted
        return change(step, facts, run(*args, **kwargs), noise_part(output, self.slope.shape[2]), sample)

    def _check_time(self, step: int, timestep: Any) -> None:
        """Raise AquabitError where sampling left timesteps out, as from an image that is partly noise."""
        wanted, found = self.statistics.about.timesteps[step], float(torch.as_tensor(timestep).flatten()[0])
        if abs(found - wanted) > 1e-3 * max(1.0, abs(wanted)):
            raise AquabitError(
                f"the noise statistics of step {step + 1} are of timestep {wanted:g}, sampling is at"
                f" {found:g}; start from noise, or sample without correction"
            )

    def _check_guidance(self, step: int, output: Tensor, sample: Tensor) -> None:
        """Raise AquabitError where the branches were combined by other weights than the statistics'."""
        wanted = self.statistics.about.weights[step]
        if doubled(self.seen, output, sample):
            output = output[: len(output) // 2]
        if len(self.seen) != len(wanted) or self.seen[0].shape[0] != output.shape[0]:
            raise AquabitError(
                f"the noise statistics are of guidance {self.statistics.about.guidance:g} with {len(wanted)}"
                " outputs a step, sampling combines another number; use that guidance, or measure them anew"
            )
        found, error = guidance_weights(self.seen, output)
        if len(found) == 1:
            return
        apart = [a - b for a, b in zip(self.seen[1:], self.seen, strict=False)]
        if all(float(d.abs().max()) < 1e-6 for d in apart):
            return  # equal branches: any weights would do
        if error > SAME and "vsc" in self.which:
            raise AquabitError(
                "guidance is no weighted sum of the branches here (guidance_rescale?); vsc is not defined for"
                " it, use cnc+bc"
            )
        if error <= SAME and max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > SAME * max(
            1.0, *map(abs, wanted)
        ):
            raise AquabitError(
                f"the noise statistics are of guidance {max(wanted):.3g}, sampling uses {max(found):.3g};"
                " measure them for that"
            )

    def _variance(self, step: int, like: Tensor) -> Tensor:
        """v, shaped to multiply ``like``."""
        return _per_channel(self.statistics.combined(step, "cnc" in self.which), like)

    def _less_noise(
        self,
        step: int,
        facts: StepFacts,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Any:
        """VSC. DDIM and DPM-Solver take the smaller noise as an argument: DDIM's own ``_get_variance``
        feeds its direction term as well."""
        name = type(self.scheduler).__name__
        like = noise_part(output, self.slope.shape[2])
        own = torch.as_tensor(facts.noise, dtype=torch.float64, device=like.device)
        wanted = (own**2 - (facts.coefficient**2 * self._variance(step, like)).double()).clamp(min=0).sqrt()
        ratio = torch.where(own > 0, wanted / own.clamp(min=1e-30), 1.0)
        if bool((ratio == 1).all()):
            return run(*args, **kwargs)
        generator = kwargs.get("generator")
        if name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
            dtype = output.dtype if name == "DDIMScheduler" else torch.float32
            noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=dtype)
            return run(*args, **{**kwargs, "generator": None, "variance_noise": noise * ratio.to(dtype)})
        states = _states(generator, like.device)
        dtype = torch.float32 if name == "FlowMatchEulerDiscreteScheduler" else like.dtype
        noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
        _restore(generator, states, like.device)
        result = run(*args, **kwargs)  # draws the same noise
        return _replaced(result, (result[0].double() + (wanted - own) * noise).to(result[0].dtype))

    def _matched(self, step: int, facts: StepFacts, result: Any, output: Tensor, sample: Tensor) -> Any:
        """The direction term of a sampler that adds noise of variance s^2 = C(s)^2 v, where the residual
        is that noise."""
        v = facts.gain**2 * self.statistics.combined(step, "cnc" in self.which)
        change = matched_direction(facts, v) - facts.sigma_next
        if not change.any():
            return result
        eps = facts.eps(output, sample, prediction_type(self.scheduler))
        return _replaced(result, result[0] + (_per_channel(change, eps) * eps).to(result[0].dtype))

    def _drifted(self, step: int, facts: StepFacts, result: Any, output: Tensor, sample: Tensor) -> Any:
        if facts.alpha == 0:
            return result  # the span from there is infinite, and the scale 1
        variance = (facts.coefficient / facts.alpha_next) ** 2 * _conditional_variance(self.statistics, step)
        span = (facts.sigma / facts.alpha) ** 2 - (facts.sigma_next / facts.alpha_next) ** 2
        if not variance.any():
            return result
        before, after = sample / facts.alpha, result[0] / facts.alpha_next
        scale = _per_channel(1 + variance / abs(span), after)
        return _replaced(result, (facts.alpha_next * (before + scale * (after - before))).to(result[0].dtype))


def matched_direction(facts: StepFacts, v: np.ndarray) -> np.ndarray:
    """sqrt(sigma_next^2 - s^2) with s^2 = (sqrt(sigma_next^2 - s^2) - A)^2 v, A = alpha_next sigma / alpha;
    [C].

    With t = sqrt(sigma_next^2 - s^2): (1 + v) t^2 - 2 v A t + v A^2 - sigma_next^2 = 0; the larger root,
    which has the smaller s. Where there is none between 0 and sigma_next, as always at the last step and
    where there is no signal yet (alpha = 0), s = 0.
    """
    if facts.alpha == 0:
        return np.full(np.shape(v), facts.sigma_next)
    limit, reach = facts.sigma_next, facts.alpha_next * facts.sigma / facts.alpha
    inside = limit**2 * (1 + v) - v * reach**2
    t = (v * reach + np.sqrt(np.maximum(inside, 0))) / (1 + v)
    return np.asarray(np.where((inside >= 0) & (t >= 0) & (t <= limit), t, limit))


def _output_correction(statistics: Statistics, which: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """slope and shift [T, B, C] of (output - shift) / slope. Without CNC the bias is that of the total
    error."""
    e = statistics.estimate
    slope, shift = np.ones_like(e.bias), np.zeros_like(e.bias)
    if "qdrift" in which:  # the mean of Delta given the quantized output
        beta, centre = _conditional(e)
        return 1 / np.maximum(1 - beta, MIN_DIVISOR), (e.mean_delta - beta * centre) / np.maximum(
            1 - beta, MIN_DIVISOR
        )
    if "cnc" in which:
        near = np.argwhere(1 + e.k < MIN_DIVISOR)
        if len(near):
            step, branch = near[0]
            raise Uncorrectable(
                f"k is {e.k[step, branch]:.3g} in step {step + 1}: cnc would divide by 1 + k ="
                f" {1 + e.k[step, branch]:.3g}; leave it out"
            )
        slope = slope * (1 + e.k)[..., None]
    if "bc" in which:
        shift = e.bias if "cnc" in which else e.mean_delta
    return slope, shift


def _conditional(e: NoiseEstimate) -> tuple[np.ndarray, np.ndarray]:
    """Slope of Delta on eps_q per channel, and the mean of eps_q."""
    spread = e.var_eps + 2 * e.cov_eps_delta + e.var_delta
    beta = np.divide(e.cov_eps_delta + e.var_delta, spread, out=np.zeros_like(spread), where=spread > 0)
    return beta, e.mean_eps + e.mean_delta


def _conditional_variance(statistics: Statistics, step: int) -> np.ndarray:
    """Var(Delta | eps_q) [C], combined over independent branches."""
    e = statistics.estimate
    spread = e.var_eps[step] + 2 * e.cov_eps_delta[step] + e.var_delta[step]
    beta = _conditional(e)[0][step]
    left = np.maximum(e.var_delta[step] - beta**2 * spread, 0)
    return np.asarray(np.array(statistics.about.weights[step]) ** 2 @ left)


def _per_channel(values: np.ndarray, like: Tensor) -> Tensor:
    """Values [C], float32 or as precise as ``like``, that broadcast over [n, C, ...], or over tokens [n,
    tokens, C]."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(
        like.device, torch.promote_types(like.dtype, torch.float32)
    )
    return tensor if like.ndim == 3 else tensor.view(1, -1, *[1] * (like.ndim - 2))


def _states(generator: Any, device: torch.device) -> list[Tensor]:
    """The states of generators, or torch's own for a device."""
    if generator is None:
        return [torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()]
    return [g.get_state() for g in (generator if isinstance(generator, list | tuple) else [generator])]


def _restore(generator: Any, states: Sequence[Tensor], device: torch.device) -> None:
    if generator is None and device.type == "cuda":
        torch.cuda.set_rng_state(states[0], device)
        return
    if generator is None:
        torch.set_rng_state(states[0])
        return
    for g, state in zip(
        generator if isinstance(generator, list | tuple) else [generator], states, strict=True
    ):
        g.set_state(state)


def _replaced(result: Any, sample: Tensor) -> Any:
    """A scheduler's result with another next sample."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def check_correction(scheduler: Any, correction: str | None, eta: float) -> None:
    """Raise AquabitError where a sampler cannot be corrected so: what would be found at its first step,
    before anything is measured."""
    which = parse_correction(correction)
    reason = refuses(scheduler, which) or refuses_eta(scheduler, which, eta)
    if reason:
        raise AquabitError(reason)


def corrected_(denoiser: nn.Module, scheduler: Any, statistics: Statistics, correction: str | None) -> None:
    """Correct a pipeline for good: from now on ``correction`` acts whenever it samples; None takes the
    corrections away."""
    others = [w for w in watchers_of(denoiser) if not isinstance(w, Corrector)]
    follow_(denoiser, scheduler, [*others, Corrector(statistics, correction)])


def statistics_of(denoiser: nn.Module) -> Statistics | None:
    """The noise statistics that a denoiser is corrected by; None where it is not."""
    return next((w.statistics for w in watchers_of(denoiser) if isinstance(w, Corrector)), None)

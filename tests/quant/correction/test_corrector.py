"""Corrections (PTQD) on chains whose answer is known, and the mistakes of the released code."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aquabit.quant.correction.corrector import Corrector, matched_direction
from aquabit.quant.correction.noise import NoiseSums, estimate
from aquabit.quant.correction.samplers import prediction_type, step_facts
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.quant.correction.statistics import Statistics
from tests.chains import NOISY, OPEN, STILL, Given, Sampler, drawing, known, sampled

STEPS = 10
M, S0 = np.array([0.4, -0.7]), np.array([0.5, 0.3])  # the data: N(m, s0^2) in each channel
K, BIAS = -0.12, np.array([0.1, -0.05])


# ---- a linear Gaussian chain


def exact(kind: str, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """p and q [C] of the perfect denoiser's output p x + q: the posterior mean of what it predicts."""
    total = alpha**2 * S0**2 + sigma**2
    x0 = alpha * S0**2 / total, M - alpha * S0**2 / total * alpha * M
    eps = sigma / total, -sigma / total * alpha * M
    if kind == "epsilon":
        return eps
    first, second = (
        (eps, x0) if kind == "flow" else ((alpha * eps[0], alpha * eps[1]), (sigma * x0[0], sigma * x0[1]))
    )
    return first[0] - second[0], first[1] - second[1]


def levels(sampler: Sampler, steps: int = STEPS) -> list[Any]:
    """The facts of all steps."""
    scheduler, found = sampler.made(steps), []
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = i
        found.append(step_facts(scheduler, t, sampler.eta))
    return found


def affine(sampler: Sampler, watchers: list[Watcher], steps: int = STEPS) -> list[tuple[np.ndarray, ...]]:
    """Each step's response [C] to sample, raw output and drawn noise, and its constant, taken from the
    sampler itself."""
    unit = torch.eye(4, dtype=torch.float64)[
        :, :3
    ]  # images that are 1 in the sample, the output or the noise; and none
    given = [unit[:, i].view(4, 1, 1, 1).expand(4, 2, 1, 1) for i in range(3)]
    denoiser, scheduler, found = Given(lambda x, t: given[1]), sampler.made(steps), []
    extra = {"eta": sampler.eta} if sampler.name.startswith("DDIM") else {}
    with following(denoiser, scheduler, watchers), drawing(given[2]):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(given[0], t)
            after = (
                scheduler.step(denoiser(given[0], t), t, given[0], **extra)
                .prev_sample.double()[..., 0, 0]
                .numpy()
            )
            found.append((after[0] - after[3], after[1] - after[3], after[2] - after[3], after[3]))
    return found


def ended(
    sampler: Sampler, steps: list[tuple[np.ndarray, ...]], k: float, bias: Any, spread: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [C] of the last sample where the raw output is (1 + k) (p x + q) + bias
    + N(0, spread[step])."""
    kind, facts = prediction_type(sampler.made(STEPS)), levels(sampler, len(steps))
    mean, var = facts[0].alpha * M, facts[0].alpha ** 2 * S0**2 + facts[0].sigma ** 2
    for (on_sample, on_output, on_noise, constant), fact, extra in zip(steps, facts, spread, strict=True):
        p, q = exact(kind, fact.alpha, fact.sigma)
        slope = on_sample + on_output * (1 + k) * p
        mean = slope * mean + on_output * ((1 + k) * q + bias) + constant
        var = slope**2 * var + on_output**2 * extra + on_noise**2
    return mean, np.sqrt(var)


def residuals(sampler: Sampler, share: float, k: float = K) -> np.ndarray:
    """Variances [T, C] of the raw residual that fill ``share`` of each step's noise, less in the second
    channel."""
    rows = [
        share * f.noise**2 / f.coefficient**2 * (1 + k) ** 2 if f.coefficient else 0.0
        for f in levels(sampler)
    ]
    return np.array(rows)[:, None] * np.array([1.0, 0.4])


def corrector(sampler: Sampler, correction: str, spread: np.ndarray, **changes: Any) -> Corrector:
    given = {"k": K, "bias": BIAS, "variance": spread[:, None, :]} | changes
    return Corrector(known(sampler.made(STEPS), **given), correction)


V_PREDICTIONS = [
    Sampler(s.name, s.settings | {"prediction_type": "v_prediction"}, s.eta)
    for s in NOISY
    if s.name[:4] != "Flow"
]


@pytest.mark.parametrize("sampler", [*NOISY, *V_PREDICTIONS], ids=str)
def test_corrected_chains_end_as_full_precision_does(sampler: Sampler) -> None:
    spread = residuals(sampler, 0.7)
    assert (spread[:-1] > 0).all()
    mean, deviation = ended(sampler, affine(sampler, []), 0.0, 0.0, 0 * spread)
    found = ended(sampler, affine(sampler, [corrector(sampler, "cnc+bc+vsc", spread)]), K, BIAS, spread)
    np.testing.assert_allclose(found[0], mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], deviation, rtol=1e-6)
    without = ended(sampler, affine(sampler, [corrector(sampler, "cnc+bc", spread)]), K, BIAS, spread)
    np.testing.assert_allclose(without[0], mean, rtol=1e-6, atol=1e-6)
    assert (without[1] > deviation * 1.003).all()
    assert (np.abs(ended(sampler, affine(sampler, []), K, BIAS, spread)[0] - mean) > 0.01).any()


@pytest.mark.parametrize("sampler", NOISY, ids=str)
def test_no_noise_is_left_where_the_residual_is_more(sampler: Sampler) -> None:
    for (_, _, noise, _), (_, _, before, _) in zip(
        affine(sampler, [corrector(sampler, "cnc+vsc", residuals(sampler, 1.5))]),
        affine(sampler, []),
        strict=True,
    ):
        assert noise[0] == pytest.approx(0, abs=1e-7 + 1e-7 * before[0])
        np.testing.assert_allclose(noise[1], before[1] * sqrt(1 - 1.5 * 0.4), rtol=1e-5, atol=1e-7)


class _Overriding(Watcher):
    """The released code: the smaller variance replaces the sampler's own, so that the direction term takes
    it too."""

    def __init__(self, spread: np.ndarray, eta: float):
        self.spread, self.eta = spread, eta

    def advance(self, step: int, run: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler = run.__self__
        facts = step_facts(scheduler, args[1], self.eta)
        less = max(facts.noise**2 - facts.coefficient**2 * float(self.spread[step, 0]), 0.0) / self.eta**2
        scheduler._get_variance = lambda *_: torch.tensor(less, dtype=torch.float64)
        try:
            return run(*args, **kwargs)
        finally:
            del scheduler._get_variance


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_direction_term_keeps_the_samplers_own_noise(eta: float) -> None:
    """Final deviation with sigma_t overwritten before the direction term: off by a percent; with the
    smaller noise alone: exact."""
    sampler = Sampler("DDIMScheduler", OPEN, eta)
    spread = residuals(sampler, 0.5, k=0.0)
    exactly = ended(sampler, affine(sampler, []), 0.0, 0.0, 0 * spread)[1]
    ours = ended(
        sampler, affine(sampler, [corrector(sampler, "vsc", spread, k=0.0, bias=0.0)]), 0.0, 0.0, spread
    )[1]
    theirs = ended(sampler, affine(sampler, [_Overriding(spread, eta)]), 0.0, 0.0, spread)[1]
    np.testing.assert_allclose(ours, exactly, rtol=1e-6)
    assert theirs[0] > exactly[0] * 1.01


def test_ddims_variance_is_never_overridden() -> None:
    sampler = Sampler("DDIMScheduler", OPEN, 1.0)
    seen = []

    class Spy(Watcher):
        def advance(self, step: int, run: Any, *args: Any, **kwargs: Any) -> Any:
            assert "_get_variance" not in vars(run.__self__)
            assert ("variance_noise" in kwargs) == (step < STEPS - 1)
            seen.append(step)
            return run(*args, **kwargs)

    affine(sampler, [corrector(sampler, "cnc+bc+vsc", residuals(sampler, 0.5)), Spy()])
    assert seen == list(range(STEPS))


@pytest.mark.parametrize("sampler", NOISY, ids=str)
def test_corrected_chains_by_simulation(sampler: Sampler) -> None:
    """Real random numbers, one pixel a channel: the deviation of the last samples within four standard
    errors."""
    n, spread = 20_000, residuals(sampler, 0.7)
    facts, kind = levels(sampler), prediction_type(sampler.made(STEPS))
    mean, deviation = ended(sampler, affine(sampler, []), 0.0, 0.0, 0 * spread)
    generator, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)

    def start() -> Tensor:
        noise = torch.randn(n, 2, 1, 1, generator=own, dtype=torch.float64)
        level = np.sqrt(facts[0].alpha ** 2 * S0**2 + facts[0].sigma ** 2)
        return noise * torch.from_numpy(level).view(1, 2, 1, 1) + torch.from_numpy(facts[0].alpha * M).view(
            1, 2, 1, 1
        )

    for correction, near in (("cnc+bc+vsc", True), ("cnc+bc", False)):
        step = iter(range(STEPS))

        def quantized(x: Tensor, t: Any, step=step) -> Tensor:
            i = next(step)
            p, q = (torch.from_numpy(v).view(1, 2, 1, 1) for v in exact(kind, facts[i].alpha, facts[i].sigma))
            r = torch.from_numpy(np.sqrt(spread[i]).astype(float)).view(1, 2, 1, 1)
            return (
                (1 + K) * (p * x + q)
                + torch.from_numpy(BIAS).view(1, 2, 1, 1)
                + r * torch.randn(x.shape, generator=own, dtype=x.dtype)
            )

        denoiser, scheduler = Given(quantized), sampler.made(STEPS)
        with following(denoiser, scheduler, [corrector(sampler, correction, spread)]):
            last = (
                sampled(denoiser, scheduler, start(), STEPS, sampler.eta, generator)[..., 0, 0]
                .double()
                .numpy()
            )
        error = deviation / sqrt(2 * n)
        assert (np.abs(last.mean(0) - mean) < 4 * deviation / sqrt(n)).all()
        assert (np.abs(last.std(0) - deviation) < 4 * error).all() == near, (last.std(0), deviation)


# ---- the matched sampler and Q-Drift


@pytest.mark.parametrize("sampler", STILL[:2], ids=str)
def test_a_matched_chain_is_the_noisy_samplers(sampler: Sampler) -> None:
    """The residual stands for noise of s^2 = C(s)^2 v: every step's mean and variance are those of the
    sampler that adds s, in full precision; and the end is near full precision's, without noise, where
    leaving the residual in is not."""
    facts, variance = levels(sampler), 0.02
    spread = np.full((STEPS, 2), variance)
    spread[-1] = 0
    rooted = [matched_direction(f, np.array([variance]))[0] < f.sigma_next for f in facts[:-1]]
    spread[:-1][~np.array(rooted)] = 0
    assert sum(rooted) >= 5
    found = affine(sampler, [corrector(sampler, "match", spread, k=0.0, bias=0.0)])
    noisy = []
    for f, step, v in zip(facts, affine(sampler, []), spread, strict=True):
        t = f.sigma_next
        if v[0]:  # solved here by bisection from above
            low, high = f.alpha_next * f.sigma / f.alpha * v[0] / (1 + v[0]), f.sigma_next
            low = max(low, 0.0)
            for _ in range(200):
                t = (low + high) / 2
                left = f.sigma_next**2 - t**2 - (t - f.alpha_next * f.sigma / f.alpha) ** 2 * v[0]
                low, high = (t, high) if left > 0 else (low, t)
        s = sqrt(max(f.sigma_next**2 - t**2, 0.0))
        noisy.append((step[0], step[1] + (t - f.sigma_next), np.full(2, s), step[3]))
    matched = ended(sampler, found, 0.0, 0.0, spread)
    expected = ended(sampler, noisy, 0.0, 0.0, 0 * spread)
    np.testing.assert_allclose(matched[0], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(matched[1], expected[1], rtol=2e-6)
    still = ended(sampler, affine(sampler, []), 0.0, 0.0, 0 * spread)[1]
    left = ended(sampler, affine(sampler, []), 0.0, 0.0, spread)[1]
    assert (np.abs(matched[1] - still) < 0.5 * np.abs(left - still)).all()


def test_qdrift_takes_the_mean_of_the_error_given_the_output() -> None:
    """u - eps has mean 0 and no correlation with the quantized output."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(1, 64, 2, 16, 16, generator=generator, dtype=torch.float64) + torch.tensor(
        [1.0, -1.0]
    ).view(1, 1, 2, 1, 1)
    quantized = 1.2 * eps + 0.3 + 0.4 * torch.randn(eps.shape, generator=generator, dtype=torch.float64)
    sums = NoiseSums()
    sums.add(eps, quantized)
    e = estimate(*(s.sum(0) for s in sums.joined()))
    sampler = STILL[0]
    base = known(sampler.made(1))
    stacked = type(e)(*(np.stack([v]) for v in vars(e).values()))
    u = Corrector(Statistics(base.about, stacked, stacked, stacked).checked(), "qdrift")
    u.begin(sampler.made(1))
    left = u.output(0, 0, quantized[0]) - eps[0]
    for c in range(2):
        own, rest = quantized[0, :, c].flatten(), left[:, c].flatten()
        assert abs(float(rest.mean())) < 1e-6
        assert abs(float(((own - own.mean()) * rest).mean())) < 1e-6


# ---- nothing to correct


def _accepted() -> list[tuple[Sampler, str]]:
    cases = [(s, c) for s in (*NOISY, *STILL) for c in ("cnc", "bc", "cnc+bc")]
    cases += [(s, c) for s in NOISY for c in ("vsc", "cnc+bc+vsc")]
    return cases + [(s, c) for s in STILL[:2] for c in ("match", "cnc+bc+match", "qdrift")]


@pytest.mark.parametrize(("sampler", "correction"), _accepted(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_zero_change_no_bit(sampler: Sampler, correction: str, dtype: torch.dtype) -> None:
    """Images, and the states in which the generators end; with guidance and without, one generator an
    image and torch's own."""
    torch.manual_seed(0)
    weight = torch.randn(2, 2, dtype=dtype) / 2
    for guidance, many in ((None, True), (None, False), (3.0, True), (3.0, False)):

        def give(x: Tensor, t: Any, guided=guidance is not None) -> Tensor:
            y = torch.einsum("oc,nchw->nohw", weight, x.to(dtype)).tanh()
            return torch.cat([y[: len(y) // 2], y[len(y) // 2 :] * 1.25]) if guided else y

        def made(watched: bool, give=give, guidance=guidance, many=many) -> tuple[Tensor, list[Tensor]]:
            scheduler, denoiser = sampler.made(4), Given(give)
            generators = [torch.Generator().manual_seed(i) for i in range(3)] if many else None
            torch.manual_seed(5)
            x = torch.randn(3, 2, 4, 4, dtype=dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
            weights = (1.0,) if guidance is None else (1 - guidance, guidance)
            with following(
                denoiser,
                scheduler,
                [Corrector(known(scheduler, weights=weights), correction)] if watched else [],
            ):
                image = sampled(denoiser, scheduler, x, 4, sampler.eta, generators, guidance)
            return image, [g.get_state() for g in generators or []] + [torch.get_rng_state()]

        (plain, states), (found, after) = made(False), made(True)
        assert plain.dtype == found.dtype and torch.equal(plain, found)
        assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("many", [True, False], ids=["generators", "torch's own"])
@pytest.mark.parametrize("sampler", NOISY, ids=str)
def test_the_smaller_noise_is_the_samplers_own_draw(sampler: Sampler, many: bool, dtype: torch.dtype) -> None:
    """s' / s times the same random numbers, and generators that end where they would."""

    def made(watched: bool) -> tuple[Tensor, list[Tensor]]:
        scheduler, denoiser = sampler.made(STEPS), Given(lambda x, t: torch.zeros(2, 2, 16, 16, dtype=dtype))
        generators = [torch.Generator().manual_seed(i) for i in range(2)] if many else None
        torch.manual_seed(3)
        own = corrector(sampler, "vsc", residuals(sampler, 0.75, k=0.0), k=0.0, bias=0.0)
        extra = {"eta": sampler.eta} if sampler.name.startswith("DDIM") else {}
        with following(denoiser, scheduler, [own] if watched else []):
            scheduler.set_timesteps(STEPS)
            t, zero = scheduler.timesteps[0], torch.zeros(2, 2, 16, 16, dtype=dtype)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(zero, t)
            after = scheduler.step(denoiser(zero, t), t, zero, generator=generators, **extra).prev_sample
        return after, [g.get_state() for g in generators or []] + [torch.get_rng_state()]

    (full, states), (less, after) = made(False), made(True)
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True)) and full.std() > 0
    rtol = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(less[:, 0], full[:, 0] / 2, rtol=rtol, atol=float(full.std()) * rtol)
    torch.testing.assert_close(
        less[:, 1], full[:, 1] * sqrt(1 - 0.3), rtol=rtol, atol=float(full.std()) * rtol
    )

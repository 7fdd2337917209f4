"""Estimates of the noise that quantization adds: against plain loops, against what was put in, and the
cover of their intervals."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch

from aquabit.quant.correction.noise import NoiseEstimate, NoiseSums, bootstrap, estimate
from aquabit.scheme import AquabitError

SHAPES = {"images": (4, 3, 5, 6), "tokens": (4, 7, 3), "video": (4, 3, 2, 3, 4)}


def estimated(eps: torch.Tensor, quantized: torch.Tensor) -> NoiseEstimate:
    sums = NoiseSums()
    sums.add(eps, quantized)
    own, cross = sums.joined()
    return estimate(own.sum(0), cross.sum(0))


def pixels(x: np.ndarray, channel: int) -> list[float]:
    """All values of one channel of [n, c, ...] or tokens [n, t, c], in one order."""
    found = []
    for image in x:
        plane = image[:, channel] if x.ndim == 3 else image[channel]
        found += [float(v) for v in plane.reshape(-1)]
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def covariance(a: list[float], b: list[float]) -> float:
    ma, mb = mean(a), mean(b)
    return sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True)) / len(a)


def by_loops(eps: np.ndarray, quantized: np.ndarray) -> dict[str, np.ndarray]:
    """Every field of NoiseEstimate in two passes: means first, then sums of deviations; the residual is
    made, not multiplied out."""
    branches, channels = len(eps), eps.shape[-1] if eps.ndim == 4 else eps.shape[2]
    out: dict[str, np.ndarray] = {}
    for name in ("bias", "variance", "mean_eps", "mean_delta", "var_eps", "cov_eps_delta", "var_delta"):
        out[name] = np.zeros((branches, channels))
    for name in ("k", "r2", "kurtosis", "snr"):
        out[name] = np.zeros(branches)
    out["covariance"] = np.zeros((branches, branches, channels))
    residuals = {}
    for b in range(branches):
        e = [pixels(eps[b], c) for c in range(channels)]
        d = [[y - x for x, y in zip(e[c], pixels(quantized[b], c), strict=True)] for c in range(channels)]
        for c in range(channels):
            out["mean_eps"][b, c], out["mean_delta"][b, c] = mean(e[c]), mean(d[c])
            out["var_eps"][b, c], out["var_delta"][b, c] = covariance(e[c], e[c]), covariance(d[c], d[c])
            out["cov_eps_delta"][b, c] = covariance(e[c], d[c])
        k = sum(out["cov_eps_delta"][b]) / sum(out["var_eps"][b])
        out["k"][b] = k
        fourths = []
        for c in range(channels):
            r = [y - k * x for x, y in zip(e[c], d[c], strict=True)]
            residuals[b, c] = r
            out["bias"][b, c], out["variance"][b, c] = mean(r), covariance(r, r)
            fourths.append(mean([(v - mean(r)) ** 4 for v in r]) / covariance(r, r) ** 2 - 3)
        out["kurtosis"][b] = mean(fourths)
        out["r2"][b] = 1 - sum(out["variance"][b]) / sum(out["var_delta"][b])
        out["snr"][b] = (sum(v * v for row in e for v in row) / sum(v * v for row in d for v in row)) ** 0.5
    for a, b, c in product(range(branches), range(branches), range(channels)):
        out["covariance"][a, b, c] = covariance(residuals[a, c], residuals[b, c])
    return out


def noisy(
    shape: tuple[int, ...], branches: int, seed: int, scale: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """eps with means per channel, and a skewed error that is correlated with it and between branches."""
    rng = np.random.default_rng(seed)
    across = (1, -1) if len(shape) == 3 else (1, -1, *[1] * (len(shape) - 2))
    channels = shape[-1] if len(shape) == 3 else shape[1]
    shift = rng.normal(size=channels).reshape(across)
    shared = rng.exponential(size=shape)
    eps = np.stack([rng.normal(size=shape) + shift for _ in range(branches)])
    error = np.stack(
        [
            0.2 * (b + 1) * eps[b] + scale * (shared + rng.normal(size=shape)) + 0.1 * b
            for b in range(branches)
        ]
    )
    return torch.from_numpy(eps), torch.from_numpy(eps + error)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_field_equals_plain_loops(kind: str, branches: int) -> None:
    eps, quantized = noisy(SHAPES[kind], branches, seed=branches)
    found, expected = estimated(eps, quantized), by_loops(eps.numpy(), quantized.numpy())
    assert {f.name for f in fields(NoiseEstimate)} == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_small_errors_of_large_outputs_keep_their_digits() -> None:
    """8 bits leave errors of a thousandth: float32 outputs, sums in float64."""
    eps, _ = noisy(SHAPES["images"], 2, seed=3)
    eps = (eps + 5).float()
    quantized = eps + 1e-3 * torch.randn(eps.shape, generator=torch.Generator().manual_seed(0))
    found, expected = estimated(eps, quantized), by_loops(eps.double().numpy(), quantized.double().numpy())
    for name in ("k", "bias", "variance", "covariance"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-5, atol=1e-12, err_msg=name)


def test_batches_add_up() -> None:
    eps, quantized = noisy(SHAPES["images"], 2, seed=4)
    parts = NoiseSums()
    for i in range(4):
        parts.add(eps[:, i : i + 1], quantized[:, i : i + 1])
    own, cross = parts.joined()
    assert len(own) == len(cross) == 4
    whole, found = estimated(eps, quantized), estimate(own.sum(0), cross.sum(0))
    for f in fields(NoiseEstimate):
        np.testing.assert_allclose(getattr(found, f.name), getattr(whole, f.name), rtol=1e-12)


def test_no_noise_at_all() -> None:
    eps, _ = noisy(SHAPES["images"], 2, seed=5)
    sums = NoiseSums()
    sums.add(eps, eps)
    for found in (estimated(eps, eps), *bootstrap(*sums.joined())):
        for f in fields(NoiseEstimate):
            value = getattr(found, f.name)
            if f.name == "snr":
                assert np.isposinf(value).all()
            elif f.name not in ("mean_eps", "var_eps"):
                assert not np.any(value), f.name


def test_constant_outputs_have_no_slope() -> None:
    eps = torch.full((1, 2, 3, 4, 4), 0.7)
    found = estimated(eps, eps + 0.25)
    assert found.k == 0 and np.allclose(found.bias, 0.25) and np.allclose(found.variance, 0) and found.r2 == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["full", "quantized"])
def test_outputs_that_are_not_finite_are_refused(bad: float, where: str) -> None:
    eps, quantized = noisy(SHAPES["images"], 1, seed=6)
    (eps if where == "full" else quantized)[0, 2, 1, 3, 3] = bad
    with pytest.raises(AquabitError, match="NaN or infinity"):
        NoiseSums().add(eps, quantized)


def test_intervals_need_two_images() -> None:
    sums = NoiseSums()
    sums.add(*(x[:, :1] for x in noisy(SHAPES["images"], 1, seed=7)))
    with pytest.raises(AquabitError, match="at least 2 images, got 1"):
        bootstrap(*sums.joined())


# ---- what was put in

K, BIAS, SIGMA = np.array([0.15, -0.08]), np.array([0.05, -0.2, 0.4]), np.array([0.1, 0.2, 0.3])
CENTRE = np.array([1.0, -2.0, 0.5])  # channel means of eps
RHO = 0.6  # correlation of the residuals of two guidance branches


def simulated(
    seed: int, images: int, effect: float, branches: int = 1, side: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """eps_q = (1 + k) eps + bias + residual. ``effect`` is the share of the residual's variance that a whole
    image has in common.

    Returns the sums of ``NoiseSums``.
    """
    rng = np.random.default_rng(seed)
    shape = (images, 3, side, side)
    down = (1, 3, 1, 1)

    def residual() -> np.ndarray:
        per_image = rng.normal(size=(images, 3, 1, 1)) * np.sqrt(effect)
        return (per_image + rng.normal(size=shape) * np.sqrt(1 - effect)) * SIGMA.reshape(down)

    shared = residual()
    eps, quantized = [], []
    for b in range(branches):
        e = rng.normal(size=shape) + CENTRE.reshape(down)
        r = np.sqrt(RHO) * shared + np.sqrt(1 - RHO) * residual()
        eps.append(e)
        quantized.append(e * (1 + K[b]) + (BIAS.reshape(down) + r))
    sums = NoiseSums()
    sums.add(torch.from_numpy(np.stack(eps)), torch.from_numpy(np.stack(quantized)))
    return sums.joined()


@pytest.mark.parametrize(("effect", "least"), [(0.0, 90), (0.2, 87)])
def test_intervals_cover_the_truth(effect: float, least: int) -> None:
    """Nominal 95 %, over 100 seeds: 90 to 99 of them for k, bias, variance and covariance on average over
    branches and channels.

    Each single one too, but for variances where whole images differ: those are skewed, which quantiles of
    resampled ones miss in part (91 to 92 % over many seeds, at 64 images).
    """
    truth = {
        "k": K,
        "bias": np.tile(BIAS, (2, 1)),
        "variance": np.tile(SIGMA**2, (2, 1)),
        "covariance": np.array([[SIGMA**2, RHO * SIGMA**2], [RHO * SIGMA**2, SIGMA**2]]),
    }
    hits = {name: np.zeros(value.shape) for name, value in truth.items()}
    for seed in range(100):
        low, high = bootstrap(*simulated(seed, 64, effect, branches=2, side=6), seed=seed)
        for name, value in truth.items():
            hits[name] += (getattr(low, name) <= value) & (value <= getattr(high, name))
    for name, count in hits.items():
        assert 90 <= count.mean() <= 99 and count.min() >= least, (name, count)


# ---- mistakes of the released code


def large() -> NoiseEstimate:
    own, cross = simulated(0, 64, 0.0, branches=2, side=16)
    return estimate(own.sum(0), cross.sum(0))


def test_the_slope_is_that_within_channels() -> None:
    """Errors with a mean per channel lie on another line across channels: a pooled slope would be far off."""
    found = large()
    np.testing.assert_allclose(found.k, K, atol=0.006)
    pooled_e, pooled_d = found.mean_eps[0], found.mean_delta[0]
    between = ((pooled_e - pooled_e.mean()) * (pooled_d - pooled_d.mean())).mean()
    pooled = (found.cov_eps_delta[0].mean() + between) / (found.var_eps[0].mean() + pooled_e.var())
    assert abs(pooled - K[0]) > 0.03


def test_the_bias_is_that_of_the_residual() -> None:
    """The total error's mean holds k mean(eps) too, which dividing by 1 + k takes away a second time."""
    found = large()
    np.testing.assert_allclose(found.bias, np.tile(BIAS, (2, 1)), atol=0.02)
    np.testing.assert_allclose(found.mean_delta, BIAS + K[:, None] * CENTRE, atol=0.02)
    assert np.abs(found.mean_delta - found.bias).max() > 0.2


def test_the_variance_is_that_of_all_pixels() -> None:
    """What images differ by counts: the mean of the standard deviations within images would miss it."""
    own, cross = simulated(0, 400, 0.5, side=4)
    found = estimate(own.sum(0), cross.sum(0))
    np.testing.assert_allclose(found.variance[0], SIGMA**2, rtol=0.12)
    within = estimate(own, cross).variance[:, 0]  # leading dimension: images
    assert (np.sqrt(within).mean(0) ** 2 < 0.65 * found.variance[0]).all()


def test_kurtosis_tells_normal_from_heavy_tails() -> None:
    rng = np.random.default_rng(0)
    eps = torch.from_numpy(rng.normal(size=(1, 16, 2, 16, 16)))
    normal = estimated(eps, 1.1 * eps + torch.from_numpy(rng.normal(size=eps.shape)))
    heavy = estimated(eps, 1.1 * eps + torch.from_numpy(rng.laplace(size=eps.shape)))
    assert abs(normal.kurtosis[0]) < 0.2 and 2.2 < heavy.kurtosis[0] < 3.8  # 0 and 3

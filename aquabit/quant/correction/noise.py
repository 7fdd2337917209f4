"""The noise that quantization adds to a denoiser's output: Delta = eps_q - eps = k eps + r (PTQD, section
3.2), per step and branch.

Sums over pixels of products of eps and Delta are kept for every image in float64, so that nothing but them
has to be stored, and so that images, not pixels, are what intervals resample.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations
from math import factorial

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from aquabit.scheme import AquabitError

ORDER = 4  # moments up to the fourth: what the kurtosis of the residual takes
POWERS = [(p, q) for p in range(ORDER + 1) for q in range(ORDER + 1 - p)]  # of eps and Delta
PLACE = {power: i for i, power in enumerate(POWERS)}
# powers of eps, Delta in one branch and eps, Delta in another
CROSS = ((1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1))


class Uncorrectable(AquabitError):
    """A configuration's noise has no correction: its outputs are not finite, or cnc would divide by nearly
    nothing."""


def channels_last(x: Tensor) -> Tensor:
    """[n, pixels, channels] of images [n, c, ...] or of tokens [n, tokens, c]."""
    return x if x.ndim == 3 else x.flatten(2).mT


class NoiseSums:
    """Sums of one step: ``add`` what the denoiser gave for some images, in all branches of guidance."""

    def __init__(self) -> None:
        self.own: list[np.ndarray] = []  # each [images, branches, channels, len(POWERS)]
        self.cross: list[np.ndarray] = []  # each [images, pairs of branches, channels, 4]

    def add(self, eps: Tensor, quantized: Tensor) -> None:
        """``eps`` and ``quantized`` [branches, images, ...] as full precision and the quantized denoiser
        give them for the same inputs."""
        branches = [channels_last(e).double() for e in eps]
        errors = [channels_last(q).double() - e for q, e in zip(quantized, branches, strict=True)]
        if not all(bool(torch.isfinite(e).all()) for e in errors):
            raise Uncorrectable(
                "the denoiser's outputs hold NaN or infinity; a correction cannot be measured for this"
                " configuration"
            )
        self.own.append(
            torch.stack([_sums(e, d) for e, d in zip(branches, errors, strict=True)], 1).cpu().numpy()
        )
        pairs = [
            _cross((branches[a], errors[a]), (branches[b], errors[b]))
            for a, b in combinations(range(len(branches)), 2)
        ]
        shape = (len(branches[0]), 0, branches[0].shape[2], len(CROSS))
        self.cross.append(torch.stack(pairs, 1).cpu().numpy() if pairs else np.zeros(shape))

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Both sums of all images."""
        return np.concatenate(self.own), np.concatenate(self.cross)


def _sums(eps: Tensor, delta: Tensor) -> Tensor:
    """[images, channels, len(POWERS)] of [images, pixels, channels]."""
    powers = [torch.stack([x**i for i in range(ORDER + 1)]) for x in (eps, delta)]
    return torch.stack([(powers[0][p] * powers[1][q]).sum(1) for p, q in POWERS], -1)


def _cross(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    pairs = [(a[0], b[0]), (a[0], b[1]), (a[1], b[0]), (a[1], b[1])]
    return torch.stack([(x * y).sum(1) for x, y in pairs], -1)


@dataclass(frozen=True)
class NoiseEstimate:
    """What one step's sums say. B branches, C channels; everything float64.

    ``k`` [B] is the within-channel slope of Delta on eps, ``bias`` and ``variance`` [B, C] are mean and
    variance of r = Delta - k eps, ``covariance`` [B, B, C] that of r between branches. ``r2`` and
    ``kurtosis`` (excess, mean over channels) [B] say how good the line is and how normal what it leaves;
    ``snr`` [B] is ||eps|| / ||Delta||. ``mean_eps``, ``mean_delta``, ``var_eps``, ``cov_eps_delta`` and
    ``var_delta`` [B, C] are the moments behind them.
    """

    k: np.ndarray
    bias: np.ndarray
    variance: np.ndarray
    covariance: np.ndarray
    r2: np.ndarray
    kurtosis: np.ndarray
    snr: np.ndarray
    mean_eps: np.ndarray
    mean_delta: np.ndarray
    var_eps: np.ndarray
    cov_eps_delta: np.ndarray
    var_delta: np.ndarray


def estimate(own: np.ndarray, cross: np.ndarray) -> NoiseEstimate:
    """From sums over images, own [..., B, C, len(POWERS)] and cross [..., pairs, C, 4]; leading dimensions
    (replicates) are kept.

    The slope is that within channels (a pooled one would take differences between the channels' means for
    slope), the bias that of the residual: the total error's would count k mean(eps) twice.
    """
    count = own[..., PLACE[0, 0]]
    mean = own / count[..., None]
    e, d = mean[..., PLACE[1, 0]], mean[..., PLACE[0, 1]]
    vee = mean[..., PLACE[2, 0]] - e * e
    ved = mean[..., PLACE[1, 1]] - e * d
    vdd = mean[..., PLACE[0, 2]] - d * d
    total = vee.sum(-1)
    k = np.divide(ved.sum(-1), total, out=np.zeros_like(total), where=total > 0)
    slope = k[..., None]
    bias = d - slope * e
    variance = np.maximum(vdd - 2 * slope * ved + slope**2 * vee, 0)
    spread = vdd.sum(-1)
    r2 = 1 - np.divide(variance.sum(-1), spread, out=np.ones_like(spread), where=spread > 0)
    energy = mean[..., PLACE[0, 2]].sum(-1)
    snr = np.sqrt(
        np.divide(mean[..., PLACE[2, 0]].sum(-1), energy, out=np.full_like(energy, np.inf), where=energy > 0)
    )
    covariance = _covariance(cross, count, (e, d), k, variance)
    return NoiseEstimate(
        k, bias, variance, covariance, r2, _kurtosis(mean, k, bias, variance), snr, e, d, vee, ved, vdd
    )


def _covariance(
    cross: np.ndarray,
    count: np.ndarray,
    means: tuple[np.ndarray, np.ndarray],
    k: np.ndarray,
    variance: np.ndarray,
) -> np.ndarray:
    """[..., B, B, C] covariance of the residuals of branches."""
    e, d = means
    branches = variance.shape[-2]
    out = np.zeros((*variance.shape[:-2], branches, branches, variance.shape[-1]))
    for a in range(branches):
        out[..., a, a, :] = variance[..., a, :]
    for i, (a, b) in enumerate(combinations(range(branches), 2)):
        ee, ed, de, dd = (cross[..., i, :, j] / count[..., a, :] for j in range(4))
        ka, kb = k[..., a, None], k[..., b, None]
        raw = dd - kb * de - ka * ed + ka * kb * ee
        centre = (d[..., a, :] - ka * e[..., a, :]) * (d[..., b, :] - kb * e[..., b, :])
        out[..., a, b, :] = out[..., b, a, :] = raw - centre
    return out


def _kurtosis(mean: np.ndarray, k: np.ndarray, bias: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Excess kurtosis of the residual, mean over channels: the fourth power of (Delta - k eps - bias)
    multiplied out."""
    fourth = np.zeros_like(bias)
    for i in range(ORDER + 1):
        for j in range(ORDER + 1 - i):
            rest = ORDER - i - j
            ways = factorial(ORDER) / (factorial(i) * factorial(j) * factorial(rest))
            fourth = fourth + ways * mean[..., PLACE[j, i]] * (-k[..., None]) ** j * (-bias) ** rest
    return np.asarray(
        np.divide(fourth, variance**2, out=np.full_like(fourth, 3.0), where=variance > 0).mean(-1) - 3
    )


def bootstrap(
    own: np.ndarray, cross: np.ndarray, replicates: int = 400, confidence: float = 0.95, seed: int = 0
) -> tuple[NoiseEstimate, NoiseEstimate]:
    """Lower and upper ends of intervals that resample whole images: pixels of one image are no independent
    observations.

    The deviations of the replicates are widened by sqrt(n / (n - 1)), n images, since resampling n of n
    spreads too little by that factor, and by the ratio of Student's quantile to the normal one. Raises
    AquabitError for fewer than two images.
    """
    images = len(own)
    if images < 2:
        raise AquabitError(f"intervals need at least 2 images, got {images}")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=replicates).astype(float)
    drawn = estimate(*(np.tensordot(weights, sums, 1) for sums in (own, cross)))
    centre = estimate(own.sum(0), cross.sum(0))
    tail = (1 - confidence) / 2
    widen = np.sqrt(images / (images - 1)) * stats.t.ppf(tail, images - 1) / stats.norm.ppf(tail)
    ends = []
    for quantile in (tail, 1 - tail):
        parts = {}
        for field in fields(NoiseEstimate):
            middle = getattr(centre, field.name)
            # infinite SNR less infinite SNR, where there is no noise at all
            with np.errstate(invalid="ignore"):
                moved = np.quantile(getattr(drawn, field.name) - middle, quantile, axis=0)
            parts[field.name] = middle + widen * np.nan_to_num(moved)
        ends.append(NoiseEstimate(**parts))
    return ends[0], ends[1]

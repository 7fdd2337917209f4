"""Distances of whole sets at once, from the parts by which a stream of images is measured."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from aquabit.quality import distances as dist
from aquabit.quality import paired
from aquabit.quality.distances import Array


def frechet_distance(
    mean_a: npt.ArrayLike, cov_a: npt.ArrayLike, mean_b: npt.ArrayLike, cov_b: npt.ArrayLike
) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)) of two Gaussians (Dowson and Landau 1982; Heusel et
    al. 2017, eq. 6)."""
    means = [np.asarray(m, dtype=np.float64) for m in (mean_a, mean_b)]
    return dist.frechet_from_factors(
        means[0], dist.covariance_root(cov_a), means[1], dist.covariance_root(cov_b)
    )


def fid(real: npt.ArrayLike, generated: npt.ArrayLike) -> float:
    """Frechet distance of pooled features [m, d] and [n, d] (Heusel et al. 2017), with covariances over n
    - 1 as in their code."""
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (real, generated))
    if min(len(a), len(b)) < 2:
        return float("nan")
    return dist.frechet_from_factors(
        a.mean(0), dist.covariance_factor(a), b.mean(0), dist.covariance_factor(b)
    )


def sfid(real_spatial: npt.ArrayLike, generated_spatial: npt.ArrayLike) -> float:
    """FID on spatial features [m, s] and [n, s], which see where things are (Nash et al. 2021)."""
    return fid(real_spatial, generated_spatial)


def kid(real: npt.ArrayLike, generated: npt.ArrayLike) -> float:
    """Unbiased squared MMD of features [m, d] and [n, d] under the cubic kernel (Gretton et al. 2012, eq. 3;
    Binkowski et al. 2018).

    Over the full samples, not over random subsets, so it is deterministic; unbiased, so it may be negative.
    """
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (real, generated))
    return dist.kid_from_sums(dist.within_kernel_sum(a), a, b)


def cmmd(real: npt.ArrayLike, generated: npt.ArrayLike) -> float:
    """1000 times the squared MMD of CLIP embeddings [m, d] and [n, d] of length 1 under a Gaussian kernel
    of sigma 10, pairs of a row with itself counted (Jayasumana et al. 2024, eq. 3 and section 4)."""
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (real, generated))
    return dist.cmmd_from_sums(dist.gaussian_kernel_sum(a, a), a, b)


def precision_recall(
    real: npt.ArrayLike, generated: npt.ArrayLike, k: int = dist.NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall of features [m, d] and [n, d] (Kynkaanniemi et al. 2019, eq. 1 and 2),
    k-th nearest neighbour balls."""
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (real, generated))
    return dist.fraction_inside(b, a, dist.neighbour_radii(a, k)), dist.fraction_inside(
        a, b, dist.neighbour_radii(b, k)
    )


def inception_score(logits: npt.ArrayLike) -> float:
    """exp of the mean KL(p(y|x) || p(y)) over images, logits [n, classes], one split: 1 to classes
    (Salimans et al. 2016, section 4)."""
    return dist.inception_score_from_sums(*dist.class_sums(logits), len(np.asarray(logits)))


def psnr(images: Tensor, others: Tensor) -> Array:
    """10 log10(1 / mse) of each image, in dB at data range 1, capped at 100 dB so that identical images have
    a finite value.

    The mean over images is the mean of these, not the PSNR of the mean error.
    """
    return paired.psnr_from_mse(paired.mse(images, others))

"""Distances between sets of features: exact, float64, deterministic functions of numpy arrays [n, d].

The ``*_factors``, ``*_sum`` and ``*_radii`` parts are public so that a Reference computes its side once.
Undefined values (too few rows) are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aquabit.scheme import AquabitError

Array = npt.NDArray[np.float64]
NEIGHBOURS = 3
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_BLOCK = 2048  # rows of a pairwise matrix held at a time


def _rows(features: npt.ArrayLike) -> Array:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise AquabitError(f"features have shape {list(rows.shape)}; expected [n, d]")
    return rows


def _blocks(rows: Array) -> Iterator[Array]:
    return (rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK))


# Frechet distance


def covariance_root(covariance: npt.ArrayLike) -> Array:
    """The symmetric positive semidefinite R [d, d] with R R = covariance.

    Eigenvalues at the level of rounding (below d eps times the largest, or negative) are those of a singular
    covariance and count as 0: the root would raise them from 1e-16 to 1e-8.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    values[values < len(values) * np.finfo(np.float64).eps * values[-1]] = 0.0
    scaled: Array = vectors * np.sqrt(values.clip(0.0))
    root: Array = scaled @ vectors.T
    return root


def covariance_factor(rows: Array) -> Array:
    """F [r, d] with F^T F = the covariance of rows [n, d] over n - 1; r the smaller of n and d."""
    if len(rows) > rows.shape[1]:
        return covariance_root(np.atleast_2d(np.cov(rows, rowvar=False)))
    factor: Array = (rows - rows.mean(0)) / np.sqrt(len(rows) - 1)
    return factor


def frechet_from_factors(mean_a: Array, factor_a: Array, mean_b: Array, factor_b: Array) -> float:
    """``frechet_distance`` where F [r, d] with F^T F = covariance is known of both: a root, or centred rows
    over sqrt(n - 1).

    tr sqrt(sqrt(A) B sqrt(A)) is the sum of the singular values of F_a F_b^T, which keeps twice the digits
    that the eigenvalues of the squared product keep: it matters where a covariance is singular (n <= d).
    """
    shift = mean_a - mean_b
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    value = shift @ shift + (factor_a**2).sum() + (factor_b**2).sum() - 2.0 * cross
    return max(float(value), 0.0)  # rounding may leave -1e-15


# Kernel distance


def polynomial_kernel_sum(x: Array, y: Array) -> float:
    """Sum over all pairs of k(x, y) = (x . y / d + 1)^3 for x [m, d] and y [n, d] (Binkowski et al. 2018,
    section 4)."""
    total = 0.0
    for block in _blocks(x):
        kernel = block @ y.T
        kernel /= x.shape[1]
        kernel += 1.0
        total += float((kernel * kernel * kernel).sum())
    return total


def within_kernel_sum(x: Array) -> float:
    """``polynomial_kernel_sum(x, x)`` without the pairs of a row with itself."""
    own = ((x * x).sum(1) / x.shape[1] + 1.0) ** 3
    return polynomial_kernel_sum(x, x) - float(own.sum())


def kid_from_sums(real_sum: float, real: Array, generated: Array) -> float:
    """``kid`` where ``within_kernel_sum(real)`` is known."""
    m, n = len(real), len(generated)
    if min(m, n) < 2:
        return float("nan")
    return (
        real_sum / (m * (m - 1))
        + within_kernel_sum(generated) / (n * (n - 1))
        - 2.0 * polynomial_kernel_sum(real, generated) / (m * n)
    )


def gaussian_kernel_sum(x: Array, y: Array) -> float:
    """Sum over all pairs of exp(-|x - y|^2 / (2 sigma^2)) - 1, sigma = 10, for x [m, d] and y [n, d].

    The 1 is taken out because CMMD is a difference of such means, each within a thousandth of 1.
    """
    squares, total = (y * y).sum(1), 0.0
    for block in _blocks(x):
        squared = (block * block).sum(1)[:, None] + squares - 2.0 * (block @ y.T)
        total += float(np.expm1(squared.clip(0.0) / (-2.0 * CMMD_SIGMA**2)).sum())
    return total


def cmmd_from_sums(real_sum: float, real: Array, generated: Array) -> float:
    """``cmmd`` where ``gaussian_kernel_sum(real, real)`` is known."""
    m, n = len(real), len(generated)
    cross = gaussian_kernel_sum(real, generated) / (m * n)
    return CMMD_SCALE * (real_sum / m**2 + gaussian_kernel_sum(generated, generated) / n**2 - 2.0 * cross)


# Precision and recall


def _distances(x: Array, y: Array) -> Array:
    """Euclidean distances [m, n] from differences, so that equal rows are exactly 0 apart."""
    result = torch.cdist(
        torch.from_numpy(x), torch.from_numpy(y), compute_mode="donot_use_mm_for_euclid_dist"
    )
    distances: Array = result.numpy()
    return distances


def neighbour_radii(x: Array, k: int = NEIGHBOURS) -> Array:
    """Distance [n] of each row of x [n, d] to its k-th nearest other row; NaN where there are no k others."""
    if len(x) <= k:
        return np.full(len(x), np.nan)
    # place 0 is the row itself
    return np.concatenate([np.partition(_distances(block, x), k, axis=1)[:, k] for block in _blocks(x)])


def fraction_inside(points: Array, centres: Array, radii: Array) -> float:
    """Share of points [n, d] that lie in at least one ball around centres [m, d] with radii [m]; NaN where
    a radius is."""
    if np.isnan(radii).any() or not len(points):
        return float("nan")
    inside = [(_distances(block, centres) <= radii).any(axis=1) for block in _blocks(points)]
    return float(np.concatenate(inside).mean())


# Logits


def class_sums(logits: npt.ArrayLike) -> tuple[Array, float]:
    """What the inception score needs of logits [n, classes]: the sums over images of p [classes] and of p
    log p."""
    z = _rows(logits)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    return p.sum(0), float((p * log_p).sum())


def inception_score_from_sums(probabilities: Array, negative_entropy: float, count: int) -> float:
    """``inception_score`` where the sums of ``class_sums`` over all ``count`` images are known."""
    marginal = probabilities / count
    log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))  # p log p = 0 at p = 0
    return float(np.exp(negative_entropy / count - (marginal * log_marginal).sum()))


def accuracy(logits: npt.ArrayLike, labels: Any) -> float:
    """Share of images whose highest logit [n, classes] is the class [n] that was asked for."""
    z, wanted = _rows(logits), np.asarray(labels)
    if wanted.shape != (len(z),):
        raise AquabitError(f"labels have shape {list(wanted.shape)}; expected [{len(z)}]")
    return float((z.argmax(1) == wanted).mean())

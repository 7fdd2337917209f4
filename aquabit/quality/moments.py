"""Mean and covariance of a stream of rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aquabit.quality.distances import Array, covariance_factor, covariance_root


class Moments:
    """Mean [d] and covariance [d, d] of all rows given so far, float64 (pairwise merging: Chan, Golub and
    LeVeque 1983).

    Up to d rows are kept as they are, no more than the covariance takes: their distances cost far less than
    those of d x d matrices.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(())  # broadcasts until the first batch gives it its width
        self._scatter: Array = np.zeros(())
        self._rows: list[Array] = []

    def update(self, rows: npt.ArrayLike) -> None:
        """Take in rows [n, d]."""
        batch = np.asarray(rows, dtype=np.float64)
        mean = batch.mean(0)
        centred, shift = batch - mean, mean - self.mean
        total = self.count + len(batch)
        self._scatter = (
            self._scatter + centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        )
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total
        self._rows = [*self._rows, batch] if total <= batch.shape[1] else []

    @property
    def covariance(self) -> Array:
        """Over count - 1, as numpy.cov; NaN for fewer than two rows."""
        result: Array = (
            self._scatter / (self.count - 1) if self.count > 1 else np.full_like(self._scatter, np.nan)
        )
        return result

    @property
    def factor(self) -> Array:
        """F [r, d] with F^T F = covariance, r the smaller of count and d; for
        ``distances.frechet_from_factors``."""
        return (
            covariance_factor(np.concatenate(self._rows)) if self._rows else covariance_root(self.covariance)
        )

"""FeatureStatistics: what metrics need of a stream of features, in a size that does not grow with the
number of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from aquabit.quality import distances
from aquabit.quality.distances import Array
from aquabit.quality.features import Features
from aquabit.quality.moments import Moments

KEPT = 10_000  # rows that KID, CMMD, precision and recall see of either side
_KEPT_SEED = 20_240_117


class Reservoir:
    """At most ``limit`` rows of a stream of rows [n, d]: all of them, or a uniform sample of them that does
    not depend on the batches.

    Every row draws a number, and the lowest ``limit`` stay. Never holds more than twice as many.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self.limit, self.seen, self._rng = limit, 0, np.random.default_rng(_KEPT_SEED)
        self._rows: list[npt.NDArray[Any]] = []
        self._draws: list[Array] = []

    def update(self, rows: npt.NDArray[Any]) -> None:
        """Take in rows [n, d]."""
        for part in np.split(rows, range(self.limit, len(rows), self.limit)):
            self._rows.append(np.array(part))
            self._draws.append(self._rng.random(len(part)))
            self.seen += len(part)
            if sum(map(len, self._draws)) >= 2 * self.limit:
                self._thin()

    def _thin(self) -> None:
        draws = np.concatenate(self._draws)
        stay = np.sort(np.argpartition(draws, self.limit - 1)[: self.limit])
        self._rows, self._draws = [np.concatenate(self._rows)[stay]], [draws[stay]]

    @property
    def rows(self) -> Array:
        """The rows that stay, in the order of the stream, float64."""
        if sum(map(len, self._draws)) > self.limit:
            self._thin()
        return np.concatenate(self._rows).astype(np.float64)


class FeatureStatistics:
    """Moments, class sums and kept rows of the features of a stream of images; only what ``kinds`` (values
    of ``METRICS_OF``) need."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self.kinds, self.count = frozenset(kinds), 0
        self.pooled, self.spatial, self.kept = Moments(), Moments(), Reservoir()
        self._probabilities: Array = np.zeros(())
        self._negative_entropy = 0.0
        self._right = 0

    def update(self, features: Features, labels: npt.NDArray[Any] | None = None) -> None:
        """Take in the features of n images; ``labels`` [n] are the classes that were asked for."""
        self.count += len(features.pooled)
        if "frechet" in self.kinds:
            self.pooled.update(features.pooled)
        if "spatial_frechet" in self.kinds:
            self.spatial.update(features.spatial)
        if self.kinds & {"kernel", "gaussian", "precision", "recall"}:
            self.kept.update(features.pooled)
        if "inception_score" in self.kinds:
            probabilities, negative_entropy = distances.class_sums(features.logits)
            self._probabilities = self._probabilities + probabilities
            self._negative_entropy += negative_entropy
        if "accuracy" in self.kinds and labels is not None:
            self._right += round(distances.accuracy(features.logits, labels) * len(labels))

    @property
    def inception_score(self) -> float:
        return distances.inception_score_from_sums(self._probabilities, self._negative_entropy, self.count)

    @property
    def accuracy(self) -> float:
        return self._right / self.count

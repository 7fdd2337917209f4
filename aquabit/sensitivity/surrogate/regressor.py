"""What every estimator of an objective shares: its target, its features, and fitting on an oriented,
standardised scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

from aquabit.choices import Choices
from aquabit.scheme import AquabitError
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.scores import r2

# on standardised columns, from hardly any shrinkage to hardly any weight
RIDGE_PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


@dataclass(frozen=True)
class Target:
    """What is fitted: the logarithm of a positive objective, any other as it is, negated where higher is
    better."""

    sign: float
    log: bool

    @staticmethod
    def of(y: np.ndarray, direction: str = "min", log: bool | None = None) -> Target:
        """``log=None`` takes the logarithm where all of ``y`` is positive. Raises AquabitError for values
        that are not finite."""
        if direction not in ("min", "max"):
            raise AquabitError(f"direction is {direction!r}; it must be min or max")
        if not len(y) or not np.isfinite(y).all():
            raise AquabitError(
                f"{int((~np.isfinite(y)).sum())} of {len(y)} labels are not finite; leave failed"
                " measurements out"
            )
        return Target(1.0 if direction == "min" else -1.0, bool((y > 0).all()) if log is None else log)

    def __call__(self, y: np.ndarray) -> np.ndarray:
        return self.sign * (np.log(y) if self.log else np.asarray(y, float))

    def to_units(self, z: np.ndarray) -> np.ndarray:
        """The inverse: values in the metric's own units."""
        return np.exp(self.sign * z) if self.log else self.sign * np.asarray(z)


class Estimator(RegressorMixin, BaseEstimator, ABC):
    """A scikit-learn regressor of an objective over configurations. ``features`` says what it looks at;
    ``fit`` takes these and raw objective values; ``predict`` gives the oriented target, larger = worse."""

    direction: Literal["min", "max"]
    log: bool | None
    target_: Target
    budget_only: ClassVar[bool] = False  # sees the budget alone, so that it ranks nothing within one

    @classmethod
    def for_model(cls, encoder: Encoder, **parameters: Any) -> Self:
        """One that knows what it must of the model beside the features: most need nothing."""
        return cls(**parameters)

    @abstractmethod
    def features(self, encoder: Encoder, choices: Choices) -> np.ndarray:
        """Rows of configurations to what it is fitted on, [n, columns]."""

    def replicate(self, rng: np.random.Generator, seed: int) -> Self:
        """An unfitted one for a bootstrap replicate: cheaper, where that serves, and with its own
        randomness."""
        parameters = self.get_params(deep=False)
        return type(self)(**parameters | ({"seed": seed} if "seed" in parameters else {}))

    def fit(self, X: np.ndarray, y: np.ndarray) -> Self:
        X, y = np.asarray(X, float), np.asarray(y, float)
        self.target_ = Target.of(y, self.direction, self.log)
        z = self.target_(y)
        self.center_, spread = float(z.mean()), float(z.std())
        self.spread_ = spread if spread > 1e-12 * max(1.0, abs(self.center_)) else 1.0
        self._fit(X, (z - self.center_) / self.spread_)
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Oriented target [n], larger = worse."""
        return self._predict(np.asarray(X)) * self.spread_ + self.center_

    def to_units(self, z: np.ndarray) -> np.ndarray:
        """Predictions in the metric's own units."""
        return self.target_.to_units(z)

    def score(self, X: np.ndarray, y: np.ndarray, sample_weight: None = None) -> float:
        """R2 on the scale that is fitted."""
        return r2(self.target_(np.asarray(y, float)), self.predict(X))

    @abstractmethod
    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        """Fit the standardised target."""

    @abstractmethod
    def _predict(self, X: np.ndarray) -> np.ndarray:
        """The standardised target [n]."""


@dataclass(frozen=True)
class Linear:
    """Ridge on standardised columns, its penalty chosen by exact leave-one-out error. ``columns`` are the
    numbers of those that it looks at, among all that it is given; ``mean`` and ``weights`` are of these."""

    columns: np.ndarray
    mean: np.ndarray
    weights: np.ndarray
    intercept: float
    left_out: np.ndarray  # prediction of each training row by the model fitted without it

    @staticmethod
    def fit(
        X: np.ndarray,
        z: np.ndarray,
        penalties: Sequence[float] = RIDGE_PENALTIES,
        columns: Sequence[int] | None = None,
    ) -> Linear:
        """Of ``X`` [n, all columns]: of all of them, or of the numbered ones."""
        looked_at = np.arange(X.shape[1]) if columns is None else np.array(columns, int)
        X = X[:, looked_at]
        mean, spread = X.mean(0), X.std(0)
        spread = np.where(spread < 1e-6, np.inf, spread)  # a constant column says nothing
        scaled, centered = (X - mean) / spread, z - z.mean()
        values, vectors = np.linalg.eigh(scaled @ scaled.T)
        rotated, best = vectors.T @ centered, (np.inf, 0.0, centered)
        for penalty in penalties:
            shrink = np.maximum(values, 0) / (np.maximum(values, 0) + penalty)
            leverage = np.minimum((vectors**2) @ shrink + 1 / len(z), 1 - 1e-9)
            residual = (centered - vectors @ (shrink * rotated)) / (1 - leverage)
            best = min(best, (float((residual**2).sum()), penalty, residual), key=lambda b: b[0])
        weights = scaled.T @ (vectors @ (rotated / (np.maximum(values, 0) + best[1]))) / spread
        return Linear(looked_at, mean, weights, float(z.mean()), z - best[2])

    def __call__(self, X: np.ndarray) -> np.ndarray:
        return np.asarray((X[:, self.columns] - self.mean) @ self.weights + self.intercept)

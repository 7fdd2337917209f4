"""The surrogate and its two baselines: scikit-learn estimators of an objective's logarithm, oriented so that larger = worse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import xgboost
from sklearn.base import BaseEstimator, RegressorMixin

from aquabit.scheme import AquabitError
from aquabit.sensitivity.scores import budget_terms, r2

RIDGE_PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


@dataclass(frozen=True)
class Target:
    """What is fitted: the logarithm of a positive objective, any other as it is, negated where higher is better."""

    sign: float
    log: bool

    @staticmethod
    def of(y: np.ndarray, direction: str = "min", log: bool | None = None) -> Target:
        """``log=None`` takes the logarithm where all of ``y`` is positive. Raises AquabitError for values that are not finite."""
        if direction not in ("min", "max"):
            raise AquabitError(f"direction is {direction!r}; it must be min or max")
        if not len(y) or not np.isfinite(y).all():
            raise AquabitError(f"{int((~np.isfinite(y)).sum())} of {len(y)} labels are not finite; leave failed measurements out")
        return Target(1.0 if direction == "min" else -1.0, bool((y > 0).all()) if log is None else log)

    def __call__(self, y: np.ndarray) -> np.ndarray:
        return self.sign * (np.log(y) if self.log else np.asarray(y, float))

    def to_units(self, z: np.ndarray) -> np.ndarray:
        """The inverse: values in the metric's own units."""
        return np.exp(self.sign * z) if self.log else self.sign * np.asarray(z)


class _OrientedRegressor(RegressorMixin, BaseEstimator, ABC):
    """``fit`` takes raw objective values; ``predict`` gives the oriented target."""

    direction: Literal["min", "max"]
    log: bool | None
    target_: Target

    def fit(self, X: np.ndarray, y: np.ndarray) -> Self:
        X, y = np.asarray(X, float), np.asarray(y, float)
        self.target_ = Target.of(y, self.direction, self.log)
        z = self.target_(y)
        self.center_, spread = float(z.mean()), float(z.std())
        self.spread_ = spread if spread > 1e-12 else 1.0
        self._fit(X, (z - self.center_) / self.spread_)
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Oriented target [n], larger = worse."""
        return self._predict(np.asarray(X, float)) * self.spread_ + self.center_

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
class _Linear:
    """Ridge on standardised columns, its penalty chosen by exact leave-one-out error."""

    mean: np.ndarray
    weights: np.ndarray
    intercept: float
    left_out: np.ndarray  # prediction of each training row by the model fitted without it

    @staticmethod
    def fit(X: np.ndarray, z: np.ndarray, penalties: Sequence[float] = RIDGE_PENALTIES) -> _Linear:
        mean, spread = X.mean(0), X.std(0)
        spread = np.where(spread < 1e-6, np.inf, spread)  # a constant column says nothing
        columns, centered = (X - mean) / spread, z - z.mean()
        values, vectors = np.linalg.eigh(columns @ columns.T)
        rotated, best = vectors.T @ centered, (np.inf, 0.0, centered)
        for penalty in penalties:
            shrink = np.maximum(values, 0) / (np.maximum(values, 0) + penalty)
            leverage = np.minimum((vectors**2) @ shrink + 1 / len(z), 1 - 1e-9)
            residual = (centered - vectors @ (shrink * rotated)) / (1 - leverage)
            best = min(best, (float((residual**2).sum()), penalty, residual), key=lambda b: b[0])
        weights = columns.T @ (vectors @ (rotated / (np.maximum(values, 0) + best[1]))) / spread
        return _Linear(mean, weights, float(z.mean()), z - best[2])

    def __call__(self, X: np.ndarray) -> np.ndarray:
        return np.asarray((X - self.mean) @ self.weights + self.intercept)


class Surrogate(_OrientedRegressor):
    """Gradient-boosted trees over ``sensitivity.encoder.Encoder`` features, on top of ``linear`` times a ridge fit.

    The trees learn what the ridge misses of rows that it was not fitted on (its leave-one-out residuals), since residuals of an
    overfitted ridge hold nothing to learn. ``members`` boosters of different seeds are averaged. Deterministic, one thread.
    """

    def __init__(
        self, rounds: int = 200, depth: int = 3, rate: float = 0.05, rows: float = 0.7, columns: float = 0.5, leaf: float = 5.0,
        bins: int = 32, linear: float = 0.5, members: int = 2, seed: int = 0,
        direction: Literal["min", "max"] = "min", log: bool | None = None,
    ):  # fmt: skip
        self.rounds, self.depth, self.rate, self.rows, self.columns, self.leaf = rounds, depth, rate, rows, columns, leaf
        self.bins, self.linear, self.members, self.seed, self.direction, self.log = bins, linear, members, seed, direction, log

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        self.linear_ = _Linear.fit(X, z) if self.linear else None
        data = xgboost.DMatrix(X.astype(np.float32), z - self.linear * self.linear_.left_out if self.linear_ else z, nthread=1)
        options: dict[str, Any] = {
            "tree_method": "hist", "nthread": 1, "base_score": 0.0, "max_depth": self.depth, "eta": self.rate, "subsample": self.rows,
            "colsample_bynode": self.columns, "min_child_weight": self.leaf, "max_bin": self.bins,
        }  # fmt: skip  # 32 bins: five times faster than 256 and as good, since a layer has ten schemes
        self.boosters_ = [xgboost.train(options | {"seed": 1000 * self.seed + m}, data, self.rounds) for m in range(self.members)]

    def _predict(self, X: np.ndarray) -> np.ndarray:
        data = np.ascontiguousarray(X, np.float32)
        out = np.mean([np.asarray(b.inplace_predict(data), float) for b in self.boosters_], 0)
        return np.asarray(out + self.linear * self.linear_(X) if self.linear_ else out)

    def contributions(self, X: np.ndarray) -> tuple[np.ndarray, float]:
        """Path-dependent TreeSHAP values [n, columns] and their base, on the scale of ``predict``: each row sums to it.

        The ridge part adds weight x (value - mean), which is its exact SHAP value under independent columns.
        """
        import shap  # 3 s to import

        X = np.asarray(X, float)
        values, base = np.zeros(X.shape), 0.0
        for booster in self.boosters_:
            explainer = shap.TreeExplainer(booster, feature_perturbation="tree_path_dependent")
            values += np.asarray(explainer.shap_values(X.astype(np.float32)), float) / len(self.boosters_)
            base += float(np.ravel(explainer.expected_value)[0]) / len(self.boosters_)
        if self.linear_:
            values += self.linear * (X - self.linear_.mean) * self.linear_.weights
            base += self.linear * self.linear_.intercept
        return values * self.spread_, base * self.spread_ + self.center_


class AverageBits(_OrientedRegressor):
    """Baseline: a cubic in (real weight bits, mean activation bits), ``X`` [n, 2], of the raw objective."""

    def __init__(self, direction: Literal["min", "max"] = "min", log: bool | None = False):
        self.direction, self.log = direction, log

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        self.mean_, spread = X.mean(0), X.std(0)
        self.scale_ = np.where(spread < 1e-9, np.inf, spread)
        self.cubic_, *_ = np.linalg.lstsq(self._terms(X), z, rcond=1e-9)

    def _predict(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(self._terms(X) @ self.cubic_)

    def _terms(self, X: np.ndarray) -> np.ndarray:
        bits, acts = ((X - self.mean_) / self.scale_).T
        return budget_terms(bits, acts, standardise=False)


class OneHotRidge(_OrientedRegressor):
    """Baseline: the additive model of integer-programming peers, ridge on ``Encoder.one_hot``."""

    def __init__(self, direction: Literal["min", "max"] = "min", log: bool | None = None):
        self.direction, self.log = direction, log

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        self.linear_ = _Linear.fit(X, z)

    def _predict(self, X: np.ndarray) -> np.ndarray:
        return self.linear_(X)

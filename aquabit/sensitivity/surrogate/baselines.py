"""The estimators that ours is set beside: average bits, the additive model of integer programming, the sum
of single-layer damages."""

from __future__ import annotations

from typing import Literal

import numpy as np
from sklearn.isotonic import IsotonicRegression

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.regressor import RIDGE_PENALTIES, Estimator, Linear
from aquabit.sensitivity.surrogate.scores import budget_terms


class AverageBits(Estimator):
    """A cubic in (real weight bits, mean activation bits), ``X`` [n, 2], of the raw objective."""

    budget_only = True

    def __init__(self, direction: Literal["min", "max"] = "min", log: bool | None = False):
        self.direction, self.log = direction, log

    def features(self, encoder: Encoder, choices: Choices) -> np.ndarray:
        bits = CostModel(encoder.graph, encoder.space).totals(choices)["bits"]
        return np.stack([bits, choices.mean_bits.mean(1)], 1)

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        self.mean_, spread = X.mean(0), X.std(0)
        self.scale_ = np.where(spread < 1e-9, np.inf, spread)
        self.cubic_, *_ = np.linalg.lstsq(self._terms(X), z, rcond=1e-9)

    def _predict(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(self._terms(X) @ self.cubic_)

    def _terms(self, X: np.ndarray) -> np.ndarray:
        bits, acts = ((X - self.mean_) / self.scale_).T
        return budget_terms(bits, acts, standardise=False)


class OneHotRidge(Estimator):
    """The additive model of integer-programming peers: ridge on ``Encoder.one_hot``, on the objective's
    logarithm unless ``log`` is False.

    ``penalty=None`` chooses it by leave-one-out error.
    """

    def __init__(
        self, penalty: float | None = None, direction: Literal["min", "max"] = "min", log: bool | None = None
    ):
        self.penalty, self.direction, self.log = penalty, direction, log

    def features(self, encoder: Encoder, choices: Choices) -> np.ndarray:
        return encoder.one_hot(choices)

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        self.linear_ = Linear.fit(X, z, RIDGE_PENALTIES if self.penalty is None else (self.penalty,))

    def _predict(self, X: np.ndarray) -> np.ndarray:
        return self.linear_(X)


class SumOfDamages(Estimator):
    """What each layer's choice does alone, summed over layers, then one increasing curve to the objective
    (MixDQ; AIMET AMP).

    A choice's own damage is the change of a few images when it is the only one (``Encoder.damages``), or its
    relative weight error where nothing was probed; activations then count for nothing. ``power`` is applied
    to each layer's damage before the sum. The curve is ``log-linear`` in the sum, or ``isotonic``, which is
    flat outside the sums it was fitted to.
    """

    def __init__(
        self,
        power: float = 1.0,
        curve: Literal["log-linear", "isotonic"] = "log-linear",
        direction: Literal["min", "max"] = "min",
        log: bool | None = None,
    ):
        self.power, self.curve, self.direction, self.log = power, curve, direction, log

    def features(self, encoder: Encoder, choices: Choices) -> np.ndarray:
        rows = np.arange(choices.weights.shape[1])
        own = encoder.damages(choices) if encoder.probed else encoder.error[rows, choices.weights]
        return np.asarray(np.log10((np.maximum(own, 0) ** self.power).sum(1, keepdims=True) + encoder.FLOOR))

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        if self.curve == "isotonic":
            self.curve_ = IsotonicRegression(out_of_bounds="clip").fit(X[:, 0], z)
        elif self.curve == "log-linear":
            centered = X[:, 0] - X[:, 0].mean()
            self.slope_ = max(0.0, float(centered @ z) / max(float(centered @ centered), 1e-12))
            self.mean_ = float(X[:, 0].mean())
        else:
            raise AquabitError(f"curve is {self.curve!r}; it must be log-linear or isotonic")

    def _predict(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(
            self.curve_.predict(X[:, 0]) if self.curve == "isotonic" else self.slope_ * (X[:, 0] - self.mean_)
        )

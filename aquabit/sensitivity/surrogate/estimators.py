"""The surrogate, and the table of all estimators of an objective that can stand in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import xgboost

from aquabit.choices import Choices
from aquabit.scheme import AquabitError
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.baselines import AverageBits, OneHotRidge, SumOfDamages
from aquabit.sensitivity.surrogate.graph_network import GraphNetwork
from aquabit.sensitivity.surrogate.regressor import Estimator, Linear

SUM = "damage:model"  # the column of what all layers' choices do alone, summed
RISING = ("weight", "act", "error", "actshare", "damage")  # kinds of columns in which more can only be worse


class Surrogate(Estimator):
    """Gradient-boosted trees over ``features.Encoder``'s columns, on top of ``linear`` times a ridge fit to
    the columns numbered in ``base`` (None: all of them; where it falls in one of ``base`` it is left out).

    ``for_model`` takes the one column SUM where the encoder has probes: the ridge is then a line in the
    logarithm of the summed damages, which is right where layers add up, and what they do together is left to
    the trees. Trees alone step over what a small layer does. Without probes it takes half a ridge of all
    columns. The trees learn what the ridge misses of rows that it was not fitted on (its leave-one-out
    residuals), since residuals of an overfitted ridge hold nothing to learn.
    ``members`` boosters of different seeds are averaged. 32 ``bins`` are five times faster than 256 and as
    good, since a layer has ten schemes. ``monotone``: no prediction improves where a weight
    error, a damage, or lower activation bits rise; a ridge of all columns is then left
    out, and ``names`` must say what the columns are (``for_model`` does). Deterministic, one thread.
    """

    def __init__(
        self,
        rounds: int = 200,
        depth: int = 3,
        rate: float = 0.05,
        rows: float = 0.7,
        columns: float = 0.5,
        leaf: float = 5.0,
        bins: int = 32,
        linear: float = 0.5,
        base: tuple[int, ...] | None = None,
        members: int = 2,
        monotone: bool = False,
        seed: int = 0,
        direction: Literal["min", "max"] = "min",
        log: bool | None = None,
        names: tuple[str, ...] | None = None,
    ):
        self.rounds, self.depth, self.rate, self.leaf, self.bins = rounds, depth, rate, leaf, bins
        self.rows, self.columns, self.linear, self.members = rows, columns, linear, members
        self.base, self.monotone, self.seed = base, monotone, seed
        self.direction, self.log, self.names = direction, log, names

    @classmethod
    def for_model(cls, encoder: Encoder, **parameters: Any) -> Self:
        names, line = tuple(encoder.columns), dict[str, Any]()
        if encoder.probed:  # of one layer alone there is no sum
            line = {"linear": 1.0, "base": (names.index(SUM if SUM in names else "damage:roots"),)}
        return cls(**{"names": names, **line, **parameters})

    def features(self, encoder: Encoder, choices: Choices) -> np.ndarray:
        return encoder(choices)

    def replicate(self, rng: np.random.Generator, seed: int) -> Self:
        """A third of the cost of the full fit. The share of a ridge of all columns is drawn from 0 to 1: how
        additive the model is, is as uncertain as its coefficients."""
        cheap = {"rounds": max(1, round(0.6 * self.rounds)), "rate": 1.6 * self.rate, "members": 1}
        linear = float(rng.uniform()) if self.linear and self.base is None else self.linear
        return type(self)(**{**self.get_params(), **cheap, "linear": linear, "seed": seed})

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        options: dict[str, Any] = {
            "tree_method": "hist",
            "nthread": 1,
            "base_score": 0.0,
            "max_depth": self.depth,
            "eta": self.rate,
            "subsample": self.rows,
            "colsample_bynode": self.columns,
            "min_child_weight": self.leaf,
            "max_bin": self.bins,
        }
        if self.monotone:
            options["monotone_constraints"] = self._constraints(X.shape[1])
        self.linear_ = Linear.fit(X, z, columns=self.base) if self.linear else None
        if self.linear_ and (self.monotone if self.base is None else (self.linear_.weights < 0).any()):
            self.linear_ = None
        self.share_ = self.linear if self.linear_ else 0.0
        left = z - self.share_ * self.linear_.left_out if self.linear_ else z
        data = xgboost.DMatrix(X.astype(np.float32), left, nthread=1)
        self.boosters_ = [
            xgboost.train(options | {"seed": 1000 * self.seed + m}, data, self.rounds)
            for m in range(self.members)
        ]

    def _constraints(self, columns: int) -> tuple[int, ...]:
        if self.names is None or len(self.names) != columns:
            raise AquabitError(
                f"monotone trees need the names of their {columns} columns, not {len(self.names or ())}: make"
                " them by Surrogate.for_model"
            )
        return tuple(int(name.split(":")[0] in RISING) for name in self.names)

    def _predict(self, X: np.ndarray) -> np.ndarray:
        out = self._trees(np.ascontiguousarray(X, np.float32))
        return np.asarray(out + self.share_ * self.linear_(X) if self.linear_ else out)

    def _trees(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(np.mean([np.asarray(b.inplace_predict(X), float) for b in self.boosters_], 0))

    def contributions(self, X: np.ndarray) -> tuple[np.ndarray, float]:
        """Path-dependent TreeSHAP values [n, columns] and their base, on the scale of ``predict``: each row
        sums to it.

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
            seen = self.linear_.columns
            values[:, seen] += self.share_ * (X[:, seen] - self.linear_.mean) * self.linear_.weights
            base += self.share_ * self.linear_.intercept
        return values * self.spread_, base * self.spread_ + self.center_


def predict_all(models: Sequence[Estimator], X: np.ndarray) -> np.ndarray:
    """Oriented targets [models, n] of estimators that were fitted to the same columns. Boosted trees share
    one conversion of ``X`` and one product for their ridge parts: with 21 models over 1,000 columns three
    times faster than one after the other.
    """
    boosted = [m for m in models if isinstance(m, Surrogate)]
    if len(boosted) < len(models):
        return np.stack([m.predict(X) for m in models])
    data = np.ascontiguousarray(X, np.float32)
    out = np.stack([m._trees(data) for m in boosted])
    ridges = [(k, m.share_, m.linear_) for k, m in enumerate(boosted) if m.linear_]
    if ridges:
        first = ridges[0][2]
        origin = first.mean  # near every mean, so that no digits are lost
        products = (X[:, first.columns] - origin) @ np.stack([r.weights for _, _, r in ridges], 1)
        for (k, share, r), product in zip(ridges, products.T, strict=True):
            out[k] += share * (product + r.intercept - (r.mean - origin) @ r.weights)
    return out * np.array([[m.spread_] for m in boosted]) + np.array([[m.center_] for m in boosted])


ESTIMATORS: dict[str, type[Estimator]] = {
    "gbdt": Surrogate,
    "average_bits": AverageBits,
    "ridge_one_hot": OneHotRidge,
    "sum_of_damages": SumOfDamages,
    "graph_network": GraphNetwork,
}
# the quick ones, which every fit is set beside
BASELINES = ("average_bits", "ridge_one_hot", "sum_of_damages")


def estimator_of(name: str, encoder: Encoder, seed: int = 0, **parameters: Any) -> Estimator:
    """The unfitted estimator ``name`` for a model; ``seed`` reaches those that have randomness.

    Raises AquabitError for an unknown name or parameter.
    """
    if name not in ESTIMATORS:
        raise AquabitError(f"estimator {name!r} is unknown; known: {', '.join(ESTIMATORS)}")
    kind = ESTIMATORS[name]
    known = kind._get_param_names()
    unknown = [k for k in parameters if k not in known]
    if unknown:
        raise AquabitError(f"{name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    return kind.for_model(encoder, **({"seed": seed} if "seed" in known else {}) | parameters)

"""The surrogate of output errors: with those of the configurations themselves among its features.

Trees rank configurations best, but step over what a small layer does; ``Blend`` adds models that are smooth
in the output errors and in the summed sketches, which is what effects of layers need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import clone
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler

from aquabit.choices import Choices
from aquabit.measuring.output_errors import output_features
from aquabit.scheme import AquabitError, QuantConfig
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.estimators import Surrogate
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, grouped_folds, held_out_predictions
from aquabit.sensitivity.surrogate.regressor import Estimator
from aquabit.sensitivity.surrogate.scores import within_budget_srcc

Outputs = Mapping[str, Mapping[str, Any]]  # digest -> output errors, as Study.outputs gives them
# finer than the surrogate's own trees, since output errors are smooth; what they and the blend reach is in
# benchmarks/results/surrogate.md
TREES: dict[str, Any] = {"rounds": 300, "rate": 0.04, "rows": 0.5, "columns": 0.3, "bins": 256, "linear": 0.0}
MEMBERS = 6  # boosters that are averaged
KNOTS = 5  # of a spline of one column


class Blend(Estimator):
    """The mean of three models of one target: boosted trees over all columns; ridge on splines of the
    ``smooth`` columns; and the same of ``single`` ones (none: left out). Columns are numbers of those that
    ``fit`` sees."""

    def __init__(
        self,
        smooth: tuple[int, ...],
        single: tuple[int, ...] = (),
        members: int = MEMBERS,
        seed: int = 0,
        direction: Literal["min", "max"] = "min",
        log: bool | None = None,
    ):
        self.smooth, self.single, self.members, self.seed = smooth, single, members, seed
        self.direction, self.log = direction, log

    def features(self, encoder: Encoder, choices: Choices) -> np.ndarray:
        """Only the encoder's columns; those of output errors stand behind them
        (``OutputErrorSurrogate.features``)."""
        return encoder(choices)

    def replicate(self, rng: np.random.Generator, seed: int) -> Self:
        """A third of the trees."""
        return type(self)(**self.get_params() | {"members": max(1, self.members // 3), "seed": seed})

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        self.trees_ = Surrogate(**TREES, members=self.members, seed=self.seed, log=False).fit(X, z)
        varied = [[c for c in columns if np.ptp(X[:, c]) > 1e-9] for columns in (self.smooth, self.single)]
        self.splines_ = [(columns, _spline().fit(X[:, columns], z)) for columns in varied if columns]

    def _predict(self, X: np.ndarray) -> np.ndarray:
        parts = [self.trees_.predict(X), *(model.predict(X[:, columns]) for columns, model in self.splines_)]
        return np.asarray(np.mean(parts, 0))


def _spline() -> Any:
    return make_pipeline(
        StandardScaler(), SplineTransformer(KNOTS, extrapolation="linear"), RidgeCV(np.logspace(-2, 3, 11))
    )


@dataclass(frozen=True)
class OutputErrorSurrogate:
    """An estimator over a surrogate's features and output errors; ``within_budget_srcc`` is out of fold,
    as the surrogate's."""

    fitted: FittedSurrogate
    estimator: Estimator
    within_budget_srcc: float

    def __call__(self, configs: Sequence[QuantConfig], outputs: Outputs) -> np.ndarray:
        """Oriented prediction [n], larger = worse, of configurations whose output errors are known."""
        return self.predict(Choices.of(self.fitted.space, configs), [outputs[c.digest] for c in configs])

    def predict(self, choices: Choices, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The same of rows and their n output errors."""
        return self.estimator.predict(self.features(choices, values))

    def features(self, choices: Choices, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """What the trees look at, [n, columns]."""
        return _features(self.fitted, choices, values)


def _features(fitted: FittedSurrogate, choices: Choices, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.concatenate([fitted.encoder(choices), output_features(values)], 1)


def fit_output_error_surrogate(
    fitted: FittedSurrogate, outputs: Outputs, seed: int = 0, blend: bool = False
) -> OutputErrorSurrogate:
    """Fit the screen to what ``fitted`` was trained on: boosted trees, or the ``blend`` that effects are read
    from.

    Raises AquabitError where a training configuration's output errors are missing."""
    missing = [c for c in fitted.configs if c not in outputs]
    if missing:
        raise AquabitError(
            f"the output errors of {len(missing)} measured configurations, such as {missing[0]}, are not"
            " known"
        )
    features = _features(fitted, fitted.choices, [outputs[c] for c in fitted.configs])
    model: Estimator = Surrogate(**TREES, members=MEMBERS, seed=seed, direction=fitted.direction)
    if blend:
        shifts = [i for i, name in enumerate(fitted.encoder.columns) if name.startswith("shift:")]
        behind = range(len(fitted.encoder.columns), features.shape[1])
        model = Blend((*shifts, *behind), tuple(shifts[:1]), seed=seed, direction=fitted.direction)
    fold = grouped_folds(fitted.choices, min(5, len(fitted.y)), seed)
    held_out = fitted.sign * held_out_predictions(model, features, fitted.y, fold)
    acts = fitted.choices.mean_bits.mean(1)
    score = within_budget_srcc(fitted.sign * fitted.y, held_out, fitted.bits, acts, fold)
    return OutputErrorSurrogate(fitted, clone(model).fit(features, fitted.y), score)

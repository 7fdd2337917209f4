"""Screening: the surrogate again, with the output errors of the configurations themselves among its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone

from aquabit.scheme import AquabitError, QuantConfig
from aquabit.sensitivity.estimators import Surrogate
from aquabit.sensitivity.fidelity import output_features
from aquabit.sensitivity.scores import within_budget_srcc
from aquabit.sensitivity.surrogate import FittedSurrogate, fold_numbers, held_out_predictions

Outputs = Mapping[str, Mapping[str, Any]]  # digest -> output errors, as Study.outputs gives them


@dataclass(frozen=True)
class Screen:
    """Gradient-boosted trees over a surrogate's features and output errors; ``within_budget_srcc`` is out of fold, as the surrogate's."""

    fitted: FittedSurrogate
    estimator: Surrogate
    within_budget_srcc: float

    def __call__(self, configs: Sequence[QuantConfig], outputs: Outputs) -> np.ndarray:
        """Oriented prediction [n], larger = worse, of configurations whose output errors are known."""
        return self.predict(*self.fitted.space.indices(configs), [outputs[c.digest] for c in configs])

    def predict(self, weights: np.ndarray, acts: np.ndarray, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The same of index matrices [n, layers] and their n output errors."""
        return self.estimator.predict(self.features(weights, acts, values))

    def features(self, weights: np.ndarray, acts: np.ndarray, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """What the trees look at, [n, columns]."""
        return _features(self.fitted, weights, acts, values)


def _features(fitted: FittedSurrogate, weights: np.ndarray, acts: np.ndarray, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.concatenate([fitted.encoder(weights, acts), output_features(values)], 1)


def fit_screen(fitted: FittedSurrogate, outputs: Outputs, folds: int = 5, seed: int = 0) -> Screen:
    """Fit the screen to what ``fitted`` was trained on. Raises AquabitError where a training configuration's output errors are missing."""
    missing = [c for c in fitted.configs if c not in outputs]
    if missing:
        raise AquabitError(f"the output errors of {len(missing)} measured configurations, such as {missing[0]}, are not known")
    features = np.concatenate([fitted.encoder(fitted.weights, fitted.acts), output_features([outputs[c] for c in fitted.configs])], 1)
    model = Surrogate(seed=seed, direction=fitted.direction, linear=0.0)
    fold = fold_numbers(len(fitted.y), min(folds, len(fitted.y)), seed)
    held_out = fitted.sign * held_out_predictions(model, features, fitted.y, fold)
    acts = fitted.space.mean_bits(fitted.acts).mean(1)
    score = within_budget_srcc(fitted.sign * fitted.y, held_out, fitted.bits, acts, fold)
    return Screen(fitted, clone(model).fit(features, fitted.y), score)

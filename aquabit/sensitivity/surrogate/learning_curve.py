"""What more measurements would buy: the surrogate's score after a part of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.base import clone

from aquabit.scheme import Progress, no_progress
from aquabit.sensitivity.result import CURVE
from aquabit.sensitivity.surrogate.fit import MIN_MEASUREMENTS, FittedSurrogate, grouped_folds
from aquabit.sensitivity.surrogate.scores import within_budget_interval, within_budget_srcc

PARTS = (0.125, 0.25, 0.5)  # of the measurements; all of them are scored already
FOLDS = 5  # as the surrogate's own cross-validation has


def learning_curve(fitted: FittedSurrogate, seed: int = 0, progress: Progress = no_progress) -> pd.DataFrame:
    """CURVE: the within-budget SRCC of surrogates trained on PARTS of the measurements, then of the one
    trained on all, with 95 % intervals.

    Each is scored on all measurements, out of fold (folds of whole contexts): it is trained on a random part
    of the other folds, and ``measurements`` counts those it would have had without folds. Parts below
    ``MIN_MEASUREMENTS`` are left out. Costs 0.9 of a cross-validation.
    """
    y, bits, count = fitted.y, fitted.bits, len(fitted.y)
    acts = fitted.choices.mean_bits.mean(1)
    features, fold = fitted.features(fitted.choices), grouped_folds(fitted.choices, FOLDS, seed)
    rng = np.random.default_rng([seed, 7])
    sizes = [round(p * count) for p in PARTS if p * count >= MIN_MEASUREMENTS]
    rows: list[tuple[float, ...]] = []
    for done, size in enumerate(sizes):
        predicted = np.empty(count)
        for f in range(FOLDS):
            others = np.flatnonzero(fold != f)
            train = rng.permutation(others)[: max(2, round(size * len(others) / count))]
            if np.ptp(y[train]) == 0:
                predicted[fold == f] = y[train][0]
                continue
            model = clone(fitted.surrogate).fit(features[train], y[train])
            predicted[fold == f] = model.to_units(model.predict(features[fold == f]))
        forms = (fitted.sign * y, fitted.sign * predicted, bits, acts, fold)
        rows.append((size, within_budget_srcc(*forms), *within_budget_interval(*forms, seed)))
        progress("learning curve", done + 1, len(sizes))
    low, high = fitted.scores["within_budget_interval"]
    return pd.DataFrame([*rows, (count, fitted.scores["within_budget_srcc"], low, high)], columns=CURVE)

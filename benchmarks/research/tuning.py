"""Choosing an estimator's parameters by nested cross-validation, with the same number of candidates for
every estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from sklearn.base import clone

from aquabit.choices import Choices
from aquabit.scheme import AquabitError, Progress, no_progress
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.estimators import estimator_of
from aquabit.sensitivity.surrogate.fit import fold_numbers, held_out_predictions
from aquabit.sensitivity.surrogate.regressor import Estimator, Target
from aquabit.sensitivity.surrogate.scores import all_scores, within_budget_interval, within_budget_srcc

Parameters = Mapping[str, Any]
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gbdt": {
        "rounds": (100, 200, 400),
        "depth": (2, 3, 4, 6),
        "rate": (0.03, 0.05, 0.1),
        "rows": (0.5, 0.7, 0.9),
        "columns": (0.1, 0.3, 0.5, 0.8),
        "leaf": (2.0, 5.0, 10.0),
        "linear": (0.0, 0.25, 0.5, 0.75, 1.0),
        "monotone": (False, True),
    },
    "average_bits": {},
    "ridge_one_hot": {"penalty": (None, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)},
    "sum_of_damages": {"power": (0.25, 0.5, 0.75, 1.0, 1.5), "curve": ("log-linear", "isotonic")},
    "graph_network": {
        "width": (16, 32, 64),
        "hops": (2, 3, 4),
        "heads": (1, 4),
        "rate": (1e-3, 3e-3, 1e-2),
        "decay": (0.0, 1e-3, 1e-2, 1e-1),
        "ranking": (0.0, 0.2, 0.5, 1.0, 2.0),
        "batch": (16, 32, 64),
    },
}


@dataclass(frozen=True)
class Tuned:
    """What nested cross-validation found for one estimator."""

    estimator: str
    candidates: list[Parameters]
    # [folds + 1, candidates] within-budget SRCC inside the training part of each outer fold, then on all rows
    inner: np.ndarray
    chosen: list[Parameters]  # per outer fold
    best: Parameters  # on all rows: what to fit with from now on
    scores: dict[str, Any]  # of the outer folds: all_scores, and the 90 % interval of the within-budget SRCC
    out_of_fold: np.ndarray  # [n] in units


def candidates(estimator: str, count: int = 24, seed: int = 0) -> list[Parameters]:
    """The defaults (an empty mapping), then distinct random draws from ``GRIDS``: ``count`` in all, or all
    of a smaller grid."""
    if estimator not in GRIDS:
        raise AquabitError(f"estimator {estimator!r} has no grid; known: {', '.join(GRIDS)}")
    grid, rng = GRIDS[estimator], np.random.default_rng([seed, 4])
    sizes = [len(values) for values in grid.values()]
    total = prod(sizes)
    found: list[Parameters] = [{}]
    for number in rng.choice(total, min(total, max(0, count - 1)), replace=False) if grid else ():
        place = np.unravel_index(int(number), sizes)
        found.append({k: values[int(i)] for (k, values), i in zip(grid.items(), place, strict=True)})
    return found


def tune(
    estimator: str,
    encoder: Encoder,
    choices: Choices,
    y: np.ndarray,
    bits: np.ndarray,
    candidates: Sequence[Parameters],
    mean_act: np.ndarray | None = None,
    folds: int = 5,
    inner: int = 3,
    seed: int = 0,
    direction: Literal["min", "max"] = "min",
    progress: Progress = no_progress,
) -> Tuned:
    """Choose among ``candidates`` (parameters of the estimator) by within-budget SRCC in ``inner`` folds of
    the training part of each of ``folds`` outer folds; the scores are those of the outer folds, which no
    choice has seen. The first of equal candidates wins.

    Arguments otherwise as in ``cross_validate``, whose outer folds are the same at one seed. Costs (folds +
    1) x inner x candidates fits.
    """
    if not candidates:
        raise AquabitError("there are no candidates to choose from; an empty mapping stands for the defaults")
    y, bits = np.asarray(y, float), np.asarray(bits, float)
    mean_act = choices.mean_bits.mean(1) if mean_act is None else np.asarray(mean_act, float)
    target, fold = Target.of(y, direction), fold_numbers(len(y), folds, seed)
    models = [_oriented(estimator, encoder, seed, parameters, target, direction) for parameters in candidates]
    features = [model.features(encoder, choices) for model in models]
    found, picks = np.zeros((folds + 1, len(models))), []
    predicted = np.empty((folds, len(y)))
    for f in range(folds + 1):
        train = np.flatnonzero(fold != f)  # all rows in the last round
        inside = fold_numbers(len(train), inner, seed + 1 + f)
        for c, model in enumerate(models):
            held_out = held_out_predictions(model, features[c][train], y[train], inside)
            found[f, c] = within_budget_srcc(
                target.sign * y[train], target.sign * held_out, bits[train], mean_act[train], inside
            )
        picks.append(int(found[f].argmax()))
        if f < folds:
            fitted = clone(models[picks[f]]).fit(features[picks[f]][train], y[train])
            predicted[f] = fitted.to_units(fitted.predict(features[picks[f]]))
        progress(f"tune {estimator}", f + 1, folds + 1)
    rows = np.arange(len(y))
    outer = predicted if models[0].budget_only else predicted[fold, rows]
    signed = target.sign * y, target.sign * outer, bits, mean_act, fold
    scores = {**all_scores(*signed), "within_budget_interval": within_budget_interval(*signed, seed=seed)}
    return Tuned(
        estimator,
        list(candidates),
        found,
        [candidates[p] for p in picks[:folds]],
        candidates[picks[folds]],
        scores,
        predicted[fold, rows],
    )


def _oriented(
    estimator: str, encoder: Encoder, seed: int, parameters: Parameters, target: Target, direction: str
) -> Estimator:
    model = estimator_of(estimator, encoder, seed, **{"direction": direction, **parameters})
    return model.set_params(log=target.log and not model.budget_only)

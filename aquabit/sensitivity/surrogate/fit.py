"""Fit the surrogate, or any other estimator, to a study, with its out-of-fold scores beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
import numpy as np
import pandas as pd
from sklearn.base import clone

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.graph import from_json
from aquabit.scheme import AquabitError, Progress, QuantConfig, no_progress
from aquabit.sensitivity.damages import Damages, known_damages
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.shared_contexts import group_numbers
from aquabit.sensitivity.surrogate.estimators import BASELINES, estimator_of
from aquabit.sensitivity.surrogate.regressor import Estimator, Target
from aquabit.sensitivity.surrogate.scores import (
    all_scores,
    among_good_srcc,
    good_ceiling,
    good_ones,
    noise_ceiling,
    within_budget_interval,
)
from aquabit.sensitivity.surrogate.trust import assess
from aquabit.space import SearchSpace
from aquabit.stats import LEVEL
from aquabit.study import Study, comparable

MIN_MEASUREMENTS = 20  # measurements below which nothing is fitted


class TooFewError(AquabitError):
    """A study has fewer measurements than a surrogate needs."""


# flips stay apart as the truth, fresh seeds as the final check
TRAINING_KINDS = ("sample", "uniform", "candidate")


@dataclass(frozen=True)
class FittedSurrogate:
    """A surrogate (any estimator) trained on all measurements of a study, and what it was trained on."""

    surrogate: Estimator
    encoder: Encoder
    cost: CostModel
    configs: tuple[str, ...]  # digests of the training configurations
    choices: Choices  # the same
    y: np.ndarray  # [n] objective, in its own units
    bits: np.ndarray  # [n] real bits per weight
    out_of_fold: np.ndarray  # [n] held-out predictions, in the objective's units
    scores: dict[str, Any]
    objective: str
    direction: Literal["min", "max"]
    protocol: str
    damages: Damages | None = None  # of the space, where all are known: contexts are then good configurations

    @property
    def space(self) -> SearchSpace:
        return self.encoder.space

    @property
    def graph(self) -> nx.DiGraph:
        return self.encoder.graph

    @property
    def sign(self) -> float:
        """Multiplies a difference in units so that positive = worse."""
        return 1.0 if self.direction == "min" else -1.0

    def features(self, choices: Choices) -> np.ndarray:
        """What the estimator looks at, [n, columns]."""
        return self.surrogate.features(self.encoder, choices)

    def badness(self, choices: Choices) -> np.ndarray:
        """Oriented prediction [n], larger = worse: what a search minimises."""
        return self.surrogate.predict(self.features(choices))

    def values(self, choices: Choices) -> np.ndarray:
        """Predicted objective [n], in its own units."""
        return self.surrogate.to_units(self.badness(choices))

    def predict(self, configs: Iterable[QuantConfig]) -> np.ndarray:
        """Predicted objective [n] of configurations, in its own units."""
        return self.values(Choices.of(self.space, configs))


def fold_numbers(count: int, folds: int = 5, seed: int = 0) -> np.ndarray:
    """A random fold number for each of ``count`` rows, sizes equal within one."""
    if not 2 <= folds <= count:
        raise AquabitError(f"{folds} folds do not fit {count} measurements; use 2 to {count}")
    return np.random.default_rng(seed).permutation(np.arange(count) % folds)


def grouped_folds(choices: Choices, folds: int = 5, seed: int = 0) -> np.ndarray:
    """A fold number for each row, the same for all that share a context (``group_numbers``): a swap is not
    predicted from its other end. Where there are fewer contexts than folds, each row stands for itself."""
    groups = group_numbers(choices)
    count = int(groups.max(initial=-1)) + 1
    return (
        fold_numbers(count, folds, seed)[groups] if count >= folds else fold_numbers(len(groups), folds, seed)
    )


def cross_validate(
    encoder: Encoder,
    choices: Choices,
    y: np.ndarray,
    bits: np.ndarray,
    folds: int = 5,
    seed: int = 0,
    direction: Literal["min", "max"] = "min",
    surrogate: Estimator | str = "gbdt",
    baselines: Sequence[str] = BASELINES,
    progress: Progress = no_progress,
    good: np.ndarray | None = None,
) -> dict[str, Any]:
    """Out-of-fold scores of an estimator: within_budget_srcc, srcc, kendall, ndcg10, r2 (all on the objective
    in its units), and the same of other estimators (names of ``ESTIMATORS``) under "baselines".

    ``bits`` are real bits per weight. "out_of_fold" holds the held-out predictions [n] and "fold" the fold of
    each row. "within_budget_interval" is the interval of the first score, of the level "within_budget_level",
    and "useful" whether it lies above 0, which is what average bits score by definition. Average bits is a
    cubic of the budget itself, and its residual is taken from the same fold's cubic: exactly constant.
    Constant labels score 0. With ``good`` (Boolean [n], see ``scores.good_ones``) "among_good" has the SRCC
    among these, "count" of them, and that of "baselines"; None where they are too few.
    """
    y, bits, mean_act = np.asarray(y, float), np.asarray(bits, float), choices.mean_bits.mean(1)
    target, fold = Target.of(y, direction), grouped_folds(choices, folds, seed)
    own = estimator_of(surrogate, encoder, seed) if isinstance(surrogate, str) else surrogate
    models = {"": own, **{name: estimator_of(name, encoder, seed) for name in baselines}}
    predicted = {}
    for done, (name, model) in enumerate(models.items()):
        oriented = clone(model).set_params(direction=direction, log=target.log and not model.budget_only)
        predicted[name] = held_out_predictions(oriented, oriented.features(encoder, choices), y, fold)
        progress("cross-validate the surrogate", done + 1, len(models))
    scores = {
        name: all_scores(target.sign * y, target.sign * p, bits, mean_act, fold)
        for name, p in predicted.items()
    }
    first, held_out, sign = scores.pop(""), predicted[""], target.sign
    interval = within_budget_interval(sign * y, sign * held_out, bits, mean_act, fold, seed)
    useful = {"within_budget_interval": interval, "within_budget_level": LEVEL, "useful": interval[0] > 0}
    out_of_fold = held_out if held_out.ndim == 1 else held_out[fold, np.arange(len(y))]
    among: dict[str, Any] = {}
    if good is not None:
        found = {
            name: among_good_srcc(target(y), target(p), bits, mean_act, good)
            for name, p in predicted.items()
            if not models[name].budget_only and not (target.log and (p <= 0).any())
        }
        among = {"among_good": {"srcc": found.pop("", None), "count": int(np.sum(good)), "baselines": found}}
    return {**first, **useful, **among, "baselines": scores, "out_of_fold": out_of_fold, "fold": fold}


def held_out_predictions(
    model: Estimator, features: np.ndarray, y: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Predictions [n] in units, each by ``model`` fitted to the other folds; of one that sees the budget
    alone [folds, n], what the model without a fold says of every configuration (the form that makes its
    residual exactly constant, see ``budget_residuals``).
    """
    folds = int(fold.max()) + 1
    out = np.empty((folds, len(y)))
    for f in range(folds):
        rows = np.full(len(y), True) if model.budget_only else fold == f
        fitted = clone(model).fit(features[fold != f], y[fold != f])
        out[f, rows] = fitted.to_units(fitted.predict(features[rows]))
    return out if model.budget_only else out[fold, np.arange(len(y))]


def training_table(study: Study, objective: str) -> pd.DataFrame:
    """The measurements that a surrogate may learn from: under the study's protocol, of the training kinds,
    corrected as the study's space corrects, not fine-tuned (a surrogate knows nothing of that), no end of a
    real swap.

    Raises AquabitError where there are fewer than 20, or none of them has the objective.
    """
    table = study.measurements(study.protocol, failed=True)
    failed = int((table.status == "failed").sum()) if len(table) else 0
    table = table[table.status != "failed"] if failed else table
    ends: set[str] = set()
    if len(table):
        own = (study.get("space") or {}).get("correction")
        table = table[table.kind.isin(TRAINING_KINDS) & comparable(table, own)]
        if objective in table:
            flips = study.swaps(objective)
            ends = {*flips.config_before, *flips.config_after}
    if len(table) and objective not in table:
        raise AquabitError(
            f"no measurement of {study.path} has the metric {objective!r}; choose another --objective"
        )
    if len(table):
        table = table[
            table[objective].notna() & np.isfinite(table[objective].astype(float)) & ~table.config.isin(ends)
        ]
    if len(table) < MIN_MEASUREMENTS:
        lost = f" ({failed} failed)" if failed else ""
        raise TooFewError(
            f"{study.path} has {len(table)} usable measurements of {objective}{lost}, the surrogate needs at"
            f" least {MIN_MEASUREMENTS};"
            f" `aquabit measure MODEL --study {study.path} --samples {max(120, MIN_MEASUREMENTS)}` adds more"
        )
    return table.reset_index(drop=True)


def fit_from_study(
    study: Study,
    objective: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    estimator: str = "gbdt",
    baselines: Sequence[str] = BASELINES,
) -> FittedSurrogate:
    """The surrogate of a study's objective (default: the protocol's), trained on all training measurements,
    with held-out scores.

    ``estimator`` and ``baselines`` are names of ``ESTIMATORS``; "graph_network" takes minutes. "among_good"
    of the scores is of the good configurations alone (``good_rows``). The scores say what to believe:
    "useful", "needed" (measurements for a claim), "cautions" (sentences to print first). Raises AquabitError
    with the number there is and the command that adds more where fewer than 20 can be used, and for labels
    that are all equal.
    """
    objective = objective or study.protocol.objective
    direction = study.protocol.direction(objective)
    table, choices, encoder, cost = _training(study, objective)
    y, bits = table[objective].to_numpy(float), cost.totals(choices)["bits"]
    if np.ptp(y) == 0:
        raise AquabitError(
            f"all {len(y)} measurements of {objective} in {study.path} are {y[0]:g}: a constant says nothing"
            " about layers; choose another --objective"
        )
    model = estimator_of(estimator, encoder, seed, direction=direction)
    model.set_params(log=Target.of(y, direction).log and not model.budget_only)
    others = [name for name in baselines if name != estimator]
    good = good_rows(study, table, objective, bits)
    scores = cross_validate(encoder, choices, y, bits, 5, seed, direction, model, others, progress, good)
    out_of_fold = scores.pop("out_of_fold")
    scores.pop("fold")
    scores = assess(scores, estimator, len(y), len(encoder.space.free_layers()))
    ceilings = _ceilings(study, objective, table, bits, choices.mean_bits.mean(1), good)
    scores["noise_ceiling"], scores["among_good"]["noise_ceiling"] = ceilings
    model.fit(model.features(encoder, choices), y)
    return FittedSurrogate(
        model,
        encoder,
        cost,
        tuple(table.config),
        choices,
        y,
        bits,
        out_of_fold,
        scores,
        objective,
        direction,
        study.protocol.digest,
        known_damages(encoder.space, study.probes()),
    )


def _training(study: Study, objective: str) -> tuple[pd.DataFrame, Choices, Encoder, CostModel]:
    """The rows of ``training_table`` that the space can express, as a table and as choices; what encodes
    them, and what they cost."""
    table = training_table(study, objective)
    graph = from_json(study.need("graph", "run `aquabit measure` first"))
    space = SearchSpace.from_dict(study.need("space", "run `aquabit measure` first"))
    encoder, cost = Encoder(space, graph, study.errors(), study.probes()), CostModel(graph, space)
    # uniform references may have schemes that no layer of the space may take
    known, schemes = study.configs(), set(space.schemes)
    inside = [all(choice.weight in schemes for choice in known[c].layers.values()) for c in table.config]
    table = table[inside].reset_index(drop=True)
    return table, Choices.of(space, [known[c] for c in table.config]), encoder, cost


def good_rows(study: Study, table: pd.DataFrame, objective: str, bits: np.ndarray) -> np.ndarray:
    """Boolean [n]: which rows of ``training_table`` are good configurations (``scores.good_ones``).

    By the paired distance "mse" to full precision's images, whose noise is small, whatever the objective;
    where it was not measured, by what the objective lost against full precision; where that is not known
    either, none is.
    """
    if "mse" in table and np.isfinite(table["mse"].astype(float)).all():
        return good_ones(table["mse"].to_numpy(float), bits)
    full = study.measurements(study.protocol, kind="reference")
    if full.empty or objective not in full or not np.isfinite(float(full[objective].iloc[0])):
        return np.zeros(len(table), bool)
    sign = study.protocol.sign(objective)
    return good_ones(sign * (table[objective].to_numpy(float) - float(full[objective].iloc[0])), bits)


def _ceilings(
    study: Study,
    objective: str,
    table: pd.DataFrame,
    bits: np.ndarray,
    mean_act: np.ndarray,
    good: np.ndarray,
) -> tuple[float | None, float | None]:
    """The noise ceilings, of all and among good ones, against the fresh seed set that shares most
    configurations with the training table."""
    fresh = study.measurements(kind="fresh")
    if fresh.empty or objective not in fresh:
        return None, None
    fresh = fresh[
        fresh.config.isin(table.config) & fresh[objective].notna() & (fresh.protocol != study.protocol.digest)
    ]
    if fresh.empty:
        return None, None
    most = fresh.protocol.value_counts().index[0]
    second: Mapping[str, float] = fresh[fresh.protocol == most].set_index("config")[objective].to_dict()
    both = np.array([c in second for c in table.config])
    values: Callable[[str], float] = second.__getitem__
    first, again = table[objective].to_numpy(float)[both], np.array([values(c) for c in table.config[both]])
    target = Target.of(np.concatenate([first, again]), study.protocol.direction(objective))
    among = good_ceiling(target(first), target(again), bits[both], mean_act[both], good[both])
    return noise_ceiling(first, again, bits[both], mean_act[both]), among

"""How a Sensitivity is made: the surrogate is fitted, every swap predicted in good contexts, and real swaps
set beside that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aquabit.choices import Choices
from aquabit.graph import layers as graph_layers
from aquabit.scheme import AquabitError, Progress, no_progress, parse_swap
from aquabit.sensitivity.effects.combine_effects import Combined, combine, real_means
from aquabit.sensitivity.effects.context_effects import DRAWN, refine
from aquabit.sensitivity.effects.predicted import (
    Effects,
    Player,
    bootstrap,
    draw_contexts,
    find_players,
    member_parts,
    named_swap,
    predict_effects,
    shap_by_layer,
    signed_shap,
)
from aquabit.sensitivity.effects.swaps import predict_swaps, top_layers, training_swaps, validation_scores
from aquabit.sensitivity.interactions import interactions, scheme_scores
from aquabit.sensitivity.result import Sensitivity
from aquabit.sensitivity.shap_summaries import shap_by_operator, shap_by_scheme
from aquabit.sensitivity.surrogate.estimators import Surrogate
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, fit_from_study
from aquabit.sensitivity.surrogate.learning_curve import learning_curve
from aquabit.sensitivity.surrogate.regressor import Estimator
from aquabit.stats import between_percentiles
from aquabit.study import Study

PAIR_CONTEXTS = 32  # of the contexts, for pairs of layers and for whole groups


def explain(
    study: Study,
    bits: float = 3.0,
    swap: str | None = None,
    contexts: int = DRAWN,
    replicates: int = 20,
    seed: int = 0,
    progress: Progress = no_progress,
    objective: str | None = None,
    fitted: FittedSurrogate | None = None,
    estimator: str = "gbdt",
    fidelity: bool = True,
) -> Sensitivity:
    """Fit the surrogate (or take ``fitted``), predict what swapping each layer does in good configurations
    near ``bits`` (random ones in a study without probes), and compare with real swaps where the study has
    some. Nothing is stored; see ``save``. ``swap`` is "A:B" (default: ``effects.default_swap``).
    ``estimator`` is a name of ``ESTIMATORS``; only the trees have SHAP values. ``fidelity``: effects on PSNR
    too, from a fit of their own, where it was measured. Where the study holds output errors of these swaps
    (``measure_in_context``), effects of the named swap are what they say; "contexts_run" among the scores
    counts the contexts.

    Raises AquabitError for a study with too few measurements, an unknown swap, or ``bits`` out of reach.
    """
    fitted = fitted or fit_from_study(study, objective, seed, progress=progress, estimator=estimator)
    swap = named_swap(fitted.space, swap)
    players = find_players(fitted.space, parse_swap(swap))
    rng = np.random.default_rng([seed, 0])
    drawn = draw_contexts(fitted.space, fitted.cost, bits, contexts, rng, fitted.damages)
    asked = Question(players, drawn, replicates, seed)
    predicted = predicted_effects(study, fitted, asked, progress)
    checked, training = _checked(study, fitted), training_swaps(fitted, players, bits)
    shap = _tree_shap(fitted)
    layers, combined = _layer_table(fitted, predicted.effects, training, checked, shap, seed)
    if fidelity and fitted.objective != "psnr":
        layers = _with_psnr(layers, study, asked, bits, estimator, progress)
    place, few, models = {p.layer: i for i, p in enumerate(players)}, drawn[:PAIR_CONTEXTS], predicted.models
    order = [place[name] for name in layers.name]
    pairs = interactions(fitted, predicted.effects, order, models, few, seed, progress, combined.ratio)
    groups = scheme_scores(fitted, models, few, seed, progress, combined.ratio)
    operators, blocks = (_rolled(layers, players, combined.draws, key) for key in ("operator", "block"))
    return Sensitivity(
        fitted.objective,
        fitted.direction,
        fitted.protocol,
        len(fitted.y),
        bits,
        swap,
        layers,
        operators,
        blocks,
        {**fitted.scores, **predicted.scores},
        _validation(study, fitted, layers, checked),
        _scatter(fitted),
        "combined" if layers.n.any() else "predicted",
        pairs,
        groups,
        learning_curve(fitted, seed, progress),
        shap_by_operator(fitted, *shap) if shap else {},
    )


@dataclass(frozen=True)
class Question:
    """What a surrogate is asked: what every player's swap does in these ``contexts``, and how sure that is
    (``replicates``: refitted surrogates)."""

    players: list[Player]
    contexts: Choices
    replicates: int
    seed: int = 0


@dataclass(frozen=True)
class Predicted:
    """Effects by prediction alone, the refitted models behind their replicates, and what is to be added to
    the scores."""

    effects: Effects
    models: list[Estimator]
    scores: dict[str, Any]


def predicted_effects(
    study: Study, fitted: FittedSurrogate, asked: Question, progress: Progress = no_progress
) -> Predicted:
    """What the surrogate says; where the study holds output errors in the contexts, what these say."""
    contexts, replicates, seed = asked.contexts, asked.replicates, asked.seed
    models = bootstrap(fitted, replicates, seed, progress)
    effects = predict_effects(fitted, asked.players, contexts, models, seed, progress)
    refined = None
    if isinstance(fitted.surrogate, Surrogate):
        refined = refine(study, fitted, effects, contexts, replicates, seed, progress)
    if refined is None:
        return Predicted(effects, models, {})
    effects, screen, count = refined
    scores = {"contexts_run": count, "screen_within_budget_srcc": screen.within_budget_srcc}
    return Predicted(effects, models, scores)


def _checked(study: Study, fitted: FittedSurrogate) -> pd.DataFrame | None:
    """Real swaps beside what the surrogate says of them; None without any."""
    swaps = study.swaps(fitted.objective)
    return None if swaps.empty else predict_swaps(fitted, swaps, study.configs())


def _with_psnr(
    layers: pd.DataFrame, study: Study, asked: Question, bits: float, estimator: str, progress: Progress
) -> pd.DataFrame:
    """``layers`` with the effects on PSNR; as it is where too few measurements have one, or all the same."""
    players, seed = asked.players, asked.seed
    try:
        fitted = fit_from_study(study, "psnr", seed, progress=progress, estimator=estimator, baselines=())
    except AquabitError:
        return layers
    effects = predicted_effects(study, fitted, asked, progress).effects
    checked, swaps = _checked(study, fitted), training_swaps(fitted, players, bits)
    swaps = swaps if checked is None else pd.concat([swaps, checked[swaps.columns]])
    found = combine(players, effects.effect(fitted.space.columns), effects.replicates, swaps, seed)
    table = pd.DataFrame(
        {"psnr_effect": found.effect, "psnr_low": found.low, "psnr_high": found.high},
        [p.layer for p in players],
    )
    return layers.join(table, on="name")


def _layer_table(
    fitted: FittedSurrogate,
    effects: Effects,
    training: pd.DataFrame,
    real_swaps: pd.DataFrame | None,
    shap: tuple[np.ndarray, float] | None,
    seed: int,
) -> tuple[pd.DataFrame, Combined]:
    """The table of layers, and the combined effects. Swaps among the ``training`` measurements are part of
    the prediction; ``real_swaps``, which it never saw, of the ranking alone."""
    nodes, column = graph_layers(fitted.graph), fitted.space.columns
    values = np.full(fitted.choices.weights.shape, np.nan) if shap is None else shap[0]
    signed = signed_shap(values, member_parts(fitted.encoder, fitted.choices)["error"]) if shap else values[0]
    of_schemes = shap_by_scheme(fitted, *shap) if shap else [{}] * len(signed)
    effect = effects.effect(column)
    every = training if real_swaps is None else pd.concat([training, real_swaps[training.columns]])
    ours = combine(effects.players, effect, effects.replicates, training, seed)
    found = combine(effects.players, effect, effects.replicates, every, seed)
    real, count = real_means(effects.players, training[:0] if real_swaps is None else real_swaps)
    rows = []
    for i, player in enumerate(effects.players):
        node, own = nodes[player.layer], list(player.columns)
        rows.append(
            {
                "name": player.layer,
                "operator": node["operator"],
                "block": node["block"],
                "swap": f"{player.before}:{player.after}",
                "effect": float(found.effect[i]),
                "low": float(found.low[i]),
                "high": float(found.high[i]),
                "predicted": float(ours.effect[i]),
                "real": float(real[i]),
                "n": int(count[i]),
                "shap": float(np.abs(values[:, own].sum(1)).mean()),
                "shap_signed": float(signed[own].sum()),
                "schemes": {**effects.of_schemes(i, column), str(player.after): float(ours.effect[i])},
                "shap_schemes": {
                    s: sum(of_schemes[k].get(s, 0.0) for k in own) for s in of_schemes[player.column]
                },
            }
        )
    table = pd.DataFrame(rows).sort_values("effect", ascending=False, kind="stable").reset_index(drop=True)
    return table, found


def _tree_shap(fitted: FittedSurrogate) -> tuple[np.ndarray, float] | None:
    """SHAP values [n, layers] and their base; None for estimators that are not trees."""
    if not isinstance(fitted.surrogate, Surrogate):
        return None
    values, base = shap_by_layer(fitted)
    predicted = fitted.badness(fitted.choices)
    worst = float(np.abs(values.sum(1) + base - predicted).max())
    if worst > 1e-4 * max(1.0, float(np.abs(predicted).max())):
        raise RuntimeError(f"SHAP values miss the prediction by {worst:.2g}; this is an error of ours")
    return values, base


def _rolled(layers: pd.DataFrame, players: list[Player], draws: np.ndarray, key: str) -> pd.DataFrame:
    """Mean effect of a layer of each operator type or block, its 95 % interval from the draws, and the sum
    over its layers."""
    place = {p.layer: i for i, p in enumerate(players)}
    rows = []
    for name, group in layers.groupby(key, sort=False):
        index = [place[n] for n in group.name]
        low, high = between_percentiles(draws[:, index].mean(1))
        rows.append(
            {
                "name": str(name),
                "layers": len(group),
                "effect": float(group.effect.mean()),
                "low": float(low),
                "high": float(high),
                "total": float(group.effect.sum()),
                "shap": float(group["shap"].sum(skipna=False)),
            }
        )
    return pd.DataFrame(rows).sort_values("effect", ascending=False, kind="stable").reset_index(drop=True)


def _validation(
    study: Study, fitted: FittedSurrogate, layers: pd.DataFrame, swaps: pd.DataFrame | None
) -> dict[str, Any] | None:
    """Predictions, never the combined effects, beside real swaps."""
    if swaps is None:
        return None
    plans: Sequence[Mapping[str, Any]] = study.get("validation_plan") or []
    return {
        **validation_scores(layers, swaps, fitted.direction, top_layers(plans)),
        "srcc_flips": swaps.attrs["srcc_flips"],
    }


def _scatter(fitted: FittedSurrogate) -> list[dict[str, Any]]:
    rows = zip(fitted.configs, fitted.out_of_fold, fitted.y, fitted.bits, strict=True)
    return [
        {"config": c, "predicted": float(p), "measured": float(y), "bits": float(b)} for c, p, y, b in rows
    ]

"""Sensitivity: what a swap in each layer does to the objective, with intervals and TreeSHAP, by layer,
operator type and block."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aquabit import _notebook
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
from aquabit.sensitivity.effects.swaps import predict_flips, top_layers, training_swaps, validation_scores
from aquabit.sensitivity.interactions import INTERACTIONS, SCORES, interactions, scheme_scores
from aquabit.sensitivity.shap_summaries import shap_by_scheme, swarm
from aquabit.sensitivity.surrogate.estimators import Estimator
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, Surrogate, fit_from_study
from aquabit.sensitivity.surrogate.learning_curve import CURVE, learning_curve
from aquabit.study import Study

PAIR_CONTEXTS = 32  # of the contexts, for pairs of layers and for whole groups

__all__ = ["Sensitivity", "explain", "predict_flips", "save", "validation_scores"]


@dataclass(frozen=True)
class Sensitivity:
    """Effects of one swap a layer on the objective, in its units, positive = worse; tables sorted by effect,
    largest first.

    ``ranking`` says what effects come from: "predicted" by the surrogate, or "combined" with real swaps
    (``combined.combine``). ``layers``: name, operator, block, swap, effect, low, high (95 % interval),
    predicted (the surrogate's effect), real (mean of n real swaps, NaN without), n, shap (mean |SHAP|, log
    units), shap_signed (mean SHAP above the layer's median weight error less that below), schemes ({scheme:
    predicted effect of going there from the swap's first}), shap_schemes ({scheme: mean SHAP in units where
    it is given}); and, where PSNR was measured and is not the objective, psnr_effect, psnr_low, psnr_high:
    the decibels that the swap loses, with the same kind of interval. ``operators`` and ``blocks``: name,
    layers (their number), effect (mean of a layer), low, high, total (sum over layers), shap (sum).
    ``interactions`` of the strongest layers and ``scores`` of schemes by operator type and block: see
    ``sensitivity.interactions``. ``validation`` compares real swaps with predictions, whatever the ranking.
    ``curve``: see ``learning_curve``; ``swarm``: SHAP values of single configurations by operator type
    (``swarm.swarm``).
    """

    objective: str
    direction: str
    protocol: str
    measurements: int
    bits: float
    swap: str
    layers: pd.DataFrame
    operators: pd.DataFrame
    blocks: pd.DataFrame
    surrogate: Mapping[str, Any]
    validation: Mapping[str, Any] | None = None
    scatter: list[dict[str, Any]] = field(default_factory=list)
    ranking: str = "predicted"
    interactions: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=INTERACTIONS))
    scores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=SCORES))
    curve: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=CURVE))
    swarm: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The value of ``sensitivity.json``: undefined numbers are None."""
        value = {
            "objective": self.objective,
            "direction": self.direction,
            "protocol": self.protocol,
            "measurements": self.measurements,
            "bits": self.bits,
            "swap": self.swap,
            "surrogate": dict(self.surrogate),
            "layers": self.layers.to_dict("records"),
            "operators": self.operators.to_dict("records"),
            "blocks": self.blocks.to_dict("records"),
            "validation": self.validation and dict(self.validation),
            "scatter": self.scatter,
            "ranking": self.ranking,
            "interactions": self.interactions.to_dict("records"),
            "scores": self.scores.to_dict("records"),
            "curve": self.curve.to_dict("records"),
            "swarm": dict(self.swarm),
        }
        return dict(_plain(value))

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Sensitivity:
        """The inverse of ``to_dict``; what older studies lack has its default. Raises AquabitError where a
        part is missing."""
        later = ("ranking", "interactions", "scores", "curve", "swarm")
        missing = [k for k in Sensitivity.__dataclass_fields__ if k not in value and k not in later]
        if missing:
            raise AquabitError(
                f"this is no sensitivity table: it has no {missing[0]!r}; run `aquabit explain` again"
            )
        columns = {
            "layers": None,
            "operators": None,
            "blocks": None,
            "interactions": INTERACTIONS,
            "scores": SCORES,
            "curve": CURVE,
        }
        tables = {k: _table(value[k], c) for k, c in columns.items() if k in value}
        return Sensitivity(
            **{k: tables.get(k, value[k]) for k in Sensitivity.__dataclass_fields__ if k in value}
        )

    def _repr_html_(self) -> str:
        score = self.surrogate.get("within_budget_srcc")
        quality = "unknown" if score is None else f"{score:.2f}"
        title = (
            f"{self.objective}, {self.swap} at {self.bits:g} bits: {self.measurements} measurements,"
            f" within-budget SRCC {quality}"
        )
        top = self.layers.head(20)
        rows = list(
            zip(
                top.name, top.effect.astype(float), top.low.astype(float), top.high.astype(float), strict=True
            )
        )
        listed = [(*row[:1], operator, *row[1:]) for row, operator in zip(rows, top.operator, strict=True)]
        figure = _notebook.intervals(rows, f"worsening of {self.objective} by {self.swap}, {self.ranking}")
        table = _notebook.table(("layer", "operator", "effect", "low", "high"), listed)
        return f"<p>{html.escape(title)}</p>{figure}{table}"


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
    drawn = draw_contexts(
        fitted.space, fitted.cost, bits, contexts, np.random.default_rng([seed, 0]), fitted.damages
    )
    predicted = predicted_effects(study, fitted, players, drawn, replicates, seed, progress)
    effects, models, scores = predicted.effects, predicted.models, {**fitted.scores, **predicted.scores}
    checked = _checked(study, fitted)
    shap = _tree_shap(fitted)
    layers, combined = _layer_table(
        fitted, effects, training_swaps(fitted, players, bits), checked, shap, seed
    )
    if fidelity and fitted.objective != "psnr":
        layers = _with_psnr(layers, study, players, drawn, bits, replicates, seed, progress, estimator)
    place, few = {p.layer: i for i, p in enumerate(players)}, drawn[:PAIR_CONTEXTS]
    pairs = interactions(
        fitted, effects, [place[name] for name in layers.name], models, few, seed, progress, combined.ratio
    )
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
        scores,
        _validation(study, fitted, layers, checked),
        _scatter(fitted),
        "combined" if layers.n.any() else "predicted",
        pairs,
        groups,
        learning_curve(fitted, seed, progress),
        swarm(fitted, *shap) if shap else {},
    )


@dataclass(frozen=True)
class Predicted:
    """Effects by prediction alone, the refitted models behind their replicates, and what is to be added to
    the scores."""

    effects: Effects
    models: list[Estimator]
    scores: dict[str, Any]


def predicted_effects(
    study: Study,
    fitted: FittedSurrogate,
    players: list[Player],
    contexts: Choices,
    replicates: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Predicted:
    """What the surrogate says of every player's swap in the contexts; where the study holds their output
    errors, what these say."""
    models = bootstrap(fitted, replicates, seed, progress)
    effects = predict_effects(fitted, players, contexts, models, seed, progress)
    refined = (
        refine(study, fitted, effects, contexts, replicates, seed, progress)
        if isinstance(fitted.surrogate, Surrogate)
        else None
    )
    if refined is None:
        return Predicted(effects, models, {})
    effects, screen, count = refined
    return Predicted(
        effects, models, {"contexts_run": count, "screen_within_budget_srcc": screen.within_budget_srcc}
    )


def _checked(study: Study, fitted: FittedSurrogate) -> pd.DataFrame | None:
    """Real swaps beside what the surrogate says of them; None without any."""
    flips = study.flips(fitted.objective)
    return None if flips.empty else predict_flips(fitted, flips, study.configs())


def _with_psnr(
    layers: pd.DataFrame,
    study: Study,
    players: list[Player],
    contexts: Choices,
    bits: float,
    replicates: int,
    seed: int,
    progress: Progress,
    estimator: str,
) -> pd.DataFrame:
    """``layers`` with the effects on PSNR; as it is where too few measurements have one, or all the same."""
    try:
        fitted = fit_from_study(study, "psnr", seed, progress=progress, estimator=estimator, baselines=())
    except AquabitError:
        return layers
    effects = predicted_effects(study, fitted, players, contexts, replicates, seed, progress).effects
    checked, swaps = _checked(study, fitted), training_swaps(fitted, players, bits)
    swaps = swaps if checked is None else pd.concat([swaps, checked[swaps.columns]])
    found = combine(players, effects.effect(fitted.space.schemes), effects.replicates, swaps, seed)
    table = pd.DataFrame(
        {"psnr_effect": found.effect, "psnr_low": found.low, "psnr_high": found.high},
        [p.layer for p in players],
    )
    return layers.join(table, on="name")


def save(study: Study, sensitivity: Sensitivity) -> None:
    """Store the sensitivity in the study."""
    with study.writing():
        study.set(sensitivity=sensitivity.to_dict())


def _layer_table(
    fitted: FittedSurrogate,
    effects: Effects,
    training: pd.DataFrame,
    flips: pd.DataFrame | None,
    shap: tuple[np.ndarray, float] | None,
    seed: int,
) -> tuple[pd.DataFrame, Combined]:
    """The table of layers, and the combined effects. Swaps among the ``training`` measurements are part of
    the prediction; ``flips``, which it never saw, of the ranking alone."""
    nodes, schemes = graph_layers(fitted.graph), fitted.space.schemes
    values = np.full(fitted.choices.weights.shape, np.nan) if shap is None else shap[0]
    signed = signed_shap(values, member_parts(fitted.encoder, fitted.choices)["error"]) if shap else values[0]
    of_schemes = shap_by_scheme(fitted, *shap) if shap else [{}] * len(signed)
    effect = effects.effect(schemes)
    ours, found = (
        combine(effects.players, effect, effects.replicates, swaps, seed)
        for swaps in (training, training if flips is None else pd.concat([training, flips[training.columns]]))
    )
    real, count = real_means(effects.players, training[:0] if flips is None else flips)
    rows = []
    for i, player in enumerate(effects.players):
        node = nodes[player.layer]
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
                "shap": float(np.abs(values[:, player.column]).mean()),
                "shap_signed": float(signed[player.column]),
                "schemes": {**effects.of_schemes(i, schemes), str(player.after): float(ours.effect[i])},
                "shap_schemes": of_schemes[player.column],
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
        low, high = np.percentile(draws[:, index].mean(1), [2.5, 97.5]) if len(draws) else (np.nan, np.nan)
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
    study: Study, fitted: FittedSurrogate, layers: pd.DataFrame, flips: pd.DataFrame | None
) -> dict[str, Any] | None:
    """Predictions, never the combined effects, beside real swaps."""
    if flips is None:
        return None
    plans: Sequence[Mapping[str, Any]] = study.get("validation_plan") or []
    return {
        **validation_scores(layers, flips, fitted.direction, top_layers(plans)),
        "srcc_flips": flips.attrs["srcc_flips"],
    }


def _scatter(fitted: FittedSurrogate) -> list[dict[str, Any]]:
    rows = zip(fitted.configs, fitted.out_of_fold, fitted.y, fitted.bits, strict=True)
    return [
        {"config": c, "predicted": float(p), "measured": float(y), "bits": float(b)} for c, p, y, b in rows
    ]


def _plain(value: Any) -> Any:
    """JSON values: numpy scalars as Python's, undefined numbers as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: list[dict[str, Any]], columns: list[str] | None = None) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=columns if columns and not rows else None)
    numbers = [
        "effect",
        "low",
        "high",
        "predicted",
        "real",
        "total",
        "shap",
        "shap_signed",
        "interaction",
        "change",
        "score",
    ]
    numbers += ["psnr_effect", "psnr_low", "psnr_high"]
    for name in table.columns.intersection(numbers):
        table[name] = table[name].astype(float)
    return table

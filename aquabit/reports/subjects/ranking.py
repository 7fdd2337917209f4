"""Layers by how much they hurt: the table, the figure, the sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from aquabit.reports import drawing, style, words
from aquabit.reports.facts import Facts, number
from aquabit.reports.plan import Plan, Tables, rows_high

LAYERS = ["layer", "operator", "block", "weights", "macs", "effect", "low", "high", "level"]
LAYERS += ["real", "real_low", "real_high", "real_level", "swaps", "scheme", "act"]
LAYERS += ["shap", "shap_signed", "psnr_effect", "psnr_low", "psnr_high"]


def layers(facts: Facts) -> pd.DataFrame:
    """One row a layer, most harmful first: its place and size, the effect that ranks it, the mean of its real
    swaps, what the winner gives it, mean |SHAP| and its signed form (log units) of the surrogate, and the
    decibels of PSNR that the swap loses. ``level`` is of the intervals of effects, ``real_level`` of real
    swaps.
    """
    told = facts.sensitivity.layers.to_dict("records") if facts.sensitivity else []
    effects = {str(r["name"]): r for r in told}
    real = {str(r["layer"]): r for r in facts.validation.get("rows") or []}
    winner, rows = facts.winner(), []
    for name in facts.layers or dict.fromkeys([*effects, *real]):
        node, effect, swap = facts.layers.get(name, {}), effects.get(name, {}), real.get(name, {})
        chosen = winner[name] if winner else None
        values = {k: number(v) for k, v in effect.items() if k in LAYERS}
        row = {
            "layer": name,
            **{k: str(node.get(k) or effect.get(k) or "") for k in ("operator", "block")},
            "weights": float(np.prod(node["shape"])) if "shape" in node else math.nan,
            "macs": number(node.get("macs")),
            "level": facts.effect_level if effect else "",
            "real": number(swap.get("real")),
            **{f"real_{end}": number(swap.get(end)) for end in ("low", "high")},
            "real_level": facts.swap_level if swap else "",
            "swaps": int(swap.get("n") or 0),
            "scheme": str(chosen.weight) if chosen else "",
            "act": winner.mean_act(name) if winner else math.nan,
        }
        rows.append({**values, **row})
    numbers = [k for k in LAYERS if k not in ("layer", "operator", "block", "level", "real_level", "scheme")]
    table = pd.DataFrame(rows, columns=LAYERS).astype(
        {k: float for k in numbers if k not in ("swaps", "act")}
    )
    return table.sort_values("effect", ascending=False, na_position="last", kind="stable", ignore_index=True)


def layer_schemes(facts: Facts) -> pd.DataFrame:
    """layer, scheme, error, damage, effect, shap: of every layer with every weight scheme or activation
    width (a8) that was fitted: relative squared error of its output (of its weight, where inputs are
    unknown) and of the denoiser's output with that layer alone, predicted effect of going there from the
    swap's first scheme, and mean SHAP value, in the objective's units, of configurations that give it
    that."""
    told = facts.sensitivity.layers.to_dict("records") if facts.sensitivity else []
    effects = {str(r["name"]): r for r in told}
    keys = dict.fromkeys(facts.features)
    for name, row in effects.items():
        keys |= dict.fromkeys(
            (name, str(s)) for part in ("schemes", "shap_schemes") for s in _by_scheme(row, part)
        )
    rows = []
    for name, scheme in keys:
        row, known = effects.get(name, {}), facts.features.get((name, scheme), {})
        parts = [number(_by_scheme(row, k).get(scheme)) for k in ("schemes", "shap_schemes")]
        rows.append((name, scheme, number(known.get("error")), number(known.get("damage")), *parts))
    return pd.DataFrame(rows, columns=["layer", "scheme", "error", "damage", "effect", "shap"])


def _by_scheme(row: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """{scheme: number} of a layer's row; empty where an older study has none."""
    value = row.get(part)
    return value if isinstance(value, dict) else {}


def draw_layer_ranking(
    table: pd.DataFrame,
    axes: Axes,
    metric: str = "FID",
    swap: str = "",
    top: int = 20,
    effects: str = "predicted",
) -> None:
    """The ``top`` most harmful layers: effects (``effects`` says which) with intervals, real swaps with
    theirs beside them."""
    table = table[table.effect.notna()].head(top).reset_index(drop=True)
    at = np.arange(len(table), dtype=float)
    look: dict[str, Any] = {"ms": 4, "elinewidth": 1.1, **drawing.PREDICTED}
    look["label"] = drawing.with_level(effects, table)
    drawn = drawing.intervals(axes, table, "effect", at - 0.14, ("low", "high"), **look)
    style.name_points(axes, drawn, list(table.layer))
    real = table[table.real.notna()]
    if len(real):
        look = {"ms": 3.6, "elinewidth": 0.8, **drawing.MEASURED}
        look["label"] = drawing.with_level("measured swaps", real, "real_level")
        drawn = drawing.intervals(
            axes, real, "real", at[real.index] + 0.18, ("real_low", "real_high"), **look
        )
        style.name_points(axes, drawn, list(real.layer))
    drawing.zero(axes)
    style.symmetric_axis(
        axes, "x", table[["effect", "low", "high", "real", "real_low", "real_high"]], ticks_most=3
    )
    style.name_ticks(axes, axes.set_yticks(at, [style.label(n) for n in table.layer]), list(table.layer))
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for i in range(0, len(table), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#F6F6F6", lw=0, zorder=0)
    axes.set_xlabel(drawing.effect_label(metric, swap))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)


def sentence(facts: Facts, found: Tables) -> words.Sentence | None:
    """Where quantization hurts most; None where no effect is known."""
    operators, ranked = found["operators"], found["layers"].dropna(subset=["effect"])
    if ranked.empty:
        return None
    what = f"the swap from {' to '.join(facts.swap.split(':'))}" if facts.swap else "a swap of its scheme"
    first, rest, level = ranked.iloc[0], ranked.iloc[1:3], facts.effect_level
    source = "a combined (predicted and measured)" if facts.effects == "combined" else "a predicted"
    text = (
        f"Quantization hurts most in {first.layer}: in {facts.contexts}, {what} worsens {facts.metric} there"
        f" by {source} "
    )
    text += words.figures(first.effect) + words.ends(first.low, first.high, level)
    if math.isfinite(first.psnr_effect):
        text += (
            f" and loses {words.figures(first.psnr_effect)} dB of"
            f" PSNR{words.ends(first.psnr_low, first.psnr_high, level)}"
        )
    if len(rest):
        text += ", followed by " + " and ".join(
            f"{r.layer} {words.figures(r.effect)}{words.ends(r.low, r.high)}" for r in rest.itertuples()
        )
    if len(operators) and math.isfinite(operators.effect.iloc[0]):
        o = operators.iloc[0]
        text += (
            f"; the operator type that suffers most is {o['name']},"
            f" {words.figures(o.effect)}{words.ends(o.low, o.high)} a layer"
        )
    clear = int((ranked.low > 0).sum())
    return words.Sentence(f"{text}; {clear} of {len(ranked)} layers have a {level} interval above zero.")


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    measured = f" with its {facts.swap_level} interval" if facts.swap_level else ""
    yield Plan(
        "layer_ranking",
        "where",
        "layers",
        "layers",
        rows_high(style.DOUBLE, 0.2, 20, "layer"),
        lambda t, a: draw_layer_ranking(t, a, facts.metric, facts.swap, effects=facts.effects),
        f"The most harmful layers: {facts.effects} effects with their {facts.effect_level} intervals, and"
        f" the mean of measured swaps of the same layer{measured}, both in {facts.contexts}.",
    )

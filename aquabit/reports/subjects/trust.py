"""How good the surrogate is: scores beside baselines, predictions out of fold, the learning curve."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from aquabit.reports import drawing, style, words
from aquabit.reports.facts import Facts, number
from aquabit.reports.lacks import Lacks
from aquabit.reports.plan import Plan, Tables, fixed

SCORES = ("within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "noise_ceiling")


def surrogate(facts: Facts) -> pd.DataFrame:
    """model, within_budget_srcc, among_good, good, srcc, kendall, ndcg10, r2, noise_ceiling, good_ceiling:
    out-of-fold scores of the surrogate, then its baselines; ``among_good`` is the within-budget SRCC among
    the ``good`` configurations, of which there are so many (NaN where they are too few, or the model has
    none)."""
    own, rows = facts.scores, []
    good = own.get("among_good") or {}
    among = {"surrogate": good.get("srcc"), **(good.get("baselines") or {})}
    for name, scores in {"surrogate": own, **(own.get("baselines") or {})}.items() if own else ():
        first, *rest = (number(scores.get(k)) for k in SCORES)
        ceiling = number(good.get("noise_ceiling")) if name == "surrogate" else math.nan
        rows.append((str(name), first, number(among.get(name)), number(good.get("count")), *rest, ceiling))
    columns = ["model", SCORES[0], "among_good", "good", *SCORES[1:], "good_ceiling"]
    return pd.DataFrame(rows, columns=columns)


def surrogate_scatter(facts: Facts) -> pd.DataFrame:
    """config, bits, predicted, measured: out-of-fold predictions beside the measured objective."""
    told = facts.sensitivity.scatter if facts.sensitivity else []
    numbers = ("bits", "predicted", "measured")
    rows = [(str(r.get("config", "")), *(number(r.get(k)) for k in numbers)) for r in told]
    table = pd.DataFrame(rows, columns=["config", *numbers])
    return table.dropna(subset=["predicted", "measured"]).reset_index(drop=True)


def learning_curve(facts: Facts) -> pd.DataFrame:
    """measurements, within_budget_srcc, low, high, level: what the surrogate scores after a part of the
    measurements."""
    told, columns = facts.sensitivity, ["measurements", "within_budget_srcc", "low", "high"]
    if told is None or told.curve.empty:
        return pd.DataFrame([], columns=[*columns, "level"])
    table = told.curve.reindex(columns=columns).astype(float)
    table["level"] = told.within_budget.percent
    return table.dropna(subset=columns[:2]).reset_index(drop=True)


def draw_surrogate_scatter(
    table: pd.DataFrame, axes: Axes, metric: str = "FID", within_budget_srcc: float = math.nan
) -> None:
    """Out-of-fold predictions against measurements, coloured by bits; annotated with the within-budget
    SRCC and no other."""
    low, high, log = drawing.limits(table[["predicted", "measured"]])
    drawing.scale(axes, "x", low, high, log)
    drawing.scale(axes, "y", low, high, log)
    axes.plot([low, high], [low, high], color=style.BLACK, lw=0.7, ls="--")
    bits = table.bits.to_numpy(float)
    if np.isfinite(bits).any():
        norm = Normalize(np.nanmin(bits), np.nanmax(bits))
        colours = matplotlib.colormaps["cividis"].resampled(12)
        look: dict[str, Any] = {"c": bits, "cmap": colours, "norm": norm, "edgecolors": "white"}
        dots = axes.scatter(table.measured, table.predicted, s=11, linewidths=0.2, **look)
        tips = [
            f"{r.config}: {r.bits:.2f} bits, {metric} {r.measured:.3g}, predicted {r.predicted:.3g}"
            for r in table.itertuples()
        ]
        style.name_points(axes, dots, tips, "tip")
        style.colour_bar(axes, norm, colours, "bits per weight")
    else:
        axes.plot(table.measured, table.predicted, ls="", ms=3, **drawing.PREDICTED)
    score = "unknown" if math.isnan(within_budget_srcc) else f"{within_budget_srcc:.2f}"
    drawing.note(axes, [f"within-budget SRCC {score}", f"{len(table)} configurations"])
    axes.set_xlabel(f"{metric}, measured")
    axes.set_ylabel(f"{metric}, predicted out of fold")


def draw_curve(
    table: pd.DataFrame, axes: Axes, ceiling: float = math.nan, baselines: dict[str, float] | None = None
) -> None:
    """Within-budget SRCC after a part of the measurements, its interval as a band; the noise ceiling and
    the best baseline as lines."""
    text = drawing.with_level("surrogate", table)
    axes.fill_between(table.measurements, table.low, table.high, color=style.BLUE, alpha=0.2, lw=0)
    axes.plot(table.measurements, table.within_budget_srcc, color=style.BLUE, marker="o", ms=3.5, label=text)
    if math.isfinite(ceiling):
        axes.axhline(ceiling, color=style.BLACK, lw=0.9, ls=(0, (5, 2)), label="noise ceiling")
    best = max((baselines or {}).items(), key=lambda item: item[1], default=None)
    if best is not None:
        axes.axhline(
            best[1],
            color=style.VERMILLION,
            lw=0.9,
            ls=":",
            label=f"{style.label(best[0].replace('_', ' '), 28)}, all measurements",
        )
    low = min([0.0, *table.low.dropna(), *table.within_budget_srcc])
    axes.set_ylim(low - (0.04 if low < 0 else 0), 1.0)
    axes.set_xlim(0, 1.06 * float(table.measurements.max()))
    axes.set_xlabel("measurements that the surrogate learns from")
    axes.set_ylabel("within-budget SRCC")
    axes.legend(loc="lower right")


def sentence(facts: Facts, found: Tables, lacks: Lacks) -> words.Sentence:
    scores, halves = found["surrogate"], found["agreement"]
    if scores.empty or math.isnan(scores.within_budget_srcc.iloc[0]):
        return words.Sentence(
            *lacks.get(
                "surrogate",
                (
                    "The surrogate's within-budget SRCC is not stored, so the ranking is not to be trusted.",
                    "",
                ),
            )
        )
    own, rest = scores.within_budget_srcc.iloc[0], scores.iloc[1:]
    beside = "; ".join(f"{r.model} {words.score(r.within_budget_srcc)}" for r in rest.itertuples())
    ceiling = scores.noise_ceiling.iloc[0]
    beside += f"; noise ceiling {words.score(ceiling)}" if math.isfinite(ceiling) else ""
    text = (
        "Between unseen configurations of equal size, the surrogate reaches a within-budget SRCC of"
        f" {words.score(own)}"
    )
    text += f" ({beside})" if beside else ""
    if len(rest) and own <= rest.within_budget_srcc.max():
        text += ", no better than a baseline, so its ranking is not to be trusted"
    good, among = scores.good.iloc[0], scores.among_good.iloc[0]
    if math.isfinite(good):
        few = (
            f"; the {words.count(good)} good ones among them (at most 1.25 times the least error at their"
            " size) are too few to be scored alone"
        )
        text += (
            f"; among the {words.count(good)} good ones {words.score(among)}" if math.isfinite(among) else few
        )
    if "swaps" in lacks:
        return words.Sentence(
            f"{text}; its effects have not been checked against real swaps yet.", lacks["swaps"][1]
        )
    checked = facts.validation
    if halves.empty:
        agree = _agree(number(checked.get("srcc")), number(checked.get("sign_agreement")))
        text += f"; its predicted effects and {words.count(checked.get('flips'))} real swaps {agree}"
        return words.Sentence(text + ".")
    parts = [
        f"{words.count(r.flips)} real swaps of {words.count(r.layers)} layer{'s' * (r.layers != 1)} {r.half}"
        f" {_agree(r.srcc, r.sign_agreement)}"
        for r in halves.itertuples()
        if r.layers
    ]
    return words.Sentence(f"{text}; its predicted effects and {'; they and '.join(parts)}.")


def _agree(srcc: float, sign: float) -> str:
    same = f" with the same sign in {100 * sign:.0f} % of them" if math.isfinite(sign) else ""
    if math.isnan(srcc):
        return f"agree{same} (too few for an SRCC)"
    return f"agree at SRCC {words.score(srcc)}{',' * bool(same)}{same}"


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    scores, rest = facts.scores, found["surrogate"].iloc[1:].dropna(subset=["within_budget_srcc"])
    baselines = dict(zip(rest.model, rest.within_budget_srcc, strict=True))
    yield Plan(
        "surrogate_scatter",
        "trust",
        "scatter",
        "surrogate_scatter",
        fixed(style.SINGLE, 2.7),
        lambda t, a: draw_surrogate_scatter(t, a, facts.metric, number(scores.get("within_budget_srcc"))),
        f"{facts.metric} predicted for configurations that the surrogate was not trained on, beside its"
        " measured value. Size alone spreads the points along the diagonal: the within-budget SRCC is what"
        " counts.",
    )
    level = drawing.levels(found["learning_curve"])
    yield Plan(
        "learning_curve",
        "trust",
        "curve",
        "learning_curve",
        fixed(style.SINGLE, 2.3),
        lambda t, a: draw_curve(t, a, number(scores.get("noise_ceiling")), baselines),
        "What the surrogate scores after a part of the measurements, out of fold,"
        f" with its {level} interval: whether more would help.",
    )

"""Predicted effects beside real swaps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from aquabit.reports import drawing, style
from aquabit.reports.facts import Facts, number
from aquabit.reports.plan import Plan, Tables, fixed


def swaps(facts: Facts) -> pd.DataFrame:
    """layer, operator, predicted, real, low, high, level, n, checks: predicted effects beside the mean of n
    real swaps; ``checks``: "random" layers, or "top" ones, which were swapped because the ranking puts them
    first."""
    columns = ["layer", "operator", "predicted", "real", "low", "high", "level", "n", "checks"]
    rows = []
    for r in facts.validation.get("rows") or []:
        layer, numbers = str(r["layer"]), (number(r.get(k)) for k in columns[2:6])
        operator = str(facts.layers.get(layer, {}).get("operator", ""))
        rest = facts.swap_level, int(r.get("n") or 0), str(r.get("checks") or "random")
        rows.append((layer, operator, *numbers, *rest))
    return pd.DataFrame(rows, columns=columns)


def agreement(facts: Facts) -> pd.DataFrame:
    """half, srcc, sign_agreement, layers, flips: how predicted effects agree with real swaps of layers
    drawn at random, and of those that the ranking puts first; empty where these were not kept apart."""
    halves = {
        "drawn at random": facts.validation.get("random"),
        "first in the ranking": facts.validation.get("top"),
    }
    rows = [
        (
            name,
            *(number(half.get(k)) for k in ("srcc", "sign_agreement")),
            *(int(half.get(k) or 0) for k in ("layers", "flips")),
        )
        for name, half in halves.items()
        if half
    ]
    return pd.DataFrame(rows, columns=["half", "srcc", "sign_agreement", "layers", "flips"])


def draw_swaps(
    table: pd.DataFrame,
    axes: Axes,
    metric: str = "FID",
    srcc: float = math.nan,
    sign_agreement: float = math.nan,
    flips: int = 0,
) -> None:
    """Predicted effects of layers against the mean of real swaps, with the intervals of the latter; layers
    that were drawn at random, of which the scores speak, apart from those that were swapped because the
    ranking puts them first."""
    for which in ("x", "y"):  # one scale, so that agreement is a straight line
        style.symmetric_axis(axes, which, table[["predicted", "real", "low", "high"]])
    ends = np.linspace(*axes.get_xlim(), 400)
    axes.plot(ends, ends, color=style.BLACK, lw=0.7, ls="--", scalex=False, scaley=False)
    axes.axhline(0, color="#8C8C8C", lw=0.6)
    axes.axvline(0, color="#8C8C8C", lw=0.6)
    halves = table.checks if "checks" in table else pd.Series("random", index=table.index)
    for half, look, text in (
        ("top", {**drawing.MEASURED, "markerfacecolor": style.VERMILLION}, "first in the ranking"),
        ("random", drawing.MEASURED, "drawn at random"),
    ):
        part = table[halves == half]
        if len(part):
            look = {"ms": 4, "elinewidth": 0.7, "mew": 0.9, "label": text, "upright": True, **look}
            drawn = drawing.intervals(axes, part, "real", part.predicted, ("low", "high"), **look)
            style.name_points(axes, drawn, list(part.layer))
    apart = bool((halves == "top").any())
    lines = ["SRCC unknown" if math.isnan(srcc) else f"SRCC {srcc:.2f}"]
    known = drawing.levels(table)
    lines += [] if math.isnan(sign_agreement) else [f"same sign {100 * sign_agreement:.0f} %"]
    if apart:
        axes.legend(loc="lower right")
        lines[0] += " of random ones"
    lines += [f"{flips or int(table.n.sum())} real swaps of {len(table)} layers"]
    drawing.note(axes, [*lines, f"bars: {known} intervals"] if known else lines)
    axes.set_xlabel(f"predicted worsening of {metric}")
    axes.set_ylabel(f"measured worsening of {metric}")


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    checked = facts.validation
    yield Plan(
        "swaps",
        "trust",
        "swaps",
        "swaps",
        fixed(style.SINGLE, 2.7),
        lambda t, a: draw_swaps(
            t,
            a,
            facts.metric,
            number(checked.get("srcc")),
            number(checked.get("sign_agreement")),
            int(checked.get("flips") or 0),
        ),
        "Effects of layers as predicted, beside the mean of real swaps with its"
        f" {facts.swap_level} interval.",
    )

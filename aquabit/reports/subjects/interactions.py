"""Pairs of layers: what swapping both worsens beyond the sum of each alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from aquabit.reports import drawing, style
from aquabit.reports.facts import Facts
from aquabit.reports.plan import Plan, Tables, fixed

LAYERS_MOST = 20  # rows that can be read in print


def pairs(facts: Facts) -> pd.DataFrame:
    """a, b, interaction, low, high, level: what swapping both worsens beyond the sum of each alone,
    predicted, largest first."""
    columns = ["a", "b", "interaction", "low", "high", "level"]
    if facts.sensitivity is None:
        return pd.DataFrame([], columns=columns)
    return facts.sensitivity.interactions.assign(level=facts.effect_level).reindex(columns=columns)


def draw_pairs(table: pd.DataFrame, axes: Axes, metric: str = "FID", top: int = LAYERS_MOST) -> None:
    """The interactions of the layers in the ``top`` strongest pairs, as a symmetric matrix; what was not
    looked at stays white."""
    names = list(dict.fromkeys(n for r in table.head(top).itertuples() for n in (r.a, r.b)))[:top]
    place = {n: i for i, n in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    for r in table[table.a.isin(names) & table.b.isin(names)].itertuples():
        values[place[r.a], place[r.b]] = values[place[r.b], place[r.a]] = r.interaction
    norm, colours = drawing.diverging(values)
    drawing.cells(
        axes, values, norm, colours, lambda i, j: f"{names[i]} with {names[j]}: {values[i, j]:+.3g} {metric}"
    )
    axes.set_aspect("equal")
    ticks = axes.set_yticks(
        range(len(names)), [f"{style.label(n, 44)}  {i + 1}" for i, n in enumerate(names)]
    )
    axes.set_xticks(range(len(names)), [str(i + 1) for i in range(len(names))])
    style.name_ticks(axes, ticks, names)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    style.colour_bar(axes, norm, colours, f"interaction, {style.label(metric)}")


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    yield Plan(
        "pairs",
        "why",
        "pairs",
        "pairs",
        fixed(style.DOUBLE, 3.6),
        lambda t, a: draw_pairs(t, a, facts.metric),
        f"What swapping both layers worsens {facts.metric} beyond the sum of each alone, predicted, for the"
        f" layers in the {LAYERS_MOST} strongest pairs.",
    )

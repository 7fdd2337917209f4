"""SHAP values of single configurations by operator type."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from aquabit.reports import style
from aquabit.reports.facts import Facts, number
from aquabit.reports.plan import Plan, Tables, rows_high

OPERATORS_MOST = 16  # rows that can be read in print


def shap_swarm(facts: Facts) -> pd.DataFrame:
    """operator, config, bits, shap: for single configurations the sum of SHAP values over the layers of an
    operator type, in the objective's units and positive = worse than the average prediction, and the mean
    code bits of its weights; operator types by mean size of SHAP."""
    stored = facts.sensitivity.swarm if facts.sensitivity else {}
    rows = [
        (str(operator), str(config), number(bits[i]), number(shap[i]))
        for i, operator in enumerate(stored.get("operators") or [])
        for config, bits, shap in zip(
            stored.get("configs") or [], stored.get("bits") or [], stored.get("shap") or [], strict=True
        )
    ]
    table = pd.DataFrame(rows, columns=["operator", "config", "bits", "shap"])
    size = table.shap.abs().groupby(table.operator).mean()
    return (
        table.assign(size=table.operator.map(size))
        .sort_values("size", ascending=False, kind="stable", ignore_index=True)
        .drop(columns="size")
    )


def draw_swarm(table: pd.DataFrame, axes: Axes, metric: str = "FID", top: int = OPERATORS_MOST) -> None:
    """A beeswarm: a row an operator type, a point a configuration, coloured by the mean bits that it gives
    to these layers."""
    names = list(dict.fromkeys(table.operator))[:top]
    table = table[table.operator.isin(names)]
    style.symmetric_axis(axes, "x", table.shap, ticks_most=3)
    seen = table.bits[np.isfinite(table.bits)]
    norm = Normalize(seen.min() if len(seen) else 0.0, seen.max() if len(seen) else 1.0)
    colours = matplotlib.colormaps["cividis"].resampled(12)
    ends = axes.transData.transform(np.array([[v, 0.0] for v in axes.get_xlim()]))[:, 0]
    for i, name in enumerate(names):
        part = table[(table.operator == name) & table.shap.notna()].sort_values("shap")
        shown = axes.transData.transform(np.stack([part.shap, np.zeros(len(part))], 1))[:, 0]
        at = i - _spread((shown - ends[0]) / (ends[1] - ends[0]))
        dots = axes.scatter(part.shap, at, c=part.bits, cmap=colours, norm=norm, s=5, linewidths=0, zorder=3)
        style.name_points(
            axes,
            dots,
            [
                f"{r.operator}, {r.bits:.2f} bits: {r.shap:+.3g} {metric} ({r.config})"
                for r in part.itertuples()
            ],
            "tip",
        )
        axes.axhline(i, color="#D0D0D0", lw=0.5, zorder=1)
    axes.axvline(0, color=style.BLACK, lw=0.6)
    axes.set_yticks(range(len(names)), [style.label(n, 30) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"SHAP value, {style.label(metric)} (positive = worse than average)")
    style.colour_bar(axes, norm, colours, "mean bits of its weights")


def _spread(places: np.ndarray, bins: int = 90, most: float = 0.42) -> np.ndarray:
    """Offsets [n] in [-most, most] that keep points of one place (sorted, 0 to 1) apart: alternating
    sides, further out as they crowd."""
    column = np.floor(places * bins).astype(int)
    rank = np.arange(len(column)) - np.searchsorted(column, column) if len(column) else column
    offset = np.where(rank % 2 == 1, 1, -1) * ((rank + 1) // 2)
    return np.asarray(offset * min(0.11, most / max(1, int(np.abs(offset).max(initial=1)))))


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    yield Plan(
        "shap_swarm",
        "why",
        "swarm",
        "shap_swarm",
        rows_high(style.DOUBLE, 0.27, OPERATORS_MOST, "operator"),
        lambda t, a: draw_swarm(t, a, facts.metric),
        "SHAP values of single configurations, summed over the layers of an operator type, in the objective's"
        " units; colour is the mean bits that a configuration gives to these layers.",
    )

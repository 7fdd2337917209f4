"""What speaks of causes: SHAP values by operator type, pairs of layers, blocks by operator types, scores
of schemes, the learning curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from aquabit.reports import style
from aquabit.reports.facts import Facts, number

OPERATORS_MOST, LAYERS_MOST, BLOCKS_MOST = 16, 20, 40  # rows of a figure that can be read in print


def shap_swarm(facts: Facts) -> pd.DataFrame:
    """operator, config, bits, shap: for single configurations the sum of SHAP values over the layers of an
    operator type, in the objective's units and positive = worse than the average prediction, and the mean
    code bits of its weights; operator types by mean size of SHAP."""
    stored = facts.sensitivity.get("swarm") or {}
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


def pairs(facts: Facts) -> pd.DataFrame:
    """a, b, interaction, low, high: what swapping both worsens beyond the sum of each alone, predicted,
    largest first."""
    rows = [
        (str(r.get("a")), str(r.get("b")), *(number(r.get(k)) for k in ("interaction", "low", "high")))
        for r in facts.sensitivity.get("interactions") or []
    ]
    return pd.DataFrame(rows, columns=["a", "b", "interaction", "low", "high"])


def block_operator(layers: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """block, operator, layers, effect: the mean effect of the layers of an operator type in a block, in
    execution order."""
    order = {
        block: i for i, block in enumerate(dict.fromkeys(str(n.get("block")) for n in facts.layers.values()))
    }
    known = layers[layers.effect.notna()]
    table = (
        known.groupby(["block", "operator"], sort=False)
        .agg(layers=("layer", "size"), effect=("effect", "mean"))
        .reset_index()
    )
    place = table.block.map(lambda b: order.get(b, len(order)))
    return (
        table.assign(place=place)
        .sort_values(["place", "operator"], kind="stable", ignore_index=True)
        .drop(columns="place")
    )


def scheme_scores(facts: Facts) -> pd.DataFrame:
    """level, name, scheme, layers, change, score, low, high: predicted scores of schemes by operator type
    and by block, larger = better."""
    rows = [
        (
            *(str(r.get(k)) for k in ("level", "name", "scheme")),
            number(r.get("layers")),
            *(number(r.get(k)) for k in ("change", "score", "low", "high")),
        )
        for r in facts.sensitivity.get("scores") or []
    ]
    return pd.DataFrame(rows, columns=["level", "name", "scheme", "layers", "change", "score", "low", "high"])


def learning_curve(facts: Facts) -> pd.DataFrame:
    """measurements, within_budget_srcc, low, high: what the surrogate scores after a part of the
    measurements."""
    columns = ["measurements", "within_budget_srcc", "low", "high"]
    rows = [tuple(number(r.get(c)) for c in columns) for r in facts.sensitivity.get("curve") or []]
    return (
        pd.DataFrame(rows, columns=columns)
        .dropna(subset=["measurements", "within_budget_srcc"])
        .reset_index(drop=True)
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


def draw_pairs(table: pd.DataFrame, axes: Axes, metric: str = "FID", top: int = LAYERS_MOST) -> None:
    """The interactions of the layers in the ``top`` strongest pairs, as a symmetric matrix; what was not
    looked at stays white."""
    names = list(dict.fromkeys(n for r in table.head(top).itertuples() for n in (r.a, r.b)))[:top]
    place = {n: i for i, n in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    for r in table[table.a.isin(names) & table.b.isin(names)].itertuples():
        values[place[r.a], place[r.b]] = values[place[r.b], place[r.a]] = r.interaction
    norm, colours = diverging(values)
    cells(
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


def draw_block_operator(
    table: pd.DataFrame, axes: Axes, metric: str = "FID", swap: str = "", top: int = BLOCKS_MOST
) -> None:
    """Mean effects by block (rows, in execution order; the ``top`` most harmful) and operator type; white
    where there is no such layer."""
    worst = table.groupby("block").effect.max().nlargest(top).index
    blocks = [b for b in dict.fromkeys(table.block) if b in worst]
    operators = list(dict.fromkeys(table.operator))
    values = (
        table.pivot(index="block", columns="operator", values="effect")
        .reindex(blocks)[operators]
        .to_numpy(float)
    )
    norm, colours = diverging(values)
    cells(
        axes,
        values,
        norm,
        colours,
        lambda i, j: f"{blocks[i]}, {operators[j]}: {values[i, j]:+.3g} {metric} a layer",
    )
    axes.set_yticks(range(len(blocks)), [style.label(b, 34) for b in blocks])
    axes.set_xticks(
        range(len(operators)),
        [style.label(o, 24) for o in operators],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
    )
    axes.grid(visible=False)
    axes.tick_params(length=0)
    what = f" by {' to '.join(swap.split(':'))}" if swap else ""
    style.colour_bar(axes, norm, colours, f"worsening of {style.label(metric)}{style.label(what)}")


def cells(axes: Axes, values: np.ndarray, norm: Any, colours: Any, tip: Callable[[int, int], str]) -> None:
    """Squares at (column, row) of every finite value, each with its ``tip`` (row, column); shapes, so that
    they print sharply."""
    known = list(zip(*np.nonzero(np.isfinite(values)), strict=True))
    squares = PatchCollection(
        [Rectangle((j - 0.5, i - 0.5), 1, 1) for i, j in known], cmap=colours, norm=norm, linewidths=0.2
    )
    squares.set_array(np.array([values[i, j] for i, j in known]))
    squares.set_edgecolor("face")
    axes.add_collection(squares)
    style.name_points(axes, squares, [tip(int(i), int(j)) for i, j in known], "tip")
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)


def diverging(values: np.ndarray) -> tuple[Any, Any]:
    """White at zero, purple = worse, orange = better, darker = larger (readable in grey and by the
    colour-blind); logarithmic beyond the typical size where few values dwarf the rest."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    most = float(size.max()) if len(size) else 1.0
    colours = matplotlib.colormaps["PuOr"].resampled(41)
    if len(size) and most > 12 * float(np.median(size)):
        near = 10.0 ** math.floor(math.log10(float(np.median(size))))
        return SymLogNorm(near, linscale=0.6, vmin=-most, vmax=most, base=10), colours
    return Normalize(-most, most), colours


def draw_scores(table: pd.DataFrame, axes: Axes, level: str = "operator", top: int = BLOCKS_MOST) -> None:
    """Scores of schemes by operator type or block (``level``), as Qua²SeDiMo's box plots: a box over the
    schemes, a mark a scheme."""
    table = table[(table.level == level) & table.score.notna()]
    order = table.groupby("name", sort=False).score.median().sort_values()
    names = list(order.index[:top])
    at = {n: i for i, n in enumerate(names)}
    table = table[table.name.isin(names)]
    boxed = [n for n in names if (table.name == n).sum() >= 4]
    if boxed:
        line: dict[str, Any] = {"color": "#8C8C8C", "lw": 0.7}
        axes.boxplot(
            [table.score[table.name == n].to_numpy(float) for n in boxed],
            positions=[at[n] for n in boxed],
            orientation="horizontal",
            widths=0.62,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": "#F2F2F2", "edgecolor": "#8C8C8C", "lw": 0.7},
            whiskerprops=line,
            capprops=line,
            medianprops=line,
        )
    handles, groups = [], table.scheme.map(style.scheme_group)
    for group in sorted(set(groups), key=style.group_order):
        part = table[groups == group]
        look = style.scheme_mark(part.scheme.iloc[0])
        dots = axes.plot(
            part.score, [at[n] for n in part.name], ls="", ms=4, mec=style.BLACK, mew=0.4, zorder=3, **look
        )[0]
        style.name_points(
            axes,
            dots,
            [f"{n}, {s}: {v:+.2f}" for n, s, v in zip(part.name, part.scheme, part.score, strict=True)],
            "tip",
        )
        handles.append(Line2D([], [], ls="", ms=4.5, mec=style.BLACK, mew=0.4, label=f"{group} bits", **look))
    axes.set_yticks(range(len(names)), [style.label(n, 30) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("score of a scheme for the group (larger = better), predicted")
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), handletextpad=0.2, borderaxespad=0.0
    )


def draw_curve(
    table: pd.DataFrame, axes: Axes, ceiling: float = math.nan, baselines: dict[str, float] | None = None
) -> None:
    """Within-budget SRCC after a part of the measurements, its interval as a band; the noise ceiling and
    the best baseline as lines."""
    axes.fill_between(table.measurements, table.low, table.high, color=style.BLUE, alpha=0.2, lw=0)
    axes.plot(
        table.measurements, table.within_budget_srcc, color=style.BLUE, marker="o", ms=3.5, label="surrogate"
    )
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

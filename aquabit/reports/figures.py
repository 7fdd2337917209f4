"""Figures: functions that take a table of ``aquabit.reports.tables`` and an ``Axes``, so that papers can
compose them."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Patch

from aquabit.reports import style

MEASURED: dict[str, Any] = {
    "color": style.VERMILLION,
    "marker": "D",
    "markerfacecolor": "white",
}  # empty_like diamonds, everywhere
PREDICTED: dict[str, Any] = {"color": style.BLUE, "marker": "o"}  # filled circles, everywhere

CLOUDS = (  # of many configurations on the study's own seeds: group, legend, colour
    ("design", "configurations of the design", style.GREY),
    ("candidate", "candidates of the search", style.SKY),
)
FAMILIES = {  # of uniform configurations: legend, marker, colour
    "aq": ("additive, a format per layer", "o", style.GREEN),
    "usq h": ("uniform usq, output-aware", "s", style.SKY),
    "usq": ("uniform usq", "s", style.ORANGE),
    "vq h": ("uniform vq, output-aware", "^", style.PURPLE),
    "vq": ("uniform vq", "^", style.GREY),
    "": ("uniform", "s", style.ORANGE),
}


def _errors(table: pd.DataFrame, value: str, low: str, high: str) -> np.ndarray:
    """[2, n] distances for ``errorbar``; an unknown end is no bar."""
    gaps = np.stack([table[value] - table[low], table[high] - table[value]]).astype(float)
    return np.nan_to_num(np.maximum(gaps, 0.0), nan=0.0)


def _limits(values: Any, margin: float = 0.06, log: bool = True) -> tuple[float, float, bool]:
    """Low, high and whether a logarithmic axis serves (``log``: may serve): all positive and a factor of
    eight or more apart."""
    seen = np.asarray(values, float)
    seen = seen[np.isfinite(seen)]
    if not len(seen):
        return 0.0, 1.0, False
    low, high = float(seen.min()), float(seen.max())
    if log and low > 0 and high > 8 * low:
        ratio = (high / low) ** margin
        return low / ratio, high * ratio, True
    pad = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad, False


def _scale(axes: Axes, which: str, low: float, high: float, log: bool) -> None:
    if log:
        style.log_axis(axes, which, low, high)
    else:
        getattr(axes, f"set_{which}lim")(low, high)


def _better(metric: str, direction: str) -> str:
    return f"{metric} ({'lower' if direction == 'min' else 'higher'} is better)"


def quality_vs_bits(table: pd.DataFrame, axes: Axes, metric: str = "FID", direction: str = "min") -> None:
    """Measured quality against bits per weight: configurations of the design and their frontier, uniform,
    candidates of the search, found front, full precision, budget. PSNR is measured against full precision,
    which then has no place of its own.
    """
    decibels = metric == "PSNR"
    table = table[table.group != "full precision"] if decibels else table
    group = dict(list(table.groupby("group", sort=False)))
    shown = table[~table.group.isin(["budget"])]
    core = table[table.group.isin(["design", "found", "budget"])].bits
    core = core if len(core) else table[table.group == "uniform"].bits
    right = float(core.max()) + 0.35 if len(core) else 17.0
    inside = shown[(shown.bits <= right) | (shown.group == "full precision")]
    low, high, log = _limits(inside[["value", "low", "high"]], log=not decibels)
    _scale(axes, "y", low, high, log)
    bits = inside[inside.group != "full precision"].bits
    axes.set_xlim(float(bits.min()) - 0.15 if len(bits) else 0.0, right)
    for name, label, colour in CLOUDS:
        if name in group:
            look: dict[str, Any] = {
                "ls": "",
                "marker": "o",
                "ms": 2.6,
                "mec": "none",
                "color": colour,
                "alpha": 0.75,
            }
            part = group[name]
            dots = axes.plot(part.bits, part.value, label=label, **look)[0]
            style.name_points(
                axes,
                dots,
                [f"{r.config}: {r.bits:.2f} bits, {metric} {r.value:.3g}" for r in part.itertuples()],
                "tip",
            )
    if "design" in group:
        edge = group["design"][group["design"].frontier].sort_values("bits")
        axes.plot(
            edge.bits, edge.value, color="#4D4D4D", lw=1.0, drawstyle="steps-post", label="their frontier"
        )
    if "full precision" in group:
        value = float(group["full precision"].value.iloc[0])
        axes.axhline(value, color=style.BLACK, lw=0.9, ls=(0, (5, 2)), label="full precision")
    if "budget" in group:
        axes.axvline(float(group["budget"].bits.iloc[0]), color=style.GREEN, lw=0.9, ls=":", label="budget")
    if "uniform" in group:
        _uniform_points(group["uniform"], axes, right)
    if "found" in group:
        _found_points(group["found"], axes)
    axes.set_xlabel("bits per weight, codebooks and scales included")
    axes.set_ylabel(f"{metric} to full precision, dB" if decibels else _better(metric, direction))
    handles, labels = axes.get_legend_handles_labels()
    families = [name for name, _, _ in FAMILIES.values()]
    order = [
        "found (fresh seeds)",
        "winner",
        *families,
        CLOUDS[0][1],
        "their frontier",
        CLOUDS[1][1],
        "full precision",
        "budget",
    ]
    legend = sorted(zip(labels, handles, strict=True), key=lambda item: order.index(item[0]))
    axes.legend([h for _, h in legend], [t for t, _ in legend], loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _uniform_points(uniform: pd.DataFrame, axes: Axes, right: float) -> None:
    inside = uniform[uniform.bits <= right]
    for family, part in inside.sort_values("bits").groupby("family", sort=False):
        name, marker, colour = FAMILIES.get(family, FAMILIES[""])
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "ms": 4.5,
            "mec": style.BLACK,
            "mew": 0.5,
            "ecolor": style.BLACK,
        }
        bars = _errors(part, "value", "low", "high")
        axes.errorbar(
            part.bits, part.value, yerr=bars, label=name, ls="-", lw=0.8, elinewidth=0.8, zorder=3, **look
        )
        place = (
            (-4, -11) if family == "aq" else (5, 4)
        )  # families of nearly one quality do not write over each other
        for r in part.itertuples():
            axes.annotate(
                style.label(r.label),
                (r.bits, r.value),
                place,
                textcoords="offset points",
                fontsize=6,
                annotation_clip=True,
            )
    outside = uniform[uniform.bits > right].sort_values("bits")
    if len(outside):
        text = "\n".join(
            f"{style.label(r.label)}: {r.bits:.2f} bits, {r.value:.3g}" for r in outside.itertuples()
        )
        axes.annotate(
            f"beyond the right edge\n{text}",
            (1.02, 0.02),
            xycoords="axes fraction",
            fontsize=6.5,
            va="bottom",
            color="#333333",
        )


def _found_points(found: pd.DataFrame, axes: Axes) -> None:
    found = found.sort_values("bits")
    bars = _errors(found, "value", "low", "high")
    look: dict[str, Any] = {
        "color": style.BLUE,
        "marker": "D",
        "ms": 4.5,
        "mec": style.BLACK,
        "mew": 0.6,
        "ecolor": style.BLUE,
        "elinewidth": 1.0,
    }
    axes.errorbar(
        found.bits,
        found.value,
        yerr=bars,
        ls="-",
        lw=0.8,
        capsize=2,
        label="found (fresh seeds)",
        zorder=4,
        **look,
    )
    best = found[found.label == "winner"]
    if len(best):
        axes.plot(
            best.bits,
            best.value,
            ls="",
            marker="o",
            ms=10,
            mfc="none",
            mec=style.BLACK,
            mew=0.8,
            zorder=5,
            label="winner",
        )


def _zero(axes: Axes) -> None:
    axes.axvline(0, color=style.BLACK, lw=0.6)


def _effect_label(metric: str, swap: str, between: str = " ") -> str:
    what = " to ".join(swap.split(":")) if swap else "a swap"
    return f"worsening of {style.label(metric)} by{between}{style.label(what)} (positive = worse)"


def layer_ranking(
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
    bars = _errors(table, "effect", "low", "high")
    drawn = axes.errorbar(
        table.effect, at - 0.14, xerr=bars, ls="", ms=4, elinewidth=1.1, capsize=0, label=effects, **PREDICTED
    )
    style.name_points(axes, drawn.lines[0], list(table.layer))
    real = table[table.real.notna()]
    if len(real):
        bars = _errors(real, "real", "real_low", "real_high")
        drawn = axes.errorbar(
            real.real,
            at[real.index] + 0.18,
            xerr=bars,
            ls="",
            ms=3.6,
            elinewidth=0.8,
            label="measured swaps",
            **MEASURED,
        )
        style.name_points(axes, drawn.lines[0], list(real.layer))
    _zero(axes)
    style.symmetric_axis(
        axes, "x", table[["effect", "low", "high", "real", "real_low", "real_high"]], ticks_most=3
    )
    style.name_ticks(axes, axes.set_yticks(at, [style.label(n) for n in table.layer]), list(table.layer))
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for i in range(0, len(table), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#F6F6F6", lw=0, zorder=0)
    axes.set_xlabel(_effect_label(metric, swap))
    axes.legend(loc="lower right")


def group_effects(
    table: pd.DataFrame,
    axes: Axes,
    layers: pd.DataFrame,
    key: str,
    metric: str = "FID",
    swap: str = "",
    top: int = 40,
    effects: str = "predicted",
) -> None:
    """Effects of operator types or blocks (``key`` names the column of ``layers``): a box of the layers,
    the mean with its interval; the ``top`` most harmful, in the table's order."""
    if len(table) > top:
        table = table.loc[table.effect.nlargest(top).index.sort_values()]
    table = table.reset_index(drop=True)
    at = np.arange(len(table), dtype=float)
    rows = [layers[(layers[key] == n) & layers.effect.notna()] for n in table.name]
    members = [part.effect.to_numpy(float) for part in rows]
    boxed = [i for i, m in enumerate(members) if len(m) >= 5]
    if boxed:
        line: dict[str, Any] = {"color": "#8C8C8C", "lw": 0.7}
        axes.boxplot(
            [members[i] for i in boxed],
            positions=at[boxed],
            orientation="horizontal",
            widths=0.62,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": "#EFEFEF", "edgecolor": "#8C8C8C", "lw": 0.7},
            whiskerprops=line,
            capprops=line,
            medianprops=line,
        )
    dots = [(v, i) for i, m in enumerate(members) for v in m]
    if dots:
        ticks = axes.plot(
            *zip(*dots, strict=True), ls="", marker="|", ms=5, mew=0.7, color="#5A5A5A", label="layers"
        )[0]
        style.name_points(axes, ticks, [name for part in rows for name in part.layer])
    bars = _errors(table, "effect", "low", "high")
    axes.errorbar(
        table.effect,
        at,
        xerr=bars,
        ls="",
        ms=4.5,
        elinewidth=1.3,
        zorder=4,
        label="mean, with its interval",
        **PREDICTED,
    )
    _zero(axes)
    style.symmetric_axis(
        axes, "x", [*table.effect, *table.low, *table.high, *(v for m in members for v in m)], ticks_most=3
    )
    names = [
        style.label(r.name, 30) + (f" ({r.layers:.0f})" if math.isfinite(r.layers) else "")
        for r in table.itertuples(index=False, name="Row")
    ]
    axes.set_yticks(at, names)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{effects} {_effect_label(metric, swap, chr(10))}")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.0, handletextpad=0.3)


def chosen_schemes(table: pd.DataFrame, axes: Axes) -> None:
    """Stacked bars: the share of an operator type's layers that take each method and bit-width of weights."""
    names = list(dict.fromkeys(table.operator))
    table = table.assign(group=table.scheme.map(style.scheme_group))
    at, left = np.arange(len(names), dtype=float), np.zeros(len(names))
    share = (
        table.pivot_table(index="operator", columns="group", values="share", aggfunc="sum")
        .reindex(names)
        .fillna(0.0)
    )
    count = table.groupby("operator").layers.sum()
    handles = []
    for group in sorted(set(table.group), key=style.group_order):
        colour, hatch = style.scheme_look(table.scheme[table.group == group].iloc[0])
        width = share[group].to_numpy(float)
        axes.barh(
            at,
            100 * width,
            left=100 * left,
            height=0.74,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
        )
        handles.append(
            Patch(
                facecolor=colour,
                hatch=hatch,
                edgecolor="white",
                label=group if group == "fp" else f"{group} bits",
            )
        )
        left += width
    axes.set_yticks(at, [f"{style.label(n, 30)} ({count[n]:.0f})" for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the operator type's layers, %")
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=1.8, handleheight=1.1
    )


def _note(axes: Axes, lines: list[str]) -> None:
    box = {
        "boxstyle": "round,pad=0.25",
        "facecolor": "white",
        "edgecolor": "#CCCCCC",
        "linewidth": 0.5,
        "alpha": 0.9,
    }
    axes.text(
        0.03, 0.97, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=6.8, bbox=box, zorder=6
    )


def surrogate_scatter(
    table: pd.DataFrame, axes: Axes, metric: str = "FID", within_budget_srcc: float = math.nan
) -> None:
    """Out-of-fold predictions against measurements, coloured by bits; annotated with the within-budget
    SRCC and no other."""
    low, high, log = _limits(table[["predicted", "measured"]])
    _scale(axes, "x", low, high, log)
    _scale(axes, "y", low, high, log)
    axes.plot([low, high], [low, high], color=style.BLACK, lw=0.7, ls="--")
    bits = table.bits.to_numpy(float)
    if np.isfinite(bits).any():
        norm = Normalize(np.nanmin(bits), np.nanmax(bits))
        colours = matplotlib.colormaps["cividis"].resampled(12)
        dots = axes.scatter(
            table.measured,
            table.predicted,
            c=bits,
            cmap=colours,
            norm=norm,
            s=11,
            linewidths=0.2,
            edgecolors="white",
        )
        tips = [
            f"{r.config}: {r.bits:.2f} bits, {metric} {r.measured:.3g}, predicted {r.predicted:.3g}"
            for r in table.itertuples()
        ]
        style.name_points(axes, dots, tips, "tip")
        style.colour_bar(axes, norm, colours, "bits per weight")
    else:
        axes.plot(table.measured, table.predicted, ls="", ms=3, **PREDICTED)
    score = "unknown" if math.isnan(within_budget_srcc) else f"{within_budget_srcc:.2f}"
    _note(axes, [f"within-budget SRCC {score}", f"{len(table)} configurations"])
    axes.set_xlabel(f"{metric}, measured")
    axes.set_ylabel(f"{metric}, predicted out of fold")


def swaps_scatter(
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
        ("top", {**MEASURED, "markerfacecolor": style.VERMILLION}, "first in the ranking"),
        ("random", MEASURED, "drawn at random"),
    ):
        part = table[halves == half]
        if len(part):
            bars = _errors(part, "real", "low", "high")
            drawn = axes.errorbar(
                part.predicted, part.real, yerr=bars, ls="", ms=4, elinewidth=0.7, mew=0.9, label=text, **look
            )
            style.name_points(axes, drawn.lines[0], list(part.layer))
    apart = bool((halves == "top").any())
    lines = ["SRCC unknown" if math.isnan(srcc) else f"SRCC {srcc:.2f}"]
    lines += [] if math.isnan(sign_agreement) else [f"same sign {100 * sign_agreement:.0f} %"]
    if apart:
        axes.legend(loc="lower right")
        lines[0] += " of random ones"
    _note(axes, [*lines, f"{flips or int(table.n.sum())} real swaps of {len(table)} layers"])
    axes.set_xlabel(f"predicted worsening of {metric}")
    axes.set_ylabel(f"measured worsening of {metric}")

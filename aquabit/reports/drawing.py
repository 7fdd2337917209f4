"""What figures share: marks, interval bars, limits of axes, cells, colours, labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import pts_to_poststep
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from aquabit.reports import style

# hollow diamonds, everywhere
MEASURED: dict[str, Any] = {"color": style.VERMILLION, "marker": "D", "markerfacecolor": "white"}


PREDICTED: dict[str, Any] = {"color": style.BLUE, "marker": "o"}  # filled circles, everywhere


def bars(table: pd.DataFrame, value: str, low: str, high: str) -> np.ndarray:
    """[2, n] distances for ``errorbar``; an unknown end is no bar."""
    gaps = np.stack([table[value] - table[low], table[high] - table[value]]).astype(float)
    return np.nan_to_num(np.maximum(gaps, 0.0), nan=0.0)


def intervals(
    axes: Axes,
    table: pd.DataFrame,
    value: str,
    at: Any,
    ends: tuple[str, str],
    upright: bool = False,
    **look: Any,
) -> Line2D:
    """Marks of a column with the intervals whose ends are two others, ``at`` these places of the other axis;
    ``upright``: values go up. The marks without their bars."""
    gaps = bars(table, value, *ends)
    look = {"ls": "", **look}
    if upright:
        return axes.errorbar(at, table[value], yerr=gaps, **look).lines[0]
    return axes.errorbar(table[value], at, xerr=gaps, **look).lines[0]


def boxes(axes: Axes, at: Sequence[float], groups: Sequence[np.ndarray]) -> None:
    """A lying box for each group of values."""
    line: dict[str, Any] = {"color": "#8C8C8C", "lw": 0.7}
    look: dict[str, Any] = {"whiskerprops": line, "capprops": line, "medianprops": line, "widths": 0.62}
    look["boxprops"] = {"facecolor": "#EFEFEF", "edgecolor": "#8C8C8C", "lw": 0.7}
    look |= {"showfliers": False, "patch_artist": True, "manage_ticks": False}
    if len(at):
        axes.boxplot(groups, positions=at, orientation="horizontal", **look)


def limits(values: Any, margin: float = 0.06, log: bool = True) -> tuple[float, float, bool]:
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


def scale(axes: Axes, which: str, low: float, high: float, log: bool) -> None:
    if log:
        style.log_axis(axes, which, low, high)
    else:
        getattr(axes, f"set_{which}lim")(low, high)


# where the middle of a label stands beside its point, in halves of its size: the first that is free is taken
AROUND = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a text beside each (x, y), where it meets no line, no point, no other text and no edge of the
    axes, or else as few as can be. Call it when all else is drawn."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # what a constrained layout does to the axes
    drawn, frame, pixel = _drawn(axes), axes.get_window_extent(), figure.dpi / 72
    taken: list[Bbox] = []
    for x, y, text in points:
        note = axes.annotate(
            style.label(text),
            (x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=6,
            ha="center",
            va="center",
        )
        note.set_in_layout(False)
        box, places = note.get_window_extent(), list[tuple[Any, ...]]()
        for gap in (3.5 * pixel, 8 * pixel):  # from the point to the text
            for right, up in AROUND:
                across = right * (box.width / 2 + gap)
                high = up * (box.height / 2 + gap * (1 if right == 0 else 0.6))
                there = box.translated(across, high)
                inside = frame.contains(*there.min) and frame.contains(*there.max)
                met = there.count_contains(drawn) + 100 * there.count_overlaps(taken) + 100 * (not inside)
                places.append((met, len(places), (across / pixel, high / pixel), there))
        _, _, place, there = min(places)
        note.set_position(place)
        taken.append(there)


def _drawn(axes: Axes) -> np.ndarray:
    """Points [n, 2] of the canvas, two pixels apart, along all lines, bars and marks."""
    parts = [np.empty((0, 2))]
    for line in axes.lines:
        x, y = line.get_data(orig=False)
        if line.get_drawstyle() == "steps-post":
            x, y = pts_to_poststep(x, y)
        at = line.get_transform().transform(np.column_stack([x, y]))
        parts.append(at)
        if line.get_linestyle() != "None":
            parts += [_along(a, b) for a, b in pairwise(at)]
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            parts += [_along(*axes.transData.transform(ends)) for ends in bars.get_segments()]
    return np.concatenate(parts)


def _along(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    length = float(np.hypot(*(b - a)))
    share = np.linspace(0, 1, int(min(length, 1e4) / 2) + 2 if math.isfinite(length) else 2)[:, None]
    return np.asarray((1 - share) * a + share * b)


def ring(axes: Axes, x: pd.Series, y: pd.Series, winner: pd.Series) -> None:
    """A ring around the winner, where it is among the points."""
    if winner.any():
        look: dict[str, Any] = {"marker": "o", "ms": 10, "mfc": "none", "mec": style.BLACK, "mew": 0.8}
        axes.plot(x[winner], y[winner], ls="", zorder=5, label="winner", **look)


def better(metric: str, direction: str) -> str:
    return f"{metric} ({'lower' if direction == 'min' else 'higher'} is better)"


def zero(axes: Axes) -> None:
    axes.axvline(0, color=style.BLACK, lw=0.6)


def effect_label(metric: str, swap: str, between: str = " ") -> str:
    what = " to ".join(swap.split(":")) if swap else "a swap"
    return f"worsening of {style.label(metric)} by{between}{style.label(what)} (positive = worse)"


def note(axes: Axes, lines: list[str]) -> None:
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


def levels(table: pd.DataFrame, column: str = "level") -> str:
    """The levels of a table's intervals, as text: ``95 %``, or ``90 % and 95 %``; empty without any."""
    return " and ".join(sorted({str(v) for v in table[column] if v}))


def with_level(text: str, table: pd.DataFrame, column: str = "level") -> str:
    """``text``, and the level of the intervals that are drawn with it."""
    known = levels(table, column)
    return f"{text}, {known} interval" if known else text

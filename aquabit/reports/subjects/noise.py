"""Quantization noise: statistics per step and guidance branch, and quality without and with correction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from aquabit.reports import style
from aquabit.reports.facts import METRIC_NAMES, Facts, number
from aquabit.reports.plan import Plan, Tables, fixed
from aquabit.scheme import LOWER_IS_BETTER
from aquabit.stats import LEVEL, paired_difference, percent

MEASURES = ("k", "bias", "variance", "r2", "kurtosis", "snr")


LINES = (  # of guidance branches: colour, dashes, marker; they differ in print without colour too
    (style.BLUE, "-", "o"),
    (style.VERMILLION, (0, (4, 1.5)), "s"),
    (style.GREEN, (0, (1, 1)), "^"),
    (style.PURPLE, "-.", "D"),
)


@dataclass(frozen=True)
class Panel:
    """One measure as a figure: its axis, and what the caption says of it."""

    measure: str
    axis: str
    caption: str

    @property
    def name(self) -> str:
        """Of its files and its place on the page."""
        return f"noise_{self.measure}"


PANELS = (
    Panel(
        "k",
        "slope k",
        "Slope k of the quantization error on the noise that full precision predicts: what CNC divides away.",
    ),
    Panel(
        "bias",
        "bias of the residual",
        "Bias of what the slope leaves, root mean square over channels: what BC subtracts.",
    ),
    Panel(
        "variance",
        "residual variance",
        "Variance of what slope and bias leave, mean over channels: what VSC takes from the sampler.",
    ),
    Panel(
        "snr",
        "SNR",
        "Signal to noise: the length of the noise that full precision predicts over the length of the"
        " quantization error.",
    ),
)


def noise(facts: Facts) -> pd.DataFrame:
    """Of the winner: step (from 1), timestep, branch (from 1), weight (by which guidance counts the branch),
    then k, bias (root mean square over channels), variance (mean over channels), r2, kurtosis (excess) and
    snr, each with the ends of its interval at ``LEVEL``.
    """
    columns = ["step", "timestep", "branch", "weight"]
    columns += [f"{m}{end}" for m in MEASURES for end in ("", "_low", "_high")]
    rows = []
    for row in facts.noise.get("rows") or []:
        values = {c: number(row.get(c)) for c in columns}
        if math.isfinite(values["step"]) and math.isfinite(values["branch"]):
            rows.append({**values, "step": int(values["step"]) + 1, "branch": int(values["branch"]) + 1})
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["branch", "step"], kind="stable", ignore_index=True)


def correction(facts: Facts) -> pd.DataFrame:
    """metric, not_corrected, corrected, difference, low, high, level, blocks, verdict: means of the winner
    over blocks of fresh seeds; the paired difference (corrected minus not); the objective first.

    ``verdict``: better or worse where the interval excludes zero, else undecided.
    """
    columns = ["metric", "not_corrected", "corrected", "difference"]
    columns += ["low", "high", "level", "blocks", "verdict"]
    sides = [_blocks(facts, str(facts.noise.get(key) or "")) for key in ("without", "with")]
    both = sides[0].index.intersection(sides[1].index)
    if both.empty:
        return pd.DataFrame([], columns=columns)
    rows = []
    for metric in dict.fromkeys([facts.objective, *LOWER_IS_BETTER]):
        if any(metric not in side for side in sides):
            continue
        pair = np.stack([side.loc[both, metric].to_numpy(float) for side in sides])
        pair = pair[:, np.isfinite(pair).all(0)]
        if pair.shape[1]:
            lower = LOWER_IS_BETTER.get(metric, facts.direction == "min")
            gap = paired_difference(pair[1].tolist(), pair[0].tolist())
            better = "better" if (gap.value < 0) == lower else "worse"
            verdict = better if gap.known and not gap.holds_zero else "undecided"
            row = METRIC_NAMES.get(metric, metric), *pair.mean(1), *gap, gap.percent, pair.shape[1], verdict
            rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def _blocks(facts: Facts, config: str) -> pd.DataFrame:
    """The successful measurements of a configuration by protocol, of the blocks that it was to be measured
    on."""
    table, wanted = facts.measured, [str(p) for p in facts.noise.get("protocols") or []]
    if table.empty:
        return table
    return table[(table.config == config) & (table.status == "ok") & table.protocol.isin(wanted)].set_index(
        "protocol"
    )


def draw_noise(table: pd.DataFrame, axes: Axes, panel: Panel) -> None:
    """One measure over the denoising steps: a line a guidance branch, its interval as a band."""
    measure = panel.measure
    ends = [f"{measure}_low", f"{measure}_high"]
    branches = [part for _, part in table[table[measure].notna()].groupby("branch")]
    for i, part in enumerate(branches):
        colour, dashes, marker = LINES[i % len(LINES)]
        name = f"branch {part.branch.iloc[0]:.0f} (weight {_weight(part.weight)})"
        look: dict[str, Any] = {"color": colour, "ls": dashes, "marker": marker, "label": name}
        axes.plot(part.step, part[measure], ms=3.0, lw=1.1, zorder=3, **look)
        low, high = (part[end].fillna(part[measure]) for end in ends)
        axes.fill_between(part.step, low, high, color=colour, alpha=0.2, lw=0, zorder=2)
        if len(part) == 1:  # a band over one step has no width
            axes.plot([part.step.iloc[0]] * 2, [low.iloc[0], high.iloc[0]], color=colour, lw=1.1)
    _value_axis(axes, table[[measure, *ends]].to_numpy(float), positive=measure in ("variance", "snr"))
    if measure == "k":
        axes.axhline(0, color=style.BLACK, lw=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel(f"denoising step (1 starts from noise)\nwith {percent(LEVEL)} intervals")
    axes.set_ylabel(panel.axis)
    if len(branches) > 1:
        axes.legend(loc="best")


def _weight(weights: pd.Series) -> str:
    """By which guidance counts a branch; its range where it changes."""
    low, high = (f"{v:.3g}".replace("-", "\N{MINUS SIGN}") for v in (weights.min(), weights.max()))
    return low if low == high else f"{low} to {high}"


def _value_axis(axes: Axes, values: np.ndarray, positive: bool) -> None:
    """Limits with a margin: with zero in sight, or for what is ``positive`` a logarithmic axis where a
    factor of eight lies between."""
    seen = values[np.isfinite(values) & ((values > 0) | (not positive))]
    if not len(seen):
        return
    low, high = float(seen.min()), float(seen.max())
    if positive and high > 8 * low:
        ratio = (high / low) ** 0.06
        style.log_axis(axes, "y", low / ratio, high * ratio)
        return
    if not positive:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - pad, high + pad)


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    for panel in PANELS:
        yield Plan(
            panel.name,
            "steps",
            "noise",
            "noise",
            fixed(style.SINGLE, 1.9),
            lambda t, a, p=panel: draw_noise(t, a, p),  # type: ignore[misc]
            f"{panel.caption} Bands are {percent(LEVEL)} intervals over images.",
            optional=not facts.noise,
        )

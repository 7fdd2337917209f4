"""Two studies side by side: which operators are sensitive in which architecture, and what quality each
reaches at which size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from aquabit.files import write_text
from aquabit.reports import drawing, style, words
from aquabit.reports.facts import Facts, read, require_metric
from aquabit.reports.lacks import Lacks, missing
from aquabit.reports.page import draw, environment, make_folders
from aquabit.reports.plan import Plan, fixed, rows_high
from aquabit.reports.subjects.fronts import front as front_table
from aquabit.reports.subjects.groups import operators as operators_table
from aquabit.reports.subjects.measurements import run_card
from aquabit.reports.writing import write
from aquabit.scheme import AquabitError, Progress, no_progress
from aquabit.study import Study

OPERATORS_MOST = 30  # rows that can be read
CHANGE = ["change", "change_low", "change_high"]
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": style.BLUE, "marker": "o"},
    {"color": style.VERMILLION, "marker": "D", "markerfacecolor": "white"},
)


def side_by_side(first: Study, second: Study, out: str | Path, progress: Progress = no_progress) -> Path:
    """Write ``out``/index.html, figures and tables that compare two studies; returns the page's path.

    Effects are made comparable by dividing them by the largest operator type's of the same study; ranks need
    no such step. What a study lacks is named on the page with the command that makes it. Raises AquabitError
    where ``out`` cannot be written or a stored fact is damaged.
    """
    out, both = Path(out), [read(first), read(second)]
    for facts in both:
        require_metric(facts)
    names = labels(both)
    try:
        make_folders(out)
        ranked, found = operators(both, names), fronts(both, names)
        shown, known = [], (ranked, found.dropna(subset=["change"]))
        lacks = [missing(facts) for facts in both]
        for i, (plan, table, drawn) in enumerate(zip(PLANS, (ranked, found), known, strict=True)):
            progress("report", i, len(PLANS))
            write(table, out / "tables", plan.table)
            shown.append(draw(plan, drawn, {} if len(drawn) else lacks[1] | lacks[0], out / "figures", {}))
        page = out / "index.html"
        cards = [
            (name, run_card(facts), _shown(own)) for name, facts, own in zip(names, both, lacks, strict=True)
        ]
        write_text(
            page,
            environment()
            .get_template("beside.html.j2")
            .render(
                names=names,
                cards=cards,
                figures=shown,
                sentences=sentences(ranked, names),
                rows=list(ranked.itertuples(index=False, name="Row")),
            ),
        )
    except OSError as error:
        raise AquabitError(f"the report could not be written to {out}: {error.strerror or error}") from error
    progress("report", len(PLANS), len(PLANS))
    return page


def labels(both: Sequence[Facts]) -> list[str]:
    """What the studies are called: their models, with the file where these agree, and numbered where both
    do."""
    names = [facts.model or "unknown model" for facts in both]
    if names[0] == names[1]:
        names = [f"{facts.model or 'unknown model'} ({facts.source})" for facts in both]
    if names[0] != names[1]:
        return names
    return [f"{name}, {which}" for name, which in zip(names, ("first", "second"), strict=True)]


def _shown(lacks: Lacks) -> list[tuple[str, str]]:
    """What is said to be missing of one study."""
    return list(dict.fromkeys(lacks[k] for k in ("samples", "operators", "front") if k in lacks))


def operators(both: Sequence[Facts], names: Sequence[str]) -> pd.DataFrame:
    """operator, study, layers, effect, low, high, level, share, share_low, share_high, rank: mean effect
    of a layer of each operator type in the objective's units with its interval and the level of that, as a
    share of the study's largest, and its rank (1 = most harmful); types of both studies first, by their
    mean share."""
    parts = []
    for facts, name in zip(both, names, strict=True):
        table = operators_table(facts).dropna(subset=["effect"])
        most = float(table.effect.abs().max()) if len(table) else 1.0
        most = most or 1.0
        shares = {
            f"share{end}": table[column] / most
            for end, column in (("", "effect"), ("_low", "low"), ("_high", "high"))
        }
        parts.append(table.assign(study=name, **shares, rank=np.arange(1, len(table) + 1)))
    table = pd.concat(parts, ignore_index=True).rename(columns={"name": "operator"})
    count = table.groupby("operator").study.transform("count")
    mean = table.groupby("operator").share.transform("mean")
    table = table.assign(count=count, mean=mean).sort_values(
        ["count", "mean"], ascending=False, kind="stable", ignore_index=True
    )
    columns = ["operator", "study", "layers", "effect", "low", "high", "level"]
    return table[[*columns, "share", "share_low", "share_high", "rank"]]


def fronts(both: Sequence[Facts], names: Sequence[str]) -> pd.DataFrame:
    """study, metric, bits, value, low, high, level, change, change_low, change_high: measured members of each
    front; ``change`` as a ratio to the full-precision model on the same fresh seeds (1 = as good), NaN
    where that was not measured."""
    rows = []
    for facts, name in zip(both, names, strict=True):
        reference, fresh = facts.rows("reference"), set(facts.rows("fresh").protocol)
        same = reference[reference.protocol.isin(fresh)].value
        full = float(same.mean()) if len(same) and same.mean() else math.nan
        for r in front_table(facts).itertuples():
            if not math.isnan(r.measured):
                values = (r.measured, r.low, r.high)
                rows.append((name, facts.metric, r.bits, *values, r.level, *(v / full for v in values)))
    return pd.DataFrame(rows, columns=["study", "metric", "bits", "value", "low", "high", "level", *CHANGE])


def sentences(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """What the comparison says: the worst operator types of each, and how far the ranks of shared types
    agree."""
    out = []
    for name in names:
        own = table[table.study == name].nsmallest(3, "rank")
        if len(own):
            listed = ", ".join(
                f"{r.operator} {words.figures(r.effect)}{words.ends(r.low, r.high, r.level)}"
                for r in own.itertuples()
            )
            out.append(f"In {name} quantization hurts most in {listed}, a layer.")
    wide = table.pivot_table(index="operator", columns="study", values="share", aggfunc="first").dropna()
    if wide.shape[1] == 2 and len(wide) >= 3:
        agreement = wide.iloc[:, 0].corr(wide.iloc[:, 1], method="spearman")
        out.append(
            f"The {len(wide)} operator types that both have are ranked alike at SRCC"
            f" {words.score(agreement)}."
        )
    elif wide.shape[1] == 2:
        out.append(f"They share {len(wide)} operator types, too few to compare ranks.")
    return out


def draw_operators(table: pd.DataFrame, axes: Axes, top: int = OPERATORS_MOST) -> None:
    """Effects of operator types as shares of their study's largest, with intervals, the two studies one
    above the other in each row."""
    names, studies = list(dict.fromkeys(table.operator))[:top], list(dict.fromkeys(table.study))
    place = {n: i for i, n in enumerate(names)}
    shown = table[table.operator.isin(names)]
    style.symmetric_axis(axes, "x", shown[["share", "share_low", "share_high"]], ticks_most=3)
    for i, study in enumerate(studies):
        part = shown[shown.study == study]
        at = np.array([place[n] for n in part.operator]) + (0.17 if i else -0.17)
        look = {"ms": 4, "elinewidth": 0.9, **LOOKS[i % 2]}
        look["label"] = drawing.with_level(style.label(study, 40), part)
        drawn = drawing.intervals(axes, part, "share", at, ("share_low", "share_high"), **look)
        tips = [f"{study}, {r.operator}: {r.effect:.3g} a layer, rank {r.rank}" for r in part.itertuples()]
        style.name_points(axes, drawn, tips, "tip")
    for i in range(0, len(names), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#F6F6F6", lw=0, zorder=0)
    axes.axvline(0, color=style.BLACK, lw=0.6)
    axes.set_yticks(range(len(names)), [style.label(n, 30) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("worsening by a swap, share of the study's most harmful operator type")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)


def draw_fronts(table: pd.DataFrame, axes: Axes) -> None:
    """Quality of the found configurations as a ratio to full precision against bits per weight, with
    intervals."""
    for i, (study, part) in enumerate(table.dropna(subset=["change"]).groupby("study", sort=False)):
        part = part.sort_values("bits")
        text = drawing.with_level(f"{style.label(str(study), 40)}, {part.metric.iloc[0]}", part)
        look = {"ls": "-", "lw": 0.8, "ms": 4.5, "elinewidth": 0.9, "capsize": 2, **LOOKS[i % 2]}
        drawing.intervals(
            axes, part, "change", part.bits, ("change_low", "change_high"), upright=True, label=text, **look
        )
    axes.axhline(1, color=style.BLACK, lw=0.9, ls=(0, (5, 2)), label="full precision")
    axes.set_xlabel("bits per weight, codebooks and scales included")
    axes.set_ylabel("measured quality over\nthat of full precision")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


PLANS = (
    Plan(
        "beside_operators",
        "operators",
        "operators",
        "beside_operators",
        rows_high(style.DOUBLE, 0.24, OPERATORS_MOST, "operator", 0.95),
        draw_operators,
        "Mean effect of a layer of each operator type with its interval (its level is in the legend), as a"
        " share of the most harmful type of the same study; types that both architectures have come first.",
    ),
    Plan(
        "beside_fronts",
        "fronts",
        "front",
        "beside_fronts",
        fixed(style.DOUBLE, 2.6),
        draw_fronts,
        "Configurations found for each study, measured on fresh seeds with the intervals of their searches"
        " (their level is in the legend), as a ratio to full precision on these: where lower is better, below"
        " 1 is better than full precision.",
    ),
)

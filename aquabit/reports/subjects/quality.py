"""Measured quality against bits per weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from aquabit.reports import drawing, style
from aquabit.reports.facts import DECIBELS, METRIC_NAMES, Facts, leading, number, scheme_name
from aquabit.reports.plan import Plan, Tables, fixed
from aquabit.scheme import Scheme
from aquabit.scheme_kinds import KINDS
from aquabit.scheme_record import Look
from aquabit.search.front import pareto
from aquabit.stats import Interval, mean_interval

CLOUDS = {  # of many configurations on the study's own seeds: group -> legend, colour
    "design": ("configurations of the design", style.GREY),
    "candidate": ("candidates of the search", style.SKY),
}
# of uniform configurations: family -> how it is drawn; the additive ones come first
FAMILIES = {
    "": Look("", "s", ""),
    **{
        look.family: look
        for kind in KINDS.values()
        for look in (Scheme.parse(text).look for text in reversed(kind.examples))
    },
}
DECIBEL_FIGURES = (  # table, metric, what it says
    ("psnr_vs_bits", "psnr", "to the images of full precision of the same seeds"),
    (
        "temporal_vs_bits",
        "temporal_psnr",
        "(of the differences of consecutive frames, in which flicker counts and a standing error does not) to"
        " the videos of full precision of the same seeds",
    ),
)
ORDER = (  # of the legend
    "found (fresh seeds)",
    "winner",
    *(look.legend for look in reversed(FAMILIES.values())),
    CLOUDS["design"][0],
    "their frontier",
    CLOUDS["candidate"][0],
    "full precision",
    "budget",
)


def fresh(facts: Facts, metric: str | None = None) -> dict[str, tuple[Interval, int]]:
    """configuration -> (mean, blocks) of ``metric`` (default: the objective) over blocks of seeds that the
    search never saw."""
    groups = facts.rows("fresh", metric).groupby("config", sort=False)
    return {str(c): (mean_interval(part.value.to_numpy(float)), len(part)) for c, part in groups}


def quality_vs_bits(facts: Facts) -> pd.DataFrame:
    """group, label, family, config, bits, bytes, value, low, high, level, blocks, frontier: what the scatter
    of quality against bits shows.

    Groups: design (configurations that were drawn), uniform, full precision, found (measured values of the
    front), and budget (its bits). Where a configuration was measured on blocks of fresh seeds, value and
    interval are theirs and ``blocks`` counts them; 0 blocks are the study's own seeds. ``family`` is that of
    uniform configurations: usq, usq h, vq, aq.
    """
    return _against_bits(facts, facts.objective, facts.direction)


def psnr_vs_bits(facts: Facts) -> pd.DataFrame:
    """As ``quality_vs_bits``, of PSNR to full precision in dB; beside it in the group "candidate" what the
    search measured on the study's own seeds: answers of the program, and their refinements. Empty without
    a front that has it."""
    return _decibels_vs_bits(facts, "psnr")


def temporal_vs_bits(facts: Facts) -> pd.DataFrame:
    """As ``psnr_vs_bits``, of the PSNR of frame-to-frame differences (``quality.paired.temporal_mse``); empty
    where no videos were measured."""
    return _decibels_vs_bits(facts, "temporal_psnr")


def _decibels_vs_bits(facts: Facts, metric: str) -> pd.DataFrame:
    table = _against_bits(facts, metric, "max")
    found, columns = table.group == "found", list(table.columns)
    if not found.any():
        return table.iloc[:0]
    known = set(table.config[found])
    rows = [
        ("candidate", "candidate", "", r.config, r.bits, r.bytes, r.value, math.nan, math.nan, "", 0, False)
        for r in facts.rows("candidate", metric).drop_duplicates("config").itertuples()
        if r.config not in known
    ]
    return pd.concat([table, pd.DataFrame(rows, columns=columns)], ignore_index=True) if rows else table


def _against_bits(facts: Facts, metric: str, direction: str) -> pd.DataFrame:
    columns = ["group", "label", "family", "config", "bits", "bytes", "value", "low", "high", "level"]
    columns += ["blocks", "frontier"]
    better, nowhere = fresh(facts, metric), (math.nan, math.nan, "", 0)
    rows: list[tuple[Any, ...]] = []
    samples = facts.rows("sample", metric)
    sign = 1.0 if direction == "min" else -1.0
    edge = pareto(sign * samples.value.to_numpy(float), samples.bits.to_numpy(float))
    rows += [
        ("design", "design", "", r.config, r.bits, r.bytes, r.value, *nowhere, bool(e))
        for r, e in zip(samples.itertuples(), edge, strict=True)
    ]
    for group, source in (("uniform", "uniform"), ("full precision", "reference")):
        for r in facts.rows(source, metric).drop_duplicates("config").itertuples():
            config = facts.configs[r.config]
            lead = leading(config) if group == "uniform" else None
            kind, name = lead.look.family if lead else "", scheme_name(config)
            name = f"{kind} {round(2 * r.bits) / 2:g}" if lead and lead.additive else name
            mean, blocks = better.get(r.config, (Interval(r.value, math.nan, math.nan), 0))
            level = mean.percent if mean.known else ""
            rows.append((group, name, kind, r.config, r.bits, r.bytes, *mean, level, blocks, False))
    blocks = int(facts.comparison.get("blocks") or 0)
    for m in facts.members:
        if metric in m.measured and math.isfinite(m.measured[metric].value):
            mean, digest = m.measured[metric], m.config.digest
            level = mean.percent if mean.known else ""
            name = "winner" if facts.front and digest == facts.front.winner else "found"
            rows.append(("found", name, "", digest, m.bits_per_weight, m.bytes, *mean, level, blocks, False))
    limit = number(facts.front.budget.bits) if facts.front and facts.front.budget else math.nan
    if not math.isnan(limit):
        rows.append(("budget", "budget", "", "", limit, math.nan, math.nan, *nowhere, False))
    return pd.DataFrame(rows, columns=columns)


def draw_quality_vs_bits(
    table: pd.DataFrame, axes: Axes, metric: str = "FID", direction: str = "min"
) -> None:
    """Measured quality against bits per weight: configurations of the design and their frontier, uniform,
    candidates of the search, found front, full precision, budget. PSNR is measured against full precision,
    which then has no place of its own.
    """
    decibels = metric in DECIBELS
    table = table[table.group != "full precision"] if decibels else table
    group = dict(list(table.groupby("group", sort=False)))
    right = _frame(table, axes, log=not decibels)
    for name in [name for name in CLOUDS if name in group]:
        _cloud(group[name], axes, metric, *CLOUDS[name])
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
    axes.set_ylabel(f"{metric} to full precision, dB" if decibels else drawing.better(metric, direction))
    _legend(axes, interval_text(table))
    if "uniform" in group:
        inside = group["uniform"][group["uniform"].bits <= right]
        drawing.label_points(axes, [(r.bits, r.value, r.label) for r in inside.itertuples()])


def _frame(table: pd.DataFrame, axes: Axes, log: bool) -> float:
    """Set both axes by what is drawn, and return the largest bits: uniform configurations far beyond what
    was searched would leave no room for it."""
    core = table[table.group.isin(["design", "found", "budget"])].bits
    core = core if len(core) else table[table.group == "uniform"].bits
    right = float(core.max()) + 0.35 if len(core) else 17.0
    shown = table[table.group != "budget"]
    inside = shown[(shown.bits <= right) | (shown.group == "full precision")]
    drawing.scale(axes, "y", *drawing.limits(inside[["value", "low", "high"]], log=log))
    bits = inside[inside.group != "full precision"].bits
    axes.set_xlim(float(bits.min()) - 0.15 if len(bits) else 0.0, right)
    return right


def _cloud(part: pd.DataFrame, axes: Axes, metric: str, legend: str, colour: str) -> None:
    look: dict[str, Any] = {"ls": "", "marker": "o", "ms": 2.6, "mec": "none", "color": colour}
    dots = axes.plot(part.bits, part.value, label=legend, alpha=0.75, **look)[0]
    tips = [f"{r.config}: {r.bits:.2f} bits, {metric} {r.value:.3g}" for r in part.itertuples()]
    style.name_points(axes, dots, tips, "tip")


def _legend(axes: Axes, intervals: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = sorted(zip(labels, handles, strict=True), key=lambda item: ORDER.index(item[0]))
    if intervals:
        legend.append((f"bars: {intervals}", Line2D([], [], ls="")))
    axes.legend([h for _, h in legend], [t for t, _ in legend], loc="upper left", bbox_to_anchor=(1.0, 1.0))


def interval_text(table: pd.DataFrame) -> str:
    """``95 % intervals``, and in older studies the other level of what was found; empty without any."""
    found = table.group == "found"
    rest, own = drawing.levels(table[~found]), drawing.levels(table[found])
    if not rest or not own or rest == own:
        return f"{rest or own} intervals" if rest or own else ""
    return f"{rest} intervals (found: {own})"


def _uniform_points(uniform: pd.DataFrame, axes: Axes, right: float) -> None:
    inside = uniform[uniform.bits <= right]
    look: dict[str, Any] = {"ls": "-", "lw": 0.8, "elinewidth": 0.8, "zorder": 3, "ms": 4.5, "mew": 0.5}
    look |= {"mec": style.BLACK, "ecolor": style.BLACK, "upright": True}
    for kind, part in inside.sort_values("bits").groupby("family", sort=False):
        own = FAMILIES.get(str(kind), FAMILIES[""])
        look |= {"label": own.legend, "color": own.colour, "marker": own.marker}
        drawing.intervals(axes, part, "value", part.bits, ("low", "high"), **look)
    outside = uniform[uniform.bits > right].sort_values("bits")
    if len(outside):
        lines = [f"{style.label(r.label)}: {r.bits:.2f} bits, {r.value:.3g}" for r in outside.itertuples()]
        axes.annotate(
            "\n".join(("beyond the right edge", *lines)),
            (1.02, 0.02),
            xycoords="axes fraction",
            fontsize=6.5,
            va="bottom",
            color="#333333",
        )


def _found_points(found: pd.DataFrame, axes: Axes) -> None:
    found = found.sort_values("bits")
    look: dict[str, Any] = {"ls": "-", "lw": 0.8, "elinewidth": 1.0, "capsize": 2, "zorder": 4}
    look |= {"color": style.BLUE, "ecolor": style.BLUE, "marker": "D", "ms": 4.5, "mew": 0.6}
    look |= {"mec": style.BLACK, "label": "found (fresh seeds)", "upright": True}
    drawing.intervals(axes, found, "value", found.bits, ("low", "high"), **look)
    drawing.ring(axes, found.bits, found.value, found.label == "winner")


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    metric, direction = facts.metric, facts.direction

    def between(name: str) -> str:
        text = interval_text(found[name])
        return f" with {text}" if text else ""

    yield Plan(
        "quality_vs_bits",
        "choose",
        "points",
        "quality_vs_bits",
        fixed(style.DOUBLE, 3.3),
        lambda t, a: draw_quality_vs_bits(t, a, metric, direction),
        f"Measured {metric} against bits per weight. Found configurations, and whatever else was measured on"
        f" fresh seeds, are means over blocks of seeds that the search never"
        f" saw,{between('quality_vs_bits')}; those of the design were measured on the study's own seeds.",
    )
    for table, of, what in DECIBEL_FIGURES:
        if facts.objective == of:
            continue
        name = METRIC_NAMES[of]
        yield Plan(
            table,
            "choose",
            "front",
            table,
            fixed(style.DOUBLE, 3.3),
            lambda t, a, name=name: draw_quality_vs_bits(t, a, name, "max"),  # type: ignore[misc]
            f"Measured {name} {what}, against bits per weight: the"
            " found front, the uniform families, and what the search tried on its way. Fresh seeds"
            f"{between(table)}, the rest on the study's own seeds. Full precision has no place here:"
            f" it is what {name} is measured against.",
            optional=True,
        )

"""The found configurations: costs, budgets, how near the optimum, frontiers of cost and quality, and how the
search went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from aquabit.reports import drawing, style
from aquabit.reports.facts import OWN, Facts, number
from aquabit.reports.plan import Plan, Tables, fixed
from aquabit.search.front import hypervolume, pareto
from aquabit.stats import Interval

UNKNOWN = Interval(math.nan, math.nan, math.nan)  # of what was not measured
UNITS = {"bits": "bits per weight", "bytes": "bytes", "bops": "BOPs", "latency_ms": "ms a denoiser call"}


COSTS = {  # of frontiers: column -> axis, and what one unit of it is
    "bytes": ("size of the weights stored, MB", 1e6),
    "latency_ms": ("measured time of a denoiser call, ms", 1.0),
    "operations": ("multiply-adds and table additions, millions", 1e6),
}


def front(facts: Facts, metric: str | None = None) -> pd.DataFrame:
    """config, winner, bits, bytes, bops, latency_ms, predicted, measured, low, high, level, blocks of every
    member, smallest first, the values of ``metric`` (default: the objective); then psnr_predicted, psnr,
    psnr_low, psnr_high, in dB."""
    rows, blocks = [], int(facts.comparison.get("blocks") or 0)
    for m in facts.members:
        mean, psnr = (m.measured.get(k, UNKNOWN) for k in (metric or facts.objective, "psnr"))
        level = mean.percent if mean.known else psnr.percent if psnr.known else ""
        row = [m.config.digest, facts.is_winner(m), m.bits_per_weight, m.bytes, m.bops, number(m.latency_ms)]
        row += [number(m.predicted.get(metric or facts.objective)), *mean, level, blocks]
        rows.append([*row, number(m.predicted.get("psnr")), *psnr])
    columns = ["config", "winner", "bits", "bytes", "bops", "latency_ms"]
    columns += ["predicted", "measured", "low", "high", "level", "blocks"]
    columns += ["psnr_predicted", "psnr", "psnr_low", "psnr_high"]
    return pd.DataFrame(rows, columns=columns).sort_values("bits", kind="stable", ignore_index=True)


def limits_of(facts: Facts) -> dict[str, float]:
    """The hard limits of the search by name (bits, bytes, bops, latency_ms), those that were given."""
    return facts.front.budget.limits() if facts.front and facts.front.budget else {}


def budgets(facts: Facts) -> pd.DataFrame:
    """limit, allowed, used, slack: each hard budget, what the winner uses of it, and the share that it
    leaves."""
    rows = []
    for name, allowed in limits_of(facts).items():
        best = facts.front.best_member if facts.front and facts.front.winner else None
        used = number(getattr(best, "bits_per_weight" if name == "bits" else name, None))
        rows.append((UNITS.get(name, name), float(allowed), used, 1 - used / allowed))
    return pd.DataFrame(rows, columns=["limit", "allowed", "used", "slack"])


def proof(facts: Facts) -> pd.DataFrame:
    """problem, found, bound, gap: how near the search came to the optimum of what it searched, on the
    fitted (mostly logarithmic) scale."""
    known, rows = facts.front.proof if facts.front else None, []
    if known is not None:
        program = known.optimum, known.optimum_bound, known.optimum_gap
        rows.append(("additive scores (integer program)", *map(number, program)))
        if known.bound is not None or known.predicted != known.optimum:  # a surrogate was searched too
            rows.append(("the surrogate itself", *map(number, (known.predicted, known.bound, known.gap))))
    return pd.DataFrame(rows, columns=["problem", "found", "bound", "gap"])


def frontiers(facts: Facts) -> pd.DataFrame:
    """config, winner, bytes, latency_ms, multiply_adds, table_additions, operations, value, low, high, level:
    measured quality of the found configurations beside their costs."""
    rows = []
    for m in facts.members:
        mean, done = m.measured.get(facts.objective, UNKNOWN), m.operations
        counts = done if isinstance(done, Mapping) else {"multiply_adds": done, "lut_adds": 0.0}
        adds = [number(counts.get(k)) for k in ("multiply_adds", "lut_adds")]
        row = [m.config.digest, facts.is_winner(m), float(m.bytes), number(m.latency_ms), *adds, sum(adds)]
        rows.append([*row, *mean, mean.percent if mean.known else ""])
    columns = ["config", "winner", "bytes", "latency_ms", "multiply_adds", "table_additions", "operations"]
    columns += ["value", "low", "high", "level"]
    return pd.DataFrame(rows, columns=columns).sort_values("bytes", kind="stable", ignore_index=True)


def progress(facts: Facts) -> pd.DataFrame:
    """measurement, kind, hypervolume: the area that the measurements so far dominate in (bits, quality), as a
    share of the last one's.

    The corner is the largest size and the median quality of the design's configurations; only measurements of
    the study's own seeds count.
    """
    columns = ["measurement", "kind", "hypervolume"]
    table = facts.measured
    if not len(table) or facts.objective not in table:
        return pd.DataFrame([], columns=columns)
    own = table[
        table.kind.isin(OWN)
        & (table.status == "ok")
        & (table.protocol == (facts.protocol.digest if facts.protocol else ""))
    ]
    value = pd.to_numeric(own[facts.objective], errors="coerce") * (1 if facts.direction == "min" else -1)
    random = own.kind == "sample"
    if not random.any():
        return pd.DataFrame([], columns=columns)
    corner = float(value[random].median()), float(own.bits[random].max())
    best: list[tuple[float, float]] = []
    area, rows = 0.0, []
    for i, (kind, bits, worth) in enumerate(zip(own.kind, own.bits.astype(float), value, strict=True)):
        if not any(b <= bits and v <= worth for v, b in best):
            best = [(v, b) for v, b in best if b < bits or v < worth] + [(worth, bits)]
            area = hypervolume([v for v, _ in best], [b for _, b in best], corner)
        rows.append((i + 1, str(kind), area))
    out = pd.DataFrame(rows, columns=columns)
    return out.assign(hypervolume=out.hypervolume / area) if area else out.iloc[:0]


def draw_frontier(
    table: pd.DataFrame, axes: Axes, cost: str, metric: str = "FID", direction: str = "min"
) -> None:
    """Measured quality of the found configurations against one of COSTS, with intervals; a line joins
    those that none beats in both."""
    across, unit = COSTS[cost]
    known = table[table[cost].notna() & table.value.notna()].sort_values(cost)
    look: dict[str, Any] = {"color": style.BLUE, "marker": "D", "ms": 4.5, "mec": style.BLACK, "mew": 0.6}
    look |= {"elinewidth": 1.0, "capsize": 2, "label": drawing.with_level("found", known), "upright": True}
    marks = drawing.intervals(axes, known, "value", known[cost] / unit, ("low", "high"), **look)
    sign = 1.0 if direction == "min" else -1.0
    edge = known[pareto(sign * known.value.to_numpy(float), known[cost].to_numpy(float))]
    axes.plot(edge[cost] / unit, edge.value, color=style.BLUE, lw=0.8, drawstyle="steps-post", zorder=1)
    tips = [f"{r.config}: {metric} {r.value:.3g}" for r in known.itertuples()]
    style.name_points(axes, marks, tips, "tip")
    drawing.ring(axes, known[cost] / unit, known.value, known.winner)
    axes.legend(loc="best")
    axes.set_xlabel(across)
    axes.set_ylabel(drawing.better(style.label(metric), direction))


def draw_progress(table: pd.DataFrame, axes: Axes) -> None:
    """The dominated area over the measurements in the order in which they were made; candidates of the
    search shaded."""
    axes.plot(table.measurement, 100 * table.hypervolume, drawstyle="steps-post", color=style.BLUE)
    searched = table[table.kind == "candidate"].measurement
    if len(searched):
        axes.axvspan(
            searched.min() - 1,
            searched.max(),
            color="#DCE9F3",
            lw=0,
            zorder=0,
            label="proposed by the search",
        )
        axes.legend(loc="lower right")
    axes.set_xlim(0, float(table.measurement.max()))
    axes.set_ylim(0, 104)
    axes.set_xlabel("measurements, in the order in which they were made")
    axes.set_ylabel("dominated area, % of the final")


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    metric, direction, level = facts.metric, facts.direction, drawing.levels(found["frontiers"])
    between = f", with {level} intervals," if level else ""
    for cost, needs, what in (
        ("bytes", "front", "their stored size"),
        ("latency_ms", "latency", "the measured time of a packed denoiser call"),
        ("operations", "operations", "the kernel's operations"),
    ):
        yield Plan(
            f"frontier_{cost.removesuffix('_ms')}",
            "choose",
            needs,
            "frontiers",
            fixed(style.SINGLE, 2.3),
            lambda t, a, c=cost: draw_frontier(t, a, c, metric, direction),  # type: ignore[misc]
            f"{metric} of the found configurations on fresh seeds{between} against {what}.",
        )
    yield Plan(
        "progress",
        "choose",
        "samples",
        "progress",
        fixed(style.SINGLE, 2.3),
        draw_progress,
        f"The area in bits and {metric} that the measurements so far dominate (hypervolume), as a share of"
        " the final one.",
    )

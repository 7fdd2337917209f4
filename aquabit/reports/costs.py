"""What the winner is made of and what it costs: bits by layer and by step, budgets and proof, frontiers of
memory, time and operations, and how the search went."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from aquabit.reports import style
from aquabit.reports.facts import OWN, Facts, number
from aquabit.reports.tables import frontier
from aquabit.scheme import QuantConfig

UNITS = {"bits": "bits per weight", "bytes": "bytes", "bops": "BOPs", "latency_ms": "ms a denoiser call"}
COSTS = {  # of frontiers: column -> axis, and what one unit of it is
    "bytes": ("size of the weights stored, MB", 1e6),
    "latency_ms": ("measured time of a denoiser call, ms", 1.0),
    "operations": ("multiply-adds and table additions, millions", 1e6),
}


def chosen_bits(facts: Facts) -> pd.DataFrame:
    """layer, place, block, operator, weights, uniform, found, change: schemes of the winner and of the
    uniform configuration that it was compared with, in execution order; ``change`` of code bits a weight
    (found less uniform)."""
    columns = [
        "layer",
        "place",
        "block",
        "operator",
        "weights",
        "uniform",
        "uniform_bits",
        "found",
        "found_bits",
        "change",
    ]
    winner = facts.winner()
    if winner is None or not facts.layers:
        return pd.DataFrame([], columns=columns)
    other = facts.configs.get(str(((facts.front.get("comparison") or {}).get("uniform") or {}).get("config")))
    rows = []
    for place, (name, node) in enumerate(facts.layers.items()):
        area = math.prod(node["shape"][2:]) or 1
        found, uniform = winner[name].weight, other[name].weight if other else None
        bits = [math.nan if s is None else s.code_bits(area) for s in (uniform, found)]
        rows.append(
            (
                name,
                place,
                str(node["block"]),
                str(node["operator"]),
                float(np.prod(node["shape"])),
                "" if uniform is None else str(uniform),
                bits[0],
                str(found),
                bits[1],
                bits[1] - bits[0],
            )
        )
    return pd.DataFrame(rows, columns=columns)


def step_bits(facts: Facts) -> pd.DataFrame:
    """step (from 1), act, low, high: mean activation bits of the winner's layers in each denoising step,
    and those of its lowest and highest layer; empty where no layer changes them between steps."""
    columns, winner = ["step", "act", "low", "high"], facts.winner()
    if winner is None or winner.steps is None:
        return pd.DataFrame([], columns=columns)
    rows = []
    for step in range(winner.steps.total):
        group = winner.steps.of(step)
        acts = [c.act if isinstance(c.act, int) else c.act[group] for c in winner.layers.values()]
        rows.append((step + 1, float(np.mean(acts)), min(acts), max(acts)))
    return pd.DataFrame(rows, columns=columns)


def budgets(facts: Facts) -> pd.DataFrame:
    """limit, allowed, used, slack: each hard budget, what the winner uses of it, and the share that it
    leaves."""
    winner = next(
        (m for m in facts.front.get("members") or [] if _digest(m) == facts.front.get("winner")), None
    )
    rows = []
    for name, value in (facts.front.get("budget") or {}).items():
        allowed = number(value)
        used = number((winner or {}).get("bits_per_weight" if name == "bits" else name))
        if math.isfinite(allowed):
            rows.append((UNITS.get(name, name), allowed, used, 1 - used / allowed))
    return pd.DataFrame(rows, columns=["limit", "allowed", "used", "slack"])


def proof(facts: Facts) -> pd.DataFrame:
    """problem, found, bound, gap: how near the search came to the optimum of what it searched, on the
    fitted (mostly logarithmic) scale."""
    stored, rows = facts.front.get("proof") or {}, []
    for problem, keys in (
        ("additive scores (integer program)", ("optimum", "optimum_bound", "optimum_gap")),
        ("the surrogate itself", ("predicted", "bound", "gap")),
    ):
        values = [number(stored.get(k)) for k in keys]
        alone = (
            keys[0] == "predicted" and math.isnan(values[1]) and values[0] == number(stored.get("optimum"))
        )  # no surrogate was searched
        if math.isfinite(values[0]) and not alone:
            rows.append((problem, *values))
    return pd.DataFrame(rows, columns=["problem", "found", "bound", "gap"])


def frontiers(facts: Facts) -> pd.DataFrame:
    """config, winner, bytes, latency_ms, multiply_adds, table_additions, operations, value, low, high:
    measured quality of the found configurations beside their costs."""
    rows = []
    for member in facts.front.get("members") or []:
        found = (member.get("measured") or {}).get(facts.objective) or {}
        operations = member.get("operations")
        counts = (
            operations if isinstance(operations, dict) else {"multiply_adds": operations, "lut_adds": 0.0}
        )
        adds = [number(counts.get(k)) for k in ("multiply_adds", "lut_adds")]
        digest = _digest(member)
        rows.append(
            (
                digest,
                bool(digest) and digest == facts.front.get("winner"),
                number(member.get("bytes")),
                number(member.get("latency_ms")),
                *adds,
                sum(adds),
                *(number(found.get(k)) for k in ("value", "low", "high")),
            )
        )
    columns = [
        "config",
        "winner",
        "bytes",
        "latency_ms",
        "multiply_adds",
        "table_additions",
        "operations",
        "value",
        "low",
        "high",
    ]
    return pd.DataFrame(rows, columns=columns).sort_values("bytes", kind="stable", ignore_index=True)


def _digest(member: dict[str, Any]) -> str:
    body = member.get("config")
    return QuantConfig.from_dict(body, "a member of the front").digest if isinstance(body, dict) else ""


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
        if worth < corner[0] and bits < corner[1] and not any(b <= bits and v <= worth for b, v in best):
            best = sorted([(b, v) for b, v in best if b < bits or v < worth] + [(bits, worth)])
            edges = [*(b for b, _ in best[1:]), corner[1]]
            area = sum((edge - b) * (corner[0] - v) for (b, v), edge in zip(best, edges, strict=True))
        rows.append((i + 1, str(kind), area))
    out = pd.DataFrame(rows, columns=columns)
    return out.assign(hypervolume=out.hypervolume / area) if area else out.iloc[:0]


def draw_chosen_bits(table: pd.DataFrame, axes: Axes) -> None:
    """Code bits of every layer in execution order: the winner's as marks by scheme, the uniform
    configuration's as a line; blocks shaded."""
    for i, (_, part) in enumerate(table.groupby("block", sort=False)):
        if i % 2 == 0:
            axes.axvspan(part.place.min() - 0.5, part.place.max() + 0.5, color="#EFEFEF", lw=0, zorder=0)
    if table.uniform_bits.notna().any():
        axes.plot(
            table.place,
            table.uniform_bits,
            color=style.BLACK,
            lw=0.8,
            ls=(0, (4, 2)),
            label=f"uniform {table.uniform.iloc[0]}",
        )
    groups = table.found.map(style.scheme_group)
    for group in sorted(set(groups), key=style.group_order):
        part = table[groups == group]
        look = {**style.scheme_mark(part.found.iloc[0]), "ms": 4, "mec": style.BLACK, "mew": 0.4}
        dots = axes.plot(
            part.place,
            part.found_bits,
            ls="",
            label=group if group == "fp" else f"{group} bits",
            zorder=3,
            **look,
        )[0]
        style.name_points(axes, dots, list(part.layer))
    axes.set_xlim(-0.5, len(table) - 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer, in execution order")
    axes.set_ylabel("code bits a weight")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handletextpad=0.3)


def draw_step_bits(table: pd.DataFrame, axes: Axes) -> None:
    """Mean activation bits over the denoising steps, and the range of layers."""
    axes.fill_between(
        table.step,
        table.low,
        table.high,
        step="mid",
        color=style.BLUE,
        alpha=0.2,
        lw=0,
        label="lowest to highest layer",
    )
    axes.plot(table.step, table.act, drawstyle="steps-mid", color=style.BLUE, label="mean of layers")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("denoising step (1 starts from noise)")
    axes.set_ylabel("activation bits")
    axes.legend(loc="lower right")


def draw_frontier(
    table: pd.DataFrame, axes: Axes, cost: str, metric: str = "FID", direction: str = "min"
) -> None:
    """Measured quality of the found configurations against one of COSTS, with intervals; a line joins
    those that none beats in both."""
    text, unit = COSTS[cost]
    known = table[table[cost].notna() & table.value.notna()].sort_values(cost)
    gaps = np.nan_to_num(
        np.maximum(np.stack([known.value - known.low, known.high - known.value]).astype(float), 0.0)
    )
    look: dict[str, Any] = {"color": style.BLUE, "marker": "D", "ms": 4.5, "mec": style.BLACK, "mew": 0.6}
    bars = axes.errorbar(
        known[cost] / unit, known.value, yerr=gaps, ls="", elinewidth=1.0, capsize=2, label="found", **look
    )
    edge = known[frontier(known[cost].to_numpy(float), known.value.to_numpy(float), direction)]
    axes.plot(edge[cost] / unit, edge.value, color=style.BLUE, lw=0.8, drawstyle="steps-post", zorder=1)
    tips = [f"{r.config}: {metric} {r.value:.3g}" for r in known.itertuples()]
    style.name_points(axes, bars.lines[0], tips, "tip")
    best = known[known.winner]
    if len(best):
        axes.plot(
            best[cost] / unit,
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
        axes.legend(loc="best")
    axes.set_xlabel(text)
    axes.set_ylabel(f"{style.label(metric)} ({'lower' if direction == 'min' else 'higher'} is better)")


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

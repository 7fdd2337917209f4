"""Operator types and blocks: mean effects of their layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from aquabit.reports import drawing, style
from aquabit.reports.facts import Facts
from aquabit.reports.plan import Plan, Tables, rows_high
from aquabit.reports.subjects.ranking import layers

BLOCKS_MOST = 40  # rows that can be read in print


def operators(facts: Facts) -> pd.DataFrame:
    """name, effect, low, high, level, layers: the mean effect of a layer of each operator type, most harmful
    first."""
    told = facts.sensitivity
    return _effects(facts, told.operators if told else None).sort_values(
        "effect", ascending=False, na_position="last", kind="stable", ignore_index=True
    )


def blocks(facts: Facts) -> pd.DataFrame:
    """name, effect, low, high, level, layers: the mean effect of a layer of each block, in execution
    order."""
    order: dict[str, int] = {}
    for node in facts.layers.values():
        order.setdefault(str(node.get("block")), len(order))
    table = _effects(facts, facts.sensitivity.blocks if facts.sensitivity else None)
    place = table.name.map(lambda name: order.get(name, len(order)))
    return (
        table.assign(place=place).sort_values("place", kind="stable", ignore_index=True).drop(columns="place")
    )


def _effects(facts: Facts, groups: pd.DataFrame | None) -> pd.DataFrame:
    columns = ["name", "effect", "low", "high", "level", "layers"]
    if groups is None or groups.empty:
        return pd.DataFrame([], columns=columns)
    return groups.assign(name=groups.name.astype(str), level=facts.effect_level).reindex(columns=columns)


def block_operator(facts: Facts) -> pd.DataFrame:
    """block, operator, layers, effect: the mean effect of the layers of an operator type in a block, in
    execution order."""
    order = {
        block: i for i, block in enumerate(dict.fromkeys(str(n.get("block")) for n in facts.layers.values()))
    }
    known = layers(facts).dropna(subset=["effect"])
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


def draw_group_effects(
    table: pd.DataFrame,
    axes: Axes,
    members: pd.DataFrame,
    key: str,
    metric: str = "FID",
    swap: str = "",
    top: int = BLOCKS_MOST,
    effects: str = "predicted",
) -> None:
    """Effects of operator types or blocks (``key`` names the column of ``members``, the table of layers): a
    box of the layers, the mean with its interval; the ``top`` most harmful, in the table's order."""
    if len(table) > top:
        table = table.loc[table.effect.nlargest(top).index.sort_values()]
    table = table.reset_index(drop=True)
    at = np.arange(len(table), dtype=float)
    rows = [members[(members[key] == n) & members.effect.notna()] for n in table.name]
    boxed = [i for i, part in enumerate(rows) if len(part) >= 5]
    drawing.boxes(axes, boxed, [rows[i].effect.to_numpy(float) for i in boxed])
    every = pd.concat([part.assign(at=i) for i, part in enumerate(rows)])
    if len(every):
        ticks = axes.plot(
            every.effect, every["at"], ls="", marker="|", ms=5, mew=0.7, color="#5A5A5A", label="layers"
        )[0]
        style.name_points(axes, ticks, list(every.layer))
    look: dict[str, Any] = {"ms": 4.5, "elinewidth": 1.3, "zorder": 4, **drawing.PREDICTED}
    text = drawing.with_level("mean", table)
    drawing.intervals(axes, table, "effect", at, ("low", "high"), label=text, **look)
    drawing.zero(axes)
    style.symmetric_axis(axes, "x", [*table.effect, *table.low, *table.high, *every.effect], ticks_most=3)
    names = [
        style.label(r.name, 30) + (f" ({r.layers:.0f})" if math.isfinite(r.layers) else "")
        for r in table.itertuples(index=False, name="Row")
    ]
    axes.set_yticks(at, names)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{effects} {drawing.effect_label(metric, swap, chr(10))}")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.0, handletextpad=0.3)


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
    norm, colours = drawing.diverging(values)
    drawing.cells(
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


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    metric, swap, effects = facts.metric, facts.swap, facts.effects
    big, wide, members = effects.capitalize(), style.SINGLE * 1.3, found["layers"]
    level = facts.effect_level
    for name, key, caption in (
        (
            "operators",
            "operator",
            "by operator type (number of layers): boxes and ticks are layers, points the mean with its"
            f" {level} interval.",
        ),
        (
            "blocks",
            "block",
            f"by block in execution order (number of layers), with {level} intervals; of more than"
            f" {BLOCKS_MOST} blocks the most harmful.",
        ),
    ):
        yield Plan(
            name,
            "where",
            name,
            name,
            rows_high(wide, 0.21, BLOCKS_MOST, "name", 0.95),
            lambda t, a, k=key: draw_group_effects(t, a, members, k, metric, swap, effects=effects),  # type: ignore[misc]
            f"{big} effects {caption}",
        )
    yield Plan(
        "block_operator",
        "where",
        "layers",
        "block_operator",
        rows_high(style.DOUBLE, 0.17, BLOCKS_MOST, "block", 1.3),
        lambda t, a: draw_block_operator(t, a, metric, swap),
        f"{big} effects, mean of the layers of an operator type in a block; blocks in execution order, of"
        f" more than {BLOCKS_MOST} the most harmful.",
    )

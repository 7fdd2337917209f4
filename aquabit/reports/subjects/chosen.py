"""What the winner gives to each layer, operator type and step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from aquabit.reports import style
from aquabit.reports.facts import Facts
from aquabit.reports.plan import Plan, Tables, fixed, rows_high
from aquabit.scheme import Scheme, act_bits, act_parts


def chosen_schemes(facts: Facts) -> pd.DataFrame:
    """operator, scheme, layers, weights, share: what the winner gives to each operator type; ``share`` of
    its layers."""
    winner, columns = facts.winner(), ["operator", "scheme", "layers", "weights", "share"]
    if winner is None or not facts.layers:
        return pd.DataFrame([], columns=columns)
    rows = [
        (str(n["operator"]), str(winner[k].weight), 1, float(np.prod(n["shape"])))
        for k, n in facts.layers.items()
    ]
    table = (
        pd.DataFrame(rows, columns=columns[:-1])
        .groupby(["operator", "scheme"], as_index=False, sort=False)
        .sum()
    )
    table["share"] = table.layers / table.groupby("operator").layers.transform("sum")
    rank = {s: (Scheme.parse(s).code_bits(9), s) for s in set(table.scheme)}
    table["rank"] = table.scheme.map(rank)
    place = {
        operator: i
        for i, operator in enumerate(dict.fromkeys(str(n["operator"]) for n in facts.layers.values()))
    }
    table["place"] = table.operator.map(place)
    return table.sort_values(["place", "rank"], ignore_index=True)[columns]


def chosen_bits(facts: Facts) -> pd.DataFrame:
    """layer, place, block, operator, weights, uniform, found, change: schemes of the winner and of the
    uniform configuration that it was compared with, in execution order; ``change`` of code bits a weight
    (found less uniform)."""
    columns = ["layer", "place", "block", "operator", "weights"]
    columns += ["uniform", "uniform_bits", "found", "found_bits", "change"]
    winner = facts.winner()
    if winner is None or not facts.layers:
        return pd.DataFrame([], columns=columns)
    other = facts.configs.get(str((facts.comparison.get("uniform") or {}).get("config")))
    rows = []
    for place, (name, node) in enumerate(facts.layers.items()):
        area = math.prod(node["shape"][2:]) or 1
        found, uniform = winner[name].weight, other[name].weight if other else None
        before, after = (math.nan if s is None else s.code_bits(area) for s in (uniform, found))
        layer = (name, place, str(node["block"]), str(node["operator"]), float(np.prod(node["shape"])))
        rows.append((*layer, str(uniform or ""), before, str(found), after, after - before))
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
        parts = [act_parts(choice.act) for choice in winner.layers.values()]
        acts = [act_bits(own[0] if len(own) == 1 else own[group]) for own in parts]
        rows.append((step + 1, float(np.mean(acts)), min(acts), max(acts)))
    return pd.DataFrame(rows, columns=columns)


def draw_chosen_schemes(table: pd.DataFrame, axes: Axes) -> None:
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
        look: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": "white"}
        axes.barh(at, 100 * width, left=100 * left, height=0.74, linewidth=0.5, **look)
        handles.append(Patch(**look, label=group if group == "fp" else f"{group} bits"))
        left += width
    axes.set_yticks(at, [f"{style.label(n, 30)} ({count[n]:.0f})" for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the operator type's layers, %")
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=1.8, handleheight=1.1
    )


def draw_chosen_bits(table: pd.DataFrame, axes: Axes) -> None:
    """Code bits of every layer in execution order: the winner's as marks by scheme, the uniform
    configuration's as a line; blocks shaded."""
    for i, (_, part) in enumerate(table.groupby("block", sort=False)):
        if i % 2 == 0:
            axes.axvspan(part.place.min() - 0.5, part.place.max() + 0.5, color="#EFEFEF", lw=0, zorder=0)
    if table.uniform_bits.notna().any():
        text = f"uniform {table.uniform.iloc[0]}"
        axes.plot(table.place, table.uniform_bits, color=style.BLACK, lw=0.8, ls=(0, (4, 2)), label=text)
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
    look: dict[str, Any] = {"color": style.BLUE, "alpha": 0.2, "lw": 0, "label": "lowest to highest layer"}
    axes.fill_between(table.step, table.low, table.high, step="mid", **look)
    axes.plot(table.step, table.act, drawstyle="steps-mid", color=style.BLUE, label="mean of layers")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("denoising step (1 starts from noise)")
    axes.set_ylabel("activation bits")
    axes.legend(loc="lower right")


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    yield Plan(
        "chosen_schemes",
        "choose",
        "winner",
        "chosen_schemes",
        rows_high(style.DOUBLE, 0.22, 60, "operator"),
        draw_chosen_schemes,
        "Weight schemes that the winner gives to the layers of each operator type (number of layers).",
    )
    yield Plan(
        "chosen_bits",
        "choose",
        "winner",
        "chosen_bits",
        fixed(style.DOUBLE, 2.3),
        draw_chosen_bits,
        "Code bits of every layer in the winner and in the uniform configuration that it was compared with;"
        " blocks are shaded in turn.",
    )
    yield Plan(
        "step_bits",
        "steps",
        "winner",
        "step_bits",
        fixed(style.SINGLE, 1.9),
        draw_step_bits,
        "Activation bits of the winner over the denoising steps.",
        optional=True,
    )

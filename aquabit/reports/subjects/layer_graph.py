"""The layer graph as a picture: nodes from left to right as data flows, coloured by effect; above 120
layers a node is a block."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from aquabit.reports import drawing, style
from aquabit.reports.facts import Facts
from aquabit.reports.plan import Plan, Tables
from aquabit.reports.subjects.ranking import layers as layers_table

MOST = 120  # layers that can be told apart in a picture of two columns' width


def layer_graph(facts: Facts) -> pd.DataFrame:
    """node, kind (layer, block or merge), block, operator, layers, weights, effect, x, y, to: nodes of the
    picture with their places (x from left to right) and, in ``to``, the rows that their edges lead to, as
    n3 n5."""
    columns = ["node", "kind", "block", "operator", "layers", "weights", "effect", "x", "y", "to"]
    if facts.graph is None or not facts.layers:
        return pd.DataFrame([], columns=columns)
    graph = _by_block(facts.graph) if len(facts.layers) > MOST else facts.graph
    places = _places(graph)
    layers = layers_table(facts)
    effect = layers.dropna(subset=["effect"])
    if graph is not facts.graph:
        by, weights = effect.groupby("block").effect.mean(), layers.groupby("block").weights.sum()
    else:
        by, weights = effect.set_index("layer").effect, layers.set_index("layer").weights
    members, index, rows = layers.groupby("block").size(), {n: i for i, n in enumerate(graph)}, []
    for name in graph:
        data = facts.graph.nodes[name] if name in facts.graph else {}
        kind = "block" if graph is not facts.graph else "layer" if name in facts.layers else "merge"
        block = str(name) if kind == "block" else str(data.get("block", ""))
        count = int(members.get(name, 0)) if kind == "block" else int(kind == "layer")
        row = (str(name), kind, block, str(data.get("operator", "")), count)
        numbers = (float(weights.get(name, np.nan)), float(by.get(name, np.nan)), *places[name])
        rows.append((*row, *numbers, " ".join(f"n{index[t]}" for t in graph.successors(name))))
    return pd.DataFrame(rows, columns=columns)


def _by_block(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph of blocks; merges belong to the block of a layer before them."""
    block: dict[str, str] = {}
    for name in _in_order(graph):
        before = [block[p] for p in graph.predecessors(name) if p in block]
        block[name] = str(graph.nodes[name].get("block") or (before[-1] if before else name))
    out = nx.DiGraph()
    out.add_nodes_from(dict.fromkeys(block.values()))
    out.add_edges_from((block[a], block[b]) for a, b in graph.edges if block[a] != block[b])
    return out


def _in_order(graph: nx.DiGraph) -> list[str]:
    return list(nx.topological_sort(graph)) if nx.is_directed_acyclic_graph(graph) else list(graph)


def _places(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """x from left to right, y of nodes that stand side by side: by graphviz where it and its bindings are
    installed, else by depth, in which merges stand half way between layers."""
    if shutil.which("dot"):
        try:
            found = nx.nx_agraph.graphviz_layout(graph, prog="dot", args="-Grankdir=LR")
            columns = {x: float(i) for i, x in enumerate(sorted({round(x) for x, _ in found.values()}))}
            return {n: (columns[round(x)], y / 40) for n, (x, y) in found.items()}
        except ImportError:  # graphviz alone is not enough
            pass
    depth: dict[str, float] = {}
    for name in _in_order(graph):
        before = max((depth[p] for p in graph.predecessors(name) if p in depth), default=-1.0)
        merge = graph.nodes[name].get("kind") == "merge"
        depth[name] = before if merge and before % 1 else before + 0.5 if merge else math.floor(before) + 1.0
    ranks: dict[float, list[str]] = {}
    for name in graph:
        ranks.setdefault(depth[name], []).append(name)
    return {
        n: (depth[n], 0.5 * (i - (len(row) - 1) / 2) * (1 if depth[n] % 1 == 0 else 0))
        for row in ranks.values()
        for i, n in enumerate(row)
    }


def height(table: pd.DataFrame) -> float:
    """Inches that the picture needs."""
    return 1.5 if table.empty else min(4.0, 1.3 + 0.34 * float(np.ptp(table.y)))


def draw_layer_graph(table: pd.DataFrame, axes: Axes, metric: str = "FID") -> None:
    """Nodes coloured by effect and as large as their weights, squares for blocks, dots for merges; edges
    from left to right, those that pass over others as arcs, so that skips can be seen."""
    at = table[["x", "y"]].to_numpy(float)
    ends = [
        (at[i], at[int(j[1:])])
        for i, text in enumerate(table.to.fillna("").astype(str))
        for j in text.split()
    ]
    axes.add_collection(
        LineCollection([_line(a, b) for a, b in ends], colors="#A8A8A8", linewidths=0.45, zorder=1)
    )
    merges = table[table.kind == "merge"]
    axes.plot(merges.x, merges.y, ls="", marker=".", ms=1.6, color="#7A7A7A", zorder=2)
    nodes = table[table.kind != "merge"]
    norm, colours = drawing.diverging(nodes.effect.to_numpy(float))
    share = np.sqrt(nodes.weights.fillna(0.0) / max(1.0, float(nodes.weights.max())))
    known, block = nodes.effect.notna(), (nodes.kind == "block").any()
    for part, colour in ((nodes[known], nodes.effect[known]), (nodes[~known], None)):
        if len(part):
            look: dict[str, Any] = (
                {"c": colour, "cmap": colours, "norm": norm} if colour is not None else {"c": "white"}
            )
            edge: dict[str, Any] = {"linewidths": 0.4, "edgecolors": style.BLACK, "zorder": 3}
            dots = axes.scatter(
                part.x, part.y, s=8 + 34 * share[part.index], marker="s" if block else "o", **edge, **look
            )
            names = [
                f"{n}: {e:.3g} a layer" if block else str(n)
                for n, e in zip(part.node, part.effect, strict=True)
            ]
            style.name_points(axes, dots, names, "tip" if block else "layer")
    _worst(nodes, axes)
    span = max(6.0, float(np.ptp(table.x)))
    axes.set_xlim(float(table.x.min()) - 0.03 * span, float(table.x.max()) + 0.03 * span)
    reach = max([0.0, *(float(_line(a, b)[:, 1].max()) for a, b in ends)])
    axes.set_ylim(float(table.y.min()) - 1.9, max(float(table.y.max()), reach) + 0.3)
    axes.set_axis_off()
    style.colour_bar(axes, norm, colours, f"worsening of {style.label(metric)}")


def _line(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Points [n, 2] of an edge: straight between neighbours, else an arc that rises with its length."""
    if abs(b[0] - a[0]) <= 1.6:
        return np.stack([a, b])
    t = np.linspace(0, 1, 17)[:, None]
    rise = 0.22 * math.sqrt(abs(b[0] - a[0]))
    return np.asarray((1 - t) * a + t * b + np.concatenate([0 * t, 4 * rise * t * (1 - t)], 1))


def _worst(nodes: pd.DataFrame, axes: Axes, most: int = 4) -> None:
    """Names of the most harmful nodes below the picture, each on a line of its own."""
    foot = float(nodes.y.min())
    for i, r in enumerate(
        nodes.dropna(subset=["effect"]).nlargest(most, "effect").sort_values("x").itertuples()
    ):
        right = r.x > (nodes.x.min() + nodes.x.max()) / 2
        line = {"arrowstyle": "-", "lw": 0.35, "color": "#555555", "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            style.label(str(r.node), 48),
            (r.x, r.y),
            (r.x, foot - 0.55 - 0.4 * i),
            fontsize=6,
            ha="right" if right else "left",
            va="center",
            arrowprops=line,
            zorder=5,
        )


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    yield Plan(
        "layer_graph",
        "where",
        "graph",
        "layer_graph",
        lambda table: (style.DOUBLE, height(table)),
        lambda t, a: draw_layer_graph(t, a, facts.metric),
        "The layers as data flows, from left to right; colour is the effect, size the number of weights,"
        f" small dots are merges, arcs are edges that pass over others. Above {MOST} layers a node is"
        " a block.",
    )

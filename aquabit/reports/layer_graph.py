"""The layer graph as a picture: nodes from left to right as data flows, coloured by effect; above 120 layers a node is a block."""

from __future__ import annotations

import shutil

import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from aquabit.reports import style
from aquabit.reports.attribution import diverging
from aquabit.reports.facts import Facts

MOST = 120  # layers that can be told apart in a picture of two columns' width
WRAP = 40  # columns of a row: a deep model is folded


def layer_graph(facts: Facts, layers: pd.DataFrame) -> pd.DataFrame:
    """node, kind (layer, block or merge), block, operator, layers, weights, effect, x, y, to: nodes of the picture with their places (x from
    left to right) and, in ``to``, the rows that their edges lead to, separated by spaces."""
    columns = ["node", "kind", "block", "operator", "layers", "weights", "effect", "x", "y", "to"]
    if facts.graph is None or not facts.layers:
        return pd.DataFrame([], columns=columns)
    graph = _by_block(facts.graph) if len(facts.layers) > MOST else facts.graph
    places = _places(graph)
    effect = layers.dropna(subset=["effect"])
    by = effect.groupby("block").effect.mean() if graph is not facts.graph else effect.set_index("layer").effect
    members, index, rows = layers.groupby("block").size(), {n: i for i, n in enumerate(graph)}, []
    weights = layers.groupby("block").weights.sum() if graph is not facts.graph else layers.set_index("layer").weights
    for name in graph:
        data = facts.graph.nodes[name] if name in facts.graph else {}
        kind = "block" if graph is not facts.graph else "layer" if name in facts.layers else "merge"
        block = str(name) if kind == "block" else str(data.get("block", ""))
        count = int(members.get(name, 0)) if kind == "block" else int(kind == "layer")
        rows.append((str(name), kind, block, str(data.get("operator", "")), count, float(weights.get(name, np.nan)),
                     float(by.get(name, np.nan)), *places[name], " ".join(str(index[t]) for t in graph.successors(name))))  # fmt: skip
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
    """x from left to right, y of nodes that stand side by side: by graphviz where it is installed, else ``multipartite_layout`` by depth;
    folded into rows of WRAP columns."""
    if shutil.which("dot") and len(graph) <= MOST:
        try:
            found = nx.nx_agraph.graphviz_layout(graph, prog="dot", args="-Grankdir=LR")
            columns = {x: i for i, x in enumerate(sorted({round(x) for x, _ in found.values()}))}
            scale = max(1.0, float(np.ptp([y for _, y in found.values()])) / 4)
            return _folded({n: (float(columns[round(x)]), y / scale) for n, (x, y) in found.items()})
        except ImportError:  # pygraphviz is another matter than graphviz
            pass
    depth: dict[str, int] = {}
    for name in _in_order(graph):
        depth[name] = 1 + max((depth[p] for p in graph.predecessors(name) if p in depth), default=-1)
    ranked = nx.DiGraph()
    ranked.add_nodes_from((n, {"rank": depth[n]}) for n in graph)
    y = {n: float(p[1]) for n, p in nx.multipartite_layout(ranked, subset_key="rank", scale=1).items()} if len(graph) else {}
    widest = max((sum(d == k for d in depth.values()) for k in set(depth.values())), default=1)
    most = max((abs(v) for v in y.values()), default=0.0) or 1.0
    return _folded({n: (float(depth[n]), y[n] / most * min(1.0, widest / 8)) for n in graph})


def _folded(places: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {n: (x % WRAP, y - 2.6 * (x // WRAP)) for n, (x, y) in places.items()}


def height(table: pd.DataFrame) -> float:
    """Inches that the picture needs."""
    return 0.75 + 0.85 * (1 if table.empty else 1 + round(-float(table.y.min()) // 2.6))


def draw_layer_graph(table: pd.DataFrame, axes: Axes, metric: str = "FID") -> None:
    """Nodes coloured by effect and as large as their weights, squares for blocks, dots for merges; edges from left to right."""
    at, targets = table[["x", "y"]].to_numpy(float), [[int(t) for t in text.split()] for text in table.to.fillna("").astype(str)]
    short = [(at[i], at[j]) for i, row in enumerate(targets) for j in row if abs(at[i, 1] - at[j, 1]) < 2.2]
    turns = [part for i, row in enumerate(targets) for j in row if abs(at[i, 1] - at[j, 1]) >= 2.2 for part in _turn(at[i], at[j])]
    axes.add_collection(LineCollection(short, colors="#A8A8A8", linewidths=0.5, zorder=1))
    axes.add_collection(LineCollection(turns, colors="#C8C8C8", linewidths=0.4, linestyles=":", zorder=1))
    merges = table[table.kind == "merge"]
    axes.plot(merges.x, merges.y, ls="", marker=".", ms=1.8, color="#7A7A7A", zorder=2)
    nodes = table[table.kind != "merge"]
    norm, colours = diverging(nodes.effect.to_numpy(float))
    share = np.sqrt(nodes.weights.fillna(0.0) / max(1.0, float(nodes.weights.max())))
    known = nodes.effect.notna()
    for part, colour in ((nodes[known], nodes.effect[known]), (nodes[~known], None)):
        if part.empty:
            continue
        look = {"c": colour, "cmap": colours, "norm": norm} if colour is not None else {"c": "white"}
        sizes = 9 + 50 * share[part.index] if len(nodes) <= 80 else 8 + 26 * share[part.index]
        marker = "s" if part.kind.iloc[0] == "block" else "o"
        dots = axes.scatter(part.x, part.y, s=sizes, marker=marker, linewidths=0.4, edgecolors=style.BLACK, zorder=3, **look)
        kind = "layer" if marker == "o" else "tip"
        style.name_points(axes, dots, [str(n) if kind == "layer" else f"{n}: {e:.3g} a layer" for n, e in zip(part.node, part.effect, strict=True)], kind)
    _worst(nodes, axes)
    axes.set_xlim(-1, max(6.0, float(table.x.max()) + 1))
    axes.set_ylim(float(table.y.min()) - 0.8, float(table.y.max()) + 1.0)
    axes.set_axis_off()
    style.colour_bar(axes, norm, colours, f"worsening of {style.label(metric)}")


def _turn(a: np.ndarray, b: np.ndarray) -> list[list[tuple[float, float]]]:
    """An edge to a row below: down between the rows."""
    middle = (a[1] + b[1]) / 2
    return [[(a[0], a[1]), (a[0] + 0.5, middle)], [(a[0] + 0.5, middle), (b[0] - 0.5, middle)], [(b[0] - 0.5, middle), (b[0], b[1])]]


def _worst(nodes: pd.DataFrame, axes: Axes, most: int = 5) -> None:
    """Names of the most harmful nodes, each at another height so that neighbours' names stay apart."""
    for i, r in enumerate(nodes.dropna(subset=["effect"]).nlargest(most, "effect").sort_values("x").itertuples()):
        right = r.x > nodes.x.max() / 2
        axes.annotate(
            style.label(str(r.node), 40), (r.x, r.y), (-4 if right else 4, 9 + 7 * (i % 2)), textcoords="offset points", fontsize=5.5,
            ha="right" if right else "left", arrowprops={"arrowstyle": "-", "lw": 0.3, "color": "#555555"}, zorder=5,
        )  # fmt: skip

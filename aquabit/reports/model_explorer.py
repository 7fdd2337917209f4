"""What Google's Model Explorer shows: the layer graph, and data on its nodes (effects, chosen schemes).

The formats are those of its ``graph_builder`` and ``node_data_builder`` (ai-edge-model-explorer 0.1.34):
``model-explorer model-explorer.json`` opens the graph, "Upload node data" takes the other files.
"""

from __future__ import annotations

from typing import Any

import networkx as nx

from aquabit.reports.facts import Facts
from aquabit.scheme import act_text

GRAPH = "aquabit"  # the id of the graph, by which node data finds it
HELPS, HARMLESS, HURTS = "#4393c3", "#ffffff", "#d6604d"  # colours of negative, no and large effects
SHOWN = ("kind", "operator", "block", "shape", "macs", "op")  # attributes of a node, where it has them


def explorer_files(facts: Facts) -> dict[str, Any]:
    """File name -> JSON value; None where the study does not hold it yet."""
    effects, winner = facts.sensitivity, facts.winner()
    rows = [] if effects is None else effects.layers[["name", "effect"]].itertuples(index=False)
    worse = {name: float(effect) for name, effect in rows if effect == effect}
    schemes = {} if winner is None else {k: f"{c.weight} {act_text(c.act)}" for k, c in winner.layers.items()}
    return {
        "model-explorer.json": None if facts.graph is None else [graph_of(facts.graph)],
        "model-explorer-effects.json": _data(worse, f"effect ({facts.metric})", _colours(worse)),
        "model-explorer-schemes.json": _data(schemes, "chosen scheme", {}),
    }


def graph_of(graph: nx.DiGraph) -> dict[str, Any]:
    """Nodes under the names of their modules, merges at the top; edges as in the graph."""
    nodes = []
    for name, attributes in graph.nodes(data=True):
        path, _, label = name.rpartition(".")
        nodes.append(
            {
                "id": name,
                "label": label,
                "namespace": path.replace(".", "/"),
                "attrs": [{"key": k, "value": str(attributes[k])} for k in SHOWN if k in attributes],
                "incomingEdges": [
                    {"sourceNodeId": before, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
                    for i, before in enumerate(graph.predecessors(name))
                ],
            }
        )
    return {"id": GRAPH, "nodes": nodes}


def _data(values: dict[str, Any], name: str, style: dict[str, Any]) -> dict[str, Any] | None:
    if not values:
        return None
    return {GRAPH: {"name": name, "results": {k: {"value": v} for k, v in values.items()}, **style}}


def _colours(values: dict[str, float]) -> dict[str, Any]:
    """A gradient from the least to the largest value, white at zero where that lies between."""
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    stops = [(0.0, HELPS if low < 0 else HARMLESS), (1.0, HURTS if high > 0 else HARMLESS)]
    if low < 0 < high:
        stops.insert(1, (-low / (high - low), HARMLESS))
    return {"gradient": [{"stop": stop, "bgColor": colour} for stop, colour in stops]}

"""What an artifact says of its model's layers, so that loading needs no trace: sizes of some models depend on
data, which a model without weights does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import nn

from aquabit.graph import is_quantizable, layers
from aquabit.jsonio import record
from aquabit.parts import own_names
from aquabit.scheme import AquabitError

SOURCE = "quantization_config: layers"


@dataclass(frozen=True)
class LayerFacts:
    """The layers by name, those that read a concatenated skip (with the channels of the first part), those
    that make Q, K and V, and those that must stay in full precision."""

    names: list[str]
    splits: dict[str, int] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def layer_facts(graph: nx.DiGraph) -> dict[str, Any]:
    """What ``graph_from`` reads, as JSON."""
    nodes = layers(graph)
    return {
        "names": list(nodes),
        "splits": {name: node["split"] for name, node in nodes.items() if node.get("split")},
        "attention": {name: node["attention"] for name, node in nodes.items() if node.get("attention")},
        "uncalled": list(graph.graph.get("uncalled", ())),
        "unread": list(graph.graph.get("unread", ())),
    }


def facts_of_part(value: Mapping[str, Any] | None, part: str) -> dict[str, Any] | None:
    """Of the facts of a network of several parts those of one, by the names that its layers have there."""
    if value is None:
        return None
    found: dict[str, Any] = {}
    for key, own in value.items():
        names = own_names(part, own)
        found[key] = (
            {names[n]: v for n, v in own.items() if n in names}
            if isinstance(own, Mapping)
            else [names[n] for n in own if n in names]
        )
    return found


def graph_from(value: Any, tied: Mapping[str, str], model: nn.Module) -> nx.DiGraph:
    """The layers of a model as a graph without edges, sizes and operator types; raises AquabitError where the
    model has no such layers."""
    found = record(LayerFacts, value, SOURCE)
    modules, names = dict(model.named_modules()), set(found.names)
    wrong = [name for name in found.names if not is_quantizable(modules.get(name))]
    parts = (found.splits, found.attention, found.uncalled, found.unread)
    wrong += [name for part in parts for name in part if name not in names]
    wrong += [name for name, split in found.splits.items() if split < 1]
    if wrong:
        raise AquabitError(f"{SOURCE}: {wrong[0]!r} is no Linear or Conv2d layer of {type(model).__name__}")
    graph = nx.DiGraph(uncalled=found.uncalled, unread=found.unread, tied=dict(tied))
    for depth, name in enumerate(found.names):
        own = {"split": found.splits.get(name), "attention": found.attention.get(name)}
        graph.add_node(name, kind="layer", depth=depth, **own)
    return graph

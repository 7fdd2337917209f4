"""What a writer of files gets: a dense network, a configuration of it, and its weights as codes; of several
networks that are quantized together, those of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import networkx as nx
from torch import nn

from aquabit.graph import LayerGraph, layers
from aquabit.kernels.codebook import CodebookWeight
from aquabit.parts import own_names, parts_of
from aquabit.quant.model import fingerprint
from aquabit.scheme import FP, AquabitError, QuantConfig, Rounding, Scheme, act_parts, act_text


@dataclass(frozen=True)
class Exported:
    """``network`` is the dense denoiser with weights in full precision, ``weights`` the codes of the layers
    that ``config`` quantizes, as ``aquabit quantize`` packs them (none yet while a writer checks), ``graph``
    the network's."""

    network: nn.Module
    config: QuantConfig
    graph: LayerGraph
    weights: Mapping[str, CodebookWeight] = field(default_factory=dict)


def each_network(exported: Exported) -> dict[str, Exported]:
    """The networks of which something is quantized, each with its part of everything under its own names, by
    the components' names; a network that is alone is itself, under the name ""."""
    parts = parts_of(exported.network)
    if set(parts) == {""}:
        return {"": exported}
    found = {part: _part(exported, part, network) for part, network in parts.items()}
    coded = {k: one for k, one in found.items() if any(c.weight != FP for c in one.config.layers.values())}
    return coded or found


def _part(exported: Exported, part: str, network: nn.Module) -> Exported:
    """One network of several."""
    config, whole = exported.config, exported.graph
    own = own_names(part, whole.nodes)
    graph = nx.relabel_nodes(whole.subgraph(own), own)
    kinds = dict(zip(parts_of(exported.network), whole.graph["model_class"].split("+"), strict=True))
    graph.graph = {"model_class": kinds[part]}
    for key in ("uncalled", "unread"):
        graph.graph[key] = [own[name] for name in whole.graph.get(key, ()) if name in own]
    tied = own_names(part, whole.graph.get("tied", {}))
    graph.graph["tied"] = {place: own[whole.graph["tied"][name]] for name, place in tied.items()}
    chosen = {own[name]: choice for name, choice in config.layers.items() if name in own}
    alone = replace(config, fingerprint=fingerprint(network), layers=chosen)
    weights = {own[name]: weight for name, weight in exported.weights.items() if name in own}
    return Exported(network, alone, graph, weights)


def place_of(out: str | Path, part: str, *, folder: bool) -> Path:
    """Where a network of several is written: into a folder under its name, of files beside each other with
    its name before the ending."""
    path = Path(out)
    if not part:
        return path
    return path / part if folder else path.with_name(f"{path.stem}-{part}{path.suffix}")


def check_replaceable(place: Path, to: str, may_replace: Callable[[Path], bool]) -> None:
    """Raise AquabitError where something is that is not one of ours, and would be overwritten."""
    if place.exists() and not may_replace(place):
        raise AquabitError(f"{place} is there already and is none of aquabit's for {to}; choose another name")


def check_layers(config: QuantConfig, graph: LayerGraph) -> None:
    """Raise AquabitError for layers of a configuration that are not in a graph, or cannot be what it says."""
    nodes = layers(graph)
    wrong = [n for n in config.layers if n not in nodes]
    if wrong:
        raise AquabitError(
            f"layer {wrong[0]!r} of the configuration is not in this model; is it another model's?"
        )
    config.check_shapes(nodes)


def check_activations(config: QuantConfig, beside: Callable[[Scheme, Rounding], str | None]) -> None:
    """Raise AquabitError for a layer whose inputs are rounded as only some programs do, "i8" or "f8", where
    the one that is to read its weights does not: ``beside`` says why (``targets.Target.beside``). Of bits
    files say what is lost."""
    for name, choice in config.layers.items():
        for act in act_parts(choice.act):
            why = None if isinstance(act, int) else beside(choice.weight, act)
            if why is None and not isinstance(act, int) and isinstance(choice.act, tuple):
                why = "no program changes how inputs are rounded while sampling"
            if why is not None:
                raise AquabitError(
                    f"layer {name!r} cannot be {choice.weight} at {act_text(choice.act)}: {why}; leave its"
                    " activations at 16"
                )


def lost_beside_weights(config: QuantConfig) -> list[str]:
    """What files do not carry: activations quantized to bits and a noise correction."""
    found = []
    acts = [c.act for c in config.layers.values() if c.act != 16 and c.act not in ("i8", "f8")]
    if acts:
        found.append(f"activations of {len(acts)} layers are quantized here, and not by what reads this file")
    if config.correction:
        found.append(f"noise correction {config.correction} is not applied")
    return found

"""What a writer of files gets: a dense denoiser, a configuration of it, and its weights as codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from aquabit.graph import LayerGraph, layers
from aquabit.kernels.codebook import CodebookWeight
from aquabit.scheme import AquabitError, QuantConfig, Rounding, Scheme, act_parts, act_text


@dataclass(frozen=True)
class Exported:
    """``network`` is the dense denoiser with weights in full precision, ``weights`` the codes of the layers
    that ``config`` quantizes, as ``aquabit quantize`` packs them (none yet while a writer checks), ``graph``
    the network's."""

    network: nn.Module
    config: QuantConfig
    graph: LayerGraph
    weights: Mapping[str, CodebookWeight] = field(default_factory=dict)


def check_one_network(config: QuantConfig, graph: LayerGraph, to: str) -> None:
    """Raise AquabitError for a graph of several networks, and for layers that are not in it."""
    if "parts" in graph.graph:
        raise AquabitError(
            f"{to} configures one network, and {', '.join(graph.graph['parts'])} are quantized together; give"
            " a configuration of one component"
        )
    nodes = layers(graph)
    wrong = [n for n in config.layers if n not in nodes]
    if wrong:
        raise AquabitError(
            f"layer {wrong[0]!r} of the configuration is not in this model; is it another model's?"
        )


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

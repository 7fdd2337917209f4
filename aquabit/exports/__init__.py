"""A found configuration in the words of other libraries, with a statement of what each of them cannot
express.

What is exported are bits, groups and activations per layer; the library fits its own ranges to the dense
model (tried by benchmarks/exports.py). A target is one file with ``layer``, the form of one layer, and
``whole``, the configuration made of them; a new one is entered in ``TARGETS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from aquabit.exports import modelopt, quanto, torchao
from aquabit.exports.statement import (
    Export,
    Form,
    LayerExport,
    Node,
    activation_losses,
    losses_of_all,
    weight_losses,
)
from aquabit.graph import LayerGraph, layers
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig

__all__ = ["TARGETS", "Export", "LayerExport", "export_config"]


class Target(NamedTuple):
    """How a library reads a configuration: layer by layer, and as a whole from the forms of layers."""

    layer: Callable[[LayerChoice, Node], Form]
    whole: Callable[[dict[str, Any]], Any]


TARGETS = {
    "torchao": Target(torchao.layer, torchao.whole),
    "quanto": Target(quanto.layer, quanto.whole),
    "modelopt": Target(modelopt.layer, modelopt.whole),
}


def export_config(config: QuantConfig, graph: LayerGraph, to: str) -> Export:
    """The configuration as ``to`` reads it: "torchao" (an ``FqnToConfig`` as
    ``torchao.core.config.config_to_dict`` writes it), "quanto" (a map of layers as
    ``optimum.quanto.quantization_map`` gives it) or "modelopt" (the ``config`` of ``mtq.quantize``).

    ``graph`` is the model's, for shapes and kinds of layers. Raises AquabitError for an unknown library,
    for layers not in the graph, and for a graph of several networks.
    """
    if to not in TARGETS:
        raise AquabitError(f"export to {to!r} is unknown; known: {', '.join(TARGETS)}")
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
    target = TARGETS[to]
    forms: dict[str, Any] = {}
    statement: dict[str, LayerExport] = {}
    tied = {place: first for place, first in graph.graph.get("tied", {}).items() if first in config.layers}
    nodes |= {place: nodes[first] for place, first in tied.items()}  # libraries go by name
    for name, choice in [*config.layers.items(), *((p, config[first]) for p, first in tied.items())]:
        form, words, lost = target.layer(choice, nodes[name])
        lost = [*weight_losses(choice.weight), *lost, *activation_losses(choice, nodes[name])]
        if form is None:
            statement[name] = LayerExport("full precision", "fp", tuple(lost))
            continue
        forms[name] = form
        statement[name] = LayerExport("nearest" if lost else "same", words, tuple(lost))
    return Export(to, target.whole(forms), statement, losses_of_all(config))

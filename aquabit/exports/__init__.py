"""A found configuration in the words of other libraries, with a statement of what each of them cannot
express.

What is exported are bits, groups and activations per layer; the library fits its own ranges to the dense
model (tried by benchmarks/exports.py). A recipe is one file with ``layer``, the form of one layer, and
``whole``, the configuration made of them; a new one is entered in ``RECIPES``. Programs whose files hold our
weights are entered in ``files.WRITERS``, one file each; what such files and folders of others hold is read by
``readers``. What a program can hold at all is said in ``aquabit.targets``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aquabit.exports import modelopt, quanto, torchao
from aquabit.exports.exported import check_layers
from aquabit.exports.files import WRITERS
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

__all__ = ["RECIPES", "WRITERS", "Export", "LayerExport", "check_known", "export_config", "with_weights"]


class Recipe(NamedTuple):
    """How a library reads a configuration: layer by layer, and as a whole from the forms of layers."""

    layer: Callable[[LayerChoice, Node], Form]
    whole: Callable[[dict[str, Any]], Any]


RECIPES = {
    "torchao": Recipe(torchao.layer, torchao.whole),
    "quanto": Recipe(quanto.layer, quanto.whole),
    "modelopt": Recipe(modelopt.layer, modelopt.whole),
}


def check_known(to: str) -> None:
    """Raise AquabitError for a target that gets neither a configuration nor files."""
    if to not in {*RECIPES, *WRITERS}:
        files = f"; with weights: {', '.join(WRITERS)}" if WRITERS else ""
        raise AquabitError(f"export to {to!r} is unknown; known: {', '.join(RECIPES)}{files}")


def with_weights(to: str, out: str | Path) -> bool:
    """Whether files with weights are asked for: a program that gets a configuration, too, gets that where
    the output's name ends in .json."""
    return to in WRITERS and (to not in RECIPES or Path(out).suffix != ".json")


def export_config(config: QuantConfig, graph: LayerGraph, to: str) -> Export:
    """The configuration as ``to`` reads it: "torchao" (an ``FqnToConfig`` as
    ``torchao.core.config.config_to_dict`` writes it), "quanto" (a map of layers as
    ``optimum.quanto.quantization_map`` gives it) or "modelopt" (the ``config`` of ``mtq.quantize``).

    ``graph`` is the model's, for shapes and kinds of layers. Raises AquabitError for an unknown library,
    for layers not in the graph, and for a graph of several networks.
    """
    check_known(to)
    if to not in RECIPES:
        raise AquabitError(f"{to} gets files with weights, not a configuration; use workflows.export_files")
    if "parts" in graph.graph:
        raise AquabitError(
            f"{to} configures one network, and {', '.join(graph.graph['parts'])} are quantized together; give"
            " one of exports.exported.each_network"
        )
    check_layers(config, graph)
    nodes = layers(graph)
    recipe = RECIPES[to]
    forms: dict[str, Any] = {}
    statement: dict[str, LayerExport] = {}
    tied = {place: first for place, first in graph.graph.get("tied", {}).items() if first in config.layers}
    nodes |= {place: nodes[first] for place, first in tied.items()}  # libraries go by name
    for name, choice in [*config.layers.items(), *((p, config[first]) for p, first in tied.items())]:
        form, words, lost, has_levels = recipe.layer(choice, nodes[name])
        lost = [*weight_losses(choice.weight, has_levels), *lost, *activation_losses(choice, nodes[name])]
        if form is None:
            statement[name] = LayerExport("full precision", "fp", tuple(lost))
            continue
        forms[name] = form
        statement[name] = LayerExport("nearest" if lost else "same", words, tuple(lost))
    return Export(to, recipe.whole(forms), statement, losses_of_all(config))

"""A denoiser as a graph of its layers, traced from the autograd graph of one call; operator-type tables."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import networkx as nx
import torch
from torch import nn

from aquabit._following import Call, follow, outline
from aquabit._operators import (
    attention_role,
    block_of,
    describe_inputs,
    described_inputs,
    example_inputs,
    family_of,
    known_class,
    module_config,
    operator_of,
)
from aquabit.jsonio import clear_errors
from aquabit.parts import Parts, prefixed
from aquabit.scheme import AquabitError

__all__ = [
    "LayerGraph",
    "codebook_names",
    "dense_macs",
    "described_inputs",
    "example_inputs",
    "family_of",
    "fixed_layers",
    "from_json",
    "graph_notes",
    "is_quantizable",
    "known_class",
    "layers",
    "meta_denoiser",
    "module_config",
    "outline",
    "places_of",
    "rebuilt",
    "repeated_names",
    "tied_places",
    "to_json",
    "trace",
]

LayerGraph: TypeAlias = nx.DiGraph
SCHEMA_VERSION = 1  # of the graph as JSON
_MATMUL = re.compile(r"(Addmm|Mm|Addmv|Mv|Bmm|Baddbmm|Linear|Convolution)Backward\d*$")
_ATTENTION = re.compile(r"(Bmm|Baddbmm|ScaledDotProduct\w+)Backward\d*$")
# what may stand between a concatenation and a layer without mixing channels of its two parts up
_CHANNELWISE = re.compile(
    r"(NativeGroupNorm|NativeBatchNorm|Silu|Gelu|Relu|Mul|Div|Add|Clone|ToCopy|NativeDropout|Upsample\w+|AvgPool2D)Backward\d*$"
)


@dataclass
class _Calls:
    """What the autograd graph says about one layer, over all of its calls."""

    outputs: int = 0  # elements
    step_invariant: bool = True
    split: int | None = None


@dataclass
class _Contraction:
    """The layer graph while it grows, and what each autograd node seen so far passes on."""

    graph: LayerGraph
    weight_names: dict[int, str]
    other_names: dict[int, str]  # of parameters that belong to no layer
    step_leaves: set[int]
    time_layers: set[str]
    calls: dict[str, _Calls] = field(default_factory=dict)  # in execution order
    products: dict[str, int] = field(default_factory=dict)  # multiply-adds with parameters of no layer
    sources: dict[Any, tuple[str, ...]] = field(default_factory=dict)  # nearest layers and merges upstream
    # the layer whose weight, perhaps transposed, this is
    weight: dict[Any, str | None] = field(default_factory=dict)
    other: dict[Any, str | None] = field(default_factory=dict)  # the same for parameters of no layer
    depends: dict[Any, bool] = field(default_factory=dict)  # on the noisy sample or the step


def trace(
    denoiser: nn.Module, example_inputs: Mapping[str, Any] | None = None, family: str | None = None
) -> LayerGraph:
    """The graph of a denoiser's Linear and Conv2d layers and of the merges between them.

    One forward runs on a copy without memory (meta device) of the very module, with its hooks and whatever
    layers were replaced in it; where that fails, as with sizes that depend on data, on the module itself. The
    given weights are not changed. Layer nodes bear the module's name and ``kind`` ("linear" or "conv"),
    ``operator``, ``block``, ``depth`` (place in execution order), ``shape`` and ``bias`` of the weight,
    ``groups``, ``tokens`` (rows or pixels of one sample, summed over calls), ``macs`` (multiply-adds for one
    sample in one call), ``step_invariant`` (its input depends neither on the noisy sample nor on the step),
    ``split`` (channels of the first part where a concatenated skip feeds a convolution, else None) and
    ``attention`` ("q", "k", "v" or None). Merge nodes have ``kind`` "merge" and ``op`` ("add", "mul", "cat",
    "attention", ...). The graph has ``family``, ``model_class``, ``config``, ``weights`` (elements of all
    layer weights) and ``other_elements`` (of everything else in the state dict). Inputs are keyword
    arguments; they are made from the config where not given, and described in the graph (``inputs``) where
    they were and the class does not tell them. The graph of ``Parts`` (then inputs are those of each part)
    holds theirs one after the other, a call of the whole being one of each; it names its ``parts``.

    Where there are such, the graph also names ``uncalled`` layers, whose weight is read but which are never
    called (the pooler of Hunyuan-DiT gives them to torch's attention): they cannot run from codes; ``unread``
    ones, on which the output does not depend (they come last, with no ``tokens`` and ``macs``); ``tied``, the
    places that use another layer's weight, with that layer's name; ``dense``, the other parameters that enter
    products (of Conv1d, Conv3d, transposed convolutions, layers with a forward or a weight of their own
    making, bare matrix products), with ``kind``, ``shape`` and ``macs``; and ``other_bytes``, what the other
    elements take where some are not stored at 16 bits.

    Raises AquabitError where inputs cannot be made, the forward fails, nothing of the output can be followed
    to a layer, a layer runs in inference mode, or layers carry adapters (LoRA) that are not fused.
    """
    if isinstance(denoiser, Parts):
        given = example_inputs or {}
        return _joined({name: trace(part, given.get(name)) for name, part in denoiser.named_children()})
    _refuse_adapters(denoiser)
    model_class = type(denoiser).__name__
    family = family_of(type(denoiser), family)
    inputs = _example_inputs(denoiser) if example_inputs is None else dict(example_inputs)
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
        call = follow(denoiser, inputs, _watched)
        grown = _contracted(call, family)
    places = places_of(call.model)
    modules = {name: found[0][1] for name, found in places.items()}
    _check_followed(model_class, modules, grown, call)
    _join_attention(grown.graph)
    unread = [name for name in modules if name not in grown.calls]
    for depth, name in enumerate([*grown.calls, *unread]):
        calls = grown.calls.get(name, _Calls(step_invariant=False))
        grown.graph.add_node(
            name, **_attributes(name, modules[name], operator_of(name, family), calls, depth, call.batch)
        )
    graph = _finished(grown.graph, call.model, model_class, family, places)
    found = {
        "uncalled": [n for n in modules if n in grown.calls and n not in call.called],
        "unread": unread,
        "tied": {place: name for name, row in places.items() for place, _ in row[1:]},
        "dense": _dense(call.model, grown.products, call.batch),
    }
    graph.graph.update({key: value for key, value in found.items() if value})
    if example_inputs is not None and not known_class(type(denoiser)):
        graph.graph["inputs"] = describe_inputs(example_inputs)
    return graph


def _joined(graphs: Mapping[str, LayerGraph]) -> LayerGraph:
    """The graphs of several networks as one."""
    every, depth = nx.DiGraph(), 0
    for part, graph in graphs.items():
        for name, node in graph.nodes(data=True):
            own = dict(node)
            if "depth" in node:
                own |= {"depth": depth + node["depth"], "block": prefixed(part, node["block"])}
            every.add_node(prefixed(part, name), **own)
        every.add_edges_from((prefixed(part, a), prefixed(part, b)) for a, b in graph.edges)
        depth += len(layers(graph))
    about = {part: graph.graph for part, graph in graphs.items()}
    named = {
        "uncalled": [prefixed(p, name) for p, own in about.items() for name in own.get("uncalled", ())],
        "unread": [prefixed(p, name) for p, own in about.items() for name in own.get("unread", ())],
        "tied": {
            prefixed(p, place): prefixed(p, name)
            for p, own in about.items()
            for place, name in own.get("tied", {}).items()
        },
        "dense": {
            prefixed(p, name): row for p, own in about.items() for name, row in own.get("dense", {}).items()
        },
        "inputs": {p: own["inputs"] for p, own in about.items() if "inputs" in own},
    }
    elements = sum(own["other_elements"] for own in about.values())
    taken = sum(own.get("other_bytes", 2 * own["other_elements"]) for own in about.values())
    every.graph.update(
        family="+".join(dict.fromkeys(own["family"] for own in about.values())),
        model_class="+".join(own["model_class"] for own in about.values()),
        config={p: own["config"] for p, own in about.items()},
        parts=list(graphs),
        weights=sum(own["weights"] for own in about.values()),
        other_elements=elements,
        **({} if taken == 2 * elements else {"other_bytes": taken}),
        **{key: value for key, value in named.items() if value},
    )
    return every


def _contracted(call: Call, family: str) -> _Contraction:
    """Everything behind the outputs of a call, read node by node."""
    places = places_of(call.model)
    weights = {id(row[0][1].weight): name for name, row in places.items()}
    contraction = _Contraction(
        graph=nx.DiGraph(),
        weight_names=weights,
        other_names={
            id(p): name for name, p in call.model.named_parameters() if p.ndim > 1 and id(p) not in weights
        },
        step_leaves={id(value) for value in call.steps if value.requires_grad},
        time_layers={name for name in places if operator_of(name, family) == "time_embed"},
    )
    for node in _execution_order(call.outputs):
        _contract(contraction, node)
    return contraction


def _check_followed(
    model_class: str, modules: Mapping[str, nn.Module], grown: _Contraction, call: Call
) -> None:
    if modules and not grown.calls:
        raise AquabitError(
            f"the output of {model_class} cannot be followed to any of its {len(modules)} layers; its forward"
            " must compute with torch operations on its own weights, and return tensors"
        )
    if not modules and grown.products:
        raise AquabitError(
            f"none of the {len(grown.products)} weights that {model_class} multiplies with is that of a plain"
            f" Linear or Conv2d, as {next(iter(grown.products))!r}: their forward or weight was replaced, as"
            " by layerwise casting, group offloading or another quantization; take that off first"
        )
    hidden = [name for name in modules if name in call.ungraded and name not in grown.calls]
    if hidden:
        raise AquabitError(
            f"{len(hidden)} of {len(modules)} layers of {model_class} cannot be followed, as their outputs"
            f" have no autograd graph (torch.inference_mode?): {', '.join(hidden)}"
        )


def _refuse_adapters(denoiser: nn.Module) -> None:
    """peft's layers hold the ``base_layer`` that they wrap, those of diffusers a ``lora_layer``."""
    found = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(getattr(module, "base_layer", None) or getattr(module, "lora_layer", None), nn.Module)
    ]
    if found:
        raise AquabitError(
            f"{len(found)} layers of {type(denoiser).__name__} carry adapters, as {found[0]!r}: fuse a LoRA"
            " first, with pipe.fuse_lora() and then pipe.unload_lora_weights(), or leave it out and give"
            " --lora FILE[:SCALE]"
        )


_example_inputs = example_inputs  # the parameter of trace has the same name


def layers(graph: LayerGraph) -> dict[str, dict[str, Any]]:
    """Name -> attributes of the layer nodes, in execution order."""
    found = ((name, data) for name, data in graph.nodes(data=True) if data["kind"] != "merge")
    return dict(sorted(found, key=lambda item: int(item[1]["depth"])))


def fixed_layers(graph: LayerGraph) -> dict[str, str]:
    """The layers that must stay in full precision, and why."""
    uncalled = "the model reads its weight but never calls it"
    unread = "nothing that the model returns depends on it"
    return {
        **dict.fromkeys(graph.graph.get("uncalled", ()), uncalled),
        **dict.fromkeys(graph.graph.get("unread", ()), unread),
    }


def dense_macs(graph: LayerGraph) -> int:
    """Multiply-adds of one sample in one call with weights of no layer, which stay dense."""
    return sum(int(row["macs"]) for row in graph.graph.get("dense", {}).values())


def graph_notes(graph: LayerGraph) -> list[str]:
    """What is to be said of a model whose layers cannot all be quantized, or share weights; each one
    sentence, with the first names."""
    reasons: dict[str, list[str]] = {}
    for name, why in fixed_layers(graph).items():
        reasons.setdefault(why, []).append(name)
    notes = [f"{len(names)} layers stay fp ({why}): {_first(names)}" for why, names in reasons.items()]
    dense = graph.graph.get("dense", {})
    if dense:
        kinds = [f"{name} ({row['kind']})" for name, row in dense.items()]
        every = dense_macs(graph) + sum(node["macs"] for node in layers(graph).values())
        notes.append(
            f"{len(dense)} other weights stay dense, {dense_macs(graph):,} of {every:,} multiply-adds:"
            f" {_first(kinds)}"
        )
    tied = [f"{place} with {name}" for place, name in graph.graph.get("tied", {}).items()]
    return [*notes, f"{len(tied)} layers share a weight, stored once: {_first(tied)}"] if tied else notes


def _first(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def tied_places(graph: LayerGraph) -> dict[str, list[str]]:
    """Layer -> the other places in the model that use its weight; only layers that have such."""
    found: dict[str, list[str]] = {}
    for place, name in graph.graph.get("tied", {}).items():
        found.setdefault(name, []).append(place)
    return found


def codebook_names(graph: LayerGraph) -> dict[str, str]:
    """Layer -> the name of the codebooks it may share: its operator type and weight shape, and its part
    where there are several; only layers that share them with another."""
    found: dict[str, list[str]] = {}
    for name, node in layers(graph).items():
        part = f"{name.partition('.')[0]} " if "parts" in graph.graph else ""
        found.setdefault(f"{part}{node['operator']} {'x'.join(map(str, node['shape']))}", []).append(name)
    return {layer: name for name, members in found.items() if len(members) > 1 for layer in members}


def meta_denoiser(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """The diffusers model ``class_name`` built from ``config`` on the meta device; raises AquabitError
    where it cannot be."""
    diffusers: Any = importlib.import_module("diffusers")
    public = class_name.isidentifier() and not class_name.startswith("_")
    found = getattr(diffusers, class_name, None) if public else None
    kinds = (diffusers.ModelMixin, diffusers.ConfigMixin)
    if not isinstance(found, type) or not all(issubclass(found, kind) for kind in kinds):
        raise AquabitError(f"{class_name!r} is not a model of diffusers {diffusers.__version__}")
    return _from_config(found, config)


def rebuilt(denoiser: nn.Module) -> nn.Module | None:
    """A denoiser as its class builds it from its config, on the meta device; None where it cannot be built
    so. Raises AquabitError where building fails."""
    config = getattr(denoiser, "config", None)
    return _from_config(type(denoiser), config) if config and hasattr(denoiser, "from_config") else None


def _from_config(model_class: Any, config: Mapping[str, Any]) -> nn.Module:
    # diffusers lists positional arguments of a model among those left at their defaults, and would build it
    # with the class's own sizes in place of them
    config = {k: v for k, v in config.items() if k != "_use_default_values"}
    try:
        with torch.device("meta"):
            model: nn.Module = model_class.from_config(config)
    except Exception as error:  # diffusers checks little: any exception of its constructors
        raise AquabitError(f"cannot build {model_class.__name__} from its config: {error}") from error
    return model


Places: TypeAlias = dict[str, list[tuple[str, Any]]]


def places_of(model: nn.Module) -> Places:
    """Every quantizable layer by name: the places that its weight has in the model, with the modules there;
    the first gives the name.

    Quantizable are Linear and Conv2d of more than one weight that compute what torch's own classes do, with
    a weight that is a parameter of their own. Layers may share a weight; one that something else uses too is
    not quantizable.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    found: Places = {}
    for name, module in model.named_modules():
        if is_quantizable(module):
            row = owners[id(module.weight)]
            if row[0][1] is module and all(_alike(module, other) for _, other in row):
                found[name] = row
    return found


def is_quantizable(module: Any) -> bool:
    """Whether a module is a Linear or Conv2d that computes what torch's own class does, with a weight that is
    a parameter of its own."""
    kind = next((k for k in (nn.Linear, nn.Conv2d) if isinstance(module, k)), None)
    if kind is None or type(module).forward is not kind.forward:
        return False
    # accelerate replaces the forward of what it moves between devices by one that does the same
    own = "forward" in vars(module) and "_hf_hook" not in vars(module)
    weight = module._parameters.get("weight")  # a parametrized one is made anew in every call
    if own or weight is None or weight.numel() < 2 or not weight.is_floating_point():
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    return module.padding_mode == "zeros" and type(module)._conv_forward is nn.Conv2d._conv_forward


def _alike(first: Any, other: nn.Module) -> bool:
    """Whether two layers with one weight can run from the same codes."""
    geometry = ("stride", "padding", "dilation", "groups")
    same = all(getattr(first, k, None) == getattr(other, k, None) for k in geometry)
    return is_quantizable(other) and same


def _watched(model: nn.Module) -> dict[str, list[nn.Module]]:
    return {
        name: list({id(module): module for _, module in row}.values())
        for name, row in places_of(model).items()
    }


def repeated_names(model: nn.Module) -> set[str]:
    """The names in a model's state dict that stand for a tensor of a module which has another name before:
    stored once, they come back with that. A layer that stands in the place of another (``plain_layer``) has
    that one's names."""
    seen, found = set[int](), set[str]()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            plain = hasattr(module, "plain_layer")
            keys = ("weight", "bias") if plain else (*module._parameters, *module._buffers)
            found |= {f"{name}.{key}" for key in keys}
        seen.add(id(module))
    return found & set(model.state_dict())


def _execution_order(outputs: list[torch.Tensor]) -> list[Any]:
    """All autograd nodes behind the outputs: leaves first, then in the order the forward made them, which
    is topological."""
    pending = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    found: dict[Any, int] = {}
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = -1 if hasattr(node, "variable") else node._sequence_nr()
            pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    return sorted(found, key=found.__getitem__)


def _contract(state: _Contraction, node: Any) -> None:
    """Read one autograd node: a leaf, part of a weight's path, a layer's call, a merge, or something to
    pass through."""
    state.weight[node], state.other[node], state.sources[node] = None, None, ()
    if hasattr(node, "variable"):
        state.weight[node] = state.weight_names.get(id(node.variable))
        state.other[node] = state.other_names.get(id(node.variable))
        state.depends[node] = id(node.variable) in state.step_leaves
        return
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    origin = tuple(dict.fromkeys(source for parent in parents for source in state.sources[parent]))
    weight = next((name for parent in parents if (name := state.weight[parent])), None)
    others = [state.other[parent] for parent in parents]
    product = bool(_MATMUL.match(node.name()))
    state.depends[node] = any(state.depends[parent] for parent in parents)
    if product and weight is None and any(others):
        name = next(name for name in others if name)
        state.products[name] = state.products.get(name, 0) + _multiply_adds(state, node)
    if all(others) and not (product and len(parents) < len(node.next_functions)):
        state.other[node] = next(iter(others), None)  # made of such parameters alone
    if weight is not None and not product:
        state.weight[node] = weight
    elif weight is not None:
        _add_call(state, node, weight)
        state.graph.add_edges_from((source, weight) for source in origin)
        state.sources[node] = (weight,)
    elif len(origin) > 1:
        own = re.sub(r"Backward\d*$", "", node.name()).lower()
        op = "attention" if _ATTENTION.match(node.name()) else own
        merge = f"{op}#{len(state.graph)}"
        state.graph.add_node(merge, kind="merge", op=op)
        state.graph.add_edges_from((source, merge) for source in origin)
        state.sources[node] = (merge,)
    else:
        state.sources[node] = origin


def _multiply_adds(state: _Contraction, node: Any) -> int:
    """Of a product with a parameter of no layer: elements of the output, or of the input that a transposed
    convolution spreads, times the products of each."""
    place = next(i for i, (parent, _) in enumerate(node.next_functions) if parent and state.other[parent])
    weight, outputs = _shape_of(*node.next_functions[place]), prod(node._input_metadata[0].shape)
    if node.name().startswith("Convolution"):
        return prod(weight[1:]) * (node._saved_input.numel() if node._saved_transposed else outputs)
    right = place == len(node.next_functions) - 1 and not node.name().startswith("Linear")
    return outputs * weight[-2 if right and len(weight) > 1 else -1]


def _shape_of(node: Any, output: int) -> tuple[int, ...]:
    """Of what an autograd node passes on."""
    if hasattr(node, "variable"):
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[output].shape)


def _add_call(state: _Contraction, node: Any, name: str) -> None:
    state.graph.add_node(name)
    state.depends[node] |= name in state.time_layers
    calls = state.calls.setdefault(name, _Calls())
    calls.outputs += int(torch.Size(node._input_metadata[0].shape).numel())
    calls.step_invariant &= not state.depends[node]
    data = [parent for parent in _data_parents(node) if state.weight[parent] is None]
    if len(data) == 1 and node.name().startswith("Convolution"):
        calls.split = _concatenated(data[0])


def _data_parents(node: Any) -> list[Any]:
    """The autograd nodes that made this one's inputs, parameters and other leaves left out."""
    parents = (parent for parent, _ in node.next_functions)
    return [parent for parent in parents if parent is not None and not hasattr(parent, "variable")]


def _concatenated(node: Any) -> int | None:
    """Channels of the first part if ``node`` holds two feature maps side by side, seen through
    channel-wise operations."""
    while not node.name().startswith("CatBackward"):
        parents = _data_parents(node)
        if len(parents) != 1 or not _CHANNELWISE.match(node.name()):
            return None
        node = parents[0]
    first, output = node.next_functions[0]
    return int(first._input_metadata[output].shape[1]) if node._saved_dim == 1 and first is not None else None


def _join_attention(graph: LayerGraph) -> None:
    """One node per attention: without a fused kernel, scores and weighted values are two products in a
    row."""
    for name in [name for name, data in graph.nodes(data=True) if data.get("op") == "attention"]:
        after = list(graph.successors(name))
        if len(after) == 1 and graph.nodes[after[0]].get("op") == "attention":
            graph.add_edges_from((before, after[0]) for before in list(graph.predecessors(name)))
            graph.remove_node(name)


def _attributes(
    name: str, module: nn.Linear | nn.Conv2d, operator: str, calls: _Calls, depth: int, batch: int
) -> dict[str, Any]:
    shape = tuple(module.weight.shape)
    tokens = round(calls.outputs / shape[0] / batch)
    return {
        "kind": "conv" if isinstance(module, nn.Conv2d) else "linear",
        "operator": operator,
        "block": block_of(name, operator),
        "depth": depth,
        "shape": shape,
        "bias": module.bias is not None,
        "groups": getattr(module, "groups", 1),
        "tokens": tokens,
        "macs": tokens * module.weight.numel(),
        "step_invariant": calls.step_invariant,
        "split": calls.split,
        "attention": attention_role(operator),
    }


def _dense(model: nn.Module, products: Mapping[str, int], batch: int) -> dict[str, dict[str, Any]]:
    """Parameters of no layer that entered products, by name."""
    found = {}
    for name, macs in products.items():
        owner, _, _ = name.rpartition(".")
        kind = type(model.get_submodule(owner.split(".parametrizations")[0])).__name__
        shape = list(model.get_parameter(name).shape)
        found[name] = {"kind": kind, "shape": shape, "macs": round(macs / batch)}
    return found


def _finished(
    grown: LayerGraph, model: nn.Module, model_class: str, family: str, places: Places
) -> LayerGraph:
    """The graph with its own attributes; edges in the order of their sources, as reading it from JSON
    would give."""
    config = module_config(model)
    weights = sum(row[0][1].weight.numel() for row in places.values())
    stored = {f"{place}.weight" for row in places.values() for place, _ in row} | repeated_names(model)
    others = [t for name, t in model.state_dict().items() if name not in stored]
    elements = sum(t.numel() for t in others)
    taken = sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in others)
    graph = nx.DiGraph(
        family=family,
        model_class=model_class,
        config=json.loads(json.dumps(config, default=str)),
        weights=weights,
        other_elements=elements,
        **({} if taken == 2 * elements else {"other_bytes": taken}),
    )
    graph.add_nodes_from(grown.nodes(data=True))
    graph.add_edges_from(grown.edges)
    return graph


def to_json(graph: LayerGraph) -> dict[str, Any]:
    """The graph as a JSON value (networkx node-link form with a schema version); ``from_json`` gives the
    equal graph back."""
    value = {"schema": SCHEMA_VERSION, **nx.node_link_data(graph, edges="edges")}
    return dict(json.loads(json.dumps(value, allow_nan=False)))


def from_json(value: Any, source: str = "graph") -> LayerGraph:
    """The graph that ``to_json`` wrote; raises AquabitError with the place and the value that is wrong."""
    with clear_errors(f"{source} is not a layer graph"):
        _graph_file().model_validate(value)
    names = {node["id"] for node in value["nodes"]}
    if len(names) != len(value["nodes"]):
        raise AquabitError(f"{source} is not a layer graph: a node is there twice")
    ends = (edge[end] for edge in value["edges"] for end in ("source", "target"))
    unknown = [name for name in ends if name not in names]
    if unknown:
        raise AquabitError(f"{source} is not a layer graph: edge to unknown node {unknown[0]!r}")
    graph: LayerGraph = nx.node_link_graph({k: v for k, v in value.items() if k != "schema"}, edges="edges")
    for _, data in graph.nodes(data=True):
        if "shape" in data:
            data["shape"] = tuple(data["shape"])
    return graph


def _graph_file() -> Any:
    from typing import Annotated, Literal

    # slow to import: only where a file is read
    from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

    class Layer(Strict):
        id: str
        kind: Literal["linear", "conv"]
        operator: str
        block: str
        depth: NonNegativeInt
        shape: Annotated[list[PositiveInt], Field(min_length=2, max_length=4)]
        bias: bool
        groups: PositiveInt
        tokens: NonNegativeInt
        macs: NonNegativeInt
        step_invariant: bool
        split: PositiveInt | None
        attention: Literal["q", "k", "v"] | None

    class Merge(Strict):
        id: str
        kind: Literal["merge"]
        op: str

    class Edge(Strict):
        source: str
        target: str

    class Dense(Strict):
        kind: str
        shape: list[PositiveInt]
        macs: NonNegativeInt

    class Attributes(Strict):
        family: str
        model_class: str
        config: dict[str, Any]
        parts: list[str] = Field(default_factory=list)
        weights: NonNegativeInt
        other_elements: NonNegativeInt
        inputs: dict[str, Any] = Field(default_factory=dict)
        uncalled: list[str] = Field(default_factory=list)
        unread: list[str] = Field(default_factory=list)
        tied: dict[str, str] = Field(default_factory=dict)
        dense: dict[str, Dense] = Field(default_factory=dict)
        other_bytes: NonNegativeInt = 0

    class GraphFile(Strict):
        version: Literal[1] = Field(alias="schema")
        directed: Literal[True]
        multigraph: Literal[False]
        graph: Attributes
        nodes: list[Annotated[Layer | Merge, Field(discriminator="kind")]]
        edges: list[Edge]

    return GraphFile

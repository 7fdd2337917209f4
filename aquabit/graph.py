"""A denoiser as a graph of its layers, traced from the autograd graph on the meta device; operator-type
tables."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import networkx as nx
import torch
from torch import nn

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
from aquabit.scheme import AquabitError

__all__ = [
    "LayerGraph",
    "codebook_names",
    "described_inputs",
    "example_inputs",
    "family_of",
    "from_json",
    "known_class",
    "layers",
    "meta_denoiser",
    "module_config",
    "to_json",
    "trace",
]

LayerGraph: TypeAlias = nx.DiGraph
# what changes from one denoising step to the next
STEP_INPUTS = ("sample", "hidden_states", "x", "timestep", "timesteps", "t")
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
    step_leaves: set[int]
    time_layers: set[str]
    calls: dict[str, _Calls] = field(default_factory=dict)  # in execution order
    sources: dict[Any, tuple[str, ...]] = field(default_factory=dict)  # nearest layers and merges upstream
    # the layer whose weight, perhaps transposed, this is
    weight: dict[Any, str | None] = field(default_factory=dict)
    depends: dict[Any, bool] = field(default_factory=dict)  # on the noisy sample or the step


def trace(
    denoiser: nn.Module, example_inputs: Mapping[str, Any] | None = None, family: str | None = None
) -> LayerGraph:
    """The graph of a denoiser's Linear and Conv2d layers and of the merges between them.

    One forward runs on a copy without memory (meta device); the given weights are neither read nor changed.
    Layer nodes bear the module's name and ``kind`` ("linear" or "conv"), ``operator``, ``block``, ``depth``
    (place in execution order), ``shape`` and ``bias`` of the weight, ``groups``, ``tokens`` (rows or pixels
    of one sample, summed over calls), ``macs`` (multiply-adds for one sample in one call), ``step_invariant``
    (its input depends neither on the noisy sample nor on the step), ``split`` (channels of the first part
    where a concatenated skip feeds a convolution, else None) and ``attention`` ("q", "k", "v" or None). Merge
    nodes have ``kind`` "merge" and ``op`` ("add", "mul", "cat", "attention", ...). The graph has ``family``,
    ``model_class``, ``config``, ``weights`` (elements of all layer weights) and ``other_elements`` (of
    everything else in the state dict). Inputs are keyword arguments; they are made from the config where not
    given, and described in the graph (``inputs``) where they were and the class does not tell them.
    ``uncalled`` names layers whose weight is read but which are never called (the pooler of Hunyuan-DiT gives
    them to torch's attention): they cannot run from codes.

    Raises AquabitError where inputs cannot be made, the forward fails, or a layer is not reached from the
    output.
    """
    model_class = type(denoiser).__name__
    family = family_of(type(denoiser), family)
    inputs = _example_inputs(denoiser) if example_inputs is None else dict(example_inputs)
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
        model = _meta_copy(denoiser)
        inputs, batch = _on_meta(inputs)
        modules, called = _quantizable(model), set[str]()
        for name, module in modules.items():  # of a copy: the hooks go with it
            module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
        outputs = _forward(model, inputs)
    operators = {name: operator_of(name, family) for name in modules}
    tensors = (value for value in inputs.values() if isinstance(value, torch.Tensor))
    contraction = _Contraction(
        graph=nx.DiGraph(),
        weight_names={id(module.weight): name for name, module in modules.items()},
        step_leaves={id(value) for value in tensors if value.requires_grad},
        time_layers={name for name, operator in operators.items() if operator == "time_embed"},
    )
    for node in _execution_order(outputs):
        _contract(contraction, node)
    unreached = [name for name in modules if name not in contraction.calls]
    if unreached:
        raise AquabitError(
            f"{len(unreached)} of {len(modules)} layers of {model_class} do not reach its output:"
            f" {', '.join(unreached)}"
        )
    _join_attention(contraction.graph)
    for depth, (name, calls) in enumerate(contraction.calls.items()):
        own = _attributes(name, modules[name], operators[name], calls, depth, batch)
        contraction.graph.add_node(name, **own)
    weights = sum(module.weight.numel() for module in modules.values())
    graph = _finished(contraction.graph, model, model_class, family, weights)
    if len(called) < len(modules):
        graph.graph["uncalled"] = [name for name in modules if name not in called]
    if example_inputs is not None and not known_class(type(denoiser)):
        graph.graph["inputs"] = describe_inputs(example_inputs)
    return graph


_example_inputs = example_inputs  # the parameter of trace has the same name


def layers(graph: LayerGraph) -> dict[str, dict[str, Any]]:
    """Name -> attributes of the layer nodes, in execution order."""
    found = ((name, data) for name, data in graph.nodes(data=True) if data["kind"] != "merge")
    return dict(sorted(found, key=lambda item: int(item[1]["depth"])))


def codebook_names(graph: LayerGraph) -> dict[str, str]:
    """Layer -> the name of the codebooks it may share: its operator type and weight shape; only layers
    that share them with another."""
    found: dict[str, list[str]] = {}
    for name, node in layers(graph).items():
        found.setdefault(f"{node['operator']} {'x'.join(map(str, node['shape']))}", []).append(name)
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


def _meta_copy(denoiser: nn.Module) -> nn.Module:
    """The same architecture on the meta device, in evaluation mode, every floating-point parameter
    requiring gradients."""
    if hasattr(denoiser, "config") and hasattr(denoiser, "from_config"):
        config: Any = denoiser.config
        model = _from_config(type(denoiser), config)
    else:  # a deep copy that shares and allocates nothing: its tensors are replaced before they are copied
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in denoiser.parameters()
        }
        memo |= {id(b): torch.empty_like(b, device="meta") for b in denoiser.buffers()}
        model = copy.deepcopy(denoiser, memo)
    if hasattr(model, "disable_gradient_checkpointing"):
        model.disable_gradient_checkpointing()  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.eval()


def _quantizable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every Linear and Conv2d of more than one weight; of layers that share one weight, the first."""
    found: dict[int, tuple[str, nn.Linear | nn.Conv2d]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.numel() > 1:
            found.setdefault(id(module.weight), (name, module))
    return dict(found.values())


def _on_meta(inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The inputs without their data, those that change with the step as leaves to be found again; and the
    batch size."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_like(value, device="meta", requires_grad=False)
        if isinstance(value, Mapping):
            return {k: moved(v) for k, v in value.items()}
        return type(value)(moved(v) for v in value) if type(value) in (list, tuple) else value

    moved_inputs = {name: moved(value) for name, value in inputs.items()}
    tensors = {name: value for name, value in moved_inputs.items() if isinstance(value, torch.Tensor)}
    marked = [name for name in STEP_INPUTS if name in tensors] or list(tensors)[:1]
    for name in marked:
        tensors[name].requires_grad_(tensors[name].is_floating_point())
    batches = [tensors[name].shape[0] for name in marked if tensors[name].ndim > 1]
    return moved_inputs, batches[0] if batches else 1


def _forward(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The output tensors of one call, with their autograd graph."""
    try:
        with torch.device("meta"):
            output = model(**inputs)
    except Exception as error:  # any exception of the model's own code
        raise AquabitError(
            f"{type(model).__name__} does not run on the example inputs ({', '.join(inputs)}): {error}"
        ) from error
    return list(_tensors(output))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


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
    state.weight[node], state.sources[node] = None, ()
    if hasattr(node, "variable"):
        state.weight[node] = state.weight_names.get(id(node.variable))
        state.depends[node] = id(node.variable) in state.step_leaves
        return
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    origin = tuple(dict.fromkeys(source for parent in parents for source in state.sources[parent]))
    weight = next((name for parent in parents if (name := state.weight[parent])), None)
    state.depends[node] = any(state.depends[parent] for parent in parents)
    if weight is not None and not _MATMUL.match(node.name()):
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


def _finished(grown: LayerGraph, model: nn.Module, model_class: str, family: str, weights: int) -> LayerGraph:
    """The graph with its own attributes; edges in the order of their sources, as reading it from JSON
    would give."""
    config = module_config(model)
    stored = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    graph = nx.DiGraph(
        family=family,
        model_class=model_class,
        config=json.loads(json.dumps(config, default=str)),
        weights=weights,
        other_elements=sum(stored.values()) - weights,
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

    class Attributes(Strict):
        family: str
        model_class: str
        config: dict[str, Any]
        weights: NonNegativeInt
        other_elements: NonNegativeInt
        inputs: dict[str, Any] = Field(default_factory=dict)
        uncalled: list[str] = Field(default_factory=list)

    class GraphFile(Strict):
        version: Literal[1] = Field(alias="schema")
        directed: Literal[True]
        multigraph: Literal[False]
        graph: Attributes
        nodes: list[Annotated[Layer | Merge, Field(discriminator="kind")]]
        edges: list[Edge]

    return GraphFile

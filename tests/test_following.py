"""The traced model is the one that runs: replaced, fused, hooked and wrapped layers, weights that are no
layer's, layers that share one or that nothing reads; against torch's FLOP counter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from aquabit import graph as g
from aquabit.pipelines import trace as trace_model
from aquabit.quant.model import QuantizedDenoiser
from aquabit.scheme import AquabitError
from tests.tiny_pipelines import tiny, unet, unet_alone

DIGITS = {"x": torch.rand(1, 5, 8)}


def all_macs(graph: g.LayerGraph) -> int:
    return g.dense_macs(graph) + sum(node["macs"] for node in g.layers(graph).values())


def counted(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Multiply-adds of all products of one call, but those of activations with each other."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    found = {op.__name__.split(".")[0]: n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(n for op, n in found.items() if "attention" not in op) // 2


class Mlp(nn.Module):
    """Two layers, the second of which may be anything."""

    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), second or nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


# ---- the live module


def test_a_replaced_layer_has_its_own_shape() -> None:
    pipe = tiny("dit")
    block = pipe.transformer.transformer_blocks[0]
    block.ff.net[0].proj, block.ff.net[2] = nn.Linear(16, 24), nn.Linear(24, 16)
    graph = trace_model(pipe)
    name = "transformer_blocks.0.ff.net"
    assert graph.nodes[f"{name}.0.proj"]["shape"] == (24, 16)
    assert graph.nodes[f"{name}.0.proj"]["macs"] == 24 * 16 * graph.nodes[f"{name}.0.proj"]["tokens"]
    assert graph.graph["weights"] == sum(m.weight.numel() for m in layers_in(pipe.transformer))


def layers_in(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def test_a_graph_of_another_model_is_refused_though_the_names_are_equal() -> None:
    pipe = tiny("dit")
    graph = trace_model(pipe)
    pipe.transformer.transformer_blocks[0].ff.net[2] = nn.Linear(24, 16)
    with pytest.raises(AquabitError, match=r"'transformer_blocks.0.ff.net.2' is a Linear of \[16, 24\]"):
        QuantizedDenoiser(pipe.transformer, graph)


def test_fused_projections_are_what_runs_and_the_separate_ones_are_unread() -> None:
    net = unet().eval()
    net.fuse_qkv_projections()
    graph = g.trace(net)
    fused = [n for n in g.layers(graph) if n.rpartition(".")[2] in ("to_qkv", "to_kv")]
    separate = {
        n for n in g.layers(graph) if n.rpartition(".")[2] in ("to_q", "to_k", "to_v") and "attn1" in n
    }
    assert fused and separate <= set(graph.graph["unread"]) == set(g.fixed_layers(graph))
    assert all(graph.nodes[n]["operator"].endswith((".qkv", ".kv")) for n in fused)
    assert all(graph.nodes[n]["macs"] == 0 for n in separate)
    inputs = {"sample": torch.rand(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.rand(1, 77, 16)}
    assert all_macs(graph) == counted(net, inputs)


def test_a_hook_that_brings_weights_of_its_own_is_followed() -> None:
    model, extra = Mlp(), nn.Linear(8, 8)
    model.second.register_forward_hook(lambda module, args, y: y + module.beside(args[0]))
    model.second.beside = extra
    graph = g.trace(model, DIGITS)
    assert set(g.layers(graph)) == {"first", "second", "second.beside"}


class Chosen(nn.Module):
    """How much of its input is used depends on the data, which the meta device does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)
        self.gradient_checkpointing = True

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        assert not self.gradient_checkpointing
        x = self.first(x)[:, : int(length.item())]
        return self.second(self.drop(x))


def test_where_sizes_depend_on_data_the_model_itself_runs_and_stays_as_it_was() -> None:
    model = Chosen().train()
    model.first.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    inputs = {"x": torch.rand(2, 5, 8), "length": torch.tensor(3.0)}
    with torch.inference_mode():
        graph = g.trace(model, inputs)
    assert {n: a["macs"] for n, a in g.layers(graph).items()} == {"first": 5 * 64, "second": 3 * 32}
    assert model.training and model.drop.training and model.gradient_checkpointing
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert not model._forward_hooks and not model.first._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(AquabitError, match=r"Chosen does not run on the example inputs.*meta"):
        g.trace(model.to("meta"), inputs)
    # what depends on whole numbers needs no real call
    without = g.trace(model.to("meta"), inputs | {"length": torch.tensor(3)})
    assert g.layers(without) == g.layers(graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_graph_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    model, step = unet_alone(), {"sample": torch.rand(1, 3, 8, 8), "timestep": torch.tensor([1.0])}
    expected = g.to_json(g.trace(model))
    assert g.to_json(g.trace(model.to(dtype))) == expected
    assert g.to_json(g.trace(model, {k: v.to(dtype) for k, v in step.items()})) == expected


class Cut(Mlp):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.third, self.how = nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        with self.how():
            y = self.first(x)
        return self.third(self.second(x).detach()) + y


def test_detach_and_no_grad_hide_nothing() -> None:
    graph = g.trace(Cut(torch.no_grad), DIGITS)
    assert list(g.layers(graph)) == ["first", "second", "third"] and "unread" not in graph.graph
    assert all_macs(graph) == 3 * 5 * 64


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    with pytest.raises(AquabitError, match=r"1 of 3 layers of Cut cannot be followed.*: first$"):
        g.trace(Cut(torch.inference_mode), DIGITS)

    class Hidden(Mlp):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(y=super().forward(x))

    with pytest.raises(AquabitError, match="the output of Hidden cannot be followed to any of its 2 layers"):
        g.trace(Hidden(), DIGITS)


def test_what_moves_or_checkpoints_changes_nothing_and_what_casts_is_refused() -> None:
    expected, net = g.to_json(g.trace(unet_alone())), unet_alone()
    net.enable_gradient_checkpointing()
    add_hook_to_module(net, CpuOffload("cpu"))
    for module in net.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    assert g.to_json(g.trace(net)) == expected
    net = unet_alone()
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(AquabitError, match=r"none of the 41 weights .* layerwise casting"):
        g.trace(net)


# ---- adapters


class Wrapped(nn.Module):
    """A LoRA by hand."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2, False), nn.Linear(2, linear.out_features, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


class Peft(nn.Module):
    """As peft's layers hold what they wrap."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_a_wrapper_by_hand_is_traced_as_it_runs() -> None:
    graph = g.trace(Mlp(Wrapped(nn.Linear(8, 8))), DIGITS)
    assert set(g.layers(graph)) == {"first", "second.linear", "second.down", "second.up"}
    assert all_macs(graph) == 5 * (64 + 64 + 16 + 16)


def test_adapters_of_peft_are_refused_with_what_to_do() -> None:
    pipe = tiny("sd")
    attention = pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_q = Peft(attention.to_q)
    said = r"^1 layers of UNet2DConditionModel carry adapters, as 'up_blocks.*attn1.to_q': fuse.*--lora FILE"
    with pytest.raises(AquabitError, match=said):
        trace_model(pipe)


# ---- layers that nothing reads


class Ends(Mlp):
    """As QwenImage's last block: what ``spare`` makes is thrown away; ``never`` is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.never = nn.Linear(8, 6), nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.spare(y)
        return self.second(y)


def test_layers_that_nothing_reads_come_last_and_cost_nothing_but_bytes() -> None:
    graph = g.trace(Ends(), DIGITS)
    assert list(g.layers(graph)) == ["first", "second", "spare", "never"]
    assert graph.graph["unread"] == ["spare", "never"]
    assert [a["macs"] for a in g.layers(graph).values()] == [320, 320, 0, 0]
    assert graph.graph["weights"] == 64 + 64 + 48 + 54
    assert g.from_json(g.to_json(graph)).graph == graph.graph
    assert g.graph_notes(graph) == [
        "2 layers stay fp (nothing that the model returns depends on it): spare, never"
    ]


# ---- weights of no layer


class Bare(nn.Module):
    """Products with parameters as they stand, in every form that torch has."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.first, self.matrix, self.product = nn.Linear(8, 8), nn.Parameter(torch.rand(shape)), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.first(x), self.matrix)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(2 * x, self.weight, self.bias)


class Normalized(nn.Module):
    """A convolution whose weight is made anew in every call (EDM2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        weight = weight * 0.1 / (1e-4 + torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True))
        return functional.conv2d(x, weight.to(x.dtype), padding=1)


class Lead(nn.Module):
    """A layer, and its output in the shape that another takes."""

    def __init__(self, then: nn.Module, *shape: int) -> None:
        super().__init__()
        self.first, self.then, self.shape = nn.Conv2d(2, 8, 1), then, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x).reshape(len(x), *self.shape))


def parametrized() -> nn.Module:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


SQUARE = (8, 4, 4)
MODELS: dict[str, tuple[nn.Module, dict[str, Any], set[str]]] = {
    "x @ P": (Bare(torch.matmul, 8, 3), DIGITS, {"matrix"}),
    "P @ x": (Bare(lambda x, p: p @ x, 3, 5), DIGITS, {"matrix"}),
    "x . p": (Bare(lambda x, p: x @ p[:, 0], 8, 2), DIGITS, {"matrix"}),
    "linear": (Bare(functional.linear, 3, 8), DIGITS, {"matrix"}),
    "a batch": (Bare(lambda x, p: torch.bmm(x.expand(4, -1, -1), p), 4, 8, 3), DIGITS, {"matrix"}),
    "einsum": (Bare(lambda x, p: torch.einsum("bnc,hcd->bhnd", x, p), 2, 8, 3), DIGITS, {"matrix"}),
    "conv1d": (Lead(nn.Conv1d(8, 6, 1), 8, 16), {"x": torch.rand(1, 2, 4, 4)}, {"then.weight"}),
    "conv1d, groups": (
        Lead(nn.Conv1d(8, 6, 3, groups=2), 8, 16),
        {"x": torch.rand(1, 2, 4, 4)},
        {"then.weight"},
    ),
    "conv3d": (
        Lead(nn.Conv3d(4, 6, (1, 2, 2), (1, 2, 2)), 4, 2, 4, 4),
        {"x": torch.rand(1, 2, 4, 4)},
        {"then.weight"},
    ),
    "transposed": (
        Lead(nn.ConvTranspose2d(8, 6, 3, 2), *SQUARE),
        {"x": torch.rand(1, 2, 4, 4)},
        {"then.weight"},
    ),
    "transposed, groups": (
        Lead(nn.ConvTranspose2d(8, 6, 3, 2, groups=2), *SQUARE),
        {"x": torch.rand(1, 2, 4, 4)},
        {"then.weight"},
    ),
    "transposed, 1d": (
        Lead(nn.ConvTranspose1d(8, 6, 4, 2), 8, 16),
        {"x": torch.rand(1, 2, 4, 4)},
        {"then.weight"},
    ),
    "circular": (
        Lead(nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), *SQUARE),
        {"x": torch.rand(1, 2, 4, 4)},
        {"then.weight"},
    ),
    "normalized": (Lead(Normalized(), *SQUARE), {"x": torch.rand(1, 2, 4, 4)}, {"then.weight"}),
    "a forward of its own": (Mlp(OwnForward(8, 6)), DIGITS, {"second.weight"}),
    "parametrized": (Mlp(parametrized()), DIGITS, {"second.parametrizations.weight.original"}),
    "weight_norm": (Mlp(weight_norm(nn.Linear(8, 6))), DIGITS, {"second.weight_v"}),
    "weight_norm, new": (
        Mlp(parametrizations.weight_norm(nn.Linear(8, 6))),
        DIGITS,
        {"second.parametrizations.weight.original1"},
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_other_weights_are_dense_and_their_products_counted_once(name: str) -> None:
    model, inputs, dense = MODELS[name]
    graph = g.trace(model, inputs)
    assert len(g.layers(graph)) == 1 and list(g.layers(graph)) == ["first"]
    found = set(graph.graph["dense"])
    assert found == dense or (name.startswith("weight_norm") and len(found) == 1)
    # torch's counter knows no groups of transposed convolutions, and no product with a vector
    by_hand = {"transposed, groups": 16 * 8 * (6 // 2) * 9, "x . p": 5 * 8}
    if name in by_hand:
        assert g.dense_macs(graph) == by_hand[name]
    else:
        assert all_macs(graph) == counted(model, inputs)
    three = g.trace(model, {"x": torch.cat([inputs["x"]] * 3)}) if name not in ("a batch",) else graph
    assert three.graph["dense"] == graph.graph["dense"], "for one sample, whatever the batch"
    assert g.from_json(g.to_json(graph)).graph == graph.graph
    state = sum(t.numel() for t in model.state_dict().values())
    assert graph.graph["weights"] + graph.graph["other_elements"] == state
    assert any("stay dense" in note for note in g.graph_notes(graph))


def test_torch_s_own_attention_is_counted_as_it_runs() -> None:
    class Attends(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y: Tensor = self.second(x, x, x, need_weights=False)[0]
            return y

    model = Attends(nn.MultiheadAttention(8, 2, batch_first=True))
    graph = g.trace(model, DIGITS)
    assert graph.graph["uncalled"] == ["second.out_proj"]
    assert set(graph.graph["dense"]) == {"second.in_proj_weight"}
    assert all_macs(graph) == 5 * (64 + 3 * 64 + 64)


# ---- one weight in two layers


class TiedMlp(nn.Module):
    """``b`` has the weight of ``a`` and a bias of its own, ``c`` is ``a``, ``table`` and ``head`` share one
    that no codes can serve."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight, self.c = self.a.weight, self.a
        self.table, self.head = nn.Embedding(6, 8), nn.Linear(8, 6)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x)) + self.table.weight[0]))


def test_layers_with_one_weight_are_one_layer() -> None:
    graph = g.trace(TiedMlp(), DIGITS)
    assert {n: a["macs"] for n, a in g.layers(graph).items()} == {"a": 3 * 5 * 64}
    assert graph.graph["tied"] == {"b": "a", "c": "a"}
    assert graph.graph["dense"]["table.weight"]["macs"] == 5 * 48
    assert all_macs(graph) == counted(TiedMlp(), DIGITS)

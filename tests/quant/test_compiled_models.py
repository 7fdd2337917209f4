"""Packed models under torch.compile: whole ones are one graph, blocks share a program, and outputs are those
of the eager model."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from copy import deepcopy
from itertools import cycle
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._dynamo.utils import counters

from aquabit import quantize_weight
from aquabit.graph import example_inputs, trace
from aquabit.kernels import compiled
from aquabit.kernels.direct import Direct
from aquabit.kernels.dispatch import using
from aquabit.kernels.extension import native
from aquabit.quant.attention import patch_attention_
from aquabit.quant.layers import Tied, quant_layer, replace_layer_
from aquabit.scheme import Scheme
from tests import tiny_pipelines as tiny

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")


def dit(blocks: int = 2) -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=blocks,
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )


ONE_BLOCK = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
MODELS: dict[str, Callable[[], Any]] = {
    "SD": lambda: tiny.unet(**ONE_BLOCK),
    "SDXL": lambda: tiny.sdxl().unet,
    "DiT": dit,
    "U-Net": tiny.unet_alone,
}


def packed(net: nn.Module, *schemes: str) -> Any:
    """A model with every layer packed, by ``schemes`` in turn, and all activations rounded to 8 bits: inputs,
    Q, K, V and softmax."""
    nodes = [(name, node) for name, node in trace(net).nodes(data=True) if node["kind"] != "merge"]
    for (name, node), scheme in zip(nodes, cycle(schemes or ("usq4",))):
        layer = packed_layer(replace_layer_(net, name, node.get("split")), scheme)
        layer.act_output = 8 if node.get("attention") else 16
    patch_attention_(net)
    return net.eval().requires_grad_(False)


def packed_layer(layer: Any, scheme: str = "usq4") -> Any:
    layer.set_packed_(quantize_weight(layer.weight, scheme), Scheme.parse(scheme))
    layer.act = 8
    layer.shrink_()  # its bias, as in an artifact
    return layer


def inputs(net: Any, batch: int, timestep: int = 3) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(batch)

    def drawn(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: drawn(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        shape = (batch, *value.shape[1:]) if value.ndim else ()
        if value.is_floating_point():
            return torch.randn(shape, generator=rng)
        return torch.full(shape, timestep, dtype=value.dtype)

    return {k: drawn(v) for k, v in example_inputs(net).items()}


@pytest.fixture
def graphs() -> Any:
    """How many graphs were made since the test began."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), using({}):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def gap(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


# ---- graphs


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_are_one_graph_of_any_batch_and_step(name: str, graphs: Callable[[], int]) -> None:
    torch.manual_seed(0)
    net = packed(MODELS[name]())
    made = torch.compile(net, fullgraph=True, backend="eager")
    for batch, timestep, known in ((2, 3, 1), (2, 7, 1), (3, 7, 2), (5, 1, 2), (2, 9, 2)):
        given = inputs(net, batch, timestep)
        assert gap(made(**given).sample, net(**given).sample) < 1e-5
        assert graphs() <= known, f"{batch=}, {timestep=}"
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_of_a_model_share_their_programs(backend: str, graphs: Callable[[], int]) -> None:
    found = []
    for blocks in (3, 10):  # torch compiles one function 8 times at most
        torch._dynamo.reset()
        net = packed(dit(blocks), "usq4", "usq3", "vq3", "aq2x4g8", "usq2")
        given = inputs(net, 2)
        expected, before = net(**given).sample, graphs()
        net._repeated_blocks = ["BasicTransformerBlock"]
        net.compile_repeated_blocks(backend=backend, fullgraph=True)
        assert gap(net(**given).sample, expected) < 1e-5
        found.append(graphs() - before)
    assert found[0] == found[1] <= 2, "the first block's input lies in memory otherwise than those after it"


def test_inductor_computes_the_same(graphs: Callable[[], int]) -> None:
    torch.manual_seed(0)
    attention = Attention(32, heads=2, dim_head=16)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        packed_layer(replace_layer_(attention, part, None)).act_output = 8
    patch_attention_(attention)
    made, x = torch.compile(attention, fullgraph=True), torch.randn(2, 7, 32)
    expected = attention(x)
    assert gap(made(x), expected) < 1e-4 and graphs() == 1
    attention.to_v.act = 16
    assert gap(attention(x), expected) > 1e-4, "rounding was in it"


# ---- prepared calls


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls that were prepared by compiled code."""
    made: list[object] = []
    monkeypatch.setattr(compiled, "Direct", lambda *a: made.append(a[1]) or Direct(*a))
    return made


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scheme", ["usq4", "vq3", "aq2x4g8"])
def test_calls_are_prepared_once(
    kind: str, scheme: str, graphs: Callable[[], int], prepared: list[object]
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(32, 24) if kind == "linear" else nn.Conv2d(8, 24, 3, padding=1)
    layer = packed_layer(quant_layer(plain), scheme)
    made = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for many in (3, 3, 4, 5):
        x = torch.randn(many, 32) if kind == "linear" else torch.randn(many, 8, 7, 6)
        assert torch.equal(made(x), layer(x))
    assert layer.bias.dtype == torch.float16 and len(prepared) == 1
    layer.bias = 2 * layer.bias
    assert torch.equal(made(x), layer(x)) and len(prepared) == 2
    layer.set_packed_(quantize_weight(torch.randn(plain.weight.shape), scheme), layer.scheme)
    assert torch.equal(made(x), layer(x)) and len(prepared) == 3
    for _ in range(2 * compiled.KEPT):
        layer.bias = layer.bias.clone()
        assert torch.equal(made(x), layer(x))
    assert len(compiled._calls[layer.packed]) <= compiled.KEPT


def test_tied_layers_have_calls_of_their_own(graphs: Callable[[], int], prepared: list[object]) -> None:
    layer = packed_layer(quant_layer(nn.Linear(32, 24)))
    model = nn.Sequential(layer, nn.Linear(24, 32), Tied(layer, torch.ones(24)))
    made, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(3, 32)
    for _ in range(3):
        assert gap(made(x), model(x)) < 1e-5
    assert [bias.dtype for bias in prepared] == [torch.float16, torch.float32]  # type: ignore[attr-defined]


def test_weights_are_freed_with_their_layers(graphs: Callable[[], int], prepared: list[object]) -> None:
    layer = packed_layer(quant_layer(nn.Linear(32, 24)))
    torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(3, 32))
    weight, kept = weakref.ref(layer.packed), len(compiled._calls)
    torch._dynamo.reset()
    del layer
    gc.collect()
    assert prepared and weight() is None and len(compiled._calls) < kept


@pytest.mark.parametrize("asked", [True, False])
def test_gradients_take_the_whole_way(asked: bool, graphs: Callable[[], int]) -> None:
    layer = packed_layer(quant_layer(nn.Linear(32, 24)))
    layer.act = 16
    made = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.enable_grad():
        x = torch.randn(3, 32, requires_grad=asked)
        y = made(x)
    assert y.requires_grad == asked and gap(y.detach(), layer(x.detach())) < 1e-3


# ---- attentions


def test_copies_of_attentions_round_their_softmax(graphs: Callable[[], int]) -> None:
    torch.manual_seed(0)
    attention = Attention(32, heads=2, dim_head=16)
    packed_layer(replace_layer_(attention, "to_v", None))
    x = torch.randn(2, 7, 32)
    unrounded = attention(x)
    patch_attention_(attention)
    patch_attention_(attention)
    y = attention(x)
    assert isinstance(attention, Attention) and type(attention).__name__ == "Attention"
    assert gap(y, unrounded) > 1e-4
    for copied in (deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert type(copied) is type(attention) and copied.to_v is not attention.to_v
        assert torch.equal(copied(x), y)
        copied.to_v.act = 16
        assert gap(copied(x), y) > 1e-4 and torch.equal(attention(x), y)

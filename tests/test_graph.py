"""The traced graph against independent counts: forward hooks, torch's FLOP counter, real inputs that
change or do not."""

from __future__ import annotations

import copy
import json
import re
import time
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aquabit import graph as g
from aquabit._operators import block_of, operator_of
from aquabit.scheme import AquabitError
from tests.families import DIGITS_DIT, DIGITS_UNET, FAMILIES, TINY

QUANTIZABLE = (nn.Linear, nn.Conv2d)


@cache
def traced(name: str) -> g.LayerGraph:
    class_name, config, _ = FAMILIES[name]
    denoiser = g.meta_denoiser(class_name, config)
    start, cpu = time.perf_counter(), time.process_time()
    graph = g.trace(denoiser)
    print(f"{name}: traced in {time.perf_counter() - start:.2f} s, {time.process_time() - cpu:.2f} s of CPU")
    return graph


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_reached_and_has_an_operator_type(name: str) -> None:
    class_name, config, count = FAMILIES[name]
    modules = {
        n: m for n, m in g.meta_denoiser(class_name, config).named_modules() if isinstance(m, QUANTIZABLE)
    }
    layers = g.layers(traced(name))
    assert len(layers) == count
    assert set(layers) == set(modules)
    assert [n for n, a in layers.items() if a["operator"] == "other"] == []
    assert [
        n
        for n, a in layers.items()
        if not a["block"] or ("." in a["block"] and not n.startswith(f"{a['block']}."))
    ] == []
    for layer, attributes in layers.items():
        module = modules[layer]
        assert attributes["kind"] == ("conv" if isinstance(module, nn.Conv2d) else "linear")
        assert attributes["shape"] == tuple(module.weight.shape)
        assert attributes["bias"] == (module.bias is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_and_order_equal_the_flop_counter_and_forward_hooks(name: str) -> None:
    class_name, config, _ = FAMILIES[name]
    denoiser = g.meta_denoiser(class_name, config).eval()
    macs: dict[str, int] = {}
    for layer, module in denoiser.named_modules():
        if isinstance(module, QUANTIZABLE):

            def count(module: Any, _: Any, output: torch.Tensor, layer: str = layer) -> None:
                macs[layer] = macs.get(layer, 0) + output.numel() * module.weight[0].numel()

            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, torch.device("meta"):
        denoiser(**g.example_inputs(denoiser))
    flops = {op.__name__.split(".")[0]: n for op, n in counter.get_flop_counts()["Global"].items()}
    layers = g.layers(traced(name))
    assert all(
        ".pooler." in n for n in layers if n not in macs
    )  # Hunyuan's pooler uses its layers' weights without calling them
    assert [n for n in layers if n in macs] == list(macs)
    assert {n: a["macs"] for n, a in layers.items() if n in macs} == macs
    assert 2 * sum(a["macs"] for a in layers.values()) == sum(
        flops.get(op, 0) for op in ("addmm", "mm", "convolution")
    )


OPERATORS = {
    "sd-1.5": {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (
            "cross_attn.v",
            "mid_block.attentions.0.transformer_blocks.0",
            "v",
        ),
        "down_blocks.0.resnets.1.time_emb_proj": ("res.time", "down_blocks.0.resnets.1", None),
        "up_blocks.1.attentions.0.proj_in": ("proj_in", "up_blocks.1.attentions.0", None),
        "time_embedding.linear_1": ("time_embed", "time_embed", None),
        "conv_in": ("conv_in", "stem", None),
    },
    "digits-unet": {"mid_block.attentions.0.to_out.0": ("self_attn.out", "mid_block.attentions.0", None)},
    "digits-dit": {
        "transformer_blocks.3.norm1.emb.timestep_embedder.linear_2": (
            "time_embed",
            "transformer_blocks.3",
            None,
        ),
        "transformer_blocks.3.norm1.linear": ("adaln", "transformer_blocks.3", None),
        "transformer_blocks.3.ff.net.0.proj": ("ff.up", "transformer_blocks.3", None),
        "proj_out_1": ("adaln", "head", None),
    },
    "pixart-sigma": {"caption_projection.linear_2": ("caption_embed", "caption_embed", None)},
    "sd3.5-medium": {
        "transformer_blocks.0.attn.add_q_proj": ("joint_attn.add_q", "transformer_blocks.0", "q"),
        "transformer_blocks.0.attn2.to_k": ("self_attn.k", "transformer_blocks.0", "k"),
        "transformer_blocks.0.ff_context.net.2": ("ff_context.down", "transformer_blocks.0", None),
    },
    "flux-dev": {
        "single_transformer_blocks.7.proj_mlp": ("single.mlp", "single_transformer_blocks.7", None),
        "single_transformer_blocks.7.attn.to_q": ("single.q", "single_transformer_blocks.7", "q"),
        "time_text_embed.guidance_embedder.linear_1": ("guidance_embed", "time_embed", None),
    },
}


@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, layers in OPERATORS.items() for layer in layers]
)
def test_operator_block_and_role(name: str, layer: str) -> None:
    attributes = traced(name).nodes[layer]
    assert (attributes["operator"], attributes["block"], attributes["attention"]) == OPERATORS[name][layer]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_is_one_merge_of_its_q_k_and_v(name: str) -> None:
    graph = traced(name)
    attentions = [n for n, data in graph.nodes(data=True) if data.get("op") == "attention"]
    outputs = {n for n, a in g.layers(graph).items() if re.search(r"attn\.out$", a["operator"])}
    fused = {
        n for n, a in g.layers(graph).items() if a["operator"] == "single.out" or n.endswith(".pooler.c_proj")
    }
    assert len(attentions) == len(outputs) + len(fused)
    for (
        attention
    ) in attentions:  # between them the queries, keys and values may be joined with those of the context
        before = [
            p
            for n in graph.predecessors(attention)
            for p in ([n] if graph.nodes[n]["kind"] != "merge" else graph.predecessors(n))
        ]
        assert name == "hunyuan" or {graph.nodes[n]["attention"] for n in before} == {"q", "k", "v"}


INVARIANT = {
    "dit-xl-2": r"(?!)",
    "digits-dit": r"(?!)",
    "digits-unet": r"(?!)",
    "sd-1.5": r"attn2\.to_[kv]$",
    "sdxl": r"attn2\.to_[kv]$|^add_embedding",
    "pixart-sigma": r"attn2\.to_[kv]$|^caption_projection",
    "pixart-alpha": r"attn2\.to_[kv]$|^caption_projection|(resolution|aspect_ratio)_embedder",
    "sd3-medium": r"^context_embedder|\.text_embedder",
    "flux-dev": r"^context_embedder|\.text_embedder|\.guidance_embedder",
    "ldm-4": r"attn2\.to_[kv]$",
    "hunyuan": r"attn2\.to_[kv]$|^text_embedder|^time_extra_emb\.(pooler|extra_embedder)",
}


@pytest.mark.parametrize("name", INVARIANT)
def test_step_invariant_layers_by_name(name: str) -> None:
    layers = g.layers(traced(name))
    assert {n for n, a in layers.items() if a["step_invariant"]} == {
        n for n in layers if re.search(INVARIANT[name], n)
    }


def real_inputs(denoiser: nn.Module) -> dict[str, Any]:
    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: real(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return (
            torch.rand(value.shape)
            if value.is_floating_point()
            else torch.ones(value.shape, dtype=value.dtype)
        )

    inputs = {k: real(v) for k, v in g.example_inputs(denoiser).items()}
    if isinstance(denoiser, diffusers.FluxTransformer2DModel):  # 4,096 tokens are for the meta device only
        inputs["hidden_states"], inputs["img_ids"] = inputs["hidden_states"][:, :16], inputs["img_ids"][:16]
    return inputs


@pytest.mark.parametrize("name", TINY)
def test_step_invariant_layers_are_those_whose_real_input_stays_equal(name: str) -> None:
    class_name, config = TINY[name]
    torch.manual_seed(0)
    denoiser = getattr(diffusers, class_name).from_config(config).eval()
    for parameter in denoiser.parameters():  # nothing may be hidden behind a zero initialisation
        nn.init.normal_(parameter, std=0.2)
    seen: dict[str, list[torch.Tensor]] = {}
    for layer, module in denoiser.named_modules():
        if isinstance(module, QUANTIZABLE):
            module.register_forward_pre_hook(
                lambda _, args, layer=layer: seen.setdefault(layer, []).append(args[0].clone())
            )
    inputs = real_inputs(denoiser)
    noisy = "sample" if "sample" in inputs else "hidden_states"
    changed = {**inputs, noisy: torch.rand_like(inputs[noisy]), "timestep": inputs["timestep"] * 500}
    with torch.no_grad():
        denoiser(**inputs)
        denoiser(**changed)
    equal = {
        layer for layer, calls in seen.items() if torch.equal(calls[0], calls[len(calls) // 2])
    }  # first call of either run
    assert {n for n, a in g.layers(g.trace(denoiser)).items() if a["step_invariant"]} == equal


@pytest.mark.parametrize("name", ["sd-1.5", "sdxl", "digits-unet"])
def test_splits_are_those_of_the_skip_connections(name: str) -> None:
    config = FAMILIES[name][1]
    channels = config["block_out_channels"][::-1]
    expected = {}
    for block, width in enumerate(channels):
        for resnet in range(config["layers_per_block"] + 1):
            hidden = width if resnet else channels[max(block - 1, 0)]
            expected |= {
                f"up_blocks.{block}.resnets.{resnet}.{layer}": hidden for layer in ("conv1", "conv_shortcut")
            }
    layers = g.layers(traced(name))
    assert {n: a["split"] for n, a in layers.items() if a["split"] is not None} == expected


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"sd-1.5", "sdxl", "ldm-4", "digits-unet"}))
def test_transformers_have_no_splits(name: str) -> None:
    assert {a["split"] for a in g.layers(traced(name)).values()} == {None}


@pytest.mark.parametrize(("dim", "split"), [(1, 4), (2, None)])
def test_only_a_concatenation_of_channels_splits(dim: int, split: int | None) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.skip, self.last = (
                nn.Conv2d(2, 4, 1),
                nn.Conv2d(2, 4, 1),
                nn.Conv2d(8 if dim == 1 else 4, 4, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.cat([self.first(x), self.skip(x)], dim=dim).relu())

    assert g.trace(Joined(), {"x": torch.rand(1, 2, 6, 6)}).nodes["last"]["split"] == split


class Toy(nn.Module):
    """A residual, an attention, a layer that is used twice, and one that is not used unless asked for."""

    def __init__(self, use_all: bool = True) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v, self.twice = (nn.Linear(8, 8, bias=i % 2 == 0) for i in range(5))
        self.gate = nn.Linear(1, 1)  # one weight: not quantizable
        self.spare = nn.Linear(8, 8)
        self.use_all = use_all

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(x)
        y = nn.functional.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context)) + x
        y = self.twice(torch.nn.functional.silu(self.twice(y)))
        return {"out": self.spare(y) if self.use_all else y}


def toy_inputs(batch: int = 1) -> dict[str, torch.Tensor]:
    return {"x": torch.rand(batch, 5, 8), "context": torch.rand(batch, 3, 8)}


def test_a_small_graph_exactly() -> None:
    graph = g.trace(Toy(), toy_inputs())
    attention, add = (n for n, data in graph.nodes(data=True) if data["kind"] == "merge")
    assert [graph.nodes[n] for n in (attention, add)] == [
        {"kind": "merge", "op": "attention"},
        {"kind": "merge", "op": "add"},
    ]
    assert set(graph.edges) == {
        ("stem", "q"),
        ("q", attention),
        ("k", attention),
        ("v", attention),
        (attention, add),
        ("stem", add),
        (add, "twice"),
        ("twice", "twice"),
        ("twice", "spare"),
    }
    layers = g.layers(graph)
    assert list(layers) == ["stem", "q", "k", "v", "twice", "spare"]
    assert [a["tokens"] for a in layers.values()] == [5, 5, 3, 3, 10, 5]
    assert [a["macs"] for a in layers.values()] == [320, 320, 192, 192, 640, 320]
    assert [a["bias"] for a in layers.values()] == [True, False, True, False, True, True]
    assert [n for n, a in layers.items() if a["step_invariant"]] == ["k", "v"]
    assert (graph.graph["weights"], graph.graph["other_elements"]) == (6 * 64, 4 * 8 + 2)


def test_counts_are_for_one_sample_whatever_the_batch() -> None:
    three, one = (g.to_json(g.trace(Toy(), inputs)) for inputs in (toy_inputs(3), toy_inputs()))
    assert {**three, "graph": {**three["graph"], "inputs": one["graph"]["inputs"]}} == one


def test_grouped_convolution() -> None:
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2))
    attributes = g.layers(g.trace(layer, {"input": torch.rand(2, 4, 6, 6)}))["0"]
    assert (attributes["groups"], attributes["tokens"], attributes["macs"]) == (2, 36, 36 * 8 * 2 * 9)


def test_the_given_model_stays_as_it_is() -> None:
    for denoiser, inputs in (
        (diffusers.DiTTransformer2DModel.from_config(DIGITS_DIT[1]), None),
        (Toy(), toy_inputs()),
    ):
        denoiser.train().requires_grad_(False)
        before = copy.deepcopy(denoiser.state_dict())
        with torch.inference_mode():
            first = g.to_json(g.trace(denoiser, inputs))
        assert g.to_json(g.trace(denoiser, inputs)) == first
        assert denoiser.training and not any(p.requires_grad for p in denoiser.parameters())
        assert all(torch.equal(before[k], v) for k, v in denoiser.state_dict().items())


def test_integer_steps_are_steps_too() -> None:
    denoiser = g.meta_denoiser(*DIGITS_DIT[:2])
    inputs = {
        "hidden_states": torch.rand(2, 1, 8, 8),
        "timestep": torch.tensor([3, 4]),
        "class_labels": torch.tensor([0, 1]),
    }
    assert g.to_json(g.trace(denoiser, inputs)) == g.to_json(traced("digits-dit"))


def test_sizes_count_the_whole_state_dict() -> None:
    for name in ("digits-dit", "digits-unet", "sd3-medium"):  # SD3 stores its position embedding in a buffer
        state = g.meta_denoiser(*FAMILIES[name][:2]).state_dict()
        graph = traced(name).graph
        assert graph["weights"] + graph["other_elements"] == sum(t.numel() for t in state.values())
        assert graph["weights"] == sum(state[f"{n}.weight"].numel() for n in g.layers(traced(name)))


def test_the_graph_can_rebuild_its_denoiser() -> None:
    graph = traced("digits-unet")
    assert (graph.graph["family"], graph.graph["model_class"]) == ("unet", DIGITS_UNET[0])
    again = g.trace(g.meta_denoiser(graph.graph["model_class"], graph.graph["config"]))
    assert g.to_json(again) == g.to_json(graph)


@pytest.mark.parametrize("name", ["digits-dit", "digits-unet", "sdxl", "flux-dev"])
def test_json_round_trip(name: str) -> None:
    graph = traced(name)
    again = g.from_json(json.loads(json.dumps(g.to_json(graph))))
    assert again.graph == graph.graph
    assert list(again.nodes(data=True)) == list(graph.nodes(data=True))
    assert list(again.edges) == list(graph.edges)
    assert {n: list(again.pred[n]) for n in again} == {n: list(graph.pred[n]) for n in graph}


def broken(place: list[str | int], value: Any) -> Any:
    data = g.to_json(g.trace(Toy(), toy_inputs()))
    target: Any = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return data


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["schema"], 2, "schema"),
        (["directed"], False, "directed"),
        (["nodes", 0, "macs"], -1, "macs"),
        (["nodes", 0, "shape"], "8x8", "shape"),
        (["nodes", 0, "kind"], "pool", "kind|nodes"),
        (["nodes", 0, "surplus"], 1, "surplus"),
        (["nodes", 1, "id"], "stem", "twice"),
        (["edges", 0, "target"], "nowhere", "nowhere"),
        (["edges", 0], {}, "source"),
        (["graph"], {}, "family"),
    ],
)
def test_bad_json_is_named(place: list[str | int], value: Any, message: str) -> None:
    with pytest.raises(AquabitError, match=f"^S.db is not a layer graph: .*({message})"):
        g.from_json(broken(place, value), "S.db")


@pytest.mark.parametrize("value", [None, [], {}, "graph"])
def test_not_a_graph_at_all(value: Any) -> None:
    with pytest.raises(AquabitError, match="is not a layer graph"):
        g.from_json(value)


def test_bad_input_is_named() -> None:
    for name in ("os", "DDIMScheduler", "NoSuchModel", "__name__", "a b", "StableDiffusionPipeline"):
        with pytest.raises(AquabitError, match=f"'{name}' is not a model of diffusers"):
            g.meta_denoiser(name, {})
    with pytest.raises(AquabitError, match="cannot build DiTTransformer2DModel"):
        g.meta_denoiser("DiTTransformer2DModel", {"num_layers": "three"})
    with pytest.raises(AquabitError, match="no example inputs are known for Toy"):
        g.trace(Toy())
    with pytest.raises(AquabitError, match="Toy does not run on the example inputs"):
        g.trace(Toy(), {"x": torch.rand(1, 5, 7), "context": torch.rand(1, 3, 8)})
    with pytest.raises(AquabitError, match="unknown model family 'gan'"):
        g.trace(Toy(), toy_inputs(), family="gan")


def test_sizes_given_by_position_are_those_of_the_graph() -> None:
    """diffusers names them among the arguments left at their defaults."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(2, 8, 4, num_layers=1, sample_size=8)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, QUANTIZABLE)}
    assert {n: a["shape"] for n, a in g.layers(g.trace(model)).items()} == shapes
    assert shapes["transformer_blocks.0.attn1.to_q"] == (16, 16)


@pytest.mark.parametrize(
    ("layer", "operator", "block"),
    [
        ("input_blocks.0.0", "conv_in", "input_blocks.0"),
        ("input_blocks.3.0.op", "downsample", "input_blocks.3"),
        ("input_blocks.11.0.emb_layers.1", "res.time", "input_blocks.11"),
        ("middle_block.1.qkv", "self_attn.qkv", "middle_block"),
        ("output_blocks.4.0.in_layers.2", "res.conv1", "output_blocks.4"),
        ("output_blocks.4.0.out_layers.3", "res.conv2", "output_blocks.4"),
        ("output_blocks.4.0.skip_connection", "res.shortcut", "output_blocks.4"),
        ("output_blocks.4.2.conv", "upsample", "output_blocks.4"),
        (
            "output_blocks.5.1.transformer_blocks.0.attn2.to_k",
            "cross_attn.k",
            "output_blocks.5.1.transformer_blocks.0",
        ),
        ("label_emb.2", "class_embed", "add_embed"),
        ("out.2", "conv_out", "head"),
    ],
)
def test_names_of_guided_diffusion(layer: str, operator: str, block: str) -> None:
    """A network of one's own that is named as OpenAI's U-Nets, and those that came of them."""
    assert (operator_of(layer, "generic"), block_of(layer, operator)) == (operator, block)

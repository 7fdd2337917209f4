from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
from torch import nn

from aquabit.cost import CostModel
from aquabit.exports.gguf import plan_of
from aquabit.graph import layers as graph_layers
from aquabit.measuring.session import target_notes, uniform_references
from aquabit.pipelines import trace
from aquabit.scheme import FP, AquabitError, Rounding, Scheme
from aquabit.search.first_answer import plain_space
from aquabit.space import DEFAULT_ACTIVATIONS, SearchSpace, make_space, narrowed
from aquabit.targets import FUSED, TARGETS, target_named
from aquabit.ties import find_ties, joined
from tests import tiny_pipelines, tiny_recent
from tests.conftest import tiny_pipeline
from tests.exports.networks import NETWORKS as PUBLISHED
from tests.exports.networks import made

OTHERS = [name for name in TARGETS if name != "aquabit"]
LINEAR = {"kind": "linear", "shape": (512, 768)}
CONV = {"kind": "conv", "shape": (64, 128, 3, 3)}
TINY = {"kind": "linear", "shape": (24, 9)}


def model(**nodes: tuple[str, tuple[int, ...]]) -> nx.DiGraph:
    graph = nx.DiGraph(other_elements=7, model_class="Made")
    named = nodes or {
        "wide": ("linear", (512, 768)),
        "narrow": ("linear", (512, 192)),
        "conv": ("conv", (64, 128, 3, 3)),
        "odd": ("linear", (24, 9)),
    }
    for i, (name, (kind, shape)) in enumerate(named.items()):
        own = {"kind": kind, "operator": name, "block": "b", "shape": shape, "macs": 1000}
        graph.add_node(name, depth=i, **own)
    return graph


def refusal(target: str, scheme: str, node: dict[str, Any]) -> str | None:
    return TARGETS[target].refusal(Scheme.parse(scheme), "layer", node, "Made")


@pytest.mark.parametrize("target", OTHERS)
def test_a_large_linear_layer_holds_every_scheme_of_its_target(target: str) -> None:
    goal = TARGETS[target]
    assert goal.schemes and all(s.endswith("h") for s in goal.schemes), "fitted with H: calibrated ones win"
    for scheme in (*goal.schemes, "fp"):
        assert refusal(target, scheme, LINEAR) is None
        assert refusal(target, scheme.removesuffix("h"), LINEAR) is None, "how it is fitted is no matter"
    for ours in ("vq3", "aq2x8g8", "aq2x8g8s"):
        assert "has no" in str(refusal(target, ours, LINEAR))


@pytest.mark.parametrize(
    ("target", "scheme", "node", "said"),
    [
        ("gguf", "q4_K", CONV, "Linear layers alone"),
        ("gguf", "q4_K", {**LINEAR, "shape": (512, 192)}, "multiple of 256"),
        ("gguf", "q4_0", {**LINEAR, "shape": (512, 192)}, None),
        ("gguf", "q4_0", TINY, "multiple of 32"),
        ("gguf", "usq4g32", LINEAR, "GGUF has no usq4g32"),
        ("gguf", "int8", LINEAR, "GGUF has no int8"),
        ("sdnq", "int4g32", CONV, None),
        ("sdnq", "usq4g32", CONV, None),
        ("sdnq", "usq4g32", {**CONV, "shape": (64, 48, 3, 3)}, "48 inputs must be a multiple of 32"),
        ("sdnq", "int8", TINY, None),
        ("sdnq", "fp8c", CONV, None),
        ("sdnq", "nf4g64", LINEAR, "SDNQ has no nf4g64"),
        ("bitsandbytes", "nf4g64d", LINEAR, None),
        ("bitsandbytes", "nf4g64", CONV, "Linear layers alone"),
        ("bitsandbytes", "nf4g64", {**LINEAR, "shape": (9, 96)}, "multiple of 64"),
        ("bitsandbytes", "int8", LINEAR, "rounds activations too"),
        ("torchao", "int4g64", LINEAR, None),
        ("torchao", "int8", CONV, "Linear layers alone"),
        ("torchao", "mxfp4", LINEAR, "has no mxfp4"),
        ("torchao", "nvfp4", {**LINEAR, "shape": (24, 768)}, "24 outputs must be a multiple of 16"),
        ("modelopt", "int8", CONV, None),
        ("modelopt", "fp8", CONV, None),
        ("modelopt", "int4g32", CONV, "no blocks of input channels"),
        ("modelopt", "nvfp4", CONV, "no blocks of input channels"),
        ("modelopt", "mxfp8", LINEAR, None),
        ("modelopt", "mxfp8", CONV, "no blocks of input channels"),
        ("modelopt", "int4", LINEAR, "int4 in blocks"),
        ("modelopt", "int8g32", LINEAR, "int8 per channel"),
        ("modelopt", "int3g32", LINEAR, "has no int3g32"),
        ("comfy", "fp8", LINEAR, None),
        ("comfy", "fp8c", LINEAR, "one scale a tensor"),
        ("comfy", "nvfp4", CONV, "Linear layers alone"),
        ("comfy", "mxfp4", LINEAR, "has no mxfp4"),
        ("aquabit", "aq2x8g8", CONV, None),
    ],
)
def test_what_targets_hold(target: str, scheme: str, node: dict[str, Any], said: str | None) -> None:
    found = refusal(target, scheme, node)
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize("target", OTHERS)
def test_a_space_offers_what_its_target_holds(target: str) -> None:
    graph, goal = model(), TARGETS[target]
    space, nodes = make_space(graph, "f", "made", target=target), graph_layers(graph)
    assert space.target == target and space.activations == (16,)
    own = [s for s in map(Scheme.parse, goal.schemes) if goal.beside(s, 16) is None]
    for name, row in space.choices.items():
        held = [s for s in own if refusal(target, str(s), nodes[name]) is None]
        assert row == (FP, *held), name
    CostModel(graph, space)  # what a layer cannot store has no size
    for config in space.sample(20):
        space.check(config)
        assert all(choice.act == 16 for choice in config.layers.values())
    assert all(space.choices[k] == (FP,) for k in goal.on(nodes, "Made").dense)
    assert space.choices["wide"] == (FP, *own)


def test_every_target_keeps_something_dense_or_says_nothing() -> None:
    found = {t: TARGETS[t].on(graph_layers(model()), "Made").notes for t in TARGETS}
    assert found["sdnq"] == [] and found["aquabit"] == []
    assert found["gguf"] == [
        "1 of 4 layers stays dense for gguf (diffusers' GGUF loader quantizes Linear layers alone): conv",
        "1 of 4 layers stays dense for gguf (its rows of 9 weights must be a multiple of 32): odd",
    ]
    many = model(**{f"c{i}": ("conv", (8, 8, 3, 3)) for i in range(5)})
    assert TARGETS["comfy"].on(graph_layers(many), "Made").notes[0].endswith("alone): c0, c1, c2 and 2 more")


def test_schemes_of_a_space_file_are_offered_where_the_target_holds_them() -> None:
    asked = {"schemes": ["q4_Kh", "q8_0h", "usq4h"], "target": "gguf"}
    space = make_space(model(), "f", **asked)
    assert {k: [str(s) for s in row] for k, row in space.choices.items()} == {
        "wide": ["q4_Kh", "q8_0h"],
        "narrow": ["q8_0h"],
        "conv": ["fp"],
        "odd": ["fp"],
    }
    with pytest.raises(
        AquabitError, match=r"no layer can hold for gguf any of usq4h .*its own schemes are q2_K"
    ):
        make_space(model(), "f", schemes=["usq4h"], target="gguf")
    with pytest.raises(AquabitError, match="no layer can hold for gguf any of"):
        make_space(model(conv=("conv", (8, 8, 3, 3))), "f", target="gguf")
    with pytest.raises(AquabitError, match="pinned to usq8, which gguf refuses: GGUF has no usq8"):
        make_space(model(), "f", pinned={"wide": "usq8"}, target="gguf")
    pinned = make_space(model(), "f", pinned={"wide": "q8_0"}, target="gguf")
    assert pinned.choices["wide"] == (Scheme.parse("q8_0"),)
    with pytest.raises(AquabitError, match="a8 is none of gguf's activations, which are a16"):
        make_space(model(), "f", activations=[16, 8], target="gguf")


def offered(target: str, *activations: Rounding, schemes: list[str] | None = None) -> dict[str, list[str]]:
    space = make_space(model(), "f", target=target, activations=activations, schemes=schemes)
    assert space.activations == activations
    return {name: [str(s) for s in row] for name, row in space.choices.items()}


def test_schemes_go_with_all_activations_that_a_space_of_a_target_has() -> None:
    assert offered("torchao", "i8")["wide"] == ["int8h"] == offered("torchao", 16, "i8")["wide"]
    assert offered("torchao", "f8")["wide"] == ["fp8ch"]
    assert offered("comfy", "i8")["wide"] == ["int8h"]
    assert offered("comfy", 16)["wide"] == ["fp", "nvfp4h", "mxfp8h", "fp8h"], "ComfyUI rounds int8's inputs"
    with pytest.raises(AquabitError, match=r"no layer can hold for comfy any of int8h .*rounds the inputs"):
        offered("comfy", 16, schemes=["int8h"])
    assert offered("torchao", "i8")["conv"] == ["fp"], "what can hold nothing keeps its inputs as they are"
    assert offered("modelopt", "f8", "i8")["wide"] == ["fp", *TARGETS["modelopt"].schemes], "any with any"
    with pytest.raises(AquabitError, match="int8 weights with a scale for each output"):
        offered("torchao", "i8", "f8")
    with pytest.raises(AquabitError, match=r"no layer can hold for torchao any of int4g32 .*int8 weights"):
        offered("torchao", "i8", schemes=["int4g32"])
    with pytest.raises(AquabitError, match="pinned to int4g32, which torchao refuses: torchao multiplies"):
        make_space(model(), "f", target="torchao", activations=["i8"], pinned={"wide": "int4g32"})
    for target in ("gguf", "sdnq", "bitsandbytes"):
        with pytest.raises(AquabitError, match=f"i8 is none of {target}'s activations, which are a16"):
            offered(target, "i8")
    with pytest.raises(AquabitError, match="f8 is none of comfy's activations, which are a16, i8"):
        offered("comfy", "f8")


def test_a_studys_activations_stay_where_they_go_with_all_that_is_left() -> None:
    both = model(a=("linear", (512, 768)), b=("linear", (64, 64)))
    wide = make_space(both, "f", schemes=["int8h", "usq4h"], activations=[8, "i8", "f8"])
    assert narrowed(wide, both, "torchao").activations == (16, "i8")
    assert narrowed(wide, both, "modelopt").activations == (16, "i8", "f8")
    assert narrowed(wide, both, "comfy").activations == ("i8",), "ComfyUI's int8 has no a16"
    assert narrowed(wide, both, "comfy").choices["a"] == (Scheme.parse("int8h"),)
    more = make_space(both, "f", schemes=["int8h", "mxfp8h"], activations=[16, "i8"])
    assert narrowed(more, both, "comfy").activations == (16,)
    assert narrowed(more, both, "comfy").choices["a"] == (Scheme.parse("mxfp8h"),)
    wide = make_space(both, "f", schemes=["int8h", "int4g32"], activations=[8, "i8"])
    assert narrowed(wide, both, "torchao").activations == (16,), "int4g32 goes with a16 alone"


def test_our_own_target_restricts_nothing() -> None:
    assert make_space(model(), "f", target="aquabit") == make_space(model(), "f")
    assert target_named("aquabit") is None and target_named(None) is None
    with pytest.raises(AquabitError, match="the target 'onnx' is unknown; known: gguf, sdnq"):
        make_space(model(), "f", target="onnx")


def test_a_space_remembers_its_target() -> None:
    space = make_space(model(), "f", target="sdnq")
    value = json.loads(json.dumps(space.to_dict()))
    assert SearchSpace.from_dict(value) == space and value["target"] == "sdnq"
    assert "target" not in make_space(model(), "f").to_dict()
    with pytest.raises(AquabitError, match="unknown"):
        SearchSpace.from_dict({**value, "target": "onnx"})


def test_a_studys_space_is_narrowed_to_a_target() -> None:
    wide = make_space(model(), "f", schemes=["usq4h", "int8h", "fp8", "fp"])
    narrow = narrowed(wide, model(), "torchao")
    assert narrow.target == "torchao" and narrow.activations == (16,)
    assert [str(s) for s in narrow.choices["wide"]] == ["int8h", "fp8", "fp"]
    assert narrow.choices["conv"] == (FP,)
    assert narrowed(wide, model(), None) is wide and narrowed(narrow, model(), "torchao") is narrow
    assert wide.activations == DEFAULT_ACTIVATIONS
    with pytest.raises(AquabitError, match="is of the target torchao, not comfy"):
        narrowed(narrow, model(), "comfy")
    with pytest.raises(
        AquabitError, match=r"no layer can hold for gguf any of usq4h, int8h, fp8 .*measure with"
    ):
        narrowed(wide, model(), "gguf")


def test_uniform_references_of_a_target_can_be_deployed() -> None:
    space = make_space(model(wide=("linear", (64, 256)), odd=("linear", (8, 96))), "f", target="gguf")
    found = uniform_references(space)
    assert len(found) == len(TARGETS["gguf"].schemes)
    for config in found:
        space.check(config)
    by_name = {str(c["wide"].weight): str(c["odd"].weight) for c in found}
    assert by_name["q4_Kh"] in ("q4_0h", "iq4_nlh") and by_name["q8_0h"] == "q8_0h"


def test_the_first_answer_of_a_target_is_in_its_formats() -> None:
    space = make_space(model(), "f", target="gguf")
    plain = plain_space(space)
    assert [str(s) for s in plain.choices["narrow"]] == ["fp", "q4_0", "iq4_nl", "q5_0", "q5_1", "q8_0"]
    assert plain.choices["conv"] == (FP,) and plain.activations == (16,)


# ---- what is fused


NETWORKS: dict[str, Callable[[], Any]] = {
    "FluxTransformer2DModel": lambda: tiny_pipelines.flux().transformer,
    "SD3Transformer2DModel": lambda: tiny_pipelines.sd3().transformer,
    "Flux2Transformer2DModel": lambda: tiny_recent.flux2().transformer,
    "ChromaTransformer2DModel": lambda: tiny_recent.chroma().transformer,
    "ZImageTransformer2DModel": lambda: tiny_recent.z_image().transformer,
    "Lumina2Transformer2DModel": lambda: tiny_recent.lumina2().transformer,
    "SanaTransformer2DModel": tiny_recent.sana_net,
    "HunyuanVideoTransformer3DModel": lambda: tiny_recent.hunyuan_video().transformer,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_layers_are_found_in_the_class_that_fuses_them(name: str) -> None:
    network = NETWORKS[name]()
    assert type(network).__name__ == name
    names = [k for k, module in network.named_modules() if isinstance(module, nn.Linear)]
    for patterns in FUSED[name]:
        groups = find_ties([patterns], names)  # raises where a pattern names nothing
        for group in groups:  # one tensor's rows are of one width
            assert len({network.get_submodule(k).in_features for k in group}) == 1, group
    tied = find_ties(FUSED[name], names)
    single = [g for g in tied if g[0].startswith("single_transformer_blocks")]
    assert all(len(g) == 4 for g in single) and bool(single) == (
        name.startswith(("FluxT", "Chroma", "Hunyuan"))
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_fused_layers_are_the_tensors_that_a_gguf_file_makes_of_several(name: str) -> None:
    network = made(name)
    names = [k for k, module in network.named_modules() if isinstance(module, nn.Linear)]
    places = [place.parts for place in plan_of(network).places if place.name.endswith(".weight")]
    written = {frozenset(p.removesuffix(".weight") for p in parts) for parts in places if len(parts) > 1}
    tied = find_ties(TARGETS["gguf"].tied(type(network).__name__), names, strict=False)
    assert {frozenset(group) for group in tied} == {
        group & set(names) for group in written if group & set(names)
    }


def test_a_fused_group_is_tied_and_stays_dense_together() -> None:
    graph = model(
        **{
            "transformer_blocks.0.attn.to_q": ("linear", (64, 64)),
            "transformer_blocks.0.attn.to_k": ("linear", (64, 64)),
            "transformer_blocks.0.attn.to_v": ("linear", (64, 64)),
            "transformer_blocks.1.attn.to_q": ("linear", (64, 64)),
            "transformer_blocks.1.attn.to_k": ("linear", (64, 9)),
            "transformer_blocks.1.attn.to_v": ("linear", (64, 64)),
        }
    )
    graph.graph["model_class"] = "FluxTransformer2DModel"
    for more in ({}, {"schemes": ["q8_0h"]}):
        space = make_space(graph, "f", target="gguf", **more)
        assert [len(g) for g in space.tied] == [3, 3]
        assert all(space.choices[k] == (FP,) for k in space.tied[1])
        assert all(len(space.choices[k]) > 1 or more for k in space.tied[0])
    notes = " ".join(target_notes(space, graph))
    assert "stored with transformer_blocks.1.attn.to_k, which stays dense" in notes
    assert "2 groups of layers are one tensor each for gguf" in notes
    own = make_space(graph, "f", target="gguf", tied=[["*.0.attn.to_q", "*.1.attn.to_q"]])
    assert [len(g) for g in own.tied] == [6], "ties of the user and of the target are one"
    assert make_space(graph, "f", target="sdnq").tied == ()


def test_layers_of_several_denoisers_are_fused_within_each() -> None:
    names = [f"{p}.{b}.0.attn.to_{k}" for p in ("one", "two") for b in ("transformer_blocks",) for k in "qkv"]
    names += [
        f"one.single_transformer_blocks.0.{k}" for k in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    lists = TARGETS["gguf"].tied("FluxTransformer2DModel+FluxTransformer2DModel")
    found = find_ties(lists, names, strict=False)
    assert found == (tuple(names[:3]), tuple(names[3:6]), tuple(names[6:]))


def test_ties_that_meet_are_one_group() -> None:
    assert joined((("a", "b"), ("c", "d")), (("b", "c"),)) == (("a", "b", "c", "d"),)
    assert joined((("a", "b"),), (("c", "d"),)) == (("a", "b"), ("c", "d"))


def test_a_traced_model_in_a_target() -> None:
    graph = trace(tiny_pipeline("unet"))
    space = make_space(graph, "f", target="sdnq")
    CostModel(graph, space)
    assert any(len(row) > 1 for row in space.choices.values())

"""Rivals from files: our configurations, and what ModelOpt quantizes by, in both of its forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from safetensors.torch import save_file

from aquabit.exports import export_config
from aquabit.scheme import FP, AquabitError, Calibration, LayerChoice, QuantConfig, Scheme
from aquabit.search.given_configs import read_given
from aquabit.space import SearchSpace, make_space

LAYERS = {
    "conv_in": (16, 3, 3, 3),
    "blocks.0.to_q": (64, 64),
    "blocks.0.ff": (64, 256),
    "blocks.1.to_q": (64, 64),
    "head": (10, 64),
}


@pytest.fixture
def graph() -> nx.DiGraph:
    found = nx.DiGraph(other_elements=0)
    for depth, (name, shape) in enumerate(LAYERS.items()):
        found.add_node(
            name, kind="layer", depth=depth, operator=f"o{depth}", block="b", shape=shape, macs=100
        )
    return found


@pytest.fixture
def space(graph: nx.DiGraph) -> SearchSpace:
    return make_space(
        graph,
        "print",
        "toy",
        schemes=["usq2h", "usq4h"],
        excluded=["head"],
        calibration=Calibration(images=4),
    )


def read(folder: Path, space: SearchSpace, value: Any) -> QuantConfig:
    path = folder / "given.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_given(path, space)


def weights(config: QuantConfig) -> dict[str, str]:
    return {k: str(config[k].weight) for k in LAYERS}


def test_our_configurations_are_read_as_they_are(tmp_path: Path, space: SearchSpace) -> None:
    config = space.uniform("usq2h").with_layer("conv_in", "usq8", 6)  # a scheme that the space does not offer
    assert read(tmp_path, space, config.to_json()) == config


@pytest.mark.parametrize("whole", [False, True])
def test_modelopts_mapping(tmp_path: Path, space: SearchSpace, whole: bool) -> None:
    rules = {
        "*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 32, "type": "static"}, "enable": True},
        "*input_quantizer": {"num_bits": 8, "axis": None},
        "blocks.1.*": {"num_bits": 2, "axis": 0},
        "*conv_in.weight*": {"enable": False},
        "*.ff.weight_quantizer": {},
        "*lm_head*": {"enable": False},
        "default": {"enable": False},
    }
    value = {"quant_cfg": rules, "algorithm": "max"}
    found = read(tmp_path, space, {"to": "modelopt", "config": value} if whole else value)
    assert weights(found) == {
        "conv_in": "fp",
        "blocks.0.to_q": "int4g32",
        "blocks.0.ff": "int8",
        "blocks.1.to_q": "int2",
        "head": "fp",
    }
    assert {c.act for c in found.layers.values()} == {16} and found.fingerprint == "print"
    space.check(found, extra_schemes=True)


def test_modelopts_list_and_that_the_last_rule_counts(tmp_path: Path, space: SearchSpace) -> None:
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "blocks.*.weight_quantizer", "cfg": {"num_bits": 3}},
        {"quantizer_name": "*to_q.weight_quantizer", "cfg": {"num_bits": 6, "block_sizes": {"-1": 16}}},
        {"quantizer_name": "head.weight_quantizer", "cfg": {"num_bits": 4}},
        {"quantizer_name": "blocks.0.to_q.input_quantizer", "cfg": {"num_bits": 2}},
    ]
    expected = {
        "conv_in": "fp",
        "blocks.0.to_q": "int6g16",
        "blocks.0.ff": "int3",
        "blocks.1.to_q": "int6g16",
        "head": "fp",
    }
    assert weights(read(tmp_path, space, {"quant_cfg": rules})) == expected, (
        "head is excluded from quantization"
    )
    last = [*rules, {"quantizer_name": "blocks.1.*weight*", "enable": False}]
    assert weights(read(tmp_path, space, {"quant_cfg": last})) == {**expected, "blocks.1.to_q": "fp"}
    assert weights(read(tmp_path, space, {"quant_cfg": rules[::-1]})) == dict.fromkeys(LAYERS, "fp"), (
        "now the first one is the last"
    )
    assert weights(read(tmp_path, space, {"quant_cfg": []})) == dict.fromkeys(LAYERS, "fp"), (
        "nothing is named"
    )


def test_a_rule_with_settings_may_be_switched_off(tmp_path: Path, space: SearchSpace) -> None:
    rules = [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4}, "enable": True},
        {"quantizer_name": "conv_in.weight_quantizer", "cfg": {"num_bits": 4}, "enable": False},
    ]
    assert weights(read(tmp_path, space, {"quant_cfg": rules}))["conv_in"] == "fp"


def test_rules_of_other_modules_name_no_layer_of_ours(tmp_path: Path, space: SearchSpace) -> None:
    rules = [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4}},
        {"parent_class": "nn.BatchNorm1d", "quantizer_name": "*", "enable": False},
    ]
    assert weights(read(tmp_path, space, {"quant_cfg": rules}))["conv_in"] == "int4"


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"num_bits": [4, 3], "axis": None}, "fp8"),
        ({"num_bits": [4, 3], "axis": 0}, "fp8c"),
        ({"num_bits": [2, 1], "block_sizes": {"-1": 16, "scale_bits": [4, 3]}}, "nvfp4"),
        ({"num_bits": [2, 1], "block_sizes": {"-1": 32, "scale_bits": [8, 0]}}, "mxfp4"),
        ({"num_bits": [4, 3], "block_sizes": {"-1": 32, "scale_bits": [8, 0]}}, "mxfp8"),
    ],
)
def test_modelopts_floats(tmp_path: Path, space: SearchSpace, settings: dict[str, Any], scheme: str) -> None:
    found = read(tmp_path, space, {"quant_cfg": {"*weight_quantizer": settings}})
    assert weights(found)["blocks.0.ff"] == scheme


def test_what_we_export_is_read_again(tmp_path: Path, space: SearchSpace, graph: nx.DiGraph) -> None:
    picked = {"conv_in": "int4", "blocks.0.to_q": "int3g16", "blocks.0.ff": "int2", "blocks.1.to_q": "fp"}
    config = QuantConfig("print", {k: LayerChoice(Scheme.parse(s), 8) for k, s in picked.items()})
    found = read(tmp_path, space, export_config(config, graph, "modelopt").to_json())
    assert weights(found) == {**picked, "head": "fp"} and found["head"].weight == FP


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "given.json"),
        ({"fid": 3}, "given.json"),
        ({"quant_cfg": 4}, "quant_cfg is 4; it must map quantizers"),
        ({"quant_cfg": ["*weight_quantizer"]}, "it must map quantizers"),
        ({"quant_cfg": {"*weight_quantizer": 4}}, r"the settings of '\*weight_quantizer' are no object"),
        ({"quant_cfg": {"*weight_quantizer": [{"num_bits": 4}, {"num_bits": 8}]}}, "are no object"),
        (
            {"quant_cfg": {"*weight_quantizer": {"num_bits": [4, 3], "block_sizes": {"-1": 8}}}},
            r"has num_bits \[4, 3\] in blocks of 8; 2 to 8",
        ),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": ["4", 3]}}}, "has num_bits"),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": 1}}}, "has num_bits 1;"),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": True}}}, "has num_bits True"),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": 12}}}, "12"),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": "many"}}}}, "block_sizes"),
        (
            {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": [32]}}},
            r"block_sizes \[32\]; they",
        ),
        (
            {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 32, "-2": 32}}}},
            "has blocks along axis '-2'",
        ),
        ({"quant_cfg": {"*weight_quantizer": {"enable": "false"}}}, "has enable 'false'; it must be true"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    tmp_path: Path, space: SearchSpace, value: Any, reason: str
) -> None:
    with pytest.raises(AquabitError, match=reason) as error:
        read(tmp_path, space, value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_files_of_another_model_and_files_that_are_not_there(tmp_path: Path, space: SearchSpace) -> None:
    with pytest.raises(AquabitError, match=r"given\.json: .* for model other, this is model print"):
        read(tmp_path, space, QuantConfig("other", {}).to_json())
    with pytest.raises(AquabitError, match="unknown layer 'tail'"):
        read(tmp_path, space, QuantConfig("print", {"tail": LayerChoice(Scheme.parse("usq4"), 8)}).to_json())
    with pytest.raises(AquabitError, match="cannot read"):
        read_given(tmp_path / "nothing.json", space)


def test_what_is_no_json_by_its_kind_is_named(tmp_path: Path, space: SearchSpace) -> None:
    (tmp_path / "net.gguf").write_bytes(b"GGML")
    save_file({"a": torch.zeros(2)}, tmp_path / "lora.safetensors")
    for name, said in (
        ("net.gguf", "is no GGUF file: it does not begin as these do"),
        ("lora.safetensors", "is no quantized file of ComfyUI"),
        (".", "is a folder of no model that another program quantized"),
    ):
        with pytest.raises(AquabitError, match=said):
            read_given(tmp_path / name, space)


@pytest.mark.parametrize("to", ["torchao", "quanto"])
def test_a_recipe_that_is_no_rival_says_what_is(
    to: str, tmp_path: Path, graph: nx.DiGraph, space: SearchSpace
) -> None:
    for node in graph.nodes.values():
        node["kind"] = "linear" if len(node["shape"]) == 2 else "conv"
    recipe = export_config(space.uniform("usq4"), graph, to)
    with pytest.raises(AquabitError, match=f"is a recipe for '{to}', as .* give the config.json"):
        read(tmp_path, space, recipe.to_json())


def test_modelopts_recipe_of_another_model_is_refused(tmp_path: Path, space: SearchSpace) -> None:
    off = {"quantizer_name": "*", "enable": False}
    one = {"quantizer_name": "elsewhere.0.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}
    with pytest.raises(AquabitError, match="is of another model: of the 1 weights that it quantizes"):
        read(tmp_path, space, {"quant_cfg": [off, one], "algorithm": "max"})
    assert set(weights(read(tmp_path, space, {"quant_cfg": [off]})).values()) == {"fp"}
    own = {**one, "quantizer_name": "blocks.0.ff.weight_quantizer"}
    assert weights(read(tmp_path, space, {"quant_cfg": [off, one, own]}))["blocks.0.ff"] == "int8"

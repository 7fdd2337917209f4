"""Exports: what each library gets for each scheme, what is said to be lost, and that nothing is lost
unsaid."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aquabit.cli.app import app
from aquabit.exports import RECIPES, Export, export_config
from aquabit.graph import layers, meta_denoiser, trace
from aquabit.pipelines import load
from aquabit.quant.model import fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import LayerChoice, QuantConfig, Rounding, Scheme, StepGroups
from aquabit.space import make_space
from tests.families import DIGITS_DIT, DIGITS_UNET
from tests.test_following import DIGITS, TiedMlp

DIT, UNET = (trace(meta_denoiser(*family[:2])) for family in (DIGITS_DIT, DIGITS_UNET))
FF = "transformer_blocks.0.ff.net.2"  # 192 x 768
QUERY = "transformer_blocks.0.attn1.to_q"  # 192 x 192
CONV = "down_blocks.0.resnets.0.conv1"  # 64 x 64 x 3 x 3


def one(graph: Any, to: str, layer: str, scheme: str, act: Any = 16, **other: Any) -> Export:
    steps = StepGroups(4, (0, 2)) if isinstance(act, tuple) else None
    return export_config(
        QuantConfig(
            "f",
            {layer: LayerChoice(Scheme.parse(scheme), act, "x" if scheme.endswith("s") else None)},
            steps=steps,
            **other,
        ),
        graph,
        to,
    )


def torchao_form(found: Export, layer: str) -> tuple[Any, ...]:
    entry = found.config["_data"]["fqn_to_config"][layer]
    data = entry["_data"]
    granularity = data.get("granularity") or data["weight_granularity"]
    return entry["_type"], data["weight_dtype"]["_data"], granularity["_data"]


@pytest.mark.parametrize(("scheme", "mapping"), [("int4g64", "SYMMETRIC"), ("usq4g64", "ASYMMETRIC")])
@pytest.mark.parametrize(("act", "key"), [(16, "mapping_type"), (8, "weight_mapping_type")])
def test_ranges_are_symmetric_where_ours_are(scheme: str, mapping: str, act: int, key: str) -> None:
    entry = one(DIT, "torchao", FF, scheme, act).config["_data"]["fqn_to_config"][FF]
    assert entry["_data"][key] == {"_type": "MappingType", "_data": mapping}


ROW, GROUP = {"axis": 0}, {"group_size": 64}


@pytest.mark.parametrize(
    ("scheme", "act", "form", "lost"),
    [
        ("usq4", 16, ("IntxWeightOnlyConfig", "int4", ROW), []),
        ("usq3g64", 8, ("Int8DynamicActivationIntxWeightConfig", "int3", GROUP), []),
        (
            "usq3g64",
            6,
            ("Int8DynamicActivationIntxWeightConfig", "int3", GROUP),
            ["input at 8 bits instead of 6"],
        ),
        (
            "usq4g100",
            16,
            ("IntxWeightOnlyConfig", "int4", ROW),
            ["groups of 100 do not divide 768 inputs: one range a row"],
        ),
        ("usq2h", 16, ("IntxWeightOnlyConfig", "int2", ROW), ["output-aware fit"]),
        (
            "vq3c",
            16,
            ("IntxWeightOnlyConfig", "int3", ROW),
            ["k-means codebook: evenly spaced levels instead"],
        ),
        (
            "aq3x4g8",
            16,
            ("IntxWeightOnlyConfig", "int2", ROW),
            ["additive codebooks: evenly spaced levels instead", "output-aware fit"],
        ),
        (
            "usq5",
            (4, 8),
            ("Int8DynamicActivationIntxWeightConfig", "int5", ROW),
            ["activation bits per step: the most of its steps throughout"],
        ),
    ],
)
def test_torchao_linear(scheme: str, act: Any, form: tuple[Any, ...], lost: list[str]) -> None:
    found = one(DIT, "torchao", FF, scheme, act)
    assert torchao_form(found, FF) == form
    assert list(found.layers[FF].lost) == lost and found.layers[FF].status == ("nearest" if lost else "same")


def test_torchao_convolutions_are_weight_only_with_ranges_of_taps() -> None:
    found = one(UNET, "torchao", CONV, "usq4", 8)
    assert torchao_form(found, CONV) == ("IntxWeightOnlyConfig", "int4", ROW)
    assert (
        found.layers[CONV].lost[0].startswith("input at 16 bits instead of 8")
        and "tap" in found.layers[CONV].lost[1]
    )
    single = one(UNET, "torchao", "conv_in", "usq4")
    assert (
        single.counts == {"same": 0, "nearest": 0, "full precision": 1}
        and single.config["_data"]["fqn_to_config"] == {}
    )


@pytest.mark.parametrize(
    ("graph", "layer", "scheme", "qtype", "lost"),
    [
        (DIT, FF, "usq4g128", "qint4", []),
        (DIT, FF, "usq2", "qint2", ["one range for groups of 128, not a row"]),
        (DIT, QUERY, "usq4", "qint4", ["one range for groups of 96, not a row"]),
        (DIT, FF, "usq3g128", "qint4", ["4 bits instead of 3"]),
        (DIT, FF, "usq8", "qint8", ["symmetric levels: no offset"]),
        (UNET, CONV, "usq4g96", "qint4", ["groups along (channel, tap), not (tap, channel)"]),
    ],
)
def test_quanto(graph: Any, layer: str, scheme: str, qtype: str, lost: list[str]) -> None:
    found = one(graph, "quanto", layer, scheme)
    assert found.config == {layer: {"weights": qtype, "activations": "none"}}
    assert list(found.layers[layer].lost) == lost


def test_modelopt() -> None:
    found = one(DIT, "modelopt", FF, "usq3g64", 6)
    off, weight, act = found.config["quant_cfg"]
    assert off == {"quantizer_name": "*", "enable": False}, "what is not named is left alone"
    assert weight == {
        "quantizer_name": f"{FF}.weight_quantizer",
        "cfg": {"num_bits": 3, "block_sizes": {-1: 64}},
    }
    assert act == {
        "quantizer_name": f"{FF}.input_quantizer",
        "cfg": {"num_bits": 6, "block_sizes": {-1: None, "type": "dynamic"}},
    }
    assert found.layers[FF].lost == ("symmetric levels: no offset", "symmetric activations: no offset")
    _, weight = one(UNET, "modelopt", CONV, "usq1").config["quant_cfg"]
    assert weight["cfg"] == {"num_bits": 2, "axis": 0}
    _, _, act = one(UNET, "modelopt", CONV, "usq4", 8).config["quant_cfg"]
    assert act["cfg"] == {"num_bits": 8, "axis": 0, "type": "dynamic"}, "per image"


@pytest.mark.parametrize(("act", "bits"), [("i8", 8), ("f8", [4, 3])])
def test_modelopt_rounds_inputs_as_ours(act: Rounding, bits: Any) -> None:
    found = one(DIT, "modelopt", FF, "int8", act)
    assert found.config["quant_cfg"][2]["cfg"] == {
        "num_bits": bits,
        "block_sizes": {-1: None, "type": "dynamic"},
    }
    assert found.layers[FF].status == "same" and found.layers[FF].form == f"8 bits, {act}"
    assert one(DIT, "modelopt", QUERY, "int8", act).layers[QUERY].lost == (), "Q is no layer's input"
    assert not any("softmax" in said for said in found.whole)


def test_torchao_rounds_inputs_as_ours_beside_some_weights() -> None:
    kinds = {"i8": "Int8DynamicActivationInt8WeightConfig", "f8": "Float8DynamicActivationFloat8WeightConfig"}
    for act, scheme, said in (
        ("i8", "int8", ["torchao's scales of inputs at i8 are the largest value / 127.5, not / 127"]),
        ("f8", "fp8c", []),
        ("f8", "fp8", ["one scale of the input for all tokens, as its weight has"]),
    ):
        found = one(DIT, "torchao", FF, scheme, act)
        form = found.config["_data"]["fqn_to_config"][FF]
        assert form["_type"] == kinds[act] and list(found.layers[FF].lost) == said
        assert found.layers[FF].form == f"{scheme}, {act}"
    for act, scheme, said in (
        ("i8", "int4g64", "asymmetric activations: symmetric ones are of int8 weights"),
        ("f8", "int8", "input in int8, not float8"),
    ):
        found = one(DIT, "torchao", FF, scheme, act)
        assert found.config["_data"]["fqn_to_config"][FF]["_type"] == "Int8DynamicActivationIntxWeightConfig"
        assert said in " ".join(found.layers[FF].lost)
    assert "input at 16 bits instead of i8" in " ".join(one(DIT, "quanto", FF, "int8", "i8").layers[FF].lost)


@pytest.mark.parametrize(("scheme", "act"), [("int8", "i8"), ("fp8c", "f8"), ("fp8", "f8")])
def test_torchao_reads_these_forms(scheme: str, act: Rounding) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed (the extra `targets`)")
    from torchao.core.config import config_from_dict, config_to_dict

    form = one(DIT, "torchao", FF, scheme, act).config["_data"]["fqn_to_config"][FF]
    again = config_to_dict(config_from_dict(form))
    assert again["_type"] == form["_type"]
    for key, value in form["_data"].items():
        assert again["_data"][key] == value, key


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("fp8", {"num_bits": [4, 3], "axis": None}),
        ("fp8c", {"num_bits": [4, 3], "axis": 0}),
        ("nvfp4", {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}),
        ("mxfp4", {"num_bits": [2, 1], "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [8, 0]}}),
        ("mxfp8", {"num_bits": [4, 3], "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [8, 0]}}),
        ("int4g32", {"num_bits": 4, "block_sizes": {-1: 32}}),
        ("int8", {"num_bits": 8, "axis": 0}),
    ],
)
def test_what_modelopt_has_is_exported_as_it_is(scheme: str, form: dict[str, Any]) -> None:
    found = one(DIT, "modelopt", FF, scheme)
    _, weight = found.config["quant_cfg"]
    assert weight["cfg"] == form and found.layers[FF].status == "same"
    assert one(DIT, "modelopt", FF, f"{scheme}h").layers[FF].lost == ("output-aware fit",)
    assert one(DIT, "quanto", FF, "int8").layers[FF].status == "same"


@pytest.mark.slow
def test_modelopt_stores_what_our_mxfp8_is() -> None:
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor", reason="ModelOpt is not installed")
    full = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(full, "mxfp8").dequantize()
    stored, scale = qtensor.MXFP8QTensor.quantize(weight)
    assert torch.equal(stored.dequantize(torch.float32, scale=scale), weight)


def test_a_convolution_in_groups_of_floats_is_none_of_modelopts() -> None:
    found = one(UNET, "modelopt", CONV, "nvfp4")
    assert found.config["quant_cfg"][1]["cfg"] == {"num_bits": 4, "axis": 0}
    assert "nvfp4 levels: evenly spaced ones instead" in found.layers[CONV].lost


def test_what_holds_for_all_layers_is_said() -> None:
    asked = QuantConfig(
        "f",
        {QUERY: LayerChoice(Scheme.parse("usq4"), 8)},
        correction="cnc+bc",
        tuned="0" * 16,
        ranges="static",
    )
    for to in RECIPES:
        found = export_config(asked, DIT, to)
        said = " ".join(found.whole)
        assert all(word in said for word in ("cnc+bc", "fine-tuned codes 0000", "'static'", "softmax"))
        assert "its output (Q, K or V) is not quantized" in found.layers[QUERY].lost
        plain = export_config(
            replace(
                asked,
                layers={FF: LayerChoice(Scheme.parse("usq4"))},
                correction=None,
                tuned=None,
                ranges="dynamic",
            ),
            DIT,
            to,
        )
        assert len(plain.whole) == 1
    split = next(n for n, node in layers(UNET).items() if node.get("split"))
    assert any(
        "side of the skip" in lost for lost in one(UNET, "modelopt", split, "usq4", 8).layers[split].lost
    )


def test_every_quantized_layer_has_one_status_and_json_keeps_all() -> None:
    schemes = ("usq4", "vq3", "aq2x8g8", "usq3g64", "fp")
    config = QuantConfig(
        "f", {n: LayerChoice(Scheme.parse(schemes[i % 5]), 8) for i, n in enumerate(layers(UNET))}
    )
    for to in RECIPES:
        found = export_config(config, UNET, to)
        assert sum(found.counts.values()) == len(config.layers) == len(found.layers)
        value = json.loads(found.to_json())
        assert value["to"] == to and value["statement"]["counts"] == found.counts
        assert all(
            (said["status"] == "same") == (not said["lost"]) for said in value["statement"]["layers"].values()
        )


def test_the_command_line_exports_and_says_what_is_wrong(tmp_path) -> None:
    config, out = tmp_path / "config.json", tmp_path / "export.json"
    own = fingerprint(load("digits-dit").denoiser)
    config.write_text(QuantConfig(own, {FF: LayerChoice(Scheme.parse("vq3"), 8)}).to_json())
    done = CliRunner().invoke(app, ["export", "digits-dit", str(config), "--to", "quanto", "--out", str(out)])
    assert (
        done.exit_code == 0
        and "0 layers same, 1 layers nearest" in done.output
        and "k-means codebook" in done.output
    )
    assert json.loads(out.read_text())["config"] == {FF: {"weights": "qint4", "activations": "none"}}
    for arguments, said in (
        (["digits-dit", str(config), "--to", "ggml"], "known: torchao, quanto, modelopt; with weights: gguf"),
        (
            ["digits-dit", str(config), "--to", "quanto", "--bank", "b"],
            "--bank changes nothing with --to quanto, which fits the weights itself",
        ),
        (["digits-unet", str(config), "--to", "quanto"], f"the configuration is for model {own}"),
    ):
        wrong = CliRunner().invoke(app, ["export", *arguments, "--out", str(out)])
        assert wrong.exit_code == 2 and said in wrong.output.replace("\n", " ")


def test_quanto_stores_more_than_eight_bits_at_eight_and_says_so() -> None:
    from aquabit.exports import quanto
    from aquabit.scheme import LayerChoice, Scheme

    form = quanto.layer(LayerChoice(Scheme.parse("aq3x8g2"), 16), {"shape": (16, 32)})
    assert form.form["weights"] == "qint8" and "8 bits instead of 12" in form.lost


def test_both_places_of_a_weight_are_exported() -> None:
    graph = trace(TiedMlp(), DIGITS)
    found = export_config(make_space(graph, "f").uniform("usq4", 16), graph, "torchao")
    assert set(found.layers) == {"a", "b", "c"} and found.layers["b"] == found.layers["a"]

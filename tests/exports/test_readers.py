"""What others made of a model, read: what our writers wrote comes back, what libraries wrote is decoded as
they decode it, and damaged files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aquabit.exports import bitsandbytes, bitsandbytes_reader, sdnq, sdnq_reader, torchao_files
from aquabit.exports.model_folder import WEIGHTS
from aquabit.exports.readers import read_others
from aquabit.exports.stored_folder import StoredFolder, described_in
from aquabit.graph import layers
from aquabit.scheme import AquabitError
from tests.exports import test_bitsandbytes, test_sdnq, test_torchao_files
from tests.exports.small_models import Case, case, small_dit, small_unet

MODELS = {"dit": small_dit, "unet": small_unet}


def made_of(build: Callable[[], Any], chosen: Any) -> Case:
    return case(build(), chosen, again=build())


def folder_of(path: Path) -> StoredFolder:
    found = described_in(path)
    assert found is not None
    return found


def weights_agree(made: Case, read: Any) -> None:
    """Every layer, those that are dense too."""
    again = dict(read)
    assert again.keys() == layers(made.exported.graph).keys()
    state = made.reference.state_dict()
    for name, weight in again.items():
        assert torch.equal(weight, state[f"{name}.weight"]), (name, made.exported.config[name])


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_sdnq_folders_come_back(build: Callable[[], Any], tmp_path: Path) -> None:
    made = made_of(build, test_sdnq.every)
    sdnq.write(made.exported, tmp_path / "out")
    config, graph = made.exported.config, made.exported.graph
    assert read_others(tmp_path / "out", graph, config.fingerprint) == config
    weights_agree(made, sdnq_reader.read_weights(folder_of(tmp_path / "out"), graph))
    (tmp_path / "pipe").mkdir()
    (tmp_path / "out").rename(tmp_path / "pipe" / "unet")
    assert read_others(tmp_path / "pipe", graph, config.fingerprint) == config


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_bitsandbytes_folders_come_back(build: Callable[[], Any], tmp_path: Path) -> None:
    made = made_of(build, test_bitsandbytes.linear)
    bitsandbytes.write(made.exported, tmp_path / "out")
    config, graph = made.exported.config, made.exported.graph
    assert read_others(tmp_path / "out", graph, config.fingerprint) == config
    weights_agree(made, bitsandbytes_reader.read_weights(folder_of(tmp_path / "out"), graph))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_torchao_configurations_come_back(build: Callable[[], Any], tmp_path: Path) -> None:
    made = made_of(build, test_torchao_files.linear)
    torchao_files.write(made.exported, tmp_path / "out")
    config, graph = made.exported.config, made.exported.graph
    assert read_others(tmp_path / "out", graph, config.fingerprint) == config


def test_what_sdnq_quantizes_itself_is_read_as_it_decodes(tmp_path: Path) -> None:
    test_sdnq.sdnq_library()
    from sdnq import sdnq_post_load_quant

    net, made = small_unet(), made_of(small_unet, lambda *_: "fp")
    quantized = sdnq_post_load_quant(
        net,
        weights_dtype="uint4",
        group_size=0,
        quant_conv=True,
        minimum_allowed_numel=1000,
        modules_dtype_dict={"minimum_6bit": ["to_q"], "int8": ["time_emb_proj"], "fp8": ["to_k"]},
        modules_quant_config={"to_v": {"use_codebook": True, "group_size": -1}},
    )
    quantized.save_pretrained(tmp_path / "out")
    graph, folder = made.exported.graph, folder_of(tmp_path / "out")
    config = read_others(tmp_path / "out", graph, "f")
    assert config is not None
    kinds = {str(config[name].weight) for name in layers(graph)}
    assert kinds == {"fp", "usq4g64", "usq4g32", "int6", "int8", "fp8c", "vq4c"}
    for name, weight in sdnq_reader.read_weights(folder, graph):
        module = quantized.get_submodule(name)
        theirs = test_sdnq.decoded(quantized, name) if hasattr(module, "sdnq_dequantizer") else module.weight
        torch.testing.assert_close(weight, theirs.detach().float(), rtol=0, atol=1e-6)
        assert (str(config[name].weight) == "fp") == (not hasattr(module, "sdnq_dequantizer")), name
    assert str(config["mid_block.attentions.0.to_k"].weight).startswith("fp8")
    assert str(config["mid_block.attentions.0.to_v"].weight) == "vq4c"


def test_what_bitsandbytes_quantizes_itself_is_read_as_it_decodes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason=test_bitsandbytes.LIBRARY)
    net, graph = small_dit(), made_of(small_dit, lambda *_: "fp").exported.graph
    state = net.state_dict()
    tensors = dict(state)
    for i, name in enumerate(["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"]):
        layer = bnb.nn.Linear4bit(
            *state[f"{name}.weight"].shape[::-1], quant_type="nf4", compress_statistics=bool(i)
        )
        layer.weight = bnb.nn.Params4bit(
            state[f"{name}.weight"], requires_grad=False, quant_type="nf4", compress_statistics=bool(i)
        )
        held = layer.to("cpu").state_dict()
        tensors |= {f"{name}.{k}": t for k, t in held.items() if k != "bias"}
        state[f"{name}.weight"] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    (tmp_path / "out").mkdir()
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, tmp_path / "out" / WEIGHTS)
    described = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "out" / "config.json").write_text(json.dumps({"quantization_config": described}))
    config = read_others(tmp_path / "out", graph, "f")
    assert config is not None
    assert {k: str(c.weight) for k, c in config.layers.items()} == {
        "transformer_blocks.0.attn1.to_q": "nf4g64",
        "transformer_blocks.1.ff.net.2": "nf4g64d",
    }
    for name, weight in bitsandbytes_reader.read_weights(folder_of(tmp_path / "out"), graph):
        assert torch.equal(weight, state[f"{name}.weight"]), name


@pytest.mark.parametrize(
    ("asked", "scheme"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4g64"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4g64d"),
        ({"load_in_8bit": True}, "int8"),
    ],
)
def test_what_a_configuration_of_bitsandbytes_asks_for(
    asked: dict[str, Any], scheme: str, tmp_path: Path
) -> None:
    graph = made_of(small_unet, lambda *_: "fp").exported.graph
    said = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["to_q"], **asked}
    (tmp_path / "q.json").write_text(json.dumps(said))
    config = read_others(tmp_path / "q.json", graph, "f")
    assert config is not None
    for name, node in layers(graph).items():
        dense = node["kind"] != "linear" or name.endswith("to_q")
        assert str(config[name].weight) == ("fp" if dense else scheme), name


@pytest.mark.parametrize(
    ("asked", "scheme"),
    [
        (lambda ao: ao.Int8WeightOnlyConfig(), "int8"),
        (lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)), "int8g32"),
        (lambda ao: ao.Int8DynamicActivationInt8WeightConfig(), "int8"),
        (lambda ao: ao.Int4WeightOnlyConfig(), "usq4g128"),
        (lambda ao: ao.Int4WeightOnlyConfig(group_size=64), "usq4g64"),
        (lambda ao: ao.IntxWeightOnlyConfig(torch.int3, ao.PerGroup(32)), "int3g32"),
        (lambda ao: ao.IntxWeightOnlyConfig(torch.int3, ao.PerAxis(0), ao.MappingType.ASYMMETRIC), "usq3"),
        (lambda ao: ao.Int8DynamicActivationIntxWeightConfig(torch.int4, ao.PerGroup(64)), "int4g64"),
        (lambda ao: ao.Float8WeightOnlyConfig(), "fp8c"),
        (lambda ao: ao.Float8WeightOnlyConfig(granularity=ao.PerTensor()), "fp8"),
        (lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()), "fp8c"),
    ],
)
def test_torchaos_own_configurations(asked: Callable[[Any], Any], scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason=test_torchao_files.LIBRARY)
    import torchao.quantization as ao
    from torchao.core.config import config_to_dict

    graph = made_of(small_dit, lambda *_: "fp").exported.graph
    said = {"quant_method": "torchao", "quant_type": {"default": config_to_dict(asked(ao))}}
    (tmp_path / "q.json").write_text(json.dumps({**said, "modules_to_not_convert": ["proj_out_1"]}))
    config = read_others(tmp_path / "q.json", graph, "f")
    assert config is not None
    found = {str(config[n].weight) for n, node in layers(graph).items() if node["kind"] == "linear"}
    assert found == {scheme, "fp"} and str(config["proj_out_1"].weight) == "fp"
    rules = {"re:transformer_blocks\\.\\d+\\.ff.*": config_to_dict(asked(ao)), "proj_out_2": None}
    whole = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": rules}}
    (tmp_path / "q.json").write_text(json.dumps({**said, "quant_type": {"default": whole}}))
    config = read_others(tmp_path / "q.json", graph, "f")
    assert config is not None
    assert {name.split(".")[2] for name in config.layers} == {"ff"}
    assert {str(choice.weight) for choice in config.layers.values()} == {scheme}


def test_other_paths_are_left_to_others(tmp_path: Path) -> None:
    graph = made_of(small_dit, lambda *_: "fp").exported.graph
    (tmp_path / "config.json").write_text('{"schema": 1, "layers": {}}')
    for path in ("config.json", "nothing", "."):
        assert read_others(tmp_path / path, graph, "f") is None
    for method, said in (("aquabit", None), ("gptq", "quantized by 'gptq'; known are sdnq, bitsandbytes")):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        if said is None:
            assert read_others(tmp_path, graph, "f") is None
        else:
            with pytest.raises(AquabitError, match=said):
                read_others(tmp_path, graph, "f")


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Any]:
    made = made_of(small_dit, lambda *_: "int4g32")
    sdnq.write(made.exported, tmp_path / "out")
    return tmp_path / "out", made.exported.graph


Q = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, q: t.pop(f"{Q}.weight"), f"lacks '{Q}.weight'"),
        (lambda t, q: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1]}), "is no folder of this model"),
        (lambda t, q: t.update({f"{Q}.scale": torch.ones(128, 3, 1)}), "scale is .128, 3, 1., the weight"),
        (lambda t, q: t.update({f"{Q}.svd_up": torch.ones(2)}), "has a part of low rank"),
        (lambda t, q: q.update(use_hadamard=True), "is rotated, which no scheme here is"),
        (lambda t, q: q.update(weights_dtype="float5_e2m2fn"), "no folder of this model|no scheme here is"),
        (lambda t, q: q.update(weights_dtype=["int4"]), "weights_dtype"),
        (lambda t, q: q.update(modules_dtype_dict={"minimum_6bit": [Q], "x": 1}), "modules_dtype_dict"),
        (lambda t, q: q.update(modules_quant_config={f".{Q}.": {"use_svd": "much"}}), "use_svd"),
        (lambda t, q: q.update(modules_dtype_dict={"uint4": [f"{Q}.weight"]}), f"lacks '{Q}.zero_point'"),
        (
            lambda t, q: t.update({f"{Q}.zero_point": t[f"{Q}.scale"] + 0}),
            "and a zero_point, which they lack",
        ),
        (lambda t, q: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.int8)}), "is I8 .* there, U8"),
        (lambda t, q: q.update(modules_dtype_dict={"int8": ["no.such.weight"]}), None),
    ],
)
def test_damaged_folders(folder: tuple[Path, Any], change: Any, said: str | None) -> None:
    path, graph = folder
    tensors, config = load_file(path / WEIGHTS), json.loads((path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, path / WEIGHTS)
    (path / "config.json").write_text(json.dumps(config))
    if said is None:
        found = read_others(path, graph, "f")
        assert found is not None and str(found[Q].weight) == "int4g32"
        return
    with pytest.raises(AquabitError, match=said):
        read_others(path, graph, "f")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}._weight_qdata"), f"lacks '{Q}.weight'"),
        (lambda t: t.update({f"{Q}._weight_qdata": torch.zeros(4, 4)}), "is .4, 4. there, the weight .128"),
        (lambda t: t.update({"proj_out_1.weight": torch.zeros(4, 4)}), "F32 .4, 4. there, F64 or"),
    ],
)
def test_weights_of_another_model_beside_torchaos_configuration(
    change: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    made = made_of(small_dit, lambda i, name, _: "fp" if name == "proj_out_1" else "int4g32")
    torchao_files.write(made.exported, tmp_path / "out")
    assert read_others(tmp_path / "out", made.exported.graph, "f") is not None
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "out" / WEIGHTS)
    with pytest.raises(AquabitError, match=said):
        read_others(tmp_path / "out", made.exported.graph, "f")


def test_a_torchao_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    made, other = (made_of(build, test_torchao_files.linear) for build in (small_unet, small_dit))
    torchao_files.write(made.exported, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (tmp_path / "q.json").write_text(json.dumps(said))
    assert read_others(tmp_path / "q.json", made.exported.graph, "f") is not None
    for place in (tmp_path / "q.json", tmp_path / "out"):
        with pytest.raises(AquabitError, match="is of another model: this one has none of the"):
            read_others(place, other.exported.graph, "f")


def test_a_truncated_file(folder: tuple[Path, Any]) -> None:
    path, graph = folder
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(AquabitError, match=r"cannot be read .* may be truncated"):
        read_others(path, graph, "f")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"quant_type": 4}, "must have _type and _data"),
        ({"quant_type": {"default": {"_type": "FqnToConfig", "_data": {}}}}, "must map layers to settings"),
        (
            {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 3, "_data": {}}}},
            "has Int8WeightOnlyConfig of version 3; known are 1 to 2",
        ),
        (
            {"quant_type": {"default": {"_type": "Odd", "_data": {}}}},
            "is Odd of its weights, which no scheme",
        ),
        (
            {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {"granularity": 4}}}},
            "_type",
        ),
        (
            {
                "quant_type": {
                    "default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"re:(a+)+b": {}}}}
                }
            },
            "repeats too much",
        ),
        (
            {"quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"re:[": {}}}}}},
            "is no regular expression",
        ),
        ({"modules_to_not_convert": "x", "quant_type": {}}, "it must be a list of names"),
    ],
)
def test_damaged_configurations_of_torchao(value: dict[str, Any], said: str, tmp_path: Path) -> None:
    graph = made_of(small_dit, lambda *_: "fp").exported.graph
    (tmp_path / "q.json").write_text(json.dumps({"quant_method": "torchao", **value}))
    with pytest.raises(AquabitError, match=said):
        read_others(tmp_path / "q.json", graph, "f")


@pytest.mark.parametrize(
    ("entry", "name", "there"),
    [
        (".a.b.", "a.b.weight", True),
        (".a.b", "a.bc.weight", True),
        ("b", "a.b.weight", True),
        ("a.b", "a.b.weight", False),
        ("a.b.weight", "a.b.weight", True),
        ("a*c", "a.b.c.weight", True),
        ("a*d", "a.b.c.weight", False),
        ("*b*c", "a.b.c.weight", True),
        ("*c*b", "a.b.c.weight", False),
    ],
)
def test_names_match_as_sdnq_has_it(entry: str, name: str, there: bool) -> None:
    assert sdnq_reader.matches(name, entry) is there
    test_sdnq.sdnq_library()
    from sdnq.utils import check_param_name_in

    assert (check_param_name_in(name, [entry]) is not None) is there

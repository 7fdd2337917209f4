"""GGUF files: the gguf package decodes our weights to the bit, and diffusers loads the model again."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from torch import Tensor, nn

from aquabit import quantize_weight
from aquabit.exports import gguf as writer
from aquabit.exports.exported import Exported
from aquabit.exports.gguf_names import reference_names
from aquabit.graph import layers, places_of
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme
from tests.exports.networks import NETWORKS, flux, loaded, made

gguf = pytest.importorskip("gguf")
gguf_utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
SCHEMES = ("q4_0", "q8_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "fp")
LONG = ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", *SCHEMES)


def graph_of(network: nn.Module) -> nx.DiGraph:
    """The layers of a network by name; some of these classes cannot be traced without a pipeline."""
    graph = nx.DiGraph()
    for depth, (name, places) in enumerate(places_of(network).items()):
        kind = "conv" if isinstance(places[0][1], nn.Conv2d) else "linear"
        graph.add_node(name, kind=kind, shape=tuple(places[0][1].weight.shape), depth=depth)
    return graph


def exported(network: nn.Module, schemes: tuple[str, ...] = SCHEMES) -> Exported:
    """The network with its Linear layers at schemes in turn, those of one tensor alike, where rows allow."""
    graph = graph_of(network)
    nodes = layers(graph)
    found = reference_names(type(network).__name__, list(network.state_dict()))
    places = [(p,) for p in network.state_dict()] if found is None else [p.parts for p in found[1]]
    choices, turn = {}, 0
    for parts in places:
        own = [part.removesuffix(".weight") for part in parts]
        if any(n not in nodes or nodes[n]["kind"] != "linear" for n in own):
            continue
        scheme = Scheme.parse(schemes[turn % len(schemes)])
        if scheme != FP and scheme.record.refuses(scheme, nodes[own[0]]["shape"]):
            scheme = Scheme.parse("fp")
        choices |= {n: LayerChoice(scheme, 16) for n in own}
        turn += 1
    weights = {
        n: quantize_weight(network.get_submodule(n).weight.detach(), c.weight)
        for n, c in choices.items()
        if c.weight != FP
    }
    return Exported(network, QuantConfig("f", choices), graph, weights)


@cache
def of(name: str) -> Exported:
    return exported(made(name))


def decoded(one: Exported) -> dict[str, Tensor]:
    """The state dict of the network with the weights that the codes are."""
    values = {f"{n}.weight": coded.dequantize() for n, coded in one.weights.items()}
    return {**one.network.state_dict(), **values}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_package_decodes_every_tensor(name: str, tmp_path: Path) -> None:
    one = of(name)
    assert len({str(c.weight) for c in one.config.layers.values()}) > 3
    said = writer.write(one, tmp_path / "net.gguf")
    assert not any("activations" in sentence for sentence in said)
    reader, wanted = gguf.GGUFReader(tmp_path / "net.gguf"), decoded(one)
    assert reader.fields["general.architecture"].contents() == NETWORKS[name][0]
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    found = reference_names(type(one.network).__name__, list(wanted))
    assert found is not None and [t.name for t in reader.tensors] == [place.name for place in found[1]]
    for tensor, place in zip(reader.tensors, found[1], strict=True):
        rows = torch.cat([wanted[p] for p in place.parts]) if len(place.parts) > 1 else wanted[place.parts[0]]
        rows = torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(values.reshape(rows.shape), rows.float()), place.name
        assert tensor.shape.tolist() == list(reversed(rows.shape))
    assert said[1] == (
        f"architecture {NETWORKS[name][0]}, with the names that ComfyUI-GGUF, stable-diffusion.cpp and"
        " diffusers read"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_loads_every_layer(name: str, tmp_path: Path) -> None:
    one = of(name)
    writer.write(one, tmp_path / "net.gguf")
    how = GGUFQuantizationConfig(compute_dtype=torch.float32)
    file = str(tmp_path / "net.gguf")
    net = loaded(one.network, file, tmp_path, quantization_config=how, torch_dtype=torch.float32)
    kept = [*(net._keep_in_fp32_modules or ())]
    again = net.state_dict()
    assert set(again) == set(one.network.state_dict())
    for key, value in decoded(one).items():
        layer, there = key.removesuffix(".weight"), again[key]
        if layer in one.weights and not set(key.split(".")) & set(kept):
            blocks = there.as_tensor().numpy()
            exact = torch.tensor(gguf.quants.dequantize(blocks, there.quant_type))
            assert torch.equal(exact, value), key
            # diffusers decodes in float16, as the scales are
            rounded = gguf_utils.dequantize_gguf_tensor(there)
            assert (rounded.float() - value).abs().max() <= 2**-9 * value.abs().max(), key
        elif layer not in one.weights:
            assert torch.equal(there, value), key


INPUTS: dict[str, dict[str, Any]] = {  # of one call
    "sd15": {"sample": (2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": (2, 5, 32)},
    "sdxl": {
        "sample": (2, 4, 8, 8),
        "timestep": 3,
        "encoder_hidden_states": (2, 5, 32),
        "added_cond_kwargs": {"text_embeds": (2, 48), "time_ids": (2, 6)},
    },
    "sd35": {
        "hidden_states": (2, 4, 8, 8),
        "encoder_hidden_states": (2, 5, 32),
        "pooled_projections": (2, 32),
        "timestep": (2,),
    },
    "flux": {
        "hidden_states": (2, 9, 32),
        "encoder_hidden_states": (2, 5, 32),
        "pooled_projections": (2, 32),
        "timestep": (2,),
        "guidance": (2,),
        "img_ids": (9, 3),
        "txt_ids": (5, 3),
    },
    "wan": {"hidden_states": (1, 4, 2, 4, 4), "timestep": (1,), "encoder_hidden_states": (1, 5, 32)},
}


def drawn(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: drawn(v) for k, v in value.items()}
    return torch.rand(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", INPUTS)
def test_the_model_of_the_file_gives_our_outputs(name: str, tmp_path: Path) -> None:
    one, file = of(name), str(tmp_path / "net.gguf")
    writer.write(one, Path(file))
    torch.manual_seed(1)
    inputs = drawn(INPUTS[name])
    ours = made(name)
    full = ours(**inputs, return_dict=False)[0]
    ours.load_state_dict(decoded(one))
    wanted = ours(**inputs, return_dict=False)[0]
    how = GGUFQuantizationConfig(compute_dtype=torch.float32)
    net = loaded(one.network, file, tmp_path, quantization_config=how, torch_dtype=torch.float32)
    found = net(**inputs, return_dict=False)[0]
    assert (found - wanted).norm() < 2e-3 * wanted.norm()  # it decodes in float16
    assert (full - wanted).norm() > 1e-2 * wanted.norm()


def test_tensors_of_16_bits_keep_them(tmp_path: Path) -> None:
    """bfloat16 stays as the weight of a Linear; what programs would take for blocks is float32."""
    network = flux(num_layers=1, num_single_layers=1).to(torch.bfloat16).eval()
    graph = graph_of(network)
    graph.graph["uncalled"] = ["x_embedder"]  # whose weight the model reads by itself
    writer.write(Exported(network, QuantConfig("f", {}), graph), tmp_path / "net.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "net.gguf").tensors}
    assert kinds["single_blocks.0.linear1.weight"] == "BF16" and kinds["img_in.bias"] == "F32"
    assert kinds["img_in.weight"] == "F32"
    assert set(kinds.values()) == {"BF16", "F32"}
    how = GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    again = loaded(network, str(tmp_path / "net.gguf"), tmp_path, quantization_config=how)
    for key, value in again.state_dict().items():
        found = gguf_utils.dequantize_gguf_tensor(value) if hasattr(value, "quant_type") else value
        assert torch.equal(found.float(), network.state_dict()[key].float()), key


def test_what_float16_cannot_hold_is_stored_wider(tmp_path: Path) -> None:
    network = made("sd15")
    network.conv_in.weight[0, 0, 0, 0] = network.time_embedding.linear_1.weight[0, 0] = 1e5
    one = Exported(network, QuantConfig("f", {}), graph_of(network))
    writer.write(one, tmp_path / "net.gguf")
    kinds = {t.name: t for t in gguf.GGUFReader(tmp_path / "net.gguf").tensors}
    ldm = "model.diffusion_model."
    assert kinds[f"{ldm}time_embed.0.weight"].tensor_type.name == "BF16"
    conv = kinds[f"{ldm}input_blocks.0.0.weight"]
    assert conv.tensor_type.name == "F32"
    assert float(conv.data.flat[0]) == float(torch.tensor(1e5).bfloat16())
    assert kinds[f"{ldm}out.2.weight"].tensor_type.name == "F16"
    assert kinds[f"{ldm}out.2.bias"].tensor_type.name == "F32"


def test_parts_of_several_types_are_one_that_holds_all(tmp_path: Path) -> None:
    network = made("flux")
    key = network.transformer_blocks[0].attn.to_k.weight
    key[0, 0] = 1e5
    writer.write(Exported(network, QuantConfig("f", {}), graph_of(network)), tmp_path / "net.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "net.gguf").tensors}
    fused, other = (tensors[f"double_blocks.{i}.img_attn.qkv.weight"] for i in (0, 1))
    assert fused.tensor_type.name == "F32" and other.tensor_type.name == "F16"
    assert torch.equal(torch.tensor(fused.data[32:64]), key.bfloat16().float())


def test_the_type_of_a_file_is_that_of_most_weights(tmp_path: Path) -> None:
    of_llama = {"F32": "ALL_F32", **{k: f"MOSTLY_{k}_S" for k in ("Q3_K", "Q4_K", "Q5_K")}}
    assert {
        kind: int(gguf.LlamaFileType[of_llama.get(kind, f"MOSTLY_{kind}")]) for kind in writer.FILE_TYPES
    } == writer.FILE_TYPES
    assert {*writer.FILE_TYPES} == writer.QUANTIZED | {"F32", "F16", "BF16"}
    network = nn.ModuleDict({"a": nn.Linear(256, 8), "b": nn.Linear(256, 4)}).requires_grad_(False)
    coded = {n: quantize_weight(network[n].weight, s) for n, s in (("a", "q4_K"), ("b", "q6_K"))}
    config = QuantConfig(
        "f", {n: LayerChoice(Scheme.parse(s), 16) for n, s in (("a", "q4_K"), ("b", "q6_K"))}
    )
    writer.write(Exported(network, config, graph_of(network), coded), tmp_path / "net.gguf")
    assert gguf.GGUFReader(tmp_path / "net.gguf").fields["general.file_type"].contents() == 14


def changed(one: Exported, layer: str, scheme: str) -> Exported:
    choice = LayerChoice(Scheme.parse(scheme), 16)
    return Exported(one.network, QuantConfig("f", {**one.config.layers, layer: choice}), one.graph)


def test_what_a_file_cannot_hold_is_refused() -> None:
    unet, dit = of("sd15"), of("flux")
    for one, layer, scheme, said in (
        (dit, "x_embedder", "usq4", "layer 'x_embedder' is usq4, which a GGUF file cannot hold; its formats"),
        (unet, "conv_out", "q8_0", "layer 'conv_out' is a convolution at q8_0; diffusers loads only Linear"),
        (
            dit,
            "single_transformer_blocks.1.proj_mlp",
            "q5_0h",
            r"proj_mlp q5_0h: they are one tensor of a GGUF file, single_blocks.1.linear1.weight, and must",
        ),
    ):
        writer.check(one)
        with pytest.raises(AquabitError, match=said):
            writer.check(changed(one, layer, scheme))


def test_output_aware_layers_share_a_tensor_with_others_of_their_format() -> None:
    one = of("flux")
    name = "transformer_blocks.0.attn.to_q"
    writer.check(changed(one, name, f"{one.config[name].weight}h"))


def test_a_name_that_is_too_long_is_refused() -> None:
    network = nn.Module()
    network.add_module("x" * 121, nn.Linear(32, 4, bias=False))  # .weight: 128
    one = Exported(network, QuantConfig("f", {}), nx.DiGraph())
    with pytest.raises(AquabitError, match="has 128 bytes; programs that read GGUF take at most 127"):
        writer.check(one)


def test_a_model_that_no_other_program_knows_has_its_own_names(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(32, 8, 3), nn.Linear(64, 4), nn.Conv3d(2, 2, 2)).requires_grad_(False)
    network.register_buffer("steps", torch.arange(3))
    network.register_buffer("on", torch.tensor([True, False]))
    coded = {"0": quantize_weight(network[0].weight, "q4_0"), "1": quantize_weight(network[1].weight, "q8_0")}
    config = QuantConfig(
        "f",
        {"0": LayerChoice(Scheme.parse("q4_0"), 8), "1": LayerChoice(Scheme.parse("q8_0"), 16)},
        correction="cnc",
    )
    said = writer.write(Exported(network, config, graph_of(network), coded), tmp_path / "net.gguf")
    assert said == [
        "8 tensors: F32 3, I64 1, I8 1, Q4_0 1, Q8_0 1, F16 1",
        "architecture aquabit: no other names of Sequential are known, so its own are written",
        "2.weight has more than 4 dimensions (1 such tensors): ggml reads no such file, ComfyUI-GGUF,"
        " diffusers and the gguf package do",
        "activations of 1 layers are quantized here, and not by what reads this file",
        "noise correction cnc is not applied",
    ]
    reader = gguf.GGUFReader(tmp_path / "net.gguf")
    tensors = {t.name: t for t in reader.tensors}
    blocks = tensors["0.weight"]
    values = torch.tensor(gguf.quants.dequantize(blocks.data, blocks.tensor_type))
    assert torch.equal(values.reshape(8, 32, 3, 3), coded["0"].dequantize())
    assert reader.fields["comfy.gguf.orig_shape.0.weight"].contents() == [8, 32, 3, 3]
    assert tensors["2.weight"].shape.tolist() == [2, 2, 2, 2, 2] and tensors["steps"].data.tolist() == [
        0,
        1,
        2,
    ]
    assert tensors["on"].data.tolist() == [1, 0]


def test_both_places_of_a_shared_weight_hold_its_codes(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(32, 4), "c": nn.Linear(32, 4)}).requires_grad_(False)
    network["c"].weight = network["a"].weight
    graph = graph_of(network)
    graph.graph["tied"] = {"c": "a"}
    assert set(graph) == {"a"}
    coded = {"a": quantize_weight(network["a"].weight, "q8_0")}
    config = QuantConfig("f", {"a": LayerChoice(Scheme.parse("q8_0"), 16)})
    writer.write(Exported(network, config, graph, coded), tmp_path / "net.gguf")
    one, other = (t for t in gguf.GGUFReader(tmp_path / "net.gguf").tensors if t.name.endswith("weight"))
    assert one.tensor_type.name == other.tensor_type.name == "Q8_0"
    assert one.data.tobytes() == other.data.tobytes()


def test_sizes_that_diffusers_takes_for_granted_are_told(tmp_path: Path) -> None:
    said = writer.write(of("flux"), tmp_path / "net.gguf")
    assert any(
        s.startswith(
            "diffusers takes 3072 rows of single_blocks.0.linear1.weight for its first part, which has 32"
        )
        for s in said
    )
    assert not any("takes" in s for s in writer.write(of("sd3"), tmp_path / "net.gguf"))

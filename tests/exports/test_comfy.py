"""Files for ComfyUI: comfy-kitchen, by which ComfyUI decodes them, makes our weights of them to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aquabit.exports.comfy import METADATA, check, is_ours, tiled, write
from aquabit.exports.comfy_names import plan_of
from aquabit.exports.comfy_reader import read
from aquabit.exports.exported import check_activations
from aquabit.exports.gguf_names import LDM
from aquabit.exports.readers import read_others
from aquabit.graph import layers, trace
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.quant.model import fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Rounding, Scheme
from aquabit.targets import COMFY, TARGETS
from tests.exports.networks import NETWORKS, flux, sdxl
from tests.exports.networks import made as published
from tests.exports.small_models import Case, Exported, case, refused, small_dit, small_unet

LIBRARY = "comfy-kitchen is not installed; ComfyUI decodes by it"
EACH = ("fp8", "nvfp4", "int8", "mxfp8")


def linear(i: int, name: str, shape: tuple[int, ...]) -> str:
    """A scheme for a Linear layer, so that all occur; one stays dense."""
    scheme = EACH[i % len(EACH)]
    if len(shape) == 4 or i == 4:
        return "fp"
    even = {"nvfp4": 16, "mxfp8": 32}.get(scheme, 1)
    return "int8" if any(size % even for size in shape) else scheme


@pytest.fixture(params=[small_dit, small_unet], ids=["dit", "unet"])
def made(request: pytest.FixtureRequest) -> Case:
    return case(request.param(), linear, again=request.param())


def decoded(file: dict[str, torch.Tensor], layer: str, kind: str) -> torch.Tensor:
    """A layer's weight in float32, by the layout that ComfyUI enters for its format."""
    ck = pytest.importorskip("comfy_kitchen.tensor", reason=LIBRARY)
    weight, scale = file[f"{layer}.weight"], file[f"{layer}.weight_scale"]
    shape = tuple(weight.shape)
    if kind == "nvfp4":
        layout = ck.TensorCoreNVFP4Layout
        shape = (shape[0], 2 * shape[1])
        over = file[f"{layer}.weight_scale_2"]
        params = layout.Params(scale=over, orig_dtype=torch.float32, orig_shape=shape, block_scale=scale)
    else:
        layout = {
            "float8_e4m3fn": ck.TensorCoreFP8Layout,
            "int8_tensorwise": ck.TensorWiseINT8Layout,
            "mxfp8": ck.TensorCoreMXFP8Layout,
        }[kind]
        params = layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=shape)
    found: torch.Tensor = layout.dequantize(weight, params)
    return found


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()[METADATA])
    return found


def test_what_it_decodes_is_our_weight(made: Case, tmp_path: Path) -> None:
    check(made.exported)
    out = tmp_path / "model.safetensors"
    said = write(made.exported, out)
    about, file = header(out), load_file(out)
    assert about["format_version"] == "1.0" and about["layers"].keys() == made.decoded.keys()
    assert {row["format"] for row in about["layers"].values()} == {
        "float8_e4m3fn",
        "nvfp4",
        "int8_tensorwise",
        "mxfp8",
    }
    assert all(row["full_precision_matrix_mult"] for row in about["layers"].values())
    for name, weight in made.decoded.items():
        assert torch.equal(decoded(file, name, about["layers"][name]["format"]), weight), name
    assert "its own names: ComfyUI knows no such model" in said[0]
    dense = {
        k: t for k, t in made.reference.state_dict().items() if k.removesuffix(".weight") not in made.decoded
    }
    assert all(torch.equal(file[k].float(), t.float()) for k, t in dense.items())


def uniform(net: Any, chosen: Callable[[str, tuple[int, ...]], str], act: Rounding = 16) -> Exported:
    """Linear layers by ``chosen``, whatever it names that is not ``fp``."""
    graph = trace(net)
    found = {
        n: chosen(n, tuple(node["shape"])) for n, node in layers(graph).items() if node["kind"] == "linear"
    }
    choices = {n: LayerChoice(Scheme.parse(s), act) for n, s in found.items() if s != "fp"}
    state = net.state_dict()
    weights = {n: quantize_weight(state[f"{n}.weight"], c.weight) for n, c in choices.items()}
    return Exported(net, QuantConfig(fingerprint(net), choices), graph, weights)


def test_inputs_at_i8_are_rounded_as_comfyui_rounds_them(tmp_path: Path) -> None:
    pytest.importorskip("comfy_kitchen.tensor", reason=LIBRARY)
    from comfy_kitchen.backends.eager.quantization import quantize_int8_rowwise

    exported = uniform(small_dit(), lambda name, shape: "int8", "i8")
    check_activations(exported.config, TARGETS["comfy"].beside)
    said = write(exported, tmp_path / "model.safetensors")
    rows = header(tmp_path / "model.safetensors")["layers"].values()
    assert not any("full_precision_matrix_mult" in row for row in rows)
    assert not any("quantized here" in text for text in said)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * 3
    codes, scales = quantize_int8_rowwise(x)
    # it divides by the scale, ours are multiplied by its inverse: a tie may go to the other side
    apart = (codes * scales - fake_quantize(x, "i8")).abs()
    assert (apart > 1e-6).float().mean() < 1e-3 and (apart <= scales * 1.001).all()
    wrong = QuantConfig("f", {"a": LayerChoice(Scheme.parse("fp8"), "i8")})
    with pytest.raises(AquabitError, match="layer 'a' cannot be fp8 at i8: ComfyUI multiplies inputs"):
        check_activations(wrong, TARGETS["comfy"].beside)
    wrong = QuantConfig("f", {"a": LayerChoice(Scheme.parse("fp8"), "f8")})
    with pytest.raises(AquabitError, match="layer 'a' cannot be fp8 at f8: comfy has no f8; leave its"):
        check_activations(wrong, TARGETS["comfy"].beside)


@pytest.mark.parametrize(("act", "told"), [(16, True), ("i8", False)])
def test_int8_whose_inputs_are_not_rounded_is_told_of(act: Rounding, told: bool, tmp_path: Path) -> None:
    """ComfyUI rounds the inputs of int8 layers whatever the file says, and of others as it says."""
    made = uniform(small_dit(), lambda name, shape: "int8" if "ff" in name else "mxfp8")
    own = {k: replace(c, act=act) if "ff" in k else c for k, c in made.config.layers.items()}
    exported = replace(made, config=replace(made.config, layers=own))
    said = [text for text in write(exported, tmp_path / "f.safetensors") if "ComfyUI rounds" in text]
    assert len(said) == told
    assert not told or f"which those of {sum('ff' in k for k in own)} layers are not here" in said[0]


def eights(block: bool) -> Callable[[str, tuple[int, ...]], str]:
    """int8 everywhere, or mxfp8 wherever it fits."""
    return lambda _, shape: "mxfp8" if block and not any(size % 32 for size in shape) else "int8"


@pytest.mark.parametrize("block", [False, True], ids=["int8", "mxfp8"])
@pytest.mark.parametrize("build", [flux, sdxl])
def test_published_names_and_joined_rows(build: Callable[[], Any], block: bool, tmp_path: Path) -> None:
    """Flux has q, k and v in one tensor, and the last scales and shifts the other way round."""
    torch.manual_seed(0)
    net = build().eval()
    exported = uniform(net, eights(block), act=8)
    check(exported)
    said = write(exported, tmp_path / "f.safetensors")
    about, file = header(tmp_path / "f.safetensors"), load_file(tmp_path / "f.safetensors")
    assert "with the published names" in said[0] and "activations of" in said[1]
    assert not any("full_precision_matrix_mult" in row for row in about["layers"].values())
    names = (
        {"double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"}
        if build is flux
        else {"model.diffusion_model.input_blocks.4.1.proj_in"}
    )
    assert names <= about["layers"].keys()
    from aquabit.exports.gguf_names import reference_names

    found = reference_names(type(net).__name__, list(net.state_dict()))
    assert found is not None
    for place in found[1]:
        parts = [part.removesuffix(".weight") for part in place.parts]
        if parts[0] not in exported.weights:
            continue
        rows = torch.cat([exported.weights[part].dequantize() for part in parts])
        wanted = torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows
        layer = place.name.removesuffix(".weight")
        assert torch.equal(decoded(file, layer, about["layers"][layer]["format"]), wanted)
    graph = trace(net)
    graph.graph["model_class"] = type(net).__name__
    config = read(tmp_path / "f.safetensors", graph, "mine")
    assert [n for n in layers(graph) if config[n] != replace(exported.config[n], act=16)] == []


@pytest.mark.parametrize("shape", [(16, 1), (128, 4), (130, 5), (300, 12)])
def test_scales_lie_as_tensor_cores_take_them(shape: tuple[int, int]) -> None:
    scales = torch.randint(0, 120, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    pytest.importorskip("comfy_kitchen.float_utils", reason=LIBRARY)
    from comfy_kitchen.float_utils import to_blocked

    assert torch.equal(tiled(scales), to_blocked(scales, flatten=False))


@pytest.mark.parametrize(
    ("build", "layer", "scheme", "why"),
    [
        (small_unet, "conv_in", "int8", "ComfyUI quantizes Linear layers"),
        (small_dit, "proj_out_1", "int4g64", "ComfyUI's formats are fp8, nvfp4, mxfp8, int8"),
        (small_dit, "proj_out_1", "fp8c", "ComfyUI's formats are fp8, nvfp4, mxfp8, int8"),
        (small_dit, "proj_out_2", "nvfp4", "rows and inputs of [4, 128] must be multiples of 16"),
        (small_dit, "proj_out_2", "mxfp8", "rows and inputs of [4, 128] must be multiples of 32"),
        (flux, "transformer_blocks.0.attn.to_q", "int8", "they are one tensor of ComfyUI's"),
        (small_dit, "proj_out_1", "nvfp4", ""),
        (flux, "context_embedder", "nvfp4", "ComfyUI tells the model's sizes from its inputs"),
        (flux, "context_embedder", "mxfp8", ""),
        (flux, "transformer_blocks.0.ff.net.2", "nvfp4", ""),
    ],
)
def test_what_it_cannot_hold_is_refused(build: Any, layer: str, scheme: str, why: str) -> None:
    said = refused(check, build(), layer, scheme)
    assert why in said and bool(said) == bool(why)


# whose second dimension ComfyUI 0.29.0 reads, comfy/model_detection.py: detect_unet_config and
# calculate_transformer_depth
SIZED = ("img_in", "txt_in", "txt_in.input_embedder", "vector_in.in_layer", "y_embedder.mlp.0")
SIZED = (
    *SIZED,
    "context_embedder",
    "cond_seq_linear",
    "cap_embedder.1",
    "x_embedder.proj.1",
    "label_emb.0.0",
)
FIRST = re.compile(r"((in|out)put_blocks\.\d+\.1\.|middle_block\.1\.|^)transformer_blocks\.0\.attn2\.to_k$")


UNUSED = {  # read for others of their kind
    ("Chroma", "img_in"),
    ("Hunyuan", "vector_in.in_layer"),
    ("QwenImage", "txt_in"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_tells_sizes_is_not_packed(name: str) -> None:
    network = published(name)
    own, nvfp4 = type(network).__name__, Scheme.parse("nvfp4")
    linear = {k for k, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    found, wanted = set(), set()
    for place in plan_of(network).places:
        there = place.name.removeprefix(LDM).removesuffix(".weight")
        parts = {part.removesuffix(".weight") for part in place.parts} & linear
        if there in SIZED and not any(own.startswith(kind) and there == read for kind, read in UNUSED):
            wanted |= parts
        if FIRST.search(there) and not own.startswith("Cosmos"):
            wanted |= parts
        found |= {part for part in parts if COMFY.network(nvfp4, part, {"shape": (64, 64)}, own)}
    assert found == wanted
    assert bool(found) or own.startswith(("Wan", "SkyReels", "ChronoEdit", "HiDream"))


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
def test_layers_of_one_tensor_share_no_scale_of_their_own(scheme: str) -> None:
    def chosen(name: str, shape: tuple[int, ...]) -> str:
        return scheme if name.startswith("transformer_blocks.0.attn.to_") else "fp"

    with pytest.raises(AquabitError, match=r"to_k .*img_attn\.qkv.* together they can be int8, mxfp8 or fp"):
        check(uniform(flux(), chosen))


def test_what_was_written_is_read(made: Case, tmp_path: Path) -> None:
    out, graph = tmp_path / "f.safetensors", made.exported.graph
    write(made.exported, out)
    found = read_others(out, graph, "mine")
    assert found is not None and found.fingerprint == "mine"
    assert {k: c for k, c in found.layers.items() if c.weight != FP} == made.exported.config.layers


def marked(path: Path, net: Any, said: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """A file with a tensor of JSON beside a layer's weight, as ComfyUI itself writes them."""
    state = {k: t.contiguous() for k, t in net.state_dict().items()} | tensors
    for layer, value in said.items():
        state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    save_file(state, path)
    return path


def test_files_of_others_are_read(tmp_path: Path) -> None:
    net, layer = small_dit(), "proj_out_1"
    graph, path = trace(net), tmp_path / "f.safetensors"
    found = read_others(marked(path, net, {layer: {"format": "mxfp8", "full_precision": True}}), graph, "f")
    assert found is not None and {n: str(c.weight) for n, c in found.layers.items() if c.weight != FP} == {
        layer: "mxfp8"
    }
    cast = net.get_submodule(layer).weight.detach().to(torch.float8_e4m3fn)
    found = read_others(marked(path, net, {}, **{f"{layer}.weight": cast}), graph, "f")
    assert found is not None and str(found[layer].weight) == "fp8" and found["proj_out_2"].weight == FP


@pytest.mark.parametrize(
    ("said", "tensors", "why"),
    [
        ({"format": "float8_e5m2"}, {}, "formats that are no schemes here: float8_e5m2 (1 layers)"),
        ({"format": "int8_tensorwise", "convrot": True}, {}, "int8_tensorwise of rotated weights (1 layers)"),
        ({"format": "int8_tensorwise", "params": {"convrot": True}}, {}, "int8_tensorwise of rotated"),
        ({"format": 3}, {}, "proj_out_1.comfy_quant"),
        ([], {}, "proj_out_1.comfy_quant"),
        ({"format": "nvfp4"}, {}, "proj_out_1.weight is [256, 256] there, [256, 128] here"),
        (
            {"format": "int8_tensorwise"},
            {"proj_out_1.weight": torch.ones(3, 128)},
            "proj_out_1.weight is [3, 128] there, [256, 128] here",
        ),
        ({"format": "fp8"}, {"proj_out_2.comfy_quant": torch.ones(2)}, "comfy_quant must be bytes"),
    ],
)
def test_what_no_scheme_is_and_what_is_damaged_is_refused(
    said: Any, tensors: dict[str, torch.Tensor], why: str, tmp_path: Path
) -> None:
    net = small_dit()
    path = marked(tmp_path / "f.safetensors", net, {"proj_out_1": said}, **tensors)
    with pytest.raises(AquabitError, match=re.escape(why)):
        read_others(path, trace(net), "f")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    net, path = small_dit(), tmp_path / "f.safetensors"
    state = {k: t.contiguous() for k, t in net.state_dict().items()}
    for version, known in (("1.3", True), ("2.0", False)):
        about = {"format_version": version, "layers": {"proj_out_1": {"format": "mxfp8"}}}
        save_file(state, path, {METADATA: json.dumps(about)})
        if known:
            assert str(read(path, trace(net), "f")["proj_out_1"].weight) == "mxfp8"
            continue
        with pytest.raises(AquabitError, match=r"is of format version '2\.0'; known is 1\.0"):
            read(path, trace(net), "f")


def test_a_file_of_another_model_and_a_dense_one(tmp_path: Path) -> None:
    other = marked(tmp_path / "other.safetensors", small_unet(), {"conv_in": {"format": "mxfp8"}})
    with pytest.raises(AquabitError, match="is no file of this model: it lacks"):
        read_others(other, trace(small_dit()), "f")
    dense = marked(tmp_path / "dense.safetensors", small_dit(), {})
    assert read_others(dense, trace(small_dit()), "f") is None
    dense.write_bytes(dense.read_bytes()[:100])
    with pytest.raises(AquabitError, match="it may be truncated"):
        read_others(dense, trace(small_dit()), "f")


def test_only_files_of_ours_are_replaced(made: Case, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    write(made.exported, out)
    assert is_ours(out)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("not one")
    assert not is_ours(tmp_path / "other.safetensors") and not is_ours(tmp_path / "text")

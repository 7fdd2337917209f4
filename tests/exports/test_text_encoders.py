"""Folders of text encoders: transformers loads them by the program that they are for, and what that decodes
is ours to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from torch import Tensor

from aquabit import packing, workflows
from aquabit.exports import bitsandbytes, comfy, comfy_names, gguf, gguf_reader, sdnq, torchao_files
from aquabit.exports.model_folder import MODEL_WEIGHTS, loader_of
from aquabit.exports.readers import read_others
from aquabit.graph import fixed_layers, layers
from aquabit.graph import trace as trace_network
from aquabit.pipelines import load, network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme
from aquabit.targets import TARGETS
from tests.command_line import run
from tests.exports import test_bitsandbytes, test_comfy, test_sdnq, test_torchao_files
from tests.exports.small_models import case, refused
from tests.tiny_pipelines import randomised, sd3

CALL = {"input_ids": torch.arange(12).reshape(2, 6)}


def clip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.CLIPTextModel(t.CLIPTextConfig(vocab_size=64, max_position_embeddings=16, **sizes)).eval()


def t5(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return t.T5EncoderModel(t.T5Config(vocab_size=64, **sizes, **more)).eval()


def gated() -> Any:
    """A T5 of version 1.1, as XXL is one."""
    return t5(feed_forward_proj="gated-gelu")


def output(net: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(**CALL).last_hidden_state
    return found


def by_sdnq(net: Any, name: str) -> Tensor:
    return test_sdnq.decoded(net, name)


def by_torchao(net: Any, name: str) -> Tensor:
    found: Tensor = net.get_submodule(name).weight.dequantize()
    return found


PROGRAMS: dict[str, tuple[Any, Any, Callable[[Any, str], Tensor]]] = {
    "sdnq": (sdnq, test_sdnq.every, by_sdnq),
    "bitsandbytes": (bitsandbytes, test_bitsandbytes.linear, test_bitsandbytes.decoded),
    "torchao": (torchao_files, test_torchao_files.linear, by_torchao),
}
LIBRARIES = {"sdnq": test_sdnq, "bitsandbytes": test_bitsandbytes, "torchao": test_torchao_files}


@pytest.mark.parametrize("make", [clip, t5])
@pytest.mark.parametrize("to", PROGRAMS)
def test_what_it_decodes_is_our_weight(to: str, make: Callable[[], Any], tmp_path: Path) -> None:
    program, chosen, decoded = PROGRAMS[to]
    test_sdnq.sdnq_library() if to == "sdnq" else pytest.importorskip(to, reason=LIBRARIES[to].LIBRARY)
    net, out = make(), tmp_path / "out"
    graph = trace_network(net, CALL)

    def held(i: int, name: str, shape: tuple[int, ...]) -> str:
        scheme = chosen(i, name, shape)
        return "fp" if refused(program.check, net, name, scheme, graph) else scheme

    made = case(net, held, again=make(), graph=graph)
    program.check(made.exported)
    said = " ".join(program.write(made.exported, out))
    assert f"transformers loads it: {type(net).__name__}" in said and ("import sdnq" in said) == (
        to == "sdnq"
    )
    assert loader_of(net) == "transformers" and (out / MODEL_WEIGHTS).is_file()
    again = type(net).from_pretrained(out, dtype=torch.float32)
    assert len(made.decoded) > len(layers(graph)) // 2
    for name, weight in made.decoded.items():
        assert torch.equal(decoded(again, name), weight), (name, made.exported.config[name])
    if to == "bitsandbytes":
        test_bitsandbytes.in_float32_(again)
    torch.testing.assert_close(output(again), output(made.reference), rtol=0, atol=1e-5)
    assert read_others(out, graph, fingerprint(net)) == made.exported.config


def test_what_t5_would_cast_is_refused() -> None:
    net, layer = t5(), "encoder.block.1.layer.1.DenseReluDense.wo"
    graph = trace_network(net, CALL)
    assert "T5EncoderModel casts its inputs" in refused(sdnq.check, net, layer, "int4", graph)
    assert refused(sdnq.check, net, layer, "int8", graph) == ""
    assert "because 'wo' stays so" in refused(bitsandbytes.check, net, layer, "nf4g64", graph)
    assert refused(torchao_files.check, net, layer, "int4", graph) == ""
    assert refused(sdnq.check, net, layer.replace("wo", "wi"), "int4", graph) == ""


# ---- for ComfyUI


def in_place(i: int, name: str, shape: tuple[int, ...]) -> str:
    """Formats of ComfyUI in turn; one layer stays dense."""
    return "fp" if i == 3 else ("fp8", "nvfp4", "int8", "mxfp8")[i % 4]


def test_a_file_for_comfyui_has_the_tensors_that_it_looks_for(tmp_path: Path) -> None:
    """comfy/text_encoders/t5.py: its T5 has the names of transformers, and the embedding once."""
    net, out = gated(), tmp_path / "t5.safetensors"
    graph = trace_network(net, CALL)
    made = case(net, in_place, again=gated(), graph=graph)
    comfy.check(made.exported)
    said = comfy.write(made.exported, out)
    assert "with the names of ComfyUI's text encoders" in said[0] and len(said) == 1
    file, about = load_file(out), test_comfy.header(out)["layers"]
    assert about.keys() == made.decoded.keys() and len(made.decoded) > len(layers(graph)) // 2
    embedding = "encoder.embed_tokens.weight"
    assert {k for k in file if "weight_scale" not in k} == net.state_dict().keys() - {embedding}
    for name, weight in made.decoded.items():
        assert torch.equal(test_comfy.decoded(file, name, about[name]["format"]), weight), name
    found = read_others(out, graph, fingerprint(net))
    assert found is not None
    assert {k: c for k, c in found.layers.items() if c.weight != FP} == made.exported.config.layers


LARGE = {"num_hidden_layers": 2, "vocab_size": 64}  # the rest is of the published size
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
LAYER = "model.layers.0"


def t5_xxl() -> Any:
    return t.T5EncoderModel(t.T5Config(**T5_XXL, vocab_size=32128, feed_forward_proj="gated-gelu"))


def umt5_xxl() -> Any:
    return t.UMT5EncoderModel(t.UMT5Config(**T5_XXL, vocab_size=256384))


def llama(kind: Any) -> Any:
    return kind(t.LlamaConfig(**LARGE, hidden_size=4096, num_key_value_heads=8))


def qwen3(kind: Any) -> Any:
    return kind(t.Qwen3Config(**LARGE, hidden_size=2560, num_key_value_heads=8, head_dim=128))


def qwen_vl() -> Any:
    text = {**LARGE, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    seen = {"depth": 1, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=seen))


def mistral() -> Any:
    text = t.MistralConfig(**LARGE, hidden_size=5120, num_key_value_heads=8, head_dim=128)
    vision = t.PixtralVisionConfig(num_hidden_layers=1)
    return t.Mistral3ForConditionalGeneration(t.Mistral3Config(text_config=text, vision_config=vision))


WI_1 = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


@pytest.mark.parametrize(
    ("make", "told_by"),
    [
        (t5_xxl, {WI_1: (10240, 4096), "encoder.final_layer_norm.weight": (4096,)}),
        (umt5_xxl, {WI_1: (10240, 4096), "shared.weight": (256384, 4096)}),
        (lambda: llama(t.LlamaModel), {f"{LAYER}.post_attention_layernorm.weight": (4096,)}),
        (lambda: llama(t.LlamaForCausalLM), {f"{LAYER}.self_attn.k_proj.weight": (1024, 4096)}),
        (lambda: qwen3(t.Qwen3Model), {f"{LAYER}.self_attn.q_norm.weight": (128,)}),
        (lambda: qwen3(t.Qwen3ForCausalLM), {f"{LAYER}.post_attention_layernorm.weight": (2560,)}),
        (
            lambda: t.Gemma2Model(t.Gemma2Config(**LARGE)),
            {f"{LAYER}.post_feedforward_layernorm.weight": (2304,)},
        ),
        (
            qwen_vl,
            {f"{LAYER}.self_attn.k_proj.bias": (512,), "visual.blocks.0.attn.qkv.weight": (3840, 1280)},
        ),
        (mistral, {f"{LAYER}.post_attention_layernorm.weight": (5120,)}),
    ],
    ids=["t5", "umt5", "llama", "llama-lm", "qwen3", "qwen3-lm", "gemma2", "qwen2.5-vl", "mistral3"],
)
def test_comfyui_tells_encoders_by_these_tensors(
    make: Callable[[], Any], told_by: dict[str, tuple[int, ...]]
) -> None:
    """Facts of ComfyUI 0.29.0: what detect_te_model, t5_xxl_detect and llama_detect look at."""
    with torch.device("meta"):
        net = make()
    state, plan = net.state_dict(), comfy_names.plan_of(net)
    shapes = {place.name: tuple(state[place.parts[0]].shape) for place in plan.places}
    assert plan.is_encoder and {k: shapes.get(k) for k in told_by} == told_by
    assert "model.norm.weight" in shapes or WI_1 in shapes  # whose dtype is the encoder's


def test_what_comfyui_would_load_as_it_stands_is_refused() -> None:
    layer, whole = "encoder.layers.1.mlp.fc1", clip()
    graph = trace_network(whole, CALL)
    assert "ComfyUI decodes no CLIP text encoder" in refused(comfy.check, whole, layer, "int8", graph)
    held = TARGETS["comfy"].on(layers(graph), str(graph.graph["model_class"]))
    assert held.dense.keys() == layers(graph).keys()
    assert held.notes[0].startswith("12 of 12 layers stay dense for comfy (ComfyUI decodes no CLIP")
    with torch.device("meta"):
        base = t.T5EncoderModel(t.T5Config(d_model=768, d_ff=3072, num_heads=12, num_layers=1))
    both, names = "SD3Transformer2DModel+T5EncoderModel+CLIPTextModel", ["q", "DenseReluDense.wi"]
    for name, module in base.named_modules():
        if name.endswith(tuple(names)):
            node = {"kind": "linear", "shape": tuple(module.weight.shape)}
            for prefix, own in (("", "T5EncoderModel"), ("text_encoder_3.", both)):
                why = TARGETS["comfy"].refusal(Scheme.parse("int8"), prefix + name, node, own)
                assert "no T5 text encoder but XXL, and this is" in str(why)
    node = {"kind": "linear", "shape": (4096, 10240)}
    wo = "encoder.block.1.layer.1.DenseReluDense.wo"
    assert TARGETS["comfy"].refusal(Scheme.parse("int8"), wo, node, "T5EncoderModel") is None
    assert TARGETS["comfy"].refusal(Scheme.parse("int8"), "blocks.1.ff", node, both) is None


def test_what_comfyui_wants_beside_weights_is_said(tmp_path: Path) -> None:
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    net, again = (t.UMT5EncoderModel(t.UMT5Config(vocab_size=64, **sizes)).eval() for _ in range(2))
    made = case(net, lambda i, name, shape: "int8", "i8", again=again, graph=trace_network(net, CALL))
    said = comfy.write(made.exported, tmp_path / "umt5.safetensors")
    assert "from the tensor spiece_model of the file, which is not written" in said[1]
    assert said[2].startswith("inputs of 7 layers are rounded here, and by ComfyUI's text encoders only")


def test_a_gguf_file_has_the_names_of_llama_cpp(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    net, out = gated(), tmp_path / "t5.gguf"
    graph = trace_network(net, CALL)
    made = case(net, lambda i, name, shape: ("q8_0", "q4_0", "fp")[i % 3], again=gated(), graph=graph)
    gguf.check(made.exported)
    said = gguf.write(made.exported, out)
    assert said[1] == "architecture t5encoder, with the names that ComfyUI-GGUF reads" and len(said) == 2
    known = package.get_tensor_name_map(package.MODEL_ARCH.T5ENCODER, 2)
    embedding = "encoder.embed_tokens.weight"
    wanted = {known.get_name(k, (".weight",)): k for k in net.state_dict() if k != embedding}
    reader = package.GGUFReader(out)
    assert {one.name for one in reader.tensors} == wanted.keys() and None not in wanted
    for one in reader.tensors:
        values = torch.tensor(package.dequantize(one.data, one.tensor_type))
        assert torch.equal(values.reshape(-1), made.reference.state_dict()[wanted[one.name]].reshape(-1))
    assert dict(gguf_reader.read_weights(out, graph)).keys() >= made.decoded.keys()
    old = gguf.plan_of(t5())  # version 1.0 has other layers, which llama.cpp's names do not tell apart
    assert old.architecture == gguf.OWN


# ---- several components that were quantized together


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline in a folder, of which the denoiser and a text encoder are quantized."""
    folder = tmp_path_factory.mktemp("pipe") / "sd3"
    randomised(sd3).save_pretrained(folder)
    return str(folder)


TOGETHER = "transformer,text_encoder_3"


def together(saved: str, schemes: tuple[str, ...]) -> tuple[Any, QuantConfig]:
    pipe, choices = load(saved, component=TOGETHER), dict[str, LayerChoice]()
    for i, (name, node) in enumerate(layers(trace(pipe)).items()):
        scheme = Scheme.parse(schemes[i % len(schemes)])
        if node["kind"] == "linear" and name not in fixed_layers(trace(pipe)):
            choices |= {} if scheme.refuses(tuple(node["shape"])) else {name: LayerChoice(scheme)}
    return pipe, QuantConfig(fingerprint(network_of(pipe)), choices)


def decoded_parts(pipe: Any, config: QuantConfig, bank: str) -> dict[str, dict[str, Tensor]]:
    """Component -> layer -> what is packed of it."""
    packed, found = packing.quantize(pipe, config, bank=bank).model, dict[str, dict[str, Tensor]]()
    for name in config.layers:
        part, _, layer = name.partition(".")
        found.setdefault(part, {})[layer] = packed.layers[name].packed.dequantize()
    return found


def test_each_component_has_a_folder(saved: str, tmp_path: Path) -> None:
    test_sdnq.sdnq_library()
    pipe, config = together(saved, ("int8", "int8g8"))
    bank, out = str(tmp_path / "bank"), tmp_path / "out"
    said = workflows.export_files(pipe, config, "sdnq", out, bank=bank)
    wanted = decoded_parts(pipe, config, bank)
    assert wanted.keys() == {"transformer", "text_encoder_3"} == {path.name for path in out.iterdir()}
    assert all(sentence.startswith(f"{out}/t") for sentence in said)
    for part, weights in wanted.items():
        net = type(getattr(pipe, part)).from_pretrained(out / part, torch_dtype=torch.float32)
        for name, weight in weights.items():
            assert torch.equal(test_sdnq.decoded(net, name), weight), (part, name)
        alone = load(saved, component=part)
        read = read_others(out / part, trace(alone), fingerprint(network_of(alone)))
        assert read is not None and read.layers.keys() == weights.keys()
    workflows.export_files(pipe, config, "sdnq", out, bank=bank)  # again, in its own place
    (out / "transformer" / "aquabit.json").unlink()
    with pytest.raises(AquabitError, match="out/transformer is there already and is none of aquabit's"):
        workflows.export_files(pipe, config, "sdnq", out, bank=bank)


def test_each_component_has_a_file(saved: str, tmp_path: Path) -> None:
    pipe, config = together(saved, ("q8_0",))
    workflows.export_files(pipe, config, "gguf", tmp_path / "m.gguf", bank=str(tmp_path / "bank"))
    wanted = decoded_parts(pipe, config, str(tmp_path / "bank"))
    assert wanted.keys() == {"transformer", "text_encoder_3"}
    for part, weights in wanted.items():
        alone = load(saved, component=part)
        found = dict(gguf_reader.read_weights(tmp_path / f"m-{part}.gguf", trace(alone)))
        for name, weight in weights.items():
            assert torch.equal(found[name], weight), (part, name)


def test_what_is_dense_altogether_is_not_written(saved: str, tmp_path: Path) -> None:
    pipe, config = together(saved, ("int8",))
    alone = {k: c for k, c in config.layers.items() if k.startswith("text_encoder_3.")}
    workflows.export_files(pipe, replace(config, layers=alone), "sdnq", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["text_encoder_3"]


def test_each_component_has_a_recipe(saved: str, tmp_path: Path) -> None:
    _, config = together(saved, ("int8", "int4"))
    (tmp_path / "config.json").write_text(config.to_json())
    words = ("export", saved, "config.json", "--component", TOGETHER, "--to", "quanto", "--out", "r.json")
    said = run(tmp_path, *words)
    for part in TOGETHER.split(","):
        found = json.loads((tmp_path / f"r-{part}.json").read_text())["config"]
        own = {k.removeprefix(f"{part}.") for k in config.layers if k.startswith(f"{part}.")}
        assert own and own <= found.keys() and f"r-{part}.json" in said.replace("\n", "")
    files = run(tmp_path, *words[:-3], "sdnq", "--out", "folders")
    assert "folders/transformer: transformers" not in files and (tmp_path / "folders/transformer").is_dir()

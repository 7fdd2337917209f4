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
from torch import Tensor

from aquabit import packing, workflows
from aquabit.exports import bitsandbytes, gguf_reader, sdnq, torchao_files
from aquabit.exports.model_folder import MODEL_WEIGHTS, loader_of
from aquabit.exports.readers import read_others
from aquabit.graph import fixed_layers, layers
from aquabit.graph import trace as trace_network
from aquabit.pipelines import load, network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Scheme
from tests.command_line import run
from tests.exports import test_bitsandbytes, test_sdnq, test_torchao_files
from tests.exports.small_models import case, refused
from tests.tiny_pipelines import randomised, sd3

CALL = {"input_ids": torch.arange(12).reshape(2, 6)}


def clip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.CLIPTextModel(t.CLIPTextConfig(vocab_size=64, max_position_embeddings=16, **sizes)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return t.T5EncoderModel(t.T5Config(vocab_size=64, **sizes)).eval()


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

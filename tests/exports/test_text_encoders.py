"""Folders of text encoders: transformers loads them by the program that they are for, and what that decodes
is ours to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from aquabit.exports import bitsandbytes, sdnq, torchao_files
from aquabit.exports.model_folder import MODEL_WEIGHTS, loader_of
from aquabit.exports.readers import read_others
from aquabit.graph import layers, trace
from aquabit.quant.model import fingerprint
from tests.exports import test_bitsandbytes, test_sdnq, test_torchao_files
from tests.exports.small_models import case, refused

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
    graph = trace(net, CALL)

    def held(i: int, name: str, shape: tuple[int, ...]) -> str:
        scheme = chosen(i, name, shape)
        return "fp" if refused(program.check, net, name, scheme, graph) else scheme

    made = case(net, held, again=make(), graph=graph)
    program.check(made.exported)
    assert f"transformers loads it: {type(net).__name__}" in " ".join(program.write(made.exported, out))
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
    graph = trace(net, CALL)
    assert "T5EncoderModel casts its inputs" in refused(sdnq.check, net, layer, "int4", graph)
    assert refused(sdnq.check, net, layer, "int8", graph) == ""
    assert "because 'wo' stays so" in refused(bitsandbytes.check, net, layer, "nf4g64", graph)
    assert refused(torchao_files.check, net, layer, "int4", graph) == ""
    assert refused(sdnq.check, net, layer.replace("wo", "wi"), "int4", graph) == ""

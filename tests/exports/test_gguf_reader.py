"""Reading GGUF files: ours come back as they were written, those of others as the programs write them, and
what is of another model is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from aquabit.exports import gguf as writer
from aquabit.exports.exported import Exported
from aquabit.exports.gguf_names import LDM
from aquabit.exports.gguf_reader import read, read_weights
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Scheme
from tests.exports.networks import NETWORKS
from tests.exports.test_gguf import decoded, graph_of, of

gguf = pytest.importorskip("gguf")


def graph_for(name: str) -> Any:
    graph = graph_of(of(name).network)
    graph.graph["model_class"] = type(of(name).network).__name__
    return graph


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_written_is_read(name: str, tmp_path: Path) -> None:
    one, graph, path = of(name), graph_for(name), tmp_path / "net.gguf"
    writer.write(one, path)
    config = read(path, graph, "mine")
    assert config.fingerprint == "mine" and {c.act for c in config.layers.values()} == {16}
    assert [n for n in graph if config[n] != one.config[n]] == []
    wanted, found = decoded(one), dict(read_weights(path, graph))
    assert set(found) == set(graph)
    assert [n for n, w in found.items() if not torch.equal(w, wanted[f"{n}.weight"].float())] == []


def others(path: Path, tensors: dict[str, Any], **shapes: tuple[int, ...]) -> Path:
    """A file as the gguf package writes it: name -> (values, type)."""
    file = gguf.GGUFWriter(path, "flux")
    for name, (values, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        data = np.asarray(values, np.float32)
        packed = gguf.quants.quantize(data, number) if kind not in ("F32", "IQ2_XS") else data
        if kind == "IQ2_XS":  # which the package only decodes
            packed = np.zeros((data.shape[0], data.shape[1] // 256 * 74), np.uint8)
        file.add_tensor(name, packed, raw_dtype=number)
    for name, shape in shapes.items():
        file.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def small() -> Any:
    """A graph of two layers."""
    return graph_of(nn.ModuleDict({"a": nn.Linear(256, 4), "b": nn.Conv2d(64, 8, 2)}))


A, B = np.random.default_rng(0).normal(size=(4, 256)), np.random.default_rng(1).normal(size=(8, 64, 2, 2))


@pytest.mark.parametrize("prefix", ["", LDM])
def test_a_file_of_others_is_read(tmp_path: Path, prefix: str) -> None:
    tensors = {
        f"{prefix}a.weight": (A, "Q4_0"),
        f"{prefix}b.weight": (B.reshape(8, 256), "Q8_0"),
        f"{prefix}unknown": (A, "F32"),
    }
    path = others(tmp_path / "f.gguf", tensors, **{f"{prefix}b.weight": (8, 64, 2, 2)})
    assert {n: str(c.weight) for n, c in read(path, small(), "f").layers.items()} == {
        "a": "q4_0",
        "b": "q8_0",
    }
    found = dict(read_weights(path, small()))
    four, eight = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    wanted = gguf.quants.dequantize(gguf.quants.quantize(A.astype(np.float32), four), four)
    assert np.array_equal(found["a"].numpy(), wanted)
    wanted = gguf.quants.dequantize(gguf.quants.quantize(B.reshape(8, 256).astype(np.float32), eight), eight)
    assert np.array_equal(found["b"].numpy(), wanted.reshape(8, 64, 2, 2))


def test_dense_layers_are_fp(tmp_path: Path) -> None:
    path = others(tmp_path / "f.gguf", {"a.weight": (A, "BF16"), "b.weight": (B, "F16")})
    assert not read(path, small(), "f").layers
    found = dict(read_weights(path, small()))
    assert torch.equal(found["a"], torch.tensor(A, dtype=torch.float32).bfloat16().float())
    assert torch.equal(found["b"], torch.tensor(B, dtype=torch.float32).half().float())


def test_layers_that_must_stay_dense_stay(tmp_path: Path) -> None:
    graph = small()
    graph.graph["unread"] = ["a"]
    path = others(tmp_path / "f.gguf", {"a.weight": (A, "IQ2_XS"), "b.weight": (B, "F16")})
    assert str(read(path, graph, "f")["a"].weight) == "fp"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.weight": (A, "Q4_0")}, r"f.gguf is no file of this model: it lacks 'b.weight' \(1 of 2 tensors"),
        (
            {"a.weight": (A[:2], "Q4_0"), "b.weight": (B, "F16")},
            r"no file of this model: a.weight is \[2, 256\] there, \[4, 256\] here",
        ),
        (
            {"a.weight": (A, "F16"), "b.weight": (B.reshape(8, 256), "Q8_0")},
            r"b.weight is \[8, 256\] there, \[8, 64, 2, 2\] here",
        ),
        (
            {"a.weight": (A, "IQ2_XS"), "b.weight": (B, "F16")},
            r"f.gguf has layers of types that are no schemes here: IQ2_XS \(1 tensors\)",
        ),
    ],
)
def test_what_is_of_another_model_is_refused(tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    path = others(tmp_path / "f.gguf", tensors)
    with pytest.raises(AquabitError, match=said):
        read(path, small(), "f")


def test_a_model_of_several_networks_is_refused(tmp_path: Path) -> None:
    path, graph = others(tmp_path / "f.gguf", {"a.weight": (A, "F16"), "b.weight": (B, "F16")}), small()
    graph.graph["parts"] = ["transformer", "transformer_2"]
    with pytest.raises(AquabitError, match="the model has transformer, transformer_2; give one component"):
        read(path, graph, "f")


def test_decoding_says_what_it_needs(tmp_path: Path) -> None:
    path = others(tmp_path / "f.gguf", {"a.weight": (A, "F16"), "b.weight": (B, "F16")})
    with (
        patch.dict(sys.modules, {"gguf": None}),
        pytest.raises(AquabitError, match="install or update it: pip install"),
    ):
        next(read_weights(path, small()))


def test_a_convolution_of_ours_comes_back(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(256, 4), "b": nn.Conv2d(64, 8, 2)}).requires_grad_(False)
    coded = {n: quantize_weight(network[n].weight, s) for n, s in (("a", "q4_K"), ("b", "q3_K"))}
    config = QuantConfig(
        "f", {n: LayerChoice(Scheme.parse(s), 16) for n, s in (("a", "q4_K"), ("b", "q3_K"))}
    )
    path = tmp_path / "f.gguf"
    writer.write(Exported(network, config, graph_of(network), coded), path)
    assert read(path, small(), "f") == config
    found = dict(read_weights(path, small()))
    assert all(torch.equal(found[n], coded[n].dequantize()) for n in coded)


def test_blocks_that_cross_rows_are_decoded_but_no_scheme(tmp_path: Path) -> None:
    """As converters of U-Nets write a layer of 64 inputs: in rows of 256."""
    values = np.random.default_rng(2).normal(size=(2, 256)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    file = gguf.GGUFWriter(tmp_path / "f.gguf", "sd1")
    packed = np.zeros((2, 144), np.uint8)  # of Q4_K, which the package only decodes
    file.add_tensor("a.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    file.add_tensor("b.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    file.add_array("comfy.gguf.orig_shape.a.weight", [8, 64])
    file.add_array("comfy.gguf.orig_shape.b.weight", [8, 64])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    graph = graph_of(nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8)}))
    with pytest.raises(
        AquabitError,
        match=r"q4_K for layer 'a', whose rows of 64 weights its blocks cross \(1 such layers\); no scheme",
    ):
        read(tmp_path / "f.gguf", graph, "f")
    found = dict(read_weights(tmp_path / "f.gguf", graph))
    wanted = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    assert np.array_equal(found["b"].numpy(), wanted.reshape(8, 64)) and not found["a"].any()

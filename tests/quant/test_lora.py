"""LoRAs: names of every trainer, arithmetic against a layer's own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aquabit.quant.layers import quant_layer
from aquabit.quant.lora import ABOUT, LowRank, by_component, fuse_, low_ranks, read_lora
from aquabit.scheme import AquabitError

A, B = torch.randn(2, 6), torch.randn(4, 2)
NAMES = {
    "peft": ("x.to_q.lora_A.weight", "x.to_q.lora_B.weight", "x.to_q.alpha"),
    "peft, named": ("x.to_q.lora_A.default.weight", "x.to_q.lora_B.default.weight", "x.to_q.alpha"),
    "diffusers": ("x.to_q.lora.down.weight", "x.to_q.lora.up.weight", "x.to_q.lora.down.weight.alpha"),
    "processors": ("x.to_q_lora.down.weight", "x.to_q_lora.up.weight", "x.to_q.alpha"),
    "kohya": ("x.to_q.lora_down.weight", "x.to_q.lora_up.weight", "x.to_q.alpha"),
    "encoders": (
        "x.to_q.lora_linear_layer.down.weight",
        "x.to_q.lora_linear_layer.up.weight",
        "x.to_q.alpha",
    ),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_of_every_trainer(names: tuple[str, str, str]) -> None:
    state = {names[0]: A, names[1]: B}
    (name, plain), (_, half) = (
        next(iter(low_ranks(state, {}, alphas, "f").items())) for alphas in ({}, {names[2]: 1.0})
    )
    assert name == "x.to_q"
    torch.testing.assert_close(plain.delta(), B @ A)
    torch.testing.assert_close(half.delta(), 0.5 * B @ A)


def test_a_file_says_its_alphas(tmp_path: Path) -> None:
    state = {
        f"t.{n}.{part}.weight": m.clone() for n in ("a", "b.c") for part, m in (("lora_A", A), ("lora_B", B))
    }
    about = {"t.lora_alpha": 6, "t.r": 2, "t.alpha_pattern": {"c": 1}}
    save_file(state, tmp_path / "l.safetensors", {ABOUT: json.dumps(about)})
    found = low_ranks(*read_lora(tmp_path / "l.safetensors"), {}, "l")
    assert {n: part.scale for n, part in found.items()} == {"t.a": 3.0, "t.b.c": 0.5}
    rooted = low_ranks(state, {**about, "t.use_rslora": True}, {}, "l")
    assert rooted["t.a"].scale == pytest.approx(6 / 2**0.5)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv = nn.Linear(6, 4), nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])


@pytest.mark.parametrize("layer", ["to_q", "conv"])
def test_fused_and_beside_are_the_same_function(layer: str) -> None:
    model = Pair()
    down, up = (A, B) if layer == "to_q" else (torch.randn(2, 3, 3, 3), torch.randn(5, 2))
    part, x = LowRank(down, up, 0.7), torch.randn(2, 6) if layer == "to_q" else torch.randn(2, 3, 8, 8)
    own: Any = model.get_submodule(layer)
    geometry = () if layer == "to_q" else (own.stride, own.padding, own.dilation, own.groups)
    with torch.no_grad():
        before = own(x)
        beside = before + (part.conv2d(x, *geometry) if geometry else part.linear(x))
        fuse_(model, {layer: part})
        torch.testing.assert_close(own(x), beside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(beside, before, atol=1e-2)


def test_components_and_lists_are_found() -> None:
    part = LowRank(torch.randn(2, 4), torch.randn(4, 2), 1.0)
    modules = {"unet": Pair(), "text_encoder": Pair()}
    given = {"unet.processor.to_out": part, "text_encoder.to_out.0": part, "base_model.model.to_out.0": part}
    found = by_component(given, modules, "unet", "f")
    assert {k: list(v) for k, v in found.items()} == {"unet": ["to_out.0"], "text_encoder": ["to_out.0"]}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "holds no lora_A"),
        ({"x.weight": A}, "'x.weight' is no part of one"),
        ({"x.lora_A.weight": A}, "'x' is no part of one"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B, "x.dora_scale": B}, "'x.dora_scale' is no part"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B.T}, r"shapes \[2, 6\] and \[2, 4\]"),
        ({"x.lora_A.weight": A * torch.inf, "x.lora_B.weight": B}, "NaN or Inf"),
    ],
)
def test_what_is_no_lora_is_refused(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AquabitError, match=message):
        low_ranks(state, {}, {}, "the LoRA f")


def test_another_model_and_damaged_files_are_refused(tmp_path: Path) -> None:
    part = LowRank(A, B, 1.0)
    for name, said in (("to_k", "'to_k' .* is not there"), ("to_out.0", r"'to_out.0' of \[4, 6\], which is")):
        with pytest.raises(AquabitError, match=f"f is for another model: it changes {said}"):
            by_component({name: part}, {"unet": Pair()}, "unet", "f")
    (tmp_path / "l.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(AquabitError, match=r"cannot be read .*; give a \.safetensors file"):
        read_lora(tmp_path / "l.safetensors")
    with pytest.raises(AquabitError, match="DoRA"):
        low_ranks({"t.x.lora_A.weight": A, "t.x.lora_B.weight": B}, {"t.use_dora": True}, {}, "f")


@pytest.mark.parametrize("layer", ["to_q", "conv"])
def test_a_branch_reads_what_comes_in_before_it_is_rounded(layer: str) -> None:
    model = Pair()
    down, up = (A, B) if layer == "to_q" else (torch.randn(2, 3, 3, 3), torch.randn(5, 2))
    part, x = LowRank(down, up, 0.7), torch.randn(2, 6) if layer == "to_q" else torch.randn(2, 3, 8, 8)
    dense: Any = model.get_submodule(layer)
    geometry = () if layer == "to_q" else (dense.stride, dense.padding, dense.dilation, dense.groups)
    quantized = quant_layer(dense)
    quantized.act = 4
    before = quantized(x)
    quantized.branches.append(part)
    beside = part.conv2d(x, *geometry) if geometry else part.linear(x)
    torch.testing.assert_close(quantized(x), before + beside, rtol=0, atol=0)

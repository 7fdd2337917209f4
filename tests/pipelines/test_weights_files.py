"""Files that lack weights, or name them otherwise, are refused by name: nothing runs on random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquabit.pipelines import load
from aquabit.scheme import AquabitError
from tests.tiny_pipelines import tiny

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
DENSE, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flux") / "pipe"
    tiny("flux").save_pretrained(out)
    return out


def refused(folder: Path, file: str, change: Change) -> str:
    """What is said of a pipeline whose file is changed; the file is what it was afterwards."""
    path = folder / file
    before = path.read_bytes()
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    try:
        save_file(change(tensors), path, {"format": "pt"})
        with pytest.raises(AquabitError) as said:
            load(str(folder))
    finally:
        path.write_bytes(before)
    return str(said.value)


def without(name: str) -> Change:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def renamed(rule: Callable[[str], str]) -> Change:
    return lambda tensors: {rule(k): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("file", "lacking", "count"),
    [
        (f"transformer/{DENSE}", "x_embedder.weight", 1),
        (f"vae/{DENSE}", "decoder.conv_in.bias", 1),
        (f"text_encoder/{TEXT}", "encoder.layers.0.layer_norm1.weight", 1),
        (f"text_encoder_2/{TEXT}", "encoder.block.0.layer.1.layer_norm.weight", 1),
    ],
)
def test_a_missing_weight_is_named(folder: Path, file: str, lacking: str, count: int) -> None:
    said = refused(folder, file, without(lacking))
    part = file.split("/")[0]
    assert f"{part} lacks {count} of " in said and f"({lacking}); its file is incomplete" in said


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "model.diffusion_model."])
@pytest.mark.parametrize("file", [f"transformer/{DENSE}", f"text_encoder_2/{TEXT}"])
def test_a_prefix_is_named(folder: Path, prefix: str, file: str) -> None:
    said = refused(folder, file, renamed(lambda name: prefix + name))
    assert "meta" not in said and " more): " in said and f"have {prefix!r} in them, as {prefix}" in said


def test_what_wraps_a_part_is_named(folder: Path) -> None:
    said = refused(
        folder, f"transformer/{DENSE}", renamed(lambda n: n.replace("norm_out.", "norm_out._orig_mod."))
    )
    assert "lacks 2 of" in said and "have '_orig_mod.' in them, as norm_out._orig_mod.linear." in said


def test_tied_and_unread_weights_are_not_missed(tmp_path: Path) -> None:
    tiny("flux").save_pretrained(tmp_path / "flux")
    path = tmp_path / "flux" / "text_encoder_2" / TEXT
    stored = load_file(path)
    assert "encoder.embed_tokens.weight" not in stored, "tied to shared.weight"
    assert load(str(tmp_path / "flux")).text_encoder_2.encoder.embed_tokens.weight.isfinite().all()
    tiny("hunyuan").save_pretrained(tmp_path / "hunyuan")
    path = tmp_path / "hunyuan" / "text_encoder" / TEXT
    stored = load_file(path)
    kept = {k: v for k, v in stored.items() if "pooler" not in k}
    assert len(kept) < len(stored)
    save_file(kept, path, {"format": "pt"})
    assert torch.is_tensor(load(str(tmp_path / "hunyuan")).text_encoder.pooler.dense.weight)

"""Training goes on bit for bit where it stopped, by the settings that its files are of, from the data
that the bundled models were trained on."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import nn

from aquabit.pipelines import load
from aquabit.scheme import AquabitError
from tests.conftest import tiny_pipeline
from zoo import data as zoo_data
from zoo import train as zoo_train
from zoo.classifiers import shifted
from zoo.data import DATA, Data
from zoo.evaluate import Judge
from zoo.recipes import FASHION_SCHEDULE, RECIPES, Recipe, build
from zoo.train import Training, export_denoiser, train, training_loss

CPU = torch.device("cpu")
# AdamW on noise, and what the larger models are trained by: velocity, capped weights, bfloat16, Muon
TINY = {"noise": RECIPES["digits-dit"], "velocity": replace(RECIPES["fashion-dit"], data="digits")}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of milliseconds in place of the models'."""
    monkeypatch.setattr(zoo_train, "build", lambda _: tiny())


def tiny() -> nn.Module:
    model = tiny_pipeline("dit").denoiser
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # as ``build`` has it: training drops classes
    return model


def toy_data() -> Data:
    images = torch.randint(0, 17, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    return Data(images, torch.arange(20) % 10, images[:10], torch.arange(10), 16)


def trained(recipe: Recipe, path: Path, steps: int, cooldown: int) -> dict[str, torch.Tensor]:
    training = Training("digits-dit", replace(recipe, batch=8, steps=steps, cooldown=cooldown), path, CPU)
    if path.exists():
        training.load()
    train(training, toy_data(), compiled=False)
    training.save()
    return load_file(path)


@pytest.mark.parametrize("name", TINY)
def test_a_training_goes_on_bit_for_bit_and_can_be_cooled_down_at_any_time(name: str, tmp_path: Path) -> None:
    recipe = replace(TINY[name], horizon=None)
    whole = trained(recipe, tmp_path / "whole.safetensors", 5, 2)
    trained(recipe, tmp_path / "parts.safetensors", 1, 0)
    stopped = trained(recipe, tmp_path / "parts.safetensors", 3, 0)
    parts = trained(recipe, tmp_path / "parts.safetensors", 5, 2)
    assert whole.keys() == parts.keys() and any(k.startswith("optimizer.") for k in whole)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any(not torch.equal(stopped[k], parts[k]) for k in whole if k.startswith("ema."))
    assert ("optimizer.momentum_buffer.transformer_blocks.0.attn1.to_q.weight" in whole) == recipe.muon


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    trained(TINY["noise"], tmp_path / "c.safetensors", 1, 0)
    with pytest.raises(AquabitError, match=r"c\.safetensors is of a training with other settings"):
        trained(replace(TINY["noise"], rate=1e-3), tmp_path / "c.safetensors", 2, 0)


def test_a_training_starts_from_the_weights_of_a_file(tmp_path: Path) -> None:
    weights = {k: v + 1 for k, v in tiny().half().state_dict().items()}
    zoo_train.save_file(weights, tmp_path / "w.safetensors")
    training = Training("digits-dit", TINY["noise"], tmp_path / "c.safetensors", CPU)
    training.start(tmp_path / "w.safetensors")
    assert training.step == 0
    for found in (training.ema, training.model.state_dict()):
        assert all(torch.equal(found[k], v.float()) for k, v in weights.items())
    zoo_train.save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(AquabitError, match=r"w\.safetensors does not hold the weights of digits-dit"):
        training.start(tmp_path / "w.safetensors")


def test_rates_warm_up_stay_and_fall() -> None:
    recipe = replace(RECIPES["fashion-dit"], steps=1000, cooldown=100)
    rates = [recipe.rate_at(i) / recipe.rate for i in range(1000)]
    assert rates[0] == 1 / 200 and rates[199:901] == [1.0] * 702
    assert rates[950] == 0.5 and rates[999] == 0.01
    assert recipe.digest == RECIPES["fashion-dit"].digest != replace(recipe, batch=1).digest


class Answers(nn.Module):
    """A denoiser that knows the noise, and the image when asked for a velocity; off by ``error``."""

    def __init__(self, x: torch.Tensor, scheduler: DDIMScheduler, error: float) -> None:
        super().__init__()
        self.x, self.scheduler, self.error = x, scheduler, error
        self.labels: list[int] = []

    def forward(self, noised: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> object:
        self.labels += class_labels.tolist()
        alpha = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noise = (noised - alpha.sqrt() * self.x) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.x
        v = self.scheduler.config.prediction_type == "v_prediction"
        return type("Out", (), {"sample": (velocity if v else noise) + self.error})()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_loss_is_that_of_the_papers(kind: str, cap: float | None) -> None:
    scheduler = DDIMScheduler(**{**FASHION_SCHEDULE, "prediction_type": kind})
    x = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact, off = Answers(x, scheduler, 0.0), Answers(x, scheduler, 0.1)
    losses = [
        training_loss(m, scheduler, x, torch.ones(200).long(), torch.Generator().manual_seed(0), cap)
        for m in (exact, off)
    ]
    alpha = scheduler.alphas_cumprod.double()
    snr = alpha / (1 - alpha)
    weight = torch.ones(1000) if cap is None else snr.clamp(max=cap) / (snr + (kind == "v_prediction"))
    assert losses[0] < 1e-6
    assert float(losses[1]) == pytest.approx(0.01 * float(weight.mean()), rel=0.02)  # stratified timesteps
    assert set(exact.labels) == {1, 10} and 5 < exact.labels.count(10) < 40  # a tenth without a class


def test_an_exported_model_is_loaded_as_any_other(tmp_path: Path) -> None:
    export_denoiser("digits-dit", tiny().state_dict(), tmp_path / "m")
    pipe = load(str(tmp_path / "m"))
    assert pipe.config.real_images == "digits" and pipe.scheduler.config.prediction_type == "epsilon"
    images = pipe([1, 2], torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["classes"] == 10


def test_shifted_images_move_by_at_most_a_pixel() -> None:
    x = torch.full((300, 1, 6, 6), -1.0)
    x[:, 0, 2, 3] = 1.0
    found = shifted(x, torch.Generator().manual_seed(0))
    places = {tuple(p.tolist()) for p in (found[:, 0] > 0).nonzero()[:, 1:]}
    assert places == {(r, c) for r in (1, 2, 3) for c in (2, 3, 4)}
    assert ((found > 0).sum((1, 2, 3)) == 1).all()


def idx(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes(), mtime=0)


def test_fashion_is_read_padded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AquabitError, match=r"cannot read .*train-images.*`apt-get install dataset-fashion-mnist`"
    ):
        DATA["fashion"](tmp_path)
    rng, files = np.random.default_rng(0), {}
    for name in zoo_data.FASHION_FILES:
        array = rng.integers(0, 10, (3, 28, 28) if "images" in name else 3, np.uint8)
        (tmp_path / name).write_bytes(idx(array))
        files[name] = hashlib.sha256(idx(array)).hexdigest()
    with pytest.raises(AquabitError, match=r"train-images-idx3-ubyte\.gz has SHA-256 .* has b0564c3e"):
        DATA["fashion"](tmp_path)
    monkeypatch.setattr(zoo_data, "FASHION_FILES", files)
    found = DATA["fashion"](tmp_path)
    assert found.images.shape == found.held_out_images.shape == (3, 1, 32, 32)
    assert found.images[:, :, 2:30, 2:30].sum() == found.images.sum() > 0
    first = np.random.default_rng(0).integers(0, 10, (3, 28, 28), np.uint8)
    assert np.array_equal(found.images[:, 0, 2:30, 2:30].numpy(), first)
    assert found.pixels(torch.tensor([0, 255])).tolist() == [-1.0, 1.0]


def test_digits_are_two_halves_of_all() -> None:
    found = DATA["digits"](None)
    assert (len(found.images), len(found.held_out_images)) == (898, 899)
    assert found.pixels(torch.tensor([0, 8, 16])).tolist() == [-1.0, 0.0, 1.0]
    assert (found.labels.bincount() - found.held_out_labels.bincount()).abs().max() <= 2


@pytest.mark.parametrize(("name", "layers"), [("fashion-dit", 102), ("fashion-unet", 91)])
def test_larger_networks_have_the_layers_and_weights_that_are_stated(name: str, layers: int) -> None:
    model = build(name)
    assert sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules()) == layers
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 6.5e6  # 13 MB in fp16


def test_copies_of_training_images_are_seen() -> None:
    judge = Judge("digits", None)
    copies = judge.nearest(judge.training[:50])
    others = judge.nearest(judge.training[:50], own=True)
    known = torch.cdist(judge.known[:50], judge.known)
    assert copies.max() < 0.05 < others.min()  # rounding of the products that make distances
    assert torch.allclose(others, known.topk(2, largest=False).values[:, 1], atol=0.05)
    labels = judge.labels[:50].tolist()
    assert judge.row("copies | 1", judge.training[:50], labels, copies).endswith("| 100.0 % |")
    share = float(judge.row("others | 1", judge.training[:50], labels, others).split()[-3])
    assert share < 20

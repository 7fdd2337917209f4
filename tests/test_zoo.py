"""Training goes on bit for bit where it stopped, by the settings that its files are of, from the data
that the bundled models were trained on."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
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
from zoo.muon import Float32Muon
from zoo.recipes import FASHION_SCHEDULE, RECIPES, Recipe, build
from zoo.train import Training, export_denoiser, train, training_loss

CPU = torch.device("cpu")
# AdamW on noise, and what the larger models are trained by: velocity, capped weights, Muon, one in bfloat16
TINY = {
    "noise": RECIPES["digits-dit"],
    "velocity": replace(RECIPES["fashion-dit"], data="digits"),
    "float32": replace(RECIPES["emoji-dit"], data="digits"),
}


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
        training_loss(m, scheduler, x, torch.ones(200).long(), torch.Generator().manual_seed(0), cap, 7)
        for m in (exact, off)
    ]
    alpha = scheduler.alphas_cumprod.double()
    snr = alpha / (1 - alpha)
    weight = torch.ones(1000) if cap is None else snr.clamp(max=cap) / (snr + (kind == "v_prediction"))
    assert losses[0] < 1e-6
    assert float(losses[1]) == pytest.approx(0.01 * float(weight.mean()), rel=0.02)  # stratified timesteps
    assert set(exact.labels) == {1, 7} and 5 < exact.labels.count(7) < 40  # a tenth without a class


def test_an_exported_model_is_loaded_as_any_other(tmp_path: Path) -> None:
    export_denoiser("digits-dit", tiny().state_dict(), tmp_path / "m")
    pipe = load(str(tmp_path / "m"))
    assert pipe.config.real_images == "digits" and pipe.scheduler.config.prediction_type == "epsilon"
    images = pipe([1, 2], torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert json.loads((tmp_path / "m" / "model_index.json").read_text())["classes"] == 10


def test_muon_in_float32_is_torchs_own() -> None:
    generator, shapes = torch.Generator().manual_seed(0), [(16, 16), (16, 16), (24, 8), (8, 24)]
    ours, theirs = ([nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2))
    optimizers = (
        Float32Muon(ours, lr=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.03 * other.norm() > 0  # theirs has 8 bits


def test_shifted_images_move_by_at_most_a_pixel() -> None:
    x = torch.full((300, 1, 6, 6), -1.0)
    x[:, 0, 2, 3] = 1.0
    found = shifted(x, torch.Generator().manual_seed(0))
    places = {tuple(p.tolist()) for p in (found[:, 0] > 0).nonzero()[:, 1:]}
    assert places == {(r, c) for r in (1, 2, 3) for c in (2, 3, 4)}
    assert ((found > 0).sum((1, 2, 3)) == 1).all()
    assert (shifted(torch.ones(50, 3, 6, 6), torch.Generator().manual_seed(0), 1.0) == 1).all()


def idx(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes(), mtime=0)


def test_fashion_is_read_padded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AquabitError, match=r"cannot read .*train-images.*`apt-get install dataset-fashion-mnist`"
    ):
        DATA["fashion"].read(tmp_path)
    rng, files = np.random.default_rng(0), {}
    for name in zoo_data.FASHION_FILES:
        array = rng.integers(0, 10, (3, 28, 28) if "images" in name else 3, np.uint8)
        (tmp_path / name).write_bytes(idx(array))
        files[name] = hashlib.sha256(idx(array)).hexdigest()
    with pytest.raises(AquabitError, match=r"train-images-idx3-ubyte\.gz has SHA-256 .* has b0564c3e"):
        DATA["fashion"].read(tmp_path)
    monkeypatch.setattr(zoo_data, "FASHION_FILES", files)
    found = DATA["fashion"].read(tmp_path)
    assert found.images.shape == found.held_out_images.shape == (3, 1, 32, 32)
    assert found.images[:, :, 2:30, 2:30].sum() == found.images.sum() > 0
    first = np.random.default_rng(0).integers(0, 10, (3, 28, 28), np.uint8)
    assert np.array_equal(found.images[:, 0, 2:30, 2:30].numpy(), first)
    assert found.pixels(torch.tensor([0, 255])).tolist() == [-1.0, 1.0]


CATEGORIES = zoo_data.EMOJI_CATEGORIES


def picture(rgba: tuple[int, int, int, int], mark: int = 0) -> bytes:
    """One colour, but for an opaque black square at the left that says which picture it is."""
    made = Image.new("RGBA", (64, 64), rgba)
    made.paste((0, 0, 0, 255), (0, 0, 4, 2 * mark))
    buffer = io.BytesIO()
    made.save(buffer, "PNG")
    return buffer.getvalue()


def package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three emoji of each category, of people a woman and a man of one subject in two skin tones each, flags
    two of which look alike."""
    entries, pictures, hashed = [], folder / "img" / "google" / "64", hashlib.sha256()
    pictures.mkdir(parents=True)
    for i, category in enumerate((*CATEGORIES, "Component")):
        for j in range(3):
            code = f"1F{i}0{j}"
            if category == "People & Body" and j < 2:
                code = f"{['1F468', '1F469'][j]}-200D-1F680"
            entry = {"unified": code, "category": category, "image": f"{code}.png"}
            if "-" in code:
                entry["skin_variations"] = {"1F3FB": {"image": f"{code}-1F3FB.png"}}
            same = category == "Flags" and j == 1
            for k, v in enumerate((entry, *entry.get("skin_variations", {}).values())):
                data = picture((200, 100, 0, 128), 1 + 3 * (k + 2 * (i + 9 * (0 if same else j))) % 31)
                (pictures / v["image"]).write_bytes(data)
                hashed.update(data if category != "Component" else b"")
            entries.append(entry)
    text = json.dumps(entries).encode()
    (folder / "emoji.json").write_bytes(text)
    monkeypatch.setattr(zoo_data, "EMOJI_DIGEST", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(zoo_data, "EMOJI_PICTURES_DIGEST", hashed.hexdigest())
    monkeypatch.setattr(zoo_data, "HELD_OUT_EMOJI", 1)
    return folder


def test_emoji_are_split_by_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = DATA["emoji"].read(package(tmp_path, monkeypatch))
    assert sorted(found.held_out_labels.tolist()) == list(range(9)) and found.images.shape[1:] == (3, 32, 32)
    assert found.subjects is not None and found.edge == found.top == 255
    assert found.images[0, :, 31, 31].tolist() == [227, 177, 127]  # half of it over white
    held_out = {v.numpy().tobytes() for v in found.held_out_images}
    assert not held_out & {v.numpy().tobytes() for v in found.images}
    mirrored = {v.flip(2).numpy().tobytes() for v in found.images}
    once = [v.numpy().tobytes() in mirrored for v in found.images]
    for label, category in enumerate(CATEGORIES):
        of, subjects = found.labels == label, found.subjects[found.labels == label]
        people = category == "People & Body"  # held out: the pair (four pictures), or the other one
        assert len(subjects.unique()) == (1 if people or category == "Flags" else 2)
        assert all(x != (category in zoo_data.NOT_MIRRORED) for x, y in zip(once, of, strict=True) if y)
        if people:
            assert int(of.sum()) in (2, 8)
    drawn = found.drawn(4000, torch.Generator().manual_seed(0))
    counts = found.subjects[drawn].bincount()
    assert counts[counts > 0].min() > 0.6 * counts.max()  # of 250, give or take 16
    epoch = found.subjects[found.epoch(torch.Generator().manual_seed(0))]
    assert sorted(epoch.tolist()) == found.subjects.unique().tolist()


def test_training_images_are_judged_as_held_out_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge("emoji", package(tmp_path, monkeypatch))
    chosen = judge.comparable()
    subjects = judge.subjects[chosen]
    assert judge.labels[chosen].tolist() == list(range(9)) and len(subjects.unique()) == 9
    assert all(c == (judge.subjects == s).nonzero()[0] for c, s in zip(chosen, subjects, strict=True))
    near = judge.nearest(judge.training[chosen], subjects)
    for row, subject, found in zip(judge.known[chosen], subjects, near, strict=True):
        others = judge.known[judge.subjects != subject]
        assert float(found) == pytest.approx(float((others - row).norm(dim=1).min()), abs=0.05)


def test_other_emoji_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = DATA["emoji"].read
    with pytest.raises(
        AquabitError, match=r"cannot read .*emoji\.json .*`npm install emoji-datasource-google@16\.0\.0`"
    ):
        read(tmp_path)
    (tmp_path / "emoji.json").write_text("[]")
    with pytest.raises(AquabitError, match=r"emoji\.json has SHA-256 .* emoji-datasource-google 16\.0\.0\)"):
        read(tmp_path)
    folder = package(tmp_path, monkeypatch)
    one = folder / "img" / "google" / "64" / "1F000.png"
    one.write_bytes(picture((0, 0, 0, 0)))
    with pytest.raises(
        AquabitError, match=r"the pictures of .*64 have SHA-256 .*; those that the models are"
    ):
        read(tmp_path)
    one.unlink()
    with pytest.raises(AquabitError, match=r"cannot read .*1F000\.png .*`npm install"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("code_points", "subject"),
    [
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("1F469-200D-1F680", "1F9D1-1F680"),
        ("2640-FE0F", "2640-FE0F"),
        ("1F600", "1F600"),
    ],
)
def test_subjects_have_neither_gender_nor_direction(code_points: str, subject: str) -> None:
    assert zoo_data._subject(code_points) == subject


def test_digits_are_two_halves_of_all() -> None:
    found = DATA["digits"].read(None)
    assert (len(found.images), len(found.held_out_images)) == (898, 899)
    assert found.pixels(torch.tensor([0, 8, 16])).tolist() == [-1.0, 0.0, 1.0]
    assert (found.labels.bincount() - found.held_out_labels.bincount()).abs().max() <= 2


@pytest.mark.parametrize(
    ("name", "layers", "millions"),
    [("fashion-dit", 102, 5.91), ("fashion-unet", 91, 6.26), ("emoji-dit", 75, 2.83)],
)
def test_larger_networks_have_the_layers_and_weights_that_are_stated(
    name: str, layers: int, millions: float
) -> None:
    model = build(name)
    assert sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules()) == layers
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_copies_of_training_images_are_seen() -> None:
    judge = Judge("digits", None)
    copies = judge.nearest(judge.training[:50])
    others = judge.nearest(judge.training[:50], judge.subjects[:50])
    known = torch.cdist(judge.known[:50], judge.known)
    assert copies.max() < 0.05 < others.min()  # rounding of the products that make distances
    assert torch.allclose(others, known.topk(2, largest=False).values[:, 1], atol=0.05)
    labels = judge.labels[:50].tolist()
    assert judge.row("copies | 1", judge.training[:50], labels, copies).endswith("| 100.0 % |")
    share = float(judge.row("others | 1", judge.training[:50], labels, others).split()[-3])
    assert share < 20

"""The bundled sets of real images: their classifiers are what was trained, and damaged files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from aquabit.quality import RealImages, real_images
from aquabit.quality import distances as dist
from aquabit.quality.real_images import FOLDER, ClassifierFeatures
from aquabit.scheme import AquabitError
from tests.quality import whole_sets

NAMES = sorted(p.name for p in FOLDER.iterdir())
NETWORKS = {
    "digits": nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 32),
        nn.SiLU(),
        nn.Linear(32, 10),
    ),
    "fashion": nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 96, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(96, 128, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 64),
        nn.SiLU(),
        nn.Linear(64, 10),
    ),
    "emoji": nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 96, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(96, 128, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 32),
        nn.SiLU(),
        nn.Linear(32, 9),
    ),
}
# shape of the held-out images, features, spatial features, least images of a class; at least: accuracy,
# inception score, FID and sFID of noise over those of halves
FACTS = {
    "digits": ((899, 1, 8, 8), 32, 64, [80] * 10, (0.97, 6, 20, 10)),
    "fashion": ((1000, 1, 32, 32), 64, 64, [100] * 10, (0.9, 6, 20, 10)),
    "emoji": ((288, 3, 32, 32), 32, 64, [32] * 9, (0.5, 3, 10, 5)),  # halves of 144 images are far apart
}


@pytest.mark.parametrize("name", NAMES)
def test_classifier_is_accurate_and_fid_tells_images_from_noise(name: str) -> None:
    shape, pooled, spatial, least, (accuracy, score, apart, spatially_apart) = FACTS[name]
    found = real_images(name)
    images, labels = found.held_out()
    assert (images.shape, labels.shape) == (shape, shape[:1])
    assert (images.min(), images.max()) == (0, 1) and (labels.bincount() >= torch.tensor(least)).all()
    noise = torch.rand((400, *shape[1:]), generator=torch.Generator().manual_seed(0))
    real, other = found.features(images), found.features(noise)
    assert [v.shape for v in real] == [(len(images), n) for n in (pooled, spatial, len(least))]
    assert all(v.dtype == np.float32 for v in real)
    assert (real.spatial.std(0) > 0.01).mean() > 0.9  # no dead channels among the four
    assert dist.accuracy(real.logits, labels.numpy()) >= accuracy
    # below the number of classes because the classifier learned with smoothed labels
    assert whole_sets.inception_score(real.logits) > score
    halves = whole_sets.fid(real.pooled[::2], real.pooled[1::2])
    assert whole_sets.fid(real.pooled, other.pooled) > apart * halves
    assert whole_sets.sfid(real.spatial, other.spatial) > spatially_apart * whole_sets.sfid(
        real.spatial[::2], real.spatial[1::2]
    )
    assert whole_sets.precision_recall(real.pooled[::2], real.pooled[1::2]) > (0.8, 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_classifier_equals_the_module_it_was_trained_as(name: str) -> None:
    found, model = real_images(name), NETWORKS[name]
    model.load_state_dict(load_file(FOLDER / name / "classifier.safetensors"))
    x = found.held_out()[0][:20]
    features, flat = found.features(x), len(model) - 4
    with torch.no_grad():
        assert np.allclose(model(x * 2 - 1).numpy(), features.logits, atol=1e-5)
        assert np.allclose(model[:flat](x * 2 - 1)[:, :4].flatten(1).numpy(), features.spatial, atol=1e-5)
        assert np.allclose(model[:-1](x * 2 - 1).numpy(), features.pooled, atol=1e-5)


def test_features_of_other_images_and_other_sets_are_refused() -> None:
    with pytest.raises(AquabitError, match=r"takes images \[n, 1, 8, 8\], not \[2, 1, 7, 8\]"):
        real_images("digits").features(torch.zeros(2, 1, 7, 8))
    with pytest.raises(AquabitError, match="'cats' are not bundled; those that are: digits"):
        real_images("cats")


def test_damaged_classifier_files_are_named(tmp_path: Path) -> None:
    about = json.loads((FOLDER / "digits" / "about.json").read_text())
    whole = (FOLDER / "digits" / "classifier.safetensors").read_bytes()
    path = tmp_path / "weights.safetensors"

    def opened() -> ClassifierFeatures:
        return ClassifierFeatures(path, about["layers"], (1, 8, 8))

    with pytest.raises(AquabitError, match=r"cannot read .*weights\.safetensors: No such file"):
        opened()
    for size in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(AquabitError, match=r"weights\.safetensors is not a whole safetensors file"):
            opened()
    tensors = load_file(FOLDER / "digits" / "classifier.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "4.bias"} | {"9.bias": torch.zeros(3)}, path)
    with pytest.raises(AquabitError, match=r"unknown tensors 4\.bias, 9\.bias"):
        opened()
    tensors["7.bias"][3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AquabitError, match="non-finite weights"):
        opened()


def test_held_out_images_that_are_something_else_are_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "digits", tmp_path / "digits")
    save_file({"pixels": torch.zeros(3)}, folder / "held_out.safetensors")
    with pytest.raises(AquabitError, match="holds pixels; expected images and labels"):
        RealImages(folder, "digits", (1, 8, 8), 16, []).held_out()

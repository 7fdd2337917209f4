"""The classifiers whose features the metrics use, and what the package keeps of the real images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from aquabit.quality.real_images import network
from zoo.data import Data

PER_CLASS = 100  # held-out images of each class that the package keeps, where there are more


def _conv(inputs: int, outputs: int, stride: int = 1) -> list[Any]:
    sizes = {"in_channels": inputs, "out_channels": outputs, "kernel_size": 3, "padding": 1}
    return ["Conv2d", sizes | ({"stride": stride} if stride > 1 else {})]


def _linear(inputs: int, outputs: int) -> list[Any]:
    return ["Linear", {"in_features": inputs, "out_features": outputs}]


_SILU: list[Any] = ["SiLU", {}]
_FLATTEN: list[Any] = ["Flatten", {}]


@dataclass(frozen=True)
class ClassifierRecipe:
    """``title`` says what the images are; ``layers`` as ``aquabit.quality.real_images`` has them."""

    title: str
    layers: list[list[Any]]
    epochs: int
    batch: int


CLASSIFIERS: Mapping[str, ClassifierRecipe] = {
    "digits": ClassifierRecipe(
        "scikit-learn's digits",
        [
            *(_conv(1, 32), _SILU, _conv(32, 64, 2), _SILU, _conv(64, 64), _SILU),
            *(_FLATTEN, _linear(64 * 4 * 4, 32), _SILU, _linear(32, 10)),
        ],
        epochs=60,
        batch=64,
    ),
    "fashion": ClassifierRecipe(
        "Fashion-MNIST",
        [
            *(_conv(1, 32, 2), _SILU, _conv(32, 64, 2), _SILU),
            *(_conv(64, 96), _SILU, _conv(96, 128, 2), _SILU),
            *(_FLATTEN, _linear(128 * 4 * 4, 64), _SILU, _linear(64, 10)),
        ],
        epochs=10,
        batch=128,
    ),
    "emoji": ClassifierRecipe(
        "Google's emoji of Emoji 16.0",
        [
            *(_conv(3, 32, 2), _SILU, _conv(32, 64, 2), _SILU),
            *(_conv(64, 96), _SILU, _conv(96, 128, 2), _SILU),
            *(_FLATTEN, _linear(128 * 4 * 4, 32), _SILU, _linear(32, 9)),
        ],
        epochs=40,
        batch=64,
    ),
}


def shifted(x: torch.Tensor, generator: torch.Generator, edge: float = -1.0) -> torch.Tensor:
    """Each image moved by at most one pixel in each direction, ``edge`` coming in."""
    n, _, height, width = x.shape
    down, right = (torch.randint(-1, 2, (n, 2), generator=generator) + 1).unbind(1)
    windows = nn.functional.pad(x, (1, 1, 1, 1), value=edge).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n), :, down, right]


def train_classifier(name: str, data: Data, folder: Path) -> float:
    """Train the classifier of a set from seed 0 and write ``folder``; returns its held-out accuracy."""
    recipe, generator = CLASSIFIERS[name], torch.Generator().manual_seed(0)
    edge = float(data.pixels(torch.tensor(data.edge)))
    torch.manual_seed(0)
    model = network(recipe.layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    for epoch in range(recipe.epochs):
        for batch in data.epoch(generator).split(recipe.batch):
            images = shifted(data.pixels(data.images[batch]), generator, edge)
            images = images + 0.1 * torch.randn(images.shape, generator=generator)
            loss = nn.functional.cross_entropy(model(images), data.labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"classifier of {name}: epoch {epoch + 1}/{recipe.epochs}", flush=True)
    model.eval()
    with torch.no_grad():
        parts = data.held_out_images.split(500)
        found = torch.cat([model(data.pixels(part)).argmax(1) for part in parts])
    write_set(recipe, model, data, folder)
    return float((found == data.held_out_labels).float().mean())


def write_set(recipe: ClassifierRecipe, model: nn.Module, data: Data, folder: Path) -> None:
    """``about.json``, the classifier in fp16, and at most PER_CLASS held-out images a class, the first
    ones."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = data.held_out_images, data.held_out_labels
    if (labels.bincount() > PER_CLASS).any():
        kept = torch.cat([(labels == c).nonzero()[:PER_CLASS, 0] for c in range(int(labels.max()) + 1)])
        images, labels = images[kept.sort().values], labels[kept.sort().values]
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "classifier.safetensors"
    )
    save_file({"images": images, "labels": labels.to(torch.uint8)}, folder / "held_out.safetensors")
    layers = ",\n    ".join(json.dumps(layer) for layer in recipe.layers)
    title, shape = json.dumps(recipe.title), json.dumps(list(images.shape[1:]))
    (folder / "about.json").write_text(
        f'{{\n  "title": {title},\n  "shape": {shape},\n  "levels": {data.top},\n'
        f'  "layers": [\n    {layers}\n  ]\n}}\n'
    )

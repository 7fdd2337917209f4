"""The real images that bundled models were trained on: a held-out part of each set, and a classifier whose
features the metrics use. A set is a folder of ``about.json``, ``classifier.safetensors`` and
``held_out.safetensors``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.jsonio import read_json
from aquabit.quality.accumulator import Source
from aquabit.quality.features import METRICS_OF, Features, load_tensors, tensors_of
from aquabit.quality.reference import Reference
from aquabit.scheme import AquabitError

FOLDER = Path(__file__).parents[1] / "pipelines" / "bundled" / "real_images"
SPATIAL_CHANNELS = 4
LAYERS: Mapping[str, type[nn.Module]] = {
    c.__name__: c for c in (nn.Conv2d, nn.Linear, nn.SiLU, nn.Flatten)
}  # of which a classifier may consist


class ClassifierFeatures:
    """Features of a bundled classifier, trained on images that no reference holds.

    pooled [n, d] what the last layer sees; spatial [n, s] the first 4 channels of what is flattened, as sFID
    takes the first channels of a spatial Inception layer; logits [n, classes].
    """

    metrics = METRICS_OF["classifier"]

    def __init__(self, path: Path, layers: list[list[Any]], shape: tuple[int, ...]) -> None:
        """From weights of ``layers`` (``network``) that take images [n, *shape]; raises AquabitError for a
        file of other tensors."""
        data, tensors = tensors_of(path)
        self.digest, self.shape = hashlib.sha256(data).hexdigest()[:16], shape
        self._network = network(layers)
        expected = {k: v.shape for k, v in self._network.state_dict().items()}
        given = {k: v.shape for k, v in tensors.items()}
        if given != expected:
            wrong = sorted(k for k in given.keys() | expected if given.get(k) != expected.get(k))
            raise AquabitError(
                f"{path} does not hold the classifier that about.json describes: wrong, missing or unknown"
                f" tensors {', '.join(wrong)}"
            )
        if not all(v.isfinite().all() for v in tensors.values()):
            raise AquabitError(f"{path} holds non-finite weights")
        self._network.load_state_dict(tensors)
        self._flat = next(i for i, m in enumerate(self._network) if isinstance(m, nn.Flatten))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images [n, *shape], float32 in [0, 1]."""
        if images.shape[1:] != self.shape:
            raise AquabitError(
                f"the classifier of the real images takes images [n, {', '.join(map(str, self.shape))}], not"
                f" {list(images.shape)}"
            )
        maps = self._network[: self._flat](images.to("cpu", torch.float32) * 2 - 1)
        pooled = self._network[self._flat : -1](maps)
        logits = self._network[-1](pooled)
        return Features(pooled.numpy(), maps[:, :SPATIAL_CHANNELS].flatten(1).numpy(), logits.numpy())


def network(layers: list[list[Any]]) -> nn.Sequential:
    """The classifier of a list of layers, each the name of a torch.nn class of LAYERS and its arguments."""
    return nn.Sequential(*(LAYERS[name](**arguments) for name, arguments in layers))


@dataclass(frozen=True)
class RealImages:
    """One set, as its ``about.json`` has it: ``title`` says what it is; images are [n, *shape] of
    levels 0..``levels``; ``layers`` are the classifier's."""

    folder: Path
    title: str
    shape: tuple[int, ...]
    levels: int
    layers: list[list[Any]]

    @cached_property
    def features(self) -> ClassifierFeatures:
        return ClassifierFeatures(self.folder / "classifier.safetensors", self.layers, self.shape)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Images that neither the models nor the classifier were trained on, float32 in [0, 1], and their
        labels, int64."""
        path = self.folder / "held_out.safetensors"
        tensors = load_tensors(path)
        if tensors.keys() != {"images", "labels"}:
            raise AquabitError(f"{path} holds {', '.join(sorted(tensors))}; expected images and labels")
        return tensors["images"].float() / self.levels, tensors["labels"].long()

    def source(self) -> Source:
        """The classifier's features, and the held-out images under them."""
        return Source(self.features, Reference.from_images(self.held_out()[0], self.features))


def real_images(name: str) -> RealImages:
    """The bundled set of that name; raises AquabitError where there is none."""
    known = sorted(p.parent.name for p in FOLDER.glob("*/about.json"))
    if name not in known:
        raise AquabitError(f"the real images {name!r} are not bundled; those that are: {', '.join(known)}")
    about = read_json(FOLDER / name / "about.json")
    return RealImages(FOLDER / name, **{**about, "shape": tuple(about["shape"])})

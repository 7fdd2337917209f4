"""Measure what the training reached: python zoo/evaluate.py [NAME ...] [--data DIR] [--images N] [--steps N]
[--schemes S]

Prints Markdown tables for zoo/README.md: images of seeds that nothing else uses, against all held-out images
of the model's set; beside them training images, as the best that can be hoped for. The nearest training
image, in the classifier's features, shows how far a model memorises: one that is nearer than to nearly every
held-out image may have been copied. NAME is a bundled model or a folder of one; each of --schemes, in all
layers with activations of 8 bits, shows what quantizing costs.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit import packing
from aquabit.pipelines import Adapter, bundled_models, load, trace
from aquabit.pipelines.loading import BUNDLED
from aquabit.quality import Quality, Reference, Source, paired, real_images
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Protocol
from aquabit.space import make_space
from zoo.data import DATA

FIRST_SEED = 18_000  # studies use the first ones
TRAINING_IMAGES = 10_000  # of the row of training images, at most
CLOSEST = 0.01  # held-out images of which the nearest training image counts as near
COLUMNS = ("fid", "kid", "sfid", "is", "precision", "recall", "accuracy")
HEAD = (
    "| images | steps | PSNR | FID | KID | sFID | IS | precision | recall | class accuracy"
    " | nearest training image | nearer than 1 % of held-out |\n" + 12 * "|---" + "|"
)


class Judge:
    """Of one set of real images: its held-out images under the bundled classifier, and the features of its
    training images."""

    def __init__(self, name: str, folder: Path | None) -> None:
        data = DATA[name].read(folder)
        self.data = data
        self.features = real_images(name).features
        self.training, self.labels = data.images.float() / data.top, data.labels
        held_out = data.held_out_images.float() / data.top
        self.subjects = torch.arange(len(self.labels)) if data.subjects is None else data.subjects
        self.source = Source(self.features, Reference.from_images(held_out, self.features))
        self.known = self.pooled(self.training)
        self.held_out = self.nearest(held_out)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.from_numpy(self.features(part).pooled) for part in images.split(500)])

    def nearest(self, images: torch.Tensor, subjects: torch.Tensor | None = None) -> torch.Tensor:
        """Distance of each image's features to those of the nearest training image; ``subjects``: to the
        nearest one of another subject than the image's."""
        found = []
        for i, rows in enumerate(self.pooled(images).split(500)):
            distances = torch.cdist(rows, self.known)
            if subjects is not None:
                distances[subjects[500 * i : 500 * i + len(rows), None] == self.subjects] = torch.inf
            found.append(distances.min(1).values)
        return torch.cat(found)

    def row(
        self, what: str, images: torch.Tensor, labels: list[int], near: torch.Tensor, psnr: str = "-"
    ) -> str:
        """A line of the table; ``near`` are the images' distances to the nearest training image."""
        quality = Quality([self.source])
        for part, asked in zip(images.split(500), torch.tensor(labels).split(500), strict=True):
            quality.update(part, None, asked.tolist())
        found = quality.compute()
        share = (near < self.held_out.quantile(CLOSEST)).float().mean()
        numbers = " | ".join(f"{found[c]:.{4 if c == 'accuracy' else 3}f}" for c in COLUMNS)
        return f"| {what} | {psnr} | {numbers} | {near.median():.3f} | {100 * share:.1f} % |"

    def training_row(self) -> str:
        """Of training images themselves, each of which is compared with those of other subjects."""
        chosen = self.comparable()[:TRAINING_IMAGES]
        images, labels = self.training[chosen], self.labels[chosen].tolist()
        near = self.nearest(images, self.subjects[chosen])
        return self.row(f"training images ({len(chosen)}) | -", images, labels, near)

    def comparable(self) -> torch.Tensor:
        """Places of training images that are chosen as held-out ones are: where they have variants, the first
        of each subject, and as many of each class."""
        if self.data.subjects is None:
            return torch.arange(len(self.labels))
        first = torch.from_numpy(np.unique(self.data.subjects.numpy(), return_index=True)[1])
        labels = self.labels[first]
        count = int(labels.bincount().min())
        return torch.cat([first[labels == c][:count] for c in labels.unique()])


def generated(adapter: Adapter, steps: int, count: int) -> tuple[torch.Tensor, list[int]]:
    """``count`` images of seeds that nothing else uses, and the classes that were asked for."""
    protocol = Protocol(images=count, steps=steps, micro_batch=60, seed=FIRST_SEED)
    parts, labels = [], []
    for batch in adapter.batches(protocol):
        parts.append(adapter.images(protocol, batch))
        labels += adapter.labels(protocol, batch) or []
    return torch.cat(parts), labels


def quantized(name: str, scheme: str) -> Adapter:
    """The model with one scheme in all layers, activations at 8 bits."""
    pipe = load(name)
    space = make_space(trace(pipe), fingerprint(pipe.denoiser), name, schemes=["fp", scheme], activations=[8])
    with tempfile.TemporaryDirectory() as bank:
        return Adapter(packing.quantize(name, space.uniform(scheme), bank=bank, accuracy="exact").pipe)


def rows(name: str, judge: Judge, count: int, lengths: list[int], schemes: list[str]) -> Iterator[str]:
    """Lines of the table for one model: full precision, then each scheme."""
    made: dict[int, torch.Tensor] = {}
    for scheme in ("", *schemes):
        adapter = quantized(name, scheme) if scheme else Adapter(load(name))
        for steps in lengths:
            images, labels = generated(adapter, steps, count)
            full = made.setdefault(steps, images)
            psnr = f"{paired.psnr_from_mse(paired.mse(images, full)).mean():.2f}" if scheme else "-"
            what = " ".join(filter(None, (Path(name).name, scheme, f"({len(labels)})")))
            yield judge.row(f"{what} | {steps}", images, labels, judge.nearest(images), psnr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=bundled_models(), metavar="NAME")
    parser.add_argument(
        "--data", type=Path, help="folder of the set's files; default: where its package is installed"
    )
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--schemes", nargs="+", default=[], metavar="SCHEME", help="such as usq3h")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judges: dict[str, Judge] = {}
    for name in options.names:
        real = load(name).config.real_images
        if real not in judges:
            judge = judges[real] = Judge(real, options.data)
            print(
                f"{real}: the nearest training image of held-out ones is at {judge.held_out.median():.3f}\n"
            )
            print(HEAD, judge.training_row(), sep="\n", flush=True)
        for line in rows(name, judges[real], options.images, options.steps, options.schemes):
            print(line, flush=True)
    print()
    for path in sorted(BUNDLED.rglob("*.safetensors")):
        print(
            f"- `{path.relative_to(BUNDLED)}`: {path.stat().st_size:,} bytes, sha256"
            f" {hashlib.sha256(path.read_bytes()).hexdigest()}"
        )


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    try:
        main()
    except AquabitError as error:
        sys.exit(str(error))

"""Additive quantization's figures: python benchmarks/additive.py PART ... [--folder DIR] [--models ...]

baseline   AQLM's published procedure (benchmarks/aqlm_plain.py) on every layer below; hours, each layer kept in --folder
layers     ours on the same layers, H and formats: weighted error and CPU seconds, one thread each, beside the baseline's
large      all layers of a 400 M-parameter U-Net with LDM-4's shapes, extrapolated from three layers of each class (an estimate)
families   USQ, VQ and AQ, output-aware, at the same bytes near 2, 3 and 4 bits: FID and PSNR on fresh seeds, both bundled models
ablation   kernel slices (KAQ) against groups across channels, and formats per layer (LAQ) against one for all, at the same bytes

Tables go to benchmarks/results/additive.json and additive.md. Everything continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.aqlm_plain import aqlm, output_loss
from benchmarks.flow import MODELS, RESULTS, machine

SYNTHETIC = {"linear 1152 x 1152": (1152, 1152), "conv 3x3 384 -> 384": (384, 384, 3, 3), "linear 4608 x 1152": (4608, 1152)}
FORMATS = ("2x8", "2x6", "4x4")
TRAINED = {  # five layers a model, of different operators and shapes
    "digits-dit": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.3.attn1.to_out.0", "transformer_blocks.2.ff.net.0.proj",
                   "transformer_blocks.5.ff.net.2", "transformer_blocks.4.attn1.to_v"),
    "digits-unet": ("down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv2", "mid_block.attentions.0.to_q",
                    "mid_block.resnets.0.conv1", "up_blocks.1.resnets.0.conv1"),
}  # fmt: skip
TRAINED_FORMATS = ("2x6", "4x4")


@dataclass(frozen=True)
class Case:
    """A layer, its H and a format."""

    name: str
    format: str  # as in 2x8
    weight: Tensor
    hessian: Tensor

    @property
    def scheme(self) -> str:
        """Kernel slices for k x k convolutions, else groups of 8."""
        return f"aq{self.format}" + ("k" if self.weight.ndim == 4 and self.weight.shape[2] > 1 else "g8")

    @property
    def file(self) -> str:
        return f"{self.name} {self.format}".replace(" ", "-").replace(">", "")


def synthetic(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian weights with rows of different size, and H = X^T X / n + 1 % of its mean diagonal from 4 R inputs whose spectrum falls as
    a power law, mixed by a random rotation, with channels of different size."""
    g, row = torch.Generator().manual_seed(seed), int(torch.tensor(shape[1:]).prod())
    weight = torch.randn(shape[0], row, generator=g) * torch.exp(0.3 * torch.randn(shape[0], 1, generator=g)) * 0.02
    inputs = torch.randn(4 * row, row, generator=g) * torch.arange(1, row + 1).float() ** -0.5
    rotation = torch.linalg.qr(torch.randn(row, row, generator=g))[0]
    inputs = inputs @ rotation * torch.exp(0.5 * torch.randn(row, generator=g))
    hessian = inputs.T @ inputs / len(inputs)
    return weight.reshape(shape), hessian + 0.01 * hessian.diagonal().mean() * torch.eye(row)


def cases(trained: bool = True) -> Iterator[Case]:
    """Trained layers first: they are quick."""
    if trained:
        for model, names in TRAINED.items():
            for name, (weight, hessian) in trained_layers(model, names).items():
                for form in TRAINED_FORMATS:
                    yield Case(f"{model} {name}", form, weight, hessian)
    for name, shape in SYNTHETIC.items():
        weight, hessian = synthetic(shape)
        for form in FORMATS:
            yield Case(name, form, weight, hessian)


def trained_layers(model: str, names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    raise NotImplementedError


def baseline(folder: Path, models: list[str], trained: bool = True) -> None:
    for case in cases(trained):
        path = folder / f"aqlm-{case.file}.json"
        if path.exists():
            continue
        m, b = map(int, case.format.split("x"))
        size = case.weight[0, 0].numel() if case.scheme.endswith("k") else 8
        rows = case.weight.reshape(len(case.weight), -1)
        if case.weight.ndim == 4 and size == 8:
            raise ValueError(f"{case.name}: groups across the channels of a convolution are not in AQLM's order")
        started = time.perf_counter()
        found = aqlm(rows, case.hessian, m, b, size, callback=lambda *p: print(case.file, *p, flush=True))
        norm = output_loss(rows, case.hessian.double())
        row = {"error": found.loss / norm, "cpu_s": found.history[-1][1], "wall_s": time.perf_counter() - started, "rounds": found.rounds,
               "history": [(p, s, loss / norm) for p, s, loss in found.history]}  # fmt: skip
        path.write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("additive-runs"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if arguments.parts == ["baseline-synthetic"]:
        baseline(arguments.folder, arguments.models, False)


if __name__ == "__main__":
    main()

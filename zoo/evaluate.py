"""Measure what the training reached: python zoo/evaluate.py. Prints a Markdown table for zoo/README.md.

900 images (90 a class) from 5 disjoint blocks of seeds, 10 and 50 DDIM steps, against the held-out half of
the digits; beside it the training half itself, as the best that can be hoped for.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from train import digits_halves

from aquabit.pipelines import Adapter, bundled_models, load
from aquabit.pipelines.loading import BUNDLED
from aquabit.quality import DigitsFeatures, Quality, Source, bundled_reference
from aquabit.scheme import Protocol

BLOCKS, PER_BLOCK = 5, 180


def measured(images: torch.Tensor, labels: list[int]) -> dict[str, float]:
    extractor = DigitsFeatures()
    quality = Quality([Source(extractor, bundled_reference(extractor))])
    quality.update(images, None, labels)
    return quality.compute()


def main() -> None:
    torch.set_num_threads(1)
    x, y, _, _ = digits_halves()
    real = measured((x + 1) / 2, y.tolist())
    print(
        "| images | steps | FID | sFID | IS | precision | recall | class accuracy"
        " |\n|---|---|---|---|---|---|---|---|"
    )
    row = "| {} | {} | {fid:.2f} | {sfid:.2f} | {is:.2f} | {precision:.3f} | {recall:.3f} | {accuracy:.4f} |"
    print(row.format(f"training half ({len(x)})", "-", **real))
    for name in bundled_models():
        adapter = Adapter(load(name))
        for steps in (10, 50):
            parts, labels = [], []
            for block in range(BLOCKS):
                protocol = Protocol(images=PER_BLOCK, steps=steps, micro_batch=60).block(100 + block)
                for batch in adapter.batches(protocol):
                    parts.append(adapter.images(protocol, batch))
                    labels += adapter.labels(protocol, batch) or []
            print(
                row.format(f"{name} ({len(labels)})", steps, **measured(torch.cat(parts), labels)), flush=True
            )
    for path in sorted(BUNDLED.rglob("*.safetensors")):
        print(
            f"{path.relative_to(BUNDLED)}: {path.stat().st_size:,} bytes, sha256"
            f" {hashlib.sha256(path.read_bytes()).hexdigest()}"
        )


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()

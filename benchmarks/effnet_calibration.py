"""What "effnet_fd", "effnet_kd" and "effnet_distance" say of known damage: python
benchmarks/effnet_calibration.py [--data DIR]

Real images are distorted, more and more, and compared with other real images (the distances of sets,
precision and recall) and with themselves (effnet_distance). Floors are distances of two disjoint sets of real
images.
Images of colour are patches of scikit-learn's two photographs, grey ones the held-out images of Fashion-MNIST
(in --data, or where Debian's package puts it). benchmarks/results/effnet_calibration.json and .md; minutes.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.quality import Features, distances, paired
from aquabit.quality.effnet import SIDE, EffnetFeatures
from aquabit.scheme import LOWER_IS_BETTER
from aquabit.stats import LEVEL, between_percentiles
from benchmarks.common import about, parser, plain, write_results
from zoo.data import fashion

COMMAND = "python benchmarks/effnet_calibration.py"
METRICS = ("effnet_fd", "effnet_kd", "effnet_distance", "precision_effnet", "recall_effnet")
COUNT = 256  # images that are distorted; as many others are what they are compared with
SIDES = (64, 96, 128, 160)
SIZES = (64, 128, 256, 512)
POOL = 1536  # images of Fashion-MNIST that floors are drawn from
DRAWS = 40
SEED = 0


# ---- images


def patches(side: int, stride: int) -> Tensor:
    """Patches [n, 3, side, side] of the two photographs, in [0, 1], in a random order that is always the
    same."""
    photos = torch.stack([torch.from_numpy(i.copy()) for i in load_sample_images().images])
    cut = photos.permute(0, 3, 1, 2).unfold(2, side, stride).unfold(3, side, stride)
    flat = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side).float() / 255
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(SEED))]


# ---- distortions of images [n, c, h, w] in [0, 1]


def noise(images: Tensor, deviation: float) -> Tensor:
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
    return (images + deviation * drawn).clamp(0, 1)


def blur(images: Tensor, deviation: float) -> Tensor:
    reach = int(3 * deviation + 0.5)
    window = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * deviation**2))
    window = (window / window.sum()).expand(images.shape[1], 1, 1, -1)
    groups = images.shape[1]
    x = F.conv2d(F.pad(images, (reach,) * 4, mode="reflect"), window, groups=groups)
    return F.conv2d(x, window.transpose(2, 3), groups=groups)


def jpeg(images: Tensor, quality: float) -> Tensor:
    found = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            file, "JPEG", quality=int(quality)
        )
        found.append(np.atleast_3d(np.asarray(Image.open(file))))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def rounding(images: Tensor, bits: float) -> Tensor:
    levels = 2**bits - 1
    return (images * levels).round() / levels


def contrast(images: Tensor, factor: float) -> Tensor:
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + factor * (images - middle)


def shuffle(images: Tensor, blocks: float) -> Tensor:
    """So many of the 4 x 4 blocks of each image change places."""
    side, count = images.shape[-1] // 4, int(blocks)
    cut = images.unfold(2, side, side).unfold(3, side, side).flatten(2, 3).clone()
    generator = torch.Generator().manual_seed(SEED)
    for image in cut:
        chosen = torch.randperm(16, generator=generator)[:count]
        image[:, chosen] = image[:, chosen.roll(1)]
    rows = cut.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5)
    return rows.reshape(*images.shape[:2], 4 * side, 4 * side)


# name -> function, its levels from weak to strong, what they are
DISTORTIONS: Mapping[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...], str]] = {
    "noise": (noise, (0.02, 0.05, 0.1, 0.2), "standard deviation"),
    "blur": (blur, (0.5, 1, 2, 4), "standard deviation, pixels"),
    "JPEG": (jpeg, (80, 40, 20, 10), "quality"),
    "rounding": (rounding, (5, 4, 3, 2), "bits"),
    "contrast": (contrast, (0.8, 0.6, 0.4, 0.2), "factor"),
    "shuffle": (shuffle, (4, 8, 12, 16), "of 16 blocks"),
}


# ---- what is found


def frechet(made: Any, real: Any) -> float:
    a, b = (np.asarray(v, np.float64) for v in (made, real))
    factors = (distances.covariance_factor(v) for v in (a, b))
    return distances.frechet_from_factors(a.mean(0), next(factors), b.mean(0), next(factors))


def kernel(made: Any, real: Any) -> float:
    a, b = (np.asarray(v, np.float64) for v in (made, real))
    return distances.kid_from_sums(distances.within_kernel_sum(b), b, a)


def metrics(made: Features, clean: Features, real: Features) -> dict[str, float]:
    """Of distorted images, to ``real`` ones, and (the distance of pairs) to what was distorted."""
    a, b = (np.asarray(v.pooled, np.float64) for v in (made, real))
    return {
        "effnet_fd": frechet(a, b),
        "effnet_kd": kernel(a, b),
        "effnet_distance": float(paired.squared_distance(made.spatial, clean.spatial).mean()),
        "precision_effnet": distances.fraction_inside(a, b, distances.neighbour_radii(b)),
        "recall_effnet": distances.fraction_inside(b, a, distances.neighbour_radii(a)),
    }


def distorted(extractor: EffnetFeatures, images: Tensor) -> list[dict[str, Any]]:
    """A row for each distortion: its levels, each metric without it and at each level, and the rank
    correlation (Spearman) of both, positive where the metric says that it gets worse."""
    clean, real = extractor(images[:COUNT]), extractor(images[COUNT : 2 * COUNT])
    start, rows = metrics(clean, clean, real), []
    for name, (function, levels, unit) in DISTORTIONS.items():
        found = [start] + [metrics(extractor(function(images[:COUNT], v)), clean, real) for v in levels]
        rows.append(
            {
                "distortion": name,
                "unit": unit,
                "levels": levels,
                "values": {m: [f[m] for f in found] for m in METRICS},
                "rank": {m: ranks([f[m] for f in found], LOWER_IS_BETTER[m]) for m in METRICS},
            }
        )
    return rows


def ranks(values: Sequence[float], lower_is_better: bool) -> float:
    """Spearman's correlation of values with their place, its sign turned where higher is better; 0 where all
    are equal."""
    if len(set(values)) == 1:
        return 0.0
    found = float(spearmanr(values, range(len(values))).statistic)
    return found if lower_is_better else -found


def floors(extractor: EffnetFeatures, images: Tensor) -> list[dict[str, Any]]:
    """Distances of two disjoint sets of n real images, drawn from ``images`` again and again: means, and the
    ends between which LEVEL of the draws lie."""
    pooled, rng, rows = extractor(images).pooled, np.random.default_rng(SEED), []
    for n in (n for n in SIZES if 2 * n <= len(pooled)):
        drawn = [rng.permutation(len(pooled))[: 2 * n] for _ in range(DRAWS)]
        row: dict[str, Any] = {"images": n}
        for metric, distance in {"effnet_fd": frechet, "effnet_kd": kernel}.items():
            values = np.array([distance(pooled[d[:n]], pooled[d[n:]]) for d in drawn])
            low, high = between_percentiles(values)
            row[metric] = [float(values.mean()), float(low), float(high)]
        rows.append(row)
    return rows


def sides(images: Tensor) -> list[dict[str, Any]]:
    """How much weak distortions raise effnet_fd to other images above what the clean images have, as a
    multiple of it, for each side that images can be resized to; and the time of it."""
    half, rows = len(images) // 2, []
    for side in SIDES:
        extractor = EffnetFeatures(side=side)
        real = extractor(images[half:]).pooled
        base = frechet(extractor(images[:half]).pooled, real)
        row: dict[str, Any] = {"side": side, "ms": milliseconds(extractor, images[:half])}
        for name in ("noise", "blur", "JPEG"):
            function, levels, _ = DISTORTIONS[name]
            made = extractor(function(images[:half], levels[1])).pooled
            row[name] = frechet(made, real) / base - 1
        rows.append(row)
    return rows


def milliseconds(extractor: EffnetFeatures, images: Tensor, calls: int = 9) -> float:
    """Processor time an image, median of calls of 16 images."""
    found = []
    for _ in range(calls):
        begun = time.process_time()
        extractor(images[:16])
        found.append((time.process_time() - begun) / 16 * 1000)
    return float(np.median(found))


# ---- the page


def cells(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def distortion_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [cells(["distortion", "metric", "none", "levels, weak to strong", "rank correlation"])]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        levels = ", ".join(f"{v:g}" for v in row["levels"])
        for i, metric in enumerate(METRICS):
            first, *rest = (f"{v:.3g}" for v in row["values"][metric])
            name = f"{row['distortion']} ({row['unit']}: {levels})" if not i else ""
            lines.append(cells([name, metric, first, ", ".join(rest), f"{row['rank'][metric]:.2f}"]))
    return lines


def exceptions(found: Mapping[str, Any]) -> str:
    """Which of the distances do not rise with a distortion at every level."""
    said = [
        f"{metric} with {row['distortion']} ({name})"
        for name, rows in found["distortions"].items()
        for row in rows
        for metric in METRICS[:3]
        if row["rank"][metric] < 1
    ]
    every = sum(map(len, found["distortions"].values())) * 3
    if not said:
        return f"The three distances rise from level to level in all {every} rows."
    return f"The three distances rise from level to level in {every - len(said)} of {every} rows; not: " + (
        "; ".join(said) + "."
    )


def interval(found: Sequence[float]) -> str:
    return "{:.3g} ({:.3g} to {:.3g})".format(*found)


def markdown(found: dict[str, Any]) -> str:
    text = [
        "# Calibration of the EfficientNet-Lite0 metrics\n",
        f"{about(found['machine'])}, one thread, images resized to {SIDE} x {SIDE}. `{found['command']}`.\n",
        "None of these numbers is FID or LPIPS. Photographs: patches of 32 x 32 pixels of the two sample"
        " images of scikit-learn, which do not overlap; Fashion-MNIST: held-out images, grey, 32 x 32.\n",
        "## Distortions\n",
        f"{COUNT} images are distorted and compared with {COUNT} others (effnet_distance: with themselves)."
        " The rank correlation (Spearman) over none and four levels is 1 where the metric says at each level"
        f" that it got worse. {exceptions(found)} Precision and recall do not always fall.\n",
    ]
    for name, rows in found["distortions"].items():
        text += [f"### {name}\n", *distortion_table(rows), ""]
    text += [
        "## Floors\n",
        f"Two disjoint sets of n real images: mean of {DRAWS} draws, and between which ends {LEVEL:.0%} of"
        " the draws lie. All draws are from the same images, so that those of large n share many. effnet_fd"
        " falls with the number of images (compare values of equal numbers only); effnet_kd has no such bias."
        " There are 520 patches, not enough for sets of 512.\n",
        cells(["images", "n", "effnet_fd", "effnet_kd"]),
        "|---|---|---|---|",
        *(
            cells([name, str(r["images"]), interval(r["effnet_fd"]), interval(r["effnet_kd"])])
            for name, rows in found["floors"].items()
            for r in rows
        ),
        "",
        "## The side\n",
        "How far a weak distortion (the second level of each) raises effnet_fd to other images, in multiples"
        " of what undistorted images have, half of the images against the other half: higher is seen better,"
        " and below 0 not at all. 128 photographs, and 90 patches that overlap by half. Processor time an"
        " image: one pass serves all metrics, effnet_distance takes a second for the images of full"
        f" precision. {SIDE} is the largest that takes no more than about 10 ms.\n",
        cells(["images", "side", "noise", "blur", "JPEG", "ms an image"]),
        "|---|---|---|---|---|---|",
        *(
            cells(
                [name, str(r["side"]), *(f"{r[k]:.2f}" for k in ("noise", "blur", "JPEG")), f"{r['ms']:.1f}"]
            )
            for name, rows in found["sides"].items()
            for r in rows
        ),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    given = made.parse_args()
    torch.set_num_threads(1)
    grey = fashion(given.data).held_out_images[:POOL].float() / 255
    sets = {"Photographs": patches(32, 32), "Fashion-MNIST": grey}
    large = {"Photographs": sets["Photographs"][:128], "Patches of 128 x 128": patches(128, 64)}
    extractor = EffnetFeatures()
    found = {
        "distortions": {name: distorted(extractor, images) for name, images in sets.items()},
        "floors": {name: floors(extractor, images) for name, images in sets.items()},
        "sides": {name: sides(images) for name, images in large.items()},
    }
    write_results("effnet_calibration", COMMAND, plain(found, 4), markdown)


if __name__ == "__main__":
    main()

"""Quality: every metric of a stream of generated images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from aquabit.quality import distances, paired
from aquabit.quality.distances import Array
from aquabit.quality.feature_statistics import FeatureStatistics
from aquabit.quality.features import WITHOUT_REAL, FeatureExtractor, Features, any_numbers, unit_images
from aquabit.quality.lpips import Lpips
from aquabit.quality.moments import Moments
from aquabit.quality.pretrained import ClipFeatures
from aquabit.quality.reference import Reference
from aquabit.quality.user_metrics import UserMetric
from aquabit.scheme import LOWER_IS_BETTER, AquabitError, direction

PAIRED = ("mse", "psnr", "ssim", "temporal_psnr", "feature_distance", "lpips", "effnet_distance")
TEMPORAL = "temporal_psnr"  # of videos alone
_PIXELS = ("mse", "psnr", "ssim", TEMPORAL)  # need no features
ANY_NUMBERS = ("mse", "psnr")  # of these, what arrays that are no images can be measured by
_OF_SPATIAL = {"feature_distance": paired.feature_distance, "squared_distance": paired.squared_distance}
_NEEDS_LABELS, _NEEDS_PROMPTS = "accuracy", "clip_score"


class Source(NamedTuple):
    """An extractor, and the statistics of real images under it where there are any."""

    extractor: FeatureExtractor
    reference: Reference | None = None


class Quality:
    """Metrics of generated images against real ones and, where given, against the full-precision images of
    the same seeds.

    ``update`` once per micro batch, then ``compute``. Images are reduced at once; what stays is moments and
    sums, whose size does not depend on the number of images, and pooled features of at most KEPT images where
    a wanted metric needs them (KID, CMMD, precision, recall). ``metrics=None`` means all that the inputs
    allow; ``own`` are the user's, and need full-precision images. ``images=False``: what is measured is any
    numbers [n, ...], by mse, psnr (as if 1 were their range) and the user's own.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        metrics: Sequence[str] | None = None,
        own: Sequence[UserMetric] = (),
        images: bool = True,
    ) -> None:
        for source in sources:
            if source.reference is not None and source.extractor.digest != source.reference.extractor:
                raise AquabitError(
                    f"the reference was made with extractor {source.reference.extractor}, not"
                    f" {source.extractor.digest}; make it again"
                )
        for metric in metrics or ():
            direction(metric)  # raises for an unknown one
        self._own, self._required = tuple(own), () if metrics is None else tuple(metrics)
        wanted = tuple(LOWER_IS_BETTER) if metrics is None else tuple(metrics)
        served = {
            m: (i, k)
            for i, s in enumerate(sources)
            for m, k in s.extractor.metrics.items()
            if s.reference is not None or k in WITHOUT_REAL
        }
        missing = [m for m in self._required if m not in served and m not in _PIXELS]
        if missing:
            raise AquabitError(f"metric {missing[0]!r} has no extractor, or no real images to compare with")
        self._jobs: Mapping[str, tuple[int, str]] = {
            m: served[m] for m in LOWER_IS_BETTER if m in wanted and m in served
        }
        self._read = unit_images if images else any_numbers
        self._pixels = [m for m in _PIXELS if m in wanted and (images or m in ANY_NUMBERS)]
        self._sources = tuple(sources)
        self._collected = [
            FeatureStatistics(k for j, k in self._jobs.values() if j == i) for i in range(len(sources))
        ]
        self.count = 0
        # whether full-precision images, labels and prompts come with each batch, and frames of a video
        self._inputs: tuple[bool, bool, bool, int] | None = None
        self._sums: dict[str, float] = {}

    def update(
        self, images: Any, full_precision_images: Any = None, conditions: Any = None, frames: int = 1
    ) -> None:
        """Take in one micro batch [n, c, h, w], floats in [0, 1] or uint8; ``conditions`` [n] are the class
        labels or the prompts that were asked for. With ``frames`` above 1 so many images in a row are a
        video.

        Raises NonFiniteImages, and AquabitError for other images that cannot be measured; nothing of the
        batch is then taken in.
        """
        x = self._read(images)
        y = (
            None
            if full_precision_images is None
            else self._read(full_precision_images, "full-precision images")
        )
        labels, prompts = _asked(conditions, len(x))
        inputs = (y is not None, labels is not None, prompts is not None, frames)
        if self._inputs not in (None, inputs):
            raise AquabitError(
                "full-precision images, labels and frames must come with every micro batch or with none, and"
                " all videos have as many frames"
            )
        self._check_size(x)
        features = [
            s.extractor(x) if any(i == j for j, _ in self._jobs.values()) else None
            for i, s in enumerate(self._sources)
        ]
        values = self._values(x, y, features, prompts)
        if y is not None and frames > 1 and TEMPORAL in self._pixels:
            each = paired.psnr_from_mse(paired.temporal_mse(x, y, frames))
            values[TEMPORAL] = np.repeat(each, frames)  # sums are divided by the number of images
        if y is not None:
            values |= {m.name: m(x, y, conditions) for m in self._own}
        for collected, found in zip(self._collected, features, strict=True):
            if found is not None:
                collected.update(found, labels)
        for name, each in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(each.sum())
        self._inputs = inputs
        self.count += len(x)

    def compute(self) -> dict[str, float]:
        """The metrics of all images so far, keyed and ordered as ``scheme.LOWER_IS_BETTER``, the user's own
        last.

        Paired metrics only where full-precision images came, accuracy and CLIP score only where labels and
        prompts came; a metric that was asked for by name and lacks them is an error. Values that too few
        images leave undefined are NaN (fid, sfid and kid need 2, recall 4).
        """
        if not self.count or self._inputs is None:
            raise AquabitError("no images to measure; call update first")
        has_pairs, has_labels, has_prompts, frames = self._inputs
        there = {**dict.fromkeys(PAIRED, has_pairs), _NEEDS_LABELS: has_labels, _NEEDS_PROMPTS: has_prompts}
        there[TEMPORAL] = has_pairs and frames > 1
        result: dict[str, float] = {}
        for metric in (m for m in LOWER_IS_BETTER if m in self._jobs or m in self._pixels):
            if not there.get(metric, True):
                if metric in self._required:
                    what = {
                        _NEEDS_LABELS: "labels",
                        _NEEDS_PROMPTS: "prompts",
                        TEMPORAL: "videos of two frames and more, and those of full precision",
                    }.get(metric, "full-precision images")
                    raise AquabitError(f"metric {metric!r} needs {what}")
                continue
            if metric in self._sums:
                result[metric] = self._sums[metric] / self.count
            else:
                result[metric] = self._compute_one(*self._jobs[metric])
        return result | {m.name: self._sums[m.name] / self.count for m in self._own if m.name in self._sums}

    def _check_size(self, x: Tensor) -> None:
        for source in self._sources:
            if source.reference is not None and tuple(x.shape[-2:]) != source.reference.size:
                made, real = (" x ".join(map(str, v)) for v in (x.shape[-2:], source.reference.size))
                raise AquabitError(
                    f"images are {made} pixels and those of the reference {real}; make the reference at the"
                    " size of the images"
                )

    def _values(
        self, x: Tensor, y: Tensor | None, features: Sequence[Features | None], prompts: Sequence[str] | None
    ) -> dict[str, Array]:
        """The metrics that are a mean of one number an image."""
        values: dict[str, Array] = {}
        if y is not None and {"mse", "psnr"} & set(self._pixels):
            error = paired.mse(x, y)
            values |= {
                k: v
                for k, v in {"mse": error, "psnr": paired.psnr_from_mse(error)}.items()
                if k in self._pixels
            }
        if y is not None and "ssim" in self._pixels:
            values["ssim"] = paired.ssim(x, y)
        for metric, (i, kind) in self._jobs.items():
            extractor, found = self._sources[i].extractor, features[i]
            if found is not None and kind in _OF_SPATIAL and y is not None:
                values[metric] = _OF_SPATIAL[kind](found.spatial, extractor(y).spatial)
            elif kind == "lpips" and y is not None and isinstance(extractor, Lpips):
                values[metric] = extractor.distances(x, y)
            elif (
                found is not None
                and kind == "clip_score"
                and prompts is not None
                and isinstance(extractor, ClipFeatures)
            ):
                values[metric] = extractor.scores(found.pooled, prompts)
        return values

    def _compute_one(self, index: int, kind: str) -> float:
        made, real = self._collected[index], self._sources[index].reference
        if kind in ("inception_score", "accuracy"):
            return made.inception_score if kind == "inception_score" else made.accuracy
        assert real is not None  # such metrics are not served without
        if kind == "frechet":
            return _frechet(real.pooled_mean, real.pooled_factor, made.pooled)
        if kind == "spatial_frechet":
            return _frechet(real.spatial_mean, real.spatial_factor, made.spatial)
        rows = made.kept.rows
        match kind:
            case "kernel":
                return distances.kid_from_sums(real.kernel_sum, real.pooled, rows)
            case "gaussian":
                return distances.cmmd_from_sums(real.kernel_sum, real.pooled, rows)
            case "precision":
                return distances.fraction_inside(rows, real.pooled, real.pooled_radii)
            case "recall":
                return distances.fraction_inside(real.pooled, rows, distances.neighbour_radii(rows))
        raise AssertionError(kind)


def _asked(conditions: Any, count: int) -> tuple[npt.NDArray[Any] | None, list[str] | None]:
    """Conditions as class labels [n] or as prompts."""
    if conditions is None:
        return None, None
    if len(conditions) == count and all(isinstance(c, str) for c in conditions):
        return None, list(conditions)
    labels = np.asarray(conditions)
    if labels.shape != (count,):
        raise AquabitError(f"labels have shape {list(labels.shape)}; expected [{count}]")
    return labels, None


def _frechet(mean: Array, factor: Array, generated: Moments) -> float:
    if generated.count < 2:
        return float("nan")
    return distances.frechet_from_factors(mean, factor, generated.mean, generated.factor)

"""Quality: every metric of a stream of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from aquabit.quality import distances, paired
from aquabit.quality.features import FeatureExtractor, Features, unit_images
from aquabit.quality.moments import Moments
from aquabit.quality.reference import Reference
from aquabit.scheme import LOWER_IS_BETTER, AquabitError, direction

Array = distances.Array
PAIRED = ("mse", "psnr", "ssim", "feature_distance")
_PIXELS = ("mse", "psnr", "ssim")  # need no features
_KEEP_POOLED = ("kid", "precision", "recall")
_KEEP_LOGITS = ("is", "accuracy")


class Quality:
    """Metrics of generated images against real ones and, where given, against the full-precision images of the same seeds.

    ``update`` once per micro batch, then ``compute``. Images are reduced at once; what stays is moments, and pooled features and
    logits where a wanted metric needs them. ``metrics=None`` means all that the inputs allow.
    """

    def __init__(self, extractor: FeatureExtractor, reference: Reference, metrics: Sequence[str] | None = None) -> None:
        if extractor.digest != reference.extractor:
            raise AquabitError(f"the reference was made with extractor {reference.extractor}, not {extractor.digest}; make it again")
        for metric in metrics or ():
            direction(metric)  # raises for an unknown one
        self.extractor, self.reference = extractor, reference
        self.metrics = tuple(LOWER_IS_BETTER) if metrics is None else tuple(metrics)
        self._required = () if metrics is None else self.metrics
        self.count = 0
        self._inputs: tuple[bool, bool] | None = None  # whether full-precision images and labels come with each batch
        self._pooled_moments, self._spatial_moments = Moments(), Moments()
        self._pooled: list[Array] = []
        self._logits: list[Array] = []
        self._labels: list[Array] = []
        self._paired_sums: dict[str, float] = {}

    def update(self, images: Any, full_precision_images: Any = None, labels: Any = None) -> None:
        """Take in one micro batch [n, c, h, w], floats in [0, 1] or uint8; ``labels`` [n] are the classes that were asked for.

        Raises NonFiniteImages, and AquabitError for other images that cannot be measured; nothing of the batch is then taken in.
        """
        x = unit_images(images)
        y = None if full_precision_images is None else unit_images(full_precision_images, "full-precision images")
        wanted = None if labels is None else np.asarray(labels)
        if wanted is not None and wanted.shape != (len(x),):
            raise AquabitError(f"labels have shape {list(wanted.shape)}; expected [{len(x)}]")
        inputs = (y is not None, wanted is not None)
        if self._inputs not in (None, inputs):
            raise AquabitError("full-precision images and labels must come with every micro batch or with none")
        features = self.extractor(x) if self._wants(*(m for m in LOWER_IS_BETTER if m not in _PIXELS)) else None
        pairs = {} if y is None else self._pair_distances(x, y, features)
        if features is not None:
            self._take(features)
        for name, values in pairs.items():
            self._paired_sums[name] = self._paired_sums.get(name, 0.0) + float(values.sum())
        if wanted is not None:
            self._labels.append(wanted)
        self._inputs = inputs
        self.count += len(x)

    def compute(self) -> dict[str, float]:
        """The metrics of all images so far, keyed and ordered as ``scheme.LOWER_IS_BETTER``.

        Paired metrics only where full-precision images came, accuracy only where labels came; a metric that was asked for by name
        and lacks them is an error. Values that too few images leave undefined are NaN (fid, sfid and kid need 2, recall 4).
        """
        if not self.count or self._inputs is None:
            raise AquabitError("no images to measure; call update first")
        has_pairs, has_labels = self._inputs
        result: dict[str, float] = {}
        for metric in (m for m in LOWER_IS_BETTER if m in self.metrics):
            if (metric in PAIRED and not has_pairs) or (metric == "accuracy" and not has_labels):
                if metric in self._required:
                    raise AquabitError(f"metric {metric!r} needs {'labels' if metric == 'accuracy' else 'full-precision images'}")
                continue
            result[metric] = self._paired_sums[metric] / self.count if metric in PAIRED else self._compute_one(metric)
        return result

    def _wants(self, *metrics: str) -> bool:
        return any(m in self.metrics for m in metrics)

    def _pair_distances(self, x: Tensor, y: Tensor, features: Features | None) -> dict[str, Array]:
        values: dict[str, Array] = {}
        if self._wants("mse", "psnr"):
            values["mse"] = paired.mse(x, y)
            values["psnr"] = paired.psnr_from_mse(values["mse"])
        if self._wants("ssim"):
            values["ssim"] = paired.ssim(x, y)
        if self._wants("feature_distance") and features is not None:
            values["feature_distance"] = paired.feature_distance(features.spatial, self.extractor(y).spatial)
        return values

    def _take(self, features: Features) -> None:
        if self._wants("fid"):
            self._pooled_moments.update(features.pooled)
        if self._wants("sfid"):
            self._spatial_moments.update(features.spatial)
        if self._wants(*_KEEP_POOLED):
            self._pooled.append(np.asarray(features.pooled, dtype=np.float64))
        if self._wants(*_KEEP_LOGITS):
            self._logits.append(np.asarray(features.logits, dtype=np.float64))

    def _compute_one(self, metric: str) -> float:
        real = self.reference
        match metric:
            case "fid":
                return _frechet(real.pooled_mean, real.pooled_root, self._pooled_moments)
            case "sfid":
                return _frechet(real.spatial_mean, real.spatial_root, self._spatial_moments)
            case "is":
                return distances.inception_score(np.concatenate(self._logits))
            case "accuracy":
                return distances.accuracy(np.concatenate(self._logits), np.concatenate(self._labels))
        pooled = np.concatenate(self._pooled)
        match metric:
            case "kid":
                return distances.kid_from_sums(real.pooled_kernel_sum, real.pooled, pooled)
            case "precision":
                return distances.fraction_inside(pooled, real.pooled, real.pooled_radii)
            case "recall":
                return distances.fraction_inside(real.pooled, pooled, distances.neighbour_radii(pooled))
        raise AssertionError(metric)


def _frechet(mean: Array, root: Array, generated: Moments) -> float:
    if generated.count < 2:
        return float("nan")
    return distances.frechet_from_roots(mean, root, generated.mean, distances.covariance_root(generated.covariance))

"""The real images that generated ones are compared with, reduced once to what the metrics need."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aquabit.files import writing
from aquabit.quality.distances import (
    NEIGHBOURS,
    Array,
    gaussian_kernel_sum,
    neighbour_radii,
    within_kernel_sum,
)
from aquabit.quality.feature_statistics import FeatureStatistics
from aquabit.quality.features import WITHOUT_REAL, FeatureExtractor, unit_images
from aquabit.scheme import AquabitError

_MICRO_BATCH = 64
_NONE: Array = np.zeros(0)
_ARRAYS = ("pooled", "pooled_mean", "pooled_factor", "pooled_radii", "spatial_mean", "spatial_factor")


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images under one extractor; float64, empty where its metrics need none. Plain
    arrays, so it can be sent to a worker process."""

    digest: str  # of the images and the extractor
    extractor: str  # digest of the extractor
    size: tuple[int, int]  # height and width of the images
    count: int
    pooled: Array  # [m, d], of at most KEPT images
    pooled_mean: Array  # [d], of all images, as all moments
    pooled_factor: Array  # [r, d], F with F^T F = covariance
    pooled_radii: Array  # [m], distance to the third nearest neighbour
    kernel_sum: float  # over pairs of ``pooled``: within_kernel_sum, or gaussian_kernel_sum for CMMD
    spatial_mean: Array  # [s]
    spatial_factor: Array  # [r, s]

    @staticmethod
    def from_images(images: Any, extractor: FeatureExtractor) -> Reference:
        """Of real images [m, c, h, w], an array or a tensor: floats in [0, 1], or uint8 in 0..255."""
        tensor = torch.as_tensor(images)
        return Reference.from_batches(tensor.split(_MICRO_BATCH) if tensor.ndim else [tensor], extractor)

    @staticmethod
    def from_batches(batches: Iterable[Any], extractor: FeatureExtractor) -> Reference:
        """``from_images`` for images that do not fit in memory; the digest does not depend on how they are
        batched."""
        hashed = hashlib.sha256(extractor.digest.encode())
        collected, shape = FeatureStatistics(real_kinds(extractor)), None
        for batch in batches:
            images = unit_images(batch, "reference images")
            if shape != images.shape[1:]:
                if shape is not None:
                    raise AquabitError(
                        f"reference images have shapes {list(shape)} and {list(images.shape[1:])}; expected"
                        " one shape"
                    )
                shape = images.shape[1:]
                hashed.update(str(tuple(shape)).encode())
            hashed.update(images.contiguous().numpy().tobytes())
            collected.update(extractor(images))
        height, width = (int(v) for v in shape[-2:]) if shape else (0, 0)
        return Reference.of(collected, hashed.hexdigest()[:16], extractor.digest, (height, width))

    @staticmethod
    def of(collected: FeatureStatistics, digest: str, extractor: str, size: tuple[int, int]) -> Reference:
        """Of features that were collected of the real images."""
        if collected.count <= NEIGHBOURS:
            raise AquabitError(
                f"the reference has {collected.count} images; precision and recall need at least"
                f" {NEIGHBOURS + 1}"
            )
        kinds, pooled, kernel_sum = collected.kinds, np.zeros((0, 0)), float("nan")
        if kinds & {"kernel", "gaussian", "precision", "recall"}:
            pooled = collected.kept.rows
        if "gaussian" in kinds:
            kernel_sum = gaussian_kernel_sum(pooled, pooled)
        elif "kernel" in kinds:
            kernel_sum = within_kernel_sum(pooled)
        frechet, spatial = "frechet" in kinds, "spatial_frechet" in kinds
        return Reference(
            digest=digest,
            extractor=extractor,
            size=size,
            count=collected.count,
            pooled=pooled,
            pooled_mean=collected.pooled.mean if frechet else _NONE,
            pooled_factor=collected.pooled.factor if frechet else _NONE,
            pooled_radii=neighbour_radii(pooled) if kinds & {"precision", "recall"} else _NONE,
            kernel_sum=kernel_sum,
            spatial_mean=collected.spatial.mean if spatial else _NONE,
            spatial_factor=collected.spatial.factor if spatial else _NONE,
        )

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """As a safetensors file with ``facts`` (JSON), whole or not at all."""
        spec = {k: getattr(self, k) for k in ("digest", "extractor", "size", "count", "kernel_sum")}
        try:
            with writing(path) as temporary:
                arrays = {k: np.ascontiguousarray(getattr(self, k)) for k in _ARRAYS}
                save_file(arrays, temporary, {"reference": json.dumps(spec), "facts": json.dumps(facts)})
        except (OSError, SafetensorError, AquabitError) as error:
            raise AquabitError(
                f"the statistics of the reference could not be written to {path} ({error}); free some space"
            ) from error

    @staticmethod
    def load(path: Path) -> tuple[Reference, dict[str, Any]] | None:
        """What ``save`` wrote; None where it is missing or damaged."""
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata()
                spec = json.loads(metadata["reference"])
                arrays = {k: file.get_tensor(k) for k in _ARRAYS}
            os.utime(path)
            return Reference(**{**spec, "size": tuple(spec["size"])}, **arrays), json.loads(metadata["facts"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            return None


def real_kinds(extractor: FeatureExtractor) -> set[str]:
    """How the extractor's metrics that need real images are computed."""
    return set(extractor.metrics.values()) - set(WITHOUT_REAL)

"""The real images that generated ones are compared with, reduced once to what the metrics need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aquabit.quality.distances import NEIGHBOURS, Array, covariance_root, neighbour_radii, within_kernel_sum
from aquabit.quality.features import BUNDLED, FeatureExtractor, load_tensors, unit_images
from aquabit.quality.moments import Moments
from aquabit.scheme import AquabitError

_MICRO_BATCH = 64


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of m real images under one extractor; float64. Plain arrays, so it can be sent to a worker process."""

    digest: str  # of the images' float32 bytes and the extractor
    extractor: str  # digest of the extractor
    pooled: Array  # [m, d]
    pooled_mean: Array  # [d]
    pooled_root: Array  # [d, d], root of the covariance
    pooled_radii: Array  # [m], distance to the third nearest neighbour
    pooled_kernel_sum: float  # within_kernel_sum(pooled)
    spatial_mean: Array  # [s]
    spatial_root: Array  # [s, s]

    @staticmethod
    def from_images(images: Any, extractor: FeatureExtractor) -> Reference:
        """Of real images [m, c, h, w], an array or a tensor: floats in [0, 1], or uint8 in 0..255."""
        tensor = torch.as_tensor(images)
        return Reference.from_batches(tensor.split(_MICRO_BATCH) if tensor.ndim else [tensor], extractor)

    @staticmethod
    def from_batches(batches: Iterable[Any], extractor: FeatureExtractor) -> Reference:
        """``from_images`` for images that do not fit in memory; the digest does not depend on how they are batched."""
        hashed = hashlib.sha256(extractor.digest.encode())
        pooled: list[Array] = []
        spatial, shape = Moments(), None
        for batch in batches:
            images = unit_images(batch, "reference images")
            if shape != images.shape[1:]:
                if shape is not None:
                    raise AquabitError(f"reference images have shapes {list(shape)} and {list(images.shape[1:])}; expected one shape")
                shape = images.shape[1:]
                hashed.update(str(tuple(shape)).encode())
            hashed.update(images.contiguous().numpy().tobytes())
            features = extractor(images)
            pooled.append(np.asarray(features.pooled, dtype=np.float64))
            spatial.update(features.spatial)
        if spatial.count <= NEIGHBOURS:
            raise AquabitError(f"the reference has {spatial.count} images; precision and recall need at least {NEIGHBOURS + 1}")
        return _reference(hashed.hexdigest()[:16], extractor.digest, np.concatenate(pooled), spatial)


def _reference(digest: str, extractor: str, pooled: Array, spatial: Moments) -> Reference:
    moments = Moments()
    moments.update(pooled)
    return Reference(
        digest=digest,
        extractor=extractor,
        pooled=pooled,
        pooled_mean=moments.mean,
        pooled_root=covariance_root(moments.covariance),
        pooled_radii=neighbour_radii(pooled),
        pooled_kernel_sum=within_kernel_sum(pooled),
        spatial_mean=spatial.mean,
        spatial_root=covariance_root(spatial.covariance),
    )


def bundled_reference(extractor: FeatureExtractor) -> Reference:
    """The 899 held-out digits that neither the bundled models nor the classifier were trained on."""
    return Reference.from_images(held_out_digits()[0], extractor)


def held_out_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out half of scikit-learn's digits: images [899, 1, 8, 8], float32 in [0, 1], and labels [899], int64."""
    path = BUNDLED / "held_out.safetensors"
    tensors = load_tensors(path)
    if tensors.keys() != {"images", "labels"}:
        raise AquabitError(f"{path} holds {', '.join(sorted(tensors))}; expected images and labels")
    return tensors["images"].float() / 16, tensors["labels"].long()  # the digits have 17 grey levels, 0 to 16

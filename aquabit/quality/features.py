"""Images to features: what an extractor returns, and what images must look like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from aquabit.scheme import AquabitError


class NonFiniteImages(AquabitError):
    """``count`` of the ``total`` images of a batch hold a NaN or an infinity."""

    def __init__(self, count: int, total: int, what: str = "images") -> None:
        super().__init__(f"{count} of {total} {what} are non-finite (NaN or infinite pixels)")
        self.count, self.total, self.what = count, total, what

    def __reduce__(self) -> tuple[type[NonFiniteImages], tuple[int, int, str]]:
        # so that it survives the way back from a worker process
        return type(self), (self.count, self.total, self.what)


class Features(NamedTuple):
    """What the metrics see of n images, float32; empty arrays [n, 0] where an extractor has none."""

    pooled: npt.NDArray[np.float32]  # [n, d]: FID, KID, CMMD, precision and recall
    spatial: npt.NDArray[np.float32]  # [n, s]: sFID and distances of paired images
    logits: npt.NDArray[np.float32]  # [n, classes]: IS and accuracy


class FeatureExtractor(Protocol):
    """Callable from images [n, c, h, w], float32 in [0, 1], to Features; one image's features do not
    depend on the others."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """The metrics that its features serve, and how each is computed: a row of ``METRICS_OF``, or what
        the file has of it."""

    @property
    def digest(self) -> str:
        """Changes with anything that changes the features; it enters the digest of every Reference."""

    def __call__(self, images: Tensor) -> Features: ...


# extractor -> metric -> how it is computed from the features
METRICS_OF: Mapping[str, Mapping[str, str]] = {
    "classifier": {
        "fid": "frechet",
        "sfid": "spatial_frechet",
        "kid": "kernel",
        "is": "inception_score",
        "precision": "precision",
        "recall": "recall",
        "accuracy": "accuracy",
        "feature_distance": "feature_distance",
    },
    "inception": {
        "fid": "frechet",
        "sfid": "spatial_frechet",
        "kid": "kernel",
        "is": "inception_score",
        "precision": "precision",
        "recall": "recall",
    },
    "dinov2": {
        "fd_dinov2": "frechet",
        "kd_dinov2": "kernel",
        "precision_dinov2": "precision",
        "recall_dinov2": "recall",
    },
    "clip": {"cmmd": "gaussian", "clip_score": "clip_score"},
    "lpips": {"lpips": "lpips"},
    "effnet": {
        "effnet_fd": "frechet",
        "effnet_kd": "kernel",
        "precision_effnet": "precision",
        "recall_effnet": "recall",
        "effnet_distance": "squared_distance",
    },
}
# of these, what needs no real images
WITHOUT_REAL = ("inception_score", "accuracy", "feature_distance", "clip_score", "lpips", "squared_distance")


def unit_images(images: Any, what: str = "images") -> Tensor:
    """Images [n, c, h, w] as float32 in [0, 1] on the CPU; uint8 is divided by 255.

    Raises NonFiniteImages, and AquabitError for another shape or for values outside [0, 1].
    """
    tensor = torch.as_tensor(images).detach()
    if tensor.ndim != 4 or not tensor.numel():
        raise AquabitError(f"{what} have shape {list(tensor.shape)}; expected [n, c, h, w], none of them 0")
    if tensor.dtype == torch.uint8:
        return tensor.cpu().float() / 255
    if not tensor.is_floating_point():
        raise AquabitError(f"{what} have dtype {tensor.dtype}; expected floats in [0, 1] or uint8")
    tensor = tensor.to("cpu", torch.float32)
    low, high = (v.item() for v in tensor.aminmax())  # NaN propagates into both, infinities into one
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~tensor.isfinite()).flatten(1).any(1).sum())
        raise NonFiniteImages(bad, len(tensor), what)
    if low < -1e-6 or high > 1 + 1e-6:
        raise AquabitError(
            f"{what} span [{low:.4g}, {high:.4g}]; expected values in [0, 1] (clamp them, and map [-1, 1] by"
            " x / 2 + 1 / 2)"
        )
    return tensor


def any_numbers(values: Any, what: str = "arrays") -> Tensor:
    """Arrays [n, ...] that are no images as float32 on the CPU; raises NonFiniteImages as ``unit_images``
    does."""
    tensor = torch.as_tensor(values).detach().to("cpu", torch.float32)
    bad = int((~tensor.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise NonFiniteImages(bad, len(tensor), what)
    return tensor


def three_channels(images: Tensor) -> Tensor:
    """Images [n, 1 or 3, h, w] as [n, 3, h, w], grey ones repeated; AquabitError for another number of
    channels."""
    if images.shape[1] not in (1, 3):
        raise AquabitError(f"images have {images.shape[1]} channels; extractors of real images take 1 or 3")
    return images.expand(-1, 3, -1, -1)


def rgb(images: Tensor) -> Tensor:
    """Images [n, 1 or 3, h, w] in [0, 1] as [n, 3, h, w] in 0..255, rounded to what an 8-bit file holds:
    published numbers are of files. Raises as ``three_channels`` does."""
    return three_channels((images * 255).round().clamp(0, 255))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; AquabitError where it is missing, truncated or something else."""
    return tensors_of(path)[1]


def tensors_of(path: Path) -> tuple[bytes, dict[str, Tensor]]:
    """The bytes of a safetensors file, and their tensors; raises as ``load_tensors`` does."""
    try:
        data = path.read_bytes()
        return data, load(data)
    except OSError as error:
        raise AquabitError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise AquabitError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated"
        ) from error

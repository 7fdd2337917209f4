"""Images to features: what an extractor returns, what images must look like, and the bundled digits
classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional as F

from aquabit.scheme import AquabitError

BUNDLED = Path(__file__).parents[1] / "pipelines" / "bundled"
SPATIAL_CHANNELS = 4
_SHAPES = {
    "0.weight": (32, 1, 3, 3),
    "0.bias": (32,),
    "2.weight": (64, 32, 3, 3),
    "2.bias": (64,),
    "4.weight": (64, 64, 3, 3),
    "4.bias": (64,),
    "7.weight": (32, 1024),
    "7.bias": (32,),
    "9.weight": (10, 32),
    "9.bias": (10,),
}


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
    spatial: npt.NDArray[np.float32]  # [n, s]: sFID and the feature distance
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
    "digits": {
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
}
# of these, what needs no real images
WITHOUT_REAL = ("inception_score", "accuracy", "feature_distance", "clip_score", "lpips")


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


def rgb(images: Tensor) -> Tensor:
    """Images [n, 1 or 3, h, w] in [0, 1] as [n, 3, h, w] in 0..255, rounded to what an 8-bit file holds:
    published numbers are of files.

    Raises AquabitError for another number of channels.
    """
    if images.shape[1] not in (1, 3):
        raise AquabitError(f"images have {images.shape[1]} channels; extractors of real images take 1 or 3")
    return (images * 255).round().clamp(0, 255).expand(-1, 3, -1, -1)


class DigitsFeatures:
    """The bundled classifier of 8 x 8 digits (``zoo/train.py``, ``build_classifier``), trained on the half
    that no reference holds.

    pooled [n, 32] the penultimate activation; spatial [n, 64] the first 4 channels of the last convolution's
    activation, as sFID takes the first channels of a spatial Inception layer; logits [n, 10].
    """

    metrics = METRICS_OF["digits"]

    def __init__(self, path: Path | str = BUNDLED / "classifier.safetensors") -> None:
        data = _read(Path(path))
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        self._weights = {k: v.float() for k, v in _parse(data, Path(path)).items()}
        shapes = {k: tuple(v.shape) for k, v in self._weights.items()}
        if shapes != _SHAPES:
            wrong = sorted(k for k in shapes.keys() | _SHAPES if shapes.get(k) != _SHAPES.get(k))
            raise AquabitError(
                f"{path} does not hold the digits classifier: wrong, missing or unknown tensors"
                f" {', '.join(wrong)}"
            )
        if not all(v.isfinite().all() for v in self._weights.values()):
            raise AquabitError(f"{path} holds non-finite weights")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images [n, 1, 8, 8], float32 in [0, 1]."""
        if images.shape[1:] != (1, 8, 8):
            raise AquabitError(f"the digits classifier takes images [n, 1, 8, 8], not {list(images.shape)}")
        w = self._weights
        x = images.to("cpu", torch.float32) * 2 - 1
        x = F.silu(F.conv2d(x, w["0.weight"], w["0.bias"], padding=1))
        x = F.silu(F.conv2d(x, w["2.weight"], w["2.bias"], stride=2, padding=1))
        x = F.silu(F.conv2d(x, w["4.weight"], w["4.bias"], padding=1))
        pooled = F.silu(F.linear(x.flatten(1), w["7.weight"], w["7.bias"]))
        logits = F.linear(pooled, w["9.weight"], w["9.bias"])
        return Features(pooled.numpy(), x[:, :SPATIAL_CHANNELS].flatten(1).numpy(), logits.numpy())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; AquabitError where it is missing, truncated or something else."""
    return _parse(_read(path), path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AquabitError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AquabitError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated"
        ) from error

"""Distances between two images of the same seed, one number per image, or between two videos, one per video;
images [n, c, h, w] in [0, 1], results [n] float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from aquabit.scheme import AquabitError

Array = npt.NDArray[np.float64]
PSNR_CAP = 100.0
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with data range L = 1
_CHUNK = 2**22  # values of an image batch turned into float64 at a time


def _same_shape(a: tuple[int, ...], b: tuple[int, ...], what: str) -> None:
    if a != b:
        raise AquabitError(f"paired {what} have shapes {list(a)} and {list(b)}; expected the same")


def mse(images: Tensor, others: Tensor) -> Array:
    """Mean squared difference over the pixels and channels of each image."""
    _same_shape(images.shape, others.shape, "images")
    result: Array = (images.float() - others.float()).square().flatten(1).mean(1, dtype=torch.float64).numpy()
    return result


def psnr_from_mse(error: Array) -> Array:
    """``psnr`` where ``mse`` is known."""
    result: Array = -10.0 * np.log10(np.maximum(error, 10.0 ** (-PSNR_CAP / 10.0)))
    return result


def temporal_mse(images: Tensor, others: Tensor, frames: int) -> Array:
    """How much the error of each video changes from one frame to the next: the mean squared difference of the
    differences of consecutive frames, [videos]; images [videos * frames, c, h, w], those of a video in order.

    The square of dtSSD over the number of values (Erofeev et al. 2015, "Perceptually motivated benchmark for
    video matting"), in which flicker counts and what is wrong in every frame alike does not. Where errors of
    frames are independent it is twice ``mse``. Raises AquabitError where no video has two frames.
    """
    _same_shape(images.shape, others.shape, "images")
    if frames < 2 or len(images) % frames:
        raise AquabitError(
            f"{len(images)} images in videos of {frames} frames have no differences of consecutive frames"
        )
    videos = zip(images.split(frames), others.split(frames), strict=True)
    return np.array([_mean_squared_steps(made, full) for made, full in videos])


def _mean_squared_steps(video: Tensor, other: Tensor) -> float:
    """Of one video; frame by frame, as a video of real size fills memory."""
    total, last = 0.0, video[0].float() - other[0].float()
    for made, full in zip(video[1:], other[1:], strict=True):
        error = made.float() - full.float()
        total += float((error - last).square().mean(dtype=torch.float64))
        last = error
    return total / (len(video) - 1)


def ssim_window(height: int, width: int) -> Tensor:
    """One-dimensional Gaussian weights [k], float64, sum 1: sigma 1.5, k = 11 or the largest odd number
    that fits the image."""
    size = min(_SSIM_WINDOW, height, width)
    size -= 1 - size % 2
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-offsets.square() / (2 * _SSIM_SIGMA**2))
    return weights / weights.sum()


def ssim(images: Tensor, others: Tensor) -> Array:
    """Structural similarity of each image (Wang et al. 2004, eq. 13): Gaussian window 11 x 11, sigma 1.5, K =
    0.01, 0.03.

    The mean over the positions where the window lies inside the image, and over channels. Images smaller than
    the window take the largest odd window that fits (7 x 7 for 8 x 8 pixels), same sigma.
    """
    _same_shape(images.shape, others.shape, "images")
    count = max(1, _CHUNK // images[0].numel())
    pairs = zip(images.split(count), others.split(count), strict=True)
    return np.concatenate([_ssim_chunk(x.double(), y.double()).numpy() for x, y in pairs])


def _ssim_chunk(x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = x.shape
    weights = ssim_window(h, w)
    planes = torch.stack([x, y, x * x, y * y, x * y]).reshape(5 * n * c, 1, h, w)
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = planes.unflatten(0, (5, n, c)).squeeze(3)
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    structure = (2 * (xy - mean_x * mean_y) + _SSIM_C2) / (xx - mean_x**2 + yy - mean_y**2 + _SSIM_C2)
    result: Tensor = (luminance * structure).flatten(1).mean(1)
    return result


def feature_distance(spatial: npt.ArrayLike, others: npt.ArrayLike) -> Array:
    """Squared distance, 0 to 4, of the unit-normalised spatial features [n, s] of each image.

    After LPIPS (Zhang et al. 2018, eq. 1) with one layer, no learned weights, and the norm over the whole
    feature map.
    """
    a, b = np.asarray(spatial, dtype=np.float64), np.asarray(others, dtype=np.float64)
    _same_shape(a.shape, b.shape, "features")
    unit_a, unit_b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-10) for v in (a, b))
    return squared_distance(unit_a, unit_b)


def squared_distance(features: npt.ArrayLike, others: npt.ArrayLike) -> Array:
    """Squared distance of the features [n, s] of each image as they are."""
    a, b = np.asarray(features, dtype=np.float64), np.asarray(others, dtype=np.float64)
    _same_shape(a.shape, b.shape, "features")
    result: Array = ((a - b) ** 2).sum(1)
    return result

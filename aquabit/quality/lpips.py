"""LPIPS (Zhang et al. 2018) from stored weights: AlexNet or VGG-16 with linear heads, any widths."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aquabit.quality.features import METRICS_OF, Features, load_tensors
from aquabit.quality.paired import Array
from aquabit.scheme import AquabitError

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the lpips package's ScalingLayer


class _Net(NamedTuple):
    slices: tuple[tuple[int, ...], ...]  # the convolutions of each slice, as torchvision numbers them
    strides: tuple[int, int]  # of the first convolution, and its padding
    pool: int  # window of the pooling before each slice but the first; stride 2
    least: int  # pixels a side that it needs


_NETS = {
    11: _Net(
        ((0,), (3,), (6,), (8,), (10,)), (4, 2), 3, 32
    ),  # AlexNet: the fourth and fifth slice have no pooling
    3: _Net(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (1, 1), 2, 16),  # VGG-16
}


class Lpips:
    """Distances between images of one seed, from a safetensors file of ``lpips.LPIPS(net="alex" or
    "vgg").state_dict()``.

    Raises AquabitError for a file that holds neither.
    """

    metrics = METRICS_OF["lpips"]

    def __init__(self, path: Path, device: str = "cpu") -> None:
        weights = load_tensors(path)
        self.digest, self.device = tensors_digest(weights), device
        first = weights.get("net.slice1.0.weight")
        net = _NETS.get(first.shape[-1]) if first is not None and first.ndim == 4 else None
        if net is None:
            raise AquabitError(
                f"{path} is no LPIPS of AlexNet or VGG-16: net.slice1.0.weight is missing, or no kernel of 11"
                " or 3 pixels"
            )
        self._net = net
        names = [
            f"net.slice{i + 1}.{j}.{kind}"
            for i, row in enumerate(net.slices)
            for j in row
            for kind in ("weight", "bias")
        ]
        heads = [f"lin{i}.model.1.weight" for i in range(len(net.slices))]
        missing = [k for k in (*names, *heads) if k not in weights]
        if missing:
            raise AquabitError(f"{path} lacks {len(missing)} tensors of LPIPS, the first is {missing[0]}")
        if not all(bool(weights[k].isfinite().all()) for k in (*names, *heads)):
            raise AquabitError(f"{path} holds non-finite weights")
        self._weights = {k: weights[k].float().to(device) for k in (*names, *heads)}

    def __call__(self, images: Tensor) -> Features:
        """LPIPS has no features of one image that a distance of sets would use."""
        none = np.empty((len(images), 0), np.float32)
        return Features(none, none, none)

    @torch.inference_mode()
    def distances(self, images: Tensor, others: Tensor) -> Array:
        """LPIPS [n] of images and others [n, 1 or 3, h, w] in [0, 1] (eq. 1): differences of
        unit-normalised activations, squared, weighted by the heads, averaged over positions, summed over
        slices."""
        if min(images.shape[-2:]) < self._net.least:
            size = " x ".join(map(str, images.shape[-2:]))
            raise AquabitError(
                f"images are {size} pixels; this LPIPS needs at least {self._net.least} x {self._net.least}"
            )
        parts = zip(images.split(16), others.split(16), strict=True)
        return np.concatenate([self._chunk(x.to(self.device), y.to(self.device)) for x, y in parts])

    def _chunk(self, x: Tensor, y: Tensor) -> Array:
        total = torch.zeros(len(x), dtype=torch.float64, device=self.device)
        for i, (a, b) in enumerate(zip(self._slices(x), self._slices(y), strict=True)):
            difference = (_unit(a) - _unit(b)).square()
            total += F.conv2d(difference, self._weights[f"lin{i}.model.1.weight"]).mean(
                (1, 2, 3), dtype=torch.float64
            )
        result: Array = total.cpu().numpy()
        return result

    def _slices(self, images: Tensor) -> list[Tensor]:
        """Activations after each slice."""
        shift, scale = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        x, found = (images.expand(-1, 3, -1, -1) * 2 - 1 - shift) / scale, []
        for i, convolutions in enumerate(self._net.slices):
            if i and not (self._net.pool == 3 and i > 2):
                x = F.max_pool2d(x, self._net.pool, 2)
            for j in convolutions:
                weight, bias = (self._weights[f"net.slice{i + 1}.{j}.{kind}"] for kind in ("weight", "bias"))
                stride, padding = self._net.strides if (i, j) == (0, 0) else (1, weight.shape[-1] // 2)
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes and values."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(
            f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()
            + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )
    return hashed.hexdigest()[:16]

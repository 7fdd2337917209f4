"""The size of the images that a pipeline makes, read from its configuration: no image is made; a model of the
user's own makes one."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from aquabit.pipelines.family import DECODERS
from aquabit.pipelines.network import denoiser_of
from aquabit.pipelines.own_model import Model
from aquabit.scheme import Calibration


def image_size(pipe: DiffusionPipeline | Model, resolution: int | None = None) -> tuple[int, int] | None:
    """Height and width in pixels at a protocol's resolution (None: the model's own); None where the
    configuration does not say."""
    if isinstance(pipe, Model):
        return pipe.size(resolution)
    if resolution is not None:
        return resolution, resolution
    parameters = inspect.signature(type(pipe).__call__).parameters
    usual = tuple(parameters[k].default for k in ("height", "width") if k in parameters)
    if len(usual) == 2 and all(isinstance(v, int) for v in usual):
        return usual[0], usual[1]
    side = getattr(pipe, "default_sample_size", None) or getattr(
        getattr(denoiser_of(pipe), "config", None), "sample_size", None
    )
    if side is None:
        return None
    height, width = (int(v) for v in (side if isinstance(side, list | tuple) else (side, side)))
    factor = _latent_factor(pipe)
    return height * factor, width * factor


def _latent_factor(pipe: DiffusionPipeline) -> int:
    """Pixels a side of one latent; 1 where there is no decoder."""
    decoder: Any = next(
        (d for name in DECODERS if isinstance(d := getattr(pipe, name, None), nn.Module)), None
    )
    if decoder is None:
        return 1
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    said = next((value for name in names if (value := getattr(pipe, name, None))), None)
    return int(said) if said else 2 ** (len(getattr(decoder.config, "block_out_channels", (0,))) - 1)


def image_batch(pipe: DiffusionPipeline | Model, asked: Calibration, most: int) -> int:
    """Samples of one call where no protocol says it: ``most``, or as many as have the pixels of 16 images
    of 256 x 256; four frames of a video are one image, as decoders of videos count them."""
    height, width = image_size(pipe, asked.resolution) or (256, 256)
    own = inspect.signature(type(pipe).__call__).parameters.get("num_frames")
    frames = asked.frames or (own.default if own is not None and isinstance(own.default, int) else 1)
    return max(1, min(most, 16 * 256**2 // (height * width * -(-frames // 4))))

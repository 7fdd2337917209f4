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

FRAMES = ("num_frames", "frames", "video_length")  # what pipelines of videos call their number
UNSAID = 49  # frames where a pipeline of videos does not say how many it makes (CogVideoX's)


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
    config = getattr(denoiser_of(pipe), "config", None)
    both = [getattr(config, f"sample_{end}", None) for end in ("height", "width")]  # of CogVideoX
    side = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    if side is None and None not in both:
        side = both
    if side is None:
        return None
    height, width = (int(v) for v in (side if isinstance(side, list | tuple) else (side, side)))
    factor = _latent_factor(pipe)
    return height * factor, width * factor


def frames_argument(pipe: DiffusionPipeline | Model) -> str | None:
    """The argument of a pipeline's call that takes the number of frames; None where it makes no videos."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return next((name for name in FRAMES if name in parameters), None)


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
    own = inspect.signature(type(pipe).__call__).parameters.get(frames_argument(pipe) or "")
    usual = 1 if own is None else own.default if isinstance(own.default, int) else UNSAID
    frames = asked.frames or usual
    return max(1, min(most, 16 * 256**2 // (height * width * -(-frames // 4))))

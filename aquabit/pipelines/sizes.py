"""The size of the images that a pipeline makes, read from its configuration: no image is made."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline


def image_size(pipe: DiffusionPipeline, resolution: int | None = None) -> tuple[int, int] | None:
    """Height and width in pixels at a protocol's resolution (None: the model's own); None where the
    configuration does not say."""
    if resolution is not None:
        return resolution, resolution
    denoiser: Any = next(
        (m for n in ("denoiser", "transformer", "unet") if (m := getattr(pipe, n, None)) is not None), None
    )
    side = getattr(pipe, "default_sample_size", None) or getattr(
        getattr(denoiser, "config", None), "sample_size", None
    )
    if side is None:
        return None
    height, width = (int(v) for v in (side if isinstance(side, list | tuple) else (side, side)))
    factor = _latent_factor(pipe)
    return height * factor, width * factor


def _latent_factor(pipe: DiffusionPipeline) -> int:
    """Pixels a side of one latent; 1 where there is no decoder."""
    decoder: Any = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if decoder is None:
        return 1
    said = getattr(pipe, "vae_scale_factor", None)
    return int(said) if said else 2 ** (len(decoder.config.block_out_channels) - 1)

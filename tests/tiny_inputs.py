"""Tiny random pipelines of classes that take pictures: image to image, inpainting, edits, controls,
upscalers and image to video; and folders of pictures for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import transformers as t
from PIL import Image

from tests import tiny_pipelines as tiny
from tests import tiny_recent as recent
from tests.tiny_variants import amused, changed, like, sd_with_middle, lcm_unet


def pictures(folder: Path, count: int = 3, masks: bool = False, side: int = 24, texts: bool = False) -> Path:
    """Smooth random pictures cat0.png, cat1.png, ... of different shapes, with masks and texts beside
    them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = side + 4 * i, side
        small = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"cat{i}.png")
        if masks:
            mask = np.zeros((height, width), np.uint8)
            mask[:, width // 2 :] = 255
            Image.fromarray(mask).save(folder / f"cat{i}.mask.png")
        if texts:
            (folder / f"cat{i}.txt").write_text(f"cat {'abc'[i]}\n")
    return folder


def eight_channels(base: Callable[[], Any]) -> Callable[[], Any]:
    return changed(base, "unet", in_channels=8)


def nine_channels(base: Callable[[], Any]) -> Callable[[], Any]:
    return changed(base, "unet", in_channels=9)


def seen(width: int = 16) -> Any:
    """A CLIP that sees pictures."""
    config = t.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=12,
    )
    return t.CLIPVisionModelWithProjection(config)


def seer() -> Any:
    return t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


WITH_PICTURES: dict[str, Callable[[], Any]] = {
    "StableDiffusionImg2ImgPipeline": like("StableDiffusionImg2ImgPipeline", tiny.sd),
    "StableDiffusionInpaintPipeline": like("StableDiffusionInpaintPipeline", nine_channels(tiny.sd)),
    "StableDiffusionInpaintPipeline (4 channels)": like("StableDiffusionInpaintPipeline", tiny.sd),
    "StableDiffusionXLImg2ImgPipeline": like("StableDiffusionXLImg2ImgPipeline", tiny.sdxl),
    "StableDiffusionXLInpaintPipeline": like("StableDiffusionXLInpaintPipeline", nine_channels(tiny.sdxl)),
    "StableDiffusion3Img2ImgPipeline": like("StableDiffusion3Img2ImgPipeline", tiny.sd3),
    "StableDiffusion3InpaintPipeline": like(
        "StableDiffusion3InpaintPipeline",
        changed(tiny.sd3, "transformer", in_channels=16, out_channels=16),
        vae=lambda: tiny.vae(16, shift_factor=0.06),
    ),
    "FluxImg2ImgPipeline": like("FluxImg2ImgPipeline", tiny.flux),
    "FluxInpaintPipeline": like("FluxInpaintPipeline", tiny.flux),
    "FluxFillPipeline": like(
        "FluxFillPipeline", changed(tiny.flux, "transformer", in_channels=48, out_channels=16)
    ),
    "FluxKontextPipeline": like("FluxKontextPipeline", tiny.flux),
    "FluxControlPipeline": like(
        "FluxControlPipeline", changed(tiny.flux, "transformer", in_channels=32, out_channels=16)
    ),
}

"""Tiny random pipelines of classes that take pictures: image to image, inpainting, edits, controls,
upscalers and image to video; and folders of pictures for them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import transformers as t
from PIL import Image

from aquabit.inputs import read_inputs
from aquabit.pipelines.picture_arguments import picture_arguments
from aquabit.scheme import Protocol
from tests import tiny_pipelines as tiny
from tests import tiny_recent as recent
from tests.tiny_pipelines import PROMPTS
from tests.tiny_variants import amused, changed, lcm_unet, like, sd_with_middle


def pictures(
    folder: Path,
    count: int = 3,
    masks: bool = False,
    controls: bool = False,
    side: int = 24,
    texts: bool = False,
) -> Path:
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
        if controls:
            small.resize((width, height)).convert("L").save(folder / f"cat{i}.control.png")
        if texts:
            (folder / f"cat{i}.txt").write_text(f"cat {'abc'[i]}\n")
    return folder


def eight_channels(base: Callable[[], Any]) -> Callable[[], Any]:
    return changed(base, "unet", in_channels=8)


def nine_channels(base: Callable[[], Any]) -> Callable[[], Any]:
    return changed(base, "unet", in_channels=9)


def seen(side: int = 32) -> Any:
    """A CLIP that sees pictures."""
    config = t.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 4,
        projection_dim=12,
    )
    return t.CLIPVisionModelWithProjection(config)


def seer() -> Any:
    return t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def controlled(name: str) -> Callable[[], Any]:
    """A Stable Diffusion class beside a ControlNet, which stays dense."""

    def net() -> Any:
        base = tiny.unet(mid_block_type="UNetMidBlock2DCrossAttn")
        return d.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(4, 8))

    return like(name, sd_with_middle, controlnet=net)


def upscaler() -> Any:
    net = tiny.unet(in_channels=7, num_class_embeds=1000)
    images = d.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    noise = d.DDPMScheduler()
    return d.StableDiffusionUpscalePipeline(
        images, tiny.clip(), tiny.clip_tokenizer(), net, noise, tiny.ddim(), max_noise_level=350
    )


def variation() -> Any:
    net = tiny.unet(cross_attention_dim=12)
    return d.StableDiffusionImageVariationPipeline(
        tiny.vae(), seen(), net, tiny.ddim(), None, seer(), requires_safety_checker=False
    )


def wan_from_pictures(name: str = "WanImageToVideoPipeline") -> Callable[[], Any]:
    def make() -> Any:
        module = importlib.import_module(getattr(d, name).__module__)
        recent.without_ftfy(module)
        parts = recent.wan().components
        net = d.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=24,
            num_layers=1,
            image_dim=16,
            added_kv_proj_dim=24,
        )
        given = {k: parts[k] for k in ("tokenizer", "text_encoder", "vae", "scheduler")}
        return getattr(d, name)(**given, transformer=net, image_encoder=seen(), image_processor=seer())

    return make


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
    "FluxControlImg2ImgPipeline": like(
        "FluxControlImg2ImgPipeline", changed(tiny.flux, "transformer", in_channels=32, out_channels=16)
    ),
    "FluxControlInpaintPipeline": like(
        "FluxControlInpaintPipeline", changed(tiny.flux, "transformer", in_channels=32, out_channels=16)
    ),
    "StableDiffusionInstructPix2PixPipeline": like(
        "StableDiffusionInstructPix2PixPipeline", eight_channels(tiny.sd)
    ),
    "StableDiffusionXLInstructPix2PixPipeline": like(
        "StableDiffusionXLInstructPix2PixPipeline", eight_channels(tiny.sdxl)
    ),
    "StableDiffusionPAGImg2ImgPipeline": like("StableDiffusionPAGImg2ImgPipeline", sd_with_middle),
    "StableDiffusionPAGInpaintPipeline": like("StableDiffusionPAGInpaintPipeline", sd_with_middle),
    "LatentConsistencyModelImg2ImgPipeline": like(
        "LatentConsistencyModelImg2ImgPipeline", tiny.sd, unet=lcm_unet, scheduler=d.LCMScheduler
    ),
    "StableDiffusionControlNetPipeline": controlled("StableDiffusionControlNetPipeline"),
    "StableDiffusionControlNetImg2ImgPipeline": controlled("StableDiffusionControlNetImg2ImgPipeline"),
    "StableDiffusionControlNetInpaintPipeline": controlled("StableDiffusionControlNetInpaintPipeline"),
    "StableDiffusionUpscalePipeline": upscaler,
    "StableDiffusionImageVariationPipeline": variation,
    "AmusedImg2ImgPipeline": like("AmusedImg2ImgPipeline", amused),
    "AmusedInpaintPipeline": like("AmusedInpaintPipeline", amused),
    "ChromaImg2ImgPipeline": like("ChromaImg2ImgPipeline", recent.chroma),
    "ChromaInpaintPipeline": like("ChromaInpaintPipeline", recent.chroma),
    "QwenImageImg2ImgPipeline": like("QwenImageImg2ImgPipeline", recent.qwen_image),
    "QwenImageInpaintPipeline": like("QwenImageInpaintPipeline", recent.qwen_image),
    "ZImageImg2ImgPipeline": like("ZImageImg2ImgPipeline", recent.z_image),
    "ZImageInpaintPipeline": like("ZImageInpaintPipeline", recent.z_image),
    "SanaSprintImg2ImgPipeline": like("SanaSprintImg2ImgPipeline", recent.sana_sprint),
    "Flux2Pipeline (image)": recent.flux2,
    "Flux2KleinPipeline (image)": recent.flux2_klein,
    "Flux2KleinInpaintPipeline": like("Flux2KleinInpaintPipeline", recent.flux2_klein),
    "CogView4ControlPipeline": like(
        "CogView4ControlPipeline", changed(recent.cogview4, "transformer", in_channels=8)
    ),
    "LTXImageToVideoPipeline": like("LTXImageToVideoPipeline", recent.ltx),
    "LTXConditionPipeline (image)": like("LTXConditionPipeline", recent.ltx),
    "WanImageToVideoPipeline": wan_from_pictures(),
    "SkyReelsV2ImageToVideoPipeline": wan_from_pictures("SkyReelsV2ImageToVideoPipeline"),
    "CogVideoXImageToVideoPipeline": like(
        "CogVideoXImageToVideoPipeline",
        changed(
            recent.cogvideox,
            "transformer",
            in_channels=8,
            attention_head_dim=16,
            use_rotary_positional_embeddings=True,
        ),
    ),
}
WIDER = {"Flux2Pipeline (image)": 64, "Flux2KleinPipeline (image)": 64}  # than 32 pixels: less is refused
STRENGTH = {"ChromaImg2ImgPipeline": 0.5, "ChromaInpaintPipeline": 0.5}  # of more nothing is left in 4 steps
FRAMES = {
    "LTXImageToVideoPipeline": 9,
    "LTXConditionPipeline (image)": 9,
    "WanImageToVideoPipeline": 9,
    "SkyReelsV2ImageToVideoPipeline": 9,
    "CogVideoXImageToVideoPipeline": 9,
}


def from_pictures(name: str, pipe: Any, folder: Path, **more: Any) -> Protocol:
    """Two samples of 4 steps of a tiny pipeline that takes pictures, which are written to ``folder``; guided
    where it takes guidance."""
    takes, roles = inspect.signature(type(pipe).__call__).parameters, picture_arguments(pipe)
    made = pictures(folder / "pictures", 2, masks="mask" in roles, controls="control" in roles)
    given: dict[str, Any] = {
        "images": 2,
        "steps": 4,
        "micro_batch": 2,
        "guidance": 3.0 if "guidance_scale" in takes else 1.0,
        "resolution": WIDER.get(name, 32),
        "conditions": PROMPTS[:2] if "prompt" in takes else None,
        "frames": FRAMES.get(name),
        "inputs": read_inputs(made),
        "strength": STRENGTH.get(name),
    }
    return Protocol(**{**given, **more})

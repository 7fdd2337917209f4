"""Families of pipelines: what the adapter must know of one, as values. A new family is one entry of
``FAMILIES``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import DiffusionPipeline

from aquabit.graph import family_of
from aquabit.parts import parts_of
from aquabit.pipelines.network import network_of

# the argument that says what images show; their number where nothing does
Kind = Literal["class_labels", "prompt", "batch_size"]
KINDS: tuple[Kind, ...] = ("class_labels", "prompt", "batch_size")
DECODERS = ("vae", "vqvae", "movq")  # and what makes images of its latents


@dataclass(frozen=True)
class Encoding:
    """One call of ``encode_prompt``: what it returns, in order, by the names under which the pipeline
    takes it back (None: it does not)."""

    returns: tuple[str | None, ...]
    suffix: str = ""  # of these names in the pipeline's call
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """``pipelines`` are classes of diffusers (or ours); operator types follow from the denoiser's class
    (``aquabit.graph``). ``encodings`` are how prompts become embeddings; none: the pipeline encodes its
    prompts itself, in every call. ``options`` are arguments of every call. ``guidance`` is the argument that
    takes it, ``off`` its value where there is none (guidance 1); ``embedded``: guidance is an input of the
    denoiser, where its config says so, and never a second branch. ``alone``: a call makes one sample;
    ``together``: one picture a sample, where it takes pictures (``picture_arguments``), which have 1 /
    ``shrink`` of the images' sides. ``videos``: it makes videos.
    ``resolution`` [pixels] and ``example`` are those of the published model.
    """

    name: str
    pipelines: tuple[str, ...]
    kind: Kind
    encodings: tuple[Encoding, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    embedded: bool = False
    off: float = 1.0
    alone: bool = False
    videos: bool = False
    together: bool = False
    shrink: int = 1
    resolution: int | None = None
    example: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What a user chooses by."""
        conditions = {"class_labels": "classes", "prompt": "prompts", "batch_size": "nothing"}[self.kind]
        facts = {"name": self.name, "pipelines": list(self.pipelines), "conditions": conditions}
        makes = "videos" if self.videos else "images"
        return {**facts, "makes": makes, "resolution": self.resolution, "example": self.example}


_PAIR = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
_CHROMA = (
    "prompt_embeds",
    None,
    "prompt_attention_mask",
    "negative_prompt_embeds",
    None,
    "negative_prompt_attention_mask",
)
_HUNYUAN = (*_PAIR, "prompt_attention_mask", "negative_prompt_attention_mask")
_ONE_GUIDANCE = {  # of video and sound, by the prompt alone
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    **{f"audio_{k}": None for k in ("guidance_scale", "stg_scale", "modality_scale", "guidance_rescale")},
}
# arguments of every pipeline that takes them
EVERYWHERE: Mapping[str, Any] = {
    "clean_caption": False,  # it needs bs4 and ftfy: images would depend on what is installed
    "use_resolution_binning": False,  # the resolution that is asked for, not the nearest of a list
    "guidance_schedule": None,  # it would stand in guidance's place
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "sd",
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        "prompt",
        (Encoding(_PAIR),),
        together=True,
        resolution=512,
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    Family(
        "sd-upscale",
        ("StableDiffusionUpscalePipeline",),
        "prompt",
        shrink=4,
        resolution=512,
        example="stabilityai/stable-diffusion-x4-upscaler",
    ),
    Family(
        "sdxl",
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        "prompt",
        (Encoding(_POOLED),),
        together=True,
        resolution=1024,
        example="stabilityai/stable-diffusion-xl-base-1.0",
    ),
    Family(
        "pixart-alpha",
        ("PixArtAlphaPipeline",),
        "prompt",
        (Encoding(_MASKED),),
        resolution=1024,
        example="PixArt-alpha/PixArt-XL-2-1024-MS",
    ),
    Family(
        "pixart-sigma",
        ("PixArtSigmaPipeline",),
        "prompt",
        (Encoding(_MASKED),),
        resolution=1024,
        example="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    ),
    Family(
        "hunyuan",
        ("HunyuanDiTPipeline",),
        "prompt",
        (
            Encoding(_HUNYUAN, "", {"text_encoder_index": 0, "max_sequence_length": 77}),  # CLIP
            Encoding(_HUNYUAN, "_2", {"text_encoder_index": 1, "max_sequence_length": 256}),  # mT5
        ),
        resolution=1024,
        example="Tencent-Hunyuan/HunyuanDiT-Diffusers",
    ),
    Family(
        "sd3",
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        "prompt",
        (Encoding(_POOLED, arguments={"prompt_2": None, "prompt_3": None}),),
        together=True,
        resolution=1024,
        example="stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    Family(
        "flux",
        (
            "FluxPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxFillPipeline",
            "FluxKontextPipeline",
            "FluxControlPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
        ),
        "prompt",
        (Encoding(("prompt_embeds", "pooled_prompt_embeds", None)),),  # text ids are all zero
        options={
            "_auto_resize": False
        },  # Kontext: the resolution that is asked for, not the nearest of a list
        embedded=True,
        together=True,
        resolution=1024,
        example="black-forest-labs/FLUX.1-dev",
    ),
    Family(
        "flux2",
        ("Flux2Pipeline",),
        "prompt",
        (Encoding(("prompt_embeds", None)),),
        embedded=True,
        example="black-forest-labs/FLUX.2-dev",
    ),
    Family("flux2-klein", ("Flux2KleinPipeline",), "prompt", example="black-forest-labs/FLUX.2-klein-4B"),
    Family(
        "qwen-image",
        ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        "prompt",
        guidance="true_cfg_scale",
        resolution=1024,
        example="Qwen/Qwen-Image",
    ),
    Family(
        "z-image",
        ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        "prompt",
        off=0.0,
        resolution=1024,
        example="Tongyi-MAI/Z-Image-Turbo",
    ),
    Family(
        "chroma",
        ("ChromaPipeline", "ChromaImg2ImgPipeline"),
        "prompt",
        (Encoding(_CHROMA),),
        resolution=1024,
        example="lodestones/Chroma1-HD",
    ),
    Family("cogview4", ("CogView4Pipeline",), "prompt", resolution=1024, example="zai-org/CogView4-6B"),
    Family(
        "lumina2",
        ("Lumina2Pipeline",),
        "prompt",
        (Encoding(_MASKED),),
        resolution=1024,
        example="Alpha-VLLM/Lumina-Image-2.0",
    ),
    Family(
        "hidream", ("HiDreamImagePipeline",), "prompt", resolution=1024, example="HiDream-ai/HiDream-I1-Full"
    ),
    Family(
        "sana",
        ("SanaPipeline",),
        "prompt",
        (Encoding(_MASKED),),
        resolution=1024,
        example="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    ),
    Family(
        "sana-sprint",
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        "prompt",
        options={"intermediate_timesteps": None},  # one that two steps alone allow
        resolution=1024,
        example="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    ),
    Family(
        "prx",
        ("PRXPipeline",),
        "prompt",
        alone=True,  # with guidance it takes its batch for one image
        resolution=512,
        example="Photoroom/prx-512-t2i-sft",
    ),
    Family(
        "auraflow",
        ("AuraFlowPipeline",),
        "prompt",
        (Encoding(_MASKED),),
        resolution=1024,
        example="fal/AuraFlow-v0.3",
    ),
    Family(
        "wan",
        ("WanPipeline", "WanImageToVideoPipeline"),
        "prompt",
        (Encoding(_PAIR),),
        videos=True,
        example="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ),
    Family(
        "ltx",
        ("LTXPipeline", "LTXImageToVideoPipeline"),
        "prompt",
        (Encoding(_MASKED),),
        videos=True,
        example="Lightricks/LTX-Video",
    ),
    Family(
        "ltx2",
        ("LTX2Pipeline",),
        "prompt",
        options=_ONE_GUIDANCE,  # its embeddings, of every layer of a 12 B encoder, are too large to keep
        videos=True,
        example="Lightricks/LTX-2",
    ),
    Family(
        "hunyuan-video",
        ("HunyuanVideoPipeline",),
        "prompt",
        (Encoding(("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")),),
        embedded=True,
        videos=True,
        example="hunyuanvideo-community/HunyuanVideo",
    ),
    Family(
        "cogvideox",
        ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
        "prompt",
        (Encoding(_PAIR),),
        videos=True,
        example="zai-org/CogVideoX-2b",
    ),
    Family("amused", ("AmusedPipeline",), "prompt", alone=True, resolution=512, example="amused/amused-512"),
    Family("krea2", ("Krea2Pipeline",), "prompt", off=0.0, example="krea/Krea-2"),
    Family("dit", ("DiTPipeline",), "class_labels", resolution=256, example="facebook/DiT-XL-2-256"),
    Family(
        "ldm-class",
        ("ClassLatentPipeline",),
        "class_labels",
        resolution=256,
        example="LDM-4 ImageNet, by `aquabit convert`",
    ),
    Family("ldm", ("LDMPipeline",), "batch_size", resolution=256, example="CompVis/ldm-celebahq-256"),
    Family("ddpm", ("DDPMPipeline",), "batch_size", resolution=32, example="google/ddpm-cifar10-32"),
    Family("ddim", ("DDIMPipeline",), "batch_size", resolution=256, example="fusing/ddim-lsun-bedroom"),
    Family("pixels-class", ("ClassConditionalPipeline",), "class_labels", example="digits-dit, digits-unet"),
)
_BY_CLASS = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}


def family(pipe: DiffusionPipeline) -> Family | None:
    """The family of a pipeline, by its class or the nearest of its bases; None where none is known."""
    return next((_BY_CLASS[base.__name__] for base in type(pipe).__mro__ if base.__name__ in _BY_CLASS), None)


def scheduler_of(pipe: Any) -> Any:
    """The pipeline's sampler; None where it has none."""
    return getattr(pipe, "scheduler", None)


def family_notes(pipe: DiffusionPipeline) -> list[str]:
    """What is to be said where a pipeline or its denoiser is of no known family; nothing where both are."""
    notes = list[str]()
    if family(pipe) is None:
        notes.append(
            f"{type(pipe).__name__} is of no known family: the generic adapter is used, which encodes its"
            " prompts in every call"
        )
    for part in parts_of(network_of(pipe)).values():
        if family_of(type(part)) == "generic":
            notes.append(
                f"{type(part).__name__} is of no known family: its operator types are generic, told by common"
                " layer names"
            )
    return notes

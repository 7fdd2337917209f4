"""Families of pipelines: what the adapter must know of one, as values. A new family is one entry of
``FAMILIES``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import DiffusionPipeline
from torch import nn

from aquabit.graph import family_of
from aquabit.scheme import AquabitError

# the argument that says what images show; their number where nothing does
Kind = Literal["class_labels", "prompt", "batch_size"]
KINDS: tuple[Kind, ...] = ("class_labels", "prompt", "batch_size")
DENOISERS = ("denoiser", "transformer", "unet")  # where a pipeline holds its denoiser
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
    prompts itself, in every call. ``options`` are arguments of every call. ``embedded``: guidance is an input
    of the denoiser, where its config says so, and never a second branch. ``resolution`` [pixels] and
    ``example`` are those of the published model.
    """

    name: str
    pipelines: tuple[str, ...]
    kind: Kind
    encodings: tuple[Encoding, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    embedded: bool = False
    resolution: int | None = None
    example: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What a user chooses by."""
        conditions = {"class_labels": "classes", "prompt": "prompts", "batch_size": "nothing"}[self.kind]
        facts = {"name": self.name, "pipelines": list(self.pipelines), "conditions": conditions}
        return {**facts, "resolution": self.resolution, "example": self.example}


_PAIR = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
_HUNYUAN = (*_PAIR, "prompt_attention_mask", "negative_prompt_attention_mask")
_EXACT = {"use_resolution_binning": False}  # the resolution that is asked for, not the nearest of a list
_AS_IS = {"clean_caption": False}  # cleaning needs bs4 and ftfy: images would depend on what is installed

FAMILIES: tuple[Family, ...] = (
    Family(
        "sd",
        ("StableDiffusionPipeline",),
        "prompt",
        (Encoding(_PAIR),),
        resolution=512,
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    Family(
        "sdxl",
        ("StableDiffusionXLPipeline",),
        "prompt",
        (Encoding(_POOLED),),
        resolution=1024,
        example="stabilityai/stable-diffusion-xl-base-1.0",
    ),
    Family(
        "pixart-alpha",
        ("PixArtAlphaPipeline",),
        "prompt",
        (Encoding(_MASKED, arguments=_AS_IS),),
        {**_EXACT, **_AS_IS},
        resolution=1024,
        example="PixArt-alpha/PixArt-XL-2-1024-MS",
    ),
    Family(
        "pixart-sigma",
        ("PixArtSigmaPipeline",),
        "prompt",
        (Encoding(_MASKED, arguments=_AS_IS),),
        {**_EXACT, **_AS_IS},
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
        _EXACT,
        resolution=1024,
        example="Tencent-Hunyuan/HunyuanDiT-Diffusers",
    ),
    Family(
        "sd3",
        ("StableDiffusion3Pipeline",),
        "prompt",
        (Encoding(_POOLED, arguments={"prompt_2": None, "prompt_3": None}),),
        resolution=1024,
        example="stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    Family(
        "flux",
        ("FluxPipeline",),
        "prompt",
        (Encoding(("prompt_embeds", "pooled_prompt_embeds", None)),),  # text ids are all zero
        embedded=True,
        resolution=1024,
        example="black-forest-labs/FLUX.1-dev",
    ),
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
    Family(
        "pixels-class",
        ("ClassConditionalPipeline",),
        "class_labels",
        resolution=8,
        example="digits-dit, digits-unet",
    ),
)
_BY_CLASS = {pipeline: family for family in FAMILIES for pipeline in family.pipelines}


def family(pipe: DiffusionPipeline) -> Family | None:
    """The family of a pipeline, by its class or the nearest of its bases; None where none is known."""
    return next((_BY_CLASS[base.__name__] for base in type(pipe).__mro__ if base.__name__ in _BY_CLASS), None)


def denoiser_name(pipe: Any) -> str:
    """The attribute that holds the denoiser; raises AquabitError where there is none."""
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise AquabitError(f"{type(pipe).__name__} has no denoiser: none of {', '.join(DENOISERS)} is a network")


def denoiser_of(pipe: Any) -> nn.Module:
    module = pipe if isinstance(pipe, nn.Module) else getattr(pipe, denoiser_name(pipe))
    assert isinstance(module, nn.Module)
    return module


def family_notes(pipe: DiffusionPipeline) -> list[str]:
    """What is to be said where a pipeline or its denoiser is of no known family; nothing where both are."""
    notes, denoiser = list[str](), denoiser_of(pipe)
    if family(pipe) is None:
        notes.append(
            f"{type(pipe).__name__} is of no known family: the generic adapter is used, which encodes its"
            " prompts in every call"
        )
    if family_of(type(denoiser)) == "generic":
        notes.append(
            f"{type(denoiser).__name__} is of no known family: its operator types are generic, told by common"
            " layer names"
        )
    return notes

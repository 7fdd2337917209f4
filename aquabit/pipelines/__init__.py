"""Adapters from diffusers pipelines to "make images from these seeds"; the bundled models."""

from aquabit.pipelines.adapter import (
    SCHEDULERS,
    Adapter,
    check_scheduler,
    denoiser_name,
    denoiser_of,
    noise_statistics,
    recorder,
    replay_recorder,
    sampler,
    scheduler_named,
    set_scheduler,
    trace,
)
from aquabit.pipelines.class_conditional import ClassConditionalPipeline
from aquabit.pipelines.class_latent import ClassEmbedder, ClassLatentPipeline
from aquabit.pipelines.family import FAMILIES, Family, family, family_notes
from aquabit.pipelines.loading import BUNDLED, bundled_models, load

__all__ = [
    "BUNDLED",
    "FAMILIES",
    "SCHEDULERS",
    "Adapter",
    "ClassConditionalPipeline",
    "ClassEmbedder",
    "ClassLatentPipeline",
    "Family",
    "bundled_models",
    "check_scheduler",
    "denoiser_name",
    "denoiser_of",
    "family",
    "family_notes",
    "load",
    "noise_statistics",
    "recorder",
    "replay_recorder",
    "sampler",
    "scheduler_named",
    "set_scheduler",
    "trace",
]

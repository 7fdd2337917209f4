"""Adapters from diffusers pipelines to "make images from these seeds"; the bundled models."""

from aquabit.pipelines.adapter import (
    SCHEDULERS,
    Adapter,
    check_scheduler,
    denoiser_name,
    denoiser_of,
    noise_statistics,
    own_copy,
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
from aquabit.pipelines.prompts import free_text_encoders, restore_text_encoders

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
    "free_text_encoders",
    "load",
    "noise_statistics",
    "own_copy",
    "recorder",
    "replay_recorder",
    "restore_text_encoders",
    "sampler",
    "scheduler_named",
    "set_scheduler",
    "trace",
]

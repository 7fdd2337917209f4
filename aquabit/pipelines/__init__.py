"""Adapters from diffusers pipelines and a user's own models to "make images from these seeds"; the bundled
models."""

from aquabit.pipelines.adapter import (
    Adapter,
    Pipeline,
    adapter_of,
    calibration_samples,
    check_scheduler,
    model_notes,
    noise_statistics,
    own_copy,
    recorder,
    replay_recorder,
    sampler,
    scheduled,
    scheduler_named,
    set_scheduler,
    trace,
    use_scheduler,
)
from aquabit.pipelines.class_conditional import ClassConditionalPipeline
from aquabit.pipelines.class_latent import ClassEmbedder, ClassLatentPipeline
from aquabit.pipelines.convert import convert_ldm4
from aquabit.pipelines.family import FAMILIES, Family, family, family_notes, scheduler_of
from aquabit.pipelines.loading import bundled_facts, bundled_models, load, sources_of
from aquabit.pipelines.lora import add_lora, branched, remove_lora
from aquabit.pipelines.network import check_steps, component_names, denoiser_of, encoder_names, network_of
from aquabit.pipelines.own_model import Model, check_sampler
from aquabit.pipelines.presets import PRESETS, Preset, preset_named
from aquabit.pipelines.prompts import free_text_encoders, restore_text_encoders
from aquabit.pipelines.sizes import image_batch, image_size

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Adapter",
    "ClassConditionalPipeline",
    "ClassEmbedder",
    "ClassLatentPipeline",
    "Family",
    "Model",
    "Pipeline",
    "Preset",
    "adapter_of",
    "add_lora",
    "branched",
    "bundled_facts",
    "bundled_models",
    "calibration_samples",
    "check_sampler",
    "check_scheduler",
    "check_steps",
    "component_names",
    "convert_ldm4",
    "denoiser_of",
    "encoder_names",
    "family",
    "family_notes",
    "free_text_encoders",
    "image_batch",
    "image_size",
    "load",
    "model_notes",
    "network_of",
    "noise_statistics",
    "own_copy",
    "preset_named",
    "recorder",
    "remove_lora",
    "replay_recorder",
    "restore_text_encoders",
    "sampler",
    "scheduled",
    "scheduler_named",
    "scheduler_of",
    "set_scheduler",
    "sources_of",
    "trace",
    "use_scheduler",
]

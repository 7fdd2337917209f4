"""load: a diffusers pipeline from a bundled name, a directory (dense or packed), a hub id, or an object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from aquabit.pipelines.class_conditional import ClassConditionalPipeline
from aquabit.scheme import AquabitError, read_json

BUNDLED = Path(__file__).parent / "bundled"


def bundled_models() -> list[str]:
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def load(
    model: str | Path | DiffusionPipeline, device: str | torch.device = "cpu", dtype: torch.dtype | str = "float32"
) -> DiffusionPipeline:
    """The pipeline that ``model`` names, on a device and in a dtype; a packed artifact comes back running packed.

    Raises AquabitError for an unknown name, a folder that is no pipeline, or files that are damaged.
    """
    if isinstance(model, DiffusionPipeline):
        return model
    dtype = _dtype(dtype)
    name = str(model)
    folder = BUNDLED / name if name in bundled_models() else Path(name)
    if folder.is_dir():
        return _from_folder(folder, device, dtype)
    if "/" not in name or folder.is_absolute() or name.startswith("."):
        raise AquabitError(
            f"unknown model {name!r}; bundled are {', '.join(bundled_models())}, else give a diffusers directory or a hub id"
        )
    return _bound(_guarded(name, lambda: DiffusionPipeline.from_pretrained(name, dtype=dtype)), device)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if isinstance(dtype, str) and dtype not in known:
        raise AquabitError(f"dtype {dtype!r} is unknown; it must be one of {', '.join(known)}")
    return known[dtype] if isinstance(dtype, str) else dtype


def _from_folder(folder: Path, device: str | torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    index = folder / "model_index.json"
    if not index.exists():
        raise AquabitError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    described = read_json(index)
    if not isinstance(described, dict) or not isinstance(described.get("_class_name"), str):
        raise AquabitError(f"{index} names no pipeline class (_class_name)")
    from aquabit.quant.artifact import is_packed

    for component, entry in described.items():
        if isinstance(entry, list):
            is_packed(folder / component)  # refuses those of earlier versions
    cls: Any = ClassConditionalPipeline if described["_class_name"] == "ClassConditionalPipeline" else DiffusionPipeline
    return _bound(_guarded(str(folder), lambda: cls.from_pretrained(folder, dtype=dtype, use_safetensors=True)), device)


def _bound(pipe: DiffusionPipeline, device: str | torch.device) -> DiffusionPipeline:
    """The pipeline on its device; what a packed denoiser does while sampling follows the scheduler."""
    from aquabit.quant.artifact import contents_of
    from aquabit.quant.correct import corrected_
    from aquabit.quant.sampling import refollow_

    packed = [(part, found) for part in pipe.components.values() if (found := contents_of(part)) is not None]
    for denoiser, found in packed:
        refollow_(denoiser, pipe.scheduler)
        if found.statistics is not None:
            corrected_(denoiser, pipe.scheduler, found.statistics, found.config.correction)
    return pipe if packed and str(device) == "cpu" else pipe.to(device)


def _guarded(name: str, loader: Callable[[], Any]) -> Any:
    """The loaded pipeline, without diffusers' own bars and warnings; failures as one sentence."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipe = loader()
    except AquabitError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub raise many types: all mean that it cannot be loaded
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AquabitError(f"{name} cannot be loaded as a diffusers pipeline: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe

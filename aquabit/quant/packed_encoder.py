"""Packed text encoders: component folders with the tensors and, in config.json, what transformers writes
there and the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aquabit.jsonio import read_json
from aquabit.quant.artifact import building, save_packed_denoiser
from aquabit.quant.bare_artifact import CLASS, load_bare_denoiser_, save_bare_denoiser
from aquabit.scheme import AquabitError

# of weights: transformers, which would leave out what it does not know and go on with random weights in its
# place, finds none of the name that it reads
WEIGHTS = "packed{suffix}.safetensors"
OWN = (CLASS, "quantization_config")  # what config.json holds beside the model's own configuration


def save_packed(part: Any, folder: Path, max_shard_size: int | str = "10GB") -> int:
    """Write a packed component of a pipeline into a new folder; the bytes of its tensors."""
    if hasattr(part, "register_to_config"):  # a model of diffusers
        return save_packed_denoiser(part, folder, max_shard_size)
    config = {k: v for k, v in part.config.to_dict().items() if k not in OWN}
    return save_bare_denoiser(part, folder, max_shard_size, config, WEIGHTS)


def load_packed_encoder(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """A text encoder of the class ``name`` of transformers that runs from its codes. Raises AquabitError for
    missing, truncated or inconsistent files."""
    import transformers
    from transformers.initialization import no_init_weights

    cls: Any = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise AquabitError(f"{folder}: {name!r} is no model class of transformers {transformers.__version__}")
    value = {k: v for k, v in read_json(folder / "config.json").items() if k not in OWN}
    with building(folder), no_init_weights():
        config: Any = cls.config_class
        model: nn.Module = cls(config.from_dict(value))
        model = model.to(dtype).eval()
    load_bare_denoiser_(model, folder, WEIGHTS, dtype)
    return model

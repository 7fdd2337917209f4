"""Files of weights alone: a denoiser under diffusers' names or in an original layout, a whole checkpoint, and
GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import GGUFQuantizationConfig
from diffusers.utils import is_gguf_available
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from aquabit.scheme import AquabitError

FILES = (".safetensors", ".gguf")


def holds_a_pipeline(file: Path) -> bool:
    """Whether a checkpoint has more than a denoiser: a first stage, as the original ones of LDM have."""
    with safe_open(file, "pt") as tensors:
        return any(key.startswith(("first_stage_model.", "vae.")) for key in tensors.keys())  # noqa: SIM118


def denoiser_of_file(file: Path, cls: Any, base: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """A denoiser with the tensors of a file and the config of ``base``; raises AquabitError where it lacks
    some."""
    more: dict[str, Any] = {}
    if file.suffix == ".gguf":
        if not is_gguf_available():
            raise AquabitError(f"{file} is read by the package gguf; install it: pip install 'aquabit[gguf]'")
        more["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
    elif not hasattr(cls, "from_single_file") or _has_own_names(file, cls, base / name):
        return _by_names(file, cls, base / name, dtype)
    model: nn.Module = cls.from_single_file(str(file), config=str(base), subfolder=name, dtype=dtype, **more)
    if more:
        model.dequantize()  # type: ignore[operator]
        model.__dict__.pop("hf_quantizer", None)  # a dense model from here on
        model.to(dtype)
    absent = [k for k, p in model.named_parameters() if p.is_meta]
    if absent:
        raise AquabitError(f"{file} lacks {len(absent)} tensors of {cls.__name__}, {absent[0]!r} among them")
    return model


def _empty(cls: Any, config: Path) -> nn.Module:
    with init_empty_weights():  # buffers that no file holds are made
        model: nn.Module = cls.from_config(cls.load_config(config))
    return model


def _has_own_names(file: Path, cls: Any, config: Path) -> bool:
    """Whether most tensors of a file have diffusers' own names, and not those of an original layout."""
    own = _empty(cls, config).state_dict()
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    return 2 * sum(name in own for name in names) > len(names)


def _by_names(file: Path, cls: Any, config: Path, dtype: torch.dtype) -> nn.Module:
    """With tensors under diffusers' own names: each with its shape, none missing."""
    model, tensors = _empty(cls, config), load_file(file)
    own = model.state_dict()
    for what, names in (("lacks", own.keys() - tensors.keys()), ("has", tensors.keys() - own.keys())):
        if names:
            verb = "is" if what == "lacks" else "is not"
            raise AquabitError(
                f"{file} {what} {min(names)!r}, which {verb} a tensor of {cls.__name__}, and {len(names) - 1}"
                " others; it needs the names of diffusers"
            )
    wrong = [k for k, v in tensors.items() if v.shape != own[k].shape]
    if wrong:
        raise AquabitError(
            f"{file}: {wrong[0]!r} is {list(tensors[wrong[0]].shape)}, {cls.__name__} of {config} has"
            f" {list(own[wrong[0]].shape)}"
        )
    model.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)

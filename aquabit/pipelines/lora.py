"""LoRAs of pipelines: fused with their weights, or beside a packed denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from aquabit.pipelines.network import component_names, denoiser_names, network_of
from aquabit.pipelines.prompts import change_reloaded
from aquabit.quant.layers import QuantConv2d, QuantLinear
from aquabit.quant.lora import LowRank, by_component, fuse_, low_ranks, read_lora
from aquabit.quant.model import storage_dtype
from aquabit.scheme import AquabitError

Source = str | Path | Mapping[str, Tensor]


def fuse_loras_(pipe: DiffusionPipeline, loras: Sequence[tuple[Source, float]]) -> None:
    """Add LoRAs to the weights of a pipeline's denoiser and text encoders, now and whenever these are loaded
    again. Raises AquabitError for files that are no plain LoRAs, of other models, and where the denoiser is
    packed."""
    for source, scale in loras:
        every = {
            component: {name: part.scaled(scale) for name, part in parts.items()}
            for component, parts in _parts(pipe, source).items()
        }
        for component, parts in every.items():
            fuse_(getattr(pipe, component), parts)
        for name in denoiser_names(pipe):
            every.pop(name, None)
        if every:
            change_reloaded(pipe, partial(_fuse_encoders_, every))


def _fuse_encoders_(parts: Mapping[str, Mapping[str, LowRank]], encoders: Mapping[str, Any]) -> None:
    for component, own in parts.items():
        if encoders.get(component) is not None:
            fuse_(encoders[component], own)


def add_lora(pipe: DiffusionPipeline, source: Source, scale: float = 1.0) -> None:
    """Put a LoRA (a .safetensors file, or a state dict) beside the layers of a packed denoiser, at 16 bits:
    each gives y + scale B(A x), with the y that it gave before, until ``remove_lora``. Several add up.

    Raises AquabitError for files that are no plain LoRAs or of other models, and for parts that are no
    layers of a packed denoiser (text encoders: fuse those).
    """
    names, found = component_names(pipe), _parts(pipe, source)
    others = [component for component in found if component not in names]
    if others:
        raise AquabitError(
            f"{_told(source)} also changes {others[0]}, which is not packed; give a LoRA of"
            f" {' and '.join(names)} alone"
        )
    chosen: list[tuple[QuantLinear | QuantConv2d, LowRank]] = []
    additions = [(c, layer, part) for c, parts in found.items() for layer, part in parts.items()]
    for component, layer, part in additions:
        module = getattr(pipe, component).get_submodule(layer)
        if not isinstance(module, QuantLinear | QuantConv2d) or getattr(module, "groups", 1) != 1:
            raise AquabitError(
                f"{_told(source)} changes {layer!r}, a {type(module).__name__}, beside which no LoRA can be"
                " put: fuse it before quantizing"
            )
        stored = [t.to(storage_dtype(t)).to(module.weight.device) for t in (part.down, part.up)]
        chosen.append((module, LowRank(stored[0], stored[1], part.scale * scale)))
    for module, part in chosen:
        module.branches.append(part)


def remove_lora(pipe: DiffusionPipeline) -> None:
    """Take every LoRA off that ``add_lora`` put beside a packed denoiser: it is what it was before."""
    for module in branched(pipe):
        module.branches.clear()


def branched(pipe: DiffusionPipeline) -> list[QuantLinear | QuantConv2d]:
    """The layers of a packed denoiser that have LoRAs beside them."""
    modules = network_of(pipe).modules()
    return [m for m in modules if isinstance(m, QuantLinear | QuantConv2d) and m.branches]


def _parts(pipe: DiffusionPipeline, source: Source) -> dict[str, dict[str, LowRank]]:
    """Component -> layer -> its addition, by the names of the pipeline's modules."""
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    tensors, about = read_lora(source)
    alphas: dict[str, Any] = {}
    own: Any = getattr(type(pipe), "lora_state_dict", None)
    if own is not None:  # knows the names of other trainers
        given = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
        try:
            converted = own(dict(tensors), return_alphas=True, **given)
        except Exception as error:  # diffusers' converters raise whatever the names run them into
            raise AquabitError(f"{_told(source)} is no LoRA that diffusers knows ({error})") from error
        tensors, alphas = (*converted, None)[:2] if isinstance(converted, tuple) else (converted, None)
    parts = low_ranks(tensors, about, alphas or {}, _told(source))
    here = {n: p for n, p in parts.items() if getattr(pipe, n.partition(".")[0], ...) is not None}
    return by_component(here, modules, denoiser_names(pipe)[0], _told(source))


def _told(source: Source) -> str:
    return "the LoRA" if isinstance(source, Mapping) else f"the LoRA {source}"

"""LoRAs: low-rank additions to layers, read from files, added to weights, or put beside coded ones.

A LoRA gives a layer y + scale B(A x) (Hu et al. 2021, eq. 3). Names are diffusers' (``lora_A``,
``lora.down``, ``to_q_lora.down``), peft's and kohya's, after diffusers' own converters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from aquabit.file_memory import in_file, is_large
from aquabit.quant.bank import weights_folder
from aquabit.scheme import AquabitError

ABOUT = "lora_adapter_metadata"  # where diffusers' files say ranks and alphas
_DOWN = re.compile(r"^(?P<layer>.+?)[._](lora_A(\.\w+)?|lora[._]down|lora_linear_layer\.down)\.weight$")
_UP = re.compile(r"^(?P<layer>.+?)[._](lora_B(\.\w+)?|lora[._]up|lora_linear_layer\.up)\.weight$")
_ALPHA = re.compile(r"^(?P<layer>.+?)(\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)?(\.weight)?\.alpha$")


@dataclass(frozen=True)
class LowRank:
    """What is added to a layer's weight: ``scale`` times ``up`` [out, r] times ``down`` [r, in] or
    [r, in, kh, kw]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The addition in the weight's shape, float32."""
        product = self.up.float() @ self.down.float().flatten(1)
        return self.scale * product.reshape(len(self.up), *self.down.shape[1:])

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.down, self.up, self.scale * factor)

    def to(self, device: Any) -> LowRank:
        return LowRank(self.down.to(device), self.up.to(device), self.scale)

    def linear(self, x: Tensor) -> Tensor:
        """What is added to the output [..., out] of a Linear for its input [..., in]."""
        low = functional.linear(x, self.down.to(x))
        return self.scale * functional.linear(low, self.up.to(x))

    def conv2d(self, x: Tensor, *geometry: Any) -> Tensor:
        """What is added to the output of a Conv2d of one group; ``geometry`` is its stride, padding, dilation
        and groups."""
        low = functional.conv2d(x, self.down.to(x), None, *geometry)
        return self.scale * functional.conv2d(low, self.up.to(x)[:, :, None, None])


def read_lora(source: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a LoRA file (safetensors; or a state dict as it is), and what the file says of ranks and
    alphas; raises AquabitError where it cannot be read."""
    if isinstance(source, Mapping):
        return dict(source), {}
    try:
        with safe_open(source, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT) or "{}")
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise AquabitError(f"the LoRA {source} cannot be read ({error}); give a .safetensors file") from error
    return tensors, about if isinstance(about, dict) else {}


def low_ranks(
    state: Mapping[str, Tensor], about: Mapping[str, Any], alphas: Mapping[str, Any], source: object
) -> dict[str, LowRank]:
    """Layer (as the file names it, the component first) -> its addition. Without an alpha the scale is 1, as
    in diffusers. Raises AquabitError for what is no plain LoRA."""
    downs, ups, scales = dict[str, Tensor](), dict[str, Tensor](), dict[str, float]()
    other = []
    for name, tensor in {**state, **alphas}.items():
        for pattern, found in ((_DOWN, downs), (_UP, ups), (_ALPHA, scales)):
            match = pattern.match(name)
            if match:
                found[match["layer"]] = float(tensor) if pattern is _ALPHA else tensor  # type: ignore[assignment]
                break
        else:
            other.append(name)
    odd = [*other, *(set(downs) ^ set(ups)), *(set(scales) - set(downs))]
    if odd or not downs:
        what = f"{odd[0]!r} is no part of one" if odd else "it holds no lora_A or lora.down"
        raise AquabitError(f"{source} is not a LoRA of two matrices a layer: {what}; fuse it yourself")
    return {n: _low_rank(n, downs[n], ups[n], scales.get(n), about, source) for n in downs}


def _low_rank(
    name: str, down: Tensor, up: Tensor, alpha: float | None, about: Mapping[str, Any], source: object
) -> LowRank:
    rank = len(down)
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank or up[0, 0].numel() != 1:
        raise AquabitError(
            f"{source}: the matrices of {name!r} have shapes {list(down.shape)} and {list(up.shape)}; they"
            " must be [r, in] and [out, r]"
        )
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise AquabitError(f"{source}: the matrices of {name!r} hold NaN or Inf")
    component, _, layer = name.partition(".")
    told = {k.removeprefix(f"{component}."): v for k, v in about.items()}
    if told.get("use_dora") or told.get("lora_bias"):
        raise AquabitError(
            f"{source} is a LoRA with DoRA or biases, which are not supported; fuse it yourself"
        )
    if alpha is None and "lora_alpha" in told:
        patterns = told.get("alpha_pattern") or {}
        own = (v for k, v in patterns.items() if layer == k or layer.endswith(f".{k}"))
        alpha = float(next(own, told["lora_alpha"]))
    root = math.sqrt(rank) if told.get("use_rslora") else rank
    return LowRank(down, up.flatten(1), 1.0 if alpha is None else alpha / root)


def by_component(
    parts: Mapping[str, LowRank], modules: Mapping[str, nn.Module], denoiser: str, source: object
) -> dict[str, dict[str, LowRank]]:
    """Component -> layer -> its addition, names as those of the modules; what names no component is the
    ``denoiser``'s. Raises AquabitError for a layer that is not there or has another shape."""
    found: dict[str, dict[str, LowRank]] = {}
    for name, part in parts.items():
        first, _, rest = name.removeprefix("base_model.model.").partition(".")
        known = first in modules and rest
        component, layer = (first, rest) if known else (denoiser, name.removeprefix("base_model.model."))
        named: dict[str, Any] = dict(modules[component].named_modules())
        layer = next((name for name in _names(layer) if name in named), layer)
        module = named.get(layer)
        if isinstance(module, nn.ModuleList):  # attention's output, as older files name it
            layer, module = f"{layer}.0", module[0]
        shape = tuple(getattr(module, "shape", None) or getattr(module, "weight", torch.empty(0)).shape)
        own = (len(part.up), *part.down.shape[1:])
        if module is None or shape != own:
            what = "is not there" if module is None else f"is {list(shape)}"
            raise AquabitError(
                f"{source} is for another model: it changes {layer!r} of {list(own)}, which {what} in"
                f" {type(modules[component]).__name__}"
            )
        found.setdefault(component, {})[layer] = part
    return found


def _names(layer: str) -> list[str]:
    """A layer's name as it may be today: older files name processors, text encoders inside a ``text_model``,
    and their projections as diffusers' attention does."""
    layer = re.sub(r"(^|\.)processor\.", r"\1", layer)
    clip = re.sub(r"\.self_attn\.to_out(\.0)?$", ".self_attn.out_proj", layer)
    clip = re.sub(r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj", clip)
    return [name for own in (layer, clip) for name in (own, own.removeprefix("text_model."))]


def fuse_(module: nn.Module, parts: Mapping[str, LowRank]) -> None:
    """Add low-rank parts to the weights of layers, by name. Raises AquabitError for layers that hold no
    weight of their own (packed ones)."""
    for name, part in parts.items():
        layer: Any = module.get_submodule(name)
        if not isinstance(getattr(layer, "weight", None), nn.Parameter):
            raise AquabitError(
                f"layer {name!r} is packed: a LoRA cannot be fused with it, but be put beside it by"
                " aquabit.add_lora"
            )
        weight = layer.weight
        fused = (weight.detach().float() + part.delta().to(weight.device)).to(weight.dtype)
        # writing into a weight that is mapped from a model's files would draw its pages into memory
        weight.data = in_file(fused, weights_folder()) if is_large(fused) else fused

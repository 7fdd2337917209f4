"""Softmax outputs at 8 bits, for every attention that calls torch's scaled_dot_product_attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aquabit.kernels import straight_through
from aquabit.scheme import output_rounding

SOFTMAX_BITS = 8
# elements of a block of attention scores: 4 MB, which caches hold (3 times as fast as 256 MB at 1,024 tokens)
SCORES_LIMIT = 1 << 20
VALUE_PROJECTIONS = ("to_v", "to_qkv", "add_v_proj")


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) rounded to 8 bits per query, times v. q [..., n, d], k [..., m, d], v [...,
    m, e].

    Arguments are named as torch's own, since some processors give them by name.
    """
    q, k, v = query, key, value
    if dropout_p or is_causal or enable_gqa:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    block = max(1, SCORES_LIMIT // max(1, math.prod(q.shape[:-2]) * k.shape[-2]))
    parts = []
    for start in range(0, q.shape[-2], block):
        scores = (q[..., start : start + block, :] * factor) @ k.transpose(-1, -2)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., start : start + block, :]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        parts.append(straight_through(scores.softmax(-1), SOFTMAX_BITS, "token") @ v)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


class _QuantizedSoftmax(TorchFunctionMode):
    """Replaces scaled_dot_product_attention while an attention module runs, whatever processor it uses."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return quantized_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def value_layers(module: nn.Module) -> list[nn.Module]:
    """The projections that make V in one attention module (joint attentions have two); none where it is no
    attention."""
    return [
        child for name in VALUE_PROJECTIONS if isinstance(child := getattr(module, name, None), nn.Module)
    ]


def patch_attention_(denoiser: nn.Module) -> None:
    """Run every attention module's softmax at 8 bits while one of its V projections has its activations
    quantized to bits."""
    for module in list(denoiser.modules()):
        if value_layers(module):
            module.forward = _Attention(module)


class _Attention:
    """The forward of an attention module. An object, which copying and pickling keep with the module that it
    belongs to; a bound method would come back as that of the class."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # diffusers reads the signature
        return MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        if all(output_rounding(getattr(v, "act", 16)) == 16 for v in value_layers(self.module)):
            return forward(self.module, *args, **kwargs)
        with _QuantizedSoftmax():
            return forward(self.module, *args, **kwargs)

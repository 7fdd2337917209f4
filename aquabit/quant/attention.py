"""Softmax outputs at 8 bits, for every attention that calls torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aquabit.kernels import rounded_attention
from aquabit.quant.overlay import overlay_
from aquabit.scheme import output_rounding

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
    """``rounded_attention`` with the arguments of torch's own, by its names, since some processors give them
    so. What it does not do (dropout, causal, grouped queries) torch's does, unrounded."""
    if dropout_p or is_causal or enable_gqa:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return rounded_attention(query, key, value, attn_mask, scale)


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
    found = [getattr(module, name, None) for name in VALUE_PROJECTIONS]
    return [child for child in found if isinstance(child, nn.Module)]


def patch_attention_(denoiser: nn.Module) -> None:
    """Run every attention module's softmax at 8 bits while one of its V projections has its activations
    quantized to bits."""
    for module in list(denoiser.modules()):
        if value_layers(module):
            overlay_(module, _forward)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if all(output_rounding(getattr(v, "act", 16)) == 16 for v in value_layers(self)):
        return self.plainly(*args, **kwargs)
    with _QuantizedSoftmax():
        return self.plainly(*args, **kwargs)

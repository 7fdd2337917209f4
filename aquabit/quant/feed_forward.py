"""Feed-forward blocks of diffusers whose second layer applies the function between the two as it reads."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from aquabit.kernels import functions
from aquabit.kernels.functions import Function
from aquabit.quant.layers import HOOKS, QuantLinear
from aquabit.quant.overlay import overlay_

_ANYWHERE = ("_global_forward_hooks", "_global_forward_pre_hooks")


def patch_feed_forwards_(denoiser: nn.Module) -> None:
    """Have every FeedForward's function applied by the kernel of its second layer, where one does that."""
    from diffusers.models.attention import FeedForward

    for module in list(denoiser.modules()):
        if type(module) is FeedForward and "forward" not in vars(module):
            overlay_(module, _forward)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
        parts = list(self.net)
        function = _function(parts)
        if function is not None:
            x = parts[0].proj(args[0])
            y = parts[2].after(function, x)
            return parts[2](function(x)) if y is None else y
    return self.plainly(*args, **kwargs)


def _function(parts: list[Any]) -> Function | None:
    """What stands between the layers of a block; None where somebody would miss the calls of its parts."""
    first, between, last, *rest = parts
    if not isinstance(last, QuantLinear) or last.packed is None:
        return None
    if any(_seen(part) for part in (*parts, *(c for n, c in first.named_children() if n != "proj"))):
        return None
    drops = [p for p in (between, *rest) if not (type(p) is nn.Dropout and not (p.training and p.p))]
    return None if drops else _between(first)


def _between(first: Any) -> Function | None:
    found = _functions().get(type(first))
    if found is functions.GELU and first.approximate != "none":
        return functions.GELU_TANH if first.approximate == "tanh" else None
    if found in (functions.SILU, functions.SWIGLU) and type(first.activation) is not nn.SiLU:
        return None
    return found


@cache
def _functions() -> dict[type, Function]:
    from diffusers.models import activations as known

    return {
        known.GELU: functions.GELU,
        known.ApproximateGELU: functions.QUICK_GELU,
        known.LinearActivation: functions.SILU,
        known.GEGLU: functions.GEGLU,
        known.SwiGLU: functions.SWIGLU,
    }


def _seen(part: nn.Module) -> bool:
    own = vars(part)
    return (
        "forward" in own
        or any(own[name] for name in HOOKS)
        or any(getattr(_module, name) for name in _ANYWHERE)
    )

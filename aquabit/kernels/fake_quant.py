"""Dynamic fake quantization of activations: the reference in torch, the fused kernel on CPU, and the op that
torch.compile sees.

Each range of values (a token, a sample, or one of two channel ranges of a sample) gets its own grid of 2^bits
points: ``scale = (max - min) / (2^bits - 1)``, ``zero = round(-min / scale)``, ``y = clamp(round(x / scale),
-zero, 2^bits - 1 - zero) * scale``.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch

from aquabit.kernels.extension import native as _native
from aquabit.kernels.extension import why_not
from aquabit.scheme import AquabitError

Per = Literal["token", "sample"]


def native_available() -> bool:
    """Whether the fused CPU kernel is there."""
    return _native is not None


@cache
def _say_that_it_is_slow() -> None:
    message = (
        f"aquabit runs without its C++ extension ({why_not}): activations are quantized by the slower"
        " reference in torch"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def fake_quantize(x: torch.Tensor, bits: int, per: Per = "token", split: int | None = None) -> torch.Tensor:
    """``x`` rounded to a grid of 2^bits points per range, in its shape and dtype; ``x`` itself where ``bits``
    is 16 or more.

    ``per="token"``: one range for each row of the last dimension. ``per="sample"``: one for each entry of the
    first dimension, with zero in it; ``split`` makes it two, over channels ``[:split]`` and ``[split:]`` (a
    U-Net layer fed by a skip). A range with a NaN or an infinity becomes NaN; a constant one is returned
    unchanged (per sample: only all zeros). The result carries no gradient; ``straight_through`` does. Raises
    AquabitError for bits below 2 and for a split that leaves a range without channels.
    """
    if bits >= 16:
        return x
    _check(x, bits, per, split)
    served = x.device.type == "cpu" and x.dtype != torch.float64
    if served and _native is None:
        _say_that_it_is_slow()
    if not served or _native is None:
        return fake_quantize_reference(x.detach(), bits, per, split)
    # half precision is widened, computed in float32 and narrowed again
    wide = x if x.dtype == torch.float32 else x.float()
    y: torch.Tensor = torch.ops.aquabit.fake_quantize(wide.detach(), bits, per == "sample", split or 0)
    return y if x.dtype == torch.float32 else _narrow(y, x.dtype)


def fake_quantize_static(x: torch.Tensor, bits: int, low: float, high: float) -> torch.Tensor:
    """``x`` rounded to the grid of 2^bits points over [low, high], what lies outside clamped; ``x`` itself
    where ``bits`` is 16 or more.

    The grid is that of ``fake_quantize`` for these ends: zero is a point of it (outside [low, high] it is
    only where the grid continues to). Infinities are clamped too, NaN stays; where ``low`` equals ``high``
    nothing is left to round. Raises AquabitError for bits below 2 and ends that are not finite or not in
    order.
    """
    if bits >= 16:
        return x
    _check(x, bits, "token", None)
    if not -torch.inf < low <= high < torch.inf:
        raise AquabitError(f"a static range needs finite ends in order, not [{low:g}, {high:g}]")
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    levels, scale = 2**bits - 1, (high - low) / (2**bits - 1)
    if scale < torch.finfo(torch.float32).tiny:
        return wide.clamp(low, high).to(x.dtype)
    zero = round(-low / scale)
    return _narrow(wide.mul(1 / scale).round_().clamp_(-zero, levels - zero).mul_(scale), x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int, per: Per, split: int | None) -> torch.Tensor:
        return fake_quantize(x, bits, per, split)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient, None, None, None


def straight_through(
    x: torch.Tensor, bits: int, per: Per = "token", split: int | None = None
) -> torch.Tensor:
    """``fake_quantize`` to the bit, with the gradient of ``x`` itself where one is asked for: a dynamic
    range cuts nothing off, so that rounding alone is passed over (the straight-through estimator)."""
    if bits < 16 and x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, bits, per, split)  # type: ignore[no-untyped-call]
    return fake_quantize(x, bits, per, split)


def fake_quantize_reference(
    x: torch.Tensor, bits: int, per: Per = "token", split: int | None = None
) -> torch.Tensor:
    """The same as ``fake_quantize``, in plain torch operations, on any device; the fused kernel equals it
    to the bit."""
    if bits >= 16:
        return x
    _check(x, bits, per, split)
    if x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if split is not None:
        parts = (x[:, :split], x[:, split:])
        return torch.cat([fake_quantize_reference(part, bits, per) for part in parts], dim=1)
    wide = x.contiguous().to(x.dtype if x.dtype == torch.float64 else torch.float32)
    rows = wide.view(x.shape[0], -1) if per == "sample" else wide.view(-1, x.shape[-1])
    return _narrow(_quantize_rows(rows, bits, zero_in_range=per == "sample").view(x.shape), x.dtype)


def _quantize_rows(rows: torch.Tensor, bits: int, zero_in_range: bool) -> torch.Tensor:
    levels = 2**bits - 1
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if zero_in_range:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high * 0.5 - low * 0.5) / (
        levels * 0.5
    )  # halves: the difference of two finite values must not overflow
    inverse = scale.reciprocal()
    zero = torch.round(-low * inverse)
    y = torch.minimum(torch.maximum(torch.round(rows * inverse), -zero), levels - zero) * scale
    y = torch.where(
        scale >= torch.finfo(rows.dtype).tiny, y, rows
    )  # constant, or steps too small for a normal number
    return torch.where(torch.isfinite(scale), y, torch.nan)


def _narrow(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:  # the last grid point can lie half a step above the largest value
        y = torch.where(torch.isfinite(y), y.clamp(-65504, 65504), y)
    return y.to(dtype)


def _check(x: torch.Tensor, bits: int, per: str, split: int | None) -> None:
    if per not in ("token", "sample"):
        raise AquabitError(f"{per=} is unknown; activations are quantized per 'token' or per 'sample'")
    if bits < 2:
        raise AquabitError(f"{bits=} is too few for activations; give 2 to 15, or 16 for off")
    if x.dim() == 0 or not x.is_floating_point():
        raise AquabitError(
            f"activations are floating-point tensors of at least one dimension, not {x.dtype} of shape"
            f" {tuple(x.shape)}"
        )
    if split is not None and (per != "sample" or x.dim() < 2 or not 0 < split < x.shape[1]):
        raise AquabitError(
            f"{split=} needs per='sample' and 0 < split < channels; got {per=} and shape {tuple(x.shape)}"
        )


_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define("fake_quantize(Tensor x, int bits, bool per_sample, int split) -> Tensor")


@torch.library.impl(_library, "fake_quantize", "CPU")
def _fake_quantize_cpu(x: torch.Tensor, bits: int, per_sample: bool, split: int) -> torch.Tensor:
    """The fused kernel: float32, one or (``split > 0``) two ranges a row."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    rows = x.shape[0] if per_sample else x.numel() // x.shape[-1]
    length = x.numel() // rows
    first = split * (length // x.shape[1]) if split else 0
    _native.fake_quant_rows(
        x.data_ptr(), y.data_ptr(), rows, length, first, bits, per_sample, torch.get_num_threads()
    )
    return y


@torch.library.register_fake("aquabit::fake_quantize", lib=_library)
def _fake_quantize_fake(x: torch.Tensor, bits: int, per_sample: bool, split: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

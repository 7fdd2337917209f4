"""Dynamic fake quantization of activations: the reference in torch, the fused kernel on CPU, and the op that
torch.compile sees.

Each range of values (a token, a sample, or one of two channel ranges of a sample) has a grid of its own:

- of so many bits, asymmetric: ``scale = (max - min) / (2^bits - 1)``, ``zero = round(-min / scale)``, ``y =
  clamp(round(x / scale), -zero, 2^bits - 1 - zero) * scale``
- "i8", symmetric: ``scale = max|x| / 127``, ``y = clamp(round(x / scale), -127, 127) * scale``
- "f8", float8 e4m3fn: ``scale = max|x| / 448``, ``y = e4m3fn(x / scale) * scale``, ties to even

``x / scale`` is ``x * (1 / scale)`` but for "f8", which is as torchao 0.18.0 has it (quant_primitives.py).
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch

from aquabit.activation_bits import Rounding, act_bits, act_code
from aquabit.kernels.extension import native as _native
from aquabit.kernels.extension import why_not
from aquabit.scheme import AquabitError

Per = Literal["token", "sample"]
LEVELS = 127  # of symmetric integers, on either side of zero
E4M3_MOST = 448.0  # the largest number of float8 e4m3fn


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


def fake_quantize(
    x: torch.Tensor, act: Rounding, per: Per = "token", split: int | None = None
) -> torch.Tensor:
    """``x`` rounded to a grid per range, in its shape and dtype: of 2^act points, or that of "i8" or "f8";
    ``x`` itself where ``act`` is 16 or more.

    ``per="token"``: one range for each row of the last dimension. ``per="sample"``: one for each entry of the
    first dimension, with zero in it; ``split`` makes it two, over channels ``[:split]`` and ``[split:]`` (a
    U-Net layer fed by a skip). A range with a NaN or an infinity becomes NaN; a constant one is returned
    unchanged (per sample, and on symmetric grids: only all zeros). The result carries no gradient;
    ``straight_through`` does. Raises AquabitError for an ``act`` that is no rounding and for a split that
    leaves a range without channels.
    """
    if act_bits(act) >= 16:
        return x
    _check(x, act, per, split)
    served = x.device.type == "cpu" and x.dtype != torch.float64
    if served and _native is None:
        _say_that_it_is_slow()
    if not served or _native is None:
        return fake_quantize_reference(x.detach(), act, per, split)
    # half precision is widened, computed in float32 and narrowed again
    wide = x if x.dtype == torch.float32 else x.float()
    y: torch.Tensor = torch.ops.aquabit.fake_quantize(
        wide.detach(), act_code(act), per == "sample", split or 0
    )
    return y if x.dtype == torch.float32 else _narrow(y, x.dtype)


def fake_quantize_static(x: torch.Tensor, act: Rounding, low: float, high: float) -> torch.Tensor:
    """``x`` rounded to the grid of ``act`` over [low, high], what lies outside clamped; ``x`` itself where
    ``act`` is 16 or more. The symmetric grids of "i8" and "f8" reach to the larger of both sizes.

    The grid is that of ``fake_quantize`` for these ends: zero is a point of it (outside [low, high] it is
    only where the grid continues to). Infinities are clamped too, NaN stays; where ``low`` equals ``high``
    (symmetric: both are zero) nothing is left to round. Raises AquabitError for an ``act`` that is no
    rounding and ends that are not finite or not in order.
    """
    if act_bits(act) >= 16:
        return x
    _check(x, act, "token", None)
    if not -torch.inf < low <= high < torch.inf:
        raise AquabitError(f"a static range needs finite ends in order, not [{low:g}, {high:g}]")
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    if not isinstance(act, int):
        high = max(-low, high)
        low = -high
    levels = {"i8": 2 * LEVELS, "f8": 2 * E4M3_MOST}[act] if not isinstance(act, int) else 2**act - 1
    scale = (high - low) / levels
    if scale < torch.finfo(torch.float32).tiny:
        return wide.clamp(low, high).to(x.dtype)
    if act == "f8":
        return _narrow(_e4m3(wide / scale) * scale, x.dtype)
    zero = LEVELS if act == "i8" else round(-low / scale)
    return _narrow(wide.mul(1 / scale).round_().clamp_(-zero, levels - zero).mul_(scale), x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Rounding, per: Per, split: int | None) -> torch.Tensor:
        return fake_quantize(x, act, per, split)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient, None, None, None


def straight_through(
    x: torch.Tensor, act: Rounding, per: Per = "token", split: int | None = None
) -> torch.Tensor:
    """``fake_quantize`` to the bit, with the gradient of ``x`` itself where one is asked for: a dynamic
    range cuts nothing off, so that rounding alone is passed over (the straight-through estimator)."""
    if x.requires_grad and act_bits(act) < 16 and torch.is_grad_enabled():
        return _StraightThrough.apply(x, act, per, split)  # type: ignore[no-untyped-call]
    return fake_quantize(x, act, per, split)


def fake_quantize_reference(
    x: torch.Tensor, act: Rounding, per: Per = "token", split: int | None = None
) -> torch.Tensor:
    """The same as ``fake_quantize``, in plain torch operations, on any device; the fused kernel equals it
    to the bit."""
    if act_bits(act) >= 16:
        return x
    _check(x, act, per, split)
    if x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if split is not None:
        parts = (x[:, :split], x[:, split:])
        return torch.cat([fake_quantize_reference(part, act, per) for part in parts], dim=1)
    wide = x.contiguous().to(x.dtype if x.dtype == torch.float64 else torch.float32)
    rows = wide.view(x.shape[0], -1) if per == "sample" else wide.view(-1, x.shape[-1])
    if isinstance(act, int):
        rounded, scale = _asymmetric(rows, act, zero_in_range=per == "sample")
    else:
        rounded, scale = _symmetric(rows, act)
    y = torch.where(
        scale >= torch.finfo(rows.dtype).tiny, rounded, rows
    )  # constant, or steps too small for a normal number
    y = torch.where(torch.isfinite(scale), y, torch.nan)
    return _narrow(y.view(x.shape), x.dtype)


def _asymmetric(rows: torch.Tensor, bits: int, zero_in_range: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded rows and their scales [rows, 1]."""
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
    return y, scale


def _symmetric(rows: torch.Tensor, act: Literal["i8", "f8"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded rows and their scales [rows, 1]."""
    most = rows.abs().amax(1, keepdim=True)
    if act == "f8":
        scale = most / E4M3_MOST
        return _e4m3(rows / scale) * scale, scale
    scale = most / LEVELS
    return torch.round(rows * scale.reciprocal()).clamp(-LEVELS, LEVELS) * scale, scale


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of float8 e4m3fn, ties to even."""
    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).to(x.dtype)


def _narrow(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:  # the last grid point can lie half a step above the largest value
        y = torch.where(torch.isfinite(y), y.clamp(-65504, 65504), y)
    return y.to(dtype)


def _check(x: torch.Tensor, act: Rounding, per: str, split: int | None) -> None:
    if per not in ("token", "sample"):
        raise AquabitError(f"{per=} is unknown; activations are quantized per 'token' or per 'sample'")
    if act not in ("i8", "f8") and not (isinstance(act, int) and act >= 2):
        raise AquabitError(f"{act=} rounds no activations; give 2 to 15 bits, i8, f8, or 16 for off")
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
_library.define("fake_quantize(Tensor x, int act, bool per_sample, int split) -> Tensor")


@torch.library.impl(_library, "fake_quantize", "CPU")
def _fake_quantize_cpu(x: torch.Tensor, act: int, per_sample: bool, split: int) -> torch.Tensor:
    """The fused kernel: float32, one or (``split > 0``) two ranges a row; ``act`` as ``act_code`` has it."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    rows = x.shape[0] if per_sample else x.numel() // x.shape[-1]
    length = x.numel() // rows
    first = split * (length // x.shape[1]) if split else 0
    _native.fake_quant_rows(
        x.data_ptr(), y.data_ptr(), rows, length, first, act, per_sample, torch.get_num_threads()
    )
    return y


@torch.library.register_fake("aquabit::fake_quantize", lib=_library)
def _fake_quantize_fake(x: torch.Tensor, act: int, per_sample: bool, split: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

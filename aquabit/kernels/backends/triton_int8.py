"""The int8 Triton backend: uniform codes and activations of at most 8 bits, multiplied as integers.

Both are integers as they stand. A small kernel puts each token on its grid of ``fake_quantize``, codes are
unpacked to int8 in the kernel that multiplies, products are summed in int32 and scales, offsets, zero points
and bias follow: exact to float32 rounding, whatever the accuracy asked for. Linear layers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from aquabit.activation_bits import Rounding, act_bits, act_code, rounding_of
from aquabit.kernels.backends.triton_kernels import (
    Weight,
    _checked,
    _contiguous,
    _counts,
    _device,
    _on,
    _start,
)
from aquabit.kernels.backends.triton_weight import TritonWeight
from aquabit.kernels.codebook import ceil_divide
from aquabit.kernels.fake_quant import LEVELS
from aquabit.kernels.registry import weight_at
from aquabit.kernels.request import Format
from aquabit.scheme import AquabitError

LONGEST = 131071  # inputs whose products of 8 bits int32 holds
BLOCK = 32  # inputs that the matrix units take at a time: a group of scales is a multiple
_BLOCK_TOKEN = 1024  # inputs of a token that its program rounds at a time
_TILE_INTERPRETED = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SWIZZLE": 2}
_CHUNK = 1 << 24  # codes that are unpacked at a time where rows are summed


@cache
def _int8_device() -> Any:
    from aquabit.kernels.backends import triton_int8_device

    return triton_int8_device


def int8_refuses(form: Format) -> str | None:
    """Why weights of that format cannot be multiplied as integers, or None."""
    return _why_not(form.tables == "uniform" and form.scalar, form.bits, form.shape, (form.scales or 1,))


def _why_not(uniform: bool, bits: int, shape: tuple[int, ...], counts: tuple[int, ...]) -> str | None:
    if len(shape) != 2:
        return "it runs linear layers only"
    if not uniform or bits > 8:
        return "its codes are not whole numbers of at most 8 bits under a scale"
    if shape[1] > LONGEST:
        return f"a row has {shape[1]} inputs; int32 holds the products of {LONGEST}"
    for size in (ceil_divide(shape[1], n) for n in counts if n > 1):
        if size % BLOCK:
            return f"{size} inputs share a scale; it takes multiples of {BLOCK}"
    return None


def triton_int8_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, act: Rounding = 8) -> Tensor:
    """x [..., in], rounded per token as ``fake_quantize`` does, to ``act`` bits (2 to 8) or "i8", times a
    coded weight [out, in], plus bias [out]: [..., out] in x's dtype.

    Relative error 1e-6 of the float64 product of both, before rounding to x's dtype. Raises AquabitError for
    bits, weights, shapes, devices or dtypes that do not fit.
    """
    if act == "f8" or not 2 <= act_bits(act) <= 8:
        raise AquabitError(f"{act=} does not fit; activations multiplied as integers have 2 to 8 bits, or i8")
    laid = _checked(x, weight, bias, "exact", 2)
    why = _why_not(laid.tables is None, laid.bits, laid.shape, _counts(laid))
    if why:
        raise AquabitError(f"the triton_int8 backend cannot serve a weight {list(laid.shape)}: {why}")
    if x.ndim == 0 or x.shape[-1] != laid.shape[1]:
        raise AquabitError(
            f"the input is {list(x.shape)}; a weight {list(laid.shape)} takes [..., {laid.shape[1]}]"
        )
    rows = x.reshape(-1, x.shape[-1])
    number, code = laid.number, act_code(act)
    y: Tensor = torch.ops.aquabit.triton_int8_linear(rows, _contiguous(bias), number, laid.shape[0], code)
    return y.reshape(*x.shape[:-1], laid.shape[0])


# ---- what the kernel needs of a weight besides its codes


@dataclass(frozen=True, eq=False)
class Centred:
    """``centre`` float32 [out] or [out, n]: what a code of 2^(bits - 1) stands for (None: nothing does, as
    all are zero); ``total`` float32 [out]: the sum of a row's weights."""

    centre: Tensor | None
    total: Tensor


_centred: WeakKeyDictionary[TritonWeight, Centred] = WeakKeyDictionary()


def centred(laid: TritonWeight) -> Centred:
    """``Centred`` of a weight of uniform codes, made once."""
    if laid not in _centred:
        _centred[laid] = _made(laid)
    return _centred[laid]


def _made(laid: TritonWeight) -> Centred:
    out, row = laid.shape
    count, half = max(_counts(laid)), 1 << (laid.bits - 1)
    size = ceil_divide(row, count)
    sums = torch.cat([_group_sums(codes - half, count, size) for codes in _codes(laid)])
    sizes = _group_sums(torch.ones(1, row, device=sums.device, dtype=torch.int32), count, size)
    ones = torch.ones(out, 1, device=sums.device, dtype=torch.float64)
    scale = ones if laid.scale is None else laid.scale.double().reshape(out, -1)
    offset = 0 * ones if laid.offset is None else laid.offset.double().reshape(out, -1)
    centre = offset + half * scale
    total = (scale * sums + centre * sizes).sum(1).float()
    kept = centre.float().squeeze(1).contiguous()
    return Centred(kept if bool(kept.any()) else None, total)


def _codes(laid: TritonWeight) -> Iterator[Tensor]:
    """Codes int32 [rows, in], some rows at a time."""
    row, places = laid.shape[1], torch.arange(laid.fused, device=laid.codes.device) * laid.bits
    for part in laid.codes.split(max(1, _CHUNK // row)):
        lookups = part.int()
        if laid.width == 4:
            lookups = torch.stack([lookups & 15, lookups >> 4], 2).flatten(1)
        yield ((lookups[..., None] >> places.int()) & ((1 << laid.bits) - 1)).flatten(1)[:, :row]


def _group_sums(values: Tensor, count: int, size: int) -> Tensor:
    """[rows, in] summed over each of ``count`` groups of ``size``: int64 [rows, count]."""
    missing = count * size - values.shape[1]
    return torch.nn.functional.pad(values, (0, missing)).reshape(len(values), count, size).sum(2)


# ---- the op

_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define("triton_int8_linear(Tensor x, Tensor? bias, int weight, int outputs, int act) -> Tensor")


def _linear(x: Tensor, bias: Tensor | None, weight: int, outputs: int, act: int) -> Tensor:
    y, laid = _linear_fake(x, bias, weight, outputs, act), weight_at(weight)
    if y.numel() == 0:
        return y
    with _on(x):
        _multiply(_quantized(x, rounding_of(act)), y, laid, bias)
    return y


def _linear_fake(x: Tensor, bias: Tensor | None, weight: int, outputs: int, act: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


for _key in ("CUDA", "CPU"):  # CPU: the interpreter
    _library.impl("triton_int8_linear", _linear, _key)
torch.library.register_fake("aquabit::triton_int8_linear", _linear_fake, lib=_library)


def _quantized(x: Tensor, act: Rounding) -> tuple[Tensor, ...]:
    """q int8 [tokens, in]; step, shift and sum float32 [tokens]: see ``quantize_tokens``."""
    tokens, row = x.shape
    levels = 2 * LEVELS if act == "i8" else (1 << act_bits(act)) - 1
    q = torch.empty(tokens, row, dtype=torch.int8, device=x.device)
    step, shift, total = torch.empty(3, tokens, dtype=torch.float32, device=x.device)

    def chosen() -> tuple[Any, Any, dict[str, Any]]:
        # a fused multiply-add would round some halves otherwise than torch
        constants = {"LEVELS": levels, "SYMMETRIC": act == "i8", "BLOCK": _BLOCK_TOKEN}
        return _int8_device().quantize_tokens, (tokens, 1, 1), constants | {"enable_fp_fusion": False}

    _start(("int8 tokens", act, tokens), q, (x, q, step, shift, total), (row, *x.stride()), chosen)
    return q, step, shift, total


def _multiply(quantized: tuple[Tensor, ...], y: Tensor, laid: TritonWeight, bias: Tensor | None) -> None:
    (q, step, shift, sums), (tokens, out), codes = quantized, y.shape, laid.codes
    row, made = laid.shape[1], centred(laid)
    scales = _counts(laid)[0]
    centres = 1 if made.centre is None or made.centre.ndim == 1 else made.centre.shape[1]

    def chosen() -> tuple[Any, Any, dict[str, Any]]:
        constants = {
            "BITS": laid.bits,
            "WIDTH": laid.width,
            "FUSED": laid.fused,
            "HAS_SCALE": laid.scale is not None,
            "HAS_CENTRE": made.centre is not None,
            "SCALE_SIZE": ceil_divide(row, scales) if scales > 1 else 0,
            "CENTRE_SIZE": ceil_divide(row, centres) if centres > 1 else 0,
            "HAS_BIAS": bias is not None,
        }
        if _device().INTERPRETED:
            constants |= _TILE_INTERPRETED

        def grid(tile: dict[str, int]) -> tuple[int, int, int]:
            return ceil_divide(tokens, tile["BLOCK_M"]) * ceil_divide(out, tile["BLOCK_N"]), 1, 1

        return _int8_device().tuned_int8_matmul, grid, constants

    sizes = (tokens, out, row, codes.shape[1], scales, centres, 1 << (tokens - 1).bit_length())
    given = [codes if t is None else t for t in (laid.scale, made.centre, made.total, bias)]
    pointers = (q, y, codes, *given, step, shift, sums)
    _start(("int8 matmul", laid.facts), codes, pointers, sizes, chosen)

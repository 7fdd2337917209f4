"""Tiles of decoded rows for the dense library: what no integer kernel serves (decode.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.kernels.codebook import CodebookWeight, Scale, pack
from aquabit.kernels.coded_scale import CodedScale
from aquabit.kernels.geometry import Geometry

Decoder = Callable[[int, int], Tensor]  # rows [first, last) of a weight, in its own order, float32
MIN_ROWS = 8  # rows of a tile


def rows_of(weight: CodebookWeight) -> Decoder:
    """Decodes rows of a weight that is stored as it is."""

    def decode(first: int, last: int) -> Tensor:
        codes = _codes(weight, first, last)
        tables = (
            weight.codebooks
            if weight.codebooks is None or weight.codebooks.shape[0] == 1
            else weight.codebooks[first:last]
        )
        scale, offset = (_rows(t, first, last) for t in (weight.scale, weight.offset))
        part = replace(
            weight,
            packed=pack(codes, weight.bits),
            codebooks=tables,
            scale=scale,
            offset=offset,
            shape=(last - first, *weight.shape[1:]),
        )
        return part.dequantize()

    return decode


def _rows(factor: Scale | None, first: int, last: int) -> Scale | None:
    """Scales or offsets of some rows; one for all stays."""
    if factor is None or factor.shape[0] == 1:
        return factor
    return factor.rows(first, last) if isinstance(factor, CodedScale) else factor[first:last]


def _codes(weight: CodebookWeight, first: int, last: int) -> Tensor:
    """Codes [groups, M, rows] out of the bit stream [groups, M, out]."""
    lookups, out, bits = weight.groups * weight.codebook_count, weight.shape[0], weight.bits
    at = (torch.arange(lookups)[:, None] * out + torch.arange(first, last)) * bits
    byte, end = at >> 3, weight.packed.numel() - 1
    word = sum(weight.packed[(byte + k).clamp_(max=end)].int() << (8 * k) for k in range(3))
    assert isinstance(word, Tensor)
    return ((word >> (at & 7)) & ((1 << bits) - 1)).reshape(
        weight.groups, weight.codebook_count, last - first
    )


def _tile(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Rows that, with the float32 they are decoded to, take 1/16 of the dense weight of a dtype."""
    size = dtype.itemsize
    return max(MIN_ROWS, shape[0] * size // 16 // (4 if size == 4 else 4 + size))


def linear_by_tiles(x: Tensor, shape: Sequence[int], decode: Decoder, bias: Tensor | None) -> Tensor:
    """x [..., in] times a weight of ``shape`` [out, in], tile after tile."""
    out, inputs = shape
    rows = x.reshape(-1, inputs)
    y = x.new_empty(len(rows), out)
    if y.numel() == 0:
        return y.reshape(*x.shape[:-1], out)
    step = _tile(shape, x.dtype)
    for first in range(0, out, step):
        last = min(out, first + step)
        tile = decode(first, last).to(x.dtype).t()
        if bias is None:
            torch.mm(rows, tile, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last].to(x.dtype), rows, tile, out=y[:, first:last])
    return y.reshape(*x.shape[:-1], out)


def conv_by_tiles(
    x: Tensor, shape: Sequence[int], decode: Decoder, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """x [n, cin, h, w] convolved with a weight of ``shape`` [out, cin / groups, kh, kw]: tiles of whole
    groups, or of rows of one."""
    out, inputs, groups = shape[0], shape[1], geometry.groups
    each, step = out // groups, _tile(shape, x.dtype)
    spans = [
        (g * each + a, min(g * each + each, g * each + a + step))
        for g in range(groups)
        for a in range(0, each, step)
    ]
    if step > each:
        step = step // each * each
        spans = [(a, min(out, a + step)) for a in range(0, out, step)]
    parts = []
    for first, last in spans:
        count = ceil((last - first) / each)
        channels = x[:, first // each * inputs : (first // each + count) * inputs]
        tile = decode(first, last).to(x.dtype)
        part = None if bias is None else bias[first:last].to(x.dtype)
        parts.append(
            functional.conv2d(
                channels, tile, part, geometry.stride, geometry.padding, geometry.dilation, count
            )
        )
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

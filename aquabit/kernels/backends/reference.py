"""The reference kernel: decode the weight as it goes, multiply, forget. No dense copy is kept between
calls."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.kernels.arranged import Arranged
from aquabit.kernels.arranged import _unlaid as unlaid
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.geometry import Pair
from aquabit.kernels.request import Accuracy as Accuracy


def decoded(weight: CodebookWeight | Arranged, like: Tensor) -> Tensor:
    """The dense weight in the dtype of ``like``."""
    if not isinstance(weight, Arranged):
        return weight.dequantize().to(like.dtype)
    codes = unlaid(weight).permute(1, 2, 0)  # [groups, M, out]
    size = -(-codes.numel() * weight.bits // 8)
    unpacked = torch.zeros((), dtype=torch.uint8, device=codes.device).expand(
        size
    )  # codes are not packed to be unpacked at once
    order: Literal["inputs", "kernel"] = "kernel" if weight.order == "kernel" else "inputs"
    return (
        CodebookWeight(unpacked, *weight.stored, weight.shape, weight.bits, order)
        .dequantize(codes)
        .to(like.dtype)
    )


def reference_linear(x: Tensor, weight: CodebookWeight | Arranged, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a coded weight [out, in], plus bias [out]: [..., out] in x's dtype, on any device."""
    return functional.linear(x, decoded(weight, x), bias)


def reference_conv2d(
    x: Tensor,
    weight: CodebookWeight | Arranged,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | str | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """x [n, cin, h, w] convolved with a coded weight [out, cin / groups, kh, kw]; arguments as
    ``torch.nn.functional.conv2d``."""
    return functional.conv2d(x, decoded(weight, x), bias, stride, padding, dilation, groups)

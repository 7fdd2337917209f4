"""The reference kernel: decode the weight as it goes, multiply, forget. No dense copy is kept between
calls."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from aquabit.kernels.arranged import Arranged
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.geometry import Pair
from aquabit.kernels.request import Accuracy as Accuracy


def decoded(weight: CodebookWeight | Arranged, like: Tensor) -> Tensor:
    """The dense weight in the dtype of ``like``."""
    return weight.dequantize().to(like.dtype)


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

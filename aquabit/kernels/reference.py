"""The reference kernel: decode the weight as it goes, multiply, forget. No dense copy is kept between calls."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from aquabit.kernels.codebook import CodebookWeight
from aquabit.scheme import AquabitError

Accuracy = Literal["fast", "exact"]


def _check(x: Tensor, weight: CodebookWeight, inputs: int, accuracy: str, backend: str | None, ndim: int) -> None:
    if accuracy not in ("fast", "exact"):
        raise AquabitError(f"accuracy {accuracy!r} is unknown; it must be fast or exact")
    if backend not in (None, "reference"):
        raise AquabitError(f"backend {backend!r} is unknown; this version has reference")
    if len(weight.shape) != ndim:
        raise AquabitError(f"a weight of shape {list(weight.shape)} does not fit here; {ndim} dimensions are needed")
    if inputs != weight.shape[1]:
        raise AquabitError(f"the input has {inputs} channels, the weight {list(weight.shape)} takes {weight.shape[1]}")
    if x.device != weight.packed.device:
        raise AquabitError(f"the input is on {x.device}, the weight on {weight.packed.device}; move one of them")


def codebook_linear(
    x: Tensor, weight: CodebookWeight, bias: Tensor | None = None, accuracy: Accuracy = "fast", backend: str | None = None
) -> Tensor:
    """x [..., in] times a coded weight [out, in], plus bias [out]: [..., out] in x's dtype.

    The reference kernel is exact for both accuracies; faster ones differ. Raises AquabitError for shapes, devices, accuracies or
    backends that do not fit.
    """
    _check(x, weight, x.shape[-1], accuracy, backend, 2)
    return functional.linear(x, weight.dequantize().to(x.dtype), bias)


def codebook_conv2d(
    x: Tensor, weight: CodebookWeight, bias: Tensor | None = None, stride: int | tuple[int, int] = 1,
    padding: int | str | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1,
    accuracy: Accuracy = "fast", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """x [n, cin, h, w] convolved with a coded weight [out, cin / groups, kh, kw]; arguments as ``torch.nn.functional.conv2d``."""
    _check(x, weight, x.shape[-3] // groups, accuracy, backend, 4)
    return functional.conv2d(x, weight.dequantize().to(x.dtype), bias, stride, padding, dilation, groups)

"""What compiled code calls: one op a layer. When it runs it finds the weight by its handle and the kernel by
the request, and makes prepared calls as a layer does (direct.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor

from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends import Weight
from aquabit.kernels.direct import Direct
from aquabit.kernels.dispatch import (
    codebook_conv2d,
    codebook_linear,
    conv2d_request,
    format_held,
    linear_request,
)
from aquabit.kernels.geometry import Geometry
from aquabit.kernels.registry import weight_at
from aquabit.kernels.request import Accuracy, Request
from aquabit.scheme import rounding_of

KEPT = 8  # calls of a weight, by their setting and bias: layers that are tied have biases of their own

_calls: WeakKeyDictionary[Arranged, dict[tuple[Any, ...], Direct]] = WeakKeyDictionary()


def _directly(
    x: Tensor, weight: Weight, bias: Tensor | None, request: Callable[..., Request], *setting: Any
) -> Tensor | None:
    """What a weight makes of x where a kernel serves it by itself, None elsewhere; ``request(x, format,
    *setting)`` is what is asked of kernels."""
    if not isinstance(weight, Arranged):
        return None
    kept, key = _calls.setdefault(weight, {}), (id(bias), *setting)
    direct = kept.get(key)
    if direct is None:
        if len(kept) >= KEPT:
            kept.clear()
        form = format_held(weight)
        # what is kept holds the bias, so that no other has its id, and not the weight, which holds it
        direct = kept[key] = Direct(proxy(weight), bias, lambda x: request(x, form, *setting))
    return direct(x)


def _widened(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define(
    "coded_linear(Tensor x, Tensor? bias, Tensor? dense, Tensor handle, int outputs, str accuracy, int act)"
    " -> Tensor"
)
_library.define(
    "coded_conv2d(Tensor x, Tensor? bias, Tensor? dense, Tensor handle, int[] shape, int[] geometry,"
    " str accuracy, int act, int? split) -> Tensor"
)


@torch.library.impl(_library, "coded_linear", "CompositeExplicitAutograd")
def _coded_linear(
    x: Tensor, bias: Tensor | None, dense: Tensor | None, handle: Tensor, _: int, accuracy: Accuracy, act: int
) -> Tensor:
    weight, rounding = weight_at(int(handle)), rounding_of(act)
    y = None if dense is not None else _directly(x, weight, bias, linear_request, accuracy, rounding)
    if y is None:
        y = codebook_linear(x, weight, _widened(bias, x), accuracy, act=rounding, dense=dense)
    return y


@torch.library.register_fake("aquabit::coded_linear", lib=_library)
def _coded_linear_fake(
    x: Tensor, bias: Tensor | None, dense: Tensor | None, handle: Tensor, outputs: int, *_: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.impl(_library, "coded_conv2d", "CompositeExplicitAutograd")
def _coded_conv2d(
    x: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    handle: Tensor,
    _: list[int],
    geometry: list[int],
    accuracy: Accuracy,
    act: int,
    split: int | None,
) -> Tensor:
    weight, rounding, g = weight_at(int(handle)), rounding_of(act), Geometry.of(geometry)
    y = None
    if dense is None:
        y = _directly(x, weight, bias, conv2d_request, g, accuracy, rounding, split)
    if y is None:
        window = (g.stride, g.padding, g.dilation, g.groups)
        options: dict[str, Any] = {"act": rounding, "split": split, "dense": dense}
        y = codebook_conv2d(x, weight, _widened(bias, x), *window, accuracy, **options)
    return y.contiguous()  # as the fake says


@torch.library.register_fake("aquabit::coded_conv2d", lib=_library)
def _coded_conv2d_fake(
    x: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    handle: Tensor,
    shape: list[int],
    geometry: list[int],
    *_: object,
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0], *Geometry.of(geometry).output(x.shape[2:], shape[2:]))

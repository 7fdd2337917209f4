"""The kernels that run a coded weight, as data: what each is, what it cannot serve, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends.decode import (
    decode_conv2d,
    decode_conv2d_raw,
    decode_linear,
    decode_linear_raw,
    decode_refuses,
)
from aquabit.kernels.backends.lut import lut_conv2d, lut_conv2d_raw, lut_linear, lut_linear_raw, lut_refuses
from aquabit.kernels.backends.raw import Raw
from aquabit.kernels.backends.reference import reference_conv2d, reference_linear
from aquabit.kernels.backends.triton_int8 import int8_refuses, triton_int8_linear
from aquabit.kernels.backends.triton_kernels import triton_conv2d, triton_linear, triton_refuses
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.request import Request, empty_like
from aquabit.scheme import AquabitError, act_code

Weight: TypeAlias = CodebookWeight | Arranged
Call: TypeAlias = Callable[
    [Tensor, Weight, Tensor | None, Request, Tensor | None], Tensor
]  # x, weight, bias, request, dense copy
RawMaker: TypeAlias = Callable[
    [Arranged, Request, tuple[int, ...]], Raw | None
]  # of a weight, a request that the backend serves, and the input's shape


@dataclass(frozen=True)
class Backend:
    """``refuses`` says why a request cannot be served, or None. ``quantizes``: it rounds the activations
    itself; the others get them rounded. ``raw``: its calls by addresses, where it has such."""

    name: str
    does: str
    refuses: Callable[[Request], str | None]
    linear: Call
    conv2d: Call
    quantizes: bool = False
    raw: RawMaker | None = None


def _native_refuses(request: Request) -> str | None:
    """What no native CPU kernel serves."""
    if request.device != "cpu":
        return f"it runs on the CPU, the input is on {request.device}"
    if request.dtype not in ("float32", "bfloat16"):
        return f"it reads float32 and bfloat16, the input is {request.dtype}"
    return _no_gradient(request)


def _no_gradient(request: Request) -> str | None:
    return "it carries no gradient, and one is asked for" if request.gradient else None


def _lut_refuses(request: Request) -> str | None:
    form = request.format
    if form.tables == "channel":
        return "every output has codebooks of its own: it needs shared ones"
    own = empty_like(form)
    return _native_refuses(request) or (lut_refuses(own) if isinstance(own, Arranged) else form.unarranged)


def _decode_refuses(request: Request) -> str | None:
    return _native_refuses(request) or decode_refuses(
        empty_like(request.format), request.device, getattr(torch, request.dtype)
    )


def _triton_refuses(request: Request) -> str | None:
    if request.device != "cuda":
        return f"it runs on CUDA, the input is on {request.device}"
    return _no_gradient(request) or triton_refuses(
        empty_like(request.format), request.device, getattr(torch, request.dtype)
    )


def _triton_int8_refuses(request: Request) -> str | None:
    if not request.integers:
        return "it rounds activations to whole numbers of at most 8 bits, which is not asked for"
    return int8_refuses(request.format) or _triton_refuses(request)


def _dense_refuses(request: Request) -> str | None:
    return None if request.dense else "no dense copy of the weight is kept (memory=auto keeps some)"


def _lut_linear(x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None) -> Tensor:
    assert isinstance(weight, Arranged)
    return lut_linear(x, weight, bias, request.accuracy == "exact")


def _lut_conv2d(x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None) -> Tensor:
    r = request
    assert isinstance(weight, Arranged)
    return lut_conv2d(x, weight, bias, r.geometry, r.accuracy == "exact")


def _decode_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None
) -> Tensor:
    return decode_linear(x, weight, bias, request.act, request.accuracy)


def _decode_conv2d(
    x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None
) -> Tensor:
    r = request
    return decode_conv2d(x, weight, bias, r.geometry, r.act, r.split, r.accuracy)


def _decode_raw(weight: Arranged, request: Request, shape: tuple[int, ...]) -> Raw | None:
    r = request
    exact, act, narrow = r.accuracy == "exact", act_code(r.act), r.dtype == "bfloat16"
    if r.kind == "linear":
        return decode_linear_raw(weight, prod(shape[:-1]), act, exact, r.threads, narrow)
    return decode_conv2d_raw(weight, shape, r.geometry, act, r.split, exact, r.threads, narrow)


def _lut_raw(weight: Arranged, request: Request, shape: tuple[int, ...]) -> Raw | None:
    r = request
    exact = r.accuracy == "exact"
    if r.kind == "linear":
        return lut_linear_raw(weight, prod(shape[:-1]), exact, r.threads)
    return lut_conv2d_raw(weight, shape, r.geometry, exact, r.threads)


def _triton_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None
) -> Tensor:
    return triton_linear(x, weight, bias, request.accuracy)


def _triton_conv2d(
    x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None
) -> Tensor:
    g = request.geometry
    return triton_conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups, request.accuracy)


def _triton_int8_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None
) -> Tensor:
    return triton_int8_linear(x, weight, bias, request.act)


def _no_conv2d(x: Tensor, _: Weight, __: Tensor | None, request: Request, ___: Tensor | None) -> Tensor:
    raise AssertionError(f"{request.kind} is refused")


def _reference_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, _: Request, __: Tensor | None
) -> Tensor:
    return reference_linear(x, weight, bias)


def _reference_conv2d(
    x: Tensor, weight: Weight, bias: Tensor | None, request: Request, _: Tensor | None
) -> Tensor:
    g = request.geometry
    return reference_conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def _dense_linear(x: Tensor, _: Weight, bias: Tensor | None, __: Request, dense: Tensor | None) -> Tensor:
    assert dense is not None
    return functional.linear(x, dense, bias)


def _dense_conv2d(
    x: Tensor, _: Weight, bias: Tensor | None, request: Request, dense: Tensor | None
) -> Tensor:
    assert dense is not None
    g = request.geometry
    return functional.conv2d(x, dense, bias, g.stride, g.padding, g.dilation, g.groups)


BACKENDS = (
    Backend(
        "dense",
        "multiplies with a dense copy that memory=auto keeps",
        _dense_refuses,
        _dense_linear,
        _dense_conv2d,
    ),
    Backend(
        "triton",
        "decodes in shared memory for the matrix units of a GPU",
        _triton_refuses,
        _triton_linear,
        _triton_conv2d,
    ),
    Backend(
        "triton_int8",
        "multiplies codes and activations as 8-bit integers on the matrix units of a GPU",
        _triton_int8_refuses,
        _triton_int8_linear,
        _no_conv2d,
        True,
    ),
    Backend(
        "lut",
        "adds entries of tables of all codewords' products",
        _lut_refuses,
        _lut_linear,
        _lut_conv2d,
        raw=_lut_raw,
    ),
    Backend(
        "decode",
        "decodes tiles for the processor's matrix instructions",
        _decode_refuses,
        _decode_linear,
        _decode_conv2d,
        True,
        _decode_raw,
    ),
    Backend(
        "reference",
        "decodes the whole weight, any device and type",
        lambda _: None,
        _reference_linear,
        _reference_conv2d,
    ),
)


def backend_named(name: str, backends: tuple[Backend, ...] = BACKENDS) -> Backend:
    """The backend of that name; raises AquabitError, listing those there are."""
    found = next((b for b in backends if b.name == name), None)
    if found is None:
        raise AquabitError(f"backend {name!r} is unknown; known: {', '.join(b.name for b in backends)}")
    return found

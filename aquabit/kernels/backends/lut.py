"""The table backend: codebook_linear and codebook_conv2d for codebooks that all rows share, by lut.cpp.

``exact``: float32 tables. Else int16 tables, each column (token; for a convolution with groups across
channels each tile) in units of its own for every block of lookups; their error was measured at 1e-4 to 8e-4
of the result's norm on Gaussian inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends.lut_plan import Plan, is_rough, plan_of, taps_of
from aquabit.kernels.backends.raw import Raw
from aquabit.kernels.extension import native as _native
from aquabit.kernels.extension import plain_bias
from aquabit.kernels.geometry import UNPADDED, Geometry
from aquabit.kernels.registry import weight_at

SPAN = 64  # inputs of a lookup, at most
TAPS = 64  # of a kernel, at most
_LEVELS: tuple[str, ...] = tuple(_native.lut_levels()) if hasattr(_native, "lut_levels") else ()


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A weight in the extension (``native``), which holds the tensors of ``plan`` by their addresses, and
    has checked them."""

    plan: Plan
    native: Any
    addresses: tuple[int, ...]  # of the weight's tensors then

    def tensors(self) -> list[Tensor]:
        return [t for t in vars(self.plan).values() if isinstance(t, Tensor)]


def _prepared(weight: Arranged) -> _Prepared:
    found, addresses = weight.derived.get("lut"), weight.addresses
    if found is None or found.addresses != addresses:
        plan = plan_of(weight)
        found = weight.derived["lut"] = _Prepared(plan, _native.LutWeight(weight, plan), addresses)
    assert isinstance(found, _Prepared)
    return found


def lut_refuses(weight: Arranged) -> str | None:
    """Why the table kernel cannot run ``weight``, or None."""
    if not hasattr(_native, "LutWeight"):
        return "needs the C++ extension, which is not there"
    if weight.codes.device.type != "cpu":
        return f"runs on a CPU, not on {weight.codes.device}"
    if weight.tables is not None and len(weight.tables) > 1:
        return "needs codebooks that all rows share"
    if weight.span > SPAN or (weight.offset is not None and not weight.scalar):
        return f"takes groups of at most {SPAN} inputs, and offsets with scalar codes only"
    if prod(weight.shape[2:]) > TAPS:
        return f"takes kernels of at most {TAPS} taps, not {prod(weight.shape[2:])}"
    if weight.order != "kernel" and taps_of(weight) is None:
        return "needs the groups of scales of a convolution to be the same at every tap"
    return None


def lut_linear(
    x: Tensor, weight: Arranged, bias: Tensor | None = None, exact: bool = False, level: int = 0
) -> Tensor:
    """x [..., in] times ``weight`` [out, in], plus bias [out]: [..., out] in x's dtype. Raises
    AquabitError for what does not fit, ValueError for a weight that does not hold together."""
    _check(x, weight, bias, 2, x.shape[-1] if x.ndim else 0)
    y: Tensor = torch.ops.aquabit.lut_linear(x, bias, weight.number, weight.shape[0], exact, level)
    return y


def lut_conv2d(
    x: Tensor,
    weight: Arranged,
    bias: Tensor | None = None,
    geometry: Geometry = UNPADDED,
    exact: bool = False,
    level: int = 0,
) -> Tensor:
    """x [n, cin, h, w] convolved with ``weight`` [out, cin / groups, kh, kw]. Raises as ``lut_linear``."""
    _check(x, weight, bias, 4, x.shape[1] if x.ndim == 4 else 0, geometry.groups)
    if weight.shape[0] % geometry.groups:
        raise AquabitError(f"groups={geometry.groups} do not fit a weight {list(weight.shape)}")
    if min(geometry.output(x.shape[2:], weight.shape[2:])) < 1:
        raise AquabitError(
            f"an image of {x.shape[2]} x {x.shape[3]} with padding={geometry.padding} is smaller than a"
            f" kernel of {list(weight.shape[2:])}"
        )
    exact = exact or is_rough(weight)
    y: Tensor = torch.ops.aquabit.lut_conv2d(
        x, bias, weight.number, weight.shape, geometry.numbers, exact, level
    )
    return y


def _check(
    x: Tensor, weight: Arranged, bias: Tensor | None, ndim: int, channels: int, groups: int = 1
) -> None:
    refused = lut_refuses(weight)
    if refused:
        raise AquabitError(f"the table kernel {refused}")
    if len(weight.shape) != ndim or (ndim == 4 and x.ndim != 4):
        raise AquabitError(
            f"an input {list(x.shape)} and a weight {list(weight.shape)} do not go together here"
        )
    if channels != weight.shape[1] * groups:
        takes = weight.shape[1] * groups
        raise AquabitError(
            f"the input {list(x.shape)} has {channels} channels, the weight {list(weight.shape)} takes"
            f" {takes}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device != weight.codes.device:
        raise AquabitError(
            f"the table kernel takes float32 and bfloat16 on {weight.codes.device}, not {x.dtype} on"
            f" {x.device}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise AquabitError(
            f"bias is {list(bias.shape)}; a weight {list(weight.shape)} needs [{weight.shape[0]}]"
        )
    if bias is not None and bias.device != x.device:
        raise AquabitError(f"bias is on {bias.device}, the input on {x.device}; move one of them")


# ---- Calls by addresses


def lut_linear_raw(weight: Arranged, tokens: int, exact: bool, threads: int) -> Raw:
    """``lut_linear`` of ``tokens`` rows, float32."""
    linear = _prepared(weight).native.linear

    def run(x: int, y: int, bias: int) -> bool:
        linear(x, y, bias, tokens, exact, threads, 0)
        return True

    return Raw(run, False)


def lut_conv2d_raw(
    weight: Arranged, sizes: tuple[int, ...], geometry: Geometry, exact: bool, threads: int
) -> Raw:
    """``lut_conv2d`` of images of such sizes, float32."""
    conv2d, numbers, exact = _prepared(weight).native.conv2d, geometry.numbers, exact or is_rough(weight)

    def run(x: int, y: int, bias: int) -> bool:
        conv2d(x, y, bias, sizes, numbers, exact, threads, 0)
        return True

    return Raw(run, False)


# ---- The ops

_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define(
    "lut_linear(Tensor x, Tensor? bias, int weight, int outputs, bool exact, int level) -> Tensor"
)
_library.define(
    "lut_conv2d(Tensor x, Tensor? bias, int weight, int[] shape, int[] geometry, bool exact, int level) ->"
    " Tensor"
)


@torch.library.impl(_library, "lut_linear", "CPU")
def _linear_cpu(x: Tensor, bias: Tensor | None, weight: int, _: int, exact: bool, level: int) -> Tensor:
    own: Arranged = weight_at(weight)
    out, inputs = own.shape[0], own.shape[1]
    if not x.ndim or x.shape[-1] != inputs:
        raise AquabitError(f"lut_linear: x is {list(x.shape)}; its rows need {inputs} inputs")
    y = torch.empty(*x.shape[:-1], out)
    if y.numel():
        rows, added = x.float().contiguous(), plain_bias(bias, out)
        _prepared(own).native.linear(
            rows.data_ptr(),
            y.data_ptr(),
            0 if added is None else added.data_ptr(),
            y.numel() // out,
            exact,
            torch.get_num_threads(),
            _known(level),
        )
    return y.to(x.dtype)


@torch.library.register_fake("aquabit::lut_linear", lib=_library)
def _linear_fake(x: Tensor, bias: Tensor | None, weight: int, outputs: int, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.impl(_library, "lut_conv2d", "CPU")
def _conv2d_cpu(
    x: Tensor, bias: Tensor | None, weight: int, _: list[int], geometry: list[int], exact: bool, level: int
) -> Tensor:
    own: Arranged = weight_at(weight)
    if x.ndim != 4 or len(own.shape) != 4:
        raise AquabitError(
            f"lut_conv2d: x is {list(x.shape)}, the weight {list(own.shape)}; 4 dimensions needed"
        )
    size = Geometry.of(geometry).output(x.shape[2:], own.shape[2:])
    y = torch.empty(len(x), own.shape[0], *(max(s, 0) for s in size))
    if y.numel():
        image, added = x.float().contiguous(), plain_bias(bias, own.shape[0])
        _prepared(own).native.conv2d(
            image.data_ptr(),
            y.data_ptr(),
            0 if added is None else added.data_ptr(),
            image.shape,
            geometry,
            exact,
            torch.get_num_threads(),
            _known(level),
        )
    return y.to(x.dtype)


@torch.library.register_fake("aquabit::lut_conv2d", lib=_library)
def _conv2d_fake(
    x: Tensor, bias: Tensor | None, weight: int, shape: list[int], geometry: list[int], *_: object
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0], *Geometry.of(geometry).output(x.shape[2:], shape[2:]))


def _known(level: int) -> int:
    if not 0 <= level < len(_LEVELS):
        raise AquabitError(f"level {level} is not there; this processor has {', '.join(_LEVELS)}")
    return level

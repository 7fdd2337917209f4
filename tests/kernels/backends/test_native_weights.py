"""Weights in the extension: what does not hold together is refused once, at construction; copies are weights
of their own; nothing outlives its weight."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aquabit.kernels.arranged import Arranged, arrange
from aquabit.kernels.backends.decode import decode_conv2d, decode_linear
from aquabit.kernels.backends.lut import lut_conv2d, lut_linear
from aquabit.kernels.backends.lut_plan import Plan, plan_of
from aquabit.kernels.extension import native
from aquabit.kernels.geometry import Geometry
from aquabit.kernels.registry import weight_at
from aquabit.scheme import AquabitError
from tests.coded_weights import coded

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")
SHAPES = {"usq4g64": (6, 128), "vq5": (6, 24), "aq2x6g8": (6, 64), "aq3x4g8": (6, 64), "aq2x6k": (6, 8, 3, 3)}
COPIES: dict[str, Callable[[Arranged], Arranged]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "replace": replace,
    "to": lambda weight: weight.to("cpu"),
}


def made(name: str, shape: tuple[int, ...] | None = None) -> Arranged:
    return arrange(coded(name, shape or SHAPES[name]).weight)


def other_forms(value: Tensor) -> list[Tensor]:
    """The same values in other sizes and types, and with gaps in memory."""
    longer = torch.cat([value, value[:1]])
    apart = [value.repeat_interleave(2, -1)[..., ::2]] if value.numel() > 1 else []
    return [
        value[:-1],
        longer,
        value[..., :-1],
        value[None],
        value.to(torch.float16),
        value.to("meta"),
        *apart,
    ]


def called(x: Tensor, weight: Arranged) -> list[Tensor]:
    """What both kernels make of it."""
    if x.ndim == 2:
        return [lut_linear(x, weight), decode_linear(x, weight)]
    return [lut_conv2d(x, weight), decode_conv2d(x, weight)]


def fitting(weight: Arranged) -> Tensor:
    shape = (5, weight.shape[1]) if len(weight.shape) == 2 else (2, weight.shape[1], 5, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_of_other_sizes_and_kinds_are_named(name: str) -> None:
    weight = made(name)
    plan = plan_of(weight)
    native.LutWeight(weight, plan), native.DecodeWeight(weight)
    for field in ("codes", "scale", "tables", "offset"):
        value = getattr(weight, field)
        for wrong in () if value is None else other_forms(value):
            with pytest.raises(ValueError, match=f"{field} (is|needs)"):
                native.DecodeWeight(replace(weight, **{field: wrong}))
            if field in ("codes", "scale"):
                with pytest.raises(ValueError, match=f"{field} (is|needs)"):
                    native.LutWeight(replace(weight, **{field: wrong}), plan)
    for field, value in vars(plan).items():
        for wrong in other_forms(value) if isinstance(value, Tensor) else ():
            with pytest.raises((ValueError, IndexError), match=rf"{field} is torch|plan"):
                native.LutWeight(weight, replace(plan, **{field: wrong}))
    for field in ("codewords", "by_input", "aux_weights", "aux_scale"):
        with pytest.raises(ValueError, match="lacks"):
            native.LutWeight(weight, replace(plan, **{field: None}))


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_that_no_weight_has_are_refused(name: str) -> None:
    weight = made(name)
    plan, first = plan_of(weight), weight.segments[0]

    def refused(damaged: Arranged) -> None:
        for make in (native.DecodeWeight, lambda w: native.LutWeight(w, plan)):
            with pytest.raises(ValueError, match=r"cannot have|outside|dimensions|needed is"):
                make(damaged)

    for numbers in (
        {"bits": 9},
        {"bits": 0},
        {"codebooks": 0},
        {"codebooks": weight.codebooks + 1},
        {"group": 0},
        {"group": weight.group + 1},
        {"fused": 3},
        {"fused": 0},
        {"fused": 16},
        {"order": "inputs" if weight.order == "kernel" else "kernel", "group": 2},
        {"shape": (6,)},
        {"shape": (0, *weight.shape[1:])},
        {"shape": (7, *weight.shape[1:])},
        {"segments": ()},
        {"segments": (*weight.segments, first)},
    ):
        refused(replace(weight, **numbers))
    for changed in (
        {"tap": 1 << 20},
        {"tap": -1},
        {"start": weight.shape[1]},
        {"start": -1},
        {"inputs": 0},
        {"scales": -1},
    ):
        refused(replace(weight, segments=(first._replace(**changed), *weight.segments[1:])))
    if len(weight.segments) > 1:
        refused(replace(weight, segments=(first._replace(scales=2), *weight.segments[1:])))


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_beyond_the_weight_are_refused(name: str) -> None:
    weight = made(name)
    plan = plan_of(weight)

    def refused(field: str, column: int, value: int) -> None:
        wrong = getattr(plan, field).clone()
        wrong[-1, column] += value
        with pytest.raises(ValueError, match=r"block of the plan|more runs"):
            native.LutWeight(weight, replace(plan, **{field: wrong}))

    for column, value in (
        (0, 1 << 20),
        (0, -(1 << 20)),
        (1, 1 << 20),
        (1, -(1 << 20)),
        (2, 1),
        (2, -1),
        (3, 1),
    ):
        refused("blocks", column, value)
    refused("blocks", 3, -1)
    for column, value in (
        (0, 1 << 20),
        (0, -1 - int(plan.runs[-1, 0])),
        (1, 1 << 20),
        (1, -(1 << 20)),
        (2, 9),
    ):
        refused("runs", column, value)
    refused("runs", 1, 1)  # its last code is the first of the next row
    refused("runs", 2, -1 - int(plan.runs[-1, 2]))


def test_codes_beyond_a_codebook_are_refused_where_they_would_be_followed() -> None:
    weight = made("aq2x6g8")
    high = replace(weight, codes=torch.full_like(weight.codes, 64))
    with pytest.raises(ValueError, match="codes reach 64, but a lookup has 64 values"):
        native.LutWeight(high, plan_of(weight))
    native.LutWeight(replace(weight, codes=torch.full_like(weight.codes, 63)), plan_of(weight))
    assert decode_linear(fitting(high), high).isfinite().all()  # cut, not followed


def test_a_weight_without_codebooks_is_of_single_codes() -> None:
    with pytest.raises(ValueError, match="without codebooks"):
        native.DecodeWeight(replace(made("aq2x6g8"), tables=None))


def test_kernels_and_groups_that_the_table_kernel_has_no_room_for() -> None:
    plan: Plan = plan_of(made("vq5"))
    for weight in (made("vq3", (2, 3, 9, 8)), made("aq1x4g65", (6, 65))):
        with pytest.raises(ValueError, match="at most 64"):
            native.LutWeight(weight, plan)


def test_a_matrix_is_no_convolution() -> None:
    weight, image = made("vq5"), made("aq2x6k")
    values, sizes = torch.zeros(4096), [1, 8, 5, 5]
    address = values.data_ptr()
    with pytest.raises(ValueError, match="no matrix"):
        native.LutWeight(image, plan_of(image)).linear(address, address, 0, 1, False, 1, 0)
    with pytest.raises(ValueError, match="no matrix"):
        native.DecodeWeight(image).linear(address, address, 0, 1, 8, False, 1, 0)
    lut, decode = native.LutWeight(weight, plan_of(weight)), native.DecodeWeight(weight)
    for numbers in (Geometry().numbers, [0, 1, 0, 0, 1, 1, 1], [1, 1, -1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1]):
        with pytest.raises(ValueError, match="do not go together"):
            lut.conv2d(address, address, 0, sizes, numbers, False, 1, 0)
        with pytest.raises(ValueError, match="do not go together"):
            decode.conv2d(address, address, 0, sizes, numbers, 0, 8, 1, 0)
    own = native.DecodeWeight(image)
    for size, numbers, split in (
        ([1, 7, 5, 5], Geometry().numbers, 0),
        ([1, 8, 2, 5], Geometry().numbers, 0),
        ([1, 8, 5, 5], Geometry(groups=2).numbers, 0),
        ([1, 32, 5, 5], Geometry(groups=4).numbers, 0),
        (sizes, [0, 1, 0, 0, 1, 1, 1], 0),
        (sizes, Geometry().numbers, 8),
        (sizes, Geometry().numbers, -1),
    ):
        with pytest.raises(ValueError, match=r"do not go together|no channels"):
            own.conv2d(address, address, 0, size, numbers, split, 8, 1, 0)
    with pytest.raises(ValueError, match="beyond"):
        own.rows(0, 7, address, 1, 0)
    with pytest.raises(ValueError, match="not few"):
        decode.linear(address, address, 0, 9, 8, True, 1, 0)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_copy_is_a_weight_of_its_own(name: str, how: str) -> None:
    weight = made(name)
    x = fitting(weight)
    expected = called(x, weight)
    assert set(weight.derived) == {"lut", "decode"} and weight_at(weight.number) is weight
    other = COPIES[how](weight)
    assert other.number != weight.number and weight_at(other.number) is other and other.derived == {}
    assert all(torch.equal(a, b) for a, b in zip(called(x, other), expected, strict=True))
    assert all(other.derived[kernel] is not weight.derived[kernel] for kernel in ("lut", "decode"))
    assert weight_at(weight.number) is weight
    del weight
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(called(x, other), expected, strict=True))


def test_other_codes_are_another_weight() -> None:
    weight = made("aq2x6g8")
    x = fitting(weight)
    before = called(x, weight)
    turned = replace(weight, codes=weight.codes.flip(0), scale=weight.scale.flip(0))
    assert all(torch.equal(a.flip(1), b) for a, b in zip(before, called(x, turned), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_memory_that_moved_is_read_where_it_is(name: str) -> None:
    weight = made(name)
    x = fitting(weight)
    before, first = called(x, weight), dict(weight.derived)
    address = weight.codes.data_ptr()
    for tensor in (weight.codes, weight.tables, weight.scale, weight.offset):
        if tensor is not None:
            tensor.share_memory_()
    assert weight.codes.data_ptr() != address
    assert all(torch.equal(a, b) for a, b in zip(before, called(x, weight), strict=True))
    assert all(weight.derived[kernel] is not first[kernel] for kernel in first)


def watched(name: str) -> tuple[Arranged, list[weakref.ref[Any]]]:
    """A weight in memory whose end is seen: that of numpy's arrays."""
    weight = made(name)
    arrays = [t.numpy().copy() for t in (weight.codes, weight.scale)]
    codes, scale = (torch.from_numpy(a) for a in arrays)
    return replace(weight, codes=codes, scale=scale), [weakref.ref(a) for a in arrays]


def ended(memory: list[weakref.ref[Any]]) -> list[bool]:
    return [ref() is None for ref in memory]


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_outlives_its_weight(name: str) -> None:
    weight, memory = watched(name)
    x, number = fitting(weight), weight.number
    called(x, weight)
    assert not any(ended(memory))
    del weight
    gc.collect()
    assert all(ended(memory))
    with pytest.raises(AquabitError, match=f"number {number}: it was freed"):
        weight_at(number)
    with pytest.raises(AquabitError, match="freed"):
        torch.ops.aquabit.lut_linear(x, None, number, 6, False, 0)


def test_the_extension_keeps_what_it_reads() -> None:
    """Its memory lives as long as it does, whoever else lets go of it."""
    weight, memory = watched("aq2x6g8")
    x, y, z = fitting(weight), torch.empty(5, 6), torch.empty(5, 6)
    expected = called(x, weight)
    lut, decode = weight.derived["lut"].native, weight.derived["decode"].native
    del weight
    gc.collect()
    assert not any(ended(memory))
    lut.linear(x.data_ptr(), y.data_ptr(), 0, 5, False, 1, 0)
    decode.linear(x.data_ptr(), z.data_ptr(), 0, 5, 16, False, 1, 0)
    assert torch.equal(y, expected[0]) and torch.equal(z, expected[1])
    del lut
    gc.collect()
    assert not any(ended(memory))
    del decode
    gc.collect()
    assert all(ended(memory))

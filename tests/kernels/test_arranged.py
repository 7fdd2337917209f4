"""Weights laid out for the native kernels: nothing is lost, and every byte lies where the format says; and
the random weights that tests of kernels share, decoded to float64 by code that shares nothing with the
package."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquabit.kernels.arranged import arrange, arranges
from aquabit.kernels.codebook import CodebookWeight
from aquabit.scheme import AquabitError, Scheme
from tests.coded_weights import FORMATS, PER_CHANNEL, Coded, coded, group_of

SHAPES = st.one_of(
    st.tuples(st.integers(1, 7), st.integers(1, 200)),
    st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 4), st.integers(1, 4)),
)
ALL = st.sampled_from(FORMATS + PER_CHANNEL)


def bits_of(weight: CodebookWeight) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {k: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for k, t in weight.tensors().items()}


def fits(name: str, shape: tuple[int, ...]) -> bool:
    """Whether groups of inputs lie within a tap."""
    return shape[1] % group_of(name, shape[2:]) == 0


@settings(max_examples=150)
@given(ALL, SHAPES)
def test_what_does_not_fit_is_refused_and_nothing_else(name: str, shape: tuple[int, ...]) -> None:
    weight = coded(name, shape).weight
    assert (arranges(weight) is None) == fits(name, shape)
    if not fits(name, shape):
        with pytest.raises(AquabitError, match="groups of"):
            arrange(weight)


@settings(max_examples=200)
@given(ALL, SHAPES, st.integers(0, 1000))
def test_restoring_gives_the_stored_weight_back_to_the_bit(
    name: str, shape: tuple[int, ...], seed: int
) -> None:
    group = group_of(name, shape[2:])
    shape = (shape[0], ceil(shape[1] / group) * group, *shape[2:])
    weight = coded(name, shape, seed).weight
    restored = arrange(weight).restore()
    assert bits_of(restored) == bits_of(weight)
    assert (restored.shape, restored.bits, restored.order) == (weight.shape, weight.bits, weight.order)


@given(
    st.integers(1, 8),
    st.sampled_from([(3, 90), (2, 30, 3, 3), (2, 12, 2, 1)]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_restoring_any_number_of_groups_of_scales(
    bits: int, shape: tuple[int, ...], n: int, scaled: bool, offset: bool
) -> None:
    rng = np.random.default_rng(n)
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (prod(shape[1:]), 1, shape[0])))
    factors = [torch.from_numpy(rng.random((shape[0], n))) if there else None for there in (scaled, offset)]
    weight = CodebookWeight.from_codes(codes, None, *factors, shape, bits)
    assert bits_of(arrange(weight).restore()) == bits_of(weight)


class Slow(NamedTuple):
    """A row as the layout says, one code at a time."""

    segments: list[tuple[int, int, int, int]]
    rows: list[list[int]]


def laid(name: str, made: Coded, shape: tuple[int, ...]) -> Slow:
    """Segment after segment, each from a whole byte on; where a lookup has at most 4 bits, two share a
    byte."""
    scheme, out, cin, area = Scheme.parse(name), shape[0], shape[1], prod(shape[2:])
    kernel, group = scheme.group is None and scheme.kind == "aq" and area > 1, group_of(name, shape[2:])
    n = ceil(cin * area / scheme.group) if scheme.kind == "usq" and scheme.group else 1
    fused = {1: 8, 2: 4, 3: 2, 4: 2}.get(scheme.bits, 1) if scheme.kind != "aq" else 1
    inputs = (
        [(0, c, 0) for c in range(cin)]
        if kernel
        else [(i // cin, i % cin, i // ceil(cin * area / n)) for i in range(cin * area)]
    )
    if scheme.kind == "aq" and group == 1 and scheme.codebooks == 1 and not kernel:
        fused = {1: 8, 2: 4, 3: 2, 4: 2}.get(scheme.bits, 1)
    segments: list[list[tuple[int, int, int]]] = []
    for i in inputs:
        if not segments or (segments[-1][-1][0], segments[-1][-1][2]) != (i[0], i[2]):
            segments.append([])
        segments[-1].append(i)
    rows = []
    for o in range(out):
        row: list[int] = []
        for segment in segments:
            first = segment[0][0] * cin + segment[0][1]
            groups = range(first // group, (first + len(segment)) // group)
            lookups = [int(made.codes[j, m, o]) for j in groups for m in range(scheme.codebooks)]
            if fused > 1:
                chunks = [lookups[i : i + fused] for i in range(0, len(lookups), fused)]
                lookups = [sum(code << scheme.bits * i for i, code in enumerate(chunk)) for chunk in chunks]
            if scheme.bits * fused <= 4:
                lookups = [a + 16 * b for a, b in zip(lookups[::2], [*lookups[1::2], 0], strict=False)]
            row += lookups
        rows.append(row)
    return Slow([(s[0][0], s[0][1], len(s), s[0][2]) for s in segments], rows)


@settings(max_examples=150)
@given(ALL, SHAPES, st.integers(0, 1000))
def test_every_byte_lies_where_the_layout_says(name: str, shape: tuple[int, ...], seed: int) -> None:
    group = group_of(name, shape[2:])
    shape = (shape[0], ceil(shape[1] / group) * group, *shape[2:])
    made = coded(name, shape, seed)
    arranged, slow = arrange(made.weight), laid(name, made, shape)
    assert [tuple(s) for s in arranged.segments] == slow.segments
    assert arranged.codes.dtype == torch.uint8 and arranged.codes.is_contiguous()
    assert arranged.codes.tolist() == slow.rows
    assert sum(arranged.segment_bytes(s) for s in arranged.segments) == arranged.codes.shape[1]


@given(ALL, SHAPES)
def test_tables_and_scales_are_the_stored_ones_in_float32(name: str, shape: tuple[int, ...]) -> None:
    weight = coded(name, shape, scaled=False).weight
    if not fits(name, shape):
        return
    arranged, out = arrange(weight), shape[0]
    for mine, stored in (
        (arranged.tables, weight.codebooks),
        (arranged.offset, weight.offset),
        (arranged.scale, weight.scale),
    ):
        if stored is not None:
            assert mine is not None and mine.dtype == torch.float32 and mine.is_contiguous()
            assert torch.equal(mine, stored.double().reshape(mine.shape).float())
    assert (arranged.tables is None, arranged.offset is None) == (
        weight.codebooks is None,
        weight.offset is None,
    )
    assert weight.scale is not None or torch.equal(arranged.scale, torch.ones(out, 1))


def test_why_a_weight_cannot_be_arranged() -> None:
    wide = coded("aq1x10g4", (6, 24)).weight
    assert arranges(wide) == "codes of 10 bits do not fit a byte"
    with pytest.raises(
        AquabitError, match=r"a weight \[6, 24\] cannot be arranged for the native kernels: codes of 10 bits"
    ):
        arrange(wide)
    assert arranges(coded("aq1x8g4", (6, 24)).weight) is None
    for shape in ((6, 25), (6, 6, 2, 2)):
        assert (
            arranges(coded("aq2x6g4", shape).weight)
            == f"groups of 4 inputs do not fit into {shape[1]} channels or a group of scales"
        )
    assert arranges(coded("aq2x6k", (6, 5, 3, 3)).weight) is None
    codes = torch.zeros(6, 1, 4, dtype=torch.int64)
    cut = CodebookWeight.from_codes(
        codes, torch.zeros(1, 1, 16, 4), torch.ones(4, 4), None, (4, 24), 4
    )  # groups of 6 inputs
    assert arranges(cut) is not None


def test_scales_and_offsets_of_different_groups() -> None:
    codes = torch.zeros(24, 1, 4, dtype=torch.int64)
    one, three, four = torch.ones(4, 1), torch.ones(4, 3), torch.ones(4, 4)
    for scale, offset in ((one, three), (three, one), (None, three), (three, None)):
        arranged = arrange(CodebookWeight.from_codes(codes, None, scale, offset, (4, 24), 4))
        assert arranged.scale.shape == (4, 3) and (offset is None) == (arranged.offset is None)
        assert arranged.offset is None or arranged.offset.shape == (4, 3)
    assert "groups" in str(arranges(CodebookWeight.from_codes(codes, None, three, four, (4, 24), 4)))


class Holder(NamedTuple):
    held: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.held, self.held[1:]]


def test_resident_bytes_count_every_storage_once() -> None:
    plain = arrange(coded("usq4", (6, 20)).weight)
    assert plain.nbytes == 6 * 10 + 6 * (4 + 4) + 6 * (
        2 + 2
    )  # codes; scale and offset in float32, and as stored
    made = coded("aq2x6g4", (6, 20)).weight
    mine = arrange(made)
    table, codes, scale = 2 * 64 * 4, 6 * 10, 6
    assert mine.nbytes == codes + 4 * (table + scale) + 2 * (table + scale)
    assert made.codebooks is not None and made.scale is not None
    other = replace(mine, codes=mine.codes.clone())  # a layer that shares codebooks and scales
    assert sum((mine.held() | other.held()).values()) == mine.nbytes + codes
    both = torch.cat([made.codebooks.reshape(-1), made.scale])
    shared = CodebookWeight(
        made.packed, both[:table].reshape(made.codebooks.shape), both[table:], None, made.shape, made.bits
    )
    assert arrange(shared).nbytes == mine.nbytes  # two views of one storage
    mine.derived["test"] = Holder(torch.zeros(100))
    assert mine.nbytes == codes + 6 * (table + scale) + 400


@pytest.mark.parametrize("name", ["usq3g64", "vq3", "aq2x4g4"])
def test_moving_takes_everything_but_what_backends_derived(name: str) -> None:
    arranged = arrange(coded(name, (6, 80), scaled=False).weight)
    arranged.derived["test"] = Holder(torch.zeros(3))
    moved = arranged.to("meta")
    held = [moved.codes, moved.tables, moved.scale, moved.offset, *moved.stored.tensors().values()]
    assert {t.device.type for t in held if t is not None} == {"meta"} and moved.derived == {}
    assert [t is None for t in held] == [
        t is None
        for t in (
            *(arranged.codes, arranged.tables, arranged.scale, arranged.offset),
            *arranged.stored.tensors().values(),
        )
    ]
    assert (moved.shape, moved.segments, moved.fused) == (arranged.shape, arranged.segments, arranged.fused)
    same = arranged.to("cpu")
    assert bits_of(same.restore()) == bits_of(arranged.restore()) and list(arranged.derived) == ["test"]

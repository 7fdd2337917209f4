"""The tile-decode backend against decoded weights multiplied in float64: every format, way and instruction
set, on odd shapes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from aquabit.kernels.arranged import Arranged, arrange
from aquabit.kernels.backends.decode import (
    _prepared,
    decode_conv2d,
    decode_levels,
    decode_linear,
    decode_refuses,
)
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.kernels.geometry import Geometry, padded, pair
from aquabit.scheme import AquabitError, Rounding

LEVELS = decode_levels()
pytestmark = pytest.mark.skipif(not LEVELS, reason="the C++ extension was not built")
levels = pytest.mark.parametrize("level", LEVELS)
EXACT, FAST = 1e-6, 1e-3


class Format(NamedTuple):
    """A kind of weight: M codebooks of 2^bits codewords of g weights, or none (uniform codes); scales for
    each ``scales`` inputs."""

    bits: int
    books: int = 0
    group: int = 1
    own: bool = False  # tables per output channel
    scales: int = 0
    order: str = "inputs"

    @property
    def text(self) -> str:
        marks = "c" * self.own + "s" * (self.scales > 0) + self.order[0]
        return f"{self.books or 'usq'}x{self.bits}g{self.group}{marks}"


USQ = [Format(bits) for bits in range(1, 9)]
OTHER = [
    Format(3, 1),
    Format(5, 1),
    Format(6, 1),
    Format(8, 1),
    Format(2, 1, own=True),
    Format(8, 1, 8),
    Format(6, 2, 8),
    Format(8, 2, 8),
    Format(4, 4, 8),
    Format(4, 3, 4),
    Format(3, 5, 16),
    Format(4, 1, 3),
    Format(8, 2, 8, scales=16),
    Format(3, 1, scales=8),
    Format(8, 2, 8, scales=128),
]
GROUPED = [Format(2, scales=6), Format(3, scales=7), Format(4, scales=64), Format(8, scales=5)]
SLICES = [Format(8, 1, order="kernel"), Format(4, 3, order="kernel"), Format(6, 2, order="kernel")]
UNARRANGED = [Format(12, 1, 8), Format(9), Format(8, 2, 8, scales=12)]


def make(shape: tuple[int, ...], form: Format, seed: int = 0) -> CodebookWeight:
    random = torch.Generator().manual_seed(seed)
    out, row = shape[0], prod(shape[1:])
    group = prod(shape[2:]) if form.order == "kernel" else form.group
    groups = shape[1] if form.order == "kernel" else -(-row // group)
    codes = torch.randint(1 << form.bits, (groups, max(form.books, 1), out), generator=random)
    tables = (
        torch.randn(out if form.own else 1, form.books, 1 << form.bits, group, generator=random)
        if form.books
        else None
    )
    count = -(-row // form.scales) if form.scales else 1
    scale = (torch.rand(out, count, generator=random) + 0.5) / (1 if form.books else 1 << form.bits)
    offset = None
    if form.order == "inputs" and form.group == 1:
        middle = 0 if form.books else ((1 << form.bits) - 1) / 2
        offset = scale * (torch.randn(out, count, generator=random) * 0.1 - middle)
    flat = (lambda t: t[:, 0]) if count == 1 else (lambda t: t)
    kind: Any = form.order
    return CodebookWeight.from_codes(
        codes, tables, flat(scale), None if offset is None else flat(offset), shape, form.bits, kind
    )


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def linear64(x: Tensor, weight: CodebookWeight, bias: Tensor | None, act: Rounding) -> Tensor:
    return functional.linear(
        fake_quantize(x, act).double(), weight.dequantize().double(), None if bias is None else bias.double()
    )


def convolved(x: Tensor, weight: CodebookWeight | Arranged, bias: Tensor | None = None, **how: Any) -> Tensor:
    """``decode_conv2d`` with the arguments of torch's."""
    stride, dilation, groups = pair(how.pop("stride", 1)), pair(how.pop("dilation", 1)), how.pop("groups", 1)
    x, edges = padded(x, how.pop("padding", 0), stride, dilation, weight.shape[2:])
    return decode_conv2d(x, weight, bias, Geometry(stride, edges, dilation, groups), **how)


def conv64(
    x: Tensor, weight: CodebookWeight, bias: Tensor | None, act: Rounding, split: int | None, **how: Any
) -> Tensor:
    quantized = fake_quantize(x, act, "sample", split).double()
    return functional.conv2d(
        quantized, weight.dequantize().double(), None if bias is None else bias.double(), **how
    )


@levels
@pytest.mark.parametrize("form", [*USQ, *GROUPED], ids=lambda f: f.text)
def test_integers_are_exact(form: Format, level: str) -> None:
    for out, width in ((1, 1), (53, 101), (13, 130)):
        weight = make((out, width), form)
        arranged, bias = arrange(weight), inputs(out)
        for tokens, act in ((1, 8), (3, 6), (5, 8), (70, 8), (67, 2), (2, "i8"), (37, "i8")):
            x = inputs(tokens, width, seed=tokens)
            for accuracy in ("fast", "exact"):
                y = decode_linear(x, arranged, bias, act, accuracy, level=level)  # type: ignore[arg-type]
                assert error(y, linear64(x, weight, bias, act)) <= EXACT


@levels
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_the_largest_products_fit(bits: int, signed: bool, level: str) -> None:
    """All codes at an end of their range, all activations but one at 255: AVX2 adds products of as many steps
    as fit in 16 bits."""
    most, x = (1 << bits) - 1, torch.ones(19, 280)
    x[:, 7] = 0
    picture, scale = x.T.reshape(1, 280, 19, 1).contiguous(), torch.full((9,), 0.25)
    for code in (0, most):
        codes, offset = torch.full((280, 1, 9), code), -scale * (1 << bits - 1 if signed else most / 2)
        for shape in ((9, 280), (9, 280, 1, 1)):
            weight = CodebookWeight.from_codes(codes, None, scale, offset, shape, bits, "inputs")
            if len(shape) == 2:
                y, expected = (
                    decode_linear(x, arrange(weight), None, 8, level=level),
                    linear64(x, weight, None, 8),
                )
            else:
                y = convolved(picture, arrange(weight), None, act=8, level=level)
                expected = conv64(picture, weight, None, 8, None)
            assert error(y, expected) <= EXACT


@levels
@pytest.mark.parametrize("form", [*OTHER, *USQ[1:5:2], GROUPED[1]], ids=lambda f: f.text)
def test_linear(form: Format, level: str) -> None:
    weight = make((29, 48 * form.group if form.group < 8 else 144), form)
    arranged = arrange(weight)
    for tokens, act in (
        (1, 16),
        (4, 8),
        (5, 16),
        (70, 16),
        (17, 8),
        (33, 12),
        (3, "f8"),
        (19, "f8"),
        (9, "i8"),
    ):
        x = inputs(tokens, weight.shape[1], seed=tokens)
        expected = linear64(x, weight, None, act)
        assert error(decode_linear(x, arranged, None, act, "exact", level=level), expected) <= EXACT
        assert error(decode_linear(x, arranged, None, act, level=level), expected) <= FAST


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 7, 9, 11), (5, 7, 3, 3), {"padding": 1}),
    ((1, 8, 16, 16), (13, 8, 3, 3), {"padding": 1, "stride": 2}),
    ((3, 6, 5, 7), (8, 3, 3, 3), {"padding": (2, 1), "groups": 2, "dilation": 2}),
    ((1, 5, 8, 8), (6, 5, 1, 1), {"stride": 2}),
    ((2, 1, 6, 6), (1, 1, 5, 5), {"padding": "same"}),
    ((1, 4, 17, 3), (3, 4, 2, 3), {"padding": "same"}),
    ((1, 4, 17, 7), (4, 2, 3, 2), {"stride": (3, 1), "dilation": (1, 2), "groups": 2, "padding": (1, 4)}),
    ((1, 6, 4, 37), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
    ((1, 3, 1, 1), (2, 3, 1, 1), {}),
]


# By how activations are laid out: columns apart, blocks together (whole, with a rest), parts for a cache.
LAID_OUT: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3, 5, 8, 8), (7, 5, 3, 3), {"padding": 1}),
    ((2, 6, 16, 16), (8, 3, 3, 3), {"padding": 1, "stride": 2, "groups": 2}),
    ((1, 4, 12, 12), (5, 4, 3, 5), {"padding": (1, 2), "dilation": (1, 1)}),
    ((2, 4, 23, 12), (5, 4, 3, 4), {"padding": (1, 3), "stride": (1, 3), "dilation": (2, 3)}),
    ((2, 9, 13, 11), (7, 9, 1, 1), {}),
    ((3, 6, 8, 16), (8, 3, 1, 1), {"groups": 2}),
    ((1, 1000, 33, 33), (13, 1000, 1, 1), {}),
]


@levels
@pytest.mark.parametrize("case", [*CONVOLUTIONS, *LAID_OUT], ids=lambda c: f"{c[0]} {c[1]}")
def test_convolution_of_uniform_codes(case: Any, level: str) -> None:
    shape, size, how = case
    for form in (Format(2), Format(3), Format(8), Format(4, scales=10)):
        weight, bias, x = make(size, form), inputs(size[0]), inputs(*shape)
        for act, split in ((8, None), (6, shape[1] // 2 or None), ("i8", shape[1] // 2 or None)):
            split = split if split and split < shape[1] else None
            y = convolved(x, arrange(weight), bias, act=act, split=split, level=level, **how)
            assert error(y, conv64(x, weight, bias, act, split, **how)) <= EXACT


@levels
@pytest.mark.parametrize("case", [*CONVOLUTIONS, *LAID_OUT], ids=lambda c: f"{c[0]} {c[1]}")
def test_convolution_in_bfloat16(case: Any, level: str) -> None:
    """Results are those of float32 values, rounded once: within half a step of bfloat16."""
    shape, size, how = case
    bias, x = inputs(size[0]).bfloat16(), inputs(*shape).bfloat16()
    for form, act in ((Format(2), 8), (Format(4, scales=10), "i8"), (Format(3), 16), (SLICES[1], 8)):
        weight, split = make(size, form), shape[1] // 2 or None
        y = convolved(x, arrange(weight), bias, act=act, split=split, level=level, **how)
        expected = conv64(x.float(), weight, bias, act, split, **how)
        gap, exact = (y.double() - expected).abs(), act != 16 and not form.books
        bound = (EXACT if exact else FAST) * expected.abs().max()
        assert y.dtype == torch.bfloat16 and (gap <= expected.abs() * (2**-8 + EXACT) + bound).all()


@levels
def test_convolution_in_bfloat16_of_what_is_not_finite(level: str) -> None:
    weight, x = arrange(make((5, 4, 3, 3), Format(4))), inputs(2, 4, 9, 9).bfloat16()
    x[1, 2, 3, 4] = float("inf")
    y = convolved(x, weight, None, act=8, padding=1, level=level)
    alone = convolved(x[:1], weight, None, act=8, padding=1, level=level)
    assert y[1].isnan().all() and torch.equal(y[:1], alone)


@levels
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: str(c[1]))
def test_convolution_of_other_formats(case: Any, level: str) -> None:
    shape, size, how = case
    forms = [*SLICES, Format(3), Format(5, 1, own=True), Format(4, 2, 1)]
    forms += [Format(8, 2, 2)] if size[1] % 2 == 0 else []
    for form in forms:
        weight, bias, x = make(size, form), inputs(size[0]), inputs(*shape)
        for act, split in ((16, None), (8, shape[1] // 2 or None), (10, None), ("i8", None), ("f8", None)):
            split = split if split and split < shape[1] else None
            expected = conv64(x, weight, bias, act, split, **how)
            for accuracy, bound in (("fast", FAST), ("exact", EXACT)):
                y = convolved(
                    x, arrange(weight), bias, act=act, split=split, accuracy=accuracy, level=level, **how
                )  # type: ignore[arg-type]
                assert error(y, expected) <= bound


@pytest.mark.parametrize("form", UNARRANGED, ids=lambda f: f.text)
def test_weights_that_cannot_be_arranged(form: Format) -> None:
    weight, x = make((37, 48), form), inputs(2, 9, 48)
    assert error(decode_linear(x, weight, None, 8), linear64(x, weight, None, 8)) <= EXACT
    weight, x = make((6, 5, 3, 3), form._replace(scales=0)), inputs(2, 10, 6, 6)
    for how in ({"groups": 2, "padding": 1}, {"groups": 2, "padding": "same", "dilation": 2}):
        assert error(convolved(x, weight, None, **how), conv64(x, weight, None, 16, None, **how)) <= EXACT  # type: ignore[arg-type]


def test_a_stored_weight_is_arranged() -> None:
    weight, x = make((9, 20), USQ[3]), inputs(6, 20)
    assert torch.equal(decode_linear(x, weight, act=8), decode_linear(x, arrange(weight), act=8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 90),
    st.sampled_from([*USQ, *GROUPED]),
    st.integers(2, 8),
    st.sampled_from(LEVELS or [""]),
)
def test_any_linear_shape(out: int, width: int, tokens: int, form: Format, act: int, level: str) -> None:
    weight, x = make((out, width), form), inputs(tokens, width)
    assert (
        error(decode_linear(x, arrange(weight), None, act, level=level), linear64(x, weight, None, act))
        <= 2 * EXACT
    )


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 3),
    st.integers(1, 2),
    st.sampled_from([*USQ, *GROUPED, *SLICES]),
    st.sampled_from(LEVELS or [""]),
)
def test_any_convolution(
    counts: tuple[int, ...],
    area: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: int,
    dilation: int,
    form: Format,
    level: str,
) -> None:
    samples, groups, each, channels = counts
    if any(area[i] + 2 * padding < dilation * (kernel[i] - 1) + 1 for i in range(2)):
        return
    padding = min(padding, *(dilation * (k - 1) for k in kernel))
    if any(area[i] + 2 * padding < dilation * (kernel[i] - 1) + 1 for i in range(2)):
        return
    weight, x = make((groups * each, channels, *kernel), form), inputs(samples, groups * channels, *area)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = convolved(x, arrange(weight), None, act=8, level=level, **how)  # type: ignore[arg-type]
    bound = 2 * EXACT if form.books == 0 else FAST
    expected, absolute = conv64(x, weight, None, 8, None, **how), fake_quantize(x, 8, "sample").double().abs()
    # the only output may be a sum that cancels: its terms say what rounding may do to it
    terms = functional.conv2d(absolute, weight.dequantize().double().abs(), **how).max()  # type: ignore[arg-type]
    scale = max(expected.abs().max().item(), terms.item() / 16, 1e-300)
    assert (y.double() - expected).abs().max().item() <= bound * scale


def test_threads_change_nothing() -> None:
    weight, bias = make((77, 96), USQ[3]), inputs(77)
    convolution = make((10, 8, 3, 3), SLICES[2])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(
                [
                    *(
                        decode_linear(inputs(t, 96), arrange(weight), bias, act)
                        for t in (2, 100)
                        for act in (8, 16)
                    ),
                    decode_linear(inputs(65, 96), arrange(make((3, 96), USQ[3])), None, 8),
                    convolved(inputs(2, 8, 20, 20), arrange(convolution), None, padding=1),
                    convolved(inputs(1, 1000, 33, 33), arrange(make((70, 1000, 1, 1), USQ[3])), None, act=8),
                    convolved(
                        inputs(3, 6, 8, 8),
                        arrange(make((50, 3, 3, 3), USQ[1])),
                        None,
                        groups=2,
                        padding=1,
                        act=8,
                    ),
                ]
            )
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("act", [8, 16])
@pytest.mark.parametrize("form", [USQ[3], OTHER[6]], ids=lambda f: f.text)
def test_layouts(form: Format, act: int) -> None:
    weight = make((24, 32), form)
    whole = inputs(32, 3, 7).permute(2, 1, 0)
    y = decode_linear(whole, arrange(weight), None, act)
    assert y.shape == (7, 3, 24) and torch.equal(
        y, decode_linear(whole.contiguous(), arrange(weight), None, act)
    )
    image = make(
        (6, 8, 3, 3), form._replace(order="kernel", books=form.books or 1, group=1) if form.books else form
    )
    x = inputs(2, 8, 9, 10)
    plain = convolved(x, arrange(image), None, padding=1, act=act)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.repeat(1, 2, 1, 1)[:, :8],
    ):
        assert torch.equal(convolved(other, arrange(image), None, padding=1, act=act), plain)
    last = convolved(
        x.contiguous(memory_format=torch.channels_last), arrange(image), None, padding=1, act=act
    )
    assert last.is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()


@pytest.mark.parametrize("act", [8, 16])
@pytest.mark.parametrize("form", [USQ[1], OTHER[7]], ids=lambda f: f.text)
def test_bfloat16(form: Format, act: int) -> None:
    weight = make((24, 32), form)
    for tokens in (1, 40):
        x = inputs(tokens, 32).bfloat16()
        for accuracy in ("fast", "exact"):
            y = decode_linear(x, arrange(weight), None, act, accuracy)  # type: ignore[arg-type]
            assert y.dtype == torch.bfloat16 and error(y, linear64(x, weight, None, act)) <= 2e-2
    image, x = make((6, 8, 3, 3), Format(form.bits)), inputs(2, 8, 5, 5).bfloat16()
    y = convolved(x, arrange(image), None, padding=1, act=act)
    assert y.dtype == torch.bfloat16 and error(y, conv64(x, image, None, act, None, padding=1)) <= 2e-2


@levels
@pytest.mark.parametrize("form", [USQ[3], OTHER[7]], ids=lambda f: f.text)
@pytest.mark.parametrize("tokens", [2, 9])
def test_rows_without_a_grid(form: Format, tokens: int, level: str) -> None:
    weight = make((7, 64), form)
    arranged = arrange(weight)
    x = inputs(tokens, 64)
    x[0], x[1] = 0, 5.5
    for act in (8, "i8", 16):
        y, expected = decode_linear(x, arranged, None, act, level=level), linear64(x, weight, None, act)
        assert (y[0] == 0).all() and error(y[1], expected[1]) <= FAST
        bound = EXACT if act != 16 and not form.books else FAST
        assert error(y, expected) <= bound
    x[0] = inputs(64) * 1e-37 / 100  # steps below a normal number: left as it is
    y, expected = decode_linear(x, arranged, None, 8, level=level), linear64(x, weight, None, 8)
    assert error(y[0], expected[0]) <= 1e-4 and error(y, expected) <= FAST
    for value in (float("nan"), float("inf")):
        x[0, 3] = value
        for act in (8, "i8", "f8"):
            y = decode_linear(x, arranged, None, act, level=level)
            assert y[0].isnan().all() and y[1:].isfinite().all(), act
        assert y[0].isnan().all() and y[1:].isfinite().all()
        assert not decode_linear(x, arranged, None, 16, level=level)[0].isfinite().any()


@levels
def test_samples_without_a_grid(level: str) -> None:
    weight, x = make((7, 4, 3, 3), USQ[3]), inputs(4, 4, 5, 5)
    x[0], x[1], x[3, 2, 1, 1] = 0, 5.5, float("nan")
    for split, act in product((None, 3), (8, "i8")):
        y = convolved(x, arrange(weight), None, padding=1, act=act, split=split, level=level)
        assert (y[0] == 0).all() and y[3].isnan().all()
        assert error(y[:3], conv64(x[:3], weight, None, act, split, padding=1)) <= EXACT


@levels
def test_extreme_scales(level: str) -> None:
    weight = make((9, 64), USQ[3])
    for factor in (2.0**-10, 2.0**10):
        assert weight.scale is not None and weight.offset is not None
        scaled = replace(weight, scale=weight.scale * factor, offset=weight.offset * factor)
        for size in (1e-20, 1e20):
            for act in (8, 16):
                x = inputs(10, 64) * size
                bound = EXACT if act == 8 else FAST
                assert (
                    error(
                        decode_linear(x, arrange(scaled), None, act, level=level),
                        linear64(x, scaled, None, act),
                    )
                    <= bound
                )
    x = inputs(10, 64) + torch.logspace(0, 7, 10)[:, None]  # ranges far from zero
    assert (
        error(decode_linear(x, arrange(weight), None, 8, level=level), linear64(x, weight, None, 8)) <= EXACT
    )


@levels
def test_outliers_are_served_exactly(level: str) -> None:
    """One input a thousand times the others leaves them no bits: the call falls back to float32."""
    weight, x = make((9, 640), OTHER[7]), inputs(10, 640)
    x[:, 0], x[0, 1:] = 1e6, 1e-3
    weights = weight.dequantize().double()
    y = decode_linear(x, arrange(weight), None, 16, level=level)
    assert error(y, x.double() @ weights.t()) <= FAST
    wild = arrange(make((9, 640), OTHER[-1]))
    wild.scale[:, 0] *= 1e5  # groups of scales far apart: each run of inputs has a scale of its own
    direct = torch.cat(
        [decode_linear(torch.eye(640)[i : i + 4], wild, None, 16) for i in range(0, 640, 4)]
    )  # decoded row by row
    x = inputs(10, 640)
    for first in (0, 128):
        x[:, :first] = 0
        for act in (8, 16):
            y, expected = (
                decode_linear(x, wild, None, act, level=level),
                fake_quantize(x, act).double() @ direct.double(),
            )
            assert error(y, expected) <= FAST


@levels
@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_is_a_sixteenth(threads: int, level: str) -> None:
    """Of all threads together, or 16 KiB each, by what the extension says it took."""
    torch.set_num_threads(threads)
    try:
        for form, act, tokens in (
            (USQ[3], 8, 64),
            (USQ[3], 16, 64),
            (USQ[3], 8, 1),
            (OTHER[7], 16, 64),
            (OTHER[7], 16, 1),
        ):
            arranged, x, y = arrange(make((640, 256), form)), inputs(tokens, 256), torch.empty(tokens, 640)
            done, _, _, scratch_bytes = _prepared(arranged).native.linear(
                x.data_ptr(), y.data_ptr(), 0, tokens, act, tokens == 1, threads, LEVELS.index(level)
            )
            assert done and scratch_bytes <= max(640 * 256 * 2 // 16, 16384 * threads)
            assert scratch_bytes > 0 or (form, tokens) == (USQ[3], 1), "few meet codes as they lie"
    finally:
        torch.set_num_threads(1)


@levels
@pytest.mark.parametrize("tokens", [3, 20])
def test_zero_points_cancel(tokens: int, level: str) -> None:
    """Weights that are not about zero, activations that mostly are: what the zero point adds is a thousand
    times the result."""
    x = inputs(tokens, 512) * 0.01
    x[:, 3], x[:, 4] = 1, -1
    for form in (USQ[0], USQ[3], USQ[7]):
        weight = make((20, 512), form)
        assert weight.scale is not None
        shifted = replace(weight, offset=weight.scale * 0.5)
        x[:, 5:] -= x[:, 5:].mean(1, keepdim=True)
        assert (
            error(decode_linear(x, arrange(shifted), None, 8, level=level), linear64(x, shifted, None, 8))
            <= EXACT
        )


def test_empty_batches() -> None:
    weight = make((5, 16), USQ[3])
    assert decode_linear(torch.empty(0, 16), arrange(weight), None, 8).shape == (0, 5)
    image = make((5, 4, 3, 3), USQ[3])
    assert convolved(torch.empty(0, 4, 8, 8), arrange(image), None, act=8).shape == (0, 5, 6, 6)


def test_compiles_and_has_meta() -> None:
    weight, image = arrange(make((5, 16), USQ[3])), arrange(make((5, 4, 3, 3), USQ[3]))
    x, picture = inputs(3, 16), inputs(2, 4, 8, 9)
    linear = torch.compile(
        lambda t: decode_linear(t, weight, None, 8) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(linear(x), decode_linear(x, weight, None, 8) + 1)
    conv = torch.compile(
        lambda t: convolved(t, image, None, stride=2, padding=1, act=8, split=1),
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(conv(picture), convolved(picture, image, None, stride=2, padding=1, act=8, split=1))
    assert decode_linear(x.to("meta"), weight.to("meta"), None, 8).shape == (3, 5)
    assert convolved(picture.to("meta"), image.to("meta"), None, stride=2, padding=1, act=8).shape == (
        2,
        5,
        4,
        5,
    )


def test_bad_arguments_raise() -> None:
    weight, image, x = arrange(make((5, 16), USQ[3])), arrange(make((6, 4, 3, 3), USQ[3])), inputs(3, 16)
    picture = inputs(1, 4, 8, 8)
    with pytest.raises(AquabitError, match="takes 16 inputs"):
        decode_linear(inputs(3, 15), weight)
    with pytest.raises(AquabitError, match="float64"):
        decode_linear(x.double(), weight)
    with pytest.raises(AquabitError, match=r"bias is \[4\]"):
        decode_linear(x, weight, torch.zeros(4))
    with pytest.raises(AquabitError, match="accuracy 'best'"):
        decode_linear(x, weight, accuracy="best")  # type: ignore[arg-type]
    with pytest.raises(AquabitError, match="act=1"):
        decode_linear(x, weight, act=1)
    with pytest.raises(AquabitError, match="level 'neon64'"):
        decode_linear(x, weight, level="neon64")
    with pytest.raises(AquabitError, match="meta"):
        decode_linear(x.to("meta"), weight)
    with pytest.raises(AquabitError, match="4 dimensions"):
        convolved(picture, weight)
    for how, message in (
        ({"groups": 3}, "3 groups"),
        ({"split": 4}, "split=4"),
        ({"stride": 0}, r"stride=\(0, 0\)"),
        ({"padding": -1}, r"padding=\(-1, -1\)"),
        ({"dilation": (1, 0)}, r"dilation=\(1, 0\)"),
        ({"dilation": 5}, "smaller than the kernel"),
    ):
        with pytest.raises(AquabitError, match=message):
            convolved(picture, image, **how)  # type: ignore[arg-type]
    assert (
        decode_refuses(weight, "cuda")
        and decode_refuses(weight, dtype=torch.float16)
        and not decode_refuses(weight)
    )


def test_damaged_weights_raise() -> None:
    good, x = arrange(make((5, 16), Format(6, 1, 2))), inputs(8, 16)

    def refused(damaged: Arranged, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            decode_linear(x, damaged)

    refused(replace(good, codes=good.codes[:, :-1].contiguous()), "codes is")
    refused(replace(good, codes=good.codes.int()), "codes is torch.int32")
    refused(replace(good, codes=good.codes[:4]), "codes is")
    refused(replace(good, segments=(good.segments[0]._replace(inputs=18),)), "outside")
    refused(replace(good, segments=(good.segments[0]._replace(start=2),)), "outside")
    refused(replace(good, tables=good.tables[:, :, :32].contiguous()), "tables is")  # type: ignore[index]
    refused(replace(good, scale=good.scale[:3]), "scale is")
    high = replace(
        good, codes=torch.full_like(good.codes, 255)
    )  # codes beyond the table are cut, not followed
    assert decode_linear(x, high).isfinite().all()


@levels
@pytest.mark.parametrize("size", [(7, 7), (2, 15), (3, 31), (5, 15), (1, 33), (9, 47)], ids=str)
def test_one_tap_at_any_size(size: tuple[int, int], level: str) -> None:
    """Positions of one tap lie in blocks: a vector that began at each line would cross from one into the
    next."""
    weight, x = make((9, 12, 1, 1), USQ[1]), inputs(2, 12, *size)
    for act in (8, 16):
        y = convolved(x, arrange(weight), None, act=act, level=level)
        assert error(y, conv64(x, weight, None, act, None)) <= (EXACT if act == 8 else FAST)

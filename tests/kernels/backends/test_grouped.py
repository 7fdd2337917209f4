"""Formats with a scale for each 16, 32 or 64 weights of a row, and those of other programs, by the
tile-decode backend: against their stored weights, decoded by torch, multiplied in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import aquabit
from aquabit.activation_bits import Rounding
from aquabit.kernels.arranged import arrange
from aquabit.kernels.backends.decode import _prepared, decode_conv2d, decode_levels, decode_linear
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.kernels.geometry import Geometry
from tests.kernels.thread_count import threads

LEVELS = decode_levels()
pytestmark = pytest.mark.skipif(not LEVELS, reason="the C++ extension was not built")
levels = pytest.mark.parametrize("level", LEVELS)
EXACT, FAST = 1e-6, 1e-3  # of the largest result
SIGNED = ("int4g32", "int4g64", "int8", "q4_0", "q5_0", "q8_0", "q3_K", "q6_K")  # whole numbers, a scale
SHIFTED = ("usq4g32", "usq3g16", "usq7g32", "q4_1", "q5_1", "q2_K", "q4_K", "q5_K")  # and a minimum
TABLES = ("mxfp4", "nvfp4", "iq4_nl")  # levels that are whole numbers of 8 bits, times a power of two
FLOATS = ("nf4g64", "nf4g64d", "mxfp8", "fp8", "fp8c")  # levels that are not
INTEGERS = (*SIGNED, *SHIFTED, *TABLES)


def fitted(text: str, out: int, *rest: int) -> CodebookWeight:
    weight = torch.randn(out, *rest, generator=torch.Generator().manual_seed(len(text)))
    return aquabit.quantize_weight(weight, text)


def width(text: str) -> int:
    """Of a row that the format divides into groups, and no vector into whole ones."""
    return 768 if text.endswith("_K") else 320


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def linear64(x: Tensor, weight: CodebookWeight, bias: Tensor | None, act: Rounding) -> Tensor:
    return functional.linear(
        fake_quantize(x, act).double(), weight.dequantize().double(), None if bias is None else bias.double()
    )


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).abs().max() / expected.abs().max())


@levels
@pytest.mark.parametrize("text", [*INTEGERS, *FLOATS])
def test_tokens(text: str, level: str) -> None:
    weight, bias = fitted(text, 53, width(text)), noise(53, seed=3)
    arranged = arrange(weight)
    assert _prepared(arranged).integers == (text in INTEGERS)
    for tokens in (1, 3, 7, 12, 37, 70):
        x = noise(tokens, width(text), seed=tokens)
        for act in (8, 6, "i8", 16):
            expected = linear64(x, weight, bias, act)
            for accuracy in ("fast", "exact"):
                y = decode_linear(x, arranged, bias, act, accuracy, level=level)
                integers = act != 16 and text in INTEGERS
                assert error(y, expected) <= (EXACT if integers or accuracy == "exact" else FAST), (
                    tokens,
                    act,
                )


@levels
@pytest.mark.parametrize("text", ["mxfp8", "fp8", "fp8c"])
def test_each_code_of_float8_is_what_torch_says(text: str, level: str) -> None:
    """By its bits, in rows that are no multiple of a vector where the format lets them be."""
    count = 256 if text == "mxfp8" else 254
    weight = fitted(text, 3, count)
    codes = torch.arange(count)[:, None, None].repeat(1, 1, 3)
    codes[codes & 127 == 127] = 0  # no numbers
    every = CodebookWeight.from_codes(
        codes, None, weight.scale, weight.offset, (3, count), weight.bits, weight.order, weight.levels
    )
    rows = _prepared(arrange(every)).rows(decode_levels().index(level))(0, 3)
    assert torch.equal(rows, every.dequantize()) and len(rows.unique()) > 250


@pytest.mark.parametrize("text", ["int4g32", "q4_1", "mxfp4", "q6_K", "nf4g64"])
def test_threads_change_nothing(text: str) -> None:
    weight = arrange(fitted(text, 85, width(text)))
    for tokens, act in ((1, 8), (5, "i8"), (40, 8), (90, 6), (90, 16)):
        x, results = noise(tokens, width(text)), []
        for count in (1, 2):
            with threads(count):
                results.append(decode_linear(x, weight, None, act))
        assert torch.equal(*results)


@levels
@pytest.mark.parametrize("text", [*INTEGERS, "nf4g64"])
def test_images(text: str, level: str) -> None:
    """Of GGUF's formats a group runs over the taps, of the others over the channels at one."""
    channels = 256 if text.endswith("_K") else 64
    weight, x = fitted(text, 9, channels, 2, 3), noise(2, channels, 5, 7)
    geometry = Geometry(stride=(1, 2), padding=(1, 1))
    for act, split in ((8, None), (8, 24), ("i8", None), (6, None)):
        y = decode_conv2d(x, arrange(weight), None, geometry, act, split, level=level)
        quantized = fake_quantize(x, act, "sample", split).double()
        expected = functional.conv2d(quantized, weight.dequantize().double(), None, (1, 2), (1, 1))
        # GGUF's groups are cut into 2 or 3 channels a tap: float32 adds up a thousand sums
        assert error(y, expected) <= (2 * EXACT if text in INTEGERS else FAST), (act, split)


@levels
@pytest.mark.parametrize("text", ["int4g32", "usq4g32", "iq4_nl"])
@pytest.mark.parametrize("lifts", [(0.3, 0.3), (0.0, 3.0), (-4.0, 4.0), (9.0, -9.0)])
def test_zero_points(text: str, lifts: tuple[float, float], level: str) -> None:
    """Zero points near each other are taken off by their middle in integers, those apart one by one; ranges
    beyond zero have none. The last column is an outlier: results are small beside what is taken off."""
    weight = fitted(text, 31, 320)
    for tokens in (4, 9, 64):
        x = noise(tokens, 320, seed=tokens) * 0.1
        x[:, -1] = 1
        x[::2] += lifts[0]
        x[1::2] += lifts[1]
        for act in (8, 6, "i8"):
            y = decode_linear(x, arrange(weight), None, act, level=level)
            assert error(y, linear64(x, weight, None, act)) <= EXACT


@levels
@pytest.mark.parametrize("text", ["int4g32", "q4_1", "q8_0", "mxfp4", "iq4_nl"])
@pytest.mark.parametrize("extreme", [0, 7, 15, 127, 255])
def test_extreme_codes(text: str, extreme: int, level: str) -> None:
    """The largest sums there are: all codes the same, all inputs at one end of their range."""
    weight = fitted(text, 7, 320)
    extreme %= 1 << weight.bits
    codes = torch.full((320, 1, 7), extreme)
    weight = CodebookWeight.from_codes(
        codes, None, weight.scale, weight.offset, (7, 320), weight.bits, weight.order, weight.levels
    )
    for tokens in (1, 40):
        x = torch.ones(tokens, 320)
        x[:, 1] = -0.01
        for act in (8, "i8"):
            y = decode_linear(x, arrange(weight), None, act, level=level)
            expected = linear64(x, weight, None, act)
            assert error(y, expected) <= EXACT if expected.any() else not y.any()


def test_an_offset_that_is_not_that_of_a_sign_is_added() -> None:
    """Offsets of codes with a sign are left out; one that differs must not be."""
    arranged = arrange(fitted("int4g32", 5, 64))
    assert arranged.offset is not None
    offset = arranged.offset.clone()
    offset[3, 1] += 1
    x, changed = noise(20, 64), replace(arranged, offset=offset)
    y, z = (decode_linear(x, w, None, 8) for w in (arranged, changed))
    added = torch.zeros(20, 5)
    added[:, 3] = fake_quantize(x, 8)[:, 32:].sum(1)
    assert error(z - y, added.double()) <= 1e-5


@pytest.mark.parametrize("tables", [[0.5, -0.25, 127 / 4], [3, 1, 128], [0.1, 1, 2]])
def test_tables_of_whole_numbers(tables: list[float]) -> None:
    """Codebooks of 8 values that are whole numbers of 8 bits of a power of two are multiplied as integers."""
    values = torch.tensor([*tables, 0, -1, 2, -3, 1.0])
    codes = torch.randint(8, (96, 1, 11), generator=torch.Generator().manual_seed(0))
    weight = CodebookWeight.from_codes(
        codes, values[None, None, :, None], torch.rand(11, 3) + 0.5, None, (11, 96), 3
    )
    arranged, x = arrange(weight), noise(33, 96)
    whole = tables == [0.5, -0.25, 127 / 4]
    assert _prepared(arranged).integers == whole
    assert error(decode_linear(x, arranged, None, 8), linear64(x, weight, None, 8)) <= (
        EXACT if whole else FAST
    )


@levels
@pytest.mark.parametrize("text", ["int4g32", "q8_0"])
def test_zero_points_far_apart_cancel(text: str, level: str) -> None:
    """Weights of one sign, and inputs that are zero but for one: what zero points add is hundreds of times
    the result, and they lie at both ends."""
    weight = fitted(text, 19, 320)
    top = 1 << weight.bits
    codes = torch.randint(top // 2, top, (320, 1, 19), generator=torch.Generator().manual_seed(0))
    weight = CodebookWeight.from_codes(
        codes, None, weight.scale, None, (19, 320), weight.bits, weight.order, weight.levels
    )
    x = noise(40, 320) * 1e-3
    x[::2, 5], x[1::2, 5] = 1, -1
    y = decode_linear(x, arrange(weight), None, 8, level=level)
    assert error(y, linear64(x, weight, None, 8)) <= EXACT

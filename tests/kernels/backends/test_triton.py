"""The Triton kernels against an independent float64 reference: under Triton's interpreter where there is
no GPU, on the GPU where there is one."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquabit.kernels.arranged import arrange, arranges
from aquabit.kernels.backends import triton_kernels
from aquabit.kernels.backends.triton_kernels import (
    triton_available,
    triton_conv2d,
    triton_linear,
    triton_refuses,
    triton_weight,
)
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.geometry import Geometry
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in matmul",
    "ignore:Using padding='same' with even kernel",
    "ignore:Dynamo detected a call to a `functools",
)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
served = pytest.mark.skipif(triton_available() is not None, reason=f"triton cannot run: {triton_available()}")
gpu = pytest.mark.skipif(not CUDA, reason="no CUDA device")


class Format(NamedTuple):
    """C is 0 for uniform codes, 1 for shared tables, 2 for tables per row; n counts groups of scales, 0
    for none."""

    bits: int
    group: int = 1
    books: int = 1
    C: int = 1
    n: int = 1
    offset: bool = False


FORMATS = {
    "usq1": Format(1, C=0, offset=True),
    "usq2": Format(2, C=0, offset=True),
    "usq3": Format(3, C=0, offset=True),
    "usq4": Format(4, C=0, offset=True),
    "usq5": Format(5, C=0, offset=True),
    "usq8": Format(8, C=0, offset=True),
    "usq4g": Format(4, C=0, n=3, offset=True),
    "usq3g": Format(3, C=0, n=5, offset=True),
    "vq2": Format(2, n=0),
    "vq3": Format(3),
    "vq8": Format(8),
    "vq3c": Format(3, C=2, n=0),
    "vq4c": Format(4, C=2),
    "aq1x4g2": Format(4, 2),
    "aq2x8g8": Format(8, 8, 2),
    "aq3x2g4": Format(2, 4, 3),
    "aq2x6g3": Format(6, 3, 2),
    "aq1x5g9": Format(5, 9),
    "aq1x8g16": Format(8, 16),
    "aq2x4g8c": Format(4, 8, 2, C=2),
}


def made(
    format: Format, shape: tuple[int, ...], order: str = "inputs", seed: int = 0
) -> tuple[CodebookWeight, np.ndarray]:
    """A random weight, and the same decoded to float64 by this function alone, in the original shape."""
    rng = np.random.default_rng(seed)
    out, row = shape[0], prod(shape[1:])
    groups = ceil(row / format.group)
    codes = rng.integers(0, 1 << format.bits, (groups, format.books, out))
    half = {"tables": None, "scale": None, "offset": None}
    if format.C:
        half["tables"] = rng.normal(
            size=(out if format.C == 2 else 1, format.books, 1 << format.bits, format.group)
        ).astype(np.float16)
    if format.n:
        size = (out, format.n) if format.n > 1 else (out,)
        half["scale"] = (0.5 + rng.random(size)).astype(np.float16)
        half["offset"] = (
            (rng.normal(size=size) * (1 << format.bits) / 2).astype(np.float16) if format.offset else None
        )
    decoded = np.zeros((out, groups * format.group))
    for o in range(out):
        for m in range(format.books):
            if half["tables"] is None:
                decoded[o] += codes[:, m, o]
            else:
                decoded[o] += (
                    half["tables"][o if format.C == 2 else 0, m][codes[:, m, o]]
                    .astype(np.float64)
                    .reshape(-1)
                )
    decoded = decoded[:, :row]
    for name in ("scale", "offset"):
        if half[name] is not None:
            factor = half[name].astype(np.float64).reshape(out, -1)
            factor = np.repeat(factor, ceil(row / factor.shape[1]), 1)[:, :row]
            decoded = decoded * factor if name == "scale" else decoded + factor
    if len(shape) == 4:
        _, cin, kh, kw = shape
        decoded = (
            decoded.reshape(shape)
            if order == "kernel"
            else decoded.reshape(out, kh, kw, cin).transpose(0, 3, 1, 2)
        )
    tensors = (None if v is None else torch.from_numpy(v) for v in half.values())
    return (
        CodebookWeight.from_codes(torch.from_numpy(codes), *tensors, shape, format.bits, order).to(DEVICE),
        decoded,
    )


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def error(y: Tensor, expected: Tensor) -> float:
    """max|y - y64| / max|y64|"""
    assert y.shape == expected.shape
    return float((y.double().cpu() - expected).abs().max() / expected.abs().max())


# of max|y|: inputs and weights of 16 bits are rounded, and so is y; an H200 came to 1.04 times 2^-8
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def check_linear(weight: CodebookWeight, decoded: np.ndarray, x: Tensor, bias: Tensor | None) -> None:
    expected = x.double() @ torch.from_numpy(decoded).T
    if bias is not None:
        expected = expected + bias.double()
    placed = None if bias is None else bias.to(DEVICE)
    exact, fast = (triton_linear(x.to(DEVICE), weight, placed, accuracy) for accuracy in ("exact", "fast"))
    assert exact.dtype == fast.dtype == x.dtype
    rounding = expected.abs() * torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0
    assert bool(((exact.double().cpu() - expected).abs() <= rounding + 1e-6 * expected.abs().max()).all())
    assert error(fast, expected) <= BOUNDS[x.dtype]


@pytest.mark.skipif(CUDA, reason="a GPU decides for itself")
def test_without_a_gpu_the_interpreter_serves() -> None:
    assert triton_available() is None  # else everything below would be skipped


@served
@pytest.mark.parametrize("name", FORMATS)
def test_linear_of_every_format(name: str) -> None:
    weight, decoded = made(FORMATS[name], (19, 83))
    bias = noise(19, seed=2)
    check_linear(weight, decoded, noise(3, 83), bias)
    check_linear(weight, decoded, noise(21, 83), bias)


@served
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["usq4", "usq4g", "vq3c", "aq2x8g8", "aq2x6g3"])
def test_linear_in_half_precision(name: str, dtype: torch.dtype) -> None:
    weight, decoded = made(FORMATS[name], (18, 40))
    check_linear(weight, decoded, noise(5, 40, dtype=dtype), noise(18, seed=2, dtype=dtype))
    check_linear(weight, decoded, noise(17, 40, dtype=dtype), None)


@served
@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    out=st.integers(1, 40),
    inputs=st.integers(1, 70),
    tokens=st.integers(1, 34),
    seed=st.integers(0, 99),
)
def test_linear_of_any_shape(name: str, out: int, inputs: int, tokens: int, seed: int) -> None:
    format = FORMATS[name]
    if (
        format.n > 1 and ceil(inputs / ceil(inputs / format.n)) < format.n
    ):  # scales for inputs that are not there
        inputs = 2 * format.n
    weight, decoded = made(format, (out, inputs), seed=seed)
    check_linear(weight, decoded, noise(tokens, inputs, seed=seed), None)


@served
def test_rows_are_split_over_programs_and_added_in_order() -> None:
    weight, decoded = made(FORMATS["aq2x8g8"], (9, 700))
    x = noise(2, 700)
    check_linear(weight, decoded, x, noise(9, seed=3))
    calls = [triton_linear(x.to(DEVICE), weight) for _ in range(2)]
    assert torch.equal(*calls)
    grouped, decoded = made(
        Format(2, C=0, n=5, offset=True), (9, 1280)
    )  # scales of whole blocks, and blocks past the row's end
    check_linear(grouped, decoded, noise(4, 1280), None)


@served
def test_long_rows_are_summed_in_parts() -> None:
    weight, decoded = made(FORMATS["vq3"], (16, 600))  # with tiles of 32: two sums of 8 blocks and a rest
    check_linear(weight, decoded, noise(16, 600), None)


@served
def test_inputs_of_any_layout() -> None:
    weight, decoded = made(FORMATS["usq3"], (7, 24))
    expected = torch.from_numpy(decoded).T
    for tokens in (2, 16):
        x = noise(24, tokens).T
        assert error(triton_linear(x.to(DEVICE), weight, accuracy="exact"), x.double() @ expected) <= 1e-6
    x = noise(2, 3, 48)[..., ::2]
    assert error(triton_linear(x.to(DEVICE), weight, accuracy="exact"), x.double() @ expected) <= 1e-6
    assert triton_linear(noise(24).to(DEVICE), weight).shape == (7,)
    assert triton_linear(noise(0, 24).to(DEVICE), weight).shape == (0, 7)
    bias = noise(14, seed=5)[::2]
    assert (
        error(
            triton_linear(x.to(DEVICE), weight, bias.to(DEVICE), "exact"),
            x.double() @ expected + bias.double(),
        )
        <= 1e-6
    )
    one = noise(1, 24).to(DEVICE).expand(20, 24)
    assert error(triton_linear(one, weight, accuracy="exact"), one.cpu().double() @ expected) <= 1e-6


@served
@pytest.mark.parametrize("tokens", [2, 16])
def test_extreme_scales_and_zero_rows(tokens: int) -> None:
    weight, decoded = made(FORMATS["aq2x8g8"], (6, 32))
    assert weight.scale is not None
    scale = torch.tensor([0, 6e-8, 1e-4, 1, 1000, 60000], dtype=torch.float16)
    decoded = decoded / weight.scale.cpu().double().numpy()[:, None] * scale.double().numpy()[:, None]
    extreme = CodebookWeight(
        weight.packed, weight.codebooks, scale.to(DEVICE), None, weight.shape, weight.bits
    )
    x = noise(tokens, 32)
    y, expected = (
        triton_linear(x.to(DEVICE), extreme, accuracy="exact").cpu(),
        x.double() @ torch.from_numpy(decoded).T,
    )
    assert bool((y[:, 0] == 0).all())
    for row in range(1, 6):
        assert error(y[:, row], expected[:, row]) <= 1e-6
    x[0] = 0
    assert bool((triton_linear(x.to(DEVICE), extreme)[0] == 0).all())


@served
def test_sums_of_codewords_beyond_float16_stay_finite() -> None:
    weight, _ = made(FORMATS["aq2x8g8"], (16, 16))
    assert weight.codebooks is not None
    tables, scale = (
        torch.full_like(weight.codebooks, 60000.0),
        torch.full((16,), 1e-5, dtype=torch.float16, device=DEVICE),
    )
    large = CodebookWeight(weight.packed, tables, scale, None, weight.shape, weight.bits)
    y = triton_linear(torch.ones(16, 16, dtype=torch.float16, device=DEVICE), large)
    assert error(y, torch.full((16, 16), 16 * 120000 * float(scale[0]), dtype=torch.float64)) <= 1e-3


@served
def test_what_is_not_finite_stays_in_its_token() -> None:
    weight, decoded = made(FORMATS["usq4"], (5, 20))
    x = noise(17, 20)
    x[3, 2], x[4, 1] = torch.nan, torch.inf
    y = triton_linear(x.to(DEVICE), weight).cpu()
    rest = [i for i in range(17) if i not in (3, 4)]
    assert bool(y[3].isnan().all()) and not bool(y[4].isfinite().any())
    assert error(y[rest], x[rest].double() @ torch.from_numpy(decoded).T) <= 1e-3


@served
def test_worst_case_of_tf32_stays_within_the_bound() -> None:
    """Inputs and weights half a step of tf32 above a number that it has: rounding errs most, truncation
    would err twice as much."""
    weight = CodebookWeight.from_codes(
        torch.zeros(64, 1, 16),
        torch.tensor([1 + 2**-10, 0.0]).reshape(1, 1, 2, 1),
        torch.full((16,), 1.5),
        torch.full((16,), 2**-10),
        (16, 64),
        1,
    )
    x = torch.full((16, 64), 1 + 2**-11 + 2**-13)
    expected = x.double() @ weight.dequantize().double().T
    assert 0 < error(triton_linear(x.to(DEVICE), weight.to(DEVICE)), expected) <= 1e-3


# stride, padding, dilation, groups, kernel, image
GEOMETRIES = [
    (1, 1, 1, 1, (3, 3), (5, 6)),
    (2, 1, 1, 1, (3, 3), (7, 5)),
    ((1, 2), (0, 2), (2, 1), 1, (2, 3), (5, 7)),
    (1, 0, 1, 2, (1, 1), (4, 3)),
    (1, "same", 1, 3, (3, 2), (4, 5)),
    (1, "valid", 2, 1, (2, 2), (6, 5)),
]


def check_conv(
    weight: CodebookWeight, decoded: np.ndarray, x: Tensor, bias: Tensor | None, *geometry: object
) -> None:
    expected = torch.nn.functional.conv2d(
        x.double(), torch.from_numpy(decoded).contiguous(), None if bias is None else bias.double(), *geometry
    )
    placed = None if bias is None else bias.to(DEVICE)
    exact = triton_conv2d(x.to(DEVICE), weight, placed, *geometry, accuracy="exact")
    assert error(exact, expected) <= (
        1e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2 + 1e-6
    )
    assert error(triton_conv2d(x.to(DEVICE), weight, placed, *geometry), expected) <= BOUNDS[x.dtype]


@served
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", ["usq3", "usq4g", "vq3c", "aq2x8g8", "aq2x6g3"])
def test_conv2d_along_inputs(name: str, geometry: tuple) -> None:
    stride, padding, dilation, groups, kernel, image = geometry
    weight, decoded = made(FORMATS[name], (6, 8, *kernel))
    x = noise(2, 8 * groups, *image)
    check_conv(weight, decoded, x, noise(6, seed=4), stride, padding, dilation, groups)


@served
@pytest.mark.parametrize("geometry", GEOMETRIES[:5], ids=str)
@pytest.mark.parametrize(("bits", "books"), [(4, 1), (7, 2), (8, 1)])
def test_conv2d_of_kernel_slices(bits: int, books: int, geometry: tuple) -> None:
    stride, padding, dilation, groups, kernel, image = geometry
    weight, decoded = made(Format(bits, prod(kernel), books), (6, 5, *kernel), order="kernel")
    check_conv(
        weight, decoded, noise(2, 5 * groups, *image), noise(6, seed=4), stride, padding, dilation, groups
    )


@served
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv2d_in_half_precision(dtype: torch.dtype) -> None:
    weight, decoded = made(FORMATS["aq2x8g8"], (6, 8, 3, 3))
    check_conv(weight, decoded, noise(2, 8, 5, 5, dtype=dtype), noise(6, seed=4, dtype=dtype), 1, 1)


@served
def test_conv2d_groups_of_codes_may_reach_across_taps() -> None:
    weight, decoded = made(FORMATS["aq1x8g16"], (6, 5, 3, 3))
    assert arranges(weight) is not None
    check_conv(weight, decoded, noise(1, 5, 4, 4), None, 1, 1)


@served
def test_conv2d_keeps_the_memory_format() -> None:
    weight, decoded = made(FORMATS["vq3"], (6, 4, 3, 3))
    x = noise(2, 4, 6, 5)
    expected = torch.nn.functional.conv2d(x.double(), torch.from_numpy(decoded).contiguous())
    last = triton_conv2d(x.to(DEVICE).contiguous(memory_format=torch.channels_last), weight, accuracy="exact")
    assert last.is_contiguous(memory_format=torch.channels_last) and error(last, expected) <= 1e-6
    plain = triton_conv2d(x.to(DEVICE)[:, :, :, :], weight, accuracy="exact")
    assert plain.is_contiguous() and error(plain, expected) <= 1e-6
    view = noise(2, 5, 6, 10)[:, 1:, :, ::2]
    expected = torch.nn.functional.conv2d(view.double(), torch.from_numpy(decoded).contiguous())
    assert error(triton_conv2d(view.to(DEVICE), weight, accuracy="exact"), expected) <= 1e-6
    assert triton_conv2d(noise(0, 4, 6, 5).to(DEVICE), weight).shape == (0, 6, 4, 3)


@served
@pytest.mark.parametrize("shape", [(6, 24), (6, 8, 3, 3), (5, 7), (5, 7, 3, 3), (4, 5, 2, 2)])
@pytest.mark.parametrize(
    "name", ["usq1", "usq2", "usq3", "usq4", "usq3g", "vq3c", "aq2x8g8", "aq1x4g2", "aq3x2g4"]
)
def test_arranged_weights_are_read_as_they_are_or_laid_again(name: str, shape: tuple[int, ...]) -> None:
    weight, _ = made(FORMATS[name], shape)
    if arranges(weight):
        return
    arranged = arrange(weight)
    own, theirs = triton_weight(weight), triton_weight(arranged)
    assert torch.equal(own.codes, theirs.codes) and own.facts == theirs.facts
    if len(arranged.segments) == 1:
        assert theirs.codes.data_ptr() == arranged.codes.data_ptr()


def test_a_layout_is_made_once_and_goes_with_its_weight() -> None:
    gc.collect()
    weight, _ = made(FORMATS["usq4"], (5, 20))
    laid = triton_weight(weight)
    assert triton_weight(weight) is laid and triton_weight(laid) is laid
    assert laid.nbytes == 5 * 10 + 2 * 5 * 2
    assert torch.equal(laid.to(DEVICE).codes, laid.codes)
    before = len(triton_kernels._laid_out)
    del weight
    gc.collect()
    assert len(triton_kernels._laid_out) == before - 1


def test_a_layout_follows_its_weight_to_another_device() -> None:
    """Offloading moves the tensors of a weight, which stays the same object."""
    weight = arrange(made(FORMATS["usq4"], (5, 20))[0])
    assert triton_weight(weight).codes.device == weight.codes.device
    for name, there in weight.to("meta").__dict__.items():
        object.__setattr__(weight, name, there)
    assert triton_weight(weight).codes.is_meta


class Kernel:
    """Stands for a kernel of Triton: counts its own look-ups, and hands out what it compiled."""

    arg_names = ("x", "y", "codes", "tokens", "OUT", "BLOCK_M")
    best_config = None

    def __init__(self) -> None:
        self.looked_up, self.launched = 0, []

    def __getitem__(self, grid: tuple[int, int, int]) -> object:
        def look_up(*arguments: object, **named: int) -> Kernel:
            self.looked_up += 1
            return compiled

        def launch(*arguments: object) -> None:
            self.launched.append((grid, arguments[3:]))

        compiled = type("Compiled", (), {"__getitem__": lambda _, asked: launch})()
        return look_up


@served
def test_a_launch_is_looked_up_once_for_calls_that_are_alike() -> None:
    kernel, x, codes = Kernel(), torch.zeros(33), torch.zeros(4, dtype=torch.uint8)

    def start(key: str = "a", x: Tensor = x, read: Tensor = codes, tokens: int = 32, placed: int = 8) -> int:
        before = kernel.looked_up
        named = {"BLOCK_M": placed, "OUT": 5}
        grid = (tokens // placed, 1, 1)
        triton_kernels._start((key,), codes, (x, x, read), (tokens,), lambda: (kernel, grid, named))
        return kernel.looked_up - before

    with (
        mock.patch.object(triton_kernels._device(), "DIRECT", True),
        mock.patch.dict(triton_kernels._launches, clear=True),
    ):
        assert start() == 1 and start() == 0
        assert kernel.launched == [((4, 1, 1), (32, 5, 8))]  # the constants in the kernel's order
        # each of these may be another compiled kernel to Triton
        assert start("b") == start(tokens=33) == start(x=x[1:]) == start(x=x.half()) == start(read=x) == 1
        assert start() == 0
        with mock.patch.object(triton_kernels, "LAUNCHES", 1):
            start(tokens=34)
        assert len(triton_kernels._launches) == 1


@gpu
@served
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("name", ["usq4", "vq3c", "aq2x8g8"])
def test_launches_that_are_remembered_compute_the_same(name: str, tokens: int) -> None:
    weight, decoded = made(FORMATS[name], (96, 64))
    other, others = made(FORMATS[name], (96, 64), seed=1)
    for repeat in range(3):
        x = noise(tokens + 1, 64, seed=repeat).to(DEVICE)
        for w, expected in ((weight.to(DEVICE), decoded), (other.to(DEVICE), others)):
            for part in (x[:-1], x[1:], x.flatten()[3 : 3 + tokens * 64].reshape(tokens, 64)):
                found = triton_linear(part, w, accuracy="exact")
                assert error(found, part.double().cpu() @ torch.from_numpy(expected).T) <= 2e-6


@served
def test_ops_have_shapes_without_running() -> None:
    linear, conv = (
        triton_weight(made(FORMATS["usq4"], (5, 20))[0]),
        triton_weight(made(FORMATS["vq3"], (6, 4, 3, 3))[0]),
    )
    x, image = noise(9, 20).to(DEVICE), noise(2, 4, 6, 5).to(DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.aquabit.triton_linear.default, (x, None, linear.number, 5, True), test_utils=checks
    )
    arguments = (conv.number, conv.shape, Geometry().numbers, [4, 3], False)
    for layout in (image, image.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(
            torch.ops.aquabit.triton_conv2d.default, (layout, None, *arguments), test_utils=checks
        )
    meta = triton_linear(torch.empty(3, 4, 20, device="meta", dtype=torch.bfloat16), linear.to("meta"))
    assert meta.shape == (3, 4, 5) and meta.dtype == torch.bfloat16 and meta.is_meta
    assert triton_conv2d(torch.empty(2, 4, 6, 5, device="meta"), conv.to("meta"), None, 2, 1).shape == (
        2,
        6,
        3,
        3,
    )
    compiled = torch.compile(lambda t: triton_linear(t, linear) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), triton_linear(x, linear) + 1)


@served
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": "good"}, "accuracy 'good'"),
        ({"x": torch.zeros(3, 21)}, r"\[3, 21\]"),
        ({"x": torch.zeros(3, 20).double()}, "float64"),
        ({"x": torch.zeros(3, 20, dtype=torch.int64)}, "int64"),
        ({"bias": torch.zeros(6)}, r"bias is \[6\]"),
        ({"x": torch.tensor(1.0)}, r"\[\]"),
        ({"bias": torch.zeros(5, device="meta")}, "bias on meta"),
        ({"x": torch.zeros(3, 20, device="meta")}, "weight on"),
    ],
)
def test_linear_names_what_does_not_fit(change: dict, message: str) -> None:
    weight, _ = made(FORMATS["usq4"], (5, 20))
    arguments = {"x": torch.zeros(3, 20), "weight": weight, "bias": None, "accuracy": "fast"} | change
    placed = {k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for k, v in arguments.items()}
    with pytest.raises(AquabitError, match=message):
        triton_linear(**placed)


@served
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, 6, 6)}, r"\[1, 5, 6, 6\]"),
        ({"x": torch.zeros(4, 6, 6)}, r"\[4, 6, 6\]"),
        ({"groups": 0}, "0 groups"),
        ({"x": torch.zeros(1, 16, 6, 6), "groups": 4}, "4 groups do not divide"),
        ({"stride": 0}, "stride 0"),
        ({"padding": -1}, "padding -1"),
        ({"padding": "same", "stride": 2}, "padding 'same' with stride"),
        ({"padding": "full"}, "'full'"),
        ({"dilation": (1, 0)}, r"dilation \(1, 0\)"),
        ({"x": torch.zeros(1, 4, 2, 6)}, r"image of \[2, 6\]"),
        ({"dilation": 3}, r"reaches over \[7, 7\]"),
        ({"stride": (1, 1, 1)}, r"stride \(1, 1, 1\)"),
    ],
)
def test_conv2d_names_what_does_not_fit(change: dict, message: str) -> None:
    weight, _ = made(FORMATS["vq3"], (6, 4, 3, 3))
    arguments = {"x": torch.zeros(1, 4, 6, 6), "weight": weight} | change
    placed = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(AquabitError, match=message):
        triton_conv2d(**placed)


def test_weights_that_it_refuses() -> None:
    wide = CodebookWeight.from_codes(torch.zeros(4, 1, 5), torch.zeros(1, 1, 512, 2), None, None, (5, 8), 9)
    with pytest.raises(AquabitError, match="9 bits"):
        triton_weight(wide)
    if triton_available() is None:
        assert "9 bits" in str(triton_refuses(wide, DEVICE, torch.float32))
    linear = made(FORMATS["usq4"], (5, 20))[0]
    with pytest.raises(AquabitError, match="4 dimensions"):
        triton_conv2d(torch.zeros(1, 20, 2, 2), linear)
    elsewhere = "cpu" if CUDA else "cuda:1"
    assert triton_available() is not None or elsewhere in str(
        triton_refuses(linear, elsewhere, torch.float32)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(5, 9, dtype=torch.uint8)}, r"uint8 \[5, 9\]"),
        ({"codes": torch.zeros(5, 20)}, "float32"),
        ({"bits": 5}, "needs uint8"),
        ({"scale": torch.zeros(4)}, r"scale is \[4\]"),
        ({"offset": torch.zeros(5, 0)}, r"offset is \[5, 0\]"),
        ({"group": 2}, "needs uint8"),
        ({"tables": torch.zeros(1, 1, 8, 1)}, r"tables are \[1, 1, 8, 1\]"),
        ({"scale": torch.zeros(10)[::2]}, "strides"),
        ({"scale": torch.zeros(5, device="meta")}, "on meta"),
    ],
)
def test_a_layout_that_would_be_read_past_its_end_is_refused(change: dict, message: str) -> None:
    laid = triton_weight(made(FORMATS["usq4"], (5, 20))[0])
    with pytest.raises(AquabitError, match=message):
        replace(
            laid,
            **{
                k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta and v.is_contiguous() else v
                for k, v in change.items()
            },
        )


def test_without_triton_it_says_so() -> None:
    with mock.patch.object(triton_kernels, "_device", return_value="triton is not installed (no module)"):
        weight = made(FORMATS["usq4"], (5, 20))[0]
        assert (
            triton_refuses(weight, "cuda", torch.float32)
            == triton_available()
            == "triton is not installed (no module)"
        )
        with pytest.raises(AquabitError, match="cannot serve: triton is not installed"):
            triton_linear(torch.zeros(3, 20), weight)


def _python(program: str, **environment: str | None) -> str:
    env = {k: v for k, v in (os.environ | environment).items() if v is not None}
    return subprocess.run(
        [sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True
    ).stdout


def test_the_module_imports_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; from aquabit.kernels.backends.triton_kernels import"
        " triton_available; print(triton_available())"
    )
    assert "triton is not installed" in _python(program)


def test_an_interpreter_set_too_late_is_named() -> None:
    program = (
        "import os, triton; os.environ['TRITON_INTERPRET'] = '1';"
        " from aquabit.kernels.backends.triton_kernels import triton_available as f; print(f())"
    )
    assert "TRITON_INTERPRET was set after triton was imported" in _python(program, TRITON_INTERPRET=None)


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Ampere and Hopper: matrix units (mma.sync, wgmma) in all fast products, none in exact ones and for
    few tokens."""
    lines = _python(
        "from tests.kernels.backends.triton_compiles import main; main()",
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path),
    ).splitlines()
    assert len(lines) == 30
    for line in lines:
        unit = (
            "none"
            if any(word in line for word in ("exact", " few ", " add ", " tokens "))
            else "mma.sync"
            if line.startswith("80")
            else "wgmma.mma"
        )
        assert f"unit='{unit}'" in line, line


# Shapes of DiT-XL/2 and LDM-4, where there is a GPU.


@gpu
@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 16, 256, 1000])
@pytest.mark.parametrize("name", ["usq2", "usq4", "usq8", "vq3", "vq4c", "aq2x8g8", "aq1x8g16", "aq2x6g3"])
def test_large_linear(name: str, tokens: int, dtype: torch.dtype) -> None:
    weight, decoded = made(FORMATS[name], (1152, 1152))
    check_linear(weight, decoded, noise(tokens, 1152, dtype=dtype), noise(1152, seed=2, dtype=dtype))


@gpu
@served
@pytest.mark.parametrize(
    ("shape", "tokens"), [((4608, 1152), 256), ((1152, 4608), 256), ((1152, 4608), 1), ((4608, 1152), 4096)]
)
def test_large_linear_with_scales_per_64_inputs(shape: tuple[int, int], tokens: int) -> None:
    weight, decoded = made(Format(4, C=0, n=shape[1] // 64, offset=True), shape)
    check_linear(weight, decoded, noise(tokens, shape[1]), None)


@gpu
@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "size", "stride"), [(192, 32, 1), (384, 32, 2), (960, 16, 1)])
@pytest.mark.parametrize("name", ["usq4", "aq2x8g8", "kernel"])
def test_large_conv2d(
    name: str, channels: int, size: int, stride: int, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    format, order = (Format(8, 9), "kernel") if name == "kernel" else (FORMATS[name], "inputs")
    weight, decoded = made(format, (channels, channels, 3, 3), order=order)
    x = noise(2, channels, size, size, dtype=dtype).contiguous(memory_format=memory_format)
    check_conv(weight, decoded, x, noise(channels, seed=4, dtype=dtype), stride, 1)


@served
def test_a_copy_of_a_layout_outlives_its_original() -> None:
    laid = triton_weight(made(FORMATS["usq4"], (5, 20))[0])
    x, expected = noise(9, 20).to(DEVICE), triton_linear(noise(9, 20).to(DEVICE), laid.to(DEVICE))
    copied = copy.copy(laid.to(DEVICE))
    del laid
    gc.collect()
    assert torch.equal(triton_linear(x, copied), expected)


@served
@pytest.mark.parametrize("text", ["int4g32", "nf4g64d", "fp8", "mxfp4", "q4_K", "q3_K", "q8_0"])
def test_formats_of_other_programs(text: str) -> None:
    """Their scales are decoded once, to float32, and kernels are as exact with them as with others."""
    for shape in ((24, 256), (8, 256, 1, 3)):
        coded = quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)), text)
        x = torch.randn((9, 256) if len(shape) == 2 else (1, 256, 4, 5), generator=torch.Generator())
        dense = torch.nn.functional.linear if len(shape) == 2 else torch.nn.functional.conv2d
        run = triton_linear if len(shape) == 2 else triton_conv2d
        expected = dense(x.double(), coded.dequantize().double())
        for weight in (coded.to(DEVICE), arrange(coded).to(DEVICE)):
            y = run(x.to(DEVICE), weight, accuracy="exact").cpu()
            assert float((y - expected).norm() / expected.norm()) < 1e-6

"""The int8 Triton kernels against an independent float64 reference: under Triton's interpreter where there is
no GPU, on the GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquabit.activation_bits import Rounding
from aquabit.kernels.backends import backend_named
from aquabit.kernels.backends.triton_int8 import _quantized, centred, int8_refuses, triton_int8_linear
from aquabit.kernels.backends.triton_kernels import triton_available, triton_weight
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.dispatch import codebook_linear, linear_request, select, using
from aquabit.kernels.request import Request, format_of
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError
from tests.kernels.backends.test_triton import DEVICE, FORMATS, Format, error, gpu, made, noise

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(triton_available() is not None, reason=f"triton cannot run: {triton_available()}"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
UNIFORM = ("usq1", "usq2", "usq3", "usq4", "usq5", "usq8")
GROUPED = Format(4, C=0, n=3, offset=True)


def rounded(x: Tensor, act: Rounding) -> np.ndarray:
    """x [tokens, in] on the grids of 2^act points, or the 255 around zero of "i8", one a token: float64, by
    this function alone. The grid's step and zero are float32's, as the rounding of halves depends on them."""
    wide = x.float().numpy()
    low, high = wide.min(1, keepdims=True), wide.max(1, keepdims=True)
    top = np.float32(254 if act == "i8" else 2**act - 1)
    if act == "i8":
        high = np.maximum(high, -low)
        low = -high
    step = (high * np.float32(0.5) - low * np.float32(0.5)) / (top * np.float32(0.5))
    constant = step == 0
    inverse = np.float32(1) / np.where(constant, np.float32(1), step)
    zero = np.rint(-low * inverse)
    level = np.clip(np.rint(wide * inverse), -zero, top - zero).astype(np.float64)
    return np.where(constant, wide, level * step.astype(np.float64))


def check(weight: CodebookWeight, decoded: np.ndarray, x: Tensor, bias: Tensor | None, act: Rounding) -> None:
    expected = torch.from_numpy(rounded(x, act) @ decoded.T)
    if bias is not None:
        expected += bias.double()
    y = triton_int8_linear(x.to(DEVICE), weight, None if bias is None else bias.to(DEVICE), act)
    assert y.dtype == x.dtype
    rounding = expected.abs() * torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0
    assert bool(((y.double().cpu() - expected).abs() <= rounding + 1e-6 * expected.abs().max()).all())


@pytest.mark.parametrize("act", [8, 5, 2, "i8"])
@pytest.mark.parametrize("name", UNIFORM)
def test_linear_of_every_width(name: str, act: Rounding) -> None:
    weight, decoded = made(FORMATS[name], (19, 83))
    check(weight, decoded, noise(21, 83), noise(19, seed=2), act)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_half_precision(dtype: torch.dtype) -> None:
    weight, decoded = made(FORMATS["usq4"], (18, 40))
    check(weight, decoded, noise(5, 40, dtype=dtype), noise(18, seed=2, dtype=dtype), 8)


@pytest.mark.parametrize(("bits", "groups"), [(4, 3), (8, 2), (3, 5)])
def test_groups_of_inputs_with_a_scale_each(bits: int, groups: int) -> None:
    weight, decoded = made(Format(bits, C=0, n=groups, offset=True), (18, 32 * groups))
    check(weight, decoded, noise(17, 32 * groups), noise(18, seed=2), 8)


@settings(max_examples=8)
@given(
    name=st.sampled_from(UNIFORM),
    out=st.integers(1, 40),
    inputs=st.integers(1, 70),
    tokens=st.integers(1, 34),
    act=st.sampled_from((2, 3, 4, 5, 6, 7, 8, "i8")),
)
def test_linear_of_any_shape(name: str, out: int, inputs: int, tokens: int, act: Rounding) -> None:
    weight, decoded = made(FORMATS[name], (out, inputs), seed=inputs)
    check(weight, decoded, noise(tokens, inputs, seed=out), None, act)


def test_tokens_that_are_far_from_zero_constant_or_long() -> None:
    weight, decoded = made(FORMATS["usq3"], (5, 1100))  # more inputs than a program rounds at a time
    x = noise(6, 1100)
    x[0] += 1000
    x[1], x[2] = 2.5, 0
    x[3, 1090:] *= 100
    for act in (8, "i8"):
        check(weight, decoded, x, noise(5, seed=2), act)


@pytest.mark.parametrize("act", [8, 3])
def test_integers_of_tokens_are_those_of_the_grid(act: int) -> None:
    x = noise(4, 1030)
    x[1] = torch.arange(1030.0) % (2 * (1 << act) - 1) / 2  # 0 to 2^act - 1: half of them between points
    q, step, shift, total = (t.cpu() for t in _quantized(x.to(DEVICE), act))
    assert int(q.min()) == -(1 << (act - 1)) and int(q.max()) == (1 << (act - 1)) - 1
    found = step.double()[:, None] * (q.double() + shift.double()[:, None])
    assert torch.equal(found, torch.from_numpy(rounded(x, act)))
    assert torch.equal(total, q.sum(1).float())


def test_integers_around_zero_have_no_shift() -> None:
    x = noise(4, 1030)
    x[1] = torch.arange(1030.0) % 509 / 2 - 127  # with halves between points
    q, step, shift, _ = (t.cpu() for t in _quantized(x.to(DEVICE), "i8"))
    assert not bool(shift.any()) and int(q.abs().max()) == 127
    assert torch.equal(step.double()[:, None] * q.double(), torch.from_numpy(rounded(x, "i8")))


def test_what_is_not_finite_stays_in_its_token() -> None:
    weight, decoded = made(FORMATS["usq4"], (5, 20))
    x = noise(17, 20)
    x[3, 2], x[4, 1], x[5] = torch.nan, torch.inf, torch.nan
    y = triton_int8_linear(x.to(DEVICE), weight).cpu()
    rest = [i for i in range(17) if i not in (3, 4, 5)]
    assert bool(y[3:6].isnan().all())
    assert error(y[rest], torch.from_numpy(rounded(x[rest], 8) @ decoded.T)) <= 1e-6


def test_inputs_of_any_layout() -> None:
    weight, decoded = made(FORMATS["usq3"], (7, 24))
    x = noise(24, 9).T
    check(weight, decoded, x, noise(14, seed=5)[::2], 8)
    assert triton_int8_linear(noise(2, 3, 48)[..., ::2].to(DEVICE), weight).shape == (2, 3, 7)
    assert triton_int8_linear(noise(0, 24).to(DEVICE), weight).shape == (0, 7)


def test_signed_codes_have_no_centre() -> None:
    """What is symmetric needs no sums of tokens; its rows still have a sum."""
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for text in ("int4g32", "q8_0"):
        coded = quantize_weight(dense, text).to(DEVICE)
        made_of = centred(triton_weight(coded))
        assert made_of.centre is None
        assert torch.allclose(made_of.total, coded.dequantize().double().sum(1).float(), atol=1e-5)
        check(coded, coded.dequantize().double().cpu().numpy(), noise(9, 64), None, 8)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vq3", (6, 24), "not whole numbers"),
        ("aq2x8g8", (6, 24), "not whole numbers"),
        ("usq4", (6, 4, 3, 3), "linear layers only"),
        ("usq4g", (6, 24), "8 inputs share a scale; it takes multiples of 32"),
    ],
)
def test_weights_that_it_refuses(name: str, shape: tuple[int, ...], message: str) -> None:
    weight, _ = made(FORMATS[name], shape)
    assert message in str(int8_refuses(format_of(weight)))
    with pytest.raises(AquabitError):
        triton_int8_linear(torch.zeros(9, 24, device=DEVICE), weight)


def test_it_names_what_does_not_fit() -> None:
    weight, _ = made(FORMATS["usq4"], (5, 20))
    for act in (9, 16, "f8"):
        with pytest.raises(AquabitError, match=f"act={act!r} does not fit"):
            triton_int8_linear(torch.zeros(3, 20, device=DEVICE), weight, None, act)
    with pytest.raises(AquabitError, match=r"the input is \[3, 21\]"):
        triton_int8_linear(torch.zeros(3, 21, device=DEVICE), weight)
    long = Request("linear", format_of(made(FORMATS["usq1"], (1, 131072))[0]), 16).format
    assert "131072 inputs" in str(int8_refuses(long))


def request(name: str, tokens: int, act: Rounding, **more: object) -> Request:
    form = format_of(made(FORMATS[name], (24, 32))[0])
    return Request("linear", form, tokens, act=act, device="cuda", dtype="bfloat16", **more)


def test_dispatch_knows_it() -> None:
    """As on a GPU: the backend for integers is first where both are, and refuses the rest in words."""
    refusals = "aquabit.kernels.backends.triton_refuses"
    with mock.patch(refusals, return_value=None):
        assert select(request("usq4", 256, 8), {}) == "triton_int8"
        assert select(request("usq4", 256, "i8"), {}) == "triton_int8"
        assert select(request("usq4", 256, "f8"), {}) == select(request("usq4", 2, 8), {}) == "triton"
        assert select(request("usq4", 256, 8, dense=True), {}) == "dense"
        assert select(request("usq4", 256, 16), {}) == select(request("vq3", 256, 8), {}) == "triton"
        r = request("usq4", 256, 8)
        assert select(r, {r.key: {"triton": 1.0, "triton_int8": 2.0}}) == "triton"
        with pytest.raises(AquabitError, match=r"'triton_int8' cannot run .* at most 8 bits"):
            select(request("usq4", 256, 12), {}, "triton_int8")
        with pytest.raises(AquabitError, match=r"'triton_int8' cannot run .* gradient"):
            select(request("usq4", 256, 8, gradient=True), {}, "triton_int8")
        # results/triton.md: with 4,096 tokens codewords of vectors are slower than decoding the weight first
        assert select(request("aq2x8g8", 256, 16), {}) == "triton"
        assert select(request("aq2x8g8", 4096, 16), {}) == "reference"
    on_cpu = replace(request("usq4", 256, 8), device="cpu")
    assert "it runs on CUDA" in str(backend_named("triton_int8").refuses(on_cpu))


@gpu
def test_through_dispatch_on_the_device() -> None:
    weight, decoded = made(FORMATS["usq4"], (192, 320))
    x = noise(64, 320)
    expected = torch.from_numpy(rounded(x, 8) @ decoded.T)
    with using({}):
        assert select(linear_request(x.to(DEVICE), format_of(weight), "fast", 8), {}) == "triton_int8"
        assert error(codebook_linear(x.to(DEVICE), weight, act=8), expected) <= 1e-6


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "out", "inputs"), [(16, 1152, 1152), (1000, 4608, 1152), (256, 1152, 4608)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_large_linear(bits: int, tokens: int, out: int, inputs: int, dtype: torch.dtype) -> None:
    for groups in (1, inputs // 64):
        weight, decoded = made(Format(bits, C=0, n=groups, offset=True), (out, inputs))
        check(weight, decoded, noise(tokens, inputs, dtype=dtype), noise(out, seed=2, dtype=dtype), 8)

"""Attention with a rounded softmax in Triton against an independent float64 reference: under Triton's
interpreter where there is no GPU, on the GPU where there is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aquabit.kernels.backends.triton_attention import triton_attention, triton_attention_refuses
from aquabit.kernels.backends.triton_kernels import triton_available
from aquabit.quant.attention import quantized_attention
from aquabit.scheme import AquabitError
from tests.kernels.backends.test_triton import DEVICE, gpu, noise

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(triton_available() is not None, reason=f"triton cannot run: {triton_available()}"),
    pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero"),
]
NEAR = 2e-3  # of a step: what float32 may round to the other side


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in float64, by this function alone, and how far it may move: half a step from one point of
    the grid to the next, a probability may be rounded to either."""
    q, k, v = (t.double().numpy() for t in (q, k, v))
    scores = np.einsum("...nd,...md->...nm", q, k) * scale
    if mask is not None:
        bare = mask.numpy() if mask.dtype == torch.bool else mask.double().numpy()
        scores = np.where(bare, scores, -np.inf) if mask.dtype == torch.bool else scores + bare
    ps = np.exp(scores - scores.max(-1, keepdims=True))
    ps /= ps.sum(-1, keepdims=True)
    low, high = ps.min(-1, keepdims=True), ps.max(-1, keepdims=True)
    step = (high - low) / 255
    with np.errstate(divide="ignore", invalid="ignore"):
        first, places = np.rint(low / step), ps / step
        rounded = np.clip(np.rint(places), first, first + 255) * step
        near = np.abs(places - np.floor(places) - 0.5) < NEAR * (1 + first * 1e-3)
    constant = step < 1e-12 * high
    rounded, near = np.where(constant, ps, rounded), np.where(constant, False, near)
    loose = np.einsum("...nm,...me->...ne", near * step, np.abs(v))
    return torch.from_numpy(np.einsum("...nm,...me->...ne", rounded, v)), torch.from_numpy(loose)


# relative to max|y|: values and results of 16 bits are rounded
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> None:
    placed = [t if t is None else t.to(DEVICE) for t in (q, k, v, mask)]
    y = triton_attention(*placed, scale)
    expected, loose = reference(q, k, v, mask, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    assert y.dtype == q.dtype and y.shape == expected.shape
    off = (y.double().cpu() - expected).abs()
    assert bool((off <= loose + BOUNDS[q.dtype] * expected.abs().max()).all())


def drawn(n: int, m: int, d: int, e: int, *batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [noise(*batch, *s, seed=i, dtype=dtype) for i, s in enumerate(((n, d), (m, d), (m, e)))]


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 7, 8, 8), (17, 33, 9, 13), (16, 16, 24, 40), (3, 40, 20, 5)], ids=str
)
def test_odd_shapes(sizes: tuple[int, int, int, int]) -> None:
    check(*drawn(*sizes, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(*drawn(9, 21, 12, 8, 1, 2, dtype=dtype))


def test_probabilities_are_rounded() -> None:
    """One key far above 300 others: each of these is under half a step, and gone."""
    q, k, v = torch.ones(1, 1), torch.zeros(301, 1), torch.ones(301, 1)
    k[7] = math.log(600)
    v[7] = 0
    y = triton_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), None, 1.0)
    assert float(y) == 0
    k[7] = math.log(500)  # 0.51 steps: each is a whole one
    y = triton_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), None, 1.0)
    assert float(y) == pytest.approx(300 * (500 - 1) / (500 + 300) / 255, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(9, 35), (1, 35), (2, 1, 9, 35), (2, 3, 1, 35)], ids=str)
def test_masks(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    mask = noise(*shape, seed=5) > -0.5 if kind == torch.bool else noise(*shape, seed=5)
    check(*drawn(9, 35, 8, 8, 2, 3), mask)


def test_keys_that_are_hidden_block_by_block() -> None:
    """The first blocks of keys hidden, by bools and by -inf; a query that sees no key has NaN."""
    q, k, v = drawn(4, 50, 8, 8)
    mask = torch.arange(50).expand(4, 50) >= 37
    check(q, k, v, mask)
    added = torch.zeros(4, 50).masked_fill(~mask, -torch.inf)
    check(q, k, v, added)
    none = mask.clone()
    none[2] = False
    y = triton_attention(*(t.to(DEVICE) for t in (q, k, v, none))).cpu()
    assert bool(y[2].isnan().all()) and bool(y[[0, 1, 3]].isfinite().all())
    assert bool(quantized_attention(q, k, v, none)[2].isnan().all())


def test_equal_scores_stay_as_they_are() -> None:
    q, k, v = drawn(3, 20, 8, 8)
    check(torch.zeros_like(q), k, v)
    check(q, k[:1], v[:1])


def test_probabilities_close_to_each_other() -> None:
    """The grid then begins some thousand steps above zero, and float32 does not know the step to more than a
    few digits: what is left is that nothing is off by more than a step."""
    q, k, v = drawn(5, 40, 8, 8)
    y = triton_attention(0.003 * q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)).double().cpu()
    expected, _ = reference(0.003 * q, k, v, None, 8**-0.5)
    assert float((y - expected).abs().max()) <= 3e-5 * float(expected.abs().max())
    assert float(expected.std(0).mean()) > 1e-4  # else equal probabilities would pass


def test_large_scores_and_a_scale() -> None:
    q, k, v = drawn(6, 30, 8, 8)
    check(10 * q, k, v, None, 0.7)


def test_layouts_and_leading_dimensions() -> None:
    q, k, v = drawn(6, 11, 8, 4)
    check(q, k, v)
    q, k, v = (t.transpose(0, 1) for t in (noise(6, 3, 8), noise(11, 3, 8, seed=2), noise(11, 3, 4, seed=3)))
    check(q, k, v)  # heads inside of tokens, as projections make them
    q, k, v = drawn(4, 5, 8, 8, 2, 1, 3)
    check(q, k, v, noise(4, 5, seed=8))
    check(q, k[:, :, :1], v[:1])
    q, k, v = drawn(4, 5, 8, 8)
    check(q, k, v, noise(2, 3, 4, 5, seed=8))  # a mask with more dimensions than the rest
    y = triton_attention(*(t.to(DEVICE) for t in drawn(4, 5, 8, 8, 2, 3)))
    assert y.transpose(1, 2).is_contiguous()  # joining heads costs no copy
    assert triton_attention(*(t.to(DEVICE) for t in drawn(0, 5, 8, 8, 2))).shape == (2, 0, 8)
    assert torch.equal(triton_attention(*(t.to(DEVICE) for t in drawn(3, 0, 8, 8))).cpu(), torch.zeros(3, 8))


def test_what_is_not_finite_stays_in_its_query() -> None:
    q, k, v = drawn(5, 9, 8, 8)
    q[3, 0] = torch.nan
    y = triton_attention(*(t.to(DEVICE) for t in (q, k, v))).cpu()
    assert bool(y[3].isnan().all()) and bool(y[[0, 1, 2, 4]].isfinite().all())


def test_it_is_what_the_reference_in_torch_computes() -> None:
    q, k, v = drawn(9, 21, 12, 8, 1, 2)
    mask = noise(9, 21, seed=9) > -1
    own, theirs = (
        triton_attention(*(t.to(DEVICE) for t in (q, k, v, mask))).cpu(),
        quantized_attention(q, k, v, mask),
    )
    assert float((own - theirs).abs().max()) <= 2e-3 * float(theirs.abs().max())  # a step of one probability


def test_shapes_without_running() -> None:
    q, k, v = drawn(5, 7, 8, 4, 2, 3)
    arguments = [t.to(DEVICE) for t in (q, k, v)]
    torch.library.opcheck(
        torch.ops.aquabit.triton_attention.default,
        (*arguments, None, 0.5),
        test_utils=("test_schema", "test_faketensor"),
    )
    meta = triton_attention(*(t.to("meta") for t in (q, k, v)))
    assert meta.shape == (2, 3, 5, 4) and meta.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(7, 9)}, r"k \[7, 9\]"),
        ({"value": torch.zeros(6, 4)}, r"v \[6, 4\]"),
        ({"query": torch.zeros(8)}, r"q \[8\]"),
        ({"query": torch.zeros(2, 5, 8), "key": torch.zeros(3, 7, 8)}, "do not broadcast"),
        ({"attn_mask": torch.zeros(5, 6)}, r"mask is \[5, 6\]; it must broadcast to \[5, 7\]"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int32)}, "mask is torch.int32"),
        ({"value": torch.zeros(7, 4).half()}, "float16, torch.float32"),
        ({"value": torch.zeros(7, 257)}, "wider than 256"),
        ({"query": torch.zeros(5, 8, requires_grad=True)}, "no gradient"),
    ],
)
def test_it_names_what_does_not_fit(change: dict, message: str) -> None:
    given = {"query": torch.zeros(5, 8), "key": torch.zeros(7, 8), "value": torch.zeros(7, 4)} | change
    placed = {n: t.to(DEVICE) for n, t in given.items()}
    with pytest.raises(AquabitError, match=message):
        triton_attention(**placed)


def test_tensors_elsewhere_are_refused() -> None:
    q, k, v = drawn(5, 7, 8, 4)
    assert triton_attention_refuses(*(t.to(DEVICE) for t in (q, k, v))) is None
    if DEVICE == "cuda":
        assert "a tensor is on cpu" in str(triton_attention_refuses(q, k, v))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(256, 256, 72, 72), (1024, 77, 64, 64), (1024, 1024, 128, 128), (300, 500, 160, 160)], ids=str
)
def test_heads_of_real_models(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(*drawn(*sizes, 1, 2, dtype=dtype))
    check(*drawn(*sizes, 1, 2, dtype=dtype), noise(sizes[1], seed=5).expand(sizes[0], -1) > -0.5)

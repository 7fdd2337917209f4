"""Attention with rounded probabilities: the kernel and its reference against float64, on odd shapes, masks,
types and strides."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from aquabit.kernels import (
    attention,
    fake_quantize,
    fake_quantize_reference,
    rounded_attention,
    rounded_attention_reference,
)
from aquabit.kernels.attention import attention_levels
from aquabit.kernels.extension import native
from aquabit.scheme import AquabitError

LEVELS = attention_levels()
INTEGERS = ("amx", "avx512vnni", "avxvnni")  # whose products of Q and K are those of integers
needs_native = pytest.mark.skipif(not LEVELS, reason="the C++ extension was not built")
every_level = pytest.mark.parametrize("level", LEVELS)
# queries, keys, columns of q and k, columns of v
SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 64, 64),
    (9, 1, 40, 33),
    (5, 16, 8, 24),
    (16, 16, 32, 32),
    (33, 77, 72, 72),
    (70, 129, 40, 40),
    (64, 257, 33, 100),
    (130, 300, 128, 64),
    (3, 1030, 17, 5),
]
# By norm. In float64 one step of the grid is 4e-3 of the largest probability; where float32 rounds to another
# point than float64 does, a result is that much off.
CLOSE = {torch.float32: 5e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inputs(leading: tuple[int, ...], shape: tuple[int, int, int, int], spread: float = 2.0) -> list[Tensor]:
    n, m, d, e = shape
    rng = torch.Generator().manual_seed(n + 7 * m + 31 * d)
    made = [torch.randn(*leading, rows, columns, generator=rng) for rows, columns in ((n, d), (m, d), (m, e))]
    return [spread * made[0], made[1], made[2] + 0.5]


def in_float64(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Exponentials over their sum, at 255 steps from the least to the largest of each query, times v."""
    scores = q.double() @ k.double().mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        added = torch.zeros(mask.shape, dtype=torch.float64)
        added = added.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.double()
        scores = scores + added
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    p = e / e.sum(-1, keepdim=True)
    low, high = p.amin(-1, keepdim=True), p.amax(-1, keepdim=True)
    step = (high - low) / 255
    start = torch.round(low / step)
    rounded = torch.clamp(torch.round(p / step), start, start + 255) * step
    return torch.where(step > 1e-12, rounded, p) @ v.double()


def gap(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@needs_native
@every_level
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_level_on_odd_shapes(level: str, shape: tuple[int, int, int, int]) -> None:
    q, k, v = inputs((2, 3), shape)
    assert gap(rounded_attention(q, k, v, level=level), in_float64(q, k, v)) < CLOSE[torch.float32]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_on_odd_shapes(shape: tuple[int, int, int, int]) -> None:
    q, k, v = inputs((2, 3), shape)
    made = rounded_attention_reference(q, k, v, None, 1 / math.sqrt(shape[2]))
    assert gap(made, in_float64(q, k, v)) < CLOSE[torch.float32]


def test_it_rounds() -> None:
    """What rounding does to a result is far more than what a kernel may be off."""
    q, k, v = inputs((2,), (64, 256, 64, 64))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert gap(plain, in_float64(q, k, v)) > 5 * CLOSE[torch.float32]


MASKS = {
    "keys": lambda b, h, n, m: torch.rand(b, 1, 1, m) > 0.3,
    "queries and keys": lambda b, h, n, m: torch.rand(b, 1, n, m) > 0.3,
    "of all heads": lambda b, h, n, m: torch.rand(n, m) > 0.3,
    "added": lambda b, h, n, m: torch.randn(b, 1, 1, m),
    "added, each head": lambda b, h, n, m: torch.randn(b, h, n, m),
    "added, bfloat16": lambda b, h, n, m: torch.randn(1, h, n, m).bfloat16(),
    "added, float16": lambda b, h, n, m: torch.randn(n, m).half(),
    "added, infinite": lambda b, h, n, m: torch.where(torch.rand(b, 1, n, m) > 0.5, 0.3, -torch.inf),
    "transposed": lambda b, h, n, m: torch.randn(m, n).mT,
    "of no key": lambda b, h, n, m: torch.randn(b, h, n, 1),
}


@needs_native
@every_level
@pytest.mark.parametrize("kind", MASKS)
def test_masks(level: str, kind: str) -> None:
    torch.manual_seed(0)
    for shape in ((35, 77, 40, 40), (4, 150, 16, 16)):
        q, k, v = inputs((2, 3), shape)
        mask = MASKS[kind](2, 3, *shape[:2])
        if mask.shape[-1] > 1:
            mask[..., 0] = True if mask.dtype == torch.bool else 0.25  # every query sees a key
        expected = in_float64(q, k, v, mask.float() if mask.is_floating_point() else mask)
        assert gap(rounded_attention(q, k, v, mask, level=level), expected) < CLOSE[torch.float32]
        reference = rounded_attention_reference(q, k, v, mask, shape[2] ** -0.5)
        assert gap(reference, expected) < CLOSE[torch.float32]


@needs_native
@every_level
def test_a_query_that_sees_nothing_is_nan_and_no_other(level: str) -> None:
    q, k, v = inputs((2,), (9, 33, 16, 16))
    seen = torch.ones(9, 33, dtype=torch.bool)
    seen[4] = False
    for mask in (seen, torch.zeros(9, 33).masked_fill(~seen, -torch.inf)):
        y = rounded_attention(q, k, v, mask, level=level)
        assert y[:, 4].isnan().all()
        others = [i for i in range(9) if i != 4]
        assert gap(y[:, others], in_float64(q, k, v)[:, others]) < CLOSE[torch.float32]
    added = torch.zeros(9, 33)
    added[2, 5], added[7, 32] = torch.nan, torch.inf
    y = rounded_attention(q, k, v, added, level=level)
    assert y.isnan().any(-1).equal(rounded_attention_reference(q, k, v, added, 0.25).isnan().any(-1))


@needs_native
@every_level
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_not_finite_do_what_they_do_in_torch(level: str, bad: float, which: int) -> None:
    tensors = inputs((2, 2), (20, 40, 16, 16))
    tensors[which][1, 0, 7, 3] = bad
    y = rounded_attention(*tensors, level=level)
    expected = rounded_attention_reference(*tensors, None, 0.25)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert not y[0].isnan().any() and not y[1, 0].isfinite().all()


@needs_native
@every_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(level: str, dtype: torch.dtype) -> None:
    """Widened, so that only the result is rounded: half a unit in the last place."""
    for shape in ((33, 77, 40, 40), (5, 9, 33, 17)):
        q, k, v = (x.to(dtype) for x in inputs((2, 3), shape))
        y = rounded_attention(q, k, v, level=level)
        assert y.dtype == dtype and gap(y, in_float64(q, k, v)) < CLOSE[dtype]
        wide = rounded_attention(q.float(), k.float(), v.float(), level=level)
        assert torch.equal(y, wide.to(dtype))


@needs_native
@every_level
def test_strides_change_nothing(level: str) -> None:
    q, k, v = inputs((2, 3), (21, 50, 24, 40))
    mask = torch.randn(2, 1, 1, 50)
    expected = rounded_attention(q, k, v, mask, level=level)
    assert expected.transpose(1, 2).is_contiguous()  # heads are joined without a copy
    side_by_side = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.cat([k, v], -1)
    for strided in (
        side_by_side,
        [x.mT.contiguous().mT for x in (q, k, v)],
        [q, fused[..., :24], fused[..., 24:]],
        [torch.stack([x, x + 1], 2)[:, :, 0] for x in (q, k, v)],
    ):
        assert torch.equal(rounded_attention(*strided, mask, level=level), expected)
    doubled = torch.stack([mask, mask], -1)[..., 0]
    assert torch.equal(rounded_attention(q, k, v, doubled, level=level), expected)


@needs_native
def test_leading_dimensions_are_broadcast() -> None:
    q, k, v = inputs((2, 3), (10, 20, 16, 16))
    for lead in ((), (3,), (1, 3), (2, 1)):
        own = k[0, 0] if lead == () else k[0] if lead == (3,) else k[: lead[0], : lead[1]]
        y = rounded_attention(q, own, v)
        assert y.shape == (2, 3, 10, 16)
        assert gap(y, in_float64(q, own, v)) < CLOSE[torch.float32]
    assert rounded_attention(q[0, 0], k[0, 0], v[0, 0]).shape == (10, 16)
    more = torch.randn(4, 1, 10, 20)
    assert gap(rounded_attention(q[0], k[0], v[0], more), in_float64(q[0], k[0], v[0], more)) < 5e-4
    five = rounded_attention(*(x[:, None].expand(2, 2, 3, *x.shape[-2:]) for x in (q, k, v)))
    assert torch.equal(five[:, 1], rounded_attention(q, k, v))


def on_grids(
    leading: tuple[int, int], shape: tuple[int, int, int, int], act: Any, shift: float = 0.0
) -> list[Tensor]:
    """Q and K as layers round them, a grid for each token over all its heads, which lie side by side."""
    found = []
    for x, rounded in zip(inputs(leading, shape), (True, True, False), strict=True):
        tokens = (x + shift).transpose(1, 2).flatten(2).contiguous()
        tokens = fake_quantize(tokens, act) if rounded else tokens
        found.append(tokens.view(leading[0], tokens.shape[1], leading[1], -1).transpose(1, 2))
    return found


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the extension said of each call: 2 where Q and K were multiplied as integers."""
    said: list[int] = []

    class Told:
        def attention(self, *given: Any) -> int:
            said.append(native.attention(*given))
            return said[-1]

    monkeypatch.setattr(attention, "_native", Told())
    return said


@needs_native
@every_level
@pytest.mark.parametrize("act", [8, 6, "i8"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] >= 64 and s[2] > 5], ids=str)
def test_rounded_q_and_k_are_multiplied_as_integers(
    level: str, shape: tuple[int, int, int, int], act: Any, multiplied: list[int]
) -> None:
    q, k, v = on_grids((2, 3), shape, act)
    assert gap(rounded_attention(q, k, v, level=level), in_float64(q, k, v)) < CLOSE[torch.float32]
    assert multiplied == [2 if level in INTEGERS else 1]


@needs_native
@every_level
def test_grids_far_from_zero_masks_and_constant_tokens(level: str, multiplied: list[int]) -> None:
    torch.manual_seed(0)
    for shift in (3.0, -5.0):
        q, k, v = on_grids((2, 3), (35, 77, 40, 40), 8, shift)
        k = k.contiguous().transpose(1, 2).contiguous().transpose(1, 2)
        k[:, :, 5], k[:, :, 7], q[:, :, 3] = 0.0, 0.25, 0.0
        mask = MASKS["queries and keys"](2, 3, 35, 77)
        made = rounded_attention(q, k, v, mask, level=level)
        assert gap(made, in_float64(q, k, v, mask)) < CLOSE[torch.float32]
    assert multiplied == [2 if level in INTEGERS else 1] * 2


@needs_native
@every_level
@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
def test_one_value_beside_its_grid_is_not_moved_to_it(level: str, which: int, multiplied: list[int]) -> None:
    given = on_grids((1, 2), (70, 129, 40, 40), 8)
    given[which][0, 1, 60, 11] += 0.4 * (given[which].amax() - given[which].amin()) / 255
    assert gap(rounded_attention(*given, level=level), in_float64(*given)) < CLOSE[torch.float32]
    given[which][0, 1, 60, 11] = torch.nan
    torch.testing.assert_close(
        rounded_attention(*given, level=level).isnan(), in_float64(*given).float().isnan()
    )
    assert 2 not in multiplied and len(multiplied) == 2


@needs_native
@every_level
def test_a_sample_does_not_depend_on_grids_of_others(level: str, multiplied: list[int]) -> None:
    q, k, v = on_grids((3, 2), (70, 129, 40, 40), 8)
    apart = [x.contiguous().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart[0][1, 0, 33, 7] += 0.3 * (q.amax() - q.amin()) / 255
    made = rounded_attention(*apart, level=level)
    assert torch.equal(made[[0, 2]], rounded_attention(q, k, v, level=level)[[0, 2]])
    alone = [x[1:2] for x in apart]
    assert torch.equal(made[1:2], rounded_attention(*alone, level=level))
    assert multiplied == [1, 2 if level in INTEGERS else 1, 1]


@needs_native
@every_level
def test_equal_scores_round_nothing(level: str) -> None:
    _, k, v = inputs((2,), (1, 50, 16, 24))
    y = rounded_attention(torch.zeros(2, 5, 16), k, v, level=level)
    assert gap(y, v.double().mean(-2, keepdim=True).expand(2, 5, 24)) < 1e-4
    one = rounded_attention(torch.randn(2, 5, 16), k[:, :1], v[:, :1], level=level)
    assert gap(one, v[:, :1].double().expand(2, 5, 24)) < 1e-4
    # Nearly so: the least probability is thousands of steps from zero.
    q = torch.full((2, 5, 16), 1e-4)
    assert gap(rounded_attention(q, k, v, level=level), in_float64(q, k, v)) < 1e-4


@needs_native
@every_level
def test_large_and_small_values(level: str) -> None:
    for shift, spread in ((0.0, 100.0), (1e4, 1e-3)):
        q, k, v = inputs((2,), (12, 40, 16, 16), spread)
        made = rounded_attention(q, k, v + shift, level=level)
        assert gap(made, in_float64(q, k, v + shift)) < CLOSE[torch.float32]
    q, k, v = inputs((2,), (12, 40, 16, 16))
    for factor in (1e-30, 1e29, 1e36):
        assert gap(rounded_attention(q, k, v * factor, level=level), in_float64(q, k, v * factor)) < 5e-4
    assert gap(rounded_attention(q, k, v, scale=-0.7, level=level), in_float64(q, k, v, scale=-0.7)) < 5e-4
    outlier = v.clone()
    outlier[:, 3, 5] = 1e4
    assert gap(rounded_attention(q, k, outlier, level=level), in_float64(q, k, outlier)) < 5e-4


@needs_native
@every_level
def test_threads_and_blocks_change_nothing(level: str, two_threads: None) -> None:
    q, k, v = inputs((1, 3), (301, 200, 40, 40))
    mask = torch.rand(1, 1, 301, 200) > 0.2
    mask[..., 0] = True
    two = rounded_attention(q, k, v, mask, level=level)
    torch.set_num_threads(1)
    one = rounded_attention(q, k, v, mask, level=level)
    assert torch.equal(one, two)
    rows = [
        rounded_attention(q[..., i : i + 7, :], k, v, mask[..., i : i + 7, :], level=level)
        for i in range(0, 301, 7)
    ]
    assert torch.equal(torch.cat(rows, -2), one)
    torch.set_num_threads(16)
    assert torch.equal(rounded_attention(q[:, :1], k[:, :1], v[:, :1], mask, level=level), one[:, :1])


def test_empty() -> None:
    made = rounded_attention(torch.ones(2, 3, 0, 4), torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5, 6))
    assert made.shape == (2, 3, 0, 6)
    made = rounded_attention(torch.ones(2, 3, 4), torch.ones(2, 0, 4), torch.ones(2, 0, 6))
    assert torch.equal(made, torch.zeros(2, 3, 6))
    assert rounded_attention(torch.ones(0, 3, 4), torch.ones(0, 5, 4), torch.ones(0, 5, 6)).shape == (0, 3, 6)
    made = rounded_attention(torch.ones(2, 3, 0), torch.ones(2, 5, 0), torch.arange(10.0).view(2, 5, 1))
    torch.testing.assert_close(made, torch.tensor([2.0, 7.0]).view(2, 1, 1).expand(2, 3, 1))


def test_gradients_pass_the_rounding() -> None:
    q, k, v = (x.requires_grad_() for x in inputs((2,), (9, 20, 16, 16), 1.0))
    y = rounded_attention(q, k, v)
    assert y.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(rounded_attention(q, k, v), y, rtol=2e-3, atol=2e-3)
    gradient = torch.randn(y.shape)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ours, theirs = (torch.autograd.grad(x, [q, k, v], gradient) for x in (y, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_double_precision_is_the_reference() -> None:
    q, k, v = (x.double() for x in inputs((2,), (9, 20, 16, 16)))
    assert gap(rounded_attention(q, k, v), in_float64(q, k, v)) < 1e-12


@needs_native
@pytest.mark.parametrize("mask", [None, torch.rand(2, 1, 1, 9) > 0.1, torch.randn(5, 9)])
def test_opcheck(mask: Tensor | None) -> None:
    op = torch.ops.aquabit.rounded_attention.default
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in inputs((2, 3), (5, 9, 16, 8)))
        torch.library.opcheck(op, (q, k, v, mask, 0.25, 0))
    torch.library.opcheck(op, (q[:, 0], k[:, 0], v[:, 0], None, 0.25, 0))


@needs_native
def test_traces_without_a_graph_break() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return rounded_attention(q * 2, k, v, mask).transpose(1, 2).flatten(2) + 1

    q, k, v = inputs((2, 3), (10, 20, 16, 16))
    mask = torch.rand(2, 1, 1, 20) > 0.1
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, mask), attend(q, k, v, mask))


@needs_native
def test_meta_tensors_hold_no_scores() -> None:
    q, k, v = (torch.empty(1, 8, 1 << 20, 64, device="meta") for _ in range(3))
    y = rounded_attention(q, k, v)
    assert y.shape == q.shape and y.device.type == "meta" and y.transpose(1, 2).is_contiguous()


def test_grids_of_probabilities_are_those_of_activations() -> None:
    """V of the identity: the rounded probabilities themselves."""
    q, k, _ = inputs((2,), (12, 30, 16, 16))
    exact = (q @ k.mT * 0.25).softmax(-1)
    made = rounded_attention(q, k, torch.eye(30).expand(2, 30, 30))
    off = (made - fake_quantize_reference(exact, 8)).abs()
    step = (exact.amax(-1) - exact.amin(-1)) / 255
    assert (off < 0.01 * step[..., None]).float().mean() > 0.995  # a few lie between two points
    assert (off < 1.01 * step[..., None]).all()


def test_the_reference_takes_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs((2, 3), (9, 11, 4, 4))
    mask = torch.randn(2, 1, 9, 11)
    whole = rounded_attention_reference(q, k, v, mask, 0.5)
    monkeypatch.setattr(attention, "SCORES_LIMIT", 2 * 3 * 11 * 2)
    torch.testing.assert_close(rounded_attention_reference(q, k, v, mask, 0.5), whole)


ONES = torch.ones
BAD: list[tuple[tuple[Any, ...], str]] = [
    ((ONES(3, 4), ONES(5, 6), ONES(5, 4)), r"not q \[3, 4\], k \[5, 6\]"),
    ((ONES(3, 4), ONES(5, 4), ONES(6, 4)), r"v \[6, 4\]"),
    ((ONES(4), ONES(5, 4), ONES(5, 4)), r"not q \[4\]"),
    ((ONES(3, 4), ONES(5, 4).half(), ONES(5, 4)), "one floating-point type"),
    ((ONES(3, 4, dtype=torch.int32),) + (ONES(5, 4, dtype=torch.int32),) * 2, "torch.int32"),
    ((ONES(2, 3, 4), ONES(3, 5, 4), ONES(5, 4)), "leading dimensions"),
    ((ONES(3, 4), ONES(5, 4), ONES(5, 4), ONES(5)), r"\[.., n, m\], not \[5\]"),
    ((ONES(3, 4), ONES(5, 4), ONES(5, 4), ONES(2, 5)), r"mask of 3 queries and 5 keys"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_named(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(AquabitError, match=said):
        rounded_attention(*arguments)


@needs_native
def test_levels_are_named() -> None:
    q, k, v = inputs((), (3, 4, 5, 6))
    with pytest.raises(AquabitError, match=r"this machine has .*baseline"):
        rounded_attention(q, k, v, level="neon")
    with pytest.raises(AquabitError, match="does not serve"):
        rounded_attention(q.double(), k.double(), v.double(), level="baseline")


def test_without_the_extension_the_reference_serves() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "sys.modules['aquabit.kernels._native'] = None\n"
        "import torch; from aquabit.kernels import rounded_attention, rounded_attention_reference\n"
        "q, k, v = (torch.randn(2, 5, 4) for _ in range(3))\n"
        "assert torch.equal(rounded_attention(q, k, v), rounded_attention_reference(q, k, v, None, 0.5))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("amx" not in LEVELS, reason="the processor has no tiles")
@pytest.mark.parametrize("grid", [None, 8, 6, "i8"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] >= 64 and s[2] > 5], ids=str)
def test_tiles_are_the_same_to_the_bit(shape: tuple[int, int, int, int], grid: Any) -> None:
    q, k, v = inputs((2, 3), shape) if grid is None else on_grids((2, 3), shape, grid)
    mask = MASKS["queries and keys"](2, 3, shape[0], shape[1])
    for given in ((q, k, v), (q, k, v, mask)):
        tiles, without = (rounded_attention(*given, level=level) for level in ("amx", "avx512vnni"))
        assert torch.equal(tiles, without)
    narrow = [x.bfloat16() for x in (q, k, v)]  # multiplied as they are, and added in another order
    tiles, without = (rounded_attention(*narrow, level=level) for level in ("amx", "avx512vnni"))
    assert gap(tiles, without.double()) < 2e-3
    assert torch.equal(tiles[1:], rounded_attention(*(x[1:] for x in narrow), level="amx"))

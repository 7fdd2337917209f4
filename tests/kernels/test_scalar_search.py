"""The output-aware scalar quantizers' code search: the extension against its reference, brute force and
laws."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquabit.kernels import scalar_search
from aquabit.kernels.scalar_search import (
    BLOCK,
    Backend,
    Descended,
    Even,
    Fed,
    Levels,
    Table,
    descend,
    feed,
    select,
)
from aquabit.scheme import AquabitError

_extension = scalar_search._native
NAMES: list[str] = _extension.scalar_levels() if hasattr(_extension, "scalar_levels") else []
needs_native = pytest.mark.skipif(not NAMES, reason="the C++ extension was not built")
both = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "reference"])
unhurried = settings(deadline=None, max_examples=60)
KINDS = ("even", "parts", "table", "tables")


class Case(NamedTuple):
    """Columns with their H and levels, all of them whole multiples of powers of two so small that every sum
    is exact in float32, and a diagonal of powers of two, so that quotients are too: then neither the order of
    additions matters nor what a compiler fuses, and backends agree to the bit, ties included."""

    weight: Tensor
    hessian: Tensor
    gain: Tensor
    mass: Tensor
    levels: Levels

    @property
    def codes(self) -> Tensor:
        return self.levels.encoded(self.weight, slice(None))[1].contiguous()

    def product(self, codes: Tensor) -> Tensor:
        return self.hessian @ (self.weight - self.levels.decoded(codes))

    def losses(self, codes: Tensor) -> Tensor:
        left = (self.weight - self.levels.decoded(codes)).double()
        return ((self.hessian.double() @ left) * left).sum(1)


def whole(random: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=random).float()


def case(groups: int, row: int, outputs: int, kind: str, levels: int = 8, *, seed: int = 0) -> Case:
    random = torch.Generator().manual_seed(seed)
    weight = whole(random, -24, 24, groups, row, outputs) / 4
    inputs = whole(random, -1, 1, groups, 6, row)
    hessian = inputs.transpose(1, 2) @ inputs + torch.eye(row) * 2.0 ** torch.randint(
        0, 3, (groups, row, 1), generator=random
    )
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    hessian = hessian + torch.diag_embed(2.0 ** diagonal.log2().ceil() - diagonal)
    hessian[:, :, :1] *= seed % 3 > 0  # an input that never is
    hessian[:, :1] *= seed % 3 > 0
    gain = whole(random, -1, 1, groups, row, row) / 4
    if kind.startswith("table"):
        tables = (groups, outputs) if kind == "tables" else (1, 1)
        steps = whole(random, 0, 4, tables[0], levels, tables[1])
        found: Levels = Table((steps.cumsum(1) - 2 * levels) / 2)
    else:
        n = 3 if kind == "parts" else 1
        scale = 2.0 ** torch.randint(-1, 2, (groups, n, outputs), generator=random)
        scale *= whole(random, -1, 1, groups, n, outputs)  # 0 and negative ones too
        part = torch.randint(n, (groups, row), generator=random)
        found = Even(scale, whole(random, -4, 4, groups, n, outputs), part, levels - 1)
    return Case(weight, hessian, gain.tril(-1), hessian.diagonal(dim1=1, dim2=2).contiguous(), found)


cases = st.builds(
    case,
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 9, 16, 17]),
    st.sampled_from([1, 3, 8, 17, 70, 130]),
    st.sampled_from(KINDS),
    st.sampled_from([2, 3, 8, 16, 256]),
    seed=st.integers(0, 10**6),
)


def fed(c: Case, backend: Backend | None = None) -> Fed:
    return feed(c.weight, c.gain, c.mass, c.levels, backend=backend)


def descended(c: Case, sweeps: int = 1, backend: Backend | None = None) -> Descended:
    codes = c.codes
    return descend(
        codes, c.product(codes), c.losses(codes), c.hessian, c.levels, sweeps, 0.0, backend=backend
    )


def same(a: Fed | Descended, b: Fed | Descended) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def nearest(levels: Levels, j: int, g: int, p: int) -> Tensor:
    """All levels of one weight."""
    if isinstance(levels, Table):
        return levels.values.expand(max(g + 1, len(levels.values)), -1, max(p + 1, levels.values.shape[2]))[
            g, :, p
        ]
    part = levels.part[g, j]
    return levels.offset[g, part, p] + levels.scale[g, part, p] * torch.arange(levels.steps + 1)


@both
@unhurried
@given(c=cases)
def test_feedback_takes_the_nearest_level_to_each_target(backend: Backend, c: Case) -> None:
    """One weight at a time, independent of the implementation."""
    found, change = fed(c, backend), torch.zeros_like(c.weight)
    loss = torch.zeros_like(found.loss)
    for g, p in product(range(len(c.weight)), range(min(c.weight.shape[2], 4))):
        for j in range(c.weight.shape[1]):
            target = c.weight[g, j, p] + c.gain[g, j] @ change[g, :, p]
            levels = nearest(c.levels, j, g, p)
            level = levels[int(found.codes[g, j, p])]
            assert (target - level).abs() == (target - levels).abs().min()
            change[g, j, p] = c.weight[g, j, p] - level
            loss[g, p] += c.mass[g, j] * (target - level) ** 2
        assert torch.equal(found.change[g, :, p], change[g, :, p])
        assert float(found.loss[g, p]) == pytest.approx(float(loss[g, p]), rel=1e-6)


@needs_native
@unhurried
@given(c=cases, sweeps=st.integers(1, 3))
def test_the_extension_equals_the_reference(c: Case, sweeps: int) -> None:
    ours, theirs = (fed(c, b) for b in ("native", "reference"))
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.change, theirs.change)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    ours, theirs = (descended(c, sweeps, b) for b in ("native", "reference"))
    assert torch.equal(ours.product, theirs.product)
    assert torch.equal(c.levels.decoded(ours.codes), c.levels.decoded(theirs.codes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_equals_the_reference(name: str, kind: str) -> None:
    c, level = case(2, 2 * BLOCK + 9, 37, kind), NAMES.index(name)
    codes, empty = c.codes, Fed(c.codes, torch.zeros_like(c.weight), torch.zeros(2, 37, dtype=torch.float64))
    call = scalar_search._Feed(
        c.weight, c.weight, c.gain, c.mass, *empty, levels=scalar_search._plain(c.levels)
    )
    scalar_search._feed_natively(call._replace(stop=BLOCK), level)
    assert torch.equal(empty.change[:, :BLOCK], fed(c, "reference").change[:, :BLOCK])
    inverse = torch.where(c.mass > 0, 1 / c.mass, 0.0)
    ours = Descended(codes, c.product(codes), c.losses(codes))
    descent = scalar_search._Descent(c.hessian, inverse, *ours, scalar_search._plain(c.levels), 1, 0.0)
    scalar_search._call(_extension.scalar_descend, descent, level)
    assert torch.equal(ours.product, descended(c, 1, "reference").product)


@both
@unhurried
@given(c=cases, sweeps=st.integers(0, 3))
def test_descent_keeps_its_books_and_never_raises_a_loss(backend: Backend, c: Case, sweeps: int) -> None:
    found = descended(c, sweeps, backend)
    assert torch.equal(found.product, c.product(found.codes))
    torch.testing.assert_close(found.loss, c.losses(found.codes), rtol=1e-6, atol=1e-4)
    assert bool((c.losses(found.codes) <= c.losses(c.codes)).all())


@both
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_end_no_change_of_one_code_lowers_a_loss(backend: Backend, kind: str) -> None:
    c = case(1, 12, 5, kind, seed=1)
    codes = descended(c, 50, backend).codes
    best = c.losses(codes)
    for j, p, k in product(range(12), range(5), range(8)):
        other = codes.clone()
        other[0, j, p] = k
        assert bool((c.losses(other) >= best).all())


@both
def test_a_row_that_gains_little_gets_no_other_sweep(backend: Backend) -> None:
    c = case(1, 40, 9, "even", seed=1)
    codes = c.codes
    books = codes, c.product(codes), c.losses(codes), c.hessian, c.levels
    once, often = (descend(*books, sweeps, 0.0, backend=backend) for sweeps in (1, 9))
    assert not same(once, often)
    assert same(once, descend(*books, 9, 1.0, backend=backend))


@both
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_stay_as_they_are(backend: Backend, kind: str) -> None:
    c = case(2, BLOCK + 3, 5, kind)
    codes = c.codes
    given_ = (c.weight, c.gain, c.mass, c.hessian, codes, c.product(codes), c.losses(codes))
    before = [t.clone() for t in given_]
    fed(c, backend)
    descend(*given_[4:], c.hessian, c.levels, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(given_, before, strict=True))


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    c = case(3, BLOCK + 7, 150, kind)
    c = c._replace(weight=torch.randn(c.weight.shape, generator=random))  # sums that rounding does touch
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            codes, start, losses = c.codes, c.weight.clone(), torch.ones(3, 150, dtype=torch.float64)
            call = scalar_search._Feed(
                c.weight, start, c.gain, c.mass, codes, torch.zeros_like(start), losses, c.levels, 0, BLOCK
            )
            scalar_search._feed_natively(call)
            found.append([*call[4:7], *descend(codes, start, losses, c.hessian, c.levels, 4)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@both
def test_what_is_not_finite_ends(backend: Backend) -> None:
    c = case(1, 9, 5, "table")
    weight = c.weight.clone()
    weight[0, 3, 2] = torch.nan
    found = feed(weight, c.gain, c.mass, c.levels, backend=backend)
    assert torch.equal(found.codes[..., :2], fed(c, backend).codes[..., :2]), "other rows do not hear of it"
    books = c.codes, c.product(c.codes) * torch.nan, c.losses(c.codes), c.hessian, c.levels
    assert torch.equal(descend(*books, 3, backend=backend).codes, c.codes)


@needs_native
def test_refusals() -> None:
    c = case(2, 5, 3, "even")
    assert isinstance(c.levels, Even)
    with pytest.raises(AquabitError, match=r"gain is torch\.float32"):
        feed(c.weight, torch.zeros(2, 4, 5), c.mass, c.levels)
    with pytest.raises(AquabitError, match="part is not one of 1"):
        feed(c.weight, c.gain, c.mass, c.levels._replace(part=c.levels.part + 1))
    with pytest.raises(AquabitError, match="steps are not 1 to 255"):
        feed(c.weight, c.gain, c.mass, c.levels._replace(steps=256))
    with pytest.raises(AquabitError, match="a code is not below 8"):
        descend(c.codes + 8, c.weight, torch.zeros(2, 3), c.hessian, c.levels)
    with pytest.raises(AquabitError, match="tables"):
        feed(c.weight, c.gain, c.mass, Table(torch.zeros(2, 8, 2)))
    with pytest.raises(AquabitError, match=r"weight is \[5, 3\]"):
        scalar_search._feed_natively(
            scalar_search._Feed(*[c.weight[0]] * 6, torch.zeros(2, 3), c.levels)  # type: ignore[arg-type]
        )


def test_select() -> None:
    weight = torch.zeros(1, 2, 3)
    assert select(None, weight) == ("native" if NAMES else "reference")
    assert select(None, weight.double()) == "reference"
    with pytest.raises(AquabitError, match="float32 on a CPU" if NAMES else "needs the C"):
        select("native", weight.double())
    with pytest.raises(AquabitError, match="is unknown"):
        select("fast", weight)  # type: ignore[arg-type]


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalar_search, "_native", None)
    assert select(None, torch.zeros(1, 2, 3)) == "reference"
    with pytest.raises(AquabitError, match="needs the C\\+\\+ extension"):
        select("native", torch.zeros(1, 2, 3))

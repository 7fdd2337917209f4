"""The additive quantizer's code search: the extension against its reference, brute force and laws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquabit.kernels import additive_search
from aquabit.kernels.additive_search import Backend, Found, Problem, feedback_search, select, sweep_search
from aquabit.scheme import AquabitError

_extension = additive_search._native
LEVELS: list[str] = _extension.additive_levels() if hasattr(_extension, "additive_levels") else []
needs_native = pytest.mark.skipif(not LEVELS, reason="the C++ extension was not built")
both = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "reference"])
unhurried = settings(deadline=None, max_examples=60)


class Case(NamedTuple):
    """Rows, H as [Z, R, R], what it takes to search them, and codes to start from."""

    weight: Tensor
    hessian: Tensor
    tables: Tensor
    scale: Tensor
    codes: Tensor

    @property
    def metric(self) -> Tensor:
        g = self.tables.shape[3]
        return torch.stack(
            [self.hessian[:, i : i + g, i : i + g] for i in range(0, self.weight.shape[2], g)], 1
        )


def case(
    blocks: int,
    rows: int,
    groups: int,
    size: int,
    sets: int = 1,
    codebooks: int = 2,
    codewords: int = 16,
    *,
    seed: int = 0,
    diagonal: bool = False,
) -> Case:
    """Correlated inputs, and tables about as large as the weights."""
    random = torch.Generator().manual_seed(seed)
    z, r = blocks * sets, groups * size
    inputs = torch.randn(z, 2 * r, r, generator=random) @ torch.randn(z, r, r, generator=random)
    hessian = inputs.transpose(1, 2) @ inputs / (2 * r * r)
    if diagonal:
        hessian = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    weight = torch.randn(z, rows, r, generator=random)
    tables = torch.randn(sets, codebooks, codewords, size, generator=random) / codebooks**0.5
    scale = (torch.rand(z, rows, generator=random) + 0.5) * (
        1 - 2 * torch.randint(2, (z, rows), generator=random)
    )
    return Case(
        weight,
        hessian,
        tables,
        scale,
        torch.randint(codewords, (z, rows, groups, codebooks), generator=random),
    )


cases = st.builds(
    case,
    st.integers(1, 3),
    st.integers(3, 12),
    st.integers(1, 5),
    st.integers(2, 11),
    st.integers(1, 2),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 16, 17, 40, 64]),
    seed=st.integers(0, 10**6),
    diagonal=st.booleans(),
)
beams = st.sampled_from([1, 2, 3, 8, 16, 40])


def decoded(c: Case, codes: Tensor) -> Tensor:
    """One row and group at a time, independent of the implementation."""
    z, o, n, m = codes.shape
    out = torch.zeros_like(c.weight).reshape(z, o, n, -1)
    for i in range(z):
        tables = c.tables[i // (z // len(c.tables))]
        for book in range(m):
            out[i] += tables[book][codes[i, :, :, book]]
    return out.reshape(c.weight.shape) * c.scale[..., None]


def loss(c: Case, found: Tensor) -> Tensor:
    """Of each row, in float64."""
    left = (c.weight - found).double()
    return ((left @ c.hessian.double()) * left).sum(2)


def are_codes(codes: Tensor, codewords: int) -> bool:
    return bool(((codes >= 0) & (codes < codewords)).all())


def swept(
    c: Case, beam: int, backend: Backend | None = None, level: int | None = None, coupled: bool = True
) -> Found:
    before = decoded(c, c.codes)
    h = c.hessian if coupled else torch.stack([torch.block_diag(*blocks) for blocks in c.metric])
    gradient, coupling = (c.weight - before) @ h, c.hessian if coupled else None
    if level is not None:
        return additive_search._search_natively(
            gradient, Problem(c.metric, c.tables, c.scale, coupling, beam), before, c.codes, level=level
        )
    return sweep_search(
        gradient, before, c.codes, c.metric, c.tables, c.scale, beam, coupling=coupling, backend=backend
    )


class Feedback(NamedTuple):
    upper: Tensor
    inverse: Tensor
    metric: Tensor


def feedback_of(c: Case) -> Feedback:
    """What error feedback needs, as the quantizer computes it, with a jitter that keeps H^-1 small."""
    r, g = c.weight.shape[2], c.tables.shape[3]
    jitter = 0.1 * c.hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(r)
    upper = torch.linalg.cholesky(torch.linalg.inv((c.hessian + jitter).double()), upper=True).float()
    inverse = torch.stack([torch.linalg.inv(upper[:, i : i + g, i : i + g]) for i in range(0, r, g)], 1)
    return Feedback(upper, inverse, inverse @ inverse.transpose(2, 3))


def fed(c: Case, beam: int, backend: Backend | None = None, level: int | None = None) -> Found:
    f = feedback_of(c)
    if level is not None:
        return additive_search._search_natively(
            c.weight, Problem(f.metric, c.tables, c.scale, f.upper, beam), inverse=f.inverse, level=level
        )
    return feedback_search(
        c.weight, f.metric, c.tables, c.scale, beam, inverse=f.inverse, coupling=f.upper, backend=backend
    )


def quadratic(metric: Tensor, rows: Tensor) -> Tensor:
    """x metric_n x^T of each group x, [Z, O, n], in float64."""
    groups = rows.double().reshape(*rows.shape[:2], metric.shape[1], -1)
    return torch.einsum("zoni,znij,zonj->zon", groups, metric.double(), groups)


def rounding(metric: Tensor, c: Case) -> Tensor:
    """What sums of products round to in float32, of each row's group, from the squares of weights and of
    the largest codewords."""
    codewords = c.tables.square().sum(3).amax(2).sum(1).repeat_interleave(len(c.weight) // len(c.tables))
    trace = metric.diagonal(dim1=2, dim2=3).sum(2)
    return 1e-6 * (
        quadratic(metric, c.weight) + (c.scale.square() * codewords[:, None])[..., None] * trace[:, None]
    )


def same_up_to_ties(
    found: Found, reference: Found, cost: Tensor, of_reference: Tensor, rounding: Tensor
) -> Tensor:
    """Rows [Z, O] that are the same up to the first group whose codes differ, if any, where both cost the
    same, up to rounding."""
    differs = (found.codes != reference.codes).any(3)
    before, first = differs.cumsum(2) == 0, differs & (differs.cumsum(2) == 1)
    moved = (
        torch.isclose(found.moved, reference.moved, rtol=1e-3, atol=1e-3).reshape(*differs.shape, -1).all(3)
    )
    as_good = (cost - of_reference).abs() <= rounding + 1e-5 * of_reference
    return ((moved | ~before) & (as_good | ~first)).all(2)


def swept_alike(c: Case, found: Found, reference: Found) -> Tensor:
    def costs(codes: Tensor) -> Tensor:
        """The loss after each group, those behind it as they were."""
        groups = torch.arange(codes.shape[2])[:, None]
        return torch.stack(
            [loss(c, decoded(c, torch.where(groups <= n, codes, c.codes))) for n in range(codes.shape[2])], 2
        )

    return same_up_to_ties(
        found,
        reference,
        costs(found.codes),
        costs(reference.codes),
        rounding(c.metric, c).sum(2, keepdim=True),
    )


def fed_alike(c: Case, found: Found, reference: Found) -> Tensor:
    def squares(x: Tensor) -> Tensor:
        return x.double().square().reshape(*found.codes.shape[:3], -1).sum(3)

    return same_up_to_ties(
        found, reference, squares(found.moved), squares(reference.moved), rounding(feedback_of(c).metric, c)
    )


def cost_alike(c: Case, found: Found, reference: Found) -> Tensor:
    """Groups [Z, O, n] that cost the same, where they do not hear of each other."""
    cost, expected = (quadratic(c.metric, c.weight - decoded(c, x.codes)) for x in (found, reference))
    return (cost - expected).abs() <= rounding(c.metric, c) + 1e-5 * expected


def assert_as_reference(
    c: Case,
    search: Callable[..., Found],
    beam: int,
    level: int,
    alike: Callable[[Case, Found, Found], Tensor],
) -> None:
    """Sums that tie for the last place of a beam, up to rounding, may lead to different costs in the end:
    that happens, but rarely."""
    good = alike(c, search(c, beam, level=level), search(c, beam, "reference"))
    assert int((~good).sum()) <= 1 + good.numel() // 50


@needs_native
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@given(c=cases, beam=beams)
@unhurried
def test_sweep_equals_reference(level: int, c: Case, beam: int) -> None:
    assert_as_reference(c, swept, beam, level, swept_alike)


@needs_native
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@given(c=cases, beam=beams)
@unhurried
def test_each_group_costs_what_it_does_in_the_reference(level: int, c: Case, beam: int) -> None:
    """Of groups that do not hear of each other, so that every one can be compared."""
    assert_as_reference(c, partial(swept, coupled=False), beam, level, cost_alike)


@needs_native
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@given(c=cases, beam=beams)
@unhurried
def test_feedback_equals_reference(level: int, c: Case, beam: int) -> None:
    assert_as_reference(c, fed, beam, level, fed_alike)


@needs_native
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize(
    "shape",
    [
        {"blocks": 1, "rows": 33, "groups": 4, "size": 8, "codebooks": 4, "codewords": 16},
        {"blocks": 1, "rows": 130, "groups": 4, "size": 8, "codebooks": 2, "codewords": 256},
        {
            "blocks": 1,
            "rows": 6,
            "groups": 2,
            "size": 8,
            "codebooks": 2,
            "codewords": 256,
        },  # too few rows for products of pairs
        {"blocks": 2, "rows": 7, "groups": 3, "size": 1, "codebooks": 2, "codewords": 4},
        {"blocks": 5, "rows": 1, "groups": 1, "size": 9, "codebooks": 3, "codewords": 64},
        {"blocks": 1, "rows": 20, "groups": 2, "size": 64, "codebooks": 8, "codewords": 16},
        {"blocks": 1, "rows": 4, "groups": 1, "size": 2, "codebooks": 1, "codewords": 65536},
    ],
    ids=str,
)
def test_usual_shapes_equal_reference(level: int, shape: dict[str, int]) -> None:
    c = case(**shape)
    for beam in (1, 8):
        assert_as_reference(c, swept, beam, level, swept_alike)
        assert_as_reference(c, fed, beam, level, fed_alike)


@both
@given(c=cases, beam=beams)
@unhurried
def test_no_change_raises_the_loss(backend: Backend, c: Case, beam: int) -> None:
    found = swept(c, beam, backend)
    before, after = loss(c, decoded(c, c.codes)), loss(c, decoded(c, found.codes))
    assert bool((after <= before * (1 + 1e-5) + 1e-7).all())
    torch.testing.assert_close(found.gain, after - before, rtol=1e-4, atol=1e-4 * float(before.max()))
    torch.testing.assert_close(
        found.moved, decoded(c, found.codes) - decoded(c, c.codes), rtol=1e-4, atol=1e-5
    )


@both
@pytest.mark.parametrize("shared", [False, True])
def test_one_group_is_searched_exactly(backend: Backend, shared: bool) -> None:
    """A beam as wide as there are sums of all codebooks but the last leaves nothing out."""
    c = case(4 if shared else 1, 11, 1, 3, 1 if shared else 4, 3, 4)
    losses = torch.stack(
        [loss(c, decoded(c, torch.tensor(each).expand_as(c.codes))) for each in product(range(4), repeat=3)]
    )
    for found in (
        swept(c, 16, backend),
        feedback_search(c.weight, c.metric, c.tables, c.scale, 16, backend=backend),
    ):
        torch.testing.assert_close(loss(c, decoded(c, found.codes)), losses.amin(0), rtol=1e-4, atol=1e-6)


@both
def test_a_wider_beam_is_better_and_feedback_too(backend: Backend) -> None:
    c = case(1, 64, 8, 4, 1, 4, 8)
    total = [float(loss(c, decoded(c, swept(c, beam, backend).codes)).sum()) for beam in (1, 4, 16)]
    assert total[0] > total[1] > total[2] * 0.99
    alone = feedback_search(c.weight, c.metric, c.tables, c.scale, 8, backend=backend)
    assert float(loss(c, decoded(c, fed(c, 8, backend).codes)).sum()) < 0.9 * float(
        loss(c, decoded(c, alone.codes)).sum()
    )


@both
def test_groups_that_do_not_meet(backend: Backend) -> None:
    """Without a coupling the order of groups is nothing, with one it is something."""
    c = case(1, 20, 6, 4, 1, 2, 8, diagonal=True)
    flip = torch.arange(24).reshape(6, 4).flip(0).reshape(-1)
    other = Case(c.weight[..., flip], c.hessian[:, flip][:, :, flip], c.tables, c.scale, c.codes.flip(2))
    assert torch.equal(
        swept(c, 8, backend, coupled=False).codes, swept(other, 8, backend, coupled=False).codes.flip(2)
    )
    assert torch.equal(swept(c, 8, backend, coupled=False).codes, swept(c, 8, backend).codes)


@both
def test_rows_without_a_scale(backend: Backend) -> None:
    c = case(1, 6, 3, 4)
    c.scale[0, ::2] = torch.tensor([0.0, 1e-31, -1e-38])
    for found in (swept(c, 8, backend), fed(c, 8, backend)):
        assert bool(found.moved.isfinite().all()) and are_codes(found.codes, 16)
    assert bool((swept(c, 8, backend).moved[0, ::2].abs() < 1e-29).all())
    as_one = c._replace(scale=torch.where(c.scale.abs() > 1e-30, c.scale, 1.0))
    assert torch.equal(fed(c, 8, backend).codes[:, :, 0], fed(as_one, 8, backend).codes[:, :, 0])


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_codes_are_codes_whatever_the_weights(backend: Backend, bad: float) -> None:
    c = case(1, 6, 3, 4, codewords=5)
    c.weight[0, 2, 5] = bad
    for found in (swept(c, 8, backend), fed(c, 8, backend)):
        assert are_codes(found.codes, 5)


@both
def test_equal_codewords_give_the_first(backend: Backend) -> None:
    c = case(1, 9, 3, 4, codewords=40)
    c.tables[:] = c.tables[:, :, :1]
    assert not bool(fed(c, 8, backend).codes.any())
    c.tables[:] = 0
    assert not bool(swept(c, 8, backend).codes.any())


@needs_native
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("beam", [3, 8, 32])
def test_of_pairs_of_equal_codewords_the_first_is_taken(level: int, beam: int) -> None:
    c = case(1, 30, 4, 4, codebooks=3, codewords=40)
    twice = c._replace(tables=torch.cat([c.tables[:, :, :20]] * 2, 2))
    assert are_codes(fed(twice, beam, level=level).codes, 20)


@both
def test_input_is_not_changed(backend: Backend) -> None:
    c = case(2, 6, 4, 4)
    before = [each.clone() for each in c]
    whole = (c.weight @ c.hessian).contiguous()
    kept = whole.clone()
    fed(c, 8, backend)
    sweep_search(
        whole,
        torch.zeros_like(whole),
        c.codes,
        c.metric,
        c.tables,
        c.scale,
        8,
        coupling=c.hessian,
        backend=backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, c, strict=True)) and torch.equal(whole, kept)


@needs_native
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(threads: int) -> None:
    one = torch.get_num_threads()
    large = [case(1, 203, 5, 8, 1, 2, 64), case(40, 9, 2, 9, 1, 2, 64), case(3, 130, 3, 4, 1, 1, 256)]
    try:
        torch.set_num_threads(1)
        expected = [(swept(c, 8, "native"), fed(c, 8, "native")) for c in large]
        torch.set_num_threads(threads)
        for c, (by_sweep, by_feedback) in zip(large, expected, strict=True):
            for found, wanted in ((swept(c, 8, "native"), by_sweep), (fed(c, 8, "native"), by_feedback)):
                assert torch.equal(found.codes, wanted.codes) and torch.equal(found.moved, wanted.moved)
    finally:
        torch.set_num_threads(one)


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tables = torch.zeros(1, 2, 4), torch.zeros(1, 2, 3, 4)
    assert select("reference", rows, tables) == "reference"
    for bad, said in ((rows.double(), "float64"), (rows.to("meta"), "meta")):
        assert select(None, bad, tables) == "reference"
        with pytest.raises(AquabitError, match=said if LEVELS else "extension"):
            select("native", bad, tables)
    with pytest.raises(AquabitError, match="backend='cuda'"):
        select("cuda", rows, tables)  # type: ignore[arg-type]
    monkeypatch.setattr(additive_search, "_native", None)
    assert select(None, rows, tables) == "reference"
    with pytest.raises(AquabitError, match="extension"):
        select("native", rows, tables)


@needs_native
def test_native_is_the_choice_and_has_a_limit() -> None:
    rows = torch.zeros(1, 2, 4)
    assert select(None, rows, torch.zeros(1, 64, 3, 4)) == "native"
    assert select(None, rows, torch.zeros(1, 65, 3, 4)) == "reference"
    with pytest.raises(AquabitError, match="65"):
        select("native", rows, torch.zeros(1, 65, 3, 4))


@needs_native
def test_what_does_not_fit_is_named() -> None:
    c = case(2, 6, 4, 4)
    with pytest.raises(AquabitError, match="metric"):
        feedback_search(c.weight, c.metric[:, :3], c.tables, c.scale, backend="native")
    with pytest.raises(AquabitError, match="beam=0"):
        feedback_search(c.weight, c.metric, c.tables, c.scale, 0, backend="native")
    codes = torch.zeros_like(c.codes)
    codes[0, 1, 2, 1] = 16
    with pytest.raises(AquabitError, match="codes from 0 to 16"):
        sweep_search(c.weight, c.weight, codes, c.metric, c.tables, c.scale, backend="native")


@needs_native
def test_any_strides() -> None:
    c = case(2, 6, 4, 4)
    views = [
        x.transpose(0, -1).contiguous().transpose(0, -1) for x in (c.weight, c.metric, c.tables, c.scale)
    ]
    assert torch.equal(
        feedback_search(*views, 8).codes, feedback_search(c.weight, c.metric, c.tables, c.scale, 8).codes
    )

"""Output-aware scalar quantizers: their size, their optimality, and what they are compared with."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquabit.cost import weight_bytes
from aquabit.kernels import scalar_search
from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.calibration.hessian import output_error
from aquabit.quant.schemes import output_aware as feedback
from aquabit.quant.schemes.levels import Affine, Levels, Table, problem_of
from aquabit.quant.schemes.scalar import lloyd
from aquabit.quant.schemes.usq import least_squares, uniform, uniform_with_feedback
from aquabit.quant.schemes.vq import kmeans, kmeans_with_feedback
from aquabit.scheme import AquabitError, Scheme

SHAPES = st.one_of(
    st.tuples(st.integers(1, 17), st.integers(1, 19)),
    st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)
SCHEMES = [
    "usq1h",
    "usq2h",
    "usq3h",
    "usq4h",
    "usq8h",
    "usq4g4h",
    "usq3g5h",
    "vq1h",
    "vq2h",
    "vq3h",
    "vq4h",
    "vq2ch",
    "vq3ch",
    "vq5ch",
]


def fit(weight: torch.Tensor, text: str, hessian: torch.Tensor | None = None) -> CodebookWeight:
    scheme = Scheme.parse(text)
    return (uniform_with_feedback if scheme.kind == "usq" else kmeans_with_feedback)(weight, scheme, hessian)


def plain(weight: torch.Tensor, text: str) -> CodebookWeight:
    """What a fit with H begins with."""
    scheme = Scheme.parse(text)
    if scheme.kind == "usq":
        return uniform(weight, scheme, least_squares)
    return kmeans(weight, scheme, gain_one=False)


def moments(row: int, seed: int, groups: int = 1, decay: float = 1.5) -> torch.Tensor:
    """Damped second moments of inputs whose spectrum falls as k^-decay and whose mean is not zero,
    [groups, row, row]."""
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, row + 1) ** (-decay / 2)
    mixing = torch.randn(groups, row, row, generator=g) * spectrum[:, None]
    x = (
        torch.randn(groups, 2 * row + 5, row, generator=g) @ mixing
        + torch.randn(groups, 1, row, generator=g) * 0.3
    )
    h = x.transpose(1, 2) @ x
    return h + 0.01 * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(row)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(SHAPES, st.sampled_from(SCHEMES), st.integers(0, 100))
def test_bytes_are_those_of_the_plain_scheme(shape: tuple[int, ...], text: str, seed: int) -> None:
    coded = fit(normal(*shape, seed=seed), text, moments(int(np.prod(shape[1:])), seed))
    base = Scheme.parse(text[:-1])
    assert coded.nbytes == weight_bytes(shape, Scheme.parse(text)) == weight_bytes(shape, base)
    assert coded.dequantize().shape == shape and bool(torch.isfinite(coded.dequantize()).all())
    other = plain(normal(*shape, seed=seed), text[:-1])
    assert {k: (v.shape, v.dtype) for k, v in coded.tensors().items()} == {
        k: (v.shape, v.dtype) for k, v in other.tensors().items()
    }


@settings(deadline=None)
@given(
    SHAPES,
    st.sampled_from(SCHEMES),
    st.integers(0, 100),
    st.sampled_from(["full", "diagonal", "singular", "none"]),
    st.integers(1, 3),
)
def test_never_worse_than_the_plain_scheme(
    shape: tuple[int, ...], text: str, seed: int, form: str, groups: int
) -> None:
    groups = groups if shape[0] % groups == 0 and form != "diagonal" else 1
    weight, row = normal(*shape, seed=seed), int(np.prod(shape[1:]))
    h = moments(row, seed, groups)
    x = normal(groups, max(1, row // 2), row, seed=seed)
    hessian = {"full": h, "diagonal": h[0].diagonal(), "singular": x.transpose(1, 2) @ x, "none": None}[form]
    ours = output_error(weight, fit(weight, text, hessian).dequantize(), hessian)
    assert ours <= output_error(weight, plain(weight, text[:-1]).dequantize(), hessian) * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize(
    "text", ["usq2h", "usq3h", "usq4h", "usq3g16h", "vq2h", "vq3h", "vq3ch", "usq8h", "vq8h"]
)
@pytest.mark.parametrize("shape", [(24, 48), (12, 8, 3, 3)])
def test_much_better_than_plain_where_inputs_are_correlated(text: str, shape: tuple[int, ...]) -> None:
    weight, h = normal(*shape), moments(int(np.prod(shape[1:])), 1)
    assert output_error(weight, fit(weight, text, h).dequantize(), h) < 0.5 * output_error(
        weight, plain(weight, text[:-1]).dequantize(), h
    )


def plain_gptq(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, offset: np.ndarray, steps: int
) -> np.ndarray:
    """GPTQ with act-order on a given grid, as published (Algorithm 1, without blocks), float64."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, h = weight[:, order].copy(), hessian[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    out = np.zeros_like(w)
    for j in range(w.shape[1]):
        out[:, j] = np.clip(np.round((w[:, j] - offset) / scale), 0, steps) * scale + offset
        w[:, j + 1 :] -= np.outer((w[:, j] - out[:, j]) / upper[j, j], upper[j, j + 1 :])
    back = np.empty_like(out)
    back[:, order] = out
    return back


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_at_most_the_error_of_plain_gptq(bits: int, seed: int) -> None:
    weight, h = normal(20, 60, seed=seed), moments(60, seed, decay=1.0)
    coded = plain(weight, f"usq{bits}")
    scale, offset = coded.scale.double().numpy(), coded.offset.double().numpy()
    theirs = plain_gptq(weight.double().numpy(), h[0].double().numpy(), scale, offset, (1 << bits) - 1)
    error = output_error(weight, torch.from_numpy(theirs), h)
    assert error < output_error(weight, coded.dequantize(), h)
    assert output_error(weight, fit(weight, f"usq{bits}h", h).dequantize(), h) <= 0.97 * error


def test_one_sweep_of_feedback_is_gptq() -> None:
    weight, h = normal(20, 150), moments(150, 3)  # more than one block of columns
    problem = problem_of(weight, h)
    coded = plain(weight, "usq3")
    levels = Affine(problem.order * 0, 1, 7)
    grid = torch.stack([coded.scale, coded.offset], 1).float()[None]
    state = feedback.fed(problem, levels, *feedback.feedback_gain(problem), grid)
    ours = problem.stored(levels.decode(grid, state.codes)).t()
    theirs = plain_gptq(weight.double().numpy(), h[0].double().numpy(), *grid[0].double().t().numpy(), 7)
    assert (ours - torch.from_numpy(theirs)).abs().lt(
        1e-3
    ).double().mean() > 0.98  # a tie may fall either way, and its row with it
    assert output_error(weight, ours, h) == pytest.approx(
        output_error(weight, torch.from_numpy(theirs), h), rel=0.02
    )


@pytest.mark.parametrize("text", ["usq2h", "usq3h", "usq2g3h", "vq2h", "vq3h", "vq2ch"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rounds", [8, 0])  # none: the last sweeps alone must do it
def test_no_change_of_one_code_lowers_the_error(
    text: str, seed: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "ROUNDS", rounds)
    weight, h = normal(4, 12, seed=seed), moments(12, seed, decay=0.7)
    coded = fit(weight, text, h)
    best, codes = output_error(weight, coded.dequantize(), h), coded.codes.long()
    for j, o, k in product(range(12), range(4), range(1 << coded.bits)):
        other = codes.clone()
        other[j, 0, o] = k
        changed = CodebookWeight.from_codes(
            other, coded.codebooks, coded.scale, coded.offset, coded.shape, coded.bits
        )
        assert output_error(weight, changed.dequantize(), h) >= best * (1 - 1e-4)


GRIDS = {
    "row": Affine(torch.zeros(1, 12, dtype=torch.long), 1, 7),
    "groups": Affine(torch.arange(12)[None] // 4, 3, 7),
    "tensor table": Table(4, True),
    "row tables": Table(4, False),
}


@pytest.mark.parametrize("levels", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_refitted_grid_is_stationary(levels: Levels, diagonal: bool) -> None:
    h = moments(12, 0, decay=0.5)[0]
    problem = problem_of(normal(6, 12), h.diagonal() if diagonal else h)
    if isinstance(levels, Affine):
        grid = torch.cat([torch.full((1, 6, levels.n), 0.5), torch.full((1, 6, levels.n), -1.5)], 2)
    else:
        grid = torch.tensor([-1.5, -0.4, 0.3, 1.2]).expand(1, 1 if levels.shared else 6, 4)
    state = feedback.state_of(problem, levels, grid, levels.nearest(grid, problem.weight))
    exact = 1 if diagonal else 2 * levels.n if isinstance(levels, Affine) else levels.k
    best = feedback.refit(problem, levels, state, steps=exact, least=0.0)

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        difference = problem.weight - levels.decode(parameters.float(), state.codes)
        return (difference * problem.times(difference)).sum()

    gradients = [torch.autograd.functional.jacobian(loss, p.float()).abs().max() for p in (grid, best)]
    assert float(loss(best)) < float(loss(grid)) and gradients[1] < 1e-3 * gradients[0]


@pytest.mark.parametrize("text", ["usq3h", "usq3g16h", "vq3h", "vq3ch"])
def test_the_first_grid_heeds_only_inputs_that_matter(text: str) -> None:
    weight, diagonal = normal(8, 64), torch.ones(64)
    weight[:, ::16] *= 50
    diagonal[::16] = 1e-7
    problem = problem_of(weight, diagonal)
    levels: Levels = Table(8, text == "vq3h")
    if text[0] == "u":
        n = 4 if "g" in text else 1
        levels = Affine(problem.order // (64 // n), n, 7)
    grid = levels.grid(problem.weight, diagonal[None].gather(1, problem.order))
    decoded = problem.stored(levels.decode(grid, levels.nearest(grid, problem.weight))).t()
    assert output_error(weight, decoded, diagonal) < 0.1
    assert output_error(weight, plain(weight, text[:-1]).dequantize(), diagonal) > 0.1


@pytest.mark.parametrize("text", ["usq3h", "usq3g4h"])
def test_groups_of_a_convolution_are_fitted_apart(text: str) -> None:
    weight, h = normal(12, 3, 3, 2), moments(18, 0, groups=3)
    together = fit(weight, text, h).dequantize()
    alone = torch.cat([fit(w, text, each).dequantize() for w, each in zip(weight.chunk(3), h, strict=True)])
    for a, b, w, each in zip(together.chunk(3), alone.chunk(3), weight.chunk(3), h, strict=True):
        assert output_error(w, a, each) == pytest.approx(
            output_error(w, b, each), rel=0.05
        )  # they stop at different rounds
    assert output_error(weight, together, h) < 0.8 * output_error(weight, together, h.flip(0)), (
        "every block has its own H"
    )


def test_a_group_without_inputs_does_not_spoil_the_others() -> None:
    weight, h = normal(12, 20), moments(20, 0, groups=2)
    h[1] = 0
    together = fit(weight, "usq3h", h).dequantize()
    alone, plainly = fit(weight[:6], "usq3h", h[0]).dequantize(), fit(weight[6:], "usq3h").dequantize()
    assert output_error(weight[:6], together[:6], h[0]) == pytest.approx(
        output_error(weight[:6], alone, h[0]), rel=0.05
    )
    assert output_error(weight[6:], together[6:]) == pytest.approx(
        output_error(weight[6:], plainly), rel=0.05
    )


@pytest.mark.parametrize("shared", [True, False])
def test_sorting_a_table_keeps_what_it_decodes_to(shared: bool) -> None:
    levels, table = Table(4, shared), normal(1, 1 if shared else 3, 4)
    codes = torch.randint(0, 4, (1, 9, 3), generator=torch.Generator().manual_seed(0))
    ascending, renamed = levels.sorted(table, codes)
    assert bool((ascending.diff() >= 0).all()) and not torch.equal(ascending, table)
    assert torch.equal(levels.decode(ascending, renamed), levels.decode(table, codes))


def test_a_convolution_is_the_linear_layer_of_its_patches() -> None:
    weight, h = normal(6, 5, 3, 2), moments(30, 2)
    for text in ("usq3h", "vq3h", "vq2ch"):
        linear = fit(weight.flatten(1), text, h).dequantize()
        assert torch.equal(fit(weight, text, h).dequantize().flatten(1), linear)
    by_channel = fit(weight, "usq3g5h", h)  # a group of five is one place in the kernel, all channels
    place = torch.arange(30).reshape(5, 3, 2).permute(1, 2, 0).reshape(-1)
    same = fit(weight.flatten(1)[:, place], "usq3g5h", h[:, place][:, :, place])
    torch.testing.assert_close(by_channel.dequantize().flatten(1)[:, place], same.dequantize())


def test_the_order_of_inputs_does_not_matter() -> None:
    weight, h, order = (
        normal(8, 30),
        moments(30, 2),
        torch.randperm(30, generator=torch.Generator().manual_seed(0)),
    )
    for text in ("usq3h", "vq3h", "vq2ch"):
        moved = fit(weight[:, order], text, h[:, order][:, :, order]).dequantize()
        assert torch.equal(moved, fit(weight, text, h).dequantize()[:, order])


@pytest.mark.parametrize("text", SCHEMES)
def test_identity_equals_none_and_diagonals_are_separable(text: str) -> None:
    weight = normal(9, 40)
    errors = [
        output_error(weight, fit(weight, text, h).dequantize()) for h in (None, torch.eye(40), torch.ones(40))
    ]
    assert errors == pytest.approx([errors[0]] * 3, rel=2e-3)
    diagonal = torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 4
    coded = fit(weight, text, diagonal)
    full = fit(weight, text, diagonal.diag())
    assert output_error(weight, coded.dequantize(), diagonal) == pytest.approx(
        output_error(weight, full.dequantize(), diagonal), rel=1e-2
    )


@pytest.mark.parametrize("text", SCHEMES)
def test_degenerate_inputs(text: str) -> None:
    h = moments(10, 0)
    for weight in (
        torch.zeros(4, 10),
        torch.full((4, 10), 3.0),
        torch.tensor([0.0, 1.0, -2.0, 0.0])[:, None].expand(4, 10),
    ):
        if int(weight.unique().numel()) <= 1 << Scheme.parse(text).bits or text[0] == "u":
            for hessian in (h, h[0].diagonal(), None, torch.zeros(10, 10)):
                torch.testing.assert_close(
                    fit(weight, text, hessian).dequantize(), weight.contiguous(), rtol=1e-3, atol=1e-6
                )
    weight, dead = normal(4, 10), h.clone()
    dead[:, 3], dead[:, :, 3] = 0, 0
    for hessian in (torch.zeros(10, 10), torch.zeros(10), torch.ones(10, 10), dead, 1e-30 * h, 1e12 * h):
        assert output_error(weight, fit(weight, text, hessian).dequantize()) < 2.0
    for extreme in (1e5 * weight, 1e-7 * weight):
        assert bool(torch.isfinite(fit(extreme, text, h).dequantize()).all())
    with pytest.raises(AquabitError, match="H is"):
        fit(weight, text, torch.eye(9))


@pytest.mark.parametrize("text", ["usq3h", "usq3g16h", "vq3h", "vq2ch"])
def test_deterministic_and_inputs_untouched(text: str) -> None:
    weight, h = normal(16, 40), moments(40, 0)
    before = weight.clone(), h.clone()
    first, again = fit(weight, text, h).tensors(), fit(weight, text, h).tensors()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])


def test_weighted_kmeans_counts_a_point_as_often_as_it_weighs() -> None:
    data, mass = normal(3, 50), torch.randint(0, 4, (3, 50), generator=torch.Generator().manual_seed(0))
    for row, m in zip(data, mass, strict=True):
        repeated = row.repeat_interleave(m)
        ours = lloyd(row[None], 4, m[None].float())
        distance = (repeated[:, None] - ours).abs().amin(1).square().sum()
        from_repeated = lloyd(repeated[None], 4)
        assert distance <= 1.05 * (repeated[:, None] - from_repeated).abs().amin(1).square().sum()
        nearest = (repeated[:, None] - ours).abs().argmin(1)
        for k in nearest.unique():
            assert float(repeated[nearest == k].mean()) == pytest.approx(float(ours[0, k]), abs=1e-4)


@pytest.mark.parametrize("text", ["usq3h", "usq4g64h", "vq3h", "vq2ch"])
def test_threads_change_nothing(text: str) -> None:
    weight, h, threads = normal(150, 200), moments(200, 1), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(fit(weight, text, h).tensors())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other[k], found[0][k]) for other in found[1:] for k in found[0])


@pytest.mark.parametrize("text", ["usq1h", "usq3h", "usq3g16h", "vq3h", "vq2ch"])
@pytest.mark.parametrize("shape", [(40, 100), (1, 70), (9, 1), (12, 3, 3, 3)])
def test_without_the_extension_fits_are_as_good(
    text: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the same: sums of another order round otherwise, and a tie falls the other way."""
    weight, h = normal(*shape), moments(int(np.prod(shape[1:])), 1, 4 if len(shape) == 4 else 1)
    native = output_error(weight, fit(weight, text, h).dequantize(), h)
    monkeypatch.setattr(scalar_search, "_native", None)
    assert output_error(weight, fit(weight, text, h).dequantize(), h) == pytest.approx(native, rel=0.03)


@pytest.mark.parametrize("levels", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("diagonal", [False, True])
def test_what_feedback_misses_is_the_loss(levels: Levels, diagonal: bool) -> None:
    h = moments(12, 0, decay=0.5)[0]
    problem = problem_of(normal(6, 12), h.diagonal() if diagonal else h)
    if isinstance(levels, Affine):
        grid = torch.cat([torch.full((1, 6, levels.n), 0.5), torch.full((1, 6, levels.n), -1.5)], 2)
    else:
        grid = torch.tensor([-1.5, -0.4, 0.3, 1.2]).expand(1, 1 if levels.shared else 6, 4)
    found = feedback.fed(problem, levels, *feedback.feedback_gain(problem), grid)
    state = feedback.state_of(problem, levels, grid, found.codes)
    torch.testing.assert_close(found.loss, state.loss, rtol=1e-4, atol=0)
    if not diagonal:
        swept = feedback.descended(problem, levels, state, 3)
        exact = feedback.state_of(problem, levels, grid, swept.codes)
        for a, b in zip(swept[2:], exact[2:], strict=True):
            assert (a is None and b is None) or torch.allclose(a, b.to(a.dtype), rtol=1e-3, atol=1e-3)

"""Refinement in context on quadratic worlds, whose single changes, optimum and budget can be checked
directly."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import Budget
from aquabit.search.integer_program import solve
from aquabit.search.refine import Seen, Step, crossings, in_context, refine, shrunk
from aquabit.space import SearchSpace
from tests.worlds import middle, model

TOY = {"schemes": ["usq2", "usq3", "usq4", "usq8"]}
SMALL = (1, 2, 4, 8)  # sizes of steps that suit few layers


@dataclass
class Quadratic:
    """|sum of layers' errors|^2 in ``vectors`` [L, schemes, m]; ``shared`` of each error lies along one
    direction, in either sense, so that errors of different layers add up or cancel. Counts looks, and what
    was judged."""

    space: SearchSpace
    cost: CostModel
    vectors: np.ndarray
    looks: int = 0
    judged: list[Choices] = field(default_factory=list)

    @staticmethod
    def of(layers: int, seed: int, shared: float = 0.5, **options: Any) -> Quadratic:
        space, cost = model(layers, seed, **{**TOY, **options})
        rng, shape = np.random.default_rng(seed), (layers, len(space.schemes))
        size = rng.lognormal(0, 0.7, (layers, 1)) * 2.0 ** -np.array(
            [16.0 if str(s) == "fp" else s.bits for s in space.schemes]
        )
        own = rng.normal(size=(*shape, 24)) / np.sqrt(24)
        common = rng.normal(size=24) / np.sqrt(24)
        vectors = np.sqrt(1 - shared) * own + np.sqrt(shared) * rng.choice([-1.0, 1.0], (*shape, 1)) * common
        return Quadratic(space, cost, vectors * size[..., None])

    @property
    def damages(self) -> np.ndarray:
        return np.where(self.space.allowed(), (self.vectors**2).sum(-1), np.inf)

    def value(self, weights: np.ndarray) -> np.ndarray:
        """[...] of weights [..., L]."""
        return np.asarray((self.vectors[np.arange(weights.shape[-1]), weights].sum(-2) ** 2).sum(-1))

    def look(self, chosen: Choices) -> Seen:
        self.looks += 1
        (weights,) = chosen.weights
        own = self.vectors[np.arange(len(weights)), weights]
        slopes = 2 * self.vectors @ own.sum(0)
        lengths = np.linalg.norm(self.vectors, axis=-1) * np.linalg.norm(own, axis=-1)[:, None]
        overlap = (self.vectors * own[:, None]).sum(-1) / np.maximum(lengths, 1e-300)
        crossing = crossings(slopes, overlap, self.damages, weights)
        return Seen(float(self.value(weights)), in_context(crossing, self.damages, weights)[:, :, None])

    def judge(self, proposals: Choices) -> list[float]:
        self.judged += proposals
        return [float(self.value(row.weights[0])) for row in proposals]

    def start(self, budget: Budget) -> Choices:
        solved = solve(self.damages[:, :, None], self.cost, budget)
        return solved.choices

    def refine(self, budget: Budget, **options: Any) -> list[Step]:
        return refine(self.start(budget), self.look, self.judge, self.cost, budget, **options)


def test_single_changes_of_a_quadratic_are_exact_in_context() -> None:
    world = Quadratic.of(7, 3, 0.5, pinned={"l2": "usq4"})
    allowed = world.space.allowed()
    rng = np.random.default_rng(0)
    for _ in range(5):
        own = np.array([rng.choice(np.flatnonzero(row)) for row in allowed])
        seen = world.look(Choices.at(world.space, own[None], 8))
        assert seen.value == pytest.approx(float(world.value(own))) and seen.change.shape == (
            7,
            len(world.space.schemes),
            1,
        )
        assert (seen.change[np.arange(7), own] == 0).all()
        assert (np.isinf(seen.change[..., 0]) == ~allowed).all() and (seen.change[~allowed] > 0).all()
        for layer, scheme in np.argwhere(allowed):
            other = own.copy()
            other[layer] = scheme
            assert seen.change[layer, scheme, 0] == pytest.approx(
                float(world.value(other) - world.value(own)), abs=1e-9
            )


def test_what_full_precision_leaves_is_in_context_too() -> None:
    """The own choice does no damage, and has no direction: nothing overlaps with it."""
    slopes, damages = np.array([[0.0, 3.0, -1.0]]), np.array([[0.0, 2.0, np.inf]])
    crossing = crossings(slopes, np.zeros((1, 3)), damages, np.array([0]))
    assert crossing.tolist() == [[0.0, 3.0, 0.0]]
    assert in_context(crossing, damages, np.array([0])).tolist() == [[0.0, 5.0, np.inf]]


def test_the_own_choice_overlaps_with_itself_whatever_is_said() -> None:
    world = Quadratic.of(5, 1)
    own, rows = np.array([1, 2, 3, 4, 1]), np.arange(5)
    errors = world.vectors[rows, own]
    slopes = 2 * world.vectors @ errors.sum(0)
    found = crossings(slopes, np.zeros(slopes.shape), world.damages, own)
    others = errors.sum(0) - errors
    assert found[rows, own] == pytest.approx(2 * (errors * others).sum(-1))


# ---- parts of the inputs


def crossings_of(noise: float, seed: int, parts: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True crossings [L, C], what each part shows of them, and damages; the first column may not be taken."""
    rng = np.random.default_rng(seed)
    damages = rng.lognormal(0, 1.5, (40, 4))
    damages[:, 0] = np.inf
    unit = np.sqrt(np.where(np.isfinite(damages), damages, 0.0))
    true = unit * (0.5 + rng.normal(size=damages.shape))
    return true, true + noise * unit * rng.normal(size=(parts, *damages.shape)), damages


@pytest.mark.parametrize("seed", range(3))
def test_parts_that_disagree_count_for_less(seed: int) -> None:
    known = (slice(None), slice(1, None))
    for noise, least in ((0.5, 0.98), (2.0, 0.8), (8.0, 0.35)):
        true, parts, damages = crossings_of(noise, seed)
        found, unit = shrunk(parts, damages), np.sqrt(damages[known])
        plain, better = (float((((v - true)[known] / unit) ** 2).mean()) for v in (parts.mean(0), found))
        assert better < plain * (1.05 if noise < 1 else least) and (found[:, 0] == 0).all()
        assert np.std(found[known] / unit) < np.std(parts.mean(0)[known] / unit)
    same = np.repeat(true[None], 3, 0)
    np.testing.assert_allclose(shrunk(same, damages)[known], true[known], rtol=1e-9)
    np.testing.assert_allclose(
        shrunk(1e-6 * parts, 1e-12 * damages), 1e-6 * shrunk(parts, damages), rtol=1e-6
    )


def test_one_part_alone_says_nothing() -> None:
    _, parts, damages = crossings_of(1.0, 0, parts=1)
    assert (shrunk(parts, damages) == 0).all()
    assert (shrunk(np.ones((3, 2, 2)), np.array([[0.0, np.inf], [0.0, 0.0]])) == 0).all(), (
        "nor do cells without damage"
    )


# ---- refinement


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("names", [("bits",), ("bytes", "bops")])
def test_refinement_keeps_the_budget_and_every_step_is_judged_better(
    seed: int, names: tuple[str, ...]
) -> None:
    world = Quadratic.of(10, seed, pinned={"l1": "usq4"}, excluded=["l6"], activations=[8])
    budget = middle(world.cost, 0.35, *names)
    steps = world.refine(budget, radii=SMALL)
    start = world.start(budget)
    assert steps[0].choices == start and steps[0].changed == 0 and steps[0].predicted == steps[0].value
    assert all(world.cost.within(world.cost.totals(row), budget)[0] for row in world.judged), (
        "nor are proposals outside"
    )
    for before, after in pairwise(steps):
        assert after.value < before.value and after.value == pytest.approx(
            float(world.value(after.choices.weights[0]))
        )
        assert world.cost.within(world.cost.totals(after.choices), budget)[0]
        assert after.changed == int(after.choices.apart(before.choices)[0]) > 0
        if after.changed == 1:
            assert after.predicted == pytest.approx(after.value)
    again = Quadratic.of(10, seed, pinned={"l1": "usq4"}, excluded=["l6"], activations=[8]).refine(
        budget, radii=SMALL
    )
    assert [(s.choices.weights.tolist(), s.value) for s in again] == [
        (s.choices.weights.tolist(), s.value) for s in steps
    ]


def test_refinement_gains_where_errors_are_correlated() -> None:
    gains = []
    for seed in range(8):
        world = Quadratic.of(24, seed)
        steps = world.refine(middle(world.cost, 0.35, "bits"), radii=SMALL)
        gains.append(steps[-1].value / steps[0].value)
    assert max(gains) < 1 and np.median(gains) < 0.6, "the program over damages knows nothing of signs"


def test_uncorrelated_errors_leave_the_programs_answer_nearly_as_it_is() -> None:
    """Orthogonal errors: the sum of damages is the truth, and the start its optimum."""
    world = Quadratic.of(8, 1)
    layers, schemes, _ = world.vectors.shape
    size = np.linalg.norm(world.vectors, axis=-1)
    world.vectors = np.eye(layers)[:, None, :] * size[..., None]
    assert world.vectors.shape == (layers, schemes, layers)
    steps = world.refine(middle(world.cost, 0.35, "bits"))
    assert len(steps) == 1 and world.looks == 1


def test_it_ends_where_nothing_is_gained_and_after_so_many_rounds() -> None:
    world, budget = Quadratic.of(20, 4), middle(model(20, 4, **TOY)[1], 0.35, "bits")
    steps = world.refine(budget, rounds=50, radii=SMALL)
    assert 1 < len(steps) < 50 and world.looks == len(steps), (
        "the last one was looked at, and nothing was gained"
    )
    stuck, end = Quadratic.of(20, 4), steps[-1].choices
    assert (
        len(refine(end, stuck.look, stuck.judge, stuck.cost, budget, rounds=50, radii=SMALL)) == 1
        and stuck.looks == 1
    )
    for rounds in (0, 1, 2):
        few = Quadratic.of(20, 4)
        found = few.refine(budget, rounds=rounds, radii=SMALL)
        assert [s.choices.weights.tolist() for s in found] == [
            s.choices.weights.tolist() for s in steps[: rounds + 1]
        ]
        assert few.looks == max(rounds, 1) and (rounds > 0) == bool(few.judged), (
            "what no round follows is not looked at"
        )
    small = Quadratic.of(20, 4)
    assert max(s.changed for s in small.refine(budget, rounds=50, radii=(1, 3))) <= 3


def test_steps_are_no_larger_than_the_model() -> None:
    world = Quadratic.of(3, 0)
    budget = middle(world.cost, 0.5, "bits")
    steps = world.refine(budget, radii=(4, 8))
    assert all(s.changed <= 3 for s in steps)
    assert [s.value for s in steps] == [s.value for s in world.refine(budget, radii=(3,))]


@pytest.mark.parametrize("said", [np.nan, np.inf])
def test_a_judge_that_knows_no_better_leaves_the_start(said: float) -> None:
    world = Quadratic.of(20, 4)
    budget = middle(world.cost, 0.35, "bits")
    asked: list[int] = []

    def judge(proposals: Choices) -> list[float]:
        asked.append(len(proposals))
        return [said] * len(proposals)

    steps = refine(world.start(budget), world.look, judge, world.cost, budget, radii=SMALL)
    assert len(steps) == 1 and len(asked) == 1 and asked[0] >= 1


def test_the_judge_decides_and_not_the_prediction() -> None:
    world = Quadratic.of(20, 4)
    budget = middle(world.cost, 0.35, "bits")

    def liar(chosen: Choices) -> Seen:
        seen = world.look(chosen)
        return Seen(seen.value, np.where(np.isinf(seen.change), np.inf, -seen.change))

    steps = refine(world.start(budget), liar, world.judge, world.cost, budget, radii=SMALL)
    assert all(b.value < a.value for a, b in pairwise(steps)), (
        "of proposals for the worse none is taken that is worse"
    )
    assert len(world.judged) > len(steps) - 1

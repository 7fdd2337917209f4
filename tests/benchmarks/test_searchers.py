"""One contract for all searchers, what each must find in a world that it was made for, and NSGA-II."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.layer_formats import expected_loss
from aquabit.scheme import AquabitError, QuantConfig
from aquabit.search.evolution import evolve
from aquabit.search.integer_program import solve
from aquabit.search.local_search import lighten
from aquabit.search.options import Options
from aquabit.space import SearchSpace
from benchmarks.research.searchers import SEARCHERS, Problem, find_searcher, random_within
from tests.worlds import Lab, every, interacting, middle, model

TOY = {"schemes": ["usq2", "usq3", "usq4", "usq8"]}


class Bench:
    """Counts what is measured of an additive function of layer errors, or of any other."""

    def __init__(self, space: SearchSpace, seed: int = 0, truth: Any = None, failing: int = 0):
        rng = np.random.default_rng(seed)
        self.space, self.failing, self.asked = space, failing, list[QuantConfig]()
        self.weight = rng.lognormal(0, 1.5, len(space.choices))
        error = [
            [
                0.0 if s.kind == "fp" else expected_loss(s) * 4.0 ** -space.code_bits(k, s)
                for s in space.schemes
            ]
            for k in space.choices
        ]
        self.table = self.weight[:, None] * np.array(error)
        self.truth = truth or (lambda rows: self.table[np.arange(rows.weights.shape[1]), rows.weights].sum(1))

    def measure(self, configs: list[QuantConfig]) -> list[float]:
        self.asked += configs
        values = self.truth(Choices.of(self.space, configs))
        return [
            float("nan") if self.failing and (len(self.asked) + i) % self.failing == 0 else float(v)
            for i, v in enumerate(values)
        ]

    def fit(self, configs: list[QuantConfig], values: np.ndarray) -> Any:
        """Ridge on one-hot columns of log values."""
        width = len(self.space.schemes)

        def features(weights: np.ndarray) -> np.ndarray:
            return np.eye(width)[weights].reshape(len(weights), -1)

        X, mean = features(Choices.of(self.space, configs).weights), float(np.mean(values))
        solution = np.linalg.solve(X.T @ X + 0.1 * np.eye(X.shape[1]), X.T @ (values - mean))
        return lambda rows: features(rows.weights) @ solution + mean


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize(("names", "failing"), [(("bits",), 0), (("bits", "bops"), 5)])
def test_every_searcher_keeps_to_its_measurements_and_is_deterministic(
    name: str, names: tuple[str, ...], failing: int
) -> None:
    space, cost = model(6, 1, **TOY, pinned={"l1": "usq4"}, excluded=["l4"])
    targets = [middle(cost, share, *names) for share in (0.3, 0.5)]
    runs = []
    for seed in (3, 3):
        bench = Bench(space, failing=failing)
        found = find_searcher(name)(Problem(space, cost, targets, bench.measure, 40, seed, bench.fit))
        assert [c.digest for c, _ in found] == [c.digest for c in bench.asked]
        assert len({c.digest for c in bench.asked}) == len(bench.asked) <= 40
        assert len(bench.asked) == 40 or name == "uniform" or names == ("bits",) or name == "greedy"
        runs.append([c.digest for c in bench.asked])
        for target in targets:
            inside = [v for c, v in found if cost.within(cost.totals(Choices.of(space, [c])), target)[0]]
            assert np.isfinite(inside).any(), target
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("name", "slack"), [("additive", 1e-9), ("greedy", 0.5), ("swaps", 0.02), ("surrogate", 0.1)]
)
def test_in_an_additive_world_searchers_end_near_its_optimum(name: str, slack: float) -> None:
    space, cost = model(10, 2, **TOY)
    target, bench = middle(cost, 0.3, "bits"), Bench(space)
    found = find_searcher(name)(Problem(space, cost, [target], bench.measure, 60, 0, bench.fit))
    best = min(v for c, v in found if cost.within(cost.totals(Choices.of(space, [c])), target)[0])
    optimum = solve(bench.table[..., None], cost, target).score
    chance = min(v for _, v in SEARCHERS["random"](Problem(space, cost, [target], Bench(space).measure, 60)))
    assert optimum - 1e-9 <= best <= optimum * (1 + slack)
    assert best < chance


def test_a_screen_costs_its_share_of_the_measurements_and_chooses_what_is_measured() -> None:
    space, cost = model(10, 2, **TOY)
    target, bench, asked = middle(cost, 0.3, "bits"), Bench(space), []
    draws = space.sample(20, 5)
    start = list(zip(draws, Bench(space).measure(draws), strict=True))

    def screen(known: Any, proposed: list[QuantConfig]) -> list[float]:
        assert {c.digest for c, _ in start} <= {c.digest for c, _ in known}
        asked.append(dict(zip([c.digest for c in proposed], Bench(space).measure(proposed), strict=True)))
        return list(asked[-1].values())

    problem = Problem(space, cost, [target], bench.measure, 30, 0, bench.fit, start, screen, 0.1)
    found = SEARCHERS["surrogate"](problem)
    seen = {c.digest for c, _ in start} | {c.digest for c, _ in found} | {d for one in asked for d in one}
    assert len(found) <= 30 - 0.1 * len(seen - {found[-1][0].digest}) + 1 and len(found) > 15
    measured = {c.digest for c, _ in found}
    first = sorted(asked[0].values())
    chosen = [v for d, v in asked[0].items() if d in measured]
    assert len(chosen) < len(first) and np.mean(chosen) < np.mean(
        first
    )  # the true value as the screen: the better ones are measured


def test_damages_that_could_not_be_measured_are_interpolated() -> None:
    space, cost = model(12, 2, schemes=["usq2", "usq3", "usq4", "usq6", "usq8", "vq2", "vq3", "vq4"])
    target, bench = middle(cost, 0.3, "bits"), Bench(space)
    found = SEARCHERS["additive"](
        Problem(space, cost, [target], bench.measure, 30)
    )  # 96 pairs, 24 of them measured
    best = min(v for c, v in found if cost.within(cost.totals(Choices.of(space, [c])), target)[0])
    assert len(found) == 30 and best <= solve(bench.table[..., None], cost, target).score * 1.01


def test_random_configurations_lie_within_and_near_their_target() -> None:
    space, cost = model(20, 3)
    for names in (("bits",), ("bops",), ("bytes", "bops")):
        target = middle(cost, 0.3, *names)
        rows = random_within(space, cost, target, 30, 1)
        options = Options.of(cost, target)
        assert len(rows) == 30 and cost.within(cost.totals(rows), target).all()
        assert np.median(options.used(options.columns.join(rows))[0] / options.caps[0]) > 0.9
    assert random_within(space, cost, target, 30, 1) == rows != random_within(space, cost, target, 30, 2)


def test_a_problem_that_makes_no_sense_is_refused() -> None:
    space, cost = model(4, **TOY)
    bench, target = Bench(space), middle(cost, 0.4, "bits")
    for targets, count, reason in (
        ([], 9, "at least one target"),
        ([target, target], 1, "too few for 2 targets"),
        ([target, middle(cost, 0.4, "bops")], 9, "one kind"),
    ):
        with pytest.raises(AquabitError, match=reason):
            Problem(space, cost, targets, bench.measure, count)
    with pytest.raises(AquabitError, match=r"'annealing' is unknown; known: uniform"):
        find_searcher("annealing")
    with pytest.raises(AquabitError, match="needs `fit`"):
        SEARCHERS["surrogate"](Problem(space, cost, [target], bench.measure, 9))


# ---- evolution


def test_the_front_of_an_evolution_is_that_of_brute_force() -> None:
    pytest.importorskip("pymoo")
    space, cost = model(5, 4, **TOY)
    predict, targets = interacting(space, 4), [middle(cost, share, "bits") for share in (0.6, 0.2)]
    rows = every(space, (8,))
    values = predict(rows)
    found = evolve(predict, cost, targets, generations=40)
    own, own_sizes = predict(found), cost.totals(found)["bytes"]
    for target in targets:
        inside, own_inside = (cost.within(cost.totals(rows), target), cost.within(cost.totals(found), target))
        assert own[own_inside].min() <= values[inside].min() + 0.02 * np.ptp(values)
    assert not (
        (own[:, None] >= own) & (own_sizes[:, None] > own_sizes)
    ).any()  # none beside a better and smaller one
    again = evolve(predict, cost, targets, generations=40)
    assert again == found


def test_starts_are_where_an_evolution_begins() -> None:
    pytest.importorskip("pymoo")
    space, cost = model(30, 2)
    predict, target = interacting(space), middle(cost, 0.2, "bits", "bops")
    start = random_within(space, cost, target, 1, 0)
    found = evolve(predict, cost, [target], [start], generations=1)
    assert predict(found).min() <= predict(start)[0]


def test_the_loop_proposes_from_an_evolution_too() -> None:
    pytest.importorskip("pymoo")
    space, cost = model(6, 1, **TOY, pinned={"l2": "usq8"})
    budget, lab = middle(cost, 0.4, "bits"), Lab(space, 60)
    found = lab.search(cost, budget, method="evolve", rounds=1)
    assert len(found) == 8 and all(
        cost.within(cost.totals(Choices.of(space, [c.config])), c.target)[0] for c in found
    )
    rows = every(space, (8,))
    values = lab.truth(rows[cost.within(cost.totals(rows), budget)])
    assert lab.best(cost, budget) <= np.quantile(values, 0.02)
    with pytest.raises(AquabitError, match=r"method 'luck' is unknown; known: program, surrogate, evolve"):
        lab.search(cost, budget, method="luck")


def test_without_pymoo_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymoo.optimize", None)
    space, cost = model(4, **TOY)
    with pytest.raises(AquabitError, match=r"pip install 'aquabit\[evolve\]'"):
        evolve(interacting(space), cost, [middle(cost, 0.4, "bits")])


# ---- ties, proofs and scales


def operations(cost: CostModel, config: QuantConfig) -> float:
    return cost(config).operations


def test_a_tie_goes_to_the_formats_of_fewest_operations() -> None:
    space, cost = model(8, 3, schemes=["usq2", "aq1x6g8", "usq4"])
    rng, budget = np.random.default_rng(0), middle(cost, 0.4, "bits")
    scores = rng.normal(size=(8, len(space.schemes), 1))
    scores[:, 2] = scores[:, 1]  # aq1x6g8 as good as usq2, and smaller
    for table, ties in ((scores, 0.0), (scores + 1e-5 * rng.random(scores.shape), 1e-3)):
        plain, light = solve(table, cost, budget), solve(table, cost, budget, ties=ties)
        span = sum(float(np.ptp(row[1:])) for row in table)
        assert light.score <= plain.score + ties * span + 1e-6 * span and light.bound == pytest.approx(
            plain.bound
        )
        chosen = [s.choices.config for s in (plain, light)]
        assert operations(cost, chosen[1]) <= operations(cost, chosen[0])
        assert cost.within(cost.totals(light.choices), budget)[0]
        rows = every(space, (8,)) if ties == 0 else light.choices
        inside = cost.within(cost.totals(rows), budget)
        totals = table[np.arange(8), rows.weights[inside], 0].sum(1)
        tied = inside.nonzero()[0][totals <= plain.score + 1e-6 * span]
        least = min((operations(cost, c) for c in rows[tied].configs()), default=np.inf)
        assert operations(cost, chosen[1]) <= least * (1 + 1e-9)


def test_predictions_that_tie_go_to_fewer_operations_and_others_stay() -> None:
    space, cost = model(8, 3, schemes=["usq2", "aq1x6g8", "usq4"])
    budget = middle(cost, 0.6, "bits")
    start = Choices.of(space, [space.uniform("usq2")])

    def predict(rows: Choices) -> np.ndarray:  # what l0 has matters, all else hardly
        return (rows.weights[:, 0] != 1) + 0.001 * (rows.weights[:, 1:] != 1).sum(1)

    work = cost.macs[:, None] * cost.operations
    saves = np.maximum(work[:, 1:2] - work, 0).max(1)
    saves[0] = 0.0  # it may not change
    assert (saves > 0).sum() > 2
    for slack, changes in ((0.0025, 2), (0.1, int((saves > 0).sum()))):
        light = lighten(start, predict, cost, budget, slack)
        changed = np.flatnonzero(light.weights[0] != 1)
        assert set(changed) == set(np.argsort(-saves)[:changes]) and (light.acts == start.acts).all()
    assert lighten(start, predict, cost, budget, slack=0.0) == start
    assert lighten(start, predict, cost, budget, slack=9.0, rows=3) == start

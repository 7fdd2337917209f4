"""Bounds of the surrogate against all configurations of small spaces, and the optimum that branch and
bound finds under a budget."""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import numpy as np
import pytest

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget
from aquabit.search.bounds import EnsembleBound
from aquabit.search.options import Options
from aquabit.search.proof import branch_and_bound
from aquabit.sensitivity.features import SKETCH, Encoder
from aquabit.sensitivity.surrogate.estimators import AverageBits, Surrogate
from aquabit.space import SearchSpace, make_space


class Small:
    """A made-up model of a few layers, a surrogate fitted to an objective that is not additive, and all
    configurations."""

    def __init__(
        self,
        seed: int,
        probed: bool,
        steps: bool = False,
        count: int = 4,
        added_up: bool = False,
        **options: Any,
    ):
        rng, graph = np.random.default_rng(seed), nx.DiGraph(other_elements=10)
        for i in range(count):
            shape = (int(rng.integers(8, 40)), int(rng.integers(8, 60)))
            graph.add_node(
                f"l{i}",
                kind="layer",
                depth=i,
                operator=f"o{i % 2}",
                block=f"b{i // 2}",
                shape=shape,
                macs=shape[0] * shape[1],
            )
        groups = {"total": 10, "starts": [0, 5]} if steps else None
        self.space: SearchSpace = make_space(
            graph, "print", "toy", schemes=["usq2", "usq3", "usq4", "vq2"], step_groups=groups, **options
        )
        self.cost, space = CostModel(graph, self.space), self.space
        errors = {
            (k, str(s)): float(4.0**-s.bits * rng.lognormal(0, 0.5))
            for k, row in space.choices.items()
            for s in row
        }
        levels = [
            *dict.fromkeys(str(s) for row in space.choices.values() for s in row),
            *("a6", "a8", "a6/8", "a8/6"),
        ]
        probes = {
            (k, v): {
                "damage": (d := float(rng.lognormal(-4, 2))),
                "sketch": rng.normal(size=SKETCH) * (d / SKETCH) ** 0.5,
            }
            for k, v in itertools.product(space.layers, levels)
        }
        self.encoder = Encoder(space, graph, errors, probes if probed else None)
        rows = self.drawn = Choices.of(space, space.sample(80, seed))
        error = self.encoder.error[np.arange(count), rows.weights] * (
            1 + self.encoder.activation_reduction(rows.group_codes)[0]
        )
        y = self.y = np.exp(
            error @ rng.lognormal(0, 1, count) + 3 * np.sqrt(error[:, 0] * error[:, -1])
        ) + 0.1 * rng.random(80)
        if added_up:
            y = self.y = y + self.encoder.damages(rows).sum(1)
            model = Surrogate.for_model(self.encoder, rounds=20, leaf=2.0)
        else:
            model = Surrogate(rounds=20, leaf=2.0, linear=float(rng.choice([0.0, 0.5, 1.0])))
        self.surrogate = model.fit(self.encoder(rows), y)

    def predict(self, rows: Choices) -> np.ndarray:
        return self.surrogate.predict(self.encoder(rows))

    def bound(self, options: Options) -> EnsembleBound:
        return EnsembleBound(self.surrogate, self.encoder, options.columns.each, options.columns.allowed)


def between(cost: CostModel, share: float, *names: str) -> Budget:
    """Limits at a share of the way from the smallest to the largest possible cost."""
    limits = cost.limits(8 if names == ("bits",) else None)
    return Budget(**{n: limits[n][0] + share * (limits[n][1] - limits[n][0]) for n in names})  # type: ignore[arg-type]


def all_choices(allowed: np.ndarray) -> np.ndarray:
    return np.array(list(itertools.product(*(np.flatnonzero(row) for row in allowed))))


@pytest.mark.parametrize(
    ("probed", "steps", "added_up"),
    [(False, False, False), (True, False, False), (True, False, True), (True, True, True)],
)
@pytest.mark.parametrize("seed", range(2))
def test_no_prediction_in_a_box_within_the_budget_is_below_the_bound(
    seed: int, probed: bool, steps: bool, added_up: bool
) -> None:
    made = Small(seed, probed, steps, 3 if steps else 4, added_up, excluded=["l2"])
    assert not added_up or made.surrogate.linear_
    options = Options.of(made.cost, between(made.cost, 0.5, "bits", "bops"))
    bound, rng, tight = made.bound(options), np.random.default_rng(seed), []
    for share in (1.0, 1.0, 0.6, 0.6, 0.4, 0.2):
        allowed = options.columns.allowed & (rng.random(options.columns.allowed.shape) < share)
        for i in np.flatnonzero(~allowed.any(1)):
            allowed[i, rng.choice(np.flatnonzero(options.columns.allowed[i]))] = True
        choices = all_choices(allowed)
        for caps in (options.caps, options.caps * 10):
            inside = choices[(options.used(choices) <= caps[:, None]).all(0)]
            found, fractions = bound(allowed, options.costs, caps)
            if not len(inside):
                continue
            values = made.predict(options.columns.split(inside))
            assert found <= values.min()
            assert fractions is None or np.allclose(fractions.sum(1), 1)
            tight.append((values.min() - found) / values.std() if values.std() > 0 else 0.0)
    assert np.median(tight) < (6 if probed else 2)  # a bound of minus infinity would be valid too


@pytest.mark.parametrize("added_up", [False, True])
def test_a_single_configuration_is_bounded_by_its_own_prediction(added_up: bool) -> None:
    made = Small(1, probed=True, added_up=added_up)
    options = Options.of(made.cost, between(made.cost, 0.5, "bits"))
    bound = made.bound(options)
    for config in made.space.sample(5, 9):
        (choice,) = options.columns.join(options.columns.settle(Choices.of(made.space, [config])))
        allowed = np.eye(options.columns.allowed.shape[1], dtype=bool)[choice]
        found, _ = bound(allowed, options.costs, options.caps * 10)
        value = made.predict(options.columns.split(choice[None]))[0]
        assert (
            found == pytest.approx(value, abs=0.05 * made.surrogate.spread_) and found <= value
        )  # sums that lie on a threshold


@pytest.mark.parametrize("names", [("bits",), ("bits", "bops")])
@pytest.mark.parametrize("probed", [False, True])
def test_branch_and_bound_finds_and_proves_the_optimum_of_brute_force(
    probed: bool, names: tuple[str, ...]
) -> None:
    made = Small(2, probed, count=4 if names == ("bits",) else 3)
    budget = between(made.cost, 0.45, *names)
    options = Options.of(made.cost, budget)
    choices = all_choices(options.columns.allowed)
    truth = made.predict(options.columns.split(choices[options.keeps(choices)])).min()
    low = np.where(options.columns.allowed, options.costs[0], np.inf)
    if len(options.caps) > 1:
        low = (
            low / options.caps[0]
            + np.where(options.columns.allowed, options.costs[1], np.inf) / options.caps[1]
        )
    start = options.columns.split(low.argmin(1))
    found = branch_and_bound(
        start, made.predict, made.bound(options), made.cost, budget, nodes=600, rows=1, tolerance=1e-3
    )
    assert (
        found.predicted == pytest.approx(truth, rel=2e-3)
        and found.bound <= truth
        and found.gap <= 2e-3 * abs(truth)
    )
    assert 1 < found.nodes < 600
    short = branch_and_bound(start, made.predict, made.bound(options), made.cost, budget, nodes=1, rows=1)
    assert short.nodes == 1 and short.bound <= truth and short.gap >= found.gap


def test_what_cannot_be_bounded_is_said() -> None:
    made = Small(0, probed=False)
    budget = between(made.cost, 0.5, "bits")
    options = Options.of(made.cost, budget)
    with pytest.raises(AquabitError, match="boosted trees only, not for AverageBits"):
        EnsembleBound(AverageBits(), made.encoder, options.columns.each, options.columns.allowed)  # type: ignore[arg-type]
    over = options.columns.split(options.costs[0].argmax(1))
    with pytest.raises(AquabitError, match="outside the budget"):
        branch_and_bound(over, made.predict, made.bound(options), made.cost, budget)
    choices = all_choices(options.columns.allowed)
    choices = choices[options.keeps(choices)]
    place = made.encoder.columns.index("error:model")
    for linear, proven in ((0.0, True), (0.5, False)):  # a kind of feature that the table does not have
        made.surrogate.set_params(linear=linear).fit(made.encoder(made.drawn), made.y)
        made.encoder.columns[place] = "novel:model"
        bound, _ = made.bound(options)(options.columns.allowed, options.costs, options.caps)
        made.encoder.columns[place] = "error:model"
        assert np.isfinite(bound) == proven
        assert bound <= made.predict(options.columns.split(choices)).min()

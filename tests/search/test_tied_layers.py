"""Tied layers stay together in whatever designs and searches return, and the program with them is that of
brute force over what keeps the ties."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget, QuantConfig, Scheme
from aquabit.search.evolution import evolve
from aquabit.search.integer_program import choice_effects, solve
from aquabit.search.local_search import improve, lighten
from aquabit.search.options import Options, activation_choices
from aquabit.search.proof import branch_and_bound
from aquabit.search.refine import Seen, refine
from aquabit.search.worth_fitting import worth_fitting
from aquabit.sensitivity.damages import Damages, good_contexts
from aquabit.sensitivity.designs import balanced, near, swaps
from aquabit.sensitivity.effects.context_effects import swapped
from aquabit.sensitivity.effects.predicted import draw_contexts, find_players
from aquabit.sensitivity.effects.validation import Contexts, plan_swaps
from aquabit.space import SearchSpace, make_space
from tests.search.test_bounds import Small, all_choices, between
from tests.worlds import Lab, every, interacting, middle, timed, total

TIED = [["*.q", "*.k"], ["a.up", "b.up"]]
SHAPES = {  # q and k of a block differ in operator type and shape, and each shares codebooks with its like
    "a.q": ("q", (16, 24)),
    "a.k": ("k", (16, 32)),
    "a.up": ("up", (24, 9)),
    "b.q": ("q", (16, 24)),
    "b.k": ("k", (16, 32)),
    "b.up": ("up", (7, 24)),
    "end": ("end", (5, 16)),
}
FORMATS = {"plain": ["usq2", "usq4", "fp"], "shared": ["usq2", "usq4", "aq2x4g8s"]}
BUDGETS = [("bits",), ("bytes",), ("bits", "bops"), ("latency_ms",)]


def model(
    formats: str = "plain", shapes: Mapping[str, tuple[str, tuple[int, ...]]] = SHAPES, **options: Any
) -> tuple[SearchSpace, CostModel]:
    graph = nx.DiGraph(other_elements=101)
    for i, (name, (operator, shape)) in enumerate(shapes.items()):
        own = {"operator": operator, "block": name[0], "shape": shape, "macs": prod(shape) * (1 + i % 3)}
        graph.add_node(name, kind="linear", depth=i, **own)
    space = make_space(graph, "print", "toy", **{"schemes": FORMATS[formats], "tied": TIED, **options})
    return space, timed(CostModel(graph, space), 0)


def kept(space: SearchSpace, rows: Choices) -> np.ndarray:
    """Boolean [n]: which rows keep the ties, layer by layer."""
    good = np.ones(len(rows), bool)
    for group in space.tied:
        first, *others = (space.layers.index(k) for k in group)
        for i in others:
            good &= (rows.weights[:, i] == rows.weights[:, first]) & (rows.acts[:, i] == rows.acts[:, first])
    return good


def assert_kept(space: SearchSpace, configs: Sequence[QuantConfig], differing: bool = True) -> None:
    assert configs and all(space.broken_tie(c) is None for c in configs)
    if differing:
        assert len({c[space.tied[0][0]].weight for c in configs}) > 1


def damages(space: SearchSpace, seed: int = 0) -> Damages:
    rng = np.random.default_rng(seed)
    alone = {cell: {"damage": float(rng.lognormal(-6, 1.5)), "sketch": []} for cell in space.cells()}
    return Damages.of(space, alone)


# ---- designs


@pytest.mark.parametrize("formats", FORMATS)
def test_designs_keep_ties(formats: str) -> None:
    space, cost = model(formats, activations=[8, 6])
    known, rng = damages(space), np.random.default_rng(0)
    assert_kept(space, space.sample(60, 1))
    assert_kept(space, balanced(space, 60, 1))
    assert_kept(space, near(known, cost, 60, 1))
    assert_kept(space, swaps(space, 60, 1))
    assert_kept(space, swaps(space, 60, 1, known, cost))
    bits = float(np.median(cost.totals(Choices.of(space, space.sample(60, 1)))["bits"]))
    assert_kept(space, draw_contexts(space, cost, bits, 40, rng).configs(), formats == "plain")
    assert_kept(space, good_contexts(known, cost, bits, 40, rng).configs(), formats == "plain")
    for drawn in (space.sample(60, 1), balanced(space, 60, 1), near(known, cost, 60, 1)):
        acts = {c["a.q"].act for c in drawn}
        assert acts == {8, 6}, "activations are drawn too, together"


def test_a_swap_of_one_layer_swaps_its_group() -> None:
    space, cost = model()
    players = find_players(space, (Scheme.parse("usq4"), Scheme.parse("usq2")))
    assert [p.layer for p in players] == ["a.q", "a.up", "b.q", "end"], "a group is one player"
    ends = swapped(Choices.of(space, space.sample(3)), players)
    assert_kept(space, ends.configs())
    contexts = Contexts(space, cost, None, cost(space.uniform("usq4")).bits_per_weight - 0.7, 0)
    planned = plan_swaps(players, [p.layer for p in players], contexts, 12, 0)
    for flip in planned:
        before, after = flip.ends
        assert_kept(space, flip.ends, differing=False)
        changed = {k for k in space.layers if before[k] != after[k]}
        assert changed == set(space.tied_to(flip.layer))


# ---- the program


@pytest.mark.parametrize("names", BUDGETS)
@pytest.mark.parametrize("formats", FORMATS)
@settings(deadline=None, max_examples=6)
@given(share=st.floats(0.1, 0.9), seed=st.integers(0, 9))
def test_the_program_is_brute_force_over_what_keeps_the_ties(
    names: tuple[str, ...], formats: str, share: float, seed: int
) -> None:
    space, cost = model(formats, activations=[8, 6] if len(names) > 1 or "latency_ms" in names else [8])
    budget = middle(cost, share, *names)
    activations = activation_choices(space, budget)
    scores = np.random.default_rng(seed).normal(size=(len(SHAPES), len(space.schemes), len(activations)))
    rows = _all(space, activations)
    inside = np.asarray(cost.within(cost.totals(rows), budget))
    if not inside.any():
        with pytest.raises(AquabitError, match="cannot be kept"):
            solve(scores, cost, budget)
        return
    truth = total(scores, activations, rows)[inside].min()
    found = solve(scores, cost, budget)
    assert_kept(space, [found.choices.config], differing=False)
    assert found.score == pytest.approx(truth, abs=1e-6)
    assert total(scores, activations, found.choices)[0] == pytest.approx(truth, abs=1e-6)
    assert cost.within(cost.totals(found.choices), budget).all()


def _all(space: SearchSpace, activations: tuple[Any, ...]) -> Choices:
    """All configurations that keep the ties: those of the groups' first layers, spread over the others."""
    options = [
        list(itertools.product([space.schemes.index(s) for s in space.choices[k]], range(len(activations))))
        for k, *_ in space.grouped()
    ]
    table = np.array(list(itertools.product(*options)))[:, space.groups.index]
    return Choices.picked(space, table[..., 0], table[..., 1], activations)


def test_the_brute_force_of_these_tests_is_that_of_the_others() -> None:
    space, _ = model()
    rows = every(space, (8,))
    mine, theirs = (
        {c.digest for c in part.configs()} for part in (_all(space, (8,)), rows[kept(space, rows)])
    )
    assert mine == theirs and len(mine) == 3**4


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(
    "schemes", [["usq2"], ["aq2x4g8s", "usq3", "aq1x4g8s"], ["usq2", "usq6", "aq2x4g8s"]]
)
def test_limits_are_what_ties_can_reach(formats: str, schemes: list[str]) -> None:
    space, cost = model(formats, activations=[8, 6], **({"schemes": schemes} if formats == "shared" else {}))
    totals = cost.totals(_all(space, (8, 6)))
    for name, (low, high) in cost.limits().items():
        assert low == pytest.approx(totals[name].min()) and high == pytest.approx(totals[name].max())


def test_costs_of_options_are_those_of_configurations() -> None:
    space, cost = model("shared", activations=[8, 6])
    options = Options.of(cost, middle(cost, 0.5, "bytes", "bops", "latency_ms"))
    rows = _all(space, (8, 6))[::7]
    choice = options.columns.join(rows)
    assert (choice >= 0).all() and options.columns.split(choice) == rows
    totals, used = cost.totals(rows), options.used(choice)
    assert used[0] == pytest.approx(totals["bytes"] - cost.other_bytes)
    assert used[1] == pytest.approx(totals["bops"] - cost.other_bops)
    assert used[2] == pytest.approx(totals["latency_ms"] - cost.latency.rest)  # type: ignore[union-attr]
    torn = replace(rows, weights=np.where(np.arange(len(SHAPES)) == 1, 0, rows.weights))
    broken = ~kept(space, torn)
    assert broken.any() and ((options.columns.join(torn) < 0).any(1) == broken).all()


# ---- searches


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("seed", range(2))
def test_searches_keep_ties(formats: str, seed: int) -> None:
    space, cost = model(formats, activations=[8, 6])
    predict, budget = interacting(space, seed), middle(cost, 0.5, "bits", "bops")
    activations, rng = activation_choices(space, budget), np.random.default_rng(seed)
    contexts = Choices.of(space, space.sample(4, seed))
    effects = choice_effects(predict, space, contexts, activations)
    start = solve(effects.mean(0), cost, budget).choices
    assert_kept(space, [start.config], differing=False)
    rows = _all(space, activations)
    inside = rows[np.asarray(cost.within(cost.totals(rows), budget))]
    truth = predict(inside).min()
    found = improve(start, predict, cost, budget, seed)
    assert_kept(space, [found.choices.config], differing=False)
    assert found.predicted == pytest.approx(predict(found.choices)[0]) and found.predicted <= found.start
    assert found.predicted <= truth + 0.1
    light = lighten(found.choices, predict, cost, budget, 0.05)
    assert_kept(space, [light.config], differing=False)

    def look(row: Choices) -> Seen:
        here = choice_effects(predict, space, row, activations)[0]
        own = (np.arange(len(SHAPES)), row.weights[0], row.act_index(activations)[0])
        return Seen(float(predict(row)[0]), here - here[own][:, None, None])

    steps = refine(inside[int(rng.integers(len(inside)))], look, predict, cost, budget)
    assert_kept(space, [s.choices.config for s in steps], differing=False)
    assert all(step.changed <= len(space.groups.first) for step in steps)


def test_effects_of_a_group_are_of_all_its_members_at_once() -> None:
    space, _ = model()
    predict, context = interacting(space), Choices.of(space, [space.uniform("usq4")])
    effects = choice_effects(predict, space, context)[0]
    first, second = (space.layers.index(k) for k in space.tied[0])
    column = space.columns[Scheme.parse("usq2")]
    both = space.swapped(context.config, "a.q", Scheme.parse("usq2"))
    moved = predict(Choices.of(space, [both]))[0] - predict(context)[0]
    at = space.columns[Scheme.parse("usq4")]
    assert effects[first, column, 0] - effects[first, at, 0] == pytest.approx(moved)
    assert (effects[second][np.isfinite(effects[second])] == 0).all()


def test_evolution_keeps_ties() -> None:
    pytest.importorskip("pymoo")
    space, cost = model()
    budget = middle(cost, 0.5, "bits")
    start = solve(np.zeros((len(SHAPES), len(space.schemes), 1)), cost, budget).choices
    front = evolve(interacting(space), cost, [budget], [start], generations=5)
    assert_kept(space, front.configs())


def test_what_a_surrogate_proposes_keeps_ties() -> None:
    space, cost = model()
    lab = Lab(space, 40)
    found = lab.search(cost, middle(cost, 0.5, "bits"), 2000, rounds=2, per_round=4)
    assert_kept(space, [c.config for c in found], differing=False)


def test_formats_that_are_left_out_are_left_out_of_the_whole_group() -> None:
    shapes = {name: ("up" if name == "end" else name[2:], (192, 192)) for name in SHAPES}
    space, cost = model("plain", shapes, schemes=["usq2", "usq4", "usq6"], levels=[1.5, 2.0, 3.0])
    rng = np.random.default_rng(0)
    features = {
        cell: {"damage": float(rng.lognormal(-6, 3))} for cell in space.cells() if not cell[1].startswith("a")
    }
    narrowed = worth_fitting(space, cost, features, 2.5)
    assert narrowed.tied == space.tied
    assert sum(map(len, narrowed.choices.values())) < sum(map(len, space.choices.values()))


# ---- proofs


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_bounds_hold_and_branch_and_bound_finds_the_optimum(seed: int, probed: bool) -> None:
    made = Small(seed, probed, count=5, tied=[["l0", "l2"], ["l3", "l4"]])
    assert len(made.space.tied) == 2 and kept(made.space, made.drawn).all()
    budget = between(made.cost, 0.5, "bits")
    options = Options.of(made.cost, budget)
    bound, choices = made.bound(options), all_choices(options.columns.allowed)
    inside = choices[options.keeps(choices)]
    values = made.predict(options.columns.split(inside))
    found, _ = bound(options.columns.allowed, options.costs, options.caps)
    assert found <= values.min() and np.isfinite(found)
    missed = []
    for choice in inside[:: max(1, len(inside) // 20)]:
        alone = np.eye(options.columns.allowed.shape[1], dtype=bool)[choice]
        low, _ = bound(alone, options.costs, options.caps * 10)
        value = made.predict(options.columns.split(choice[None]))[0]
        assert low <= value
        missed.append(value - low)
    assert np.median(missed) < 0.03 * made.surrogate.spread_, "of single choices but for sums on thresholds"
    worst = options.columns.split(inside[int(values.argmax())])
    best = branch_and_bound(worst, made.predict, bound, made.cost, budget, nodes=400)
    assert best.predicted == pytest.approx(values.min(), abs=1e-4 * abs(values.min()) + 1e-9)
    assert_kept(made.space, [best.choices.config], differing=False)
    assert best.bound <= values.min() + 1e-9


def test_a_start_that_breaks_a_tie_is_refused_by_its_layers() -> None:
    space, cost = model()
    torn = space.uniform("usq4").with_layer("a.k", "usq2")
    with pytest.raises(
        AquabitError, match=r"tied layers must have the same.*a\.q usq4 at a8, a\.k usq2 at a8"
    ):
        improve(Choices.of(space, [torn]), interacting(space), cost, Budget(bits=6.0))

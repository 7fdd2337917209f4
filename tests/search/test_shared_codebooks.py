"""Schemes that share codebooks: costs, options and searches against brute force, where a codebook counts
once however many use it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
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
from aquabit.layer_formats import LOSS
from aquabit.pipelines import trace
from aquabit.quant.bank import Bank
from aquabit.quant.model import QuantizedDenoiser
from aquabit.scheme import Act, AquabitError, Budget, Calibration, QuantConfig, Scheme
from aquabit.search.integer_program import solve
from aquabit.search.local_search import improve
from aquabit.search.options import Columns, Opening, Options, Predict, activation_choices
from aquabit.search.search_options import SearchOptions, ladder
from aquabit.search.surrogate_search import Experiment, find_candidates
from aquabit.space import SearchSpace, make_space
from benchmarks.research.assign import assign
from tests.conftest import tiny_pipeline

SHARED = ["usq2", "usq4", "aq2x4g8s", "aq2x6g8s"]
LAYERS = {  # q and c have partners; x and c3 are alone with their shapes
    "q0": ("q", (16, 24)),
    "q1": ("q", (16, 24)),
    "q2": ("q", (16, 24)),
    "c0": ("c", (8, 6, 3, 3)),
    "c1": ("c", (8, 6, 3, 3)),
    "x": ("q", (20, 9)),
    "c3": ("c", (8, 6)),
}


def model(
    layers: Mapping[str, tuple[str, tuple[int, ...]]] | None = None, **options: Any
) -> tuple[nx.DiGraph, SearchSpace, CostModel]:
    """Layers named with their operator type and shape, in a graph, a space and its costs."""
    graph = nx.DiGraph(other_elements=101)
    for i, (name, (operator, shape)) in enumerate((layers or LAYERS).items()):
        graph.add_node(
            name,
            kind="layer",
            depth=i,
            operator=operator,
            block=f"b{i % 2}",
            shape=shape,
            macs=prod(shape) * (1 + i % 3),
        )
    space = make_space(graph, "print", "toy", **{"schemes": SHARED, **options})
    return graph, space, CostModel(graph, space)


def every(space: SearchSpace, activations: tuple[Act, ...]) -> Choices:
    """All configurations of a small space."""
    column, off = {s: i for i, s in enumerate(space.schemes)}, len(activations)
    pairs = [
        [(column[s], off if str(row[0]) == "fp" else a) for s in row for a in range(off)]
        for row in space.choices.values()
    ]
    table = np.array(list(itertools.product(*pairs)))
    return Choices.picked(space, table[..., 0], table[..., 1], (*activations, 16))


def counted(graph: nx.DiGraph, picks: Mapping[str, tuple[Scheme, int]]) -> dict[str, float]:
    """Costs by hand: what each layer stores, and once what layers of one operator type and shape share."""
    stored, bops, tables, weights = 0, 0.0, {}, 0
    for name, (scheme, act) in picks.items():
        node = graph.nodes[name]
        codes, codebooks = scheme.stored_bytes(node["shape"])
        stored += codes
        if scheme.shared:
            tables[node["operator"], node["shape"], scheme] = codebooks
        else:
            stored += codebooks
        weights += prod(node["shape"])
        bits = 32 if scheme.kind == "fp" else scheme.code_bits(prod(node["shape"][2:]))
        bops += node["macs"] * bits * (32 if act == 16 else act)
    stored += sum(tables.values())
    return {"bits": 8 * stored / weights, "bytes": stored + 2 * 101, "bops": bops}


def counted_all(graph: nx.DiGraph, space: SearchSpace, rows: Choices) -> dict[str, np.ndarray]:
    table = [
        counted(
            graph, {n: (space.schemes[w], int(a)) for n, w, a in zip(space.layers, ws, bits, strict=True)}
        )
        for ws, bits in zip(rows.weights, rows.acts, strict=True)
    ]
    return {k: np.array([row[k] for row in table]) for k in ("bits", "bytes", "bops")}


def middle(cost: CostModel, share: float, *names: str) -> Budget:
    """Limits at a share of the way from the smallest to the largest possible cost."""
    limits = cost.limits(None if "bops" in names else 8)
    values = {n: limits[n][0] + share * (limits[n][1] - limits[n][0]) for n in names}
    return Budget(**{n: int(v) if n == "bytes" else v for n, v in values.items()})  # type: ignore[arg-type]


def scored(scores: np.ndarray, activations: tuple[Act, ...], rows: Choices) -> np.ndarray:
    """Sums of scores [L, S, A] over the layers of each row."""
    place = rows.act_index((*activations, 16)) % len(activations)  # 16 of excluded layers: any
    return np.asarray(scores[np.arange(rows.weights.shape[1]), rows.weights, place].sum(1))


def only(*names: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {n: LAYERS[n] for n in names}


SPACES: dict[str, dict[str, Any]] = {
    "shared": {"layers": only("q0", "q1", "q2", "c0", "x")},
    "two names": {"layers": only("q0", "q1", "c0", "c1", "c3")},
    "own and shared": {
        "layers": only("q0", "q1", "q2"),
        "schemes": ["usq3", "aq2x4g8", "aq2x4g8s", "aq1x6g4s", "vq3c"],
    },
    "pinned, excluded": {
        "layers": only("q0", "q1", "q2", "c0", "c1"),
        "pinned": {"q1": "aq2x6g8s"},
        "excluded": ["c1"],
    },
    "codebooks that are worth it": {
        "layers": {f"w{i}": ("w", (64, 64)) for i in range(4)},
        "schemes": ["usq4", "aq2x6g8s", "aq2x4g8s"],
    },
    "no other scheme": {
        "layers": {f"w{i}": ("w", (8, 16)) for i in range(5)},
        "schemes": ["aq2x4g8s", "aq2x6g8s"],
    },
    "one scheme": {"layers": {f"w{i}": ("w", (8, 16)) for i in range(12)}, "schemes": ["aq2x4g8s"]},
    "more codebooks than layers": {
        "layers": only("q0", "q1"),
        "schemes": ["aq1x4g8s", "aq2x4g8s", "aq2x6g8s", "aq1x6g8s"],
    },
}
spaces = pytest.mark.parametrize("name", SPACES)


# ---- costs


@spaces
def test_costs_are_those_of_brute_force_on_every_configuration(name: str) -> None:
    graph, space, cost = model(**SPACES[name])
    rows = every(space, (8,))
    rng = np.random.default_rng(0)
    rows = replace(rows, acts=np.where(rows.acts == 8, rng.choice([8, 6], rows.acts.shape), rows.acts))
    truth, totals = counted_all(graph, space, rows), cost.totals(rows)
    single = [cost(config) for config in rows.configs()]
    for key, attribute in (("bits", "bits_per_weight"), ("bytes", "bytes"), ("bops", "bops")):
        assert totals[key] == pytest.approx(truth[key], rel=1e-12)
        assert [getattr(c, attribute) for c in single] == pytest.approx(list(truth[key]), rel=1e-12)
    assert (totals["bytes"] == truth["bytes"]).all() and [c.bytes for c in single] == list(truth["bytes"])
    assert len(set(truth["bytes"].tolist())) > 1 or name == "one scheme"


def test_one_configuration_is_found_at_its_exact_size() -> None:
    _, space, cost = model(**SPACES["one scheme"])
    scores = np.ones((len(space.choices), 2, 1))
    for key, value in cost.totals(every(space, (8,))).items():
        if key != "bops":
            assert solve(scores, cost, Budget(**{key: value[0]})).score == len(space.choices)


def test_a_codebook_is_paid_for_by_its_first_user_alone() -> None:
    _, space, cost = model(
        {**only("q0", "q1", "q2", "c0", "c1"), "k0": ("k", (16, 24)), "k1": ("k", (16, 24))}
    )
    scheme, base = Scheme.parse("aq2x4g8s"), space.uniform("usq2")
    codes, tables = scheme.stored_bytes((16, 24))
    plain = Scheme.parse("usq2").stored_bytes((16, 24))[0]
    sizes, config = [cost(base).bytes], base
    for layer in ("q0", "q1", "q2"):
        config = config.with_layer(layer, scheme, codebook=space.codebook(layer))
        sizes.append(cost(config).bytes)
    assert np.diff(sizes).tolist() == [codes + tables - plain, codes - plain, codes - plain]
    other = config.with_layer("c0", scheme, codebook=space.codebook("c0"))  # the same scheme, other codebooks
    conv = scheme.stored_bytes((8, 6, 3, 3))
    assert (
        cost(other).bytes - cost(config).bytes
        == sum(conv) - Scheme.parse("usq2").stored_bytes((8, 6, 3, 3))[0]
    )
    other = config.with_layer(
        "k0", scheme, codebook=space.codebook("k0")
    )  # another operator type of the same shape
    assert cost(other).bytes - cost(config).bytes == codes + tables - plain
    assert (
        space.codebook("q0") == space.codebook("q2")
        and len({space.codebook(k) for k in ("q0", "k0", "c0")}) == 3
    )


@spaces
@pytest.mark.parametrize("act", [None, 8, 6])
def test_limits_are_the_ends_of_enumeration(name: str, act: int | None) -> None:
    _, space, cost = model(
        **SPACES[name], activations=[8] if name in ("shared", "one scheme") and act is None else [8, 6]
    )
    totals = cost.totals(every(space, space.activations if act is None else (act,)))
    limits = cost.limits(act)
    for key in ("bits", "bytes", "bops"):
        assert limits[key] == pytest.approx((totals[key].min(), totals[key].max()), rel=1e-12), key
    for key in ("bits", "bytes"):  # they can be asked for, and a hair beyond is refused by both names
        low, high = limits[key]
        for value in {low, high}:
            cost.check(Budget(**{key: value}), act)  # type: ignore[arg-type]
        for value in (low * 0.999, high * 1.001):
            with pytest.raises(AquabitError) as error:
                cost.check(Budget(**{key: value}), act)  # type: ignore[arg-type]
            assert f"{low:.6g} to {high:.6g}" in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 4),
    shape=st.sampled_from([(3, 16), (16, 24), (40, 8), (64, 64)]),
    schemes=st.lists(
        st.sampled_from([*SHARED, "usq8", "aq1x4g8s", "aq3x4g4s", "aq2x4g8"]),
        min_size=1,
        max_size=5,
        unique=True,
    ),
)
def test_size_limits_are_exact_whatever_the_schemes(
    count: int, shape: tuple[int, int], schemes: list[str]
) -> None:
    _, space, cost = model({f"w{i}": ("w", shape) for i in range(count)}, schemes=schemes)
    sizes = cost.totals(every(space, (8,)))["bytes"]
    assert cost.limits(8)["bytes"] == (sizes.min(), sizes.max())


# ---- options


BUDGETS = [("bits",), ("bytes",), ("bops",), ("bits", "bops"), ("bits", "bytes", "bops")]


@pytest.mark.parametrize("names", BUDGETS)
@pytest.mark.parametrize(
    "name", ["two names", "pinned, excluded", "own and shared", "codebooks that are worth it"]
)
def test_options_agree_with_the_costs_on_every_configuration(name: str, names: tuple[str, ...]) -> None:
    _, space, cost = model(**SPACES[name])
    budget = middle(cost, 0.45, *names)
    options = Options.of(cost, budget)
    rows = every(space, activation_choices(space, budget))
    choice = options.columns.join(rows)
    assert (choice >= 0).all()
    totals, used = cost.totals(rows), options.used(choice)
    for r, limit in enumerate(options.names):
        expected = totals["bops"] if limit == "bops" else totals["bytes"] - cost.other_bytes
        assert used[r] == pytest.approx(expected, rel=1e-12)
    inside = cost.within(totals, budget)
    assert (options.keeps(choice) == inside).all() and 0 < inside.sum() < len(inside)
    assert ((options.overrun(used) <= 0) == inside).all()
    assert (options.used(choice[7]) == used[:, 7]).all() and bool(options.keeps(choice[7])) == inside[7], (
        "one row is as many"
    )


@pytest.mark.parametrize("names", BUDGETS)
@pytest.mark.parametrize("name", ["shared", "two names", "pinned, excluded", "own and shared"])
def test_changes_are_what_each_single_change_costs(name: str, names: tuple[str, ...]) -> None:
    _, _, cost = model(**SPACES[name])
    options = Options.of(cost, middle(cost, 0.45, *names))
    rng = np.random.default_rng(0)
    for _ in range(25):
        choice = np.array([rng.choice(np.flatnonzero(row)) for row in options.columns.allowed])
        changes = options.changes(choice)
        assert changes.shape == options.costs.shape
        for layer, column in np.ndindex(changes.shape[1:]):
            changed = choice.copy()
            changed[layer] = column
            assert changes[:, layer, column] == pytest.approx(
                options.used(changed) - options.used(choice), rel=1e-9, abs=1e-6
            )


# ---- integer program


@pytest.mark.parametrize("names", [("bits",), ("bytes",), ("bits", "bops")])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_solve_finds_the_optimum_of_brute_force(names: tuple[str, ...], seed: int, share: float) -> None:
    _, space, cost = model(**SPACES["two names" if seed % 2 else "pinned, excluded"])
    budget = middle(cost, share, *names)
    activations = activation_choices(space, budget)
    scores = np.random.default_rng(seed).normal(
        size=(len(space.choices), len(space.schemes), len(activations))
    )
    rows = every(space, activations)
    inside = cost.within(cost.totals(rows), budget)
    truth = scored(scores, activations, rows)[inside].min()
    found = solve(scores, cost, budget)
    assert found.score == pytest.approx(truth, abs=1e-6) and found.gap < 1e-6 and found.bound <= truth + 1e-6
    assert cost.within(cost.totals(found.choices), budget).all()
    assert scored(scores, activations, found.choices)[0] == pytest.approx(found.score)


@pytest.mark.parametrize("name", ["codebooks that are worth it", "no other scheme", "shared"])
def test_every_size_is_reached_to_the_byte(name: str) -> None:
    _, space, cost = model(**SPACES[name])
    rows = every(space, (8,))
    sizes = cost.totals(rows)["bytes"]
    scores = np.random.default_rng(1).normal(size=(len(space.choices), len(space.schemes), 1))
    values = scored(scores, (8,), rows)
    distinct = np.unique(sizes)
    for size in distinct[[0, 1, len(distinct) // 2, -2, -1]]:
        found = solve(scores, cost, Budget(bytes=int(size)))
        assert found.score == pytest.approx(values[sizes <= size].min(), abs=1e-6)


def test_cuts_ask_for_other_solutions_until_none_is_left() -> None:
    _, space, cost = model(only("q0", "q1", "q2"), schemes=["usq4", "aq2x4g8s", "aq2x6g8s"])
    budget, scores = middle(cost, 0.6, "bits"), np.random.default_rng(0).normal(size=(3, 4, 1))
    rows = every(space, (8,))
    inside = cost.within(cost.totals(rows), budget)
    ordered = np.sort(scored(scores, (8,), rows)[inside])
    assert 4 < len(ordered) < len(rows)
    cuts: list[Any] = []
    for value in ordered:
        found = solve(scores, cost, budget, cuts=cuts)
        assert found.score == pytest.approx(value, abs=1e-6)
        cuts.append((found.choices, 1))
    with pytest.raises(AquabitError, match="no further configuration"):
        solve(scores, cost, budget, cuts=cuts)
    best = solve(scores, cost, budget)
    far = solve(scores, cost, budget, cuts=[(best.choices, 3)])
    apart = (rows.weights != best.choices.weights).sum(1) == 3
    assert far.score == pytest.approx(scored(scores, (8,), rows)[inside & apart].min(), abs=1e-6)


@pytest.mark.parametrize("schemes", [["usq1g2", "aq2x4g4s", "aq1x6g4s"], ["usq2", "usq1g8", "aq1x8g8s"]])
def test_limits_that_cannot_be_kept_together_say_what_each_can_reach(schemes: list[str]) -> None:
    # fewest BOPs at usq1, whose many scales cost bytes; codebooks cost few bytes once all layers share them,
    # or more than they save
    _, space, cost = model({f"w{i}": ("w", (64, 16)) for i in range(3)}, schemes=schemes, activations=[8])
    totals = cost.totals(every(space, (8,)))
    budget = Budget(bytes=int(totals["bytes"].min()) + 3, bops=float(totals["bops"].min()) * 1.01)
    assert not cost.within(totals, budget).any()
    with pytest.raises(AquabitError) as error:
        solve(np.zeros((3, len(space.schemes), 1)), cost, budget)
    for name, other in (("bytes", "bops"), ("bops", "bytes")):
        reachable = totals[name][totals[other] <= budget.limits()[other]].min()
        assert (
            f"{name} can reach {reachable:.6g} with {other} kept, and at most {totals[name].max():.6g}"
            in str(error.value)
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limits", [{"bits": 0.5}, {"bits": 30.0}, {"bytes": 10}, {"bops": 10.0}])
def test_a_budget_out_of_reach_names_both_ends(limits: dict[str, Any]) -> None:
    _, space, cost = model(only("q0", "q1", "c0", "c1"))
    budget = Budget(**limits)
    key = next(iter(limits))
    totals = cost.totals(every(space, activation_choices(space, budget)))
    ends = f"{totals[key].min():.6g}", f"{totals[key].max():.6g}"
    scores = np.zeros((4, len(space.schemes), len(activation_choices(space, budget))))
    for refused in (
        lambda: solve(scores, cost, budget),
        lambda: ladder(cost, budget),
        lambda: Options.of(cost, budget),
        lambda: find_candidates(
            cost, SearchOptions(budget), Experiment(lambda: rough(0), lambda _: None, lambda: [])
        ),
    ):
        with pytest.raises(AquabitError) as error:
            refused()
        assert all(end in str(error.value) for end in ends) and "\n" not in str(error.value)


def test_the_ladder_stays_within_reach() -> None:
    _, space, cost = model(only("q0", "q1", "c0", "c1"))
    totals = cost.totals(every(space, (8,)))
    low, high = totals["bits"].min(), totals["bits"].max()
    (top,) = ladder(cost, Budget(bits=low * 1.1), (1e6, 1e-6))
    assert top.bits == pytest.approx(high, rel=1e-12)
    for factor in (0.85, 0.95, 1.2):
        for target in ladder(cost, middle(cost, 0.3, "bits"), (factor,)):
            assert cost.within(totals, target).any()


# ---- local search


def rough(seed: int) -> Predict:
    """A function without any structure, some of whose values are not numbers."""

    def predict(rows: Choices) -> np.ndarray:
        layers = rows.weights.shape[1]
        factors = np.random.default_rng(seed).integers(1, 1 << 40, layers)
        key = (rows.weights * 7 + rows.acts + np.arange(layers)) * factors
        value = np.sin(key.sum(1) % 100003)
        return np.where(value > 0.95, np.nan, value)

    return predict


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    names=st.sampled_from(BUDGETS),
    share=st.floats(0, 0.98),
    name=st.sampled_from(
        [
            "shared",
            "two names",
            "pinned, excluded",
            "codebooks that are worth it",
            "more codebooks than layers",
        ]
    ),
)
def test_repair_ends_within_the_budget_or_says_that_it_cannot(
    seed: int, names: tuple[str, ...], share: float, name: str
) -> None:
    _, _, cost = model(**SPACES[name])
    options, rng = Options.of(cost, middle(cost, share, *names)), np.random.default_rng(seed)
    scores = np.where(
        rng.random(options.costs.shape[1:]) < 0.1, np.inf, rng.normal(size=options.costs.shape[1:])
    )
    choice = np.array([rng.choice(np.flatnonzero(row)) for row in options.columns.allowed])
    before, overruns = choice.copy(), [np.inf]

    class Watched(Options):
        def changes(self, choice: np.ndarray) -> np.ndarray:
            overruns.append(float(self.overrun(self.used(choice))))
            assert overruns[-1] < overruns[-2], "it ends, as each step lessens the overrun"
            return super().changes(choice)

    watched = Watched(options.columns, options.names, options.costs, options.caps, options.openings)
    mended = watched.repair(choice, scores)
    assert (choice == before).all()
    if mended is not None:
        assert options.keeps(mended) and options.columns.allowed[np.arange(len(choice)), mended].all()
        assert (mended == choice).all() or not options.keeps(choice)
    else:
        assert not options.keeps(choice)


def test_repair_weighs_that_the_last_user_frees_the_codebook() -> None:
    """Two layers share; whichever leaves alone saves little, the last one all. Only what is exact per
    state gets there."""
    space = SearchSpace("", {k: (Scheme(), Scheme.parse("usq2"), Scheme.parse("usq4")) for k in "ab"})
    columns = Columns.of(space, (8,))
    costs = np.array([[[0.0, 10.0, 9.0], [0.0, 10.0, 9.0]]])  # column 1 shares codebooks of 100
    opening = Opening(np.array([0, 1]), np.array([False, True, False]), np.array([100.0]))
    options = Options(columns, ("bits",), costs, np.array([30.0]), (opening,))
    mended = options.repair(np.array([1, 1]), np.zeros((2, 3)))
    assert mended is not None and options.keeps(mended) and not (mended == 1).any()
    assert options.used(np.array([[1, 1], [1, 2], [2, 2]])).tolist() == [[120.0, 119.0, 18.0]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    names=st.sampled_from(BUDGETS),
    share=st.floats(0.02, 0.98),
    rows=st.integers(1, 3000),
    name=st.sampled_from(
        [
            "shared",
            "two names",
            "pinned, excluded",
            "codebooks that are worth it",
            "more codebooks than layers",
        ]
    ),
)
def test_local_search_never_leaves_the_budget_nor_gets_worse(
    seed: int, names: tuple[str, ...], share: float, rows: int, name: str
) -> None:
    graph, space, cost = model(**SPACES[name])
    budget = middle(cost, share, *names)
    activations = activation_choices(space, budget)
    scores = np.random.default_rng(seed).normal(
        size=(len(space.choices), len(space.schemes), len(activations))
    )
    if not cost.within(
        cost.totals(every(space, activations)), budget
    ).any():  # each limit alone can be kept, all of them cannot
        with pytest.raises(AquabitError, match="cannot be kept"):
            solve(scores, cost, budget)
        return
    start = solve(scores, cost, budget)
    found = improve(start.choices, rough(seed), cost, budget, seed, rows=rows)
    config = found.choices.config
    space.check(config)
    truth = counted(graph, {n: (config[n].weight, config[n].act) for n in space.layers})
    assert all(truth[k] <= limit * (1 + 1e-9) for k, limit in budget.limits().items())
    assert cost.within(cost.totals(found.choices), budget).all()
    assert found.predicted <= found.start and found.rows <= rows


def test_exchanges_that_seem_to_fit_but_do_not_are_dropped() -> None:
    """w0 leaves the codebooks, which alone saves them, and w1 joins, which alone costs nothing: together
    they save nothing."""
    _, space, cost = model({f"w{i}": ("w", (16, 64)) for i in range(2)}, schemes=["usq2", "usq4", "aq2x4g8s"])
    shared, plain, wide = Scheme.parse("aq2x4g8s"), Scheme.parse("usq2"), Scheme.parse("usq4")
    start = space.config({"w0": space.choice("w0", shared, 8), "w1": space.choice("w1", plain, 8)})
    lure = space.config({"w0": space.choice("w0", wide, 8), "w1": space.choice("w1", shared, 8)})
    budget = Budget(bytes=cost(lure).bytes - 1)
    options = Options.of(cost, budget)
    origin, other = Choices.of(space, [start]), Choices.of(space, [lure]).weights[0]
    (choice,) = options.columns.join(origin)
    changes, used = options.changes(choice), options.used(choice)
    assert (
        used[0] + changes[0, 0, other[0]] + changes[0, 1, other[1]]
        <= options.caps[0]
        < cost(lure).bytes - cost.other_bytes
    )

    def predict(rows: Choices) -> np.ndarray:
        return np.where((rows.weights == other).all(1), -100.0, np.abs(rows.weights - other).sum(1))

    found = improve(origin, predict, cost, budget)
    assert cost.within(cost.totals(found.choices), budget).all()


# ---- the loop


@pytest.mark.parametrize("names", [("bits",), ("bits", "bops")])
def test_candidates_keep_their_budgets(names: tuple[str, ...]) -> None:
    layers = {
        **{f"w{i}": ("w", (64, 96)) for i in range(5)},
        **{f"v{i}": ("v", (96, 64)) for i in range(3)},
        "x": ("x", (20, 9)),
    }
    graph, space, cost = model(layers, schemes=["usq2", "usq4", "usq3h", "aq2x4g4s", "aq1x6g4s"])
    rng = np.random.default_rng(0)
    bits = np.array([[space.code_bits(k, s) for s in space.schemes] for k in space.choices])
    error = rng.lognormal(0, 1, (len(bits), 1)) * 4.0**-bits
    values: dict[str, tuple[QuantConfig, float]] = {}

    def predict(rows: Choices) -> np.ndarray:
        rounded = np.where(rows.acts == 6, 1.3, 1.0)
        return np.asarray((error[np.arange(len(error)), rows.weights] * rounded).sum(1))

    def measure(configs: list[QuantConfig]) -> None:
        assert not {c.digest for c in configs} & set(values)
        values.update(
            {
                c.digest: (c, float(v))
                for c, v in zip(configs, predict(Choices.of(space, configs)), strict=True)
            }
        )

    measure(list({c.digest: c for c in space.sample(20, seed=1)}.values()))
    budget = middle(cost, 0.35, *names)
    experiment = Experiment(lambda: predict, measure, lambda: list(values.values()))
    found = find_candidates(cost, SearchOptions(budget), experiment, rows=4000)
    assert len({c.config.digest for c in found}) == len(found) == 16
    for c in found:
        space.check(c.config)
        truth = counted(graph, {n: (c.config[n].weight, c.config[n].act) for n in space.layers})
        assert all(truth[k] <= limit * (1 + 1e-9) for k, limit in c.target.limits().items())
    names_of = {
        n: choice.codebook for c in found for n, choice in c.config.layers.items() if choice.weight.shared
    }
    assert names_of and all(name == space.codebook(n) for n, name in names_of.items())
    activations = activation_choices(space, budget)
    best = solve(np.stack([error * (1.3 if a == 6 else 1.0) for a in activations], 2), cost, budget)
    assert min(v for c, v in values.values() if _keeps(graph, space, c, budget)) == pytest.approx(
        best.score, rel=1e-3
    )


def _keeps(graph: nx.DiGraph, space: SearchSpace, config: QuantConfig, budget: Budget) -> bool:
    truth = counted(graph, {n: (config[n].weight, config[n].act) for n in space.layers})
    return all(truth[k] <= limit * (1 + 1e-9) for k, limit in budget.limits().items()) and (
        budget.bops is not None or {c.act for c in config.layers.values()} == {8}
    )


# ---- assign


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("given_errors", [True, False])
def test_assign_finds_the_least_error_of_one_family(share: float, given_errors: bool) -> None:
    graph, space, cost = model(
        only("q0", "q1", "c0", "c1"), schemes=["usq3h", "aq2x4g8", "aq2x4g8s", "aq2x6g8s", "aq4x4g8"]
    )
    rng = np.random.default_rng(3)
    errors = {(k, str(s)): float(rng.uniform(0.01, 1)) for k, row in space.choices.items() for s in row}
    family = make_space(graph, "print", "toy", schemes=["aq2x4g8", "aq2x4g8s", "aq2x6g8s", "aq4x4g8"])
    rows = every(family, (8,))
    sizes = CostModel(graph, family).totals(rows)["bits"]
    budget = Budget(bits=float(sizes.min() + share * (sizes.max() - sizes.min())))
    found = assign(graph, space, budget, errors if given_errors else None)

    def error(config: QuantConfig) -> float:
        if given_errors:
            return sum(errors[n, str(config[n].weight)] for n in space.layers)
        return sum(
            LOSS.get(str(config[n].weight).removesuffix("s"), 1.0) * 4.0 ** -config[n].weight.code_bits()
            for n in space.layers
        )

    inside = [c for c, size in zip(rows.configs(), sizes, strict=True) if size <= budget.bits]  # type: ignore[operator]
    assert error(found) == pytest.approx(min(map(error, inside)), abs=1e-6)
    assert cost(found).bits_per_weight <= budget.bits * (1 + 1e-12)  # type: ignore[operator]
    assert all(c.weight.kind == "aq" and c.act == 8 for c in found.layers.values())
    assert all(
        c.codebook == (space.codebook(n) if c.weight.shared else None) for n, c in found.layers.items()
    )


def test_assign_weighs_what_formats_of_equal_bits_lose() -> None:
    graph, space, _ = model(only("q0", "q1"), schemes=["usq1", "aq3x4g8", "aq2x6g8"])
    assert LOSS["aq2x6g8"] < LOSS["aq3x4g8"]
    found = assign(graph, space, Budget(bits=100.0))  # more than the family can cost is no limit
    assert {str(c.weight) for c in found.layers.values()} == {"aq2x6g8"}


def test_assign_expects_a_quarter_of_the_error_for_each_bit() -> None:
    """One layer at 3 bits and one at 1, or both at 2: worse where errors fall fourfold a bit, not where
    they halve."""
    graph, space, cost = model(
        {f"w{i}": ("w", (64, 64)) for i in range(2)}, schemes=["aq1x4g4", "aq2x4g4", "aq3x4g4"]
    )
    even = space.uniform("aq2x4g4")
    uneven = space.uniform("aq3x4g4").with_layer("w1", "aq1x4g4")

    def error(config: QuantConfig, base: float) -> float:
        return sum(
            LOSS.get(str(c.weight), 1.0) * base ** -c.weight.code_bits() for c in config.layers.values()
        )

    assert (
        cost(even).bytes == cost(uneven).bytes
        and error(even, 4) < error(uneven, 4)
        and error(even, 2) > error(uneven, 2)
    )
    assert assign(graph, space, Budget(bytes=cost(even).bytes)).layers == even.layers


def test_assign_falls_back_as_it_says() -> None:
    options: dict[str, Any] = {
        "schemes": ["usq2", "usq3h", "vq3h", "aq2x6g8s"],
        "excluded": ["c3"],
        "pinned": {"c0": "vq3h"},
    }
    graph, space, cost = model(only("q0", "q1", "c0", "x", "c3"), **options)

    def sized(**schemes: str) -> tuple[QuantConfig, Budget]:
        config = space.config(
            {n: space.choice(n, Scheme.parse(s), 16 if s == "fp" else 8) for n, s in schemes.items()}
        )
        return config, Budget(bytes=cost(config).bytes)

    config, budget = sized(q0="aq2x6g8s", q1="aq2x6g8s", c0="vq3h", x="usq3h", c3="fp")
    assert assign(graph, space, budget) == config, (
        "x has no partner, so no additive scheme: output-aware uniform"
    )
    config, budget = sized(q0="usq3h", q1="usq3h", c0="vq3h", x="usq3h", c3="fp")
    assert assign(graph, space, budget, keep=lambda layer, scheme: False) == config, (
        "no scheme is accepted anywhere"
    )
    config, budget = sized(q0="vq3h", q1="usq3h", c0="vq3h", x="vq3h", c3="fp")
    assert (
        assign(graph, space, budget, keep=lambda layer, scheme: layer != "q1" and scheme.kind == "vq")
        == config
    )
    graph, space, cost = model(only("q0", "x"), schemes=["usq2", "vq2h", "usq4"])
    config, budget = sized(q0="usq4", x="usq4")
    assert assign(graph, space, budget) == config, (
        "neither additive nor output-aware uniform schemes: all are open"
    )


def test_assign_says_what_it_cannot_do() -> None:
    graph, space, cost = model(only("q0", "q1"), schemes=["usq2", "aq2x4g8s", "aq2x6g8s"])
    low = cost(space.uniform("aq2x4g8s")).bits_per_weight
    assert cost(space.uniform("usq2")).bits_per_weight < low
    with pytest.raises(AquabitError, match=rf"out of range: this space can reach {low:.6g} to"):
        assign(graph, space, Budget(bits=low * 0.99))
    with pytest.raises(AquabitError, match=r"no error is known for layer 'q0' at aq2x6g8s"):
        assign(graph, space, Budget(bits=low * 1.01), {(n, "aq2x4g8s"): 1.0 for n in space.layers})


# ---- configurations


CALIBRATION = Calibration(
    images=8,
    seed=5,
    steps=3,
    scheduler="euler",
    eta=0.5,
    guidance=2.5,
    resolution=8,
    conditions=(1, "two", 3),
)


def test_configurations_round_trip_with_codebooks_and_calibration() -> None:
    _, space, cost = model(calibration=CALIBRATION, excluded=["c3"])
    for config in [
        *space.sample(20),
        space.full_precision(),
        space.config({"q0": space.choice("q0", Scheme.parse("aq2x4g8s"), 6)}),
    ]:
        again = QuantConfig.from_dict(json.loads(config.to_json()))
        assert again == config and again.digest == config.digest and again.calibration == CALIBRATION
        assert cost(again) == cost(config)
    assert any(c.codebook for config in space.sample(20) for c in config.layers.values())
    twin = SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert twin == replace(space, choices=dict(space.choices)) and [c.digest for c in twin.sample(5)] == [
        c.digest for c in space.sample(5)
    ]


def test_the_digest_heeds_calibration_only_where_it_is_used() -> None:
    _, space, _ = model(schemes=["usq2", "usq4h", "aq2x4g8s", "vq2", "vq2h", "aq2x4g8"])
    other = Calibration(images=9)
    for scheme in ("usq2", "vq2", "usq4h", "vq2h", "aq2x4g8", "aq2x4g8s"):
        config = space.config(
            {
                "q0": space.choice("q0", Scheme.parse(scheme), 8),
                "q1": space.choice("q1", Scheme.parse("usq2"), 8),
            }
        )
        digests = {replace(config, calibration=c).digest for c in (None, Calibration(), other)}
        assert len(digests) == (1 if scheme in ("usq2", "vq2") else 2), scheme
    config = space.config({"q0": space.choice("q0", Scheme.parse("aq2x4g8s"), 8)})
    assert config.digest != config.with_layer("q0", "aq2x4g8s", codebook="another").digest, (
        "the name of the codebooks counts"
    )
    assert config.digest == replace(config, model="renamed").digest


@pytest.mark.parametrize(
    ("weight", "codebook", "said"),
    [
        ("aq2x4g8s", None, "must name them"),
        ("aq2x4g8", "q 16x24", "of its own"),
        ("usq4", "q 16x24", "'q 16x24'"),
        ("fp", "x", "'x'"),
    ],
)
def test_files_with_wrong_pairings_give_one_sentence(weight: str, codebook: str | None, said: str) -> None:
    value = {
        "schema": 1,
        "model": "m",
        "fingerprint": "f",
        "layers": {"q0": {"weight": weight, "act": 8, "codebook": codebook}},
    }
    with pytest.raises(AquabitError, match=r"file\.json") as error:
        QuantConfig.from_dict(value, "file.json")
    text = str(error.value)
    assert said in text and "'q0'" in text and weight in text and "\n" not in text


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"images": 0}, "images"),
        ({"steps": "two"}, "steps"),
        ({"hue": 1}, "hue"),
        ({"conditions": 5}, "conditions"),
        (None, "calibration"),
    ],
)
def test_files_with_a_wrong_calibration_give_one_sentence(part: dict[str, Any] | None, said: str) -> None:
    _, space, _ = model(calibration=CALIBRATION)
    value = space.uniform("usq2").to_dict()
    value["calibration"] = {**value["calibration"], **part} if part else "none"
    with pytest.raises(AquabitError, match=rf"file\.json.*{said}") as error:
        QuantConfig.from_dict(json.loads(json.dumps(value)), "file.json")
    assert "\n" not in str(error.value)


def test_names_that_the_model_does_not_know_are_refused(tmp_path) -> None:
    pipe = tiny_pipeline("dit")
    graph = trace(pipe)
    quantized = QuantizedDenoiser(pipe.denoiser, graph, Bank(tmp_path), "f")
    to_q, alone = "transformer_blocks.0.attn1.to_q", "proj_out_2"
    name = quantized.partners[to_q]
    cases = [
        (to_q, "aq2x4g8s", None, repr(name)),
        (to_q, "aq2x4g8s", "attn.q 3x3", repr(name)),
        (to_q, "aq2x4g8", name, "shares none"),
        (to_q, "usq4", name, "shares none"),
        (alone, "aq2x4g8s", "proj 4x16", "no partner"),
        (alone, "aq2x4g8s", None, "no partner"),
    ]
    for layer, scheme, codebook, said in cases:
        with pytest.raises(AquabitError) as error:
            quantized.apply(QuantConfig("f", {}).with_layer(layer, scheme, 8, codebook))
        text = str(error.value)
        assert said in text and repr(layer) in text and scheme in text and "\n" not in text, text
    assert not list(tmp_path.iterdir()) and all(layer.act == 16 for layer in quantized.layers.values()), (
        "nothing was begun"
    )

"""Search against brute force on spaces small enough to enumerate, and the laws that hold on every space."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aquabit.choices import Choices
from aquabit.cost import Latency
from aquabit.scheme import AquabitError, Budget, QuantConfig
from aquabit.search import integer_program
from aquabit.search.front import Front, FrontMember, hypervolume, pareto, smallest_uniform
from aquabit.search.integer_program import choice_effects, solve
from aquabit.search.local_search import improve
from aquabit.search.options import Options, Predict, activation_choices
from aquabit.search.proof import Proof
from aquabit.search.search_options import SearchOptions, ladder
from aquabit.search.surrogate_search import Experiment, find_candidates, schedule
from aquabit.stats import OLD_LEVEL, Interval, mean_interval
from tests.worlds import Lab, every, interacting, middle, model, total

TOY = {"schemes": ["usq2", "usq3", "usq4", "vq2", "vq4c"]}
LIMITS = [
    ("bits",),
    ("bytes",),
    ("bops",),
    ("latency_ms",),
    ("bits", "bops"),
    ("bits", "latency_ms"),
    ("bits", "bytes", "bops", "latency_ms"),
]


# ---- options


def test_budgets_in_bits_or_bytes_fix_the_activations() -> None:
    space, _ = model(3, activations=[16, 8, 6])
    small, _ = model(3, activations=[6])
    for budget in (None, Budget(bits=3), Budget(bytes=999)):
        assert activation_choices(space, budget) == (8,)
        assert activation_choices(small, budget) == (6,)
        assert activation_choices(model(3, activations=[16, 6])[0], budget) == (16,)
    for more in ({"bops": 1e9}, {"latency_ms": 9.0}):
        assert activation_choices(space, Budget(bits=3, **more)) == (16, 8, 6)


@pytest.mark.parametrize("shares", [(0.2, 0.7), (0.7, 0.2), (0.5, 0.5)])
def test_options_agree_with_the_cost_model_on_every_configuration(shares: tuple[float, float]) -> None:
    space, cost = model(4, 2, schemes=["usq2", "usq3", "vq4c"], excluded=["l3"])
    bits, bops = middle(cost, shares[0], "bits").bits, middle(cost, shares[1], "bops").bops
    budget = Budget(bits=bits, bops=bops)
    options, rows = Options.of(cost, budget), every(space, (8, 6))
    choice = options.columns.join(rows)
    assert (choice >= 0).all() and options.columns.split(choice) == rows
    inside = cost.within(cost.totals(rows), budget)
    assert (options.keeps(choice) == inside).all() and 0 < inside.sum() < len(inside)
    assert ((options.overrun(options.used(choice)) <= 0) == inside).all()
    assert (options.columns.join(replace(rows, weights=rows.weights * 0 + 1))[:, 3] == -1).all()


def test_latency_is_the_sum_of_what_was_measured() -> None:
    space, cost = model(4, 3, schemes=["usq2", "usq3"], excluded=["l3"])
    rows = every(space, (8, 6))
    latency = cost.latency
    assert latency is not None
    place = {a: i for i, a in enumerate(latency.activations)}
    found = cost.totals(rows)["latency_ms"]
    for n, row in enumerate(rows):
        own = [
            latency.layers[i, w, place[a]]
            for i, (w, a) in enumerate(zip(row.weights[0], row.acts[0], strict=True))
        ]
        assert found[n] == pytest.approx(sum(own) + 0.5)
    assert cost.limits()["latency_ms"] == pytest.approx((found.min(), found.max()))
    fixed = found[(rows.acts[:, :3] == 8).all(1)]
    assert cost.limits(8)["latency_ms"] == pytest.approx((fixed.min(), fixed.max()))
    budget = Budget(latency_ms=float(np.median(found)))
    options = Options.of(cost, budget)
    choice = options.columns.join(rows)
    np.testing.assert_allclose(options.used(choice)[0] + latency.rest, found)
    assert (options.keeps(choice) == cost.within(cost.totals(rows), budget)).all()


def test_a_latency_budget_needs_measured_times() -> None:
    space, cost = model(3)
    cost.latency = None
    assert "latency_ms" not in cost.limits() and "latency_ms" not in cost.totals(
        Choices.of(space, [space.uniform("usq2")])
    )
    with pytest.raises(AquabitError, match="measured on this machine: search with --latency"):
        cost.check(Budget(latency_ms=3.0))
    with pytest.raises(AquabitError, match=r"latency has shape \(1, 1, 1\)"):
        cost.timed(Latency(np.zeros((1, 1, 1)), (8,), 0.0))
    with pytest.raises(AquabitError, match=r"activations a8 only, not for all of a8, a6"):
        Latency(np.zeros((3, 1, 1)), (8,), 0.0).of(
            Choices(space, np.zeros((1, 3), int), np.array([[6, 8, 8]]))
        )


# ---- integer program


@pytest.mark.parametrize("names", LIMITS)
@pytest.mark.parametrize("seed", range(3))
def test_solve_finds_the_optimum_of_brute_force(names: tuple[str, ...], seed: int) -> None:
    space, cost = model(4, seed, **TOY, pinned={"l1": "usq8"})
    budget = middle(cost, 0.4, *names)
    activations = activation_choices(space, budget)
    scores = np.random.default_rng(seed).normal(size=(4, len(space.schemes), len(activations)))
    rows = every(space, activations)
    inside = cost.within(cost.totals(rows), budget)
    truth = total(scores, activations, rows)[inside].min()
    found = solve(scores, cost, budget)
    assert found.score == pytest.approx(truth, abs=1e-6)
    assert found.gap < 1e-6 and found.bound <= truth + 1e-6
    assert cost.within(cost.totals(found.choices), budget).all()
    assert total(scores, activations, found.choices)[0] == pytest.approx(found.score)


@pytest.mark.parametrize("names", [("bits",), ("bits", "bops")])
@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e12])
def test_the_scale_of_the_scores_does_not_matter(unit: float, names: tuple[str, ...]) -> None:
    space, cost = model(24, 3)
    budget = middle(cost, 0.15, *names)
    bits = np.array([s.bits for s in space.schemes])
    rng = np.random.default_rng(5)
    scores = (
        rng.lognormal(0, 1, (24, 1, 1))
        * 4.0 ** -bits[:, None]
        * rng.uniform(0.8, 1.2, (24, len(bits), len(activation_choices(space, budget))))
    )
    one, other = solve(scores, cost, budget), solve(scores * unit, cost, budget)
    assert other.score == pytest.approx(one.score * unit, rel=1e-5)
    assert other.gap < 1e-5 and other.bound == pytest.approx(one.bound * unit, rel=1e-5)


def test_exact_bytes_are_reachable_and_one_byte_less_is_another_answer() -> None:
    space, cost = model(6, 1, **TOY)
    scores = -cost.bytes[:, :, None].astype(float)  # the largest configuration within the limit
    rows = every(space, (8,))
    sizes = np.unique(cost.totals(rows)["bytes"])
    for size in sizes[[0, 1, len(sizes) // 2, -1]]:
        found = solve(scores, cost, Budget(bytes=int(size)))
        assert cost.totals(found.choices)["bytes"][0] == size
        if size > sizes[0]:
            below = solve(scores, cost, Budget(bytes=int(size) - 1))
            assert cost.totals(below.choices)["bytes"][0] == sizes[np.searchsorted(sizes, size) - 1]


@pytest.mark.parametrize("limits", [{"bits": 0.5}, {"bits": 30.0}, {"bytes": 10}, {"bops": 10.0}])
def test_a_budget_out_of_reach_names_both_ends(limits: dict[str, Any]) -> None:
    space, cost = model(4)
    budget = Budget(**limits)
    low, high = cost.limits(None if "bops" in limits else 8)[next(iter(limits))]
    with pytest.raises(AquabitError) as error:
        solve(np.zeros((4, len(space.schemes), len(activation_choices(space, budget)))), cost, budget)
    assert f"{low:.6g}" in str(error.value) and f"{high:.6g}" in str(error.value)


def test_limits_that_cannot_be_kept_together_say_what_each_can_reach() -> None:
    # usq2g2 has a scale for every 2 inputs: fewer BOPs than usq3 but more bytes
    space, cost = model(5, schemes=["usq2g2", "usq3"], activations=[8])
    rows = every(space, (8,))
    totals = cost.totals(rows)
    budget = Budget(bytes=int(totals["bytes"].min()) + 5, bops=float(totals["bops"].min()) * 1.01)
    assert not cost.within(totals, budget).any()
    with pytest.raises(AquabitError) as error:
        solve(np.zeros((5, len(space.schemes), 1)), cost, budget)
    for name, other in (("bytes", "bops"), ("bops", "bytes")):
        reachable = totals[name][totals[other] <= budget.limits()[other]].min()
        assert (
            f"{name} can reach {reachable:.6g} with {other} kept, and at most {totals[name].max():.6g}"
            in str(error.value)
        )


@pytest.mark.parametrize(("share", "worst"), [(1.3, False), (1.02, True)])
def test_three_limits_that_cannot_be_kept_together_name_what_each_can_reach(
    share: float, worst: bool
) -> None:
    space, cost = model(4, 2, schemes=["usq2g2", "usq3", "usq4"], activations=[8, 6])
    rows = every(space, (8, 6))
    totals = cost.totals(rows)
    limits = {n: float(totals[n].min()) * share for n in ("bits", "bops", "latency_ms")}
    assert not cost.within(totals, Budget(**limits)).any()
    with pytest.raises(AquabitError, match="cannot be kept") as error:
        solve(np.zeros((4, len(space.schemes), 2)), cost, Budget(**limits))
    alone = []
    for name in limits:
        others = np.all([totals[k] <= limits[k] for k in limits if k != name], axis=0)
        said = (
            f"{name} can reach {totals[name][others].min():.6g} with"
            if others.any()
            else f"{name} alone can reach {totals[name].min():.6g} to"
        )
        assert said in str(error.value)
        alone.append(not others.any())
    assert any(alone) if worst else not all(alone)


def test_cuts_ask_for_other_solutions_until_none_is_left() -> None:
    space, cost = model(3, schemes=["usq2", "usq4"])
    budget, scores = middle(cost, 0.6, "bits"), np.random.default_rng(0).normal(size=(3, 3, 1))
    rows = every(space, (8,))
    inside = cost.within(cost.totals(rows), budget)
    ordered = np.sort(total(scores, (8,), rows)[inside])
    cuts: list[Any] = []
    for value in ordered:
        found = solve(scores, cost, budget, cuts=cuts)
        assert found.score == pytest.approx(value, abs=1e-6)
        cuts.append((found.choices, 1))
    with pytest.raises(AquabitError, match="no further configuration"):
        solve(scores, cost, budget, cuts=cuts)


@pytest.mark.parametrize("names", [("bits",), ("bits", "bops")])
@pytest.mark.parametrize("seed", range(3))
def test_a_trust_region_keeps_the_optimum_within_so_many_changes(seed: int, names: tuple[str, ...]) -> None:
    space, cost = model(4, seed, **TOY, pinned={"l1": "usq8"})
    budget = middle(cost, 0.4, *names)
    activations = activation_choices(space, budget)
    rng = np.random.default_rng(seed)
    scores, away = (rng.normal(size=(4, len(space.schemes), len(activations))) for _ in range(2))
    known = solve(away, cost, budget)  # the optimum of other scores
    rows = every(space, activations)
    inside = cost.within(cost.totals(rows), budget)
    apart, totals = (rows.apart(known.choices), total(scores, activations, rows))
    found = []
    for k in (1, 2, 3, 4):
        solved = solve(scores, cost, budget, near=(known.choices, k))
        assert solved.choices.apart(known.choices)[0] <= k
        assert cost.within(cost.totals(solved.choices), budget)[0]
        assert (
            solved.score == pytest.approx(totals[inside & (apart <= k)].min(), abs=1e-6) and solved.gap < 1e-6
        )
        found.append(solved.score)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(found)), "a larger region is no worse"
    assert found[-1] == pytest.approx(solve(scores, cost, budget).score, abs=1e-6)
    one = solve(scores, cost, budget, near=(known.choices, 2), cuts=[(known.choices, 2)])
    assert one.score == pytest.approx(totals[inside & (apart == 2)].min(), abs=1e-6), "beside a cut"


def test_a_rounding_that_slips_over_the_limit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    space, cost = model(4, **TOY)
    budget, scores = (
        middle(cost, 0.4, "bits"),
        np.random.default_rng(0).normal(size=(4, len(space.schemes), 1)),
    )
    honest, whole = integer_program._milp, solve(scores, cost, budget)
    largest = Options.of(cost, budget).costs[0] * Options.of(cost, budget).columns.allowed

    def slips(*args: Any) -> Any:
        return honest(*args) if len(args[2]) > patience else (largest.argmax(1), 0.0)

    monkeypatch.setattr(integer_program, "_milp", slips)
    for patience in (0, 100):  # slips once; slips always
        found = solve(scores, cost, budget)
        assert cost.within(cost.totals(found.choices), budget).all()
        if not patience:
            assert found.score == pytest.approx(whole.score)


def test_scores_that_cannot_be_used_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    space, cost = model(3)
    budget, scores = middle(cost, 0.5, "bits"), np.zeros((3, len(space.schemes), 1))
    solve(scores, cost, budget)
    assert capfd.readouterr().out == ""
    with pytest.raises(AquabitError, match="shape"):
        solve(scores[:2], cost, budget)
    scores[1, 2] = np.nan
    with pytest.raises(AquabitError, match=r"layer 'l1' at usq3 is nan"):
        solve(scores, cost, budget)


def test_what_c_code_prints_is_dropped_and_python_output_stays(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    print("before", flush=True)
    with integer_program._silent():
        os.write(1, b"noise")
    print("after", flush=True)
    assert capfd.readouterr().out == "before\nafter\n"


def test_effects_of_choices_recover_an_additive_function() -> None:
    space, _ = model(5, excluded=["l2"], pinned={"l3": "usq3"})
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, len(space.schemes), 17))

    def predict(rows: Choices) -> np.ndarray:
        assert (rows.acts[:, 2] == 16).all() and (rows.weights[:, 2] == 0).all()
        return np.asarray(table[np.arange(5), rows.weights, rows.acts].sum(1))

    contexts = Choices.of(space, space.sample(3, 1))
    scores = choice_effects(predict, space, contexts, (8, 6)).mean(0)
    assert scores.shape == (5, len(space.schemes), 2)
    allowed = space.allowed()
    allowed[2] = False
    for layer, scheme in np.argwhere(allowed):
        first = int(allowed[layer].argmax())
        for a, bits in enumerate((8, 6)):
            assert scores[layer, scheme, a] == pytest.approx(
                table[layer, scheme, bits] - table[layer, first, 8]
            )
    assert np.isinf(scores[3]).sum() == scores[3].size - 2 and np.isinf(scores[2]).sum() == scores[2].size - 1
    assert choice_effects(predict, space, contexts).shape == (3, 5, len(space.schemes), 1)


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


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    names=st.sampled_from(LIMITS),
    share=st.floats(0.05, 0.95),
    rows=st.integers(1, 3000),
)
def test_local_search_never_leaves_the_budget_nor_gets_worse(
    seed: int, names: tuple[str, ...], share: float, rows: int
) -> None:
    space, cost = model(6, seed % 7, pinned={"l1": "vq3"}, excluded=["l4"])
    budget = middle(cost, share, *names)
    activations, used = activation_choices(space, budget), 0
    try:
        start = solve(
            np.random.default_rng(seed).normal(size=(6, len(space.schemes), len(activations))), cost, budget
        )
    except AquabitError as error:  # low limits may exclude each other
        if "cannot be kept" not in str(error) or len(names) == 1:
            raise
        assume(False)

    def predict(asked: Choices) -> np.ndarray:
        nonlocal used
        used += len(asked)
        return rough(seed)(asked)

    found = improve(start.choices, predict, cost, budget, seed, rows=rows)
    assert cost.within(cost.totals(found.choices), budget).all()
    space.check(found.choices.config)
    assert found.predicted <= found.start and found.rows == used <= rows
    value = float(rough(seed)(found.choices)[0])
    assert found.predicted == (value if np.isfinite(value) else np.inf)
    (acts,), (weights,) = found.choices.acts, found.choices.weights
    assert set(acts.tolist()) <= {*activations, 16} and acts[4] == 16 and weights[4] == 0


@pytest.mark.parametrize("names", [("bits",), ("bits", "bops")])
def test_local_search_improves_on_the_integer_program(names: tuple[str, ...]) -> None:
    space, cost = model(30, 2)
    predict, budget = interacting(space), middle(cost, 0.2, *names)
    contexts = Choices.of(space, space.sample(4, 0))
    scores = choice_effects(predict, space, contexts, activation_choices(space, budget)).mean(0)
    start = solve(scores, cost, budget)
    found = improve(start.choices, predict, cost, budget, rows=40_000)
    assert found.start == pytest.approx(float(predict(start.choices)[0]))
    assert found.predicted < found.start - 0.01
    again = improve(start.choices, predict, cost, budget, rows=40_000)
    assert again.choices == found.choices


def test_local_search_reaches_the_optimum_of_a_small_space() -> None:
    space, cost = model(6, 4, **TOY)
    predict, budget = interacting(space, 4), middle(cost, 0.35, "bits")
    rows = every(space, (8,))
    inside = cost.within(cost.totals(rows), budget)
    low = cost.bytes + np.where(space.allowed(), 0, 1 << 40)
    found = improve(Choices.at(space, low.argmin(1)[None], 8), predict, cost, budget, restarts=20)
    assert found.predicted == pytest.approx(predict(rows[inside]).min())


def test_exchanges_cross_what_single_changes_cannot() -> None:
    space, cost = model(2, schemes=["usq2", "usq4"])
    shapes = cost.bytes[:, 1]
    up, down = int(shapes.argmin()), int(shapes.argmax())
    budget = Budget(
        bytes=int(cost.bytes[down, 2] + cost.bytes[up, 1] + cost.other_bytes)
    )  # one layer at 4 bits, not both

    def predict(rows: Choices) -> np.ndarray:
        return np.asarray(
            (rows.weights[:, down] == 1) * -1.0
            - 3.0 * ((rows.weights[:, up] == 2) & (rows.weights[:, down] == 1))
            + 2.0 * (rows.weights.sum(1) == 2)
        )

    start = Choices.at(space, np.where(np.arange(2) == down, 2, 1)[None], 8)
    found = improve(start, predict, cost, budget, restarts=0)
    assert found.choices.weights[0, up] == 2 and found.choices.weights[0, down] == 1
    assert improve(start, predict, cost, budget, restarts=0, pairs=0).predicted == found.start


def test_a_start_outside_the_budget_or_the_space_is_refused() -> None:
    space, cost = model(4, pinned={"l2": "usq4"})
    budget = middle(cost, 0.3, "bits")
    rows = Choices.of(space, [space.uniform("usq8"), space.uniform("usq2"), space.uniform("usq2", act=6)])
    for row, reason in ((0, "outside the budget"), (2, "'l0' usq2 and a6")):
        with pytest.raises(AquabitError, match=reason):
            improve(rows[row], rough(0), cost, budget)
    rows.weights[1, 2] = 1
    with pytest.raises(AquabitError, match="'l2' usq2"):
        improve(rows[1], rough(0), cost, budget)


def test_repair_gives_up_where_no_change_helps() -> None:
    _, cost = model(3, schemes=["usq2", "usq4"])
    options = Options.of(cost, middle(cost, 0.5, "bits"))
    impossible = Options(options.columns, options.names, options.costs, np.array([1.0]))
    assert impossible.repair(np.array([2, 2, 2]), np.zeros((3, 3))) is None
    mended = options.repair(np.array([2, 2, 2]), np.zeros((3, 3)))
    assert mended is not None and options.keeps(mended)


# ---- the loop


@pytest.mark.parametrize("names", [("bits",), ("bits", "latency_ms")])
def test_the_loop_finds_the_known_optimum_and_never_repeats(names: tuple[str, ...]) -> None:
    space, cost = model(8 if names == ("bits",) else 6, 6, schemes=["usq2", "usq3", "usq4", "vq3"])
    budget = middle(cost, 0.4, *names)
    lab = Lab(space, 80)
    rows = every(space, activation_choices(space, budget))
    inside = cost.within(cost.totals(rows), budget)
    values = lab.truth(rows[inside])
    seen: list[tuple[str, int, int]] = []
    found = lab.search(cost, budget, progress=lambda *step: seen.append(step))
    assert [len(batch) for batch in lab.batches] == [8, 8] and len({c.config.digest for c in found}) == 16
    assert lab.best(cost, budget) <= values.min() + 0.02 * (np.median(values) - values.min())
    assert sum(c.target == budget for c in found) == 10 and seen[-1] == ("search", 16, 16)
    for c in found:
        space.check(c.config)
        assert cost.within(cost.totals(Choices.of(space, [c.config])), c.target).all()
    assert {c.target for c in found} == {budget, *ladder(cost, budget)[:4]} and {c.round for c in found} == {
        0,
        1,
    }


def test_the_loop_is_deterministic_under_its_seed_and_survives_failures() -> None:
    space, cost = model(8, 1, pinned={"l5": "usq8"}, excluded=["l2"], **TOY)
    budget = middle(cost, 0.4, "bits")
    runs = [
        [c.config.digest for c in Lab(space, 40, failing=5).search(cost, budget, seed=s, rounds=1, rows=2000)]
        for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_loop_proposes_the_same_whatever_the_unit_of_the_predictions(unit: float) -> None:
    space, cost = model(10, 6, schemes=["usq2", "usq3", "usq4", "aq1x6g8"])
    truth, runs = interacting(space, 6), []
    for scale in (1.0, unit):
        values: dict[str, tuple[QuantConfig, float]] = {}

        def measure(
            configs: list[QuantConfig], scale: float = scale, values: dict[str, Any] = values
        ) -> None:
            found = truth(Choices.of(space, configs)) * scale
            values.update({c.digest: (c, float(v)) for c, v in zip(configs, found, strict=True)})

        measure(space.sample(30, 0))

        def predict(rows: Choices, scale: float = scale) -> np.ndarray:
            return truth(rows) * scale

        experiment = Experiment(lambda p=predict: p, measure, lambda v=values: list(v.values()))
        options = SearchOptions(middle(cost, 0.4, "bits"), rounds=1)
        found = find_candidates(cost, options, experiment, rows=3000)
        runs.append(([c.config.digest for c in found], found[0].proof))
    assert runs[0][0] == runs[1][0]
    one, other = runs[0][1], runs[1][1]
    assert (
        one is not None
        and other is not None
        and other.optimum == pytest.approx(one.optimum * unit)
        and other.bound is None
    )
    assert other.optimum_gap == pytest.approx(one.optimum_gap, abs=1e-6)


def test_the_loop_says_how_near_to_the_optimum_it_came() -> None:
    space, cost = model(6, 4, **TOY)
    budget, lab = middle(cost, 0.35, "bits"), Lab(space, 60)
    made: list[Any] = []
    rows = every(space, (8,))
    inside = cost.within(cost.totals(rows), budget)

    def factory() -> Any:
        made.append(lab.predict_factory())
        return made[-1]

    def bound(each: Choices, allowed: np.ndarray) -> Any:
        return lambda allowed, costs, caps: (least() - 0.25, None)

    def least() -> float:
        return float(made[-1](rows[inside]).min())

    experiment = Experiment(factory, lab.measure, lambda: list(lab.values.values()), bound=bound)
    found = find_candidates(cost, SearchOptions(budget, rounds=1), experiment, rows=6000)
    proofs = [c.proof for c in found if c.proof is not None]
    assert len(proofs) == 1 and proofs[0] is found[0].proof
    proof = proofs[0]
    assert proof.bound == pytest.approx(least() - 0.25) and proof.gap == pytest.approx(
        proof.predicted - proof.bound
    )
    assert (
        proof.predicted >= least() - 1e-9
        and proof.optimum_bound <= proof.optimum
        and proof.optimum_gap < 2e-3
    )


def test_pins_exclusions_and_the_fixed_activations_are_kept() -> None:
    space, cost = model(8, 1, pinned={"l5": "usq8"}, excluded=["l2"], **TOY)
    for c in Lab(space, 30).search(cost, middle(cost, 0.4, "bytes"), rounds=1):
        assert str(c.config["l5"].weight) == "usq8" and "l2" not in c.config.layers
        assert {choice.act for choice in c.config.layers.values()} == {8}


def test_a_small_space_is_exhausted_and_a_study_without_measurements_is_served() -> None:
    space, cost = model(2, schemes=["usq2", "usq4"])
    rows = every(space, (8,))
    budget = Budget(bits=float(cost.totals(rows)["bits"].max()))
    values: dict[str, tuple[QuantConfig, float]] = {}
    truth = interacting(space)

    def measure(configs: list[QuantConfig]) -> None:
        values.update({c.digest: (c, 1.0) for c in configs})

    experiment = Experiment(lambda: truth, measure, lambda: list(values.values()))
    found = find_candidates(cost, SearchOptions(budget, rounds=3), experiment)
    assert len(values) == len(found) == 4


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_measured() -> None:
    space, cost = model(5, schemes=["usq2g2", "usq3"], activations=[8])
    lab, limits = Lab(space, 5), cost.limits(8)
    with pytest.raises(AquabitError, match="cannot be kept"):
        lab.search(cost, Budget(bytes=limits["bytes"][0] + 5, bops=limits["bops"][0] * 1.01))  # type: ignore[arg-type]
    assert not lab.batches


def test_the_ladder_scales_every_limit_within_reach() -> None:
    _, cost = model(6)
    budget = middle(cost, 0.3, "bits", "bytes", "bops")
    assert ladder(cost, budget, (1.0, 1e-3)) == []
    (target,) = ladder(cost, budget, (1.1, 1.1))
    assert target.bits == pytest.approx(budget.bits * 1.1) and target.bops == pytest.approx(budget.bops * 1.1)  # type: ignore[operator]
    assert target.bytes == int(cost.other_bytes + (budget.bytes - cost.other_bytes) * 1.1)  # type: ignore[operator]
    (top,) = ladder(cost, budget, (1e6,))
    assert top.bits == cost.limits()["bits"][1]
    steps = [schedule([budget, target, top], 8, n) for n in (0, 1)]
    assert all(s.count(budget) == 5 and len(s) == 8 for s in steps) and {*steps[0], *steps[1]} == {
        budget,
        target,
        top,
    }


# ---- front


def test_pareto_keeps_what_nothing_dominates() -> None:
    values = np.array([3.0, 1.0, 2.0, 2.0, 5.0, np.nan, 1.0])
    costs = np.array([1.0, 4.0, 2.0, 2.0, 0.5, 0.1, 5.0])
    assert pareto(values, costs).tolist() == [True, True, True, False, True, False, False]
    rng = np.random.default_rng(0)
    table = rng.integers(0, 5, (60, 3)).astype(float)
    kept = pareto(table[:, 0], table[:, 1:])
    for i in range(60):
        dominated = any((table[j] <= table[i]).all() and (table[j] < table[i]).any() for j in range(60))
        twin = any((table[j] == table[i]).all() for j in range(i))
        assert kept[i] == (not dominated and not twin)


def test_hypervolume_is_the_area_below_the_reference() -> None:
    points, rng = np.random.default_rng(0).random((20, 2)) * 1.2, np.random.default_rng(1)
    points[3] = points[4]
    values, costs = [*points[:, 0].tolist(), np.nan], [*points[:, 1].tolist(), 0.0]
    spots = rng.random((200_000, 2))
    inside = ((points[:, 0] <= spots[:, :1]) & (points[:, 1] <= spots[:, 1:])).any(1).mean()
    assert hypervolume(values, costs, (1.0, 1.0)) == pytest.approx(inside, abs=0.005)
    assert hypervolume([2.0], [0.5], (1.0, 1.0)) == 0 == hypervolume([], [], (1.0, 1.0))


def test_the_uniform_baseline_is_the_smallest_that_is_no_smaller() -> None:
    space, cost = model(6, 1, pinned={"l0": "usq4"}, schemes=["usq2", "usq3", "usq3g16", "usq8", "vq4"])
    sizes = {s: cost(space.uniform(s)).bytes for s in ("usq2", "usq3", "usq3g16", "usq8")}
    for at_least, expected in (
        (0, "usq2"),
        (sizes["usq2"], "usq2"),
        (sizes["usq2"] + 1, "usq3"),
        (sizes["usq3g16"] + 1, "usq8"),
    ):
        found = smallest_uniform(cost, space, at_least_bytes=at_least)
        assert found == space.uniform(expected)
    assert smallest_uniform(cost, space, at_least_bytes=sizes["usq8"] + 1) is None


def front() -> Front:
    space, cost = model(4, **TOY)
    members = [
        FrontMember.of(
            cost,
            space.uniform(s),
            {"fid": 2.0},
            {"fid": Interval(np.float64(1.5), 1.0, 2.0), "psnr": mean_interval([20.0])},
        )
        for s in ("usq4", "usq2", "usq3")
    ]
    comparison = {"scheme": "usq3", "low": float("nan"), "n": np.int64(5)}
    return Front(
        members,
        Budget(bits=3.4),
        space.uniform("usq3").digest,
        comparison,
        Proof(2.0, 1.9, 0.01, 0.7, 0.5, 0.2, 4),
    )


def test_the_front_in_json_and_back() -> None:
    here = front()
    bits = [m.bits_per_weight for m in here.members]
    assert bits == sorted(bits) and here.best.digest == here.winner
    rows = json.loads(json.dumps(here.to_list(), allow_nan=False))
    keys = ["bits_per_weight", "bytes", "bops", "operations", "latency_ms", "predicted", "measured", "config"]
    assert all(list(row) == keys for row in rows)
    assert rows[0]["measured"] == {
        "fid": {"value": 1.5, "low": 1.0, "high": 2.0, "level": 0.95},
        "psnr": {"value": 20.0, "low": None, "high": None, "level": 0.95},
    }
    assert rows[0]["operations"] == {"multiply_adds": model(4, **TOY)[1].macs.sum(), "lut_adds": 0}
    assert QuantConfig.from_dict(rows[0]["config"]) == here.members[0].config
    assert Front.from_list(rows).to_list() == rows
    with pytest.raises(AquabitError, match="names no winner"):
        _ = Front.from_list(rows).best
    stored = json.loads(json.dumps(here.to_dict(), allow_nan=False))
    again = Front.from_dict(stored)
    assert again.to_dict() == stored and again.best == here.best and again.budget == here.budget
    assert stored["comparison"] == {"scheme": "usq3", "low": None, "n": 5}
    assert again.proof == here.proof and here.pruned("fid").proof == here.proof
    assert (
        Front.from_dict({k: v for k, v in stored.items() if k != "proof"}).proof is None
    )  # as older studies hold it
    with pytest.raises(AquabitError, match="the stored proof of a search: optimum_bound"):
        Front.from_dict({**stored, "proof": {"optimum": 1.0}})
    html = here._repr_html_()
    assert html.count("<tr") == 4 and html.count("bold") == 2 and "1.5 (1 to 2, 95 %)" in html


def test_intervals_without_a_level_have_that_of_their_time() -> None:
    stored = front().to_dict()
    for member in stored["members"]:
        for found in member["measured"].values():
            del found["level"]
    older = Front.from_dict(stored).members[0].measured["fid"]
    assert [*older] == [1.5, 1.0, 2.0] and older.level == OLD_LEVEL
    newer = Front.from_dict({**stored, "comparison": {"same_quality": []}})
    assert newer.members[0].measured["fid"].percent == "95 %"


def broken(change: Callable[[list[Any]], Any]) -> Any:
    rows = json.loads(json.dumps(front().to_list()))
    return change(rows) or rows


BROKEN: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "no list": (lambda rows: {"members": rows}, "top level"),
    "missing": (lambda rows: rows[1].pop("bytes") and None, r"1\.bytes"),
    "extra": (lambda rows: rows[1].update(color=1), r"1\.color"),
    "text": (lambda rows: rows[2].update(bits_per_weight="3"), r"2\.bits_per_weight"),
    "infinite": (lambda rows: rows[2]["measured"]["fid"].update(low=float("inf")), r"2\.measured\.fid\.low"),
    "negative": (lambda rows: rows[0].update(bytes=-1), r"0\.bytes"),
    "config": (
        lambda rows: rows[0]["config"]["layers"]["l1"].update(act=7),
        r"entry 0, config.*layers\.l1\.act",
    ),
    "scheme": (lambda rows: rows[0]["config"]["layers"]["l1"].update(weight="usq99"), "usq99"),
    "not a row": (lambda rows: rows.append(3), "3:"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_json_is_refused_with_its_place(case: str) -> None:
    change, place = BROKEN[case]
    with pytest.raises(AquabitError, match=place):
        Front.from_list(broken(change))


def test_a_bad_stored_front_is_refused() -> None:
    stored = front().to_dict()
    with pytest.raises(AquabitError, match="must be an object"):
        Front.from_dict([stored])
    with pytest.raises(AquabitError, match="winner nobody is not among"):
        Front.from_dict({**stored, "winner": "nobody"})


def test_pruning_drops_dominated_members_but_never_the_winner() -> None:
    space, cost = model(4, **TOY)
    quality = {"usq2": 5.0, "vq2": 6.0, "usq3": 7.0, "usq4": 1.0}
    members = [
        FrontMember.of(cost, space.uniform(s), {}, {"fid": Interval(v, v, v)}) for s, v in quality.items()
    ]
    members.append(FrontMember.of(cost, space.uniform("vq4c"), {}, {"fid": Interval(8.0, 8.0, 8.0)}))
    here = Front(members, None, space.uniform("usq3").digest)
    bits = {m.config.digest: m.bits_per_weight for m in members}
    kept = {m.config.digest for m in here.pruned("fid").members}
    expected = {space.uniform("usq3").digest, space.uniform("usq4").digest}
    small = [
        s
        for s in ("usq2", "vq2")
        if not any(
            quality[o] < quality[s] and bits[space.uniform(o).digest] <= bits[space.uniform(s).digest]
            for o in quality
        )
    ]
    assert kept == expected | {space.uniform(s).digest for s in small}
    upward = {m.config.digest for m in here.pruned("fid", lower_is_better=False).members}
    assert space.uniform("vq4c").digest in upward and space.uniform("usq4").digest not in upward

"""The combined effect: between prediction and real mean, nearer to the more precise, better than both, with intervals that hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from aquabit.cost import CostModel
from aquabit.scheme import Scheme
from aquabit.sensitivity.combined import Combined, combine
from aquabit.sensitivity.design import PER_CONTEXT, Design
from aquabit.sensitivity.effects import Player, find_players
from aquabit.sensitivity.estimators import Surrogate
from aquabit.sensitivity.flips import training_swaps
from aquabit.sensitivity.scores import srcc
from aquabit.sensitivity.surrogate import FittedSurrogate
from tests.test_surrogate import World

FOUR, TWO = Scheme.parse("usq4"), Scheme.parse("usq2")


def swaps(values: dict[int, list[float]]) -> pd.DataFrame:
    rows = [(f"l{i}", "usq4", "usq2", v) for i, row in values.items() for v in row]
    return pd.DataFrame(rows, columns=["layer", "before", "after", "real"])


def combined(predicted: np.ndarray, error: float, values: dict[int, list[float]]) -> Combined:
    players = [Player(f"l{i}", i, FOUR, TWO, (FOUR, TWO)) for i in range(len(predicted))]
    replicates = predicted + error * np.random.default_rng(1).normal(size=(400, len(predicted)))
    return combine(players, predicted, replicates, swaps(values))


def drawn(seed: int, error: float, spread: float, each: int) -> tuple[np.ndarray, np.ndarray, dict[int, list[float]]]:
    """Truth, predictions with errors and real swaps of every other layer that vary, both in proportion to the truth and around 0."""
    rng = np.random.default_rng(seed)
    truth = rng.lognormal(0, 1, 60) * rng.choice([1, 1, 1, -1], 60)
    values = {i: (truth[i] + spread * abs(truth[i]) * rng.normal(size=each)).tolist() for i in range(0, 60, 2)}
    return truth, np.sinh(np.arcsinh(truth) + error * rng.normal(size=60)), values


@pytest.mark.parametrize(
    ("error", "spread", "each", "better"), [(0.5, 1.0, 2, True), (0.8, 1.5, 1, True), (1.5, 0.5, 2, False), (0.8, 1.0, 4, False)]
)
def test_combined_ranks_as_well_as_the_better_side_and_its_intervals_hold(error: float, spread: float, each: int, better: bool) -> None:
    scores, inside = [], []
    for seed in range(10):
        truth, predicted, values = drawn(seed, error, spread, each)
        found, has = combined(predicted, error, values), np.arange(60) % 2 == 0
        real = np.array([np.mean(values.get(i, [np.nan])) for i in range(60)])
        scores.append([srcc(v[has], truth[has]) for v in (found.effect, predicted, real)])
        inside.append((found.low <= truth) & (truth <= found.high))
        assert np.median((found.high - found.low)[has] / np.abs(truth[has])) < np.median(
            (found.high - found.low)[~has] / np.abs(truth[~has])
        )
    ours, *sides = np.mean(scores, 0)
    assert ours > max(sides) + (0.01 if better else -0.02)
    assert 0.85 < np.mean(inside) < 0.995


def test_each_side_weighs_by_its_precision() -> None:
    predicted = np.linspace(1, 2, 20)
    exact = combined(predicted, 1.0, {i: [3.0, 3.01] for i in range(20)})
    assert np.allclose(exact.effect, 3.005, atol=0.05)
    loose = combined(predicted, 0.05, {i: [-8.0, 11.0 + (i % 3)] for i in range(20)})
    assert srcc(loose.effect, predicted) > 0.9 and (loose.high - loose.low > exact.high - exact.low).all()


def test_overconfident_predictions_are_found_out() -> None:
    """Intervals of layers without real swaps widen where those with them show larger errors than predictions are taken to have."""
    rng = np.random.default_rng(0)
    truth = np.full(60, 5.0)
    for error, low, high in ((2.0, 2.5, 4.5), (0.2, 0.3, 2.4)):
        predicted = truth + error * rng.normal(size=60)
        found = combined(predicted, 0.2, {i: (5 + 0.1 * rng.normal(size=2)).tolist() for i in range(30)})
        half = (found.high - found.low)[30:].mean() / 2
        assert low < half < high, "a floor of a fifth of the size, and the errors seen"
        assert found.draws.std(0)[30:].mean() == pytest.approx(half / 1.645, rel=0.15)
        means = found.draws[:, 30:].mean(1)
        assert means.std() > 0.4 * half / 1.645, "what all layers share does not average out"


def test_one_swap_takes_the_pooled_spread() -> None:
    """The same mean from one swap weighs less than from four, and not nothing."""
    rng = np.random.default_rng(0)
    values = {i: (6 + rng.normal(size=4)).tolist() for i in range(20)}
    for i in (20, 21):
        values[i] = [6.0]
    predicted = np.full(40, 2.0)
    found = combined(predicted, 1.0, values)
    assert 2 < found.effect[20] < found.effect[:20].mean() and found.low[20] < found.effect[20] < found.high[20]
    alone = combined(predicted, 1.0, {0: [6.0]})
    assert 2 < alone.effect[0] <= 6.0001 and (alone.effect[1:] > 1.9).all()


def test_other_swaps_and_none_change_nothing() -> None:
    predicted = np.linspace(0, 1, 8)
    for table in (swaps({}), swaps({3: [9.0]}).assign(after="vq2"), swaps({30: [9.0]})):
        players = [Player(f"l{i}", i, FOUR, TWO, (FOUR, TWO)) for i in range(8)]
        found = combine(players, predicted, np.tile(predicted, (3, 1)), table)
        assert (found.effect == predicted).all() and (found.low < predicted).all() and (found.high > predicted).all()
        wide = combine(players, predicted, np.tile(predicted, (3, 1)), table, widen=2.0)
        assert (wide.high - wide.low > 1.9 * (found.high - found.low)).all() and np.isnan(
            combine(players, predicted, predicted[:0, None], table).low
        ).all()


def test_swaps_among_the_training_measurements_are_found() -> None:
    """Those of the design, from the first scheme to the second whichever came first; not where activations or the budget are others."""
    world = World(20)
    weights, acts = world.space.indices(Design("swaps").draw(world.space, 50, 0))
    y = np.arange(50.0) ** 2
    bits = CostModel(world.graph, world.space).totals(weights, acts)["bits"]
    parts = (Surrogate(), world.encoder, world.cost, world.graph, world.space, (), weights, acts, y, bits, y, {}, "fid", "min", "p")
    players = find_players(world.space, (FOUR, TWO))
    found = training_swaps(FittedSurrogate(*parts), players, 3.0)
    near = [k for k in range(0, 50, 1 + PER_CONTEXT) if abs(bits[k] - 3) < 0.4]
    assert len(found) == 48 and len(near) == 2
    for k in near:
        for j in range(k + 1, k + 1 + PER_CONTEXT):
            layer = int(np.flatnonzero(weights[j] != weights[k])[0])
            up = world.space.schemes[weights[k, layer]] == FOUR
            change = found[(found.layer == world.space.layers[layer])].real
            assert ((y[j] - y[k]) if up else (y[k] - y[j])) in change.to_list()
    assert training_swaps(FittedSurrogate(*parts), players, 4.4).empty
    lower = (*parts[:7], np.full_like(acts, 6), *parts[8:])
    assert training_swaps(FittedSurrogate(*lower), players, 3.0).empty


def test_coverage_counts_what_lies_inside() -> None:
    from benchmarks.intervals import coverage

    layers = pd.DataFrame({"name": list("abcd"), "effect": [4.0, 1.0, 0.0, 0.0], "low": [3.0, 0.5, -1, -1], "high": [5.0, 1.5, 1, 1]})
    found = coverage(layers, {"a": (4.5, 0.1), "b": (3.0, 1.3), "c": (5.0, 0.1), "x": (0.0, 0.0)})
    assert found["layers"] == 3 and found["inside"] == pytest.approx(1 / 3) and found["inside_allowed"] == pytest.approx(2 / 3)
    assert found["width"] == pytest.approx(1 / 4.5)

"""The combined effect: nearer to the truth than predictions and swaps are, with 95 % intervals that hold
on made-up worlds of several shapes."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import Scheme
from aquabit.sensitivity.designs import PER_CONTEXT, Design
from aquabit.sensitivity.effects.combine_effects import Combined, combine
from aquabit.sensitivity.effects.predicted import Player, find_players
from aquabit.sensitivity.effects.swaps import training_swaps
from aquabit.sensitivity.surrogate.estimators import Surrogate
from aquabit.sensitivity.surrogate.fit import FittedSurrogate
from aquabit.sensitivity.surrogate.scores import srcc
from aquabit.stats import around_replicates
from tests.worlds import World

FOUR, TWO = Scheme.parse("usq4"), Scheme.parse("usq2")
WORLDS = ("noisy", "biased", "other scale", "shrunk", "heavy tails", "skewed", "constant noise")


def swaps(values: dict[int, list[float]]) -> pd.DataFrame:
    rows = [(f"l{i}", "usq4", "usq2", v) for i, row in values.items() for v in row]
    return pd.DataFrame(rows, columns=["layer", "before", "after", "real"])


def combined(
    predicted: np.ndarray, values: dict[int, list[float]], error: float = 0.5, seed: int = 0
) -> Combined:
    players = [Player(f"l{i}", i, FOUR, TWO, (FOUR, TWO)) for i in range(len(predicted))]
    replicates = predicted + error * np.random.default_rng(1).normal(size=(20, len(predicted)))
    return combine(players, predicted, replicates, swaps(values), seed=seed)


def drawn(world: str, seed: int) -> tuple[np.ndarray, np.ndarray, dict[int, list[float]]]:
    """True effects over three orders of magnitude, predictions of them, and swaps of half of the layers in
    1 to 6 contexts."""
    rng = np.random.default_rng([seed, WORLDS.index(world)])
    layers = int(rng.integers(20, 81))
    truth = np.exp(1.7 * rng.normal(size=layers)) * (
        1.0 if world == "skewed" else rng.choice([1, 1, 1, -1], layers)
    )
    size = float(np.median(np.abs(truth)))
    predicted = truth * np.exp(0.7 * rng.normal(size=layers)) + 0.3 * size * rng.normal(size=layers)
    if world == "biased":
        predicted += 2 * size
    elif world == "other scale":
        predicted *= 12
    elif world == "shrunk":
        predicted[rng.random(layers) < 0.3] = 0
    values = {}
    for i in rng.permutation(layers)[: layers // 2]:
        count = int(rng.integers(1, 7))
        if world == "heavy tails":
            noise = 0.8 * np.abs(truth[i]) * rng.standard_t(3, count) + 0.2 * size * rng.normal(size=count)
        elif world == "skewed":
            noise = truth[i] * (rng.lognormal(-0.32, 0.8, count) - 1)
        elif world == "constant noise":
            noise = 0.5 * size * rng.normal(size=count)
        else:
            noise = (0.7 * rng.lognormal(0, 0.5) * np.abs(truth[i]) + 0.2 * size) * rng.normal(size=count)
        values[int(i)] = (truth[i] + noise).tolist()
    return truth, predicted, values


@pytest.mark.parametrize("world", WORLDS)
def test_intervals_hold_and_effects_are_nearer_than_either_side(world: str) -> None:
    inside, errors = [], []
    for seed in range(5):
        truth, predicted, values = drawn(world, seed)
        found, has = combined(predicted, values, seed=seed), np.isin(np.arange(len(truth)), list(values))
        inside.append(((found.low <= truth) & (truth <= found.high)).mean())
        real = np.array([np.mean(values.get(i, [np.nan])) for i in range(len(truth))])
        size = np.median(np.abs(truth))
        places = [np.arcsinh(v / size) - np.arcsinh(truth / size) for v in (found.effect, predicted, real)]
        errors.append([np.sqrt(np.square(p[has]).mean()) for p in places])
    ours, prediction, real_swaps = np.mean(errors, 0)
    assert 0.90 <= np.mean(inside) <= 0.99
    assert ours < 0.9 * min(prediction, real_swaps)


def test_each_side_weighs_by_its_precision() -> None:
    predicted = np.linspace(1, 2, 20)
    exact = combined(predicted, {i: [3.0, 3.01] for i in range(20)})
    assert np.allclose(exact.effect, 3.005, atol=0.05)
    loose = combined(predicted, {i: [-8.0, 11.0 + (i % 3)] for i in range(20)})
    assert srcc(loose.effect, predicted) > 0.9 and (loose.high - loose.low > exact.high - exact.low).all()


def test_intervals_of_other_layers_say_what_swaps_showed_of_predictions() -> None:
    """Layers without swaps get wider intervals where predictions of swapped ones were worse, and all
    layers follow a common error."""
    rng = np.random.default_rng(0)
    truth = np.exp(rng.normal(size=60))
    width = []
    for error in (0.1, 1.0):
        predicted = 10 * truth * np.exp(error * rng.normal(size=60))
        found = combined(
            predicted,
            {i: (truth[i] * (1 + 0.1 * rng.normal(size=3))).tolist() for i in range(30)},
            error=0.01,
        )
        width.append(np.median((np.arcsinh(found.high / truth) - np.arcsinh(found.low / truth))[30:]))
        assert np.median(found.effect[30:] / truth[30:]) == pytest.approx(1, rel=0.5)
        assert found.ratio > 100, "replicates said a hundredth"
    assert 0.15 < width[0] < 1 < width[1] < 5


def test_few_swaps_give_wide_intervals_and_repeated_ones_narrow() -> None:
    rng = np.random.default_rng(3)
    truth = np.exp(rng.normal(size=40))
    predicted = truth * np.exp(0.5 * rng.normal(size=40))
    width = []
    for count in (2, 6, 30):
        found = combined(
            predicted, {i: (truth[i] * (1 + 0.5 * rng.normal(size=2))).tolist() for i in range(count)}
        )
        width.append(np.median(np.arcsinh(found.high) - np.arcsinh(found.low)))
    assert width[0] > 1.1 * width[1] > 1.2 * width[2]
    uneven = combined(
        predicted, {i: (truth[i] * (1 + 0.5 * rng.normal(size=1 + 5 * (i % 2)))).tolist() for i in range(30)}
    )
    each = (np.arcsinh(uneven.high) - np.arcsinh(uneven.low))[:30]
    assert np.median(each[1::2]) < 0.8 * np.median(each[::2])


def test_units_and_order_do_not_matter() -> None:
    """Another unit scales everything; the same seed gives the same numbers."""
    _, predicted, values = drawn("noisy", 1)
    first = combined(predicted, values)
    again, scaled = (
        combined(predicted, values),
        combined(1000 * predicted, {i: [1000 * v for v in row] for i, row in values.items()}),
    )
    assert (first.draws == again.draws).all() and np.allclose(scaled.low, 1000 * first.low, rtol=1e-6)
    assert first.draws.shape[1] == len(predicted) and np.allclose(
        np.quantile(first.draws, 0.975, axis=0), first.high
    )


@pytest.mark.parametrize(
    "values",
    [
        {0: [0.0]},
        {0: [0.0, 0.0], 1: [0.0]},
        {0: [5.0, 5.0, 5.0], 1: [5.0, 5.0]},
        {2: [1e9]},
        {1: [-1e-9, 1e9]},
    ],
)
def test_degenerate_swaps_give_numbers(values: dict[int, list[float]]) -> None:
    for predicted in (np.zeros(4), np.array([1.0, 2.0, -3.0, 0.0])):
        found = combined(predicted, values)
        assert np.isfinite([found.effect, found.low, found.high]).all() and (found.low <= found.effect).all()
        assert (found.effect <= found.high).all()


def test_without_swaps_replicates_speak() -> None:
    predicted = np.linspace(0, 1, 8)
    players = [Player(f"l{i}", i, FOUR, TWO, (FOUR, TWO)) for i in range(8)]
    replicates = predicted + np.random.default_rng(0).normal(size=(20, 1)) * np.linspace(
        0.1, 1, 8
    )  # all move together
    for table in (swaps({}), swaps({3: [9.0]}).assign(after="vq2"), swaps({30: [9.0]})):
        found = combine(players, predicted, replicates, table)
        low, high = around_replicates(predicted, replicates)
        assert (
            (found.effect == predicted).all()
            and (found.low == low).all()
            and (found.high == high).all()
            and found.ratio == 1
        )
        assert np.quantile(found.draws, 0.975, axis=0) - predicted == pytest.approx(high - predicted, rel=0.1)
        assert np.quantile(found.draws.mean(1), 0.975) - predicted.mean() == pytest.approx(
            (high - predicted).mean(), rel=0.1
        )
        none = combine(players, predicted, replicates[:1], table)
        assert np.isnan(none.low).all() and none.draws.shape == (0, 8)
    without = combine(players, predicted, replicates[:0], swaps({3: [9.0]}))
    assert np.isfinite(without.low).all() and without.ratio == 1, "swaps need no replicates"


def test_eight_hundred_layers_take_seconds() -> None:
    rng = np.random.default_rng(0)
    truth = np.exp(rng.normal(size=800))
    start = time.process_time()
    combined(
        truth * np.exp(rng.normal(size=800)),
        {i: (truth[i] * (1 + 0.5 * rng.normal(size=2))).tolist() for i in range(100)},
    )
    assert time.process_time() - start < 5


def test_swaps_among_the_training_measurements_are_found() -> None:
    """Those of the design, from the first scheme to the second whichever came first; not where activations
    or the budget are others."""
    world = World(20)
    rows = Choices.of(world.space, Design("swaps").draw(world.space, 50, 0))
    y = np.arange(50.0) ** 2
    bits = CostModel(world.graph, world.space).totals(rows)["bits"]
    parts = (Surrogate(), world.encoder, world.cost, (), rows, y, bits, y, {}, "fid", "min", "p")
    players = find_players(world.space, (FOUR, TWO))
    found = training_swaps(FittedSurrogate(*parts), players, 3.0)
    near = [k for k in range(0, 50, 1 + PER_CONTEXT) if abs(bits[k] - 3) < 0.4]
    assert len(found) == 48 and len(near) == 2
    for k in near:
        for j in range(k + 1, k + 1 + PER_CONTEXT):
            layer = int(np.flatnonzero(rows.weights[j] != rows.weights[k])[0])
            up = world.space.schemes[rows.weights[k, layer]] == FOUR
            change = found[(found.layer == world.space.layers[layer])].real
            assert ((y[j] - y[k]) if up else (y[k] - y[j])) in change.to_list()
    assert training_swaps(FittedSurrogate(*parts), players, 4.4).empty
    lower = (*parts[:4], Choices.at(world.space, rows.weights, 6), *parts[5:])
    assert training_swaps(FittedSurrogate(*lower), players, 3.0).empty


def test_coverage_counts_what_lies_inside() -> None:
    from benchmarks.intervals import coverage

    layers = pd.DataFrame(
        {
            "name": list("abcd"),
            "effect": [4.0, 1.0, 0.0, 0.0],
            "low": [3.0, 0.5, -1, -1],
            "high": [5.0, 1.5, 1, 1],
        }
    )
    found = coverage(layers, {"a": (4.5, 0.1), "b": (3.0, 1.3), "c": (5.0, 0.1), "x": (0.0, 0.0)})
    assert (
        found["layers"] == 3
        and found["inside"] == pytest.approx(1 / 3)
        and found["inside_allowed"] == pytest.approx(2 / 3)
    )
    assert found["width"] == pytest.approx(1 / 4.5)

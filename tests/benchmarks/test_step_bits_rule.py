"""Policies of step-aware bits: PTQD's rule on SNR made by hand, merging against brute force, and controls
that cost the same."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from aquabit.cost import CostModel
from aquabit.pipelines import trace
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Scheme, StepGroups
from aquabit.space import make_space
from benchmarks.research.step_bits_rule import (
    Mix,
    by_snr,
    chosen_layers,
    high_then_low,
    low_then_high,
    merged,
    random_bits,
    signal_ratios,
    snr_bits,
    snr_rule,
    stepped,
    uniform,
)
from tests.conftest import tiny_pipeline

GRAPH = trace(tiny_pipeline("unet"))
SPACE = make_space(GRAPH, "f", schemes=["usq4"], excluded=["conv_out"], activations=[8, 6, 4])
COSTS = CostModel(GRAPH, SPACE)
SCHEME = SPACE.schemes.index(Scheme.parse("usq4"))
PER_BIT = {
    n: float(COSTS.macs[i] * COSTS.weight_bits[i, SCHEME])
    for i, n in enumerate(SPACE.layers)
    if n != "conv_out"
}


def changes(bits) -> int:
    return sum(a != b for a, b in itertools.pairwise(bits))


def steps_of(config: QuantConfig, layer: str, total: int) -> list[int]:
    act = config[layer].act
    return [act if isinstance(act, int) else act[config.steps.of(t)] for t in range(total)]


def test_the_rule_takes_the_fewest_bits_whose_snr_exceeds_the_ratio() -> None:
    snr = {4: [9.0, 9, 2, 3, 1, 1], 6: [90.0, 90, 20, 30, 10, 4.99], 8: [900.0] * 4 + [1.0, 1.0]}
    ratios = [1.0, 2.0, 2.0, 4.0, 5.0, 5.0]
    assert snr_bits(snr, ratios) == [4, 4, 6, 6, 6, 8], (
        "equal is not more; where none exceeds it, the most bits"
    )
    assert snr_rule(snr, ratios) == (StepGroups(6, (0, 2, 5)), (4, 6, 8))
    assert snr_rule({4: [9.0] * 3, 8: [99.0] * 3}, [1.0] * 3) == (None, (4,))
    with pytest.raises(AquabitError, match="a4 has 2"):
        snr_bits({4: [1.0, 2.0]}, [1.0])
    with pytest.raises(AquabitError, match="none is given"):
        snr_bits({}, [1.0])


def test_ratios_are_those_of_the_noise_schedule() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    bar = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    assert signal_ratios(scheduler) == pytest.approx([a / (1 - a) for a in bar])
    with pytest.raises(AquabitError, match="no alphas_cumprod"):
        signal_ratios(FlowMatchEulerDiscreteScheduler())


@given(st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=7), st.integers(1, 5))
def test_merging_changes_the_fewest_steps(bits: list[int], groups: int) -> None:
    found = merged(bits, groups)
    options = [c for c in itertools.product(sorted(set(bits)), repeat=len(bits)) if changes(c) < groups]
    distance = lambda c: sum(a != b for a, b in zip(c, bits, strict=True))  # noqa: E731
    least = min(map(distance, options))
    assert changes(found) < groups and distance(found) == least
    assert sum(found) == max(sum(c) for c in options if distance(c) == least), (
        "of equal ones that with the most bits"
    )
    assert (found == bits) == (changes(bits) < groups)


SNR, RATIOS = [10.0 - t for t in range(10)], [1.0 + t for t in range(10)]
CONTROLS = {
    "uniform": lambda mix: uniform(mix),
    "low-high": lambda mix: low_then_high(mix, 10),
    "high-low": lambda mix: high_then_low(mix, 10),
    "snr": lambda mix: by_snr(mix, SNR, RATIOS),
    "random": lambda mix: random_bits(mix, 10),
}


@given(st.floats(4.01, 5.99), st.sampled_from([*CONTROLS]), st.integers(0, 99))
def test_controls_cost_the_same(mean: float, name: str, seed: int) -> None:
    base = SPACE.uniform("usq4", 8)
    config = CONTROLS[name](Mix(base, 4, 6, mean, PER_BIT, seed))
    fixed = COSTS(base).bops - 8 * sum(PER_BIT.values())  # the excluded layer
    assert COSTS(config).bops == pytest.approx(fixed + mean * sum(PER_BIT.values()), rel=5e-3)
    assert {b for n in PER_BIT for b in steps_of(config, n, 10)} <= {4, 6} and config["conv_out"] == base[
        "conv_out"
    ]
    assert config.steps is None or len(config.steps.starts) <= 5


def test_patterns_of_the_controls() -> None:
    mix = Mix(SPACE.uniform("usq4", 8), 6, 8, 7.0, PER_BIT)
    layer = next(iter(PER_BIT))
    assert steps_of(low_then_high(mix, 10), layer, 10) == [6] * 5 + [8] * 5
    assert steps_of(high_then_low(mix, 10), layer, 10) == [8] * 5 + [6] * 5
    assert steps_of(by_snr(mix, SNR, RATIOS), layer, 10) == [6] * 5 + [8] * 5, "falling SNR, rising ratios"
    assert steps_of(by_snr(mix, SNR[::-1], RATIOS[::-1]), layer, 10) == [8] * 5 + [6] * 5
    humped = by_snr(mix, [1, 2, 3, 9, 9, 9, 9, 9, 2, 1], [1.0] * 10)
    assert steps_of(humped, layer, 10) == [8] * 3 + [6] * 5 + [8] * 2
    jagged = by_snr(mix, [9, 1, 9, 1, 9, 1, 9, 1, 9, 1], [1.0] * 10)
    assert steps_of(jagged, layer, 10).count(6) == 5 and changes(steps_of(jagged, layer, 10)) <= 4
    rows = {tuple(steps_of(random_bits(replace(mix, seed=s), 10), layer, 10)) for s in range(9)}
    assert len(rows) > 3 and all(row.count(6) == 5 and 2 <= changes(row) <= 4 for row in rows)
    assert random_bits(mix, 10) == random_bits(mix, 10)
    assert uniform(mix).steps is None and {c.act for n, c in uniform(mix).layers.items() if n in PER_BIT} == {
        6,
        8,
    }


def test_a_part_of_a_step_is_met_by_some_layers() -> None:
    mix = Mix(SPACE.uniform("usq4", 8), 4, 6, 5.1, PER_BIT)  # 4.5 of 10 steps are low
    for make, wanted in (
        (low_then_high, ([4] * 4 + [6] * 6, [4] * 5 + [6] * 5)),
        (high_then_low, ([6] * 6 + [4] * 4, [6] * 5 + [4] * 5)),
    ):
        config = make(mix, 10)
        rows = {n: steps_of(config, n, 10) for n in PER_BIT}
        assert all(row in wanted for row in rows.values())
        part = sum(PER_BIT[n] for n, row in rows.items() if row == wanted[1]) / sum(PER_BIT.values())
        assert part == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_mixed_is_refused() -> None:
    base = SPACE.uniform("usq4", 8)
    for low, high, mean in ((4, 6, 7.0), (6, 4, 5.0), (4, 6, float("nan"))):
        with pytest.raises(AquabitError, match="cannot be mixed"):
            Mix(base, low, high, mean, PER_BIT)
    with pytest.raises(AquabitError, match="2 to 5 rising starts"):
        stepped(base, {SPACE.layers[0]: [4, 6] * 5})


def test_layers_are_chosen_by_their_costs() -> None:
    costs = {f"l{i}": float(2**i) for i in range(10)}
    assert chosen_layers(costs, 0.0) == set()
    assert chosen_layers(costs, 1.0) == set(costs)
    found = chosen_layers(costs, 0.3)
    assert sum(costs[n] for n in found) == pytest.approx(0.3 * 1023, abs=1)
    config = QuantConfig("f", {"a": LayerChoice(Scheme.parse("usq4"), 8)})
    assert stepped(config, {"a": [4, 4, 4]})["a"].act == 4

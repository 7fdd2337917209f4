"""Damages, the Gibbs distribution around the program's optimum, and good contexts drawn from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import FP, AquabitError, Scheme
from aquabit.sensitivity.damages import (
    BUDGET_TOLERANCE_BITS,
    EXCESSES,
    Damages,
    gibbs,
    good_contexts,
    known_damages,
)
from aquabit.sensitivity.effects.predicted import draw_contexts
from aquabit.space import make_space
from tests.worlds import World


@pytest.fixture(scope="module")
def world() -> World:
    return World(40, probed=True)


def least(world: World, bits: float) -> float:
    """The least mean damage of any mixture of this mean size, by a linear program."""
    allowed = np.isfinite(world.damages.weights)
    row, _ = np.nonzero(allowed)
    size = world.cost.bytes[allowed] * 8 / world.cost.weights
    one = (row == np.arange(60)[:, None]).astype(float)
    found = linprog(world.damages.weights[allowed] * 1e4, size[None], [bits], one, np.ones(60))
    return float(found.fun) / 1e4


def test_damages_are_those_of_the_study(world: World) -> None:
    found, layer = world.damages, world.space.layers[3]
    assert (
        found.weights[3, world.space.schemes.index(Scheme.parse("vq3"))]
        == world.probes[layer, "vq3"]["damage"]
    )
    assert np.isinf(found.weights[:, 0]).all() and found.acts[3].tolist() == [
        world.probes[layer, a]["damage"] for a in ("a8", "a6")
    ]
    missing = {k: v for k, v in world.probes.items() if k != (layer, "vq3")}
    with pytest.raises(AquabitError, match=f"damage of vq3 in layer '{layer}' is not known"):
        Damages.of(world.space, missing)
    assert (
        known_damages(world.space, missing) is None
        and known_damages(world.space, {**missing, **world.probes}) is not None
    )
    open_ = replace(
        world.space,
        choices={**world.space.choices, layer: (FP, Scheme.parse("usq2"))},
        activations=(16, 8, 6),
    )
    free = Damages.of(open_, world.probes)
    assert free.weights[3, 0] == 0 and free.acts[3, 0] == 0 and np.isinf(free.weights[3, 2])
    both = world.damages.total(Choices.at(world.space, np.full((1, 60), 2), 6))[0]
    assert both == pytest.approx(
        sum(
            world.probes[k, str(world.space.schemes[2])]["damage"] + world.probes[k, "a6"]["damage"]
            for k in open_.layers
        )
    )


@pytest.mark.parametrize("bits", [2.3, 3.0, 4.2])
def test_gibbs_has_the_size_and_the_excess_that_were_asked_for(world: World, bits: float) -> None:
    table = np.where(np.isfinite(world.damages.weights), world.damages.weights, 0)
    for excess, found in zip(EXCESSES, gibbs(world.damages, world.cost, bits, EXCESSES), strict=True):
        assert np.allclose(found.odds.sum(1), 1) and (found.odds[:, 0] == 0).all()
        assert (found.odds * world.cost.bytes).sum() * 8 / world.cost.weights == pytest.approx(bits, abs=1e-4)
        assert (found.odds * table).sum() == pytest.approx((1 + excess) * least(world, bits), rel=0.01)
    assert np.allclose(
        gibbs(world.damages, world.cost, bits, [EXCESSES[2]])[0].odds,
        gibbs(world.damages, world.cost, bits, EXCESSES)[2].odds,
    )


def test_gibbs_odds_follow_damage_and_size_alone(world: World) -> None:
    """The law that makes entropy largest: differences of log odds are linear in damage and bytes, with one
    beta and price for all layers."""
    (found,) = gibbs(world.damages, world.cost, 3.0, [0.3])
    damage, size = world.damages.weights[:, 1:], world.cost.bytes[:, 1:] * 8 / world.cost.weights
    expected = -found.beta * (damage + found.price * size)
    seen = found.odds[:, 1:] > 1e-12
    for i in range(60):
        log = np.log(found.odds[i, 1:][seen[i]])
        assert np.allclose(log - log[0], expected[i][seen[i]] - expected[i][seen[i]][0], atol=1e-6)


def test_draws_have_the_odds(world: World) -> None:
    (found,) = gibbs(world.damages, world.cost, 3.0, [0.5])
    drawn = found.draw(4000, np.random.default_rng(0))
    share = np.stack([(drawn == j).mean(0) for j in range(found.odds.shape[1])], 1)
    assert np.abs(share - found.odds).max() < 0.04 and found.beta > 0


def test_good_contexts_are_near_the_front_at_the_budget_and_varied(world: World) -> None:
    for bits in (2.3, 3.0, 4.0):
        rows = good_contexts(world.damages, world.cost, bits, 60, np.random.default_rng(0))
        real = world.cost.totals(rows)["bits"]
        assert (
            np.abs(real - bits).max() <= BUDGET_TOLERANCE_BITS
            and abs(real.mean() - bits) < 0.1
            and (rows.acts == 8).all()
        )
        assert (
            world.space.allowed()[np.arange(60), rows.weights].all()
            and len(np.unique(rows.weights, axis=0)) == 60
        )
        excess = np.array(
            [world.damages.total(rows[i : i + 1])[0] / least(world, real[i]) - 1 for i in range(20)]
        )
        assert (
            excess.min() > -0.01
            and excess.max() < 1.6
            and 0.1 < np.median(excess) < 0.6
            and excess.max() > 3 * excess.min()
        )
        random = draw_contexts(world.space, world.cost, bits, 60, np.random.default_rng(0))
        assert np.median(world.damages.total(random)) > 1.5 * np.median(world.damages.total(rows))
    again = draw_contexts(world.space, world.cost, bits, 60, np.random.default_rng(0), world.damages)
    assert again == rows, "what contexts are wherever damages are known"


def test_good_contexts_keep_excluded_layers_and_say_what_is_out_of_reach(world: World) -> None:
    layer = world.space.layers[7]
    space = replace(world.space, choices={**world.space.choices, layer: (FP,)}, activations=(6,))
    costs, known = CostModel(world.graph, space), Damages.of(space, world.probes)
    rows = good_contexts(known, costs, 3.0, 5, np.random.default_rng(0))
    assert (
        (rows.acts[:, 7] == 16).all()
        and (np.delete(rows.acts, 7, 1) == 6).all()
        and (rows.weights[:, 7] == 0).all()
    )
    for bits in (1.2, 12.0):
        with pytest.raises(AquabitError, match="out of reach: this space has"):
            good_contexts(known, costs, bits, 5, np.random.default_rng(0))
    low = costs.limits(6)["bits"][0]
    edge = costs.totals(good_contexts(known, costs, low - 0.2, 5, np.random.default_rng(0)))["bits"]
    assert edge.max() <= low + 0.05, "at the end of what there is"


def test_shared_codebooks_count_in_the_size_of_contexts(world: World) -> None:
    """Ten layers pay for one table: contexts lie at the budget with it, and would lie a sixth of a bit off
    without."""
    space = make_space(world.graph, "f" * 16, "made", schemes=("usq3", "usq8", "aq2x8g8s"))
    rng = np.random.default_rng(0)
    damage = {
        (k, str(s)): {"damage": float(4.0 ** -(3 + (s.kind == "aq")) * rng.lognormal())}
        for k in space.layers
        for s in space.choices[k]
    }
    known = Damages.of(space, damage | {(k, a): {"damage": 0.0} for k in space.layers for a in ("a6", "a8")})
    costs = CostModel(world.graph, space)
    rows = good_contexts(known, costs, 2.6, 80, np.random.default_rng(0))
    real = costs.totals(rows)["bits"]
    nominal = costs.bytes[np.arange(60), rows.weights].sum(1) * 8 / costs.weights
    assert (
        (real - nominal).mean() > 0.1
        and abs(real.mean() - 2.6) < 0.08
        and np.abs(real - 2.6).max() <= BUDGET_TOLERANCE_BITS
    )

"""Designs: what each promises of its configurations, the same first ones whatever the total, and measuring
in rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.pipelines import trace
from aquabit.scheme import FP, AquabitError, Protocol, Scheme, act_text
from aquabit.sensitivity import designs as design
from aquabit.sensitivity.damages import Damages, gibbs
from aquabit.sensitivity.designs import (
    BLOCK,
    DEFAULT,
    DESIGNS,
    PER_CONTEXT,
    START,
    Design,
    batches,
    near,
    next_batch,
    telling,
)
from aquabit.sensitivity.shared_contexts import group_numbers
from aquabit.sensitivity.surrogate.estimators import Surrogate
from aquabit.sensitivity.surrogate.fit import fold_numbers, grouped_folds
from aquabit.space import BITS_RANGE, SearchSpace, make_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.conftest import tiny_pipeline
from tests.worlds import World

COUNT = 96


@pytest.fixture(scope="module")
def world() -> World:
    return World(60)


@pytest.fixture(scope="module")
def probed() -> World:
    return World(60, probed=True)


@pytest.fixture(scope="module")
def unet() -> SearchSpace:
    """With additive formats of shared codebooks, a pinned and an excluded layer, and groups of steps."""
    steps = {"total": 4, "starts": [0, 2]}
    graph = trace(tiny_pipeline("unet"))
    return make_space(
        graph, "f" * 16, pinned={"conv_in": "usq8"}, excluded=["time_embedding.*"], step_groups=steps
    )


@pytest.fixture(scope="module")
def known(unet: SearchSpace) -> tuple[Damages, CostModel]:
    """Made-up damages of the U-Net, and its costs."""
    rng = np.random.default_rng(0)
    alone = {
        (k, str(s)): 4.0 ** -unet.code_bits(k, s) for k, row in unet.choices.items() for s in row if s != FP
    }
    alone |= {(k, act_text(a)): 0.01 for k in unet.choices for a in unet.act_choices}
    probes = {k: {"damage": v * float(rng.lognormal())} for k, v in alone.items()}
    return Damages.of(unet, probes), CostModel(trace(tiny_pipeline("unet")), unet)


def bits(space: SearchSpace, configs: list) -> np.ndarray:
    """Nominal levels [configurations, layers]."""
    return np.array(
        [[round(2 * space.code_bits(k, c[k].weight)) / 2 for k in space.choices] for c in configs]
    )


@pytest.mark.parametrize(
    "name", ["near", DEFAULT, "random", "balanced", "swaps", "swaps:0.5", "balanced:0.25"]
)
def test_the_first_ones_are_the_same_whatever_the_total(
    unet: SearchSpace, known: tuple[Damages, CostModel], name: str
) -> None:
    whole = Design.parse(name).draw(unet, 60, 3, *known)
    assert [c.digest for c in Design.parse(name).draw(unet, 37, 3, *known)] == [c.digest for c in whole[:37]]
    assert Design.parse(name).draw(unet, 1, 4, *known)[0] != whole[0] and len({c.digest for c in whole}) == 60
    for config in whole:
        unet.check(config)
        assert str(config["conv_in"].weight) == "usq8" and config["time_embedding.linear_1"].weight == FP


def test_balanced_layers_see_each_scheme_equally_often(world: World) -> None:
    counted = {}
    for name in ("random", "balanced"):
        drawn = Design(name).draw(world.space, COUNT, 0)
        weights = Choices.of(world.space, drawn).weights
        counted[name] = np.stack([(weights == j).sum(0) for j in range(1, len(world.space.schemes))])
        levels = bits(world.space, drawn)
        off = levels - levels.mean(1, keepdims=True)
        counted[name, "correlation"] = np.square(np.corrcoef(off.T)[np.triu_indices(60, 1)]).mean()
    assert counted["balanced"].std(1).mean() < 0.6 * counted["random"].std(1).mean()
    assert np.ptp(counted["balanced"], 1).max() <= 12
    assert counted["balanced", "correlation"] < 0.85 * counted["random", "correlation"]


def test_balanced_budgets_are_evenly_spread(world: World) -> None:
    means = np.sort(bits(world.space, Design("balanced").draw(world.space, COUNT, 1)).mean(1))
    low, high = BITS_RANGE
    even = low + (np.arange(COUNT) + 0.5) / COUNT * (high - low)
    assert np.abs(means - even).max() < 0.3 and np.abs(means - even).mean() < 0.1
    acts = Choices.of(world.space, Design("balanced").draw(world.space, COUNT, 1)).acts
    assert ((acts == 6).sum(1) == 0).mean() == pytest.approx(0.5, abs=0.06) and (acts == 6).mean(
        1
    ).max() > 0.9


def test_near_draws_good_configurations_over_all_budgets(probed: World) -> None:
    """Little more than the least damage at their size, while random ones have several times as much; mean
    bits uniform over the range."""
    damages, cost = probed.damages, probed.cost
    table = np.where(np.isfinite(damages.weights), damages.weights, 0)
    excess = {}
    for name in ("near", "random"):
        rows = Choices.of(probed.space, Design(name).draw(probed.space, COUNT, 0, damages, cost))
        real = cost.totals(rows)["bits"]
        sharp = [float((gibbs(damages, cost, b, [0.0])[0].odds * table).sum()) for b in real[:30]]
        excess[name] = damages.weights[np.arange(60), rows.weights].sum(1)[:30] / sharp - 1
        low, high = BITS_RANGE
        if name == "near":
            assert (
                np.abs(np.sort(real) - (low + (np.arange(COUNT) + 0.5) / COUNT * (high - low))).max() < 0.35
            )
    assert excess["near"].min() > -0.01 and np.quantile(excess["near"], 0.9) < 1.2 < 1.5 * np.median(
        excess["random"]
    )
    assert np.median(excess["near"]) < np.median(excess["random"]) / 2 and excess["near"].std() > 0.1, (
        "near the front, yet varied"
    )


def test_near_lowers_activations_where_that_harms_least(probed: World) -> None:
    acts = Choices.of(probed.space, near(probed.damages, probed.cost, 200, 0)).acts
    low, harm = acts == 6, probed.damages.acts[:, probed.space.act_choices.index(6)]
    some = low.any(1)
    assert some.mean() == pytest.approx(0.5, abs=0.1) and set(np.unique(acts)) == {6, 8}
    share = low[some].mean(1)
    assert share.mean() == pytest.approx(0.5, abs=0.1) and share.min() < 0.15 and share.max() > 0.85
    assert np.corrcoef(low[some].mean(0), harm)[0, 1] < -0.5, "the planted layers keep theirs"


def test_near_depends_on_seed_and_place_alone(probed: World, unet: SearchSpace) -> None:
    whole = [c.digest for c in near(probed.damages, probed.cost, 12, 5)]
    assert whole[:7] == [c.digest for c in near(probed.damages, probed.cost, 7, 5)] and len(set(whole)) == 12
    assert not set(whole) & {c.digest for c in near(probed.damages, probed.cost, 12, 6)}
    own = [c.digest for c in Design("near", 0.75).draw(probed.space, 16, 5, probed.damages, probed.cost)]
    random = [c.digest for c in probed.space.sample(4, 5)]
    assert [d for d in own if d not in random] == whole and own[::4] == random
    for lacking in ((None, None), (probed.damages, None)):
        with pytest.raises(AquabitError, match="design near draws by what schemes do alone"):
            Design("near").draw(probed.space, 3, 0, *lacking)


def test_near_is_served_by_a_space_outside_the_range_and_one_without_choices(probed: World) -> None:
    layers = probed.space.layers
    for choices in (
        {k: (Scheme.parse("usq8"),) for k in layers},
        {k: (Scheme.parse(s) for s in ("usq8", "vq4")) for k in layers},
    ):
        space = replace(probed.space, choices={k: tuple(row) for k, row in choices.items()})
        drawn = near(Damages.of(space, probed.probes), CostModel(probed.graph, space), 5, 0)
        assert len(drawn) == 5
        for config in drawn:
            space.check(config)


def test_swaps_start_from_good_configurations_where_damages_are_known(probed: World) -> None:
    size = 1 + PER_CONTEXT
    given = (probed.space, 8 * size, 0)
    rows = Choices.of(probed.space, Design("swaps").draw(*given, probed.damages, probed.cost))
    plain = Choices.of(probed.space, Design("swaps").draw(*given))
    assert (rows.acts == 8).all() and np.abs(probed.cost.totals(rows[::size])["bits"] - 3).max() < 0.6
    assert np.median(probed.damages.total(rows[::size])) < np.median(probed.damages.total(plain[::size]))
    assert ((rows.weights[1:size] != rows.weights[0]).sum(1) == 1).all()


def test_swaps_differ_from_their_context_in_one_layer(world: World) -> None:
    size = 1 + PER_CONTEXT
    rows = Choices.of(world.space, Design("swaps").draw(world.space, 2 * size, 0))
    ends = {world.space.schemes.index(Scheme.parse(s)) for s in ("usq4", "usq2")}
    seen: Counter[int] = Counter()
    for start in range(0, len(rows), size):
        changed = rows.weights[start + 1 : start + size] != rows.weights[start]
        assert (changed.sum(1) == 1).all() and (rows.acts[start : start + size] == rows.acts[start]).all()
        for row, layer in enumerate(changed.argmax(1), start + 1):
            assert {rows.weights[start, layer], rows.weights[row, layer]} == ends
            seen[int(layer)] += 1
    assert max(seen.values()) == 1 and len(seen) == 48, "every layer has a turn before one has two"


def test_groups_are_contexts_with_their_swaps(world: World) -> None:
    size = 1 + PER_CONTEXT
    drawn = Choices.of(world.space, Design("swaps").draw(world.space, 2 * size + 5, 0))
    assert group_numbers(drawn).tolist() == [0] * size + [1] * size + [2] * 5
    assert group_numbers(drawn[1:5]).tolist() == [0] * 4, "also where the context itself failed"
    apart = Choices.of(world.space, world.space.sample(10))
    one = replace(world.space, choices=dict(list(world.space.choices.items())[:1]))
    assert group_numbers(apart).tolist() == list(range(10))
    assert group_numbers(Choices.at(one, np.array([[1], [2], [1]]), 8)).tolist() == [0, 1, 0], (
        "one layer: only the same is the same"
    )


def test_telling_spreads_over_what_is_uncertain() -> None:
    """Two correlated groups: the second choice is of the other one, though its variance is smaller."""
    covariance = np.block(
        [[np.full((3, 3), 9.0), np.zeros((3, 3))], [np.zeros((3, 3)), np.full((3, 3), 4.0)]]
    ) + 0.1 * np.eye(6)
    first, second, third = telling(covariance, 3)
    assert first < 3 <= second and len({first, second, third}) == 3


def test_a_batch_is_where_refits_disagree(world: World) -> None:
    configs = world.choices.configs()
    options = (world.encoder, configs, world.y, Surrogate(seed=0))
    batch = next_batch(*options, 10, 0)
    assert len(batch) == 10 and not {c.digest for c in batch} & {c.digest for c in configs}
    assert [c.digest for c in batch] == [c.digest for c in next_batch(*options, 10, 0)]
    failed = np.where(np.arange(60) < 45, np.nan, world.y)
    assert len(next_batch(world.encoder, configs, failed, Surrogate(seed=0), 7, 0)) == 7, (
        "too few labels: random ones"
    )
    y = world.y.copy()
    y[5] = np.nan  # one that failed is left out
    assert len(next_batch(world.encoder, configs, y, Surrogate(seed=0), 3, 0)) == 3


def test_batches_do_not_depend_on_the_total() -> None:
    assert list(batches(START)) == [] and list(batches(START + 1)) == [(40, 60)]
    assert list(batches(100)) == [(40, 60), (60, 90), (90, 135)]


def test_designs_are_named() -> None:
    assert {Design.parse(n).name for n in DESIGNS} == set(DESIGNS) and Design.parse("swaps:0.5") == Design(
        "swaps", 0.5
    )
    assert Design.parse(DEFAULT) == Design("near", 0.75)
    for wrong in ("sobol", "swaps:", "swaps:0", "swaps:1.5", "swaps:x", "disagreement:0.5", ""):
        with pytest.raises(AquabitError, match="design"):
            Design.parse(wrong)


def test_half_of_a_mixture_is_random(unet: SearchSpace) -> None:
    mixed = [c.digest for c in Design.parse("balanced:0.5").draw(unet, BLOCK, 0)]
    assert mixed[::2] == [c.digest for c in unet.sample(BLOCK // 2)]
    assert mixed[1::2] == [c.digest for c in Design("balanced").draw(unet, BLOCK // 2, 0)]


def test_disagreement_is_measured_in_rounds_and_continues(tmp_path, monkeypatch) -> None:
    """Interrupted in the middle of a batch, or asked for more later, a study holds the same
    configurations."""
    monkeypatch.setattr(design, "START", 20)
    monkeypatch.setattr(design, "POOL", 20)
    monkeypatch.setattr(design, "JUDGES", 3)
    pipe, protocol = (
        tiny_pipeline("dit"),
        replace(Protocol(), images=2, steps=1, micro_batch=2, objective="mse"),
    )
    given = {
        "protocol": protocol,
        "space": {"schemes": ["usq2", "usq4", "usq8"]},
        "bank": str(tmp_path / "bank"),
        "design": "disagreement",
    }
    measure(pipe, Study(tmp_path / "whole.db"), 34, **given)
    for total in (22, 34):
        measure(pipe, Study(tmp_path / "parts.db"), total, **given)
    whole, parts = (
        Study(tmp_path / f"{n}.db").measurements(kind="sample").config.tolist() for n in ("whole", "parts")
    )
    assert whole == parts and len(set(whole)) == 34
    space = SearchSpace.from_dict(Study(tmp_path / "whole.db").get("space"))
    random = [c.digest for c in space.sample(34)]
    assert whole[:20] == random[:20] and not set(whole[20:]) & set(random)
    with pytest.raises(AquabitError, match="shard 1/2 cannot be made alone"):
        measure(pipe, Study(tmp_path / "s.db"), 34, **given, shard="1/2")


def test_ends_of_a_swap_are_held_out_together(world: World) -> None:
    rows = Choices.of(world.space, Design("swaps").draw(world.space, 120, 0))
    groups, fold = group_numbers(rows), grouped_folds(rows)
    assert len(set(groups.tolist())) == 5 and all(len(set(fold[groups == g].tolist())) == 1 for g in groups)
    assert sorted(set(fold.tolist())) == [0, 1, 2, 3, 4]
    rows = Choices.of(world.space, world.space.sample(40))
    assert (grouped_folds(rows) == fold_numbers(40)).all(), "independent draws are held out one by one"
    assert sorted(Counter(grouped_folds(rows[np.zeros(10, int)]).tolist()).values()) == [2] * 5

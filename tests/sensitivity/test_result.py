"""Effects, intervals, SHAP by layer, Sensitivity as JSON, and the comparison with real swaps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import FP, AquabitError, Protocol, QuantConfig, Scheme, parse_swap
from aquabit.sensitivity.damages import Damages, damages_of, good_contexts
from aquabit.sensitivity.effects import validation
from aquabit.sensitivity.effects.predicted import (
    SWAP,
    default_swap,
    draw_contexts,
    find_players,
    named_swap,
    shap_by_layer,
)
from aquabit.sensitivity.effects.swaps import predict_swaps, top_layers, validation_scores
from aquabit.sensitivity.effects.validation import (
    Contexts,
    chosen_layers,
    plan_swaps,
    rank_layers,
    validate_in,
)
from aquabit.sensitivity.explaining import explain
from aquabit.sensitivity.interactions import STRONGEST
from aquabit.sensitivity.result import Sensitivity, save
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, fit_from_study
from aquabit.sensitivity.surrogate.scores import srcc
from aquabit.space import SearchSpace
from aquabit.stats import around_replicates
from aquabit.study import Study
from tests.worlds import PLANTED, World, near_study

FLIPPED = 30  # layers with real swaps


def true_effects(world: World, contexts: Choices, before: str = "usq4", after: str = "usq2") -> np.ndarray:
    """What the made-up model's truth says of every layer's swap in the given contexts."""
    column = {str(s): j for j, s in enumerate(world.space.schemes)}
    out = []
    for i in range(len(world.space.layers)):
        ends = []
        for scheme in (before, after):
            ends.append(world.truth(contexts.under([[(i, column[scheme])]])))
        out.append((ends[1] - ends[0]).mean())
    return np.array(out)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def study(world: World, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = world.study(tmp_path_factory.mktemp("study") / "s.db")
    fresh = Protocol().block(1)
    with study.writing():
        study.add_protocol(fresh)
        drawn = world.draw(40 * FLIPPED, np.random.default_rng(77))
        rows = Choices.at(world.space, drawn.weights, 8)
        near = np.flatnonzero(np.abs(world.cost.totals(rows)["bits"] - 3) < 0.25)[:FLIPPED]
        for i, context in enumerate(rows[near].configs()):
            layer = world.space.layers[2 * i]
            ends = [context.with_layer(layer, s) for s in ("usq4", "usq2")]
            for end in ends:
                value = float(world.truth(Choices.of(world.space, [end]))[0])
                world.record(study, end, {"fid": value, "is": 100 / value}, "flip", fresh)
            study.add_swap(layer, "usq4", "usq2", ends[0].digest, ends[1].digest, fresh)
    return study


@pytest.fixture(scope="module")
def fitted(study: Study) -> FittedSurrogate:
    return fit_from_study(study)


@pytest.fixture(scope="module")
def found(study: Study, fitted: FittedSurrogate) -> Sensitivity:
    return explain(study, fitted=fitted)


def test_planted_layers_are_recovered(world: World, fitted: FittedSurrogate, found: Sensitivity) -> None:
    names = world.space.layers
    assert set(found.layers.name[:3]) == {names[i] for i in PLANTED}
    truth = pd.Series(
        true_effects(world, draw_contexts(fitted.space, fitted.cost, 3.0, 200, np.random.default_rng(5))),
        names,
    )
    assert srcc(found.layers.effect.to_numpy(), truth[found.layers.name].to_numpy()) > 0.5
    assert found.layers.predicted[0] == pytest.approx(truth[found.layers.name[0]], rel=0.5)


def test_intervals_hold_most_true_effects(world: World, fitted: FittedSurrogate, found: Sensitivity) -> None:
    table = found.layers
    assert (table.low <= table.effect).all() and (table.effect <= table.high).all()
    contexts = draw_contexts(fitted.space, fitted.cost, 3.0, 200, np.random.default_rng(5))
    truth = pd.Series(true_effects(world, contexts), world.space.layers)[table.name].to_numpy()
    assert ((table.low <= truth) & (truth <= table.high)).mean() >= 0.75
    assert (table.low[:3] > 0).all()  # and are not so wide that they say nothing


def test_scheme_effects_belong_to_the_swap(found: Sensitivity) -> None:
    for row in found.layers.to_dict("records"):
        assert row["swap"] == "usq4:usq2" and "usq4" not in row["schemes"] and len(row["schemes"]) == 9
        assert row["schemes"]["usq2"] == pytest.approx(row["predicted"])
    mean = pd.DataFrame(list(found.layers.schemes)).mean()
    assert mean["usq2"] > mean["usq3"] > mean["usq8"] and mean["vq2"] < mean["usq2"]


def test_roll_ups_are_means_and_totals(found: Sensitivity) -> None:
    for table, key, size in ((found.operators, "operator", 10), (found.blocks, "block", 6)):
        assert (table.layers == size).all() and table.total.sum() == pytest.approx(found.layers.effect.sum())
        means = found.layers.groupby(key).effect.mean()
        assert np.allclose(table.effect, means[table.name]) and np.allclose(
            table.effect * table.layers, table.total
        )
        assert (table.low <= table.effect).all() and (table.effect <= table.high).all()


def test_reencoding_reaches_the_aggregates(world: World, fitted: FittedSurrogate, found: Sensitivity) -> None:
    """One effect, computed by encoding two configurations at a time."""
    rows = draw_contexts(fitted.space, fitted.cost, 3.0, 64, np.random.default_rng([0, 0]))
    layer = world.space.layers[PLANTED[0]]
    changes = []
    for config in rows.configs():
        before, after = fitted.predict([config.with_layer(layer, "usq4"), config.with_layer(layer, "usq2")])
        changes.append(after - before)
    assert found.layers.set_index("name").predicted[layer] == pytest.approx(np.mean(changes), rel=1e-4)


def test_contexts_lie_at_the_budget(fitted: FittedSurrogate) -> None:
    for bits in (2.3, 3.0, 4.0, 6.0):
        rows = draw_contexts(fitted.space, fitted.cost, bits, 40, np.random.default_rng(0))
        real = fitted.cost.totals(rows)["bits"]
        assert np.abs(real - bits).max() <= 0.25 and abs(real.mean() - bits) < 0.15 and (rows.acts == 8).all()
        assert fitted.space.allowed()[np.arange(60), rows.weights].all()
    with pytest.raises(AquabitError, match="out of reach"):
        draw_contexts(fitted.space, fitted.cost, 1.2, 10, np.random.default_rng(0))


def test_layers_without_a_choice_are_no_players(world: World) -> None:
    own = [Scheme.parse(s) for s in ("vq2c", "vq3", "usq8", "usq3")]
    layers = world.space.layers
    choices = {
        **world.space.choices,
        layers[0]: (FP,),
        layers[1]: (own[3],),
        layers[2]: tuple(own),
        layers[3]: (own[1], own[3]),
    }
    space: SearchSpace = replace(world.space, choices=choices)
    players = {p.layer: p for p in find_players(space, parse_swap("usq4:usq2"))}
    assert layers[0] not in players and layers[1] not in players and layers[3] not in players
    assert (str(players[layers[2]].before), str(players[layers[2]].after)) == ("usq3", "vq2c")
    with pytest.raises(AquabitError, match="no layer has both ends"):
        find_players(replace(space, choices={layers[0]: (FP,)}), parse_swap("usq4:usq2"))


def test_pinned_and_excluded_layers_stay(world: World, tmp_path) -> None:
    layers = world.space.layers
    pinned = World(40)
    pinned.space = replace(
        pinned.space, choices={**pinned.space.choices, layers[0]: (FP,), layers[1]: (Scheme.parse("usq8"),)}
    )
    pinned.choices = replace(pinned.choices, space=pinned.space)
    pinned.choices.weights[:, 0], pinned.choices.acts[:, 0] = 0, 16
    pinned.choices.weights[:, 1] = pinned.space.schemes.index(Scheme.parse("usq8"))
    result = explain(pinned.study(tmp_path / "s.db"), replicates=2, contexts=8)
    assert (
        result.ranking == "predicted"
        and not result.layers.n.any()
        and (result.layers.effect == result.layers.predicted).all()
    )
    assert set(result.layers.name) == set(layers[2:]) and np.isfinite(result.layers.effect).all()


def test_shap_by_layer_adds_up_and_finds_the_planted(world: World, fitted: FittedSurrogate) -> None:
    values, base = shap_by_layer(fitted)
    assert values.shape == (300, 60)
    assert np.abs(values.sum(1) + base - fitted.badness(fitted.choices)).max() < 1e-4
    assert set(np.argsort(-np.abs(values).mean(0))[:3]) == set(PLANTED)


def test_interval_of_replicates() -> None:
    """Wider for replicates that vary more or lie aside, and for few of them; none below two."""
    effect = np.array([0.0, 0.0, 8.0])
    replicates = effect + np.random.default_rng(0).normal(size=(2000, 3)) * [1, 3, 1]
    low, high = around_replicates(effect, replicates)
    half = high - effect
    assert (
        np.allclose(half, effect - low)
        and half[1] == pytest.approx(3 * half[0], rel=0.1)
        and half[2] == pytest.approx(half[0], rel=0.1)
    )
    assert half[0] == pytest.approx(1.96, rel=0.05) and np.allclose(
        around_replicates(effect, replicates, 2.0)[1] - effect, 2 * half
    )
    assert (around_replicates(effect, replicates + 5)[1] - effect > 2 * half).any()
    few = around_replicates(effect, replicates[:5])[1] - effect
    assert np.allclose(few, stats.t.ppf(0.975, 5) * np.sqrt(np.square(replicates[:5] - effect).mean(0)))
    assert np.isnan(around_replicates(effect, replicates[:1])[0]).all()


def test_interactions_are_second_differences(
    world: World, fitted: FittedSurrogate, found: Sensitivity
) -> None:
    """One pair, computed by encoding four configurations at a time; all pairs of the strongest layers are
    there, largest first."""
    table = found.interactions
    assert len(table) == STRONGEST * (STRONGEST - 1) // 2 and (table.interaction.abs().diff()[1:] <= 0).all()
    strongest = set(found.layers.name[:STRONGEST])
    assert set(table.a) | set(table.b) == strongest and (table.low <= table.interaction).all()
    row, rows = (
        table.iloc[0],
        draw_contexts(fitted.space, fitted.cost, 3.0, 64, np.random.default_rng([0, 0])),
    )
    total = []
    for config in rows[:32].configs():
        ends = [
            config.with_layer(row.a, i).with_layer(row.b, j)
            for i in ("usq4", "usq2")
            for j in ("usq4", "usq2")
        ]
        neither, b, a, both = fitted.predict(ends)
        total.append(both - a - b + neither)
    assert row.interaction == pytest.approx(np.mean(total), rel=1e-3)


def test_scores_of_schemes_are_standardised_changes(fitted: FittedSurrogate, found: Sensitivity) -> None:
    """Of whole operator types and blocks: one computed by hand, the better scheme has the higher score,
    one scale for all groups."""
    table, space = found.scores, fitted.space
    assert set(table.level) == {"operator", "block"} and len(table) == (6 + 10) * 10
    for _, level in table.groupby("level"):
        assert level.score.mean() == pytest.approx(0, abs=1e-9) and level.score.std(ddof=0) == pytest.approx(
            1
        )
        assert np.corrcoef(level.score, level.change)[0, 1] == pytest.approx(-1)
    mean = table.groupby("scheme").score.mean()
    assert mean["usq8"] > mean["usq4"] > mean["usq3"] > mean["usq2"]
    rows = draw_contexts(space, fitted.cost, 3.0, 64, np.random.default_rng([0, 0]))[:32]
    column = space.schemes.index(Scheme.parse("usq2"))
    changed = rows.under([[(i, column) for i, k in enumerate(space.layers) if k.endswith("ff.up")]])
    by_hand = (fitted.badness(changed) - fitted.badness(rows)).mean()
    row = table[(table.level == "operator") & (table.name == "ff.up") & (table.scheme == "usq2")].iloc[0]
    assert (
        row.change == pytest.approx(by_hand, rel=1e-3)
        and row.layers == 10
        and row.low <= row.score <= row.high
    )


def test_the_ranking_combines_and_validation_does_not(
    study: Study, fitted: FittedSurrogate, found: Sensitivity, tmp_path
) -> None:
    table = found.layers
    assert found.ranking == "combined" and table.n.sum() == FLIPPED and table.real.notna().sum() == FLIPPED
    seen = table[table.n > 0]
    size = seen.real.abs().median()
    off = [
        np.abs(np.arcsinh(v / size) - np.arcsinh(seen.real / size)).mean()
        for v in (seen.effect, seen.predicted)
    ]
    assert off[0] < 0.9 * off[1] and (seen.effect != seen.predicted).all()
    unseen = table[table.n == 0]
    assert srcc(unseen.effect.to_numpy(), unseen.predicted.to_numpy()) > 0.9, (
        "swaps say how large effects are, not which come first"
    )
    rows = pd.DataFrame(found.validation["rows"]).set_index("layer")
    assert np.allclose(rows.predicted[seen.name], seen.predicted) and np.allclose(
        rows.real[seen.name], seen.real
    )


def test_same_seed_same_numbers_and_progress(study: Study, fitted: FittedSurrogate) -> None:
    seen: list[str] = []
    options = {"replicates": 2, "contexts": 16, "seed": 3, "fitted": fitted}
    first, second = (
        explain(study, **options, progress=lambda what, *_: seen.append(what)).to_dict() for _ in "ab"
    )
    assert first == second and {"refit for intervals", "predict swaps"} <= set(seen)


def test_json_round_trip_and_form(study: Study, found: Sensitivity, tmp_path) -> None:
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Sensitivity.from_dict(value).to_dict() == value
    assert {"objective", "direction", "protocol", "measurements", "surrogate", "layers", "validation"} <= set(
        value
    )
    assert {"name", "operator", "block", "effect", "low", "high", "schemes"} <= set(value["layers"][0])
    keys = {"within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "noise_ceiling", "baselines"}
    keys |= {"within_budget_interval", "within_budget_level", "useful", "estimator", "needed", "cautions"}
    keys |= {"among_good"}
    assert keys == set(value["surrogate"]) and value["surrogate"]["noise_ceiling"] is None
    assert value["measurements"] == len(value["scatter"]) == 300 and value["direction"] == "min"
    save(study, found)
    assert study.get("sensitivity") == value
    later = ("ranking", "interactions", "scores", "curve", "swarm", "level")
    older = Sensitivity.from_dict({k: v for k, v in value.items() if k not in later})
    assert older.ranking == "predicted" and older.interactions.empty and older.level == 0.95
    assert found.level == found.within_budget.level == 0.95 and found.within_budget.known
    scores = {k: v for k, v in value["surrogate"].items() if k not in ("among_good", "within_budget_level")}
    oldest = {k: v for k, v in value.items() if k not in later} | {"surrogate": scores}
    levels = [f(Sensitivity.from_dict(oldest)) for f in (lambda s: s.level, lambda s: s.within_budget.level)]
    assert levels == [0.9, 0.9] and Sensitivity.from_dict({**oldest, "validation": {}}).swap_level == 0.9
    assert "within-budget SRCC" in found._repr_html_() and "usq4:usq2" in found._repr_html_()
    without = explain(World(40).study(tmp_path / "s.db"), replicates=0, contexts=4).to_dict()
    assert without["layers"][0]["low"] is None and np.isnan(Sensitivity.from_dict(without).layers.low[0])
    with pytest.raises(AquabitError, match="no sensitivity"):
        Sensitivity.from_dict({"objective": "fid"})


def test_higher_is_better_gives_positive_effects(study: Study, found: Sensitivity) -> None:
    inception = explain(study, objective="is", replicates=2, contexts=16)
    assert inception.direction == "max"
    assert (
        srcc(
            inception.layers.sort_values("name").effect.to_numpy(),
            found.layers.sort_values("name").effect.to_numpy(),
        )
        > 0.9
    )
    assert (inception.layers.effect[:3] > 0).all() and inception.validation["sign_agreement"] > 0.7


def test_real_swaps_stand_beside_the_predicted(found: Sensitivity) -> None:
    truth = found.validation
    assert truth["flips"] == len(truth["rows"]) == FLIPPED and truth["contexts_per_layer"] == 1
    assert truth["srcc"] > 0.4 and truth["sign_agreement"] > 0.8 and truth["srcc_flips"] > 0.3
    row = truth["rows"][0]
    assert row["low"] is None and row["n"] == 1 and row["real"] > 0


def test_validation_scores_by_hand() -> None:
    schemes = [{"usq2": 3.0, "usq3": 1.0}, {"usq2": 1.0, "usq3": 0.5}, {"usq2": -1.0, "usq3": 0.0}]
    layers = pd.DataFrame(
        {"name": list("abc"), "swap": "usq4:usq2", "effect": [3.0, 1.0, -1.0], "schemes": schemes}
    )
    flips = pd.DataFrame(
        {
            "layer": list("aabcx"),
            "before": "usq4",
            "after": "usq2",
            "value_before": 10.0,
            "value_after": [14.0, 16.0, 11.0, 12.0, 11.0],
        }
    )
    result = validation_scores(layers, flips)
    assert (
        result["flips"] == 4
        and result["sign_agreement"] == pytest.approx(2 / 3)
        and result["srcc"] == pytest.approx(0.5)
    )
    first = result["rows"][0]
    assert (first["predicted"], first["real"], first["n"]) == (3.0, 5.0, 2)
    half = 12.706205 * np.std([4.0, 6.0], ddof=1) / 2**0.5  # t(1) at 95 %, tables
    assert (first["low"], first["high"]) == (pytest.approx(5 - half), pytest.approx(5 + half))
    assert result["level"] == 0.95 and result["rows"][1]["low"] is None
    assert validation_scores(layers, flips, "max")["rows"][0]["real"] == -5
    other = validation_scores(layers, flips.assign(before="usq3"))
    assert other["rows"][0]["predicted"] == 2.0 and other["rows"][0]["swap"] == "usq3:usq2"
    assert validation_scores(layers, flips[:0])["srcc"] is None


def test_the_score_is_of_the_random_half_alone() -> None:
    layers = pd.DataFrame(
        {
            "name": list("abcdefg"),
            "swap": "usq4:usq2",
            "effect": 0.0,
            "schemes": [{"usq2": float(v)} for v in (9, 8, 7, 4, 3, 2, -1)],
        }
    )
    after = [
        19.0,
        18.0,
        7.0,
        11.0,
        13.0,
        12.0,
        12.0,
    ]  # the first three are told right, but for one sign; of the others one is too high
    flips = pd.DataFrame(
        {
            "layer": list("abcdefg"),
            "before": "usq4",
            "after": "usq2",
            "value_before": 10.0,
            "value_after": after,
        }
    )
    result = validation_scores(
        layers, flips, "min", {("a", "usq4:usq2"), ("b", "usq4:usq2"), ("c", "usq4:usq2"), ("d", "usq4:vq2")}
    )
    assert [r["checks"] for r in result["rows"]] == ["top"] * 3 + ["random"] * 4
    random = srcc(np.array([4.0, 3, 2, -1]), np.array([1.0, 3, 2, 2]))
    assert (
        result["srcc"] == result["random"]["srcc"] == pytest.approx(random)
        and result["sign_agreement"] == 0.75
    )
    assert result["top"] == {"srcc": 1.0, "sign_agreement": pytest.approx(2 / 3), "layers": 3, "flips": 3}
    assert result["flips"] == 7 and result["random"]["flips"] == 4
    plain = validation_scores(layers, flips)
    assert (
        plain["srcc"] == srcc(layers.schemes.str["usq2"].to_numpy(), np.array(after))
        and plain["top"]["srcc"] is None
    ), "older studies"


def space_of(world: World, *schemes: str, **layers: str) -> SearchSpace:
    """The made-up space with other schemes; ``layers`` gives those of a share of the layers, as a3="usq4
    usq2" of every third."""
    row = {k: tuple(map(Scheme.parse, schemes)) for k in world.space.layers}
    for share, own in layers.items():
        row |= {k: tuple(map(Scheme.parse, own.split())) for k in world.space.layers[:: int(share[1:])]}
    return replace(world.space, choices=row)


def test_the_default_swap_follows_the_space(world: World) -> None:
    assert (
        SWAP
        == "usq4h:usq2h"
        == default_swap(space_of(world, "usq2", "usq4", "usq8", "usq2h", "usq4h", "vq2"))
    )
    assert default_swap(space_of(world, "usq2", "usq4", a2="usq2h usq4h usq3")) == SWAP, (
        "half of the layers is enough"
    )
    assert default_swap(space_of(world, "usq3", "usq5", a3="usq2h usq4h")) == "usq5:usq3", "a third is not"
    assert default_swap(world.space) == "usq4:usq2"
    assert default_swap(space_of(world, "usq8", "usq3", "usq3h", "usq2h", "usq5h")) == "usq3h:usq2h", (
        "nearest to 4 and 2 bits"
    )
    assert default_swap(space_of(world, "vq2", "usq2", "vq4", "usq8")) == "vq4:vq2", "of a kind where it can"
    assert default_swap(space_of(world, "usq8", "usq6", a3="usq4 usq2")) == "usq8:usq6", (
        "what most layers may take comes first"
    )
    for schemes in (("usq4", "vq4", "usq4h"), ("usq3",)):
        with pytest.raises(AquabitError, match="no layer may take two schemes that differ by 1 bit or more"):
            default_swap(space_of(world, *schemes))
    assert named_swap(world.space) == "usq4:usq2" and named_swap(world.space, "usq8:vq3c") == "usq8:vq3c"
    with pytest.raises(AquabitError, match="no layer has both ends of the swap usq4:usq2"):
        named_swap(space_of(world, "usq3"), "usq4:usq2")


@pytest.fixture(scope="module")
def probed() -> World:
    return World(60, probed=True)


def test_half_of_the_layers_are_the_first_ones_and_half_are_random() -> None:
    ranked = [f"l{i}" for i in range(40)]
    turns = chosen_layers(ranked, 20, 0)
    top, random = ([k for k, half in turns if half == which] for which in ("top", "random"))
    assert top == ranked[:10] and len(set(random)) == 10 and not set(random) & set(top)
    assert turns[0] == ("l0", "top") and [half for _, half in turns] == ["top", "random"] * 10
    assert chosen_layers(ranked, 1, 0) == [("l0", "top")] and len(chosen_layers(ranked, 99, 0)) == 40
    backwards = chosen_layers(ranked[:10] + ranked[:9:-1], 20, 0)
    assert {k for k, half in backwards if half == "random"} == set(random), (
        "the ranking of the rest does not choose among them"
    )
    assert {k for k, half in chosen_layers(ranked, 20, 1) if half == "random"} != set(random)
    later = [
        np.mean([int(k[1:]) for k, h in chosen_layers(ranked, 20, s) if h == "random"]) for s in range(200)
    ]
    assert np.mean(later) == pytest.approx(24.5, abs=1), "all of the rest are as likely"


def test_planned_swaps_share_good_contexts(probed: World) -> None:
    space, cost = probed.space, probed.cost
    players = find_players(space, parse_swap("usq4:usq2"))
    ranked = [p.layer for p in players][::-1]
    contexts = Contexts(space, cost, probed.damages, 3.0, 0)
    flips = plan_swaps(players, ranked, contexts, 40, 0)
    assert (
        len(flips) == 40
        and flips[0].layer == flips[1].layer == ranked[0]
        and flips[0].context != flips[1].context
    )
    assert sum(f.checks == "top" for f in flips) == 20 and len({f.layer for f in flips}) == 20
    for flip in flips:
        before, after = flip.ends
        assert (str(before[flip.layer].weight), str(after[flip.layer].weight)) == ("usq4", "usq2")
        assert before.with_layer(flip.layer, "usq2") == after and all(
            v.act == 8 for v in before.layers.values()
        )
    measured = len({end.digest for f in flips for end in f.ends})
    own = [f.context[f.layer].weight in (f.before, f.after) for f in flips]
    bases = {f.context.digest for f, at_end in zip(flips, own, strict=True) if at_end}
    assert measured == 80 - sum(own) + len(bases) < 80, (
        "contexts that are at an end already are measured once"
    )
    for flip, at_end in zip(flips, own, strict=True):
        others = [c for c in contexts.block(0) if c[flip.layer].weight in (flip.before, flip.after)]
        assert at_end == (len(others) > 1) or len(others) == 1, "they are taken first"
    rows = Choices.of(space, [f.context for f in flips])
    good = good_contexts(probed.damages, cost, 3.0, 64, np.random.default_rng(9))
    assert np.median(probed.damages.total(rows)) < 1.3 * np.median(probed.damages.total(good))
    assert np.abs(cost.totals(rows)["bits"] - 3).max() <= 0.25
    assert [f.ends for f in plan_swaps(players, ranked, contexts, 11, 0)[:2]] == [f.ends for f in flips[:2]]
    rounds = plan_swaps(players[:3], [p.layer for p in players[:3]], contexts, 60, 0)
    assert len({(f.layer, f.context.digest) for f in rounds}) == 60, "few layers: more contexts, none twice"


def session_of(
    world: World, study: Study, space: SearchSpace | None = None
) -> tuple[SimpleNamespace, list[str]]:
    """What ``validate_in`` needs of a session: measurements are the made-up model's truth; the list has
    what was measured."""
    space, made = space or world.space, list[str]()
    costs = CostModel(world.graph, space)

    def measure(
        configs: Iterable[QuantConfig], kind: str, progress, protocols: list[Protocol], what: str = ""
    ) -> None:
        study.add_protocol(protocols[0])
        for config in {c.digest: c for c in configs}.values():
            if config.digest not in study.known(protocols[0]) and config.layers:
                fid = float(world.truth(Choices.of(world.space, [config]))[0])
                world.record(study, config, {"fid": fid, **world.distance(config)}, kind, protocols[0])
                made.append(config.digest)

    damages = Damages.of(space, world.probes)
    return (
        SimpleNamespace(
            study=study,
            space=space,
            costs=costs,
            protocol=Protocol(),
            damages=lambda: damages,
            measure=measure,
            measure_full=lambda protocols, seeds, progress: None,  # the truth is known without images
        ),
        made,
    )


def test_validate_checks_the_first_layers_and_says_which_were_random(tmp_path) -> None:
    near, study = near_study(tmp_path / "s.db", 120)
    session, made = session_of(near, study)
    validate_in(session, 20, None, 3.0, 0)
    assert 20 < len(made) <= 40
    plan = study.get("validation_plan")[0]
    assert plan["swap"] == "usq4:usq2" and len(plan["top"]) == len(plan["random"]) == 5
    result = explain(study, replicates=2, contexts=64)
    order = result.layers.sort_values("predicted", ascending=False, kind="stable").name.tolist()
    assert [layer for layer, _ in plan["top"]] == order[:5] == plan["ranked"][:5], (
        "as explain ranks them by prediction"
    )
    assert {near.space.layers[i] for i in PLANTED} <= set(order[:5])
    rows = pd.DataFrame(result.validation["rows"])
    assert set(rows.layer[rows.checks == "top"]) == set(order[:5]) == {k for k, _ in top_layers([plan])}
    assert set(rows.layer[rows.checks == "random"]) == {k for k, _ in plan["random"]} and (rows.n == 2).all()
    assert (
        result.validation["random"]["layers"] == 5
        and result.validation["srcc"] == result.validation["random"]["srcc"]
    )
    count = len(made)
    validate_in(session, 20, None, 3.0, 0)
    validate_in(session, 6, None, 3.0, 0)
    assert (
        len(study.get("validation_plan")) == 1
        and study.get("validation_plan")[0] == plan
        and len(made) <= count + 4
    )
    validate_in(session, 30, "usq8:vq2", 3.0, 0)
    assert len(study.get("validation_plan")) == 2 and len(set(study.swaps("fid").before)) == 2


def test_layers_are_ranked_by_damage_before_a_surrogate_can_be_fitted(probed: World, tmp_path) -> None:
    study = probed.study(tmp_path / "s.db", 5)
    session, _ = session_of(probed, study)
    players = find_players(probed.space, parse_swap("usq4:usq2"))
    ranked = rank_layers(session, players, 3.0, damages_of(session))
    change = {
        k: probed.probes[k, "usq2"]["damage"] - probed.probes[k, "usq4"]["damage"]
        for k in probed.space.layers
    }
    assert ranked == sorted(change, key=lambda k: -change[k]) and set(ranked[:3]) == {
        probed.space.layers[i] for i in PLANTED
    }


def test_what_cannot_work_is_said_before_anything_is_measured(probed: World, tmp_path, monkeypatch) -> None:
    session, made = session_of(probed, probed.study(tmp_path / "s.db", 5))
    for options, message in (
        ((20, "usq4:usq3h", 1.0), "out of reach"),
        ((0,), "at least 1"),
        ((20, "usq9h"), "scheme"),
    ):
        with pytest.raises(AquabitError, match=message):
            validate_in(session, *options)
    flat = space_of(probed, "usq4", "vq4")
    session, _ = session_of(probed, session.study, flat)
    monkeypatch.setattr(validation, "rank_layers", lambda *_, **__: pytest.fail("ranked"))
    with pytest.raises(AquabitError, match="differ by 1 bit"):
        validate_in(session, 20)
    assert not made


def test_effects_are_of_good_configurations_and_of_psnr_too(tmp_path) -> None:
    """Where damages are known; one effect computed by encoding two configurations at a time, on both
    scales."""
    near, study = near_study(tmp_path / "s.db", 120)
    found, fitted = explain(study, replicates=3, contexts=16), fit_from_study(study)
    table = found.layers.set_index("name")
    layer, drawn = (
        near.space.layers[PLANTED[0]],
        good_contexts(near.damages, near.cost, 3.0, 16, np.random.default_rng([0, 0])),
    )
    for model, column, sign in ((fitted, "predicted", 1), (fit_from_study(study, "psnr"), "psnr_effect", -1)):
        ends = [[c.with_layer(layer, s) for c in drawn.configs()] for s in ("usq4", "usq2")]
        change = model.predict(ends[1]).mean() - model.predict(ends[0]).mean()
        assert table[column][layer] == pytest.approx(sign * change, rel=1e-3)
    assert set(table.psnr_effect.nlargest(3).index) == {near.space.layers[i] for i in PLANTED}
    assert (table.psnr_low <= table.psnr_effect).all() and (table.psnr_effect <= table.psnr_high).all()
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Sensitivity.from_dict(value).to_dict() == value and value["layers"][0]["psnr_effect"] > 0
    for other in (
        explain(study, replicates=2, contexts=4, fidelity=False),
        explain(study, replicates=2, contexts=4, objective="psnr"),
    ):
        assert "psnr_effect" not in other.layers


def test_flips_are_predicted_in_their_own_context_and_never_trained_on(
    study: Study, fitted: FittedSurrogate
) -> None:
    flips, configs = study.swaps("fid"), study.configs()
    table = predict_swaps(fitted, flips, configs)
    row = table.iloc[4]
    before, after = fitted.predict([configs[row.config_before], configs[row.config_after]])
    assert row.predicted == pytest.approx(after - before) and row.real == pytest.approx(
        row.value_after - row.value_before
    )
    assert not set(fitted.configs) & {*flips.config_before, *flips.config_after}
    with pytest.raises(AquabitError, match="training configurations"):
        predict_swaps(replace(fitted, configs=(flips.config_before[0],)), flips, configs)

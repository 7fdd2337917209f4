"""Effects, intervals, SHAP by layer, Sensitivity as JSON, and the comparison with real swaps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from aquabit.scheme import FP, AquabitError, Protocol, Scheme, parse_swap
from aquabit.sensitivity.attribution import Sensitivity, explain, save
from aquabit.sensitivity.effects import draw_contexts, find_players, interval, shap_by_layer
from aquabit.sensitivity.flips import predict_flips, validation_scores
from aquabit.sensitivity.interactions import STRONGEST
from aquabit.sensitivity.scores import srcc
from aquabit.sensitivity.surrogate import FittedSurrogate, fit_from_study
from aquabit.space import SearchSpace
from aquabit.study import Study
from tests.test_surrogate import PLANTED, World

FLIPPED = 30  # layers with real swaps


def true_effects(world: World, contexts: tuple[np.ndarray, np.ndarray], before: str = "usq4", after: str = "usq2") -> np.ndarray:
    """What the made-up model's truth says of every layer's swap in the given contexts."""
    column = {str(s): j for j, s in enumerate(world.space.schemes)}
    out = []
    for i in range(len(world.space.layers)):
        ends = []
        for scheme in (before, after):
            weights = contexts[0].copy()
            weights[:, i] = column[scheme]
            ends.append(world.truth(weights, contexts[1]))
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
        weights, acts = world.draw(40 * FLIPPED, np.random.default_rng(77))
        acts = np.full_like(acts, 8)
        near = np.flatnonzero(np.abs(world.cost.totals(weights, acts)["bits"] - 3) < 0.25)[:FLIPPED]
        for i, context in enumerate(world.space.configs(weights[near], acts[near])):
            layer = world.space.layers[2 * i]
            ends = [context.with_layer(layer, s) for s in ("usq4", "usq2")]
            for end in ends:
                value = float(world.truth(*world.space.indices([end]))[0])
                world.record(study, end, {"fid": value, "is": 100 / value}, "flip", fresh)
            study.add_flip(layer, "usq4", "usq2", ends[0].digest, ends[1].digest, fresh)
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
    truth = pd.Series(true_effects(world, draw_contexts(fitted.space, fitted.cost, 3.0, 200, np.random.default_rng(5))), names)
    assert srcc(found.layers.effect.to_numpy(), truth[found.layers.name].to_numpy()) > 0.5
    assert found.layers.effect[0] == pytest.approx(truth[found.layers.name[0]], rel=0.5)


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
        assert np.allclose(table.effect, means[table.name]) and np.allclose(table.effect * table.layers, table.total)
        assert (table.low <= table.effect).all() and (table.effect <= table.high).all()


def test_reencoding_reaches_the_aggregates(world: World, fitted: FittedSurrogate, found: Sensitivity) -> None:
    """One effect, computed by encoding two configurations at a time."""
    weights, acts = draw_contexts(fitted.space, fitted.cost, 3.0, 64, np.random.default_rng([0, 0]))
    layer = world.space.layers[PLANTED[0]]
    changes = []
    for config in world.space.configs(weights, acts):
        before, after = fitted.predict([config.with_layer(layer, "usq4"), config.with_layer(layer, "usq2")])
        changes.append(after - before)
    assert found.layers.set_index("name").predicted[layer] == pytest.approx(np.mean(changes), rel=1e-4)


def test_contexts_lie_at_the_budget(fitted: FittedSurrogate) -> None:
    for bits in (2.3, 3.0, 4.0, 6.0):
        weights, acts = draw_contexts(fitted.space, fitted.cost, bits, 40, np.random.default_rng(0))
        real = fitted.cost.totals(weights, acts)["bits"]
        assert np.abs(real - bits).max() <= 0.25 and abs(real.mean() - bits) < 0.15 and (acts == 8).all()
        assert fitted.space.allowed()[np.arange(60), weights].all()
    with pytest.raises(AquabitError, match="out of reach"):
        draw_contexts(fitted.space, fitted.cost, 1.2, 10, np.random.default_rng(0))


def test_layers_without_a_choice_are_no_players(world: World) -> None:
    own = [Scheme.parse(s) for s in ("vq2c", "vq3", "usq8", "usq3")]
    layers = world.space.layers
    choices = {**world.space.choices, layers[0]: (FP,), layers[1]: (own[3],), layers[2]: tuple(own), layers[3]: (own[1], own[3])}
    space: SearchSpace = replace(world.space, choices=choices)
    players = {p.layer: p for p in find_players(space, parse_swap("usq4:usq2"))}
    assert layers[0] not in players and layers[1] not in players and layers[3] not in players
    assert (str(players[layers[2]].before), str(players[layers[2]].after)) == ("usq3", "vq2c")
    with pytest.raises(AquabitError, match="no layer has both ends"):
        find_players(replace(space, choices={layers[0]: (FP,)}), parse_swap("usq4:usq2"))


def test_pinned_and_excluded_layers_stay(world: World, tmp_path) -> None:
    layers = world.space.layers
    pinned = World(40)
    pinned.space = replace(pinned.space, choices={**pinned.space.choices, layers[0]: (FP,), layers[1]: (Scheme.parse("usq8"),)})
    pinned.weights[:, 0], pinned.acts[:, 0] = 0, 16
    pinned.weights[:, 1] = pinned.space.schemes.index(Scheme.parse("usq8"))
    result = explain(pinned.study(tmp_path / "s.db"), replicates=2, contexts=8)
    assert result.ranking == "predicted" and not result.layers.n.any() and (result.layers.effect == result.layers.predicted).all()
    assert set(result.layers.name) == set(layers[2:]) and np.isfinite(result.layers.effect).all()


def test_shap_by_layer_adds_up_and_finds_the_planted(world: World, fitted: FittedSurrogate) -> None:
    values, base = shap_by_layer(fitted)
    assert values.shape == (300, 60)
    assert np.abs(values.sum(1) + base - fitted.badness(fitted.weights, fitted.acts)).max() < 1e-4
    assert set(np.argsort(-np.abs(values).mean(0))[:3]) == set(PLANTED)


def test_interval_of_replicates() -> None:
    """Wider for larger effects, for replicates that vary more, and for few of them; none below two."""
    effect = np.array([0.0, 0.0, 8.0])
    replicates = effect + np.random.default_rng(0).normal(size=(2000, 3)) * [1, 3, 1]
    low, high = interval(effect, replicates)
    half = high - effect
    assert np.allclose(half, effect - low) and half[0] < half[1] and half[0] < half[2]
    assert half[2] == pytest.approx(np.hypot(half[0], 1.645 * 0.4 * 8), rel=0.01)
    few = interval(effect, replicates[:5])
    assert (few[1] - effect).sum() > half.sum() and (few[0] <= effect).all()
    assert np.isnan(interval(effect, replicates[:1])[0]).all()


def test_interactions_are_second_differences(world: World, fitted: FittedSurrogate, found: Sensitivity) -> None:
    """One pair, computed by encoding four configurations at a time; all pairs of the strongest layers are there, largest first."""
    table = found.interactions
    assert len(table) == STRONGEST * (STRONGEST - 1) // 2 and (table.interaction.abs().diff()[1:] <= 0).all()
    strongest = set(found.layers.name[:STRONGEST])
    assert set(table.a) | set(table.b) == strongest and (table.low <= table.interaction).all()
    row, (weights, acts) = table.iloc[0], draw_contexts(fitted.space, fitted.cost, 3.0, 64, np.random.default_rng([0, 0]))
    total = []
    for config in world.space.configs(weights[:32], acts[:32]):
        ends = [config.with_layer(row.a, i).with_layer(row.b, j) for i in ("usq4", "usq2") for j in ("usq4", "usq2")]
        neither, b, a, both = fitted.predict(ends)
        total.append(both - a - b + neither)
    assert row.interaction == pytest.approx(np.mean(total), rel=1e-3)


def test_scores_of_schemes_are_standardised_changes(fitted: FittedSurrogate, found: Sensitivity) -> None:
    """Of whole operator types and blocks: one computed by hand, the better scheme has the higher score, one scale for all groups."""
    table, space = found.scores, fitted.space
    assert set(table.level) == {"operator", "block"} and len(table) == (6 + 10) * 10
    for _, level in table.groupby("level"):
        assert level.score.mean() == pytest.approx(0, abs=1e-9) and level.score.std(ddof=0) == pytest.approx(1)
        assert np.corrcoef(level.score, level.change)[0, 1] == pytest.approx(-1)
    mean = table.groupby("scheme").score.mean()
    assert mean["usq8"] > mean["usq4"] > mean["usq3"] > mean["usq2"]
    weights, acts = (part[:32] for part in draw_contexts(space, fitted.cost, 3.0, 64, np.random.default_rng([0, 0])))
    changed = weights.copy()
    changed[:, [i for i, k in enumerate(space.layers) if k.endswith("ff.up")]] = space.schemes.index(Scheme.parse("usq2"))
    by_hand = (fitted.badness(changed, acts) - fitted.badness(weights, acts)).mean()
    row = table[(table.level == "operator") & (table.name == "ff.up") & (table.scheme == "usq2")].iloc[0]
    assert row.change == pytest.approx(by_hand, rel=1e-3) and row.layers == 10 and row.low <= row.score <= row.high


def test_the_ranking_combines_and_validation_does_not(study: Study, fitted: FittedSurrogate, found: Sensitivity, tmp_path) -> None:
    table = found.layers
    assert found.ranking == "combined" and table.n.sum() == FLIPPED and table.real.notna().sum() == FLIPPED
    seen = table[table.n > 0]
    size = seen.real.abs().median()
    off = [np.abs(np.arcsinh(v / size) - np.arcsinh(seen.real / size)).mean() for v in (seen.effect, seen.predicted)]
    assert off[0] < 0.9 * off[1] and (seen.effect != seen.predicted).all()
    unseen = table[table.n == 0]
    ratio = unseen.effect / unseen.predicted
    assert np.allclose(ratio, ratio.iloc[0]) and 0.2 < ratio.iloc[0] < 5, "one scale for all: swaps say how large effects are"
    rows = pd.DataFrame(found.validation["rows"]).set_index("layer")
    assert np.allclose(rows.predicted[seen.name], seen.predicted) and np.allclose(rows.real[seen.name], seen.real)


def test_same_seed_same_numbers_and_progress(study: Study, fitted: FittedSurrogate) -> None:
    seen: list[str] = []
    options = {"replicates": 2, "contexts": 16, "seed": 3, "fitted": fitted}
    first, second = (explain(study, **options, progress=lambda what, *_: seen.append(what)).to_dict() for _ in "ab")
    assert first == second and {"refit for intervals", "predict swaps"} <= set(seen)


def test_json_round_trip_and_form(study: Study, found: Sensitivity) -> None:
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Sensitivity.from_dict(value).to_dict() == value
    assert {"objective", "direction", "protocol", "measurements", "surrogate", "layers", "validation"} <= set(value)
    assert {"name", "operator", "block", "effect", "low", "high", "schemes"} <= set(value["layers"][0])
    keys = {"within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "noise_ceiling", "baselines"}
    keys |= {"within_budget_interval", "useful", "estimator", "needed", "widen", "cautions"}
    assert keys == set(value["surrogate"]) and value["surrogate"]["noise_ceiling"] is None
    assert value["measurements"] == len(value["scatter"]) == 300 and value["direction"] == "min"
    save(study, found)
    assert study.get("sensitivity") == value
    older = {k: v for k, v in value.items() if k not in ("ranking", "interactions", "scores", "curve", "swarm")}
    assert Sensitivity.from_dict(older).ranking == "predicted" and Sensitivity.from_dict(older).interactions.empty
    assert "within-budget SRCC" in found._repr_html_() and "usq4:usq2" in found._repr_html_()
    without = explain(study, replicates=0, contexts=4).to_dict()
    assert without["layers"][0]["low"] is None and np.isnan(Sensitivity.from_dict(without).layers.low[0])
    with pytest.raises(AquabitError, match="no sensitivity"):
        Sensitivity.from_dict({"objective": "fid"})


def test_higher_is_better_gives_positive_effects(study: Study, found: Sensitivity) -> None:
    inception = explain(study, objective="is", replicates=2, contexts=16)
    assert inception.direction == "max"
    assert srcc(inception.layers.sort_values("name").effect.to_numpy(), found.layers.sort_values("name").effect.to_numpy()) > 0.9
    assert (inception.layers.effect[:3] > 0).all() and inception.validation["sign_agreement"] > 0.7


def test_real_swaps_stand_beside_the_predicted(found: Sensitivity) -> None:
    truth = found.validation
    assert truth["flips"] == len(truth["rows"]) == FLIPPED and truth["contexts_per_layer"] == 1
    assert truth["srcc"] > 0.4 and truth["sign_agreement"] > 0.8 and truth["srcc_flips"] > 0.3
    row = truth["rows"][0]
    assert row["low"] is None and row["n"] == 1 and row["real"] > 0


def test_validation_scores_by_hand() -> None:
    schemes = [{"usq2": 3.0, "usq3": 1.0}, {"usq2": 1.0, "usq3": 0.5}, {"usq2": -1.0, "usq3": 0.0}]
    layers = pd.DataFrame({"name": list("abc"), "swap": "usq4:usq2", "effect": [3.0, 1.0, -1.0], "schemes": schemes})
    flips = pd.DataFrame({
        "layer": list("aabcx"), "before": "usq4", "after": "usq2", "value_before": 10.0, "value_after": [14.0, 16.0, 11.0, 12.0, 11.0],
    })  # fmt: skip
    result = validation_scores(layers, flips)
    assert result["flips"] == 4 and result["sign_agreement"] == pytest.approx(2 / 3) and result["srcc"] == pytest.approx(0.5)
    first = result["rows"][0]
    assert (first["predicted"], first["real"], first["n"]) == (3.0, 5.0, 2) and first["low"] < 5 < first["high"]
    assert validation_scores(layers, flips, "max")["rows"][0]["real"] == -5
    other = validation_scores(layers, flips.assign(before="usq3"))
    assert other["rows"][0]["predicted"] == 2.0 and other["rows"][0]["swap"] == "usq3:usq2"
    assert validation_scores(layers, flips[:0])["srcc"] is None


def test_flips_are_predicted_in_their_own_context_and_never_trained_on(study: Study, fitted: FittedSurrogate) -> None:
    flips, configs = study.flips("fid"), study.configs()
    table = predict_flips(fitted, flips, configs)
    row = table.iloc[4]
    before, after = fitted.predict([configs[row.config_before], configs[row.config_after]])
    assert row.predicted == pytest.approx(after - before) and row.real == pytest.approx(row.value_after - row.value_before)
    assert not set(fitted.configs) & {*flips.config_before, *flips.config_after}
    with pytest.raises(AquabitError, match="training configurations"):
        predict_flips(replace(fitted, configs=(flips.config_before[0],)), flips, configs)

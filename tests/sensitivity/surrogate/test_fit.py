"""Scores, surrogate, baselines, and fitting from a study, on synthetic ground truth."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.base import clone

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Protocol
from aquabit.sensitivity.features import SKETCH, Encoder
from aquabit.sensitivity.surrogate import scores
from aquabit.sensitivity.surrogate.estimators import AverageBits, Surrogate
from aquabit.sensitivity.surrogate.fit import cross_validate, fit_from_study, fold_numbers
from aquabit.sensitivity.surrogate.regressor import Target
from aquabit.space import SearchSpace, make_space
from tests.worlds import SCHEMES, World, near_study


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def validated(world: World) -> dict:
    return cross_validate(world.encoder, world.choices, world.y, world.bits)


def budget(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(2, 4.5, n), 6 + 2 * rng.random(n), fold_numbers(n, 5, seed)


@given(st.integers(0, 10_000), st.floats(0.1, 50), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_within_budget_of_labels_against_themselves_is_one(seed: int, scale: float, shift: float) -> None:
    bits, acts, fold = budget(60, seed)
    y = np.exp(-bits) + np.random.default_rng(seed + 1).normal(size=60)
    assert scores.within_budget_srcc(y, y * scale + shift, bits, acts, fold) == pytest.approx(1)
    assert scores.within_budget_srcc(y, -y, bits, acts, fold) == pytest.approx(-1)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_what_the_budget_explains_does_not_count(seed: int) -> None:
    """A cubic of the budget on either side, however large, changes nothing; alone it scores 0."""
    bits, acts, fold = budget(80, seed)
    rng = np.random.default_rng(seed + 1)
    y, predicted = rng.normal(size=(2, 80))
    cubic = 40 * bits**3 - 7 * bits * acts**2 + acts
    plain = scores.within_budget_srcc(y, predicted, bits, acts, fold)
    assert scores.within_budget_srcc(y + cubic, predicted - 3 * cubic, bits, acts, fold) == pytest.approx(
        plain, abs=0.01
    )
    assert scores.within_budget_srcc(y, cubic, bits, acts, fold) == 0
    assert scores.within_budget_srcc(y, np.full(80, 3.0), bits, acts, fold) == 0


def test_within_budget_equals_an_independent_computation() -> None:
    bits, acts, fold = budget(100, 3)
    y, predicted = np.random.default_rng(4).normal(size=(2, 100)) + bits
    predicted = predicted + 0.5 * y

    def residual(values: np.ndarray) -> np.ndarray:
        design = np.array(
            [
                [b**i * a**j for i in range(4) for j in range(4) if i + j < 4]
                for b, a in zip(bits - 3, acts - 7, strict=True)
            ]
        )
        assert design.shape[1] == 10
        out = values.copy()
        for f in range(5):
            q, r = np.linalg.qr(design[fold != f])
            out[fold == f] -= design[fold == f] @ np.linalg.solve(r, q.T @ values[fold != f])
        return out

    expected = spearmanr(residual(y), residual(predicted)).statistic
    assert scores.within_budget_srcc(y, predicted, bits, acts, fold) == pytest.approx(expected, abs=1e-6)


def test_constant_activation_bits_are_fine() -> None:
    bits, _, fold = budget(60, 0)
    y = np.random.default_rng(0).normal(size=60)
    assert scores.within_budget_srcc(y + bits**2, y, bits, np.full(60, 8.0), fold) == pytest.approx(
        1, abs=0.02
    )
    assert scores.within_budget_srcc(y, y, np.full(60, 3.0), np.full(60, 8.0), fold) == pytest.approx(1)


def test_ndcg_has_linear_gains() -> None:
    y = np.arange(20.0)
    assert scores.ndcg10(y, y) == pytest.approx(1) and scores.ndcg10(y * 5 + 2, y) == pytest.approx(1)
    discount = 1 / np.log2(np.arange(2, 12))
    assert scores.ndcg10(y, -y) == pytest.approx(
        (np.arange(10) @ discount) / (np.arange(19, 9, -1) @ discount)
    )
    assert scores.ndcg10(y, np.zeros(20)) == pytest.approx(scores.ndcg10(y[::-1], np.zeros(20)))
    assert scores.ndcg10(np.ones(5), np.arange(5.0)) == 1


def test_scores_of_constants_and_shapes() -> None:
    y = np.arange(5.0)
    assert (
        scores.srcc(y, np.ones(5)) == 0
        and scores.kendall(y, np.ones(5)) == 0
        and np.isnan(scores.r2(np.ones(5), y))
    )
    with pytest.raises(AquabitError, match="one length"):
        scores.srcc(y, y[:3])


def test_surrogate_beats_both_baselines_within_budget(validated: dict) -> None:
    own, average, ridge = (
        validated["within_budget_srcc"],
        *(validated["baselines"][k] for k in ("average_bits", "ridge_one_hot")),
    )
    assert own > 0.65
    assert average["within_budget_srcc"] == 0 and average["srcc"] > 0.3
    assert own > ridge["within_budget_srcc"] + 0.05
    assert validated["srcc"] > 0.9 and validated["r2"] > 0.8 and validated["ndcg10"] > 0.9


def test_shuffled_labels_score_near_zero(world: World) -> None:
    found = []
    for seed in range(3):
        y = np.random.default_rng(seed).permutation(world.y)
        found.append(
            cross_validate(world.encoder, world.choices, y, world.bits, seed=seed)["within_budget_srcc"]
        )
    assert abs(np.mean(found)) < 0.2


def test_predictions_are_held_out(world: World) -> None:
    """Labels of one fold do not reach its own predictions."""
    half = slice(0, 100)
    args = (world.encoder, world.choices[half])
    first = cross_validate(*args, world.y[half], world.bits[half])
    changed = np.where(first["fold"] == 2, world.y[half] * 3, world.y[half])
    second = cross_validate(*args, changed, world.bits[half])
    same = first["out_of_fold"] == second["out_of_fold"]
    assert same[first["fold"] == 2].all() and not same[first["fold"] != 2].any()


def test_surrogate_is_deterministic_and_an_estimator(world: World) -> None:
    features = world.encoder(world.choices)
    first, second = (clone(Surrogate(rounds=40)).fit(features, world.y).predict(features) for _ in range(2))
    assert np.array_equal(first, second)
    model = Surrogate(rounds=40).fit(features, world.y)
    assert np.allclose(model.to_units(model.predict(features)), np.exp(first))
    assert model.score(features, world.y) > 0.8


def test_higher_is_better_is_turned_round(world: World) -> None:
    features = world.encoder(world.choices)
    low = Surrogate(rounds=40).fit(features, world.y).predict(features)
    high = Surrogate(rounds=40, direction="max").fit(features, 1 / world.y)
    assert scores.srcc(low, high.predict(features)) > 0.999
    assert np.allclose(high.to_units(high.predict(features)), np.exp(-low), rtol=0.02)


@pytest.mark.parametrize(
    ("direction", "values"),
    [("min", [1.0, 2.0]), ("max", [1.0, 2.0]), ("min", [-1.0, 2.0]), ("max", [0.0, 2.0])],
)
def test_target_round_trip(direction: str, values: list[float]) -> None:
    y = np.array(values)
    target = Target.of(y, direction)
    assert np.allclose(target.to_units(target(y)), y)
    assert (target(y)[1] > target(y)[0]) == (direction == "min")
    with pytest.raises(AquabitError, match="not finite"):
        Target.of(np.array([1.0, np.nan]))


def test_contributions_add_up(world: World) -> None:
    features = world.encoder(world.choices)
    for linear, base in ((0.0, None), (0.5, None), (1.0, (3,))):
        model = Surrogate(rounds=40, linear=linear, base=base).fit(features, world.y)
        values, base = model.contributions(features[:50])
        assert np.abs(values.sum(1) + base - model.predict(features[:50])).max() < 1e-4


def test_average_bits_recovers_a_cubic() -> None:
    bits, acts, _ = budget(60, 0)
    y = 3 + bits**3 - acts * bits
    both = np.stack([bits, acts], 1)
    assert np.allclose(AverageBits().fit(both, y).predict(both), y)
    flat = np.stack([bits, np.full(60, 8.0)], 1)
    assert np.allclose(AverageBits().fit(flat, bits**2).predict(flat), bits**2)


def test_fit_from_study_takes_only_training_measurements(world: World, tmp_path) -> None:
    study, protocol = world.study(tmp_path / "s.db", 60), Protocol()
    extra = world.choices[60:80].configs()
    for i, kind in enumerate(["flip"] * 5 + ["reference", "fresh"] + ["candidate"] * 5):
        world.record(study, extra[i], {"fid": 1e6}, kind, protocol)
    for config in extra[12:20]:
        world.record(study, config, {"fid": 1e6}, "sample", protocol.block(1))
    fitted = fit_from_study(study)
    assert len(fitted.configs) == 65 and fitted.objective == "fid" and fitted.scores["noise_ceiling"] is None
    assert np.allclose(fitted.bits[:60], world.bits[:60]) and (fitted.y == 1e6).sum() == 5


def test_ends_of_real_swaps_are_no_training_rows(world: World, tmp_path) -> None:
    study, protocol = world.study(tmp_path / "s.db", 40), Protocol()
    one, other = world.choices[:2].configs()
    study.add_swap(world.space.layers[0], "usq4", "usq2", one.digest, other.digest, protocol)
    assert not {one.digest, other.digest} & set(fit_from_study(study).configs)


def test_too_few_measurements_say_what_to_do(world: World, tmp_path) -> None:
    study = world.study(tmp_path / "s.db", 19)
    with pytest.raises(AquabitError, match=r"19 usable measurements.*at least 20.*aquabit measure"):
        fit_from_study(study)
    with pytest.raises(AquabitError, match="psnr"):
        fit_from_study(study, "psnr")


def test_noise_ceiling_needs_a_second_seed_set(world: World, tmp_path) -> None:
    study, protocol = world.study(tmp_path / "s.db", 40), Protocol().block(1)
    rng = np.random.default_rng(0)
    for i, config in enumerate(world.choices[:40].configs()):
        world.record(
            study, config, {"fid": float(world.y[i] * np.exp(0.01 * rng.normal()))}, "fresh", protocol
        )
        if i == 18:
            assert fit_from_study(study).scores["noise_ceiling"] is None
    assert 0.7 < fit_from_study(study).scores["noise_ceiling"] <= 1


def test_good_ones_are_near_the_least_error_of_their_size() -> None:
    bits = np.array([3.0, 2.0, 2.5, 4.0, 2.5])
    error = np.array([4.9, 8.0, 4.0, 9.0, 5.1])
    assert scores.good_ones(error, bits).tolist() == [True, True, True, False, False], (
        "a larger one is compared with smaller ones"
    )
    assert scores.good_ones(error, bits, 1.3).tolist() == [True, True, True, False, True]
    assert scores.good_ones(np.array([1.0, -0.2, -0.1]), bits[:3]).tolist() == [False, True, True], (
        "no worse than full precision"
    )


def test_among_good_ones_only_they_count() -> None:
    """What ranks ruined ones says nothing; what ranks good ones all, whatever size and activations
    explain."""
    bits, acts, _ = budget(120, 0)
    rng = np.random.default_rng(1)
    excess = np.where(np.arange(120) % 3, rng.uniform(0, 0.3, 120), rng.uniform(1, 5, 120))
    y = excess - 2 * bits + 0.1 * acts
    good = excess < 0.3
    assert scores.among_good_srcc(y, y + 5 * bits**2, bits, acts, good) > 0.99
    assert scores.among_good_srcc(y, -y, bits, acts, good) == pytest.approx(-1)
    ruined = np.where(good, rng.normal(size=120), y)
    assert (
        abs(scores.among_good_srcc(y, ruined, bits, acts, good))
        < 0.25
        < 0.8
        < scores.srcc(y, np.where(good, -2 * bits, y))
    )
    assert scores.among_good_srcc(y, 3 - bits + bits**2, bits, acts, good) == 0, (
        "the size alone ranks nothing within a size"
    )
    few = good & (np.cumsum(good) < scores.ENOUGH)
    assert scores.among_good_srcc(y, y, bits, acts, few) is None
    few[np.flatnonzero(good)[-1]] = True
    assert scores.among_good_srcc(y, y, bits, acts, few) == pytest.approx(1)


def test_the_score_among_good_ones_is_reported_with_their_number(tmp_path) -> None:
    near, study = near_study(tmp_path / "s.db")
    fitted = fit_from_study(study)
    among, mse = (
        fitted.scores["among_good"],
        np.array([near.distance(c)["mse"] for c in fitted.choices.configs()]),
    )
    good = np.array([m <= 1.25 * mse[fitted.bits <= b].min() for m, b in zip(mse, fitted.bits, strict=True)])
    assert among["count"] == good.sum() >= scores.ENOUGH and set(among["baselines"]) == {
        "ridge_one_hot",
        "sum_of_damages",
    }
    assert (
        0.3 < among["srcc"] <= 1
        and all(0 < v <= 1 for v in among["baselines"].values())
        and among["noise_ceiling"] is None
    )
    protocol = Protocol().block(1)
    for config, y in zip(near.choices.configs(), near.y, strict=True):
        near.record(study, config, {"fid": float(y)}, "fresh", protocol)
    assert fit_from_study(study).scores["among_good"]["noise_ceiling"] == pytest.approx(1)
    few = fit_from_study(near.study(tmp_path / "few.db", 20)).scores["among_good"]
    assert few["srcc"] is None and 0 < few["count"] < 20


def test_the_low_noise_distance_is_learned_too(tmp_path) -> None:
    near, study = near_study(tmp_path / "s.db")
    fitted = fit_from_study(study, "psnr")
    assert fitted.direction == "max" and fitted.objective == "psnr" and fitted.scores["srcc"] > 0.9
    worse = near.choices[:1].configs()[0]
    for layer in near.space.layers:
        worse = worse.with_layer(layer, "usq2")
    assert fitted.predict([worse])[0] < np.median(fitted.y)


def test_without_a_distance_good_ones_are_near_full_precision(world: World, tmp_path) -> None:
    study = world.study(tmp_path / "s.db", 60)
    assert fit_from_study(study).scores["among_good"]["count"] == 0, "nothing says how good full precision is"
    world.record(study, world.space.full_precision(), {"fid": 20.0, "is": 5.0}, "reference", Protocol())
    for objective, loss in (("fid", world.y[:60] - 20), ("is", 5 - 100 / world.y[:60])):
        good = np.array(
            [v <= 1.25 * loss[world.bits[:60] <= b].min() for v, b in zip(loss, world.bits[:60], strict=True)]
        )
        assert fit_from_study(study, objective).scores["among_good"]["count"] == good.sum() > 0


def test_space_of_one_layer_is_served() -> None:
    graph = nx.DiGraph(other_elements=0)
    graph.add_node("only", kind="linear", operator="q", block="b", depth=0, shape=(8, 8), macs=64)
    space: SearchSpace = make_space(graph, "f" * 16, schemes=SCHEMES)
    errors = {("only", str(s)): 4.0**-s.bits for s in space.schemes[1:]}
    probes = {
        ("only", k): {"damage": v, "sketch": [0.0] * SKETCH}
        for k, v in {
            **{str(s): errors["only", str(s)] for s in space.schemes[1:]},
            "a6": 0.1,
            "a8": 0.0,
        }.items()
    }
    assert Surrogate.for_model(Encoder(space, graph, errors, probes)).base is not None
    encoder = Encoder(space, graph, errors)
    assert Surrogate.for_model(encoder).base is None
    weights = 1 + np.arange(30)[:, None] % (len(space.schemes) - 1)
    rows = Choices.at(space, weights, 8)
    y = 1 + encoder.error[0, weights[:, 0]]
    result = cross_validate(encoder, rows, y, CostModel(graph, space).totals(rows)["bits"])
    assert result["srcc"] > 0.9

"""The estimators behind one interface, the graph network, tuning, and what is said of a fit that is not to
be believed."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.base import clone

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.reports import answer as page
from aquabit.scheme import AquabitError
from aquabit.sensitivity.effects.predicted import bootstrap, shap_by_layer
from aquabit.sensitivity.explaining import explain
from aquabit.sensitivity.features import SKETCH, Encoder
from aquabit.sensitivity.surrogate.estimators import (
    ESTIMATORS,
    AverageBits,
    GraphNetwork,
    SumOfDamages,
    Surrogate,
    estimator_of,
    predict_all,
)
from aquabit.sensitivity.surrogate.fit import cross_validate, fit_from_study
from aquabit.sensitivity.surrogate.graph_network import soft_spearman, upstream
from aquabit.sensitivity.surrogate.scores import srcc
from aquabit.sensitivity.surrogate.trust import assess, needed
from aquabit.space import make_space
from aquabit.study import Study
from benchmarks.research.tuning import GRIDS, candidates, tune
from tests.worlds import World

SCHEMES = ("usq2", "usq3", "usq4", "vq2", "vq4")
QUICK = {
    "gbdt": {"rounds": 40},
    "graph_network": {"width": 16, "hops": 2, "heads": 2, "batch": 8, "epochs": 30},
}


class Small(World):
    """12 layers in a chain with a merge; the objective is the sum of damages, which are also what was
    probed."""

    def __init__(self, count: int = 80, seed: int = 0, noise: float = 0.02):
        rng = np.random.default_rng(seed)
        self.graph = nx.DiGraph(
            family="dit", model_class="Made", config={}, weights=12 * 64 * 64, other_elements=100
        )
        for i in range(12):
            self.graph.add_node(
                f"b{i // 4}.l{i % 4}",
                kind="linear",
                operator=f"op{i % 4}",
                block=f"b{i // 4}",
                depth=i,
                shape=(64, 64),
                bias=True,
                groups=1,
                tokens=16,
                macs=16 * 64 * 64,
                step_invariant=False,
                split=None,
                attention=None,
            )
        names = list(self.graph)
        self.graph.add_edges_from(pairwise(names))
        self.graph.add_node("add#0", kind="merge", op="add")
        self.graph.add_edges_from([(names[0], "add#0"), (names[1], "add#0"), ("add#0", names[7])])
        self.space = make_space(self.graph, "e" * 16, "made", schemes=SCHEMES)
        self.errors = {
            (n, str(s)): float(4.0**-s.bits * rng.lognormal(0, 0.2))
            for n in names
            for s in self.space.choices[n]
        }
        gain = rng.lognormal(0, 1.2, 12)
        probe = {
            k: {"damage": v * gain[names.index(k[0])], "sketch": [0.0] * SKETCH}
            for k, v in self.errors.items()
        }
        probe |= {
            (n, a): {"damage": 0.002 * (a == "a6"), "sketch": [0.0] * SKETCH}
            for n in names
            for a in ("a6", "a8")
        }
        self.probes = probe
        self.encoder, self.cost = (
            Encoder(self.space, self.graph, self.errors, probe),
            CostModel(self.graph, self.space),
        )
        self.plain = Encoder(self.space, self.graph, self.errors)
        weights = 1 + rng.integers(0, 5, (count, 12))
        self.choices = Choices(self.space, weights, np.where(rng.random((count, 12)) < 0.3, 6, 8))
        self.y = self.truth(self.choices) * np.exp(noise * rng.normal(size=count))
        self.bits = self.cost.totals(self.choices)["bits"]

    def total(self, rows: Choices) -> np.ndarray:
        return self.encoder.damages(rows).sum(1)

    def truth(self, rows: Choices) -> np.ndarray:
        return 5 + 30 * self.encoder.damages(rows).sum(1)


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


@pytest.fixture(scope="module")
def study(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return small.study(tmp_path_factory.mktemp("study") / "s.db")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_keeps_the_contract(small: Small, name: str) -> None:
    """Same seed, same numbers; survives cloning; oriented; in units; refits for a bootstrap replicate;
    finite on unseen rows."""
    model = estimator_of(name, small.encoder, 3, **QUICK.get(name, {}))
    features = model.features(small.encoder, small.choices)
    assert features.shape[0] == len(small.y) and features.ndim == 2
    first, second = (clone(model).fit(features[:60], small.y[:60]).predict(features) for _ in range(2))
    assert np.array_equal(first, second) and np.isfinite(first).all()
    assert srcc(first, small.y) > 0.3
    reverse = clone(model).set_params(direction="max").fit(features[:60], 1 / small.y[:60])
    assert srcc(reverse.predict(features), small.y) > 0.3
    assert srcc(reverse.to_units(reverse.predict(features)), 1 / small.y) > 0.3
    again = model.replicate(np.random.default_rng(0), 5).fit(features[:60], small.y[:60])
    assert type(again) is type(model) and np.isfinite(again.predict(features)).all()
    constant = clone(model).fit(features, np.full(80, 7.0))
    assert np.allclose(constant.to_units(constant.predict(features)), 7, rtol=0.05)


def test_unknown_names_and_parameters_are_named(small: Small) -> None:
    with pytest.raises(AquabitError, match=r"'forest' is unknown; known: gbdt"):
        estimator_of("forest", small.encoder)
    with pytest.raises(AquabitError, match=r"ridge_one_hot has no parameter 'depth'; it has .*penalty"):
        estimator_of("ridge_one_hot", small.encoder, depth=3)
    with pytest.raises(AquabitError, match="for_model"):
        GraphNetwork().fit(np.zeros((4, 24)), np.arange(1.0, 5.0))


def test_sum_of_damages_sees_probes_and_falls_back_to_weight_errors(small: Small) -> None:
    scores = {}
    for encoder in (small.encoder, small.plain):
        found = cross_validate(
            encoder, small.choices, small.y, small.bits, surrogate="sum_of_damages", baselines=()
        )
        scores[encoder.probed] = found["within_budget_srcc"]
    assert scores[True] > 0.95 > scores[False] + 0.1
    for curve in ("log-linear", "isotonic"):
        model = SumOfDamages(curve=curve)
        features = model.features(small.encoder, small.choices)
        assert np.diff(model.fit(features, small.y).predict(np.sort(features, 0))).min() >= 0
    falling = SumOfDamages().fit(features, 1 / small.y)
    assert np.ptp(falling.predict(features)) == 0, "damage never improves"


def test_average_bits_is_the_budget_alone(small: Small) -> None:
    features = AverageBits().features(small.encoder, small.choices)
    assert np.array_equal(features, np.stack([small.bits, small.choices.acts.mean(1)], 1))
    result = cross_validate(
        small.encoder, small.choices, small.y, small.bits, surrogate="average_bits", baselines=()
    )
    assert result["within_budget_srcc"] == 0 and not result["useful"]


def test_monotone_trees_never_improve_with_damage(small: Small) -> None:
    """Also where the labels say the opposite."""
    column = {str(s): j for j, s in enumerate(small.space.schemes)}
    low, high = (small.choices.under([[(2, column[s])]]) for s in ("usq4", "usq2"))
    worst = {}
    for monotone in (False, True):
        model = estimator_of("gbdt", small.plain, rounds=60, linear=0.0, monotone=monotone)
        features = model.features(small.plain, small.choices)
        labels = small.y * np.where(small.choices.weights[:, 2] == column["usq2"], 0.5, 1.0)
        model.fit(features, labels)
        ends = [model.predict(model.features(small.plain, rows)) for rows in (low, high)]
        worst[monotone] = float((ends[1] - ends[0]).min())
    assert worst[False] < -0.05 and worst[True] >= -1e-6
    with pytest.raises(AquabitError, match=r"Surrogate\.for_model"):
        Surrogate(monotone=True).fit(features, small.y)


def test_swaps_of_small_layers_are_ranked_where_damages_are_known(small: Small) -> None:
    """Trees alone step over what layers of little damage do; on top of the line in their sum they do not."""
    column = {str(s): j for j, s in enumerate(small.space.schemes)}
    found, real = {"line": [], "trees": []}, []
    few = small.choices[:40]
    models = {
        "line": estimator_of("gbdt", small.encoder),
        "trees": estimator_of("gbdt", small.encoder, linear=0.0),
    }
    for model in models.values():
        model.fit(model.features(small.encoder, few), small.y[:40])
    for layer in range(12):
        ends = [small.choices[40:].under([[(layer, column[s])]]) for s in ("usq4", "usq2")]
        real.append(float(np.subtract(*(small.truth(rows) for rows in ends[::-1])).mean()))
        for name, model in models.items():
            low, high = (
                model.to_units(model.predict(model.features(small.encoder, rows))).mean() for rows in ends
            )
            found[name].append(float(high - low))
    ranked = {name: srcc(np.array(values), np.array(real)) for name, values in found.items()}
    assert ranked["line"] > 0.99 > ranked["trees"] > 0.5


def test_the_line_in_the_sum_of_damages_looks_at_nothing_else(small: Small) -> None:
    """A column that is not known of every row, as a weight error of a scheme that a layer may not take, is
    the trees' own matter."""
    features = small.encoder(small.choices)
    features[::7, 0] = np.nan
    model = estimator_of("gbdt", small.encoder, rounds=20).fit(features, small.y)
    assert np.isfinite(model.predict(features)).all()
    assert list(model.linear_.columns) == [small.encoder.columns.index("damage:model")]


def test_predicting_with_all_models_equals_one_after_the_other(small: Small) -> None:
    features = small.encoder(small.choices)
    models = [
        Surrogate(rounds=20, linear=share, base=base, seed=i).fit(features[i:], small.y[i:])
        for i, share in enumerate((0.0, 0.5, 1.0))
        for base in (None, (5,))
    ]
    for base in (None, (5,)):
        own = [m for m in models if m.base == base]
        assert np.allclose(predict_all(own, features), [m.predict(features) for m in own], atol=1e-6)


def test_soft_spearman_is_near_one_minus_spearman() -> None:
    z = torch.as_tensor(np.random.default_rng(0).normal(size=50))
    assert float(soft_spearman(z, z)) < 0.05 and float(soft_spearman(-z, z)) > 1.95
    both = soft_spearman(torch.stack([z, -z]), z)
    assert both.shape == (2,) and float(both[0]) == pytest.approx(float(soft_spearman(z, z)))


def test_graph_network_attends_upstream_through_merges(small: Small) -> None:
    names = small.space.layers
    assert (
        upstream(small.graph, names[7]) == [names[6], names[0], names[1]]
        and upstream(small.graph, names[0]) == []
    )
    net = estimator_of("graph_network", small.encoder, **QUICK["graph_network"])
    net.fit(net.features(small.encoder, small.choices), small.y)
    weights, low = net._inputs(net.features(small.encoder, small.choices[:1]))
    changed = weights.clone()
    changed[0, 0] = 1 + weights[0, 0] % 5
    with torch.no_grad():
        before, after = (net.network_.embed(w, low) for w in (weights, changed))
    moved = [set(np.flatnonzero((a - b).abs().sum(2)[0].numpy())) for a, b in zip(before, after, strict=True)]
    assert moved[0] == {0} and moved[1] <= {0, 1, 7} and moved[2] <= {0, 1, 2, 7, 8} and len(moved[2]) > 1


def test_candidates_are_as_many_for_every_estimator() -> None:
    for name in ESTIMATORS:
        found = candidates(name, 12, seed=1)
        assert found[0] == {} and found == candidates(name, 12, seed=1)
        total = int(np.prod([len(v) for v in GRIDS[name].values()])) if GRIDS[name] else 0
        assert len(found) == 1 + min(total, 11) and len({tuple(c.items()) for c in found}) == len(found)


def test_tuning_is_nested(small: Small) -> None:
    """The held-out labels of an outer fold change neither its choice nor its predictions; a useless
    candidate is not chosen."""
    choices = [{"power": 1.0}, {"power": 40.0}]
    args = (small.encoder, small.choices)
    tuned = tune("sum_of_damages", *args, small.y, small.bits, choices, folds=4)
    assert tuned.best == choices[0] and tuned.chosen == [choices[0]] * 4 and tuned.inner.shape == (5, 2)
    assert tuned.scores["within_budget_srcc"] > 0.9
    fold = cross_validate(*args, small.y, small.bits, folds=4, surrogate="average_bits", baselines=())["fold"]
    changed = tune(
        "sum_of_damages", *args, np.where(fold == 2, small.y[::-1] * 3, small.y), small.bits, choices, folds=4
    )
    same = tuned.out_of_fold == changed.out_of_fold
    assert same[fold == 2].all() and not same[fold != 2].any() and (changed.inner[2] == tuned.inner[2]).all()
    with pytest.raises(AquabitError, match="no candidates"):
        tune("gbdt", *args, small.y, small.bits, [])


@pytest.mark.parametrize("name", ["ridge_one_hot", "sum_of_damages"])
def test_explain_with_any_estimator(small: Small, study: Study, name: str) -> None:
    found = explain(study, swap="usq4:usq2", bits=3.5, contexts=8, replicates=4, estimator=name)
    truth = [small.errors[n, "usq2"] - small.errors[n, "usq4"] for n in found.layers.name]
    assert (
        len(truth) == 12 and found.surrogate["estimator"] == name and name not in found.surrogate["baselines"]
    )
    value = found.to_dict()
    assert all(r["shap"] is None and r["low"] <= r["effect"] <= r["high"] for r in value["layers"])
    fitted = fit_from_study(study, estimator=name)
    assert isinstance(fitted.surrogate, ESTIMATORS[name]) and len(bootstrap(fitted, 2, 0)) == 2
    with pytest.raises(AquabitError, match="TreeSHAP explains boosted trees"):
        shap_by_layer(fitted)


def test_labels_that_say_nothing_about_layers_are_called_useless(small: Small) -> None:
    """Of shuffled labels about one in twenty may pass; a cubic of the budget with noise is no better."""
    rng, passed = np.random.default_rng(0), 0
    for seed in range(12):
        y = np.exp(-small.bits) + 0.1 * np.exp(0.3 * rng.normal(size=80))
        found = cross_validate(
            small.plain, small.choices, y, small.bits, seed=seed, surrogate="ridge_one_hot", baselines=()
        )
        passed += found["useful"]
    assert passed <= 3
    real = cross_validate(
        small.encoder, small.choices, small.y, small.bits, surrogate="ridge_one_hot", baselines=()
    )
    low, high = real["within_budget_interval"]
    assert real["useful"] and low <= real["within_budget_srcc"] <= high


def test_constant_labels(small: Small, tmp_path) -> None:
    found = cross_validate(small.encoder, small.choices, np.full(80, 3.0), small.bits)
    assert found["within_budget_srcc"] == 0 and found["srcc"] == 0 and not found["useful"]
    with pytest.raises(AquabitError, match="1 of 80 labels are not finite"):
        cross_validate(
            small.encoder, small.choices, np.where(np.arange(80) == 3, np.nan, small.y), small.bits
        )
    before, small.y = small.y, np.full(80, 3.0)
    try:
        flat = small.study(tmp_path / "flat.db", 30)
    finally:
        small.y = before
    with pytest.raises(AquabitError, match=r"all 30 measurements of fid .* are 3: .*--objective"):
        fit_from_study(flat)


def test_few_measurements_are_said(small: Small, tmp_path) -> None:
    scores = {
        "within_budget_srcc": 0.05,
        "within_budget_interval": (-0.1, 0.2),
        "within_budget_level": 0.95,
        "useful": False,
    }
    judgement = assess(scores, "gbdt", 20, 12)
    assert needed(12) == 24 and len(judgement["cautions"]) == 2
    assert judgement["cautions"][0].startswith("The surrogate is no better than average bits")
    assert "0.05, 95 % interval -0.10 to 0.20" in judgement["cautions"][0]
    assert "needs 24: intervals of what no real swap checks may be too narrow" in judgement["cautions"][1]
    assert assess({**scores, "useful": True}, "gbdt", 24, 12)["cautions"] == []
    fitted = fit_from_study(small.study(tmp_path / "few.db", 22), estimator="ridge_one_hot")
    assert (
        fitted.scores["needed"] == 24
        and "22 measurements are few for 12 layers" in fitted.scores["cautions"][-1]
    )


def test_the_report_says_first_what_speaks_against_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cautions = ["The surrogate is no better than average bits."]
    facts = SimpleNamespace(scores={"cautions": cautions}, running="", first=None)
    for subject in (page.ranking, page.comparison, page.trust):
        monkeypatch.setattr(subject, "sentence", lambda *a: page.Sentence("later"))
    assert [s.text for s in page.answer(facts, {}, {})] == [
        "The surrogate is no better than average bits.",
        *["later"] * 3,
    ]

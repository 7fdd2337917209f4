"""Screening and effects in context: what output errors add to a surrogate, and that their numbers are
those of the denoiser."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import numpy as np
import pytest

from aquabit import workflows as flow
from aquabit.choices import Choices
from aquabit.measuring.output_errors import output_features, stored
from aquabit.measuring.session import open_session
from aquabit.measuring.where import Where
from aquabit.scheme import AquabitError, Protocol
from aquabit.search.surrogate_search import best_of
from aquabit.sensitivity.effects.context_effects import DRAWN
from aquabit.sensitivity.effects.predicted import draw_contexts, find_players
from aquabit.sensitivity.explaining import explain
from aquabit.sensitivity.surrogate.fit import fit_from_study
from aquabit.sensitivity.surrogate.output_error_surrogate import Blend, fit_output_error_surrogate
from aquabit.study import Study
from aquabit.workflows import measure
from tests.conftest import tiny_pipeline
from tests.worlds import Lab, middle, model

PROTOCOL = Protocol(images=6, steps=2, micro_batch=6)
SPACE = {"schemes": ["usq2", "usq3", "usq4", "usq8"]}
BITS = 5.0  # tiny layers: two numbers a row cost as much as their codes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of a tiny pipeline, with two contexts run."""
    folder = tmp_path_factory.mktemp("screening")
    pipe, study = tiny_pipeline("dit"), Study(folder / "s.db")
    measure(pipe, study, 30, protocol=PROTOCOL, space=SPACE, bank=str(folder / "bank"))
    plain = explain(study, BITS, replicates=4)
    flow.run_contexts(study, 2, BITS, Where(bank=str(folder / "bank")), pipe=pipe)
    return pipe, study, str(folder / "bank"), plain


def test_a_screen_that_knows_more_leads_to_better_measurements() -> None:
    space, cost = model(8, 6, schemes=["usq2", "usq3", "usq4", "vq3"])
    budget, asked = middle(cost, 0.4, "bits"), []
    plain, screened = Lab(space, 20), Lab(space, 20)

    def judge(configs):
        asked.append(len(configs))
        return screened.truth(Choices.of(space, configs))

    plain.search(cost, budget, rounds=1)
    found = screened.search(cost, budget, rounds=1, judge=judge)
    assert [len(b) for b in screened.batches] == [8] == [len(b) for b in plain.batches] and asked == [32]
    mean = [
        float(np.mean([lab.truth(Choices.of(space, [c]))[0] for c in lab.batches[0]]))
        for lab in (plain, screened)
    ]
    assert mean[1] < mean[0]
    assert sum(c.target == budget for c in found) == 5, "targets keep their shares"


def test_the_first_stays_and_places_that_are_left_go_to_the_best() -> None:
    space, cost = model(3, 2, schemes=["usq2", "usq4"])
    lab = Lab(space, 4)
    budget = middle(cost, 0.5, "bits")
    some = lab.search(cost, budget, rounds=1, per_round=4)
    first, others = some[0], some[1:]
    other = replace(budget, bits=(budget.bits or 0) * 1.1)
    listed = [
        replace(first, target=budget),
        *(replace(others[i % len(others)], target=budget) for i in range(3)),
    ]
    values = np.array([9.0, 2.0, np.nan, 1.0])
    assert best_of(listed, [budget, budget], values) == [listed[0], listed[3]]
    assert best_of(listed, [budget, other], values) == [listed[0], listed[3]], (
        "nobody was proposed for the other target"
    )


def test_output_errors_are_kept_and_older_studies_take_them(made, tmp_path) -> None:
    pipe, study, bank, _ = made
    inputs = stored(study.protocol)[0].digest
    known = study.outputs(inputs)
    table = study.measurements(study.protocol)
    assert set(table[table.kind == "sample"].config) <= set(known)
    config = study.configs()[table.config.iloc[-1]]
    with open_session(pipe, study, where=Where(bank=bank)) as session:
        assert (
            session.outputs([config])[config.digest]
            == known[config.digest]
            == session.here.output_errors(config, study.protocol)
        )
    assert study.outputs("other inputs") == {}
    old = Study(tmp_path / "old.db")
    with sqlite3.connect(tmp_path / "old.db") as db:
        db.execute("DROP TABLE IF EXISTS outputs")
    assert old.outputs(inputs) == {}
    old.add_outputs(inputs, {"a": {"error": [1.0]}})
    assert old.outputs(inputs) == {"a": {"error": [1.0]}}


def test_effects_in_context_are_what_the_screen_says_of_both_ends(made) -> None:
    _, study, _, plain = made
    found = explain(study, BITS, replicates=4)
    assert found.surrogate["contexts_run"] == 2 and "contexts_run" not in plain.surrogate
    fitted = fit_from_study(study)
    outputs = study.outputs(stored(study.protocol)[0].digest)
    screen = fit_output_error_surrogate(fitted, outputs, blend=True)
    assert found.surrogate["screen_within_budget_srcc"] == screen.within_budget_srcc
    drawn = draw_contexts(
        fitted.space, fitted.cost, BITS, DRAWN, np.random.default_rng([0, 0]), fitted.damages
    )
    contexts = drawn[:2].configs()
    row = found.layers.iloc[0]
    player = next(p for p in find_players(fitted.space, _swap()) if p.layer == row["name"])
    before, after = (
        screen.estimator.to_units(screen([c.with_layer(player.layer, s) for c in contexts], outputs))
        for s in (player.before, player.after)
    )
    assert row.predicted == pytest.approx(float((after - before).mean()), rel=1e-6, abs=1e-9)
    assert not np.allclose(
        found.layers.set_index("name").effect, plain.layers.set_index("name").effect.loc[found.layers.name]
    )
    assert explain(study, BITS + 0.2, replicates=2).surrogate.get("contexts_run") is None, (
        "these contexts were run near another budget"
    )


def _swap():
    from aquabit.scheme import parse_swap

    return parse_swap("usq4:usq2")


def test_a_blend_sees_what_trees_step_over() -> None:
    """A change of one column that is smaller than any step of the trees moves the splines by its slope."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (200, 3))
    y = np.exp(2 * x[:, 0] + 0.05 * rng.standard_normal(200))
    blend, constant = Blend((0, 1), (0,), members=1).fit(x, y), np.zeros((200, 1))
    at = np.repeat(np.linspace(0.2, 0.8, 60)[:, None], 3, 1)
    nudged = at + np.array([1e-3, 0, 0])
    change = blend.predict(nudged) - blend.predict(at)
    assert (change > 2e-3 / 2).mean() > 0.95, "two of three parts follow a slope of 2"
    assert (blend.trees_.predict(nudged) == blend.trees_.predict(at)).mean() > 0.5
    with_constant = Blend((0, 1, 3), (3,), members=1).fit(np.concatenate([x, constant], 1), y)
    assert (
        np.isfinite(with_constant.predict(np.concatenate([at, at[:, :1]], 1))).all()
        and len(with_constant.splines_) == 1
    )


def test_features_are_finite_whatever_the_errors_are() -> None:
    value = {"error": [0.0, 1e6], "common": [-1e-3, 0.2], "gain": [-0.1, 1e6]}
    assert np.isfinite(output_features([value])).all() and output_features([value]).shape == (1, 6)


def test_what_is_missing_is_named(made) -> None:
    pipe, study, bank, _ = made
    fitted = fit_from_study(study)
    outputs = study.outputs(stored(study.protocol)[0].digest)
    outputs.pop(fitted.configs[3])
    with pytest.raises(AquabitError, match="output errors of 1 measured"):
        fit_output_error_surrogate(fitted, outputs)
    with pytest.raises(AquabitError, match="contexts is 1"):
        flow.run_contexts(study, 1, pipe=pipe)
    with pytest.raises(AquabitError, match="screen is 0"):
        flow.find(study, BITS, screen=0, pipe=pipe, bank=bank)

"""Formats that are fitted only where the budget is expected to want them."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aquabit import workflows
from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.measuring.session import Session, open_session
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.pipelines import trace
from aquabit.scheme import FP, AquabitError, Budget, Protocol, Scheme
from aquabit.search.integer_program import solve
from aquabit.search.options import activation_choices
from aquabit.search.worth_fitting import REACH, expected_damages, expected_error, worth_fitting
from aquabit.sensitivity.damages import Damages
from aquabit.space import SearchSpace, make_space, without_additive
from aquabit.study import Study
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(images=4, steps=2, micro_batch=4)
SPACE: dict[str, Any] = {
    "schemes": ["usq4", "usq2", "usq6"],
    "formats": {"*": ["aq1x2g2s", "aq2x2g2s", "aq3x2g2s", "aq4x2g2s"]},
    "levels": [1.0, 2.0, 3.0, 4.0],
    "activations": [8],
}


def world(seed: int = 0) -> tuple[SearchSpace, CostModel, dict[tuple[str, str], dict[str, Any]]]:
    """A space whose damages are a layer's weight times the error of a format, which a factor of its own
    changes."""
    graph = trace(tiny_pipeline("dit"))
    space = make_space(graph, "f", "m", **SPACE)
    rng, found = np.random.default_rng(seed), dict[tuple[str, str], dict[str, Any]]()
    for layer, row in space.choices.items():
        weight = float(np.exp(rng.normal(0, 2)))
        for scheme in row:
            luck = float(np.exp(rng.normal(0, 0.1)))
            error = {2: 0.1188, 4: 0.0115, 6: 0.00104}.get(int(scheme.code_bits(1)), 0.0)
            error = expected_error(scheme, 1) if scheme.additive else error
            found[layer, str(scheme)] = {"damage": weight * error * luck}
        found[layer, "a8"] = {"damage": 0.0}
    return space, CostModel(graph, space), found


def uniform_only(features: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {k: v for k, v in features.items() if not k[1].startswith("aq")}


def test_what_is_expected_lies_between_the_uniform_formats_of_the_layer() -> None:
    space, _, features = world()
    found, column = expected_damages(space, uniform_only(features)), space.columns
    for i, (layer, row) in enumerate(space.choices.items()):
        for scheme in row:
            real = features[layer, str(scheme)]["damage"]
            tolerance = 1e-12 if not scheme.additive else 1.0
            assert abs(log(found[i, column[scheme]] / real)) <= tolerance, (layer, scheme)
    assert np.isinf(found[~space.allowed()]).all()


@pytest.mark.parametrize("bits", [4.0, 5.0, 6.0])
def test_fewer_formats_are_left_and_the_best_configurations_stay(bits: float) -> None:
    space, costs, features = world()
    narrow = worth_fitting(space, costs, uniform_only(features), bits)
    left = sum(s.additive for row in narrow.choices.values() for s in row)
    offered = sum(s.additive for row in space.choices.values() for s in row)
    assert 0 < left < 0.8 * offered
    for layer, row in narrow.choices.items():
        assert [s for s in row if not s.additive] == [s for s in space.choices[layer] if not s.additive]
        assert set(row) <= set(space.choices[layer])

    def score(of: SearchSpace, budget: Budget) -> float:
        damages = Damages.of(of, features)
        cost = CostModel(trace(tiny_pipeline("dit")), of)
        return solve(damages.scores(activation_choices(of, budget)), cost, budget).score

    for shift in (-REACH, 0.0, REACH):
        budget = Budget(bits + shift)
        assert score(narrow, budget) <= score(space, budget) * 1.05


def test_a_layer_that_nothing_is_known_of_keeps_its_formats() -> None:
    space, costs, features = world()
    first = next(iter(space.choices))
    known = {k: v for k, v in uniform_only(features).items() if k[0] != first}
    assert worth_fitting(space, costs, known, 5.0).choices[first] == space.choices[first]
    alone = replace(space, choices={**space.choices, first: (Scheme.parse("aq2x2g2s"),)})
    assert without_additive(alone).choices[first] == (Scheme.parse("aq2x2g2s"),)
    with_fp = replace(space, choices={**space.choices, first: (FP, Scheme.parse("aq2x2g2s"))})
    assert without_additive(with_fp).choices[first] == (FP, Scheme.parse("aq2x2g2s"))


def test_a_study_fits_what_is_wanted_and_stays_with_it(tmp_path: Path) -> None:
    study, where = Study(tmp_path / "s.db"), Where(bank=str(tmp_path / "bank"))

    def wanted(session: Session) -> SearchSpace:
        assert not any(scheme.startswith("aq") for _, scheme in study.features())
        return worth_fitting(session.space, session.costs, study.features(), 5.0)

    options = MeasureOptions(PROTOCOL, SPACE)
    with open_session(tiny_pipeline("dit"), study, options, where, wanted=wanted) as session:
        narrow = session.space
        assert set(narrow.cells()) == set(study.probes()) & {*narrow.cells()}
        assert Choices.of(narrow, [narrow.full_precision()]).weights.shape == (1, len(narrow.choices))
    offered = make_space(
        trace(tiny_pipeline("dit")), study.get("fingerprint"), session.model.reference, **SPACE
    )
    assert study.get("offered")["choices"] == offered.to_dict()["choices"]
    fitted = {scheme for _, scheme in study.features() if scheme.startswith("aq")}
    assert fitted and len(narrow.cells()) < len(offered.cells())
    assert any("additive formats of layers" in note for note in study.get("family_notes"))
    for again in (options, MeasureOptions()):  # with the space that it was offered, and as it was begun
        with open_session(tiny_pipeline("dit"), study, again, where) as session:
            assert session.space == narrow
    other = MeasureOptions(PROTOCOL, {**SPACE, "schemes": ["usq4"]})
    with (
        pytest.raises(AquabitError, match="another search space"),
        open_session(tiny_pipeline("dit"), study, other, where),
    ):
        pass


def test_run_takes_it_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="fits 'some' is unknown; it must be all or wanted"):
        workflows.FlowOptions(fits="some")
    where = Where(bank=str(tmp_path / "bank"))
    flow, sample = workflows.FlowOptions(5.0, 2, fits="wanted"), workflows.SampleOptions(24)
    model, options = tiny_pipeline("dit"), MeasureOptions(replace(PROTOCOL, images=8), SPACE)
    front = workflows.run_flow(model, tmp_path / "out", flow, sample, options, where)
    study = Study(tmp_path / "out" / "study.db")
    assert study.get("offered") is not None and front.best is not None
    assert "additive formats of layers" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_a_run_goes_on_with_the_formats_that_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, sample = Where(bank=str(tmp_path / "bank")), workflows.SampleOptions(24)
    options = MeasureOptions(replace(PROTOCOL, images=8), SPACE)

    class Stop(Exception):
        pass

    def stop(*_: Any, **__: Any) -> Any:
        raise Stop

    def begun(name: str, fits: str | None, **patched: Any) -> Study:
        flow, model = workflows.FlowOptions(5.0, 2, fits=fits), tiny_pipeline("dit")
        with monkeypatch.context() as patch:
            for function, what in patched.items():
                patch.setattr(workflows, function, what)
            with pytest.raises(Stop):
                workflows.run_flow(model, tmp_path / name, flow, sample, options, where)
        return Study(tmp_path / name / "study.db")

    study = begun("few", "wanted", worth_fitting=stop)  # interrupted before anything is left out
    assert "offered" not in study
    study = begun("few", None, damage_answer=stop)
    assert "offered" in study
    with open_session(tiny_pipeline("dit"), study, where=where) as session:
        config = session.space.uniform("usq4")
        assert config.calibration is not None and config.calibration.steps == 2, "it says how images are made"
    every = begun("every", None, damage_answer=stop)
    assert "offered" not in every
    for made, asked, known in ((study, "all", "wanted"), (every, "wanted", "all")):
        with pytest.raises(AquabitError, match=f"was begun with --fits {known}, not {asked}"):
            workflows.check_fits(made, asked)
        workflows.check_fits(made, None)

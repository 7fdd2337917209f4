"""A run within a time: the highest rung of settings whose plan fits it, and what was planned beside what was
spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aquabit import workflows
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.progress import span
from aquabit.quant import fit_costs as fit_costs_module
from aquabit.quant.fit_costs import FitCost, fit_costs
from aquabit.scheme import FP, AquabitError, Protocol, Scheme
from aquabit.sensitivity.plan import Planner, SampleOptions
from aquabit.study import Study
from aquabit.within import RUNGS, Fitted, compared, fit_within, parse_time
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(images=128, steps=4, micro_batch=4)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20min", 1200), ("1.5h", 5400), ("2 d", 172800), ("3m", 180)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "0s", "1e3s", "1 week", "9" * 400 + "s"])
def test_bad_times_are_one_sentence(text: str) -> None:
    with pytest.raises(AquabitError, match="must be a number above 0 and a unit") as error:
        parse_time(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    found = Planner(tiny_pipeline("dit"), None, MeasureOptions(PROTOCOL), Where(bank=str(tmp_path)))
    fits = {s: FitCost(1e-6, 0.0) for s in found.units.fits}
    found.units = replace(
        found.units, loading=1.0, call=0.01, few=0.002, backward=0.02, fits=fits
    )  # not this machine's mood
    return found


def test_less_time_lowers_rung_by_rung_and_what_was_given_stays(planner: Planner) -> None:
    sample, whole = SampleOptions(120), None
    seen = []
    for seconds in (1e6, 300, 200, 120, 90, 70):
        found = fit_within(planner, seconds, sample, 40, None)
        assert found.seconds <= seconds
        seen.append((found.samples, found.swaps, found.images, found.steps))
        whole = whole or found
    assert seen[0] == (120, 40, 128, 4) and seen == sorted(seen, reverse=True) and len(set(seen)) > 2
    kept = fit_within(planner, 200, sample, 40, None, kept=("samples",))
    assert kept.samples == 120
    few = fit_within(planner, 1e6, SampleOptions(10), 4, None)
    assert (few.samples, few.swaps) == (10, 4), "never more than was asked for"
    with pytest.raises(AquabitError, match=r"the smallest run of this model takes about \d+\.\d minutes"):
        fit_within(planner, 1.0, sample, 40, None)


def test_formats_go_where_their_fits_take_too_long(planner: Planner) -> None:
    slow = {s: FitCost(0.1 if s.additive else 1e-7, 0.0) for s in planner.units.fits}
    planner.units = replace(planner.units, fits=slow)
    found = fit_within(planner, 150, SampleOptions(), 40, None)
    assert found.space == {"levels": []} and "uniform formats alone" in found.text
    with pytest.raises(AquabitError, match="the smallest run"):
        fit_within(planner, 150, SampleOptions(), 40, {"schemes": ["usq4"]})


def test_the_parts_of_a_plan_are_what_it_takes(planner: Planner) -> None:
    one = planner.run(SampleOptions(120), 40)
    more = planner.run(SampleOptions(240), 40)
    assert more.parts["sample"] - one.parts["sample"] == pytest.approx(120 * 4 * 32 * 0.01 * 1.15)
    assert one.parts["fits and gradients"] > 0 and one.seconds == sum(one.parts.values())
    assert set(one.to_dict()) >= {"parts", "seconds", "memory_bytes", "bank_bytes", "measurements"}


def test_fits_are_timed_and_grow_with_weights() -> None:
    shapes = [(64, 32), (64, 256), (8, 16, 3, 3)]
    found = fit_costs(dict.fromkeys((FP, *map(Scheme.parse, ("usq4", "usq4h", "aq1x4g4s"))), shapes))
    assert set(map(str, found)) == {"usq4", "usq4h", "aq1x4g4s"}
    for cost in found.values():
        assert (
            cost.seconds((128, 64)) == pytest.approx(2 * cost.seconds((64, 64)))
            and cost.seconds((64, 64)) > 0
        )
        assert cost.seconds((64, 128)) >= 2 * cost.seconds((64, 64)) * (1 - 1e-9)


def test_a_run_within_a_time_keeps_its_settings_and_says_how_far_off_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquabit.within.RUNGS", ((24, 4, 8, 1.0), *RUNGS))
    told: list[str] = []
    options = MeasureOptions(
        Protocol(images=16, steps=2, micro_batch=8), {"schemes": ["usq2", "usq4", "usq6"]}
    )
    given: dict[str, Any] = {"told": told.append, "where": Where(bank=str(tmp_path / "bank"))}
    flow = workflows.FlowOptions(5.0, within=3600)
    for _ in range(2):  # the second continues
        workflows.run_flow(tiny_pipeline("dit"), tmp_path / "out", flow, SampleOptions(), options, **given)
    study = Study(tmp_path / "out" / "study.db")
    assert study.protocol.images == 8 and (study.measurements().kind == "sample").sum() == 24
    planned, spent = Fitted.from_dict(study.get("planned")), study.get("spent")
    assert set(spent) | {"explaining and pages"} == set(planned.parts)
    assert told[0] == planned.text and "24 samples, 4 swaps, 8 images" in told[0]
    [said] = [t for t in told[: len(told) // 2 + 1] if t.startswith("took ")]
    assert f"planned {span(planned.seconds)}" in said and "sample" in said
    assert compared(planned, spent).startswith(f"took {span(sum(spent.values()))}")


def test_a_pipeline_that_cannot_be_timed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)\nmore")

    monkeypatch.setattr("aquabit.pipelines.adapter.Adapter.step_call", refused)
    with pytest.raises(AquabitError, match=r"could not be timed \(mat1 and mat2 shapes") as error:
        Planner(tiny_pipeline("dit"), None, MeasureOptions(PROTOCOL), Where(bank=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_few_schemes_are_timed_and_the_others_cost_as_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def counted(scheme: Scheme, *_: object) -> float:
        timed.append(str(scheme))
        return float(scheme.bits)

    monkeypatch.setattr(fit_costs_module, "_timed", counted)
    names = [f"usq{b}h" for b in range(2, 9)] + [f"vq{b}h" for b in range(2, 9)] + ["usq4"]
    found = fit_costs({Scheme.parse(s): [(64, 32)] * (20 - i) for i, s in enumerate(names)})
    assert set(timed) == {*names[:8], "vq2h", "usq4"} and set(map(str, found)) == set(names)
    assert found[Scheme.parse("vq7h")].base == found[Scheme.parse("vq2h")].base

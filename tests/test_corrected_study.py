"""Studies whose configurations are measured after correction, and what a search stores of its winner's noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aquabit.pipelines import trace
from aquabit.quant import correct
from aquabit.scheme import AquabitError, Calibration, Protocol
from aquabit.sensitivity.measure import measure, open_session
from aquabit.sensitivity.surrogate import training_table
from aquabit.space import SearchSpace, make_space, read_space
from aquabit.study import Study

PROTOCOL = Protocol(images=6, steps=2, micro_batch=6)
SPACE = {"schemes": ["usq2", "usq4", "usq8", "vq2"], "correction": "cnc+bc"}
METRICS = ["config", "protocol", "kind", "status", "reason", "correction", "fid", "is", "mse", "psnr"]


def table(study: Study):
    return study.measurements(failed=True)[METRICS].sort_values(["protocol", "config"]).reset_index(drop=True)


def test_a_space_corrects_every_configuration_but_full_precision(dit) -> None:
    graph = trace(dit)
    plain, space = make_space(graph, "f"), make_space(graph, "f", correction="bc+cnc")
    assert "correction" not in plain.to_dict() and plain.config({}).digest == space.full_precision().digest
    assert SearchSpace.from_dict(space.to_dict()) == space and space.correction == "cnc+bc"
    made = [*space.sample(3), space.uniform("usq3"), space.level("usq", 3), *space.configs(*space.indices(space.sample(2)))]
    assert {c.correction for c in made} == {"cnc+bc"}
    first = made[0]
    assert replace(first, correction=None).digest == plain.sample(1)[0].digest != first.digest
    assert make_space(graph, "f", schemes=["usq4"], correction="cnc").calibration == Calibration(), "what its noise is measured on"
    assert make_space(graph, "f", schemes=["usq4"], correction="none") == make_space(graph, "f", schemes=["usq4"])
    with pytest.raises(AquabitError, match="correction 'dnc' is unknown"):
        make_space(graph, "f", correction="dnc")


def test_the_file_of_a_space_may_name_a_correction(tmp_path) -> None:
    file = tmp_path / "space.json"
    file.write_text('{"correction": "cnc"}')
    assert read_space(file) == {"correction": "cnc"}
    for wrong, reason in (('"vsc+match"', "exclude each other"), ("3", "must be a str")):
        file.write_text(f'{{"correction": {wrong}}}')
        with pytest.raises(AquabitError, match=reason):
            read_space(file)


def test_measured_after_correction_whatever_the_number_of_workers(tmp_path, dit) -> None:
    one, two, plain = (Study(tmp_path / f"{name}.db") for name in ("one", "two", "plain"))
    measure(dit, one, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    measure(dit, two, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank2"), workers=2)
    measure(dit, plain, 2, protocol=PROTOCOL, space={**SPACE, "correction": None}, bank=str(tmp_path / "bank"))
    assert table(one).equals(table(two))
    measured = table(one)
    assert (measured.correction.isna() == (measured.kind == "reference")).all() and (measured.status == "ok").all()
    uncorrected = plain.measurements().set_index("config")
    configs = one.configs()
    quantized = measured[measured.kind != "reference"]
    before = uncorrected.loc[[replace(configs[c], correction=None).digest for c in quantized.config]].mse.to_numpy()
    assert (quantized.mse.to_numpy() != before).all(), "the correction acts"
    with pytest.raises(AquabitError, match=r"one\.db was begun with --correction cnc\+bc, not none; use that or another file"):
        measure(dit, one, 2, protocol=PROTOCOL, space={**SPACE, "correction": None}, bank=str(tmp_path / "bank"))
    with pytest.raises(AquabitError, match=r"plain\.db was begun with --correction none, not cnc\+bc"):
        measure(dit, plain, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))


def test_a_sampler_that_cannot_be_corrected_so_is_refused_before_anything_is_made(tmp_path, dit) -> None:
    study = Study(tmp_path / "s.db")
    for correction, changed, reason in (
        ("vsc", {}, "DDIM with eta 0 adds none"),
        ("match", {"eta": 1.0}, "match is defined for a deterministic sampler, but eta is 1"),
        ("match", {"scheduler": "ddpm"}, "match is defined for DDIM at eta 0 and Euler, not for DDPMScheduler"),
    ):
        with pytest.raises(AquabitError, match=reason):
            measure(dit, study, 2, protocol=replace(PROTOCOL, **changed), space={**SPACE, "correction": correction}, bank=str(tmp_path))
    assert "space" not in study


def test_a_configuration_that_cannot_be_corrected_is_a_failed_measurement(tmp_path, dit, monkeypatch) -> None:
    monkeypatch.setattr(correct, "LEAST", 100.0)  # every slope is too small to divide by
    study = Study(tmp_path / "s.db")
    measure(dit, study, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    failed = study.measurements(failed=True)
    assert (failed[failed.kind != "reference"].status == "failed").all() and failed.reason.str.contains("cnc would divide").any()


def test_corrected_and_uncorrected_measurements_share_no_training_table(tmp_path, dit) -> None:
    study = Study(tmp_path / "s.db")
    with open_session(
        dit, study, protocol=PROTOCOL, space_options={"schemes": ["usq2", "usq3", "usq4"]}, bank=str(tmp_path / "bank")
    ) as session:
        configs = session.space.sample(22)
        session.measure([session.space.full_precision()], "reference")
        session.measure(configs, "sample")
        session.measure([replace(c, correction="cnc+bc") for c in configs[:3]], "candidate")
    learned = training_table(study, "fid")
    assert len(learned) == len({c.digest for c in configs}) and learned.correction.isna().all() and np.isfinite(learned.fid).all()

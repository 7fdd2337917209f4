"""Studies whose configurations are measured after correction, and what a search stores of its winner's
noise."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aquabit import packing
from aquabit import workflows as flow
from aquabit.choices import Choices
from aquabit.measuring.session import open_session, uniform_references
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.pipelines import ClassConditionalPipeline, trace
from aquabit.quant.correction import corrector as correct
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Calibration, Protocol, QuantConfig
from aquabit.sensitivity.correction_gain import correction_shift, noise_facts
from aquabit.sensitivity.surrogate.fit import training_table
from aquabit.sensitivity.surrogate.regressor import Target
from aquabit.space import SearchSpace, make_space, read_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.conftest import tiny_pipeline

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
    made = [
        *space.sample(3),
        space.uniform("usq3"),
        space.level("usq", 3),
        *Choices.of(space, space.sample(2)).configs(),
    ]
    assert {c.correction for c in made} == {"cnc+bc"}
    first = made[0]
    assert replace(first, correction=None).digest == plain.sample(1)[0].digest != first.digest
    assert make_space(graph, "f", schemes=["usq4"], correction="cnc").calibration == Calibration(), (
        "what its noise is measured on"
    )
    assert make_space(graph, "f", schemes=["usq4"], correction="none") == make_space(
        graph, "f", schemes=["usq4"]
    )
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
    measure(
        dit, plain, 2, protocol=PROTOCOL, space={**SPACE, "correction": None}, bank=str(tmp_path / "bank")
    )
    assert table(one).equals(table(two))
    measured = table(one)
    assert (measured.correction.isna() == (measured.kind == "reference")).all() and (
        measured.status == "ok"
    ).all()
    uncorrected = plain.measurements().set_index("config")
    configs = one.configs()
    quantized = measured[measured.kind != "reference"]
    before = uncorrected.loc[
        [replace(configs[c], correction=None).digest for c in quantized.config]
    ].mse.to_numpy()
    assert (quantized.mse.to_numpy() != before).all(), "the correction acts"
    with pytest.raises(
        AquabitError, match=r"one\.db was begun with --correction cnc\+bc, not none; use that or another file"
    ):
        measure(
            dit, one, 2, protocol=PROTOCOL, space={**SPACE, "correction": None}, bank=str(tmp_path / "bank")
        )
    with pytest.raises(AquabitError, match=r"plain\.db was begun with --correction none, not cnc\+bc"):
        measure(dit, plain, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))


def test_a_sampler_that_cannot_be_corrected_so_is_refused_before_anything_is_made(tmp_path, dit) -> None:
    study = Study(tmp_path / "s.db")
    for correction, changed, reason in (
        ("vsc", {}, "DDIM with eta 0 adds none"),
        ("match", {"eta": 1.0}, "match is defined for a deterministic sampler, but eta is 1"),
        (
            "match",
            {"scheduler": "ddpm"},
            "match is defined for DDIM at eta 0 and Euler, not for DDPMScheduler",
        ),
    ):
        with pytest.raises(AquabitError, match=reason):
            measure(
                dit,
                study,
                2,
                protocol=replace(PROTOCOL, **changed),
                space={**SPACE, "correction": correction},
                bank=str(tmp_path),
            )
    assert "space" not in study


def test_a_configuration_that_cannot_be_corrected_is_a_failed_measurement(tmp_path, dit, monkeypatch) -> None:
    monkeypatch.setattr(correct, "MIN_DIVISOR", 100.0)  # every slope is too small to divide by
    study = Study(tmp_path / "s.db")
    measure(dit, study, 2, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    failed = study.measurements(failed=True)
    assert (failed[failed.kind != "reference"].status == "failed").all() and failed.reason.str.contains(
        "cnc would divide"
    ).any()


def test_corrected_and_uncorrected_measurements_share_no_training_table(tmp_path, dit) -> None:
    study = Study(tmp_path / "s.db")
    with open_session(
        dit,
        study,
        MeasureOptions(PROTOCOL, {"schemes": ["usq2", "usq3", "usq4"]}),
        Where(bank=str(tmp_path / "bank")),
    ) as session:
        configs = session.space.sample(22)
        session.measure([session.space.full_precision()], "reference")
        session.measure(configs, "sample")
        session.measure([replace(c, correction="cnc+bc") for c in configs[:3]], "candidate")
    learned = training_table(study, "fid")
    assert (
        len(learned) == len({c.digest for c in configs})
        and learned.correction.isna().all()
        and np.isfinite(learned.fid).all()
    )


# ---- what a search stores


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[ClassConditionalPipeline, Path]:
    """A pipeline, and a folder with its bank and s.db: 24 configurations measured without correction."""
    folder, pipe = tmp_path_factory.mktemp("begun"), tiny_pipeline("dit")
    measure(
        pipe,
        Study(folder / "s.db"),
        24,
        protocol=PROTOCOL,
        space={"schemes": ["usq2", "usq3", "usq4", "usq8"]},
        bank=str(folder / "bank"),
    )
    return pipe, folder


def copied(begun: tuple[ClassConditionalPipeline, Path], path: Path) -> Study:
    return Study(shutil.copy(begun[1] / "s.db", path / "s.db"))


@pytest.mark.parametrize("own", [None, "cnc"])
def test_noise_facts_hold_the_statistics_and_measure_the_counterpart(begun, tmp_path, own) -> None:
    pipe, folder = begun
    study = copied(begun, tmp_path)
    blocks = [PROTOCOL.block(i) for i in (11, 12)]
    with open_session(pipe, study, where=Where(bank=str(folder / "bank"))) as session:
        config = replace(session.space.uniform("usq2"), correction=own, calibration=Calibration.of(PROTOCOL))
        session.measure([config], "fresh", protocols=blocks, packed=True)
        facts = noise_facts(session, config, blocks)
        statistics = session.here.noise(config, Calibration.of(PROTOCOL))
        assert noise_facts(session, session.space.full_precision(), blocks) == {}
    other = replace(config, correction=None if own else "cnc+bc")
    assert (facts["without"], facts["with"]) == (
        (other.digest, config.digest) if own else (config.digest, other.digest)
    )
    assert facts["correction"] == (own or "cnc+bc") and facts["images"] == 64 and "reason" not in facts
    rows = study.measurements()
    made = rows[rows.kind == "correction"]
    assert set(made.config) == {other.digest} and list(made.protocol) == facts["protocols"] == [
        b.digest for b in blocks
    ]
    assert {(c, blocks[0].digest) for c in (config.digest, other.digest)} <= set(study.thumbnails()), (
        "images both ways"
    )
    table, estimate = facts["rows"], statistics.estimate
    assert [r["step"] for r in table] == [0, 1] and {r["branch"] for r in table} == {0}
    for row in table:
        step = row["step"]
        assert row["k"] == estimate.k[step, 0] and row["snr"] == estimate.snr[step, 0]
        assert row["bias"] == pytest.approx(abs(estimate.bias[step, 0, 0])), "one channel"
        assert row["variance"] == pytest.approx(estimate.variance[step, 0, 0])
        low, high = statistics.low.bias[step, 0, 0], statistics.high.bias[step, 0, 0]
        assert row["bias_high"] == pytest.approx(max(abs(low), abs(high)))
        assert row["bias_low"] == pytest.approx(0 if low <= 0 <= high else min(abs(low), abs(high)))
        assert all(row[f"{m}_low"] <= row[m] <= row[f"{m}_high"] for m in ("k", "bias", "variance", "snr"))


def test_noise_that_cannot_be_corrected_leaves_its_statistics_and_the_reason(
    begun, tmp_path, monkeypatch
) -> None:
    pipe, folder = begun
    study = copied(begun, tmp_path)
    monkeypatch.setattr(correct, "MIN_DIVISOR", 100.0)
    with open_session(pipe, study, where=Where(bank=str(folder / "bank"))) as session:
        facts = noise_facts(session, session.space.uniform("usq2"), [PROTOCOL.block(11)])
    assert "cnc would divide" in facts["reason"] and len(facts["rows"]) == 2 and facts["protocols"] == []
    assert "correction" not in set(study.measurements(failed=True).kind)


def test_a_search_with_correction_in_a_study_without(begun, tmp_path) -> None:
    pipe, folder = begun
    study = copied(begun, tmp_path)
    before = training_table(study, "fid")
    options = {"pipe": pipe, "bank": str(folder / "bank"), "rounds": 1}
    front = flow.find(study, 4.5, correction="cnc+bc", **options)
    stored = [QuantConfig.from_dict(m["config"]) for m in study.get("front")["members"]]
    assert {m.config.correction for m in front.members} == {c.correction for c in stored} == {"cnc+bc"}
    after = training_table(study, "fid")
    assert after.config.tolist() == before.config.tolist() and after.fid.tolist() == before.fid.tolist(), (
        "the surrogate learns from uncorrected measurements alone"
    )
    candidates = study.measurements(kind="candidate")
    assert set(candidates.correction) == {"cnc+bc"} and len(candidates) >= 3 + 4
    assert study.get("noise")["with"] == front.winner and "correction" not in study.get("space")
    with open_session(pipe, study, where=Where(bank=str(folder / "bank"))) as session:
        target = Target(1.0, True)
        assert correction_shift(session, "fid", target) == 0.0, "this session corrects as its study does"
        corrected = replace(session.space, correction="cnc+bc", calibration=Calibration.of(PROTOCOL))
        session = session.with_space(corrected)
        values = study.measurements(study.protocol).set_index("config").fid
        pairs = [
            np.log(values[c.digest] / values[replace(c, correction=None).digest])
            for c in uniform_references(session.space)
        ]
        assert correction_shift(session, "fid", target) == pytest.approx(np.mean(pairs)) and len(pairs) == 4


def test_a_search_may_not_change_a_study_s_own_correction(begun, tmp_path) -> None:
    pipe, folder = begun
    study = Study(tmp_path / "c.db")
    measure(
        pipe,
        study,
        1,
        protocol=PROTOCOL,
        space={"schemes": ["usq3", "usq4"], "correction": "cnc"},
        bank=str(folder / "bank"),
    )
    for other in ("cnc+bc", "none"):
        with pytest.raises(
            AquabitError,
            match=r"c\.db was measured with --correction cnc; search with that, or without --correction",
        ):
            flow.find(study, 4.5, correction=other, pipe=pipe, bank=str(folder / "bank"))
    with pytest.raises(AquabitError, match="DDIM with eta 0 adds none"):
        flow.find(copied(begun, tmp_path), 4.5, correction="vsc", pipe=pipe, bank=str(folder / "bank"))


def test_images_of_a_corrected_artifact(begun, tmp_path) -> None:
    """The denoiser's first call, by which kernels are chosen, is no step of sampling that a correction
    counts."""
    pipe, folder = begun
    space = make_space(
        trace(pipe), fingerprint(pipe.denoiser), correction="cnc+bc", calibration=Calibration(steps=2)
    )
    config = space.uniform("usq3")
    packing.quantize(pipe, config, bank=str(folder / "bank")).save(tmp_path / "packed")
    corrected, plain = (packing.generate(str(tmp_path / "packed"), 4, correction=c) for c in (None, "none"))
    assert corrected.isfinite().all() and not corrected.equal(plain)
    assert packing.generate(str(tmp_path / "packed"), 2, steps=3, correction="none").isfinite().all(), (
        "what is off refuses no sampler"
    )
    with pytest.raises(AquabitError, match="are of 2 steps, the sampler makes 3"):
        packing.generate(str(tmp_path / "packed"), 2, steps=3)

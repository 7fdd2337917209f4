"""How images are made travels from the study to the configuration, the artifact and whoever makes images with
it, whether anything is calibrated or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aquabit import packing
from aquabit.jsonio import write_json
from aquabit.measuring.session import open_session
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.pipelines import load
from aquabit.quant.artifact import config_of
from aquabit.scheme import Budget, Calibration, Measurement, Protocol, QuantConfig
from aquabit.search.search import Search
from aquabit.search.search_options import SearchOptions
from aquabit.study import Study
from tests.command_line import fails, run
from tests.tiny_pipelines import PROMPTS, tiny

ASKED: dict[str, Any] = {"steps": 3, "guidance": 3.0, "scheduler": "euler", "conditions": PROMPTS[:2]}
PROTOCOL = Protocol(images=2, micro_batch=2, resolution=32, **ASKED)
SPACE = {"schemes": ["usq3", "usq4"], "excluded": ["*resnets*", "up_blocks*", "conv*"]}  # no H is needed
OPTIONS = MeasureOptions(PROTOCOL, SPACE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sd")
    tiny("sd").save_pretrained(out / "pipe")
    return out


@pytest.fixture(scope="module")
def config(folder: Path) -> QuantConfig:
    """As a session proposes it."""
    study = Study(folder / "s.db")
    with open_session(str(folder / "pipe"), study, OPTIONS, Where(bank=str(folder / "bank"))) as session:
        found = session.space.uniform("usq4", 8)
    assert "calibration" not in study.get("space"), "spaces stay what they were"
    return found


def test_a_configuration_that_calibrates_nothing_says_how_images_are_made(config: QuantConfig) -> None:
    assert config.calibration == Calibration.of(PROTOCOL) and not config.uses_images
    silent = replace(config, calibration=None)
    assert silent.digest == config.digest, "digests stay what they were"
    assert silent.sampled_as(Calibration.of(PROTOCOL)) == config
    assert config.sampled_as(Calibration()) == config, "what is said stays"
    aware = silent.with_layer(next(iter(silent.layers)), "usq3h")
    assert aware.sampled_as(Calibration.of(PROTOCOL)) == aware, "its fits are those of the default"
    assert QuantConfig.from_dict(json.loads(config.to_json())) == config


def test_an_artifact_makes_images_as_its_study_did(folder: Path, config: QuantConfig) -> None:
    packing.quantize(str(folder / "pipe"), config, correct="bc", bank=str(folder / "bank")).save(
        folder / "corrected"
    )
    packing.quantize(str(folder / "pipe"), config, bank=str(folder / "bank")).save(folder / "packed")
    found = config_of(load(str(folder / "packed")).unet)
    assert found is not None and found.calibration == Calibration.of(PROTOCOL)
    pipe = load(str(folder / "packed"))
    before = pipe.scheduler
    made = packing.generate(pipe, 2, deterministic=True)
    assert made.shape[-1] == 32 and pipe.scheduler is before
    own = {**ASKED, "resolution": 32}
    told = packing.generate(str(folder / "packed"), 2, deterministic=True, **own)
    assert torch.equal(made, told)
    for name, value in {
        "steps": 2,
        "guidance": 1.0,
        "scheduler": "default",
        "resolution": 16,
        "conditions": PROMPTS[2:],
    }.items():
        other = packing.generate(str(folder / "packed"), 2, deterministic=True, **{name: value})
        assert other.shape != made.shape or not torch.equal(other, made), name
    assert packing.generate(str(folder / "corrected"), 2, deterministic=True).shape == made.shape


def test_quantize_is_told_what_a_configuration_does_not_say(folder: Path, config: QuantConfig) -> None:
    write_json(folder / "silent.json", replace(config, calibration=None, model="").to_dict())
    (folder / "prompts.txt").write_text("\ufeffa cat\n\ntwo dogs\n", encoding="utf-8")
    words = ("quantize", "pipe", "silent.json", "--out", "told", "--correction", "bc")
    assert "give --prompts FILE" in fails(folder, *words)
    how = ("--prompts", "prompts.txt", "--guidance", "3", "--steps", "3", "--scheduler", "euler")
    run(folder, *words, *how, "--resolution", "32")
    found = config_of(load(str(folder / "told")).unet)
    assert found is not None and found.calibration == Calibration.of(PROTOCOL), "and no byte order mark"
    run(folder, "generate", "told", "--images", "2", "--out", "a.png")
    assert (folder / "a.png").stat().st_size > 100


def test_a_search_that_continues_an_older_study_says_it_too(folder: Path, config: QuantConfig) -> None:
    study, where = Study(folder / "s.db"), Where(bank=str(folder / "bank"))
    old = replace(config, calibration=None)
    with open_session(str(folder / "pipe"), study, where=where) as session:
        measured = Measurement(old.digest, session.protocol.digest, {"mse": 1.0}, 1.0)
        study.record(old, measured, "sample", session.costs.totals_of(old))
        usable = Search(session, SearchOptions(Budget(bits=14.3))).usable()
    assert usable == {config.digest: config}

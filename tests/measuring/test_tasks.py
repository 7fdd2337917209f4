"""Tasks: what crosses the pipe of a worker comes back equal; what runs here is never made JSON."""

from __future__ import annotations

import json
import math

import pytest

from aquabit.graph import to_json
from aquabit.measuring import pipe as wire
from aquabit.measuring.evaluator import Evaluator, Measured
from aquabit.measuring.model import open_model
from aquabit.measuring.pools import InlinePool
from aquabit.measuring.tasks import (
    Answer,
    Begin,
    Fit,
    Measure,
    MeasureOutputErrors,
    MeasureSketches,
    MeasureSlopes,
    Portions,
    Probe,
    WorkerFault,
)
from aquabit.measuring.where import Where
from aquabit.pipelines import trace
from aquabit.quality import QualityOptions
from aquabit.quant.bank import Bank
from aquabit.scheme import (
    AquabitError,
    Calibration,
    LayerChoice,
    Measurement,
    Protocol,
    QuantConfig,
    Scheme,
    StepGroups,
)
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(
    images=6, steps=4, eta=1, guidance=2, conditions=("a cat", 3), measures=("tests.m:f=min:0",)
)
CALIBRATION = Calibration(images=4, steps=4, conditions=(1, 2))
GROUPS = StepGroups(4, (0, 2))
CONFIG = QuantConfig(
    "f" * 16,
    {
        "a": LayerChoice(Scheme.parse("usq3h"), (8, 6)),
        "b": LayerChoice(Scheme.parse("aq2x4g8s"), 8, "shared"),
        "c": LayerChoice(Scheme(), 6),
    },
    "model",
    GROUPS,
    "cnc+bc",
    CALIBRATION,
)
TASKS = [
    Measure(CONFIG, PROTOCOL, True),
    MeasureOutputErrors((CONFIG, QuantConfig("g", {})), PROTOCOL, 3),
    MeasureSlopes(CONFIG, PROTOCOL, 1, (0.1, 1e-300, 1 / 3), {"a": ("fp", "usq3h")}),
    Portions(("a", "b"), CALIBRATION, 4),
    MeasureSketches({"a": ("usq3h",), "b": ()}, (8, (6, 8)), PROTOCOL, 8, 4, CONFIG, GROUPS),
    Fit({"a": ("usq3h",)}, CALIBRATION, {"a": ("usq4h",)}),
    Fit({}),
    Probe("a", ("usq3h",), (8, (8, 6)), PROTOCOL, CONFIG, 8, GROUPS),
    Probe("a", ("usq3h",), ("i8", "f8", ("i8", 6)), PROTOCOL, CONFIG, "i8", GROUPS),
]
ANSWERS = [
    Answer(
        Measured(Measurement("c", "p", {"fid": 0.1 + 0.2, "psnr": math.inf}, 1.5, {"torch": "2"}), b"\x89")
    ),
    Answer(Measured(Measurement("c", "p", {}, 1.5, {}, "failed", "non-finite"), None)),
    Answer([{"error": [1e-9], "common": [-0.0], "gain": [3]}]),
    Answer({"a": {"usq3h": {"error": 0.25, "sketch": [0.5], "notes": ["n"]}}}),
    Answer([["a", "b"], ["c"]]),
    Answer(error="wrong"),
    Answer(fault="KeyError: 'x'\nTraceback"),
]


@pytest.mark.parametrize("value", [*TASKS, *ANSWERS], ids=lambda v: type(v).__name__)
def test_what_crosses_the_pipe_comes_back_equal(value) -> None:
    line = wire.text(value)
    again = wire.value(line)
    assert again == value and type(again) is type(value) and "\n" not in line
    assert repr(again) == repr(value), "also in the types of its numbers: 2 and 2.0 have other digests"
    for name in ("config", "protocol", "calibration"):
        if getattr(value, name, None) is not None:
            assert getattr(again, name).digest == getattr(value, name).digest


def test_what_a_worker_is_told_first_comes_back_equal() -> None:
    graph = to_json(trace(tiny_pipeline("unet")))
    begin = Begin("m", graph, "bank", "f", "cuda", "bfloat16", QualityOptions(None, ("clip=/x",), ("m:f",)))
    assert wire.value(wire.text(begin)) == begin


def test_answers_give_results_or_raise() -> None:
    assert Answer([1]).value() == [1] and Answer().value() is None
    with pytest.raises(AquabitError, match="wrong"):
        Answer(error="wrong").value()
    with pytest.raises(WorkerFault, match="KeyError"):
        Answer(fault="KeyError").value()


def test_what_runs_here_is_never_json(dit, tmp_path, monkeypatch) -> None:
    model, protocol = open_model(dit), Protocol(images=2, steps=1, micro_batch=2)
    pool = InlinePool(Evaluator(dit, model.graph, Bank(tmp_path), model.fingerprint))
    config = QuantConfig(model.fingerprint, {}).with_layer(
        next(iter(pool.evaluator.quantized.layers)), "usq4"
    )
    list(pool.run([Measure(QuantConfig(model.fingerprint, {}), protocol)]))
    monkeypatch.setattr(wire, "text", None)
    monkeypatch.setattr(QuantConfig, "from_dict", None)
    monkeypatch.setattr(Protocol, "from_dict", None)
    monkeypatch.setattr(json, "loads", None)
    tasks = [Measure(config, protocol), MeasureOutputErrors((config,), protocol, 0)]
    (first, (measurement, _)), (second, errors) = pool.run(tasks)
    assert (first, second) == (0, 1) and measurement.config == config.digest and len(errors) == 1


def test_where_is_one_place() -> None:
    assert Where().inline and not Where(2).inline and not Where(ray="auto").inline
    for wrong, said in (((0,), "at least 1"), ((2, "cpu", "float32", None, "auto"), "give one of them")):
        with pytest.raises(AquabitError, match=said):
            Where(*wrong)

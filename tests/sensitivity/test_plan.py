"""Plans: what a run would measure and fit is what it then does; peak memory from the meta device."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

import aquabit
from aquabit import memory
from aquabit.graph import layers
from aquabit.measuring.fitting import SCORED
from aquabit.measuring.session import uniform_references
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.tasks import MeasureOutputErrors, run
from aquabit.measuring.where import Where
from aquabit.memory import _Live, activation_bytes, memory_of, peaks
from aquabit.pipelines import trace
from aquabit.quant.bank import Bank
from aquabit.scheme import AquabitError, Calibration, Protocol, QuantConfig, Scheme
from aquabit.sensitivity.plan import Planner, SampleOptions, operations, plan, run_calls
from aquabit.space import make_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(images=4, steps=1, micro_batch=4)
SPACE = {"schemes": ["usq2", "usq4", "usq3h"]}


def test_a_plan_is_what_is_then_done(tmp_path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "pipe")
    pipe, bank = str(tmp_path / "pipe"), str(tmp_path / "bank")
    given = {"protocol": PROTOCOL, "space": SPACE, "bank": bank, "damages": "probes"}
    values = MeasureOptions(PROTOCOL, SPACE, damages="probes"), Where(bank=bank)
    before, more = (plan(pipe, None, SampleOptions(n), *values) for n in (2, 4))
    study = Study(tmp_path / "s.db")
    assert measure(pipe, study, 2, **given) == before.measurements < more.measurements
    uniform = (
        "usq2h",
        "usq4h",
        "usq8",
    )  # references of schemes that are not in the space: fitted when they are measured
    files = Bank(bank).folder.glob("*.safetensors")
    fits = [
        p
        for p in files
        if p.name.split("-")[1].startswith("usq") and not p.name.split("-")[1].startswith(uniform)
    ]
    assert before.fits == len(fits)
    assert before.probes == len(study.features())
    written = sum(p.stat().st_size for p in fits)
    assert 0.8 < before.bank_bytes / written < 1.25
    after = plan(pipe, study, SampleOptions(4), *values)
    assert (after.measurements, after.known, after.fits, after.probes, after.bank_bytes) == (
        more.measurements - before.measurements,
        before.measurements,
        0,
        0,
        0,
    )
    assert (
        after.measuring_seconds > 0 == after.probing_seconds
        and len(study.measurements()) == before.measurements
    )
    shards = [plan(pipe, None, SampleOptions(4, shard=f"{i}/2"), *values).measurements for i in (1, 2)]
    assert sum(shards) == more.measurements + 7, (
        "full precision and six uniform references are measured by both"
    )


def test_a_plan_by_gradients_does_not_grow_with_layers_and_schemes(tmp_path) -> None:
    pipe, values = tiny_pipeline("dit"), (Where(bank=str(tmp_path / "bank")),)
    given = MeasureOptions(PROTOCOL, {"schemes": ["usq4", "usq3", "usq2"], "activations": [8]})
    by_probes = plan(pipe, None, SampleOptions(0), replace(given, damages="probes"), *values)
    found = plan(pipe, None, SampleOptions(0), given, *values)
    assert (found.probes, found.backward_passes) == (SCORED, 2 * 4 * PROTOCOL.steps)
    assert by_probes.backward_passes == 0 and by_probes.probes > 30
    planner = Planner(pipe, None, given, *values)
    planner.units = replace(planner.units, few=0.01, backward=1.0)
    assert planner.measuring(SampleOptions(0)).probing_seconds == pytest.approx(
        found.backward_passes + 0.01 * SCORED * PROTOCOL.steps
    )
    assert planner.measuring(SampleOptions(0)).backward_passes == found.backward_passes
    with pytest.raises(AquabitError, match="must be probes or gradients"):
        plan(pipe, None, SampleOptions(0), replace(given, damages="x"), *values)


def test_calls_of_a_run_are_those_of_its_parts() -> None:
    graph = trace(tiny_pipeline("dit"))
    space = make_space(graph, "0" * 16, schemes=["usq4", "usq2"])
    given, sample = replace(PROTOCOL, images=4, steps=3), SampleOptions(7)
    calls = run_calls(space, given, sample, 5)
    measurements = 1 + len(uniform_references(space)) + 7
    assert calls["sample"] == measurements * 4 * 3 and calls["fits"] == 0 and min(calls.values()) == 0
    guided = run_calls(space, replace(given, guidance=2.0), sample, 5)
    corrected = run_calls(replace(space, correction="cnc"), given, sample, 5)
    assert guided == {part: 2 * count for part, count in calls.items()}
    assert corrected["search"] == 2 * calls["search"] and corrected["gradients"] == calls["gradients"]
    assert run_calls(space, given, sample, 6)["checks by swaps"] > calls["checks by swaps"]
    calibrated = make_space(graph, "0" * 16, schemes=["usq4h"], calibration=Calibration.of(given))
    assert run_calls(calibrated, given, sample, 5)["fits"] == 3 * 64 * 3
    assert operations(calls, 10) == 20 * sum(calls.values())


def test_live_tensors_are_counted_while_they_live() -> None:
    x = torch.empty(1000, device="meta")
    with _Live({x.untyped_storage()._cdata}) as live:
        y = x + 1
        z = y.view(10, 100) * 2  # a view is no new memory
        assert live.now == live.peak == 8000
        del y
        w = z + 1
        assert live.now == 8000 == live.peak
        del z, w
    assert (live.now, live.peak) == (0, 8000)


def test_peaks_grow_with_what_they_are_made_of(monkeypatch) -> None:
    graph = trace(tiny_pipeline("dit"))
    found = {(p.task, p.dtype): p for p in peaks(graph, micro_batch=8)}
    twice = {(p.task, p.dtype): p for p in peaks(graph, micro_batch=8, guided=True, others=1000)}
    weights = sum(prod(n["shape"]) for n in layers(graph).values())
    for task in ("measure", "run packed"):
        one, two = found[task, "float32"].parts, twice[task, "float32"].parts
        assert (
            two["activations"]
            == 2 * one["activations"]
            == 2 * 2 * found[task, "bfloat16"].parts["activations"]
            > 8 * activation_bytes(graph)
        )
        assert two["other networks"] == 4000
    assert found["measure", "float32"].parts["decoded weights"] == 4 * weights
    codes = sum(sum(Scheme.parse("usq4").stored_bytes(tuple(n["shape"]))) for n in layers(graph).values())
    assert 2 * codes in found["run packed", "float32"].parts.values()
    others = graph.graph["other_elements"]
    assert found["quantize", "float32"].parts["small weights"] == 4 * (weights + others)
    monkeypatch.setattr(memory, "LARGE", 1)
    (peak,) = [p for p in peaks(graph, 8) if (p.task, p.dtype) == ("quantize", "float32")]
    assert peak.parts["small weights"] == 4 * others, "the others lie in files"
    assert activation_bytes(graph) >= 4 * max(n["tokens"] * n["shape"][0] for n in layers(graph).values())


def test_what_does_not_fit_is_refused_before_it_is_taken(tmp_path, monkeypatch) -> None:
    graph, large = trace(tiny_pipeline("dit")), replace(PROTOCOL, micro_batch=4096)
    (peak,) = [p for p in peaks(graph, 4096) if (p.task, p.dtype) == ("measure", "float32")]
    monkeypatch.setattr(memory, "memory_of", lambda device: peak.total)
    memory.check_measuring(graph, large, "cpu")
    with pytest.raises(AquabitError, match=r"takes about"):
        memory.check_measuring(graph, large, "cpu", gradients=True)
    with pytest.raises(AquabitError, match=r"4096 images .* in 2 processes, there are .* --workers to 1"):
        memory.check_measuring(graph, large, "cpu", workers=2)
    monkeypatch.setattr(memory, "memory_of", lambda device: peak.total - 1)
    with pytest.raises(AquabitError, match=r"--micro-batch to 2048 or use --dtype bfloat16"):
        memory.check_measuring(graph, large, "cpu")
    with pytest.raises(AquabitError, match=r"use a machine with more memory$"):
        memory.check_measuring(graph, large, "cpu", bound=True)  # the protocol of a study stays
    monkeypatch.setattr(memory, "memory_of", lambda device: 1 << 20)
    with pytest.raises(AquabitError, match=r"there are 0.0 GB; use a machine with more memory$"):
        memory.check_measuring(graph, large, "cpu")
    with pytest.raises(AquabitError, match=r"takes about"):
        aquabit.measure(tiny_pipeline("dit"), Study(tmp_path / "s.db"), 1, protocol=large)
    monkeypatch.setattr(memory, "memory_of", lambda device: 24 * 64 * 64 * 10)
    memory.check_images(10, (64, 64))
    with pytest.raises(AquabitError, match=r"11 images of 64 x 64 pixels .* --images"):
        memory.check_images(11, (64, 64))
    with pytest.raises(AquabitError, match=r"100000 images of 8 x 8 pixels"):
        aquabit.generate(tiny_pipeline("dit"), 100_000, steps=1)
    assert 1 << 28 < memory_of("cpu") < 1 << 45


def test_memory_that_does_not_suffice_says_what_to_lower() -> None:
    class Full:
        def __init__(self, error: Exception):
            self.error = error

        def output_errors(self, *_: object) -> None:
            raise self.error

    task = MeasureOutputErrors((QuantConfig("f", {}),), PROTOCOL, 0)
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        with pytest.raises(AquabitError, match=r"ran out of memory .* --micro-batch"):
            run(task, Full(error))
    with pytest.raises(RuntimeError, match="shapes"):
        run(task, Full(RuntimeError("shapes differ")))

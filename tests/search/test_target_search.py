"""Targets through the verbs, on the smallest model there is: what is measured and what a search returns can
be deployed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aquabit import workflows as flow
from aquabit.cost import CostModel
from aquabit.graph import LayerGraph
from aquabit.measuring.where import Where
from aquabit.pipelines import trace
from aquabit.scheme import FP, AquabitError, Budget, LayerChoice, Protocol, QuantConfig, Scheme
from aquabit.search import fresh_front
from aquabit.search.search import Search
from aquabit.search.search_options import SearchOptions
from aquabit.space import SearchSpace, make_space, narrowed
from aquabit.study import Study
from tests.conftest import tiny_pipeline

PROTOCOL = Protocol(images=4, steps=2, micro_batch=4, objective="psnr")
SPACE: dict[str, Any] = {"schemes": ["usq2", "usq4", "vq3"], "activations": [8]}


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[None]:
    """No timing of packed calls, which nothing here depends on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh_front, "packed_latencies", lambda here, configs, *_: [1.0] * len(configs))
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Study, Path]:
    """A tiny model and its study of no target."""
    folder, pipe = tmp_path_factory.mktemp("targets"), tiny_pipeline("dit")
    study, given = Study(folder / "s.db"), {"protocol": PROTOCOL, "space": SPACE}
    flow.measure(pipe, study, 6, design="random", bank=str(folder / "bank"), **given)  # type: ignore[arg-type]
    return pipe, study, folder


def test_a_search_returns_what_its_target_holds(begun: tuple[Any, Study, Path]) -> None:
    pipe, study, folder = begun
    space = SearchSpace.from_dict(study.get("space"))
    rival = space.uniform("vq3", 16)
    bits = CostModel(trace(pipe), space)(rival).bits_per_weight
    asked = SearchOptions(Budget(bits=bits), rounds=0, against=[("rival", rival)], front=0)
    where = Where(bank=str(folder / "bank"))
    said: list[str] = []
    front = flow.search(study, asked, where, target="sdnq", pipe=pipe, told=said.append)
    held = {Scheme.parse(s) for s in ("usq2", "usq4", "fp")}
    for member in front.members:
        assert {c.weight for c in member.config.layers.values()} <= held
        assert {c.act for c in member.config.layers.values()} == {16}
    rivals = front.comparison["against"]
    assert [r["name"] for r in rivals] == ["rival"], "compared, though it cannot be the answer"
    assert front.best.digest != rivals[0]["config"]
    assert SearchSpace.from_dict(study.get("space")) == space, "the study stays what it was"


def _deployable(graph: LayerGraph, space: SearchSpace, config: QuantConfig) -> bool:
    session = SimpleNamespace(space=space, model=SimpleNamespace(graph=graph))
    return Search.deployable(SimpleNamespace(session=session), config)  # type: ignore[arg-type]


def test_what_a_target_cannot_hold_is_never_the_answer() -> None:
    graph = trace(tiny_pipeline("dit"))
    every = make_space(graph, "f", schemes=["usq2", "usq4", "vq3"], tied=[["*.to_q", "*.to_k"]])

    deployable = partial(_deployable, graph)
    good, of_sdnq = every.uniform("usq4", 16), narrowed(every, graph, "sdnq")
    ours, torn = every.uniform("vq3", 16), good.with_layer(every.tied[0][1], "usq2")
    rounded = every.uniform("usq4", 8)  # activations, which SDNQ leaves as they are
    assert [deployable(every, c) for c in (good, ours, torn, rounded)] == [True, True, False, True]
    assert [deployable(of_sdnq, c) for c in (good, ours, torn, rounded)] == [True, False, False, False]


def test_a_target_of_which_nothing_was_measured_is_an_error(begun: tuple[Any, Study, Path]) -> None:
    pipe, study, folder = begun
    before = len(study.measurements(failed=True))
    with pytest.raises(
        AquabitError, match=r"no layer can hold for gguf any of usq2, usq4, vq3 .*--target gguf"
    ):
        flow.find(study, 8.0, target="gguf", pipe=pipe, bank=str(folder / "bank"))
    assert len(study.measurements(failed=True)) == before
    with pytest.raises(AquabitError, match="the target 'onnx' is unknown"):
        flow.find(study, 8.0, target="onnx", pipe=pipe, bank=str(folder / "bank"))


def test_a_rival_that_breaks_a_tie_is_refused(tmp_path: Path) -> None:
    pipe, study = tiny_pipeline("dit"), Study(tmp_path / "s.db")
    tied = {"schemes": ["usq2", "usq4"], "activations": [8], "tied": [["*.to_q", "*.to_k", "*.to_v"]]}
    options: dict[str, Any] = {"bank": str(tmp_path / "bank"), "protocol": PROTOCOL, "space": tied}
    assert flow.measure(pipe, study, 5, design="random", **options) > 5
    space = SearchSpace.from_dict(study.get("space"))
    assert space.tied and all(space.broken_tie(c) is None for c in study.configs().values())
    torn = space.uniform("usq4").with_layer(space.tied[0][1], "usq2")
    for configs in ([torn], [space.uniform("usq2"), torn]):
        with pytest.raises(AquabitError, match="tied layers must have the same scheme"):
            flow.measure(pipe, study, configs=configs, **options)
    with pytest.raises(AquabitError, match="tied layers must have the same scheme"):
        flow.find(study, 4.0, against=[torn], pipe=pipe, bank=options["bank"])
    odd, before = space.uniform("usq4").with_layer(space.layers[0], "int4g7"), len(study.measurements())
    with pytest.raises(AquabitError, match=rf"^layer '{space.layers[0]}' cannot be int4g7"):
        flow.measure(pipe, study, configs=[odd], **options)
    with pytest.raises(AquabitError, match=rf"given 1: layer '{space.layers[0]}' cannot be int4g7"):
        flow.find(study, 4.0, against=[odd], pipe=pipe, bank=options["bank"])
    assert len(study.measurements()) == before


def test_a_study_keeps_to_its_target(tmp_path: Path) -> None:
    pipe, study = tiny_pipeline("dit"), Study(tmp_path / "s.db")
    options: dict[str, Any] = {"bank": str(tmp_path / "bank"), "protocol": PROTOCOL}
    space = {"schemes": ["usq2", "vq3", "int8"]}
    flow.measure(pipe, study, 3, design="random", space=space, target="sdnq", **options)
    stored = SearchSpace.from_dict(study.get("space"))
    assert stored.target == "sdnq" and {str(s) for s in stored.schemes} == {"fp", "usq2", "int8"}
    configs: list[QuantConfig] = list(study.configs().values())
    assert all(c.act == 16 for config in configs for c in config.layers.values())
    assert flow.measure(pipe, study, 4, design="random", target="sdnq", **options) == 1, "it continues"
    for again in (
        lambda: flow.measure(pipe, study, 4, target="gguf", **options),
        lambda: flow.find(study, 8.0, target="gguf", pipe=pipe, bank=options["bank"]),
    ):
        with pytest.raises(
            AquabitError, match="was begun for the target sdnq, not gguf; use that, or another"
        ):
            again()


def test_what_a_target_computes_otherwise_wins_only_in_a_study_begun_with_it() -> None:
    """ComfyUI rounds the inputs of int8 layers; spaces of earlier versions have int8 beside a16."""
    graph = trace(tiny_pipeline("dit"))
    of_now = make_space(graph, "f", schemes=["int8", "fp8"], target="comfy")
    rounding = make_space(graph, "f", schemes=["int8"], activations=["i8"], target="comfy")
    held = {name for name, row in rounding.choices.items() if row != (FP,)}
    assert held and all(Scheme.parse("int8") not in of_now.choices[name] for name in held)
    before = replace(of_now, choices=rounding.choices)
    for act, wins in ((16, [False, False, True]), ("i8", [True, True, True])):
        chosen = {k: LayerChoice(Scheme.parse("int8"), act) for k in held}
        config = QuantConfig("f", chosen)
        assert [_deployable(graph, space, config) for space in (of_now, rounding, before)] == wins, act

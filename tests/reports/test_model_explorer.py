"""The files for Model Explorer: every edge and every value is of a node, colours run from one end to the
other, and what the study does not hold is not written."""

from __future__ import annotations

from pathlib import Path

import pytest

from aquabit.jsonio import read_json
from aquabit.reports import facts as facts_of
from aquabit.reports import report
from aquabit.reports.model_explorer import GRAPH, HARMLESS, _colours, explorer_files
from aquabit.study import Study
from tests.pages import EVIL, Synthetic


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Synthetic(tmp_path_factory.mktemp("explorer") / "S.db", names=EVIL, model="m").whole().study


def test_graph_and_values_are_of_the_same_nodes(study: Study, tmp_path: Path) -> None:
    page = report(study, tmp_path / "out")
    [graph] = read_json(page.parent / "data/model-explorer.json")
    nodes = {n["id"]: n for n in graph["nodes"]}
    facts = facts_of.read(study)
    assert facts.graph is not None and facts.sensitivity is not None
    assert set(nodes) == set(facts.graph.nodes) and graph["id"] == GRAPH
    edges = {(e["sourceNodeId"], n) for n, node in nodes.items() for e in node["incomingEdges"]}
    assert edges == set(facts.graph.edges) and edges
    for name, node in nodes.items():
        assert "/".join([*node["namespace"].split("/"), node["label"]]).lstrip("/") == name.replace(".", "/")
    effects = read_json(page.parent / "data/model-explorer-effects.json")[GRAPH]
    told = facts.sensitivity.layers.set_index("name").effect.dropna()
    assert {k: v["value"] for k, v in effects["results"].items()} == pytest.approx(told.to_dict())
    schemes = read_json(page.parent / "data/model-explorer-schemes.json")[GRAPH]["results"]
    winner = facts.winner()
    assert winner is not None and set(schemes) == set(winner.layers) <= set(nodes)


def test_colours_are_white_at_no_effect() -> None:
    stops = _colours({"a": -1.0, "b": 3.0})["gradient"]
    assert [s["stop"] for s in stops] == [0.0, 0.25, 1.0] and stops[1]["bgColor"] == HARMLESS
    assert _colours({"a": 0.0, "b": 3.0})["gradient"][0]["bgColor"] == HARMLESS
    assert _colours({"a": -2.0, "b": -1.0})["gradient"][1]["bgColor"] == HARMLESS


def test_an_empty_study_has_no_such_files(tmp_path: Path) -> None:
    assert set(explorer_files(facts_of.read(Study(tmp_path / "S.db"))).values()) == {None}

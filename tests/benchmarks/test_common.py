"""What the benchmarks share: result files, studies, numbers; and that the tables in the repository are those
of the JSON beside them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from aquabit.measuring.session import open_session
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.scheme import Protocol
from aquabit.stats import Interval
from aquabit.study import Study
from benchmarks import common
from tests.conftest import tiny_pipeline

TABLES = {
    "activations": "markdown",
    "additive": "markdown",
    "comfyui": "markdown",
    "correction": "markdown",
    "effects": "table",
    "export_files": "markdown",
    "exports": "markdown",
    "families": "markdown",
    "fashion": "text",
    "flow": "markdown",
    "peers": "markdown",
    "picture": "text",
    "rivals": "markdown",
    "searchers": "table",
    "searches": "table",
    "step_bits": "markdown",
    "surrogate": "table",
    "targets": "text",
    "terrain": "text",
    "truth": "table",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_json_beside_them(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    found = common.read(common.RESULTS / f"{name}.json")
    assert getattr(module, TABLES[name])(found) == (common.RESULTS / f"{name}.md").read_text()


def test_undefined_numbers_are_null_and_others_keep_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    common.write(path, {"a": [float("nan"), 1 / 3, np.float64("inf")], "b": (1, "x", None, True)})
    assert json.loads(path.read_text()) == {"a": [None, 1 / 3, None], "b": [1, "x", None, True]}
    assert common.plain({"a": [1 / 3, float("-inf")], "n": 1234567}, 6) == {
        "a": [0.333333, None],
        "n": 1234567,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert common.read(path)["b"] == [1, "x", None, True]
    assert common.read(tmp_path / "y.json") == {} and common.read(tmp_path / "y.json", [1]) == [1]


def test_parts_add_to_what_others_found(tmp_path: Path) -> None:
    made: list[str] = []

    def part(name: str) -> list[dict[str, str]]:
        made.append(name)
        return [{"of": name}]

    parts = {name: lambda name=name: part(name) for name in ("one", "two")}

    def text(found: dict[str, list[dict[str, str]]]) -> str:
        return " ".join(r["of"] for name in ("one", "two") for r in found.get(name, []))

    common.run_parts("x", parts, ["two"], text, tmp_path)
    assert made == ["two"] and (tmp_path / "x.md").read_text() == "two"
    common.run_parts("x", parts, ["all"], text, tmp_path)
    found = common.read(tmp_path / "x.json")
    assert made == ["two", "one", "two"] and (tmp_path / "x.md").read_text() == "one two"
    assert found["command"] == "python benchmarks/x.py all" and found["machine"]["cores"] >= 1


def test_rows_of_other_models_stay() -> None:
    first, second = common.MODELS
    old = [{"model": second, "n": 1}, {"model": first, "n": 2}]
    assert common.replaced(old, [{"model": second, "n": 3}], [second]) == [
        {"model": first, "n": 2},
        {"model": second, "n": 3},
    ]


def test_intervals_and_their_words() -> None:
    low, high = 2 - 4.302652729749464 / 3**0.5, 2 + 4.302652729749464 / 3**0.5  # t quantile of 2 degrees
    assert common.mean([1.0, 2.0, 3.0]) == pytest.approx([2.0, low, high])
    assert common.difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx([2.0, low, high])
    assert common.spans([1.0, -0.25, 1.5], 1) == "1.0 (-0.2 to 1.5)"
    assert common.spans(Interval(1.0, -0.25, 1.5), sign="+") == "+1.00 (-0.25 to +1.50)"


def test_a_study_starts_as_a_copy_and_keeps_its_space(tmp_path: Path) -> None:
    model, base, path = tmp_path / "model", tmp_path / "base.db", tmp_path / "copy.db"
    tiny_pipeline("dit").save_pretrained(model)
    space = {"schemes": ["usq2", "usq4"], "activations": [8], "levels": []}
    with open_session(
        str(model),
        Study(base),
        MeasureOptions(protocol=Protocol(images=4, steps=2), space=space),
        Where(bank=str(tmp_path / "bank")),
    ) as session:
        schemes = session.space.schemes
    with common.open_study(path, str(model), workers=1, space={"schemes": ["usq8"]}, base=base) as session:
        assert session.space.schemes == schemes and session.protocol.images == 4
        configs = {"4": session.space.uniform("usq4"), "2": session.space.uniform("usq2")}
        protocols = [session.protocol.block(b) for b in (1, 2)]
        found = common.measured_blocks(session, configs, protocols, ["mse"])
        assert all(a > b for a, b in zip(found["2"]["mse"], found["4"]["mse"], strict=True))
        assert common.values_of(session.study, ["mse"])[configs["4"].digest, protocols[1].digest] == {
            "mse": found["4"]["mse"][1]
        }
    assert len(Study(base).measurements()) == 0 and len(Study(path).measurements()) == 6

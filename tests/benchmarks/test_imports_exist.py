"""Benchmarks, examples and the zoo run by hand: every name that they import from us is there, those inside
functions too."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("aquabit", "benchmarks", "tests")
FILES = sorted(p for folder in ("benchmarks", "examples", "zoo") for p in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import from us; None where it is the module itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.split(".")[0] in OURS)


def exists(module: str, name: str | None) -> bool:
    try:
        found = importlib.import_module(module)
        if name is not None and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:  # of another package: an optional one, which says nothing of ours
        return str(error.name).split(".")[0] not in OURS
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_that_are_imported_exist(path: Path) -> None:
    missing = [f"{m}: {n}" for m, n in imported(path.read_text()) if not exists(m, n)]
    assert not missing


def test_a_missing_name_is_found() -> None:
    source = (
        "import aquabit.stats\nimport json\n\n"
        "def f():\n    from aquabit.stats import Interval, gone\n    from aquabit import search\n"
    )
    assert [(m, n) for m, n in imported(source) if not exists(m, n)] == [("aquabit.stats", "gone")]
    assert len(list(imported(source))) == 4
    assert not exists("aquabit.gone", None) and not exists("aquabit.stats", "mean")

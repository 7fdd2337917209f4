"""Modules import only what stands below them, and form no circles; checked over the source, so that imports
inside a function and those for types alone count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parent.parent / "aquabit"

# Each may import only what stands below it (shared/DESIGN.md, section 1).
SUBJECTS = {"scheme_kinds", "activation_bits", "protocol", "quant_config", "budget"}  # of what scheme exports
VALUES = {
    *SUBJECTS,
    "scheme_record",
    "deployed_kinds",
    "errors",
    "files",
    "jsonio",
    "progress",
    "scheme",
    "stats",
    "runtime",
    "file_memory",
    "maximum_entropy",
    "parts",
    "user_code",
    "inputs",
}
STORES = {*VALUES, "graph", "kernels", "quality", "study", "study_status"}
SPACES = {
    *STORES,
    "layer_formats",
    "ties",
    "tied_groups",
    "targets",
    "target_choices",
    "space",
    "choices",
    "cost",
}
MODELS = {*SPACES, "memory", "quant", "pipelines"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "stats": {"errors"},
    "files": {"errors"},
    "maximum_entropy": set(),
    "jsonio": {"errors", "files"},
    "progress": set(),
    "scheme_record": set(),
    "deployed_kinds": {"scheme_record"},
    "scheme_kinds": {"errors", "scheme_record", "deployed_kinds"},
    "activation_bits": {"errors"},
    "budget": {"errors"},
    "inputs": {"errors"},
    "protocol": {"errors", "jsonio", "inputs"},
    "quant_config": {"errors", "jsonio", "scheme_kinds", "activation_bits", "protocol", "inputs"},
    "scheme": {*SUBJECTS, "errors", "inputs", "jsonio", "progress"},
    "runtime": {"errors"},
    "user_code": {"errors"},
    "parts": set(),
    "file_memory": {"errors", "runtime"},
    "kernels": VALUES,
    "graph": VALUES,
    "quality": VALUES,
    "checksums": set(),
    "study": {*VALUES, "checksums"},
    "study_status": {*VALUES, "study"},
    "layer_formats": VALUES,
    "ties": VALUES,
    "tied_groups": {*VALUES, "ties"},
    "targets": {*VALUES, "ties"},
    "target_choices": {*VALUES, "ties", "targets"},
    "space": {*VALUES, "graph", "layer_formats", "ties", "tied_groups", "targets", "target_choices"},
    "choices": {*VALUES, "graph", "layer_formats", "space"},
    "cost": {*VALUES, "graph", "layer_formats", "space", "choices"},
    "memory": {*VALUES, "graph"},
    "quant": {*VALUES, "graph", "kernels"},
    "pipelines": {*VALUES, "graph", "kernels", "quality", "quant"},
    "exports": {*VALUES, "graph", "kernels", "quant", "targets"},  # what a program takes is said there once
    "packing": {*VALUES, "graph", "kernels", "quality", "memory", "quant", "pipelines"},
    "measuring": MODELS,
    "sensitivity": {*MODELS, "measuring"},
    "search": {*MODELS, "measuring", "sensitivity"},
    "reports": {*MODELS, "measuring", "sensitivity", "search"},
    "within": {*MODELS, "measuring", "sensitivity"},
    "workflows": {*MODELS, "measuring", "sensitivity", "search", "reports", "packing", "exports", "within"},
    "diffusers_hook": {"quant"},
}
PRIVATE = {
    "_operators": "graph",
    "_following": "graph",
    "_inputs": "graph",
    "_meta_values": "graph",
    "_notebook": "scheme",
}  # private modules, and the one they belong to
TOP = {"__init__", "__main__", "cli"}  # may import everything


def part_of(module: str) -> str | None:
    """``aquabit.kernels.fake_quant`` -> ``kernels``; ``aquabit`` -> ``__init__``; None for what is not
    ours."""
    names = module.split(".")
    if names[0] != "aquabit":
        return None
    name = names[1] if len(names) > 1 else "__init__"
    return PRIVATE.get(name, name)


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, full module name) of each import in ``source``."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            # ``from aquabit import cost`` names a module, ``from aquabit.cost import size`` its content: the
            # first two names decide.
            yield from (
                (node.lineno, f"{origin}.{alias.name}" if origin == "aquabit" else origin)
                for alias in node.names
            )
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and not node.args[0].value.startswith("."):
                yield node.lineno, node.args[0].value


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One sentence for each import of ``module`` that points the wrong way."""
    importer = part_of(module)
    assert importer is not None
    if importer in TOP:
        return []
    if importer not in ALLOWED:
        return [f"{module}: {importer} has no place in the table of allowed imports"]
    found = []
    for line, name in imported(source, module, is_package):
        target = part_of(name)
        if target is not None and target != importer and target not in ALLOWED[importer]:
            found.append(
                f"{module}:{line} imports {name}; {importer} may import"
                f" {', '.join(sorted(ALLOWED[importer])) or 'nothing of ours'}"
            )
    return found


def test_the_table_has_no_cycle() -> None:
    placed: set[str] = set()
    while len(placed) < len(ALLOWED):
        ready = {name for name, below in ALLOWED.items() if below <= placed} - placed
        assert ready, set(ALLOWED) - placed
        placed |= ready


def name_of(path: Path) -> str:
    """``aquabit/quant/model.py`` -> ``aquabit.quant.model``; an ``__init__`` has the name of its package."""
    parts = ("aquabit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Groups of modules, by name, that import each other; submodules of an imported package do not count."""
    graph = nx.DiGraph()
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = [f"{node.module}.{alias.name}" for alias in node.names]
                graph.add_edges_from((module, f if f in sources else node.module) for f in found)
            elif isinstance(node, ast.Import):
                graph.add_edges_from((module, alias.name) for alias in node.names)
    return [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]


@pytest.mark.parametrize("package", ["kernels", "quant", "exports"])
def test_modules_form_no_circle(package: str) -> None:
    sources = {name_of(p): p.read_text() for p in (PACKAGE / package).rglob("*.py")}
    assert sources and circles(sources) == []


def test_a_circle_is_seen() -> None:
    inner = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from aquabit.quant.a import A"
    around = {"aquabit.quant.a": "from aquabit.quant import b", "aquabit.quant.b": inner}
    assert circles(around) == [["aquabit.quant.a", "aquabit.quant.b"]]
    assert circles(around | {"aquabit.quant.b": "import torch"}) == []


def test_no_import_is_for_types_alone() -> None:
    """A type that must not be imported is a Protocol. Only the two that may import everything, and must
    start quickly, name types that they load later: the public names of ``aquabit``, and the command line."""
    late = {PACKAGE / "__init__.py", *PACKAGE.glob("cli/*.py")}
    waiting = [p for p in PACKAGE.rglob("*.py") if p not in late]
    assert [name_of(p) for p in waiting if "TYPE_CHECKING" in p.read_text()] == []


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path.read_text(), name_of(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aquabit.scheme", "import aquabit.graph"),
        ("aquabit.scheme", "from aquabit import cost"),
        ("aquabit.graph", "def f():\n    from aquabit.cost import size"),
        ("aquabit.kernels.backends.lut", "from aquabit.quant.usq import fit"),
        ("aquabit.kernels.backends.lut", "from ...quant import usq"),
        ("aquabit.kernels.backends.lut", "from ... import quant"),
        ("aquabit.search.milp", "import numpy, aquabit.reports.page as s"),
        ("aquabit.study", "import importlib\nimportlib.import_module('aquabit.cli.app')"),
        ("aquabit.cost", "from aquabit import load"),
        ("aquabit.cost", "import aquabit"),
        (
            "aquabit.scheme",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from aquabit.graph import LayerGraph",
        ),
        ("aquabit.scheme", "import typing\nif typing.TYPE_CHECKING:\n    import aquabit.cli.app"),
        ("aquabit.newcomer", "import os"),
        ("aquabit._operators", "from aquabit.study import Study"),
    ],
)
def test_the_checker_sees_a_violation(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "aquabit.kernels.backends.lut",
            "from . import fake_quant\nfrom ..scheme import Scheme\nfrom aquabit.kernels import _native",
        ),
        ("aquabit.graph", "from aquabit._operators import TABLE"),
        ("aquabit.cli", "from aquabit.reports.page import write"),
        ("aquabit.search.milp", "import scipy.optimize, graph, quant"),
    ],
)
def test_the_checker_lets_pass_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []

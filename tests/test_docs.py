"""The documentation: pages are current, links resolve, shell lines name verbs and options that exist, Python
blocks compile and name what exists; those marked <!-- run --> are run."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    {
        *ROOT.glob("docs/*.md"),
        *(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "zoo/README.md")),
    }
)
BLOCK = re.compile(r"^(<!-- run -->\n)?```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ROOMS = (
    "aquabit/",
    "benchmarks/",
    "docs/",
    "examples/",
    "tests/",
    "zoo/",
    ".ci/",
    ".github/",
)  # paths of ours
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@cache
def generate() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def commands() -> dict[str, Any]:
    found: dict[str, Any] = generate().commands()
    return found


def blocks(page: Path, *languages: str) -> Iterator[tuple[bool, str]]:
    """Whether it is to be run, and the text, of each fenced block in one of some languages."""
    for run, language, text in BLOCK.findall(page.read_text()):
        if language in languages:
            yield bool(run), text


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and myst make them."""
    heads = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h).lower()) for h in heads]
    return {p.strip().replace(" ", "-") for p in plain}


@pytest.mark.parametrize("path", generate().PAGES, ids=lambda p: p.name)
def test_pages_that_follow_from_program_and_results_are_current(path: Path) -> None:
    """`python docs/generate.py` writes them."""
    assert path.read_text() == generate().PAGES[path](), "run python docs/generate.py"


@by_page
def test_links_resolve(page: Path) -> None:
    """Files exist, anchors are headings; links to other sites are not tried."""
    wrong = []
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        there = file.is_relative_to(ROOT) and file.exists()
        if not there or (anchor and anchor not in slugs(file)):
            wrong.append(target)
    assert not wrong


@by_page
def test_paths_and_variables_that_are_named_exist(page: Path) -> None:
    """Files of the repository in backticks, and environment variables of ours."""
    text = page.read_text()
    named = [n for n in INLINE.findall(text) if n.startswith(ROOMS) and " " not in n and "NAME" not in n]
    assert [n for n in named if not any(ROOT.glob(n.rstrip("/")))] == []
    sources = "".join(p.read_text() for p in (ROOT / "aquabit").rglob("*.py"))
    assert [v for v in set(re.findall(r"AQUABIT_[A-Z_]+", text)) if v not in sources] == []


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of every line in shell blocks, prompts and comments taken off, and of commands in
    backticks."""
    for _, text in blocks(page, "", "sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            yield shlex.split(re.sub(r"^[\w ]*\$ +", "", line), comments=True)
    for text in INLINE.findall(BLOCK.sub("", page.read_text())):
        if text.startswith(("aquabit ", "make ", "python ")):
            with contextlib.suppress(ValueError):
                yield shlex.split(text)


def wrong_in(words: list[str]) -> str | None:
    """What a line names that does not exist: a verb, an option, a target of the Makefile, a script."""
    if words[:1] == ["aquabit"] and len(words) > 1 and words[1].islower() and words[1].isalpha():
        if words[1] not in commands():
            return f"verb {words[1]}"
        known = {o for p in commands()[words[1]].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        unknown = [w for w in words[2:] if w.startswith("--") and w.split("=")[0] not in known]
        return f"{words[1]} {unknown}" if unknown else None
    if words[:1] == ["make"]:
        rules = (ROOT / "Makefile").read_text()
        unknown = [w for w in words[1:] if "=" not in w and not re.search(rf"^{w}:", rules, re.MULTILINE)]
        return f"make {unknown}" if unknown else None
    if words[:1] == ["python"] and words[1].endswith(".py") and not (ROOT / words[1]).exists():
        return words[1]
    return None


@by_page
def test_shell_lines_name_what_exists(page: Path) -> None:
    assert [w for w in map(wrong_in, shell_lines(page)) if w] == []


def test_a_wrong_line_is_seen() -> None:
    """What the test above looks for, in lines that are wrong."""
    assert wrong_in(shlex.split("aquabit mesure x")) and wrong_in(shlex.split("aquabit measure x --studdy s"))
    assert wrong_in(["make", "nothing"]) and wrong_in(["python", "benchmarks/nothing.py"])
    assert wrong_in(shlex.split("aquabit measure x --study s.db --plan")) is None


@by_page
def test_json_blocks_are_json(page: Path) -> None:
    for _, text in blocks(page, "json"):
        assert isinstance(json.loads(text), dict | list), text  # ValueError for what is no JSON


def imported(tree: ast.Module) -> dict[str, Any]:
    """Names that a block imports from us, with their values; ImportError where there is none. What others
    bring is looked up where they are installed."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "aquabit":
                    names[alias.asname or "aquabit"] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = node.module.split(".")[0]
            if package != "aquabit" and importlib.util.find_spec(package) is None:
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(module, alias.name, None) or importlib.import_module(
                    f"{node.module}.{alias.name}"
                )
                if package == "aquabit":
                    names[alias.asname or alias.name] = value
    return names


def resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a dotted name that begins with something of ours; None for all else. AttributeError where
    it names nothing."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = resolved(node.value, names)
        return getattr(inner, node.attr) if inspect.ismodule(inner) or inspect.isclass(inner) else None
    return None


@by_page
def test_python_blocks_compile_and_name_what_exists(page: Path) -> None:
    """Imports, attributes of our modules and classes, and the keywords of calls to them."""
    names: dict[str, Any] = {}
    for _, text in blocks(page, "python"):
        tree = ast.parse(text)
        names |= imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                resolved(node, names)
            if isinstance(node, ast.Call) and callable(called := resolved(node.func, names)):
                keywords = {k.arg: None for k in node.keywords if k.arg}
                inspect.signature(called).bind_partial(*[None] * len(node.args), **keywords)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(run for run, _ in blocks(p, "python"))], ids=lambda p: p.stem
)
def test_marked_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for run, text in blocks(page, "python"):
        if run:
            exec(compile(text, str(page), "exec"), names)


def test_the_readme_is_short_and_every_page_is_found() -> None:
    """At most 150 lines; a picture of at most 200 kB; each page is in the index."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert (ROOT / "docs" / "front.png").stat().st_size <= 200_000
    index = (ROOT / "docs" / "index.md").read_text()
    entries = {
        line.strip()
        for _, text in blocks(ROOT / "docs" / "index.md", "{toctree}")
        for line in text.splitlines()
    }
    pages = {p.stem for p in ROOT.glob("docs/*.md")} - {"index"}
    assert pages <= entries
    assert [p for p in pages if f"({p}.md)" not in index] == []


def test_public_names_have_docstrings() -> None:
    """Each is a section of the Python page, with a first sentence of its own."""
    import aquabit
    from aquabit import kernels

    page = (ROOT / "docs" / "python-api.md").read_text()
    for name in (*aquabit.__all__, *(f"kernels.{n}" for n in kernels.__all__ if n not in aquabit.__all__)):
        assert f"### aquabit.{name}\n" in page

"""Write what the documentation takes from the program and from the benchmarks: docs/cli.md,
docs/python-api.md, and the results between markers in README.md and docs/results.md. ``--picture`` draws
docs/front.png as well.

    python docs/generate.py [--picture] [--check]

``--check`` writes nothing, and exits with 1 where a page is not current; a test does the same.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
WORDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  # what stands for the value of an option
MODELS = ("digits-unet", "digits-dit")
T_OF_5 = 2.776  # Student's t of a 95 % interval of the mean over 5 blocks of seeds
RIVALS = {  # of benchmarks/results/rivals.json -> head of a column
    "modelopt": "ModelOpt `auto_quantize`",
    "modelopt, exact": "its scores, solved exactly",
    "mct": "Sony MCT",
    "aimet": "AIMET AMP",
    "greedy": "greedy by our damages",
}
HARDER = {  # choices in fashion.json, and how they are headed
    "search": "aquabit",
    "modelopt, fisher": "ModelOpt's scores, solved exactly",
    "aimet": "AIMET AMP",
    "greedy": "greedy by our damages",
    "sdnq": "SDNQ's threshold",
    "uniform aq": "one additive level",
    "uniform": "uniform `usq2h`, `usq3h`",
}
BEGIN, END = "<!-- results: written by docs/generate.py -->", "<!-- end of results -->"


def escaped(text: str) -> str:
    """Text whose signs are not taken for Markdown or HTML, code in backticks left alone."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(p if i % 2 else re.sub(r"([<*|])", r"\\\1", p) for i, p in enumerate(parts))


def cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


# The command line


def commands() -> dict[str, Any]:
    """Verb -> command of the program."""
    import typer

    from aquabit.cli.app import app

    return dict(typer.main.get_command(app).commands)


def is_option(parameter: Any) -> bool:
    return str(parameter.opts[0]).startswith("-")


def value_word(parameter: Any, hint: Any) -> str:
    """What stands for the value of an option in a usage line: its metavar, or a word for its type."""
    if parameter.metavar:
        return str(parameter.metavar)
    kinds = [k for k in typing.get_args(hint) or (hint,) if k is not types.NoneType]
    return WORDS.get(kinds[0], "VALUE")


def verb_page(verb: str, command: Any) -> Iterator[str]:
    hints = typing.get_type_hints(command.callback)
    arguments = [p for p in command.params if not is_option(p)]
    options = [p for p in command.params if is_option(p)]
    needed = [f"{p.opts[0]} {value_word(p, hints.get(p.name))}" for p in options if p.required]
    usage = ["aquabit", verb, *(p.metavar or p.name.upper() for p in arguments), *needed, "[options]"]
    yield f"## {verb}\n\n```text\n{' '.join(usage)}\n```\n\n{escaped(inspect.cleandoc(command.help or ''))}\n"
    if arguments:
        yield "| argument | what it is |\n|---|---|"
        yield (
            "\n".join(f"| `{p.metavar or p.name.upper()}` | {cell(p.help or '')} |" for p in arguments) + "\n"
        )
    yield "| option | default | what it does |\n|---|---|---|"
    for p in options:
        flag = isinstance(p.default, bool)
        name = p.opts[0] if flag else f"{p.opts[0]} {value_word(p, hints.get(p.name))}"
        default = "required" if p.required else "" if p.default is None or flag else f"`{p.default}`"
        yield f"| `{cell(name)}` | {default} | {cell(p.help or '')} |"
    yield ""


def cli_page() -> str:
    found = commands()
    lines = [
        "# The command line\n",
        "This page is written by `python docs/generate.py` from the program; `aquabit VERB --help` says the"
        " same.",
        "Three things hold for every verb:\n",
        "- Exit code 0: done. 2: bad usage or bad input, with one line that says what is wrong and what to"
        " do. 1: a fault of ours.",
        "- `--json FILE` writes what people see as JSON, `--json -` to standard output.",
        "- Work that was interrupted, by Ctrl-C or by `kill -9`, continues with the same command. At most the"
        " measurement in flight is lost.\n",
        "| verb | what it does |\n|---|---|",
        *(
            f"| [`{v}`](#{v}) | {cell(escaped((c.help or '').split('. ')[0].rstrip('.')))} |"
            for v, c in found.items()
        ),
        "",
    ]
    for verb, command in found.items():
        lines += verb_page(verb, command)
    return "\n".join(lines).rstrip() + "\n"


# Python


def default_text(value: Any) -> str:
    """A default as people write it."""
    if isinstance(value, types.FunctionType):
        return value.__name__
    return "..." if "factory" in repr(value) or " object at " in repr(value) else repr(value)


def signature_text(name: str, value: Any) -> str:
    """name(parameters) -> what it returns; a parameter a line where it is long."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parts, starred = [], False
    for p in signature.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        if p.kind is p.VAR_KEYWORD and (keywords := unpacked(value, annotation_text(p.annotation))):
            parts += [f"{k}: {annotation_text(v)} = ..." for k, v in keywords.items()]
            continue
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if p.annotation is not p.empty:
            text += f": {annotation_text(p.annotation)}"
        parts.append(text if p.default is p.empty else f"{text} = {default_text(p.default)}")
    known = signature.return_annotation
    end = "" if known is signature.empty or inspect.isclass(value) else f" -> {annotation_text(known)}"
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {p},\n" for p in parts) + f"){end}"


def annotation_text(value: Any) -> str:
    if isinstance(value, typing.ForwardRef):
        return value.__forward_arg__
    return value if isinstance(value, str) else inspect.formatannotation(value)


def unpacked(value: Any, annotation: str) -> dict[str, Any]:
    """The keywords of ``**options: Unpack[Options]`` with their types; none of other annotations."""
    named = re.fullmatch(r"(?:\w+\.)?Unpack\[(\w+)\]", annotation)
    if named is None:
        return {}
    return dict(getattr(sys.modules[value.__module__], named.group(1)).__annotations__)


def members(kind: type) -> Iterator[tuple[str, str, str]]:
    """Name, signature and docstring of the methods and properties that a class itself defines."""
    for name, value in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield name, name, inspect.getdoc(value) or ""
        elif isinstance(value, classmethod | staticmethod | types.FunctionType):
            yield name, signature_text(name, getattr(kind, name)), inspect.getdoc(getattr(kind, name)) or ""


def entry(name: str, value: Any) -> str:
    """One public name: heading, signature, docstring, and members where it is a class."""
    doc = inspect.getdoc(value) or ""
    doc = "" if doc.startswith(f"{name.split('.')[-1]}(") else doc  # what dataclasses write by themselves
    if not (inspect.isclass(value) or callable(value)):
        return f"### {name}\n\nA name for a type: `{value}`.\n"
    lines = [f"### {name}\n\n```text\n{signature_text(name, value)}\n```\n", escaped(doc), ""]
    if inspect.isclass(value):
        for _, signature, text in members(value):
            first = escaped(" ".join(text.split("\n\n")[0].split()))
            lines.append(f"- `{' '.join(signature.split())}`" + (f": {first}" if first else ""))
        lines.append("")
    return "\n".join(lines)


def python_page() -> str:
    import aquabit
    from aquabit import kernels

    lines = [
        "# Python\n",
        "This page is written by `python docs/generate.py` from the docstrings of the public names."
        " Everything else inside the package may change.\n",
        "`AnyModel` is a bundled name, the folder of a diffusers pipeline, a hub id, `module:function`, or a"
        " `Pipeline`: a `DiffusionPipeline`, or an `aquabit.Model` of one's own."
        " `Progress` is a function of (what is done, number done, number in all). `...` stands for a default"
        " that the text explains.\n",
        "`import aquabit` loads little: each name is imported when it is first used. Input that is wrong"
        " raises `aquabit.AquabitError` (a `ValueError`), whose message says what would be right.\n",
        "## aquabit\n",
        *(entry(f"aquabit.{name}", getattr(aquabit, name)) for name in aquabit.__all__),
        "## aquabit.kernels\n",
        *(
            entry(f"aquabit.kernels.{name}", getattr(kernels, name))
            for name in kernels.__all__
            if name not in aquabit.__all__
        ),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


# Results


def searches() -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / "searches.json").read_text())["rows"])


def found_at(rows: list[dict[str, Any]], model: str, side: str, bits: float) -> list[dict[str, Any]]:
    """The rows of a side ("ours", "program") at a budget, one for each seed of the search."""
    return [r for r in rows if r["model"] == model and re.fullmatch(rf"{side} {bits:g}( \d+)?", r["name"])]


def average(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [v for r in rows for v in r.get(key) or ()]
    return mean(values) if values else None


def shown(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def share_of_bytes(model: str, uniform: str = "usq3h") -> str:
    """At what share of a uniform configuration's bytes a found one has its PSNR, as searches.md says."""
    text = (RESULTS / "searches.md").read_text()
    row = re.search(
        rf"\| {model} \| uniform {uniform}, [\d,]+ bytes \| [\d.]+ \| (at most )?[\d,]+ \(([\d.]+) %\)", text
    )
    return (row.group(1) or "") + row.group(2) if row else "?"


def reached(budgets: tuple[float, ...]) -> str:
    """The table of what the search reached, beside what others choose from the same fits."""
    rows, rivals = searches(), json.loads((RESULTS / "rivals.json").read_text())["rows"]
    head = ["model", "bits", "aquabit: PSNR, FID", *RIVALS.values(), "uniform `usq3h`"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for model in MODELS:
        own = {r["name"]: r for r in rows if r["model"] == model}
        uniform = own.get("uniform usq3h", {})
        for bits in budgets:
            ours = found_at(rows, model, "ours", bits)
            others = [
                [r for r in rivals if (r["model"], r["side"], r["target"]) == (model, k, bits)]
                for k in RIVALS
            ]
            cells = [
                f"`{model}`",
                f"{bits:g}",
                f"**{shown(average(ours, 'psnr'))} dB**, {shown(average(ours, 'fid'), 2)}",
                *(f"{shown(average(o, 'psnr'))} dB" if o else "" for o in others),
                f"{shown(average([uniform], 'psnr'))} dB at {uniform.get('bits', 0):.2f} bits",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def harder() -> str:
    """What methods choose on models that lose at 2 and 3 bits, within the bytes of uniform ones."""
    found, head = json.loads((RESULTS / "fashion.json").read_text())["rivals"], list(HARDER.values())
    lines = [f"| model | bits | {' | '.join(head)} |", "|" + "---|" * (len(head) + 2)]
    for model, rows in found.items():
        own = {r["name"]: r for r in rows}
        for budget in ("usq2h", "usq3h"):
            cells = [f"{shown(average([own[f'{k}: {budget}']], 'psnr'))} dB" for k in list(HARDER)[:-1]]
            uniform = f"{shown(average([own[f'uniform {budget}: {budget}']], 'psnr'))} dB"
            bits = own[f"uniform {budget}: {budget}"]["bits"]
            best, *others = cells
            lines.append(f"| `{model}` | {bits:.2f} | **{best}** | {' | '.join([*others, uniform])} |")
    return "\n".join(lines)


def short_results() -> str:
    full = [[r for r in searches() if (r["model"], r["name"]) == (m, "full precision")] for m in MODELS]
    return (
        f"{reached((2.0, 3.0))}\n\n"
        f"Full precision has FID {' and '.join(shown(average(f, 'fid'), 2) for f in full)}."
        f" A found configuration has the PSNR of uniform `usq3h` with {share_of_bytes(MODELS[0])} % (U-Net)"
        f" and {share_of_bytes(MODELS[1])} % (DiT) of its bytes."
    )


def long_results() -> str:
    """PSNR and FID of search and program at every budget that was measured."""
    rows = searches()
    budgets = sorted({float(r["name"].split()[1]) for r in rows if r["name"].startswith("ours ")})
    lines = [
        f"| PSNR, dB (FID) | {' | '.join(f'{b:g} bits' for b in budgets)} |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for model in MODELS:
        for side, name in (("ours", "search"), ("program", "the program alone")):
            found = [found_at(rows, model, side, b) for b in budgets]
            cells = [
                f"{shown(average(f, 'psnr'), 2)} ({shown(average(f, 'fid'), 2)})" if f else "" for f in found
            ]
            lines.append(f"| `{model}`: {name} | {' | '.join(cells)} |")
    more = (
        "The same on a model that loses visibly at 2 and 3 bits, within the bytes of uniform `usq2h` and"
        " `usq3h` ([fashion.md](../benchmarks/results/fashion.md) has intervals, and what held there of the"
        " other claims):"
    )
    return "\n\n".join(["\n".join(lines), short_results(), more, harder()])


def between_markers(path: Path, text: str) -> str:
    """The page with ``text`` between its markers; raises ValueError where it has none."""
    page = path.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} lacks the markers {BEGIN} and {END}")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"


def draw_front(model: str, path: Path) -> None:
    """PSNR of found configurations and of uniform families against bits, as the report draws them."""
    import pandas as pd

    from aquabit.reports import figures, style

    columns = ["group", "label", "family", "config", "bits", "bytes", "value", "low", "high", "level"]
    columns += ["blocks", "frontier"]

    def row(group: str, label: str, family: str, bits: float, blocks: list[float]) -> tuple[Any, ...]:
        value, half = mean(blocks), T_OF_5 * stdev(blocks) / len(blocks) ** 0.5
        ends = (value - half, value + half, "95 %")
        return (group, label, family, "", bits, 0, value, *ends, len(blocks), False)

    rows = [r for r in searches() if r["model"] == model]
    table = []
    for name in dict.fromkeys(r["name"].rsplit(" ", 1)[0] for r in rows if r["name"].startswith("ours ")):
        seeds = [r for r in rows if r["name"].startswith(f"{name} ")]
        blocks = [mean(values) for values in zip(*(r["psnr"] for r in seeds), strict=True)]
        table.append(row("found", "found", "", mean(r["bits"] for r in seeds), blocks))
    for r in rows:
        if r["name"].startswith("uniform ") and r["bits"] < 4.5:
            additive = "additive" in r["name"]
            label = "aq" if additive else r["name"].split()[1]
            table.append(row("uniform", label, "aq" if additive else "usq h", r["bits"], r["psnr"]))
    with style.use():
        figure, axes = style.canvas(style.DOUBLE, 3.0)
        figures.quality_vs_bits(pd.DataFrame(table, columns=columns), axes, "PSNR", "max")
        figure.savefig(path, dpi=170, metadata={"Software": None})


PAGES: dict[Path, Callable[[], str]] = {
    DOCS / "cli.md": cli_page,
    DOCS / "python-api.md": python_page,
    DOCS / "results.md": lambda: between_markers(DOCS / "results.md", long_results()),
    ROOT / "README.md": lambda: between_markers(ROOT / "README.md", short_results()),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", action="store_true", help="draw docs/front.png as well")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page is not current")
    given = parser.parse_args()
    old = []
    for path, make in PAGES.items():
        text = make()
        if not path.exists() or path.read_text() != text:
            old.append(path.relative_to(ROOT))
            if not given.check:
                path.write_text(text)
    if given.picture:
        draw_front(MODELS[0], DOCS / "front.png")
    print("\n".join(f"{'not current' if given.check else 'written'}: {p}" for p in old) or "all current")
    return 1 if given.check and old else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())

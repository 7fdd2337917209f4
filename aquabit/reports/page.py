"""The page: one HTML file that shows the figures and tables of a study, offline, and says what is still
missing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from aquabit.files import write_text
from aquabit.jsonio import write_json
from aquabit.reports import drawing, style, svg, words
from aquabit.reports.answer import answer
from aquabit.reports.catalog import all_tables, plans
from aquabit.reports.facts import Facts, read, require_metric
from aquabit.reports.lacks import Lacks, missing
from aquabit.reports.model_explorer import explorer_files
from aquabit.reports.plan import Plan, Tables
from aquabit.reports.subjects.measurements import run_card
from aquabit.reports.subjects.pictures import Images, images
from aquabit.reports.writing import write
from aquabit.scheme import AquabitError, Progress, no_progress
from aquabit.scheme_kinds import uniform_name
from aquabit.study import Study

TEMPLATES = Path(__file__).parent / "templates"
FOLDERS = ("figures", "tables", "data")
DATA = {  # what machines read
    "config.json": "the chosen configuration",
    "front.json": "the front",
    "sensitivity.json": "effects of layers and the surrogate's scores",
    "model-explorer.json": "the layer graph, for Model Explorer",
    "model-explorer-effects.json": "effects on it",
    "model-explorer-schemes.json": "chosen schemes on it",
}
PAIRS_MOST = 8  # interactions of one layer that the page lists


@dataclass(frozen=True)
class Shown:
    """A figure as the template takes it; without ``svg`` the reason is in ``missing``, and without both
    nothing is said."""

    name: str
    section: str
    table: str
    caption: str
    size: tuple[float, float] = (0.0, 0.0)  # inches
    svg: Markup | None = None
    missing: tuple[str, str] | None = None

    @property
    def wide(self) -> bool:
        return self.size[0] > 1.5 * style.SINGLE

    @property
    def pixels(self) -> int:
        """About how high it stands on the page, with its caption: what is not in sight is laid out by
        that."""
        return round(120 * self.size[1] + 75)


def report(study: Study, out: str | Path, progress: Progress = no_progress) -> Path:
    """Write ``out``/index.html (one file, no network), ``out``/figures (PDF, SVG, PNG), ``out``/tables (CSV,
    LaTeX) and ``out``/data (JSON).

    Returns the page's path. What the study does not hold yet is named on the page with the command that makes
    it. Raises AquabitError where ``out`` cannot be written or a stored fact is damaged.
    """
    out = Path(out)
    facts = read(study)
    require_metric(facts)
    found, lacks = all_tables(facts), missing(facts)
    if found["quality_vs_bits"].value.notna().sum() == 0:
        lacks["points"] = lacks.get("samples", ("Nothing was measured.", ""))
    if found["chosen_schemes"].empty:
        lacks.setdefault("winner", lacks.get("graph", ("The winner is not stored.", "")))
    wanted = list(plans(facts, found))
    shown, places = [], {name: i for i, name in enumerate(found["layers"].layer)}
    page = out / "index.html"
    try:
        make_folders(out)
        for name, table in found.items():
            write(table, out / "tables", name)
        for i, plan in enumerate(wanted):
            progress("report", i, len(wanted) + 1)
            shown.append(draw(plan, found[plan.table], lacks, out / "figures", places))
        progress("report", len(wanted), len(wanted) + 1)
        pictures, files = images(facts, out / "figures"), write_data(facts, out / "data")
        write_text(page, _render(facts, found, lacks, shown, pictures, files))
    except OSError as error:
        raise AquabitError(f"the report could not be written to {out}: {error.strerror or error}") from error
    progress("report", len(wanted) + 1, len(wanted) + 1)
    return page


def make_folders(out: Path) -> None:
    """The folders of a report; raises AquabitError where others' files stand in the place of its own."""
    page = out / "index.html"
    ours = page.exists() and b"aquabit" in page.read_bytes()
    others = [file for file in (page, *(out / "data" / name for name in DATA)) if file.exists()]
    if others and not ours:
        raise AquabitError(
            f"{others[0]} is no report of aquabit and would be overwritten; choose another folder"
        )
    for name in FOLDERS:
        (out / name).mkdir(parents=True, exist_ok=True)
    if not ours:  # a run that is killed now continues
        write_text(page, "<!doctype html><title>aquabit: this report is being written</title>\n")


def write_data(facts: Facts, folder: Path) -> list[str]:
    """What machines read: the winner as config.json, front.json, sensitivity.json, and the graph and its
    effects for Model Explorer, as far as they are there; their names."""
    winner = facts.winner()
    files = {
        "config.json": winner.to_dict() if winner else None,
        "front.json": facts.front.to_list() if facts.front else None,
        "sensitivity.json": facts.sensitivity.to_dict() if facts.sensitivity else None,
        **explorer_files(facts),
    }
    for name, value in files.items():
        (folder / name).unlink(missing_ok=True)  # of a report that was written here before
        if value:
            write_json(folder / name, value)
    return [name for name, value in files.items() if value]


def draw(plan: Plan, table: pd.DataFrame, lacks: Lacks, folder: Path, places: Mapping[str, int]) -> Shown:
    """The files of one figure, and the figure as an element of the page; points of layers carry their row
    in ``places``."""
    if plan.needs in lacks or table.empty:
        for old in folder.glob(f"{plan.name}.*"):  # of a report that was written here before
            old.unlink()
        reason = None if plan.optional else lacks.get(plan.needs, ("There is nothing to draw.", ""))
        return Shown(plan.name, plan.section, plan.table, plan.caption, missing=reason)
    size = plan.size(table)
    with style.use():
        canvas, axes = style.canvas(*size)
        plan.draw(table, axes)
        text = style.save(canvas, folder, plan.name)
    drawn = svg.inline(text, style.named_points(canvas), plan.name, plan.caption, places)
    return Shown(plan.name, plan.section, plan.table, plan.caption, size, drawn)


def page_data(facts: Facts, found: Tables) -> Markup:
    """What the page's script shows of layers, as JSON that may stand in a script element: rows as
    ``tables.layers`` has them, and of each the numbers by scheme and its strongest interactions."""
    layers, by_scheme = found["layers"], found["layer_schemes"]
    schemes = list(dict.fromkeys(by_scheme.scheme))
    column = {s: j for j, s in enumerate(schemes)}
    parts: dict[str, dict[str, list[Any]]] = {}
    for r in by_scheme.itertuples():
        row = parts.setdefault(
            r.layer, {k: [None] * len(schemes) for k in ("error", "damage", "effect", "shap")}
        )
        for k in row:
            row[k][column[r.scheme]] = _short(getattr(r, k))
    place, near = {name: i for i, name in enumerate(layers.layer)}, dict[str, list[Any]]()
    for r in found["pairs"].itertuples():
        for a, b in ((r.a, r.b), (r.b, r.a)):
            if b in place and len(near.setdefault(a, [])) < PAIRS_MOST:
                near[a].append([place[b], _short(r.interaction), _short(r.low), _short(r.high)])
    rows = [
        {
            **{k: _short(v) for k, v in row.items()},
            "schemes": parts.get(row["layer"], {}),
            "pairs": near.get(row["layer"], []),
        }
        for row in layers.to_dict("records")
    ]
    value = {
        "metric": facts.metric,
        "effects": facts.effects,
        "level": facts.effect_level,
        "swap": facts.swap.split(":"),
        "schemes": schemes,
        "layers": rows,
    }
    return embedded(value)


def embedded(value: Any) -> Markup:
    """JSON that no script element can be left from."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _short(value: Any) -> Any:
    """Six digits are enough for a page; None for what is undefined."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _breakable(name: Any) -> Markup:
    """A layer's name that may break after its dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def environment() -> jinja2.Environment:
    """Templates that escape whatever they are given."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    found = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(
        figures=words.figures,
        count=words.count,
        score=words.score,
        short=words.short,
        levels=lambda rows: drawing.levels(pd.DataFrame(rows)),
        breakable=_breakable,
        uniform_name=uniform_name,
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sheet = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    found.globals.update(script=Markup(script), script_hash=allowed, style=sheet)
    return found


def _render(
    facts: Facts, found: Tables, lacks: Lacks, shown: Sequence[Shown], grids: list[Images], files: list[str]
) -> str:
    frames: dict[str, Any] = {
        name: list(table.itertuples(index=False, name="Row")) for name, table in found.items()
    }
    if not grids:
        lacks = {
            "images": ("No images of the full-precision, uniform and found configurations are stored.", ""),
            **lacks,
        }
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            facts=facts,
            tables=frames,
            lacks=lacks,
            figures=shown,
            images=grids,
            card=run_card(facts),
            files={name: DATA[name] for name in files},
            summary=answer(facts, found, lacks),
            data=page_data(facts, found),
        )
    )

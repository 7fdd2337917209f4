"""The page: one HTML file that shows the figures and tables of a study, offline, and says what is still missing."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes

from aquabit.reports import figures, noise, style, summary, tables
from aquabit.reports.facts import Facts, missing, number, read, require_metric, scheme_name
from aquabit.scheme import AquabitError, Progress, no_progress
from aquabit.study import Study

TEMPLATES = Path(__file__).parent / "templates"
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Plan:
    """One figure: the fact it needs, its table, its size in inches, and who draws it."""

    name: str
    needs: str
    table: str
    size: Callable[[pd.DataFrame], tuple[float, float]]
    draw: Callable[[Facts, Tables, Axes], None]
    caption: str


@dataclass(frozen=True)
class Shown:
    """A figure as the template takes it; without ``svg`` the reason is in ``missing``."""

    name: str
    table: str
    caption: str
    svg: Markup | None = None
    missing: tuple[str, str] | None = None


def _rows_high(width: float, row: float, most: int, column: str, extra: float = 0.75) -> Callable[[pd.DataFrame], tuple[float, float]]:
    return lambda table: (width, extra + row * max(2, min(table[column].nunique(), most)))


def _plans(facts: Facts) -> list[Plan]:
    metric, swap, effects, v = facts.metric, facts.swap, facts.effects, facts.validation
    scores = facts.sensitivity.get("surrogate") or {}
    return [
        Plan("quality_vs_bits", "points", "quality_vs_bits", lambda table: (style.DOUBLE, 3.3),
             lambda f, t, a: figures.quality_vs_bits(t["quality_vs_bits"], a, metric, f.direction),
             f"Measured {metric} against bits per weight. Found configurations, and whatever else was measured on fresh seeds, are means "
             "over blocks of seeds that the search never saw, with intervals; random ones were measured on the study's own seeds."),
        Plan("layer_ranking", "layers", "layers", _rows_high(style.DOUBLE, 0.2, 20, "layer"),
             lambda f, t, a: figures.layer_ranking(t["layers"], a, metric, swap, effects=effects),
             f"The most harmful layers: {effects} effects with their intervals, and measured swaps of the same layer in random contexts."),
        Plan("operators", "operators", "operators", _rows_high(style.SINGLE * 1.3, 0.21, 40, "name", 0.95),
             lambda f, t, a: figures.group_effects(t["operators"], a, t["layers"], "operator", metric, swap, effects=effects),
             f"{effects.capitalize()} effects by operator type (number of layers): boxes and ticks are layers, points the mean with its "
             "interval."),
        Plan("blocks", "blocks", "blocks", _rows_high(style.SINGLE * 1.3, 0.21, 40, "name", 0.95),
             lambda f, t, a: figures.group_effects(t["blocks"], a, t["layers"], "block", metric, swap, effects=effects),
             f"{effects.capitalize()} effects by block in execution order (number of layers)."),
        Plan("chosen_schemes", "winner", "chosen_schemes", _rows_high(style.DOUBLE, 0.22, 60, "operator"),
             lambda f, t, a: figures.chosen_schemes(t["chosen_schemes"], a),
             "Weight schemes that the winner gives to the layers of each operator type (number of layers)."),
        Plan("surrogate_scatter", "scatter", "surrogate_scatter", lambda table: (style.SINGLE, 2.7),
             lambda f, t, a: figures.surrogate_scatter(t["surrogate_scatter"], a, metric, number(scores.get("within_budget_srcc"))),
             f"{metric} predicted for configurations that the surrogate was not trained on, beside its measured value. "
             "Size alone spreads the points along the diagonal: the within-budget SRCC is what counts."),
        Plan("swaps", "swaps", "swaps", lambda table: (style.SINGLE, 2.7),
             lambda f, t, a: figures.swaps_scatter(
                 t["swaps"], a, metric, number(v.get("srcc")), number(v.get("sign_agreement")), int(v.get("flips") or 0)),
             "Effects of layers as predicted, beside the mean of real swaps with its interval."),
        *(Plan(p.name, "noise", "noise", lambda table: (style.SINGLE, 1.9),
               lambda f, t, a, p=p: noise.over_steps(t["noise"], a, p), f"{p.caption} Bands are 95 % intervals over images.")  # type: ignore[misc]
          for p in noise.PANELS),
    ]  # fmt: skip


def report(study: Study, out: str | Path, progress: Progress = no_progress) -> Path:
    """Write ``out``/index.html (one file, no network), ``out``/figures (PDF, SVG, PNG) and ``out``/tables (CSV, LaTeX).

    Returns the page's path. What the study does not hold yet is named on the page with the command that makes it. Raises
    AquabitError where ``out`` cannot be written or a stored fact is damaged.
    """
    out = Path(out)
    facts = read(study)
    require_metric(facts)
    folders = out / "figures", out / "tables"
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return _write(facts, out, progress)
    except OSError as error:
        raise AquabitError(f"the report could not be written to {out}: {error.strerror or error}") from error


def _write(facts: Facts, out: Path, progress: Progress) -> Path:
    found, lacks, plans = tables.all_tables(facts), missing(facts), _plans(facts)
    if found["quality_vs_bits"].value.notna().sum() == 0:
        lacks["points"] = lacks.get("samples", ("Nothing was measured.", ""))
    if found["chosen_schemes"].empty:
        lacks.setdefault("winner", lacks.get("graph", ("The winner is not stored.", "")))
    for name, table in found.items():
        tables.write(table, out / "tables", name)
    shown = {}
    for i, plan in enumerate(plans):
        progress("report", i, len(plans) + 1)
        shown[plan.name] = _figure(plan, facts, found, lacks, out / "figures")
    progress("report", len(plans), len(plans) + 1)
    page = out / "index.html"
    page.write_text(_render(facts, found, lacks, shown, images(facts, out / "figures")), encoding="utf-8")
    progress("report", len(plans) + 1, len(plans) + 1)
    return page


def _figure(plan: Plan, facts: Facts, found: Tables, lacks: Mapping[str, tuple[str, str]], folder: Path) -> Shown:
    table = found[plan.table]
    if plan.needs in lacks or table.empty:
        for old in folder.glob(f"{plan.name}.*"):  # of a report that was written here before
            old.unlink()
        return Shown(plan.name, plan.table, plan.caption, missing=lacks.get(plan.needs, ("There is nothing to draw.", "")))
    with style.use():
        canvas, axes = style.canvas(*plan.size(table))
        plan.draw(facts, found, axes)
        text = style.save(canvas, folder, plan.name)
    return Shown(plan.name, plan.table, plan.caption, inline_svg(text, plan.name, plan.caption))


def inline_svg(text: str, name: str, caption: str) -> Markup:
    """An SVG file of matplotlib's as an element of the page: its names made unique, its size left to the page, text as text."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{SVG}}}metadata" or (child.tag == f"{{{SVG}}}style"):
                parent.remove(child)  # the page has the one rule that matplotlib writes
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("style", f"width: {width / 72:.2f}in")
    root.set("role", "img")
    root.set("aria-label", caption)
    return Markup(ET.tostring(root, encoding="unicode"))


@dataclass(frozen=True)
class Images:
    """One image grid: what it is, what was measured of it, and the PNG as a data address."""

    name: str
    title: str
    note: str
    source: str
    width: int
    height: int


def images(facts: Facts, folder: Path) -> list[Images]:
    """Full precision, uniform and found, the latter without and with noise correction, all from the same seeds; each also written as
    ``images_NAME.png``."""
    wanted: list[tuple[str, str]] = []
    reference = facts.rows("reference")
    wanted += [("full precision", str(reference.config.iloc[0]))] if len(reference) else []
    uniform = ((facts.front.get("comparison") or {}).get("uniform") or {}).get("config")
    names = {c: scheme_name(facts.configs[c]) for c in facts.rows("uniform").config}
    chosen = [str(uniform)] if uniform else [c for c, n in names.items() if n in ("usq2", "usq3", "usq4", "usq8")]
    wanted += [
        (f"uniform {names.get(c) or ((facts.front.get('comparison') or {}).get('uniform') or {}).get('scheme', '')}", c) for c in chosen
    ]
    found = _found(facts)
    wanted += found
    protocols = dict.fromkeys(([facts.protocol.digest] if facts.protocol else []) + [p for _, p in facts.thumbnails])
    have = {p: [(t, c) for t, c in wanted if (c, p) in facts.thumbnails] for p in protocols}
    protocol = max(have, key=lambda p: (len([w for w in have[p] if w in found]), len(have[p])), default="")
    shown = []
    for title, config in have.get(protocol, []):
        shown += _grid(facts, title, config, protocol, folder)
    return shown


def _found(facts: Facts) -> list[tuple[str, str]]:
    """(title, configuration) of the winner, and of what it is without or with correction where that was measured."""
    winner = str(facts.front.get("winner") or "")
    without, corrected = (str(facts.noise.get(key) or "") for key in ("without", "with"))
    name = f"corrected by {facts.noise.get('correction')}"
    if not winner or winner not in (without, corrected):
        return [("found", winner)] if winner else []
    return (
        [("found", without), (f"found, {name}", corrected)]
        if winner == without
        else [("found, not corrected", without), (f"found, {name}", corrected)]
    )


def _grid(facts: Facts, title: str, config: str, protocol: str, folder: Path) -> list[Images]:
    from PIL import Image

    png = facts.thumbnails[config, protocol]
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            width, height = picture.size
    except (OSError, Image.DecompressionBombError):
        return []
    name = re.sub(r"\W+", "-", title)
    (folder / f"images_{name}.png").write_bytes(png)
    rows = facts.measured
    row = rows[(rows.config == config) & (rows.protocol == protocol) & (rows.status == "ok")]
    notes = []
    if len(row):
        r = row.iloc[0]
        notes.append(f"{summary.figures(r.bits)} bits a weight, {summary.count(r.bytes)} bytes")
        notes.append(f"{facts.metric} {summary.figures(r.get(facts.objective))}")
        psnr = number(r.get("psnr"))
        notes += [f"PSNR {psnr:.2f} dB to full precision"] if title != "full precision" and math.isfinite(psnr) else []
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return [Images(name, title, "; ".join(notes), source, width, height)]


def _breakable(name: Any) -> Markup:
    """A layer's name that may break after its dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def _render(facts: Facts, found: Tables, lacks: Mapping[str, tuple[str, str]], shown: Mapping[str, Shown], grids: list[Images]) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figures=summary.figures, count=summary.count, score=summary.score, short=summary.short, breakable=_breakable)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    frames: dict[str, Any] = {name: list(table.itertuples(index=False, name="Row")) for name, table in found.items()}
    if not grids:
        lacks = {"images": ("No images of the full-precision, uniform and found configurations are stored.", ""), **lacks}
    return environment.get_template("report.html.j2").render(
        facts=facts, tables=frames, lacks=lacks, figures=shown, images=grids, card=summary.run_card(facts),
        summary=summary.summary(facts, found, lacks), script=Markup(script), script_hash=allowed,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )  # fmt: skip

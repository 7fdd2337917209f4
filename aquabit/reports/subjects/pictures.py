"""Image grids of a report: full precision, uniform, found and corrected, all from the same seeds."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

from aquabit.files import write_bytes
from aquabit.reports import words
from aquabit.reports.facts import METRIC_NAMES, Facts, number, scheme_name


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
    """Full precision, uniform and found, the latter without and with noise correction, all from the same
    seeds; each also written as ``images_NAME.png``."""
    wanted: list[tuple[str, str]] = []
    reference = facts.rows("reference")
    wanted += [("full precision", str(reference.config.iloc[0]))] if len(reference) else []
    compared = facts.comparison.get("uniform") or {}
    uniform = compared.get("config")
    names = {c: scheme_name(facts.configs[c]) for c in facts.rows("uniform").config}
    chosen = (
        [str(uniform)] if uniform else [c for c, n in names.items() if n in ("usq2", "usq3", "usq4", "usq8")]
    )
    wanted += [(f"uniform {names.get(c) or compared.get('scheme', '')}", c) for c in chosen]
    found = _found(facts)
    wanted += found
    protocols = dict.fromkeys(
        ([facts.protocol.digest] if facts.protocol else []) + [p for _, p in facts.thumbnails]
    )
    have = {p: [(t, c) for t, c in wanted if (c, p) in facts.thumbnails] for p in protocols}
    protocol = max(have, key=lambda p: (len([w for w in have[p] if w in found]), len(have[p])), default="")
    shown = []
    for title, config in have.get(protocol, []):
        shown += _grid(facts, title, config, protocol, folder)
    return shown


def _found(facts: Facts) -> list[tuple[str, str]]:
    """(title, configuration) of the winner, and of what it is without or with correction where that was
    measured."""
    winner = (facts.front.winner if facts.front else None) or ""
    without, corrected = (str(facts.noise.get(key) or "") for key in ("without", "with"))
    name = f"corrected by {facts.noise.get('correction')}"
    if not winner or winner not in (without, corrected):
        return [("found", winner)] if winner else []
    if winner == without:
        return [("found", without), (f"found, {name}", corrected)]
    return [("found, not corrected", without), (f"found, {name}", corrected)]


def _grid(facts: Facts, title: str, config: str, protocol: str, folder: Path) -> list[Images]:
    from PIL import Image

    png = facts.thumbnails[config, protocol]
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            width, height = picture.size
    except (OSError, Image.DecompressionBombError):
        return []
    name = re.sub(r"\W+", "-", title)
    write_bytes(folder / f"images_{name}.png", png)
    rows = facts.measured
    row = rows[(rows.config == config) & (rows.protocol == protocol) & (rows.status == "ok")]
    notes = []
    if len(row):
        r = row.iloc[0]
        notes.append(f"{words.figures(r.bits)} bits a weight, {words.count(r.bytes)} bytes")
        notes.append(f"{facts.metric} {words.figures(r.get(facts.objective))}")
        for metric in ("psnr", "temporal_psnr"):
            value = number(r.get(metric))
            if title != "full precision" and math.isfinite(value):
                notes.append(f"{METRIC_NAMES[metric]} {value:.2f} dB to full precision")
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return [Images(name, title, "; ".join(notes), source, width, height)]

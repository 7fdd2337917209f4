"""What results show of themselves in a notebook: numbers, escaped names, and nothing broken where values
are missing."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

from aquabit import _notebook
from aquabit.study import Study
from tests.pages import EVIL, Synthetic


def test_a_study_shows_its_counts_and_its_measurements(tmp_path: Path) -> None:
    made = Synthetic(tmp_path / "S.db", layers=2, samples=5, model=EVIL[0]).measure()
    html = made.study._repr_html_()
    assert EVIL[0] not in html and "&lt;img src=x" in html
    root = ET.fromstring(f"<div>{html}</div>")
    rows = [[cell.text or "" for cell in row] for row in root.iter("tr")]
    assert ["sample", "7", "2"] in rows and ["uniform", "4", "0"] in rows
    assert len(list(root.iter("circle"))) == 5 + 4, "random and uniform ones; the failed are left out"
    assert (
        "<table" in Study(tmp_path / "E.db")._repr_html_()
        and "<svg" not in Study(tmp_path / "E2.db")._repr_html_()
    )


def test_intervals_lie_where_their_numbers_say() -> None:
    rows = [
        (EVIL[1] + "<", 2.0, 1.0, 4.0),
        ("no ends", -1.0, math.nan, math.nan),
        ("unknown", math.nan, 0.0, 1.0),
    ]
    root = ET.fromstring(_notebook.intervals(rows, "a & b"))
    places = [float(c.get("cx", "")) for c in root.iter("circle")]
    lines = [(float(e.get("x1", "")), float(e.get("x2", ""))) for e in root.iter("line")]
    assert len(places) == 2 and len(lines) == 2, "one without a value has no row, one without ends no line"
    zero, (low, high) = lines[0][0], lines[1]
    unit = (places[0] - zero) / 2
    assert (
        abs(zero - places[1] - unit) < 0.2
        and abs(low - zero - unit) < 0.2
        and abs(high - zero - 4 * unit) < 0.2
    )
    assert {"".join(e.itertext()) for e in root.iter("text")} >= {
        2 * (EVIL[1] + "<"),
        2 * "no ends",
        "a & b",
    }, "title and text"
    assert _notebook.intervals(rows[2:], "nothing") == "" == _notebook.points([], "x", "y")


def test_points_rise_with_their_values() -> None:
    root = ET.fromstring(
        _notebook.points([("a", 1.0, 5.0, 4.0, 6.0), ("b", 2.0, 1.0, math.nan, math.nan)], "bits", "FID")
    )
    (ax, ay), (bx, by) = ((float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter("circle"))
    assert ax < bx and ay < by, "a larger value stands higher"

"""How results show themselves in a notebook: tables and small SVG charts as escaped HTML, without
matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, ROW, LEFT = 640, 18, 250  # pixels of a chart, of one of its rows, and of the names at its left


def shown(value: Any) -> str:
    """A cell: numbers to three digits, nothing for undefined ones, any other value as escaped text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return escape(
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:.3g}"
        if isinstance(value, float)
        else str(value)
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """An HTML table."""
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join("<tr>" + "".join(f"<td>{shown(v)}</td>" for v in row) + "</tr>" for row in rows)
    names = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f"<table>{top}<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """An SVG chart of (name, value, low, high), a row each, with a line at zero; rows without a value are
    left out. Empty without rows."""
    known = [r for r in rows if math.isfinite(r[1])]
    if not known:
        return ""
    ends = [e for r in known for e in r[1:] if math.isfinite(e)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = (WIDTH - LEFT - 20) / ((high - low) or 1.0)
    height = ROW * len(known) + 34
    parts = [_line(_x(0.0, low, scale), 2, _x(0.0, low, scale), height - 30, 0.5)]
    for i, (name, value, down, up) in enumerate(known):
        y = ROW * i + 12
        text = name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}"
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4}"'
            f' text-anchor="end"><title>{escape(name)}</title>{escape(text)}</text>'
        )
        if math.isfinite(down) and math.isfinite(up):
            parts.append(_line(_x(down, low, scale), y, _x(up, low, scale), y, 1.5, "#0072B2"))
        parts.append(
            f'<circle cx="{_x(value, low, scale):.1f}" cy="{y}" r="3.5" fill="#0072B2"><title>{escape(name)}:'
            f" {value:.3g}</title></circle>"
        )
    for value in dict.fromkeys((low, 0.0, high)):
        parts.append(
            f'<text x="{_x(value, low, scale):.1f}" y="{height - 16}" text-anchor="middle">{value:.3g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{height - 3}" text-anchor="middle">{escape(label)}</text>'
    )
    return _svg(height, parts, label)


def points(rows: Sequence[tuple[str, float, float, float, float]], across: str, up: str) -> str:
    """An SVG chart of (name, x, y, low, high) with intervals of y; rows without x or y are left out. Empty
    without rows."""
    known = [r for r in rows if math.isfinite(r[1]) and math.isfinite(r[2])]
    if not known:
        return ""
    height, margin = 240, 46
    xs, ys = [r[1] for r in known], [e for r in known for e in r[2:] if math.isfinite(e)]
    wide, high = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return margin + 14 + (x - min(xs)) / wide * (WIDTH - margin - 40), 12 + (max(ys) - y) / high * (
            height - margin - 24
        )

    parts = [
        _line(margin, 6, margin, height - margin + 4, 0.5),
        _line(margin, height - margin + 4, WIDTH - 10, height - margin + 4, 0.5),
    ]
    for name, x, y, below, above in known:
        cx, cy = at(x, y)
        if math.isfinite(below) and math.isfinite(above):
            parts.append(_line(cx, at(x, below)[1], cx, at(x, above)[1], 1.2, "#0072B2"))
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="#0072B2"><title>{escape(name)}: {x:.3g},'
            f" {y:.3g}</title></circle>"
        )
    for x in dict.fromkeys((min(xs), max(xs))):
        parts.append(
            f'<text x="{at(x, min(ys))[0]:.1f}" y="{height - margin + 18}"'
            f' text-anchor="middle">{x:.3g}</text>'
        )
    for y in dict.fromkeys((min(ys), max(ys))):
        parts.append(
            f'<text x="{margin - 5}" y="{at(min(xs), y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(across)}</text>')
    parts.append(
        f'<text x="12" y="{height / 2 - 12:.0f}" transform="rotate(-90 12 {height / 2 - 12:.0f})"'
        f' text-anchor="middle">{escape(up)}</text>'
    )
    return _svg(height, parts, f"{up} against {across}")


def _x(value: float, low: float, scale: float) -> float:
    return LEFT + (value - low) * scale


def _line(x1: float, y1: float, x2: float, y2: float, width: float, colour: str = "currentColor") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"'
        f' stroke-width="{width}"/>'
    )


def _svg(height: int, parts: Sequence[str], label: str) -> str:
    look = 'font-size="11" font-family="sans-serif" fill="currentColor" role="img"'
    return (
        f'<svg width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" {look}'
        f' aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )

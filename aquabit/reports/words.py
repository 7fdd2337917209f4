"""Numbers and sentences as people read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from aquabit.reports.facts import number


@dataclass(frozen=True)
class Sentence:
    """One part of the answer; ``command`` makes what is missing."""

    text: str
    command: str = ""


def figures(value: Any, digits: int = 3) -> str:
    """A number with ``digits`` significant digits (all digits before the point), a true minus sign, a dash
    where it is undefined."""
    value = float(value) if value is not None else math.nan
    if not math.isfinite(value):
        return "–"
    size = math.floor(math.log10(abs(value))) if value else 0
    text = (
        "0"
        if not value
        else f"{value:.{digits - 1}e}"
        if size < -4
        else f"{value:,.{max(0, digits - 1 - size)}f}"
    )
    return text.replace("-", "\N{MINUS SIGN}")


def score(value: Any) -> str:
    """A correlation or the like, to two digits after the point."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def ends(low: Any, high: Any, level: str = "") -> str:
    """`` (1.2 to 3.4, 95 %)`` or nothing where an end is unknown; ``level`` is empty where it was said
    before."""
    ends = [number(None if pd.isna(v) else float(v)) for v in (low, high)]
    known = f"{figures(ends[0])} to {figures(ends[1])}{f', {level}' if level else ''}"
    return "" if any(math.isnan(v) for v in ends) else f" ({known})"


def count(value: Any) -> str:
    """A whole number with thousands apart."""
    return "–" if value is None or pd.isna(value) else f"{int(value):,}".replace("-", "\N{MINUS SIGN}")


def short(value: Any) -> str:
    """A large count to three digits, with k, M, G or T."""
    size = number(value)
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= factor:
            return figures(size / factor) + unit
    return count(None if math.isnan(size) else size)

"""What one figure of a report is: where it stands, its table, and who draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes

Tables = Mapping[str, pd.DataFrame]
Size = Callable[[pd.DataFrame], tuple[float, float]]
Draw = Callable[[pd.DataFrame, Axes], None]


@dataclass(frozen=True)
class Plan:
    """One figure: its section, the fact it needs, its table, its size in inches, and who draws it. Where
    an ``optional`` one has no rows the page says nothing of it."""

    name: str
    section: str
    needs: str
    table: str
    size: Size
    draw: Draw
    caption: str
    optional: bool = False


def fixed(width: float, height: float) -> Size:
    """A size that does not depend on the table."""
    return lambda table: (width, height)


def rows_high(width: float, row: float, most: int, column: str, extra: float = 0.75) -> Size:
    """``row`` inches for each name in ``column``, at most so many, and ``extra`` for axis and legend."""
    return lambda table: (width, extra + row * max(2, min(table[column].nunique(), most)))

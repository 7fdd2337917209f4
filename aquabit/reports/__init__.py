"""Reports: tables first, then figures and the page from the same tables."""

from aquabit.reports.beside import side_by_side
from aquabit.reports.page import report

__all__ = ["report", "side_by_side"]

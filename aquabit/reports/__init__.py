"""Reports: tables first, then figures and the page from the same tables."""

from aquabit.reports import (
    figures as attribution,  # the name by which the first papers import draw_curve and others
)
from aquabit.reports.beside import side_by_side
from aquabit.reports.page import report

__all__ = ["attribution", "report", "side_by_side"]

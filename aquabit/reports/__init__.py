"""Reports: tables first, then figures and the page from the same tables."""

from aquabit.reports.page import report

__all__ = ["report"]

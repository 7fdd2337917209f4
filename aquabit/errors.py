"""The root of the errors that are not ours."""

from __future__ import annotations


class AquabitError(ValueError):
    """The input was wrong: the message names the thing, its value and what would be right."""

"""The root of the errors that are not ours."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` in characters that a terminal shows: names from files may hold others, which it would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class AquabitError(ValueError):
    """The input was wrong: the message, one line, names the thing, its value and what would be right."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(" ".join(str(message).split())))

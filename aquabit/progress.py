"""The one callback that long work reports to."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # called as progress(what, done, total)


def no_progress(what: str, done: int, total: int) -> None:
    """The silent progress callback."""

"""The one callback that long work reports to."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # called as progress(what, done, total)


def no_progress(what: str, done: int, total: int) -> None:
    """The silent progress callback."""


def span(seconds: float) -> str:
    """Seconds as a time that people read: 0.4 s, 40 s, 12 min, 3 h 20 min, 2.5 d."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} d"

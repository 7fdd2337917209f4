"""Progress where there is no terminal: a line now and then, also where nothing is heard."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from aquabit.cli import progress
from aquabit.cli.progress import _Part, bars


def test_a_log_hears_what_is_done_and_left_also_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = io.StringIO()
    monkeypatch.setattr(progress, "errors", Console(file=heard, width=80))
    monkeypatch.setattr(progress, "EVERY", 0.1)
    with bars() as say:
        time.sleep(0.25)
        say("fitting: one [b]", 0, 8)
        say("fitting: two [b]", 2, 8)
        time.sleep(0.25)
    lines = heard.getvalue().splitlines()
    assert lines[0] == "starting, 0 min"
    assert lines[-1] == "fitting: two [b]: 2 of 8, 0 min, about 0 min left"
    time.sleep(0.25)
    assert heard.getvalue().splitlines() == lines, "it ends with the work"


def test_nothing_is_said_of_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = io.StringIO()
    monkeypatch.setattr(progress, "errors", Console(file=heard))
    with bars() as say:
        say("fitting", 1, 2)
    assert not heard.getvalue()


def test_what_was_done_before_is_not_counted_into_the_pace() -> None:
    part = _Part("measuring", 60, 100, began=0.0, first=50)
    assert part.line(600.0) == "measuring: 60 of 100, 10 min, about 40 min left"
    assert _Part("measuring", 50, 100, 0.0, 50).line(600.0) == "measuring: 50 of 100, 10 min"
    assert _Part("measuring", 51, 1000, 0.0, 50).line(600.0).endswith("about 158.2 h left")

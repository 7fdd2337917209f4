"""Fixtures of the tests of reports."""

from __future__ import annotations

import pytest

from aquabit.reports import style


@pytest.fixture
def svg_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose files do not matter are made without PDF and PNG, which take most of the time."""
    monkeypatch.setattr(style, "FORMATS", {})

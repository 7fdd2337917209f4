"""What a fit reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["feedback", "round", "final"]


@dataclass(frozen=True)
class Step:
    """The phase, the relative loss tr(dW H dW^T) / tr(W H W^T) after it (of the rows that tables are learned
    on, at first), seconds since the start."""

    phase: Phase
    number: int
    loss: float
    seconds: float


Report = Callable[[Step], None]


def no_report(step: Step) -> None:
    """The silent report."""

"""Activation bits: one number for a layer, or one for each group of denoising steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from aquabit.errors import AquabitError

ACTIVATION_BITS = (16, 8, 6, 4)  # what quantized layers round to; 16 is off
CODE_SHIFT = 5  # bits of a code that one group of steps takes: widths are below 32

Act = int | tuple[int, ...]  # activation bits (16 = off), or those of each group of steps


@dataclass(frozen=True)
class StepGroups:
    """Contiguous groups of the ``total`` denoising steps: ``starts`` are the first steps of the groups, in
    order of sampling. ``first``: the first step that runs, where sampling begins with a picture; each group
    must have one that does."""

    total: int
    starts: tuple[int, ...]
    first: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))
        rising = all(start < end for start, end in pairwise((*self.starts, self.total)))
        if not 2 <= len(self.starts) <= 5 or self.starts[0] != 0 or not rising:
            raise AquabitError(
                f"step groups that start at {list(self.starts)} of {self.total} steps are not usable; give 2"
                " to 5 rising starts from 0"
            )
        if not 0 <= self.first < self.starts[1]:
            raise AquabitError(
                f"the first group of steps, 1 to {self.starts[1]}, never runs: with this strength sampling"
                f" begins with step {self.first + 1} of {self.total}; let the second group begin after that"
            )

    def of(self, step: int) -> int:
        """The group that a step (from 0) belongs to."""
        return sum(start <= step for start in self.starts) - 1

    @property
    def shares(self) -> tuple[float, ...]:
        """Each group's share of the steps that run; they add up to 1."""
        ends = pairwise((self.first, *self.starts[1:], self.total))
        return tuple((end - start) / (self.total - self.first) for start, end in ends)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        first = {"first": self.first} if self.first else {}  # absent: groups stay what they were
        return {"total": self.total, "starts": list(self.starts), **first}


def plain_act(act: Act) -> Act:
    """Activation bits as they are kept: groups that are all equal are one number."""
    return act if isinstance(act, int) or len(set(act)) > 1 else act[0]


def act_code(act: Act) -> int:
    """Activation bits as one whole number, for index matrices: themselves, and for groups of steps a
    number above all widths."""
    act = plain_act(act)
    return act if isinstance(act, int) else sum(bits << CODE_SHIFT * g for g, bits in enumerate(act))


def act_of(code: int) -> Act:
    """The inverse of ``act_code``."""
    parts = []
    while code:
        parts.append(code & (1 << CODE_SHIFT) - 1)
        code >>= CODE_SHIFT
    return parts[0] if len(parts) == 1 else tuple(parts)


def act_text(act: Act) -> str:
    """``a8``, or ``a6/8`` where groups of steps differ: how an activation choice is named."""
    return f"a{act}" if isinstance(act, int) else "a" + "/".join(map(str, act))

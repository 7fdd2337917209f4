"""How activations are rounded: one way for a layer, or one for each group of denoising steps.

A way (``Rounding``) is 8, 6 or 4 (so many bits between the smallest and the largest value of a token or
sample), "i8" (symmetric integers, as other programs' int8 kernels have them), "f8" (float8 e4m3fn under a
scale), or 16, which is off. Texts have an "a" before numbers: ``a8``, ``i8``, ``f8``. The arithmetic is in
``kernels.fake_quant``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from aquabit.errors import AquabitError

Rounding: TypeAlias = int | Literal["i8", "f8"]
# what quantized layers may round to: most bits first, of as many the closest to full precision first
# (benchmarks/activations.py)
ROUNDINGS: tuple[Rounding, ...] = (16, 8, "i8", "f8", 6, 4)
OTHERS: dict[Rounding, int] = {"i8": 17, "f8": 18}  # codes: above the bits of the others
CODE_SHIFT = 5  # bits of a code that one group of steps takes: all codes are below 32

Act: TypeAlias = Rounding | tuple[Rounding, ...]  # how activations are rounded, or in each group of steps


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


def act_bits(rounding: Rounding) -> int:
    """The bits of a rounded value: 8 for "i8" and "f8"."""
    return rounding if isinstance(rounding, int) else 8


def known_rounding(value: Any, source: object = None) -> Rounding:
    """``value`` where it is one of ``ROUNDINGS``; raises AquabitError, naming its ``source``, for anything
    else."""
    for rounding in ROUNDINGS:
        if type(value) is type(rounding) and value == rounding:
            return rounding
    known = ", ".join(map(str, ROUNDINGS))
    where = "" if source is None else f"{source}: "
    raise AquabitError(f"{where}activations of {value!r:.60} are not supported; known: {known}")


def parse_rounding(text: str) -> Rounding:
    """What a kernel rounds to from what a user types: "8" or any number of bits from 2 on, "i8", "f8"; raises
    AquabitError for any other text."""
    if text in ("i8", "f8"):
        return "i8" if text == "i8" else "f8"
    if text.isascii() and text.isdigit() and int(text) >= 2:
        return int(text)
    raise AquabitError(f"activations of {text!r} are unknown; give 2 to 15 bits, i8, f8, or 16 for off")


def closest(roundings: Iterable[Rounding]) -> Rounding:
    """Of some, the one that is closest to full precision."""
    return min(roundings, key=ROUNDINGS.index)


def lowest(roundings: Iterable[Rounding]) -> tuple[Rounding, ...]:
    """Of some, those of the fewest bits, without the closest where there are others."""
    known = set(roundings)
    least = min(map(act_bits, known))
    rest = known - {closest(known)} or known
    return tuple(r for r in ROUNDINGS if r in rest and act_bits(r) == least) or (closest(known),)


def act_parts(act: Act) -> tuple[Rounding, ...]:
    """The roundings of an activation choice: one, or that of each group of steps."""
    return act if isinstance(act, tuple) else (act,)


def output_rounding(rounding: Rounding) -> Rounding:
    """How Q, K and V are rounded where a layer's input is: alike by bits, and not at all by "i8" and "f8",
    which are of the products that other programs' kernels compute so: those of layers."""
    return rounding if isinstance(rounding, int) else 16


def plain_act(act: Act) -> Act:
    """Activation choices as they are kept: groups that are all equal are one."""
    return act if not isinstance(act, tuple) or len(set(act)) > 1 else act[0]


def act_code(act: Act) -> int:
    """An activation choice as one whole number, for index matrices and operators: bits are themselves,
    "i8" and "f8" numbers above them, and groups of steps one above all of those."""
    act = plain_act(act)
    if not isinstance(act, tuple):
        return act if isinstance(act, int) else OTHERS[act]
    return sum(act_code(part) << CODE_SHIFT * g for g, part in enumerate(act))


def rounding_of(code: int) -> Rounding:
    """The inverse of ``act_code`` where it is of no groups."""
    return next((r for r, other in OTHERS.items() if other == code), code)


def act_of(code: int) -> Act:
    """The inverse of ``act_code``."""
    parts = []
    while code:
        parts.append(rounding_of(code & (1 << CODE_SHIFT) - 1))
        code >>= CODE_SHIFT
    return parts[0] if len(parts) == 1 else tuple(parts)


def act_text(act: Act) -> str:
    """``a8`` or ``i8``, or ``a6/8`` and ``a6/i8`` where groups of steps differ: how an activation choice is
    named."""
    parts = act_parts(act)
    return ("a" if isinstance(parts[0], int) else "") + "/".join(map(str, parts))

"""Intervals: a number, the ends between which the true one lies, and with what probability. They are computed
here and nowhere else, so that what stands side by side has one level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, isnan, nan
from typing import Any

import numpy as np
from scipy.special import stdtrit  # Student's quantile without the second that scipy.stats takes to import

from aquabit.errors import AquabitError

NUMBERS = ("value", "low", "high", "level")  # of a stored interval
LEVEL = 0.95  # of every interval that is computed today
OLD_LEVEL = 0.90  # of what earlier versions stored without a level


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval. The ends are NaN where nothing is known of the spread."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    def __iter__(self) -> Iterator[float]:
        """Value, low end and high end, in this order."""
        return iter((self.value, self.low, self.high))

    @property
    def known(self) -> bool:
        """Whether both ends are finite numbers."""
        return isfinite(self.low) and isfinite(self.high)

    @property
    def half(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2

    @property
    def holds_zero(self) -> bool:
        """Whether zero lies between the ends; False where these are unknown."""
        return self.low <= 0 <= self.high

    @property
    def percent(self) -> str:
        """The level as text: ``95 %``."""
        return percent(self.level)

    def to_dict(self) -> dict[str, float]:
        """``{"value", "low", "high", "level"}``."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any] | None, level: float = LEVEL) -> Interval:
        """The inverse of ``to_dict``. Undefined or missing numbers are NaN; ``level`` is that of values that
        were stored without one."""
        known = {} if value is None else value
        if not isinstance(known, Mapping) or not all(_is_number(known.get(k)) for k in NUMBERS):
            raise AquabitError(f"an interval is {value!r:.60}; it has {', '.join(NUMBERS)} as numbers")
        middle, low, high, own = (nan if known.get(k) is None else float(known[k]) for k in NUMBERS)
        return Interval(middle, low, high, level if isnan(own) else own)


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float holds, or None."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def percent(level: float) -> str:
    """A level as text: ``95 %``."""
    return f"{100 * level:g} %"


def mean_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Mean of independent values, such as blocks of seeds, with Student's t interval (n - 1 degrees of
    freedom). One value alone has no ends. Raises AquabitError without any."""
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x):
        raise AquabitError(f"an interval needs at least one value in a list, got shape {list(x.shape)}")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, nan, nan, level)
    half = float(stdtrit(len(x) - 1, (1 + level) / 2) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, level)


def paired_difference(a: Sequence[float], b: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Mean of a - b over the same blocks of seeds, with its t interval. Raises AquabitError where the blocks
    do not pair up."""
    if len(a) != len(b):
        raise AquabitError(
            f"a paired difference needs the same blocks on both sides, got {len(a)} and {len(b)}"
        )
    return mean_interval([float(x) - float(y) for x, y in zip(a, b, strict=True)], level)


def between_percentiles(draws: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the middle ``level`` of draws [r, ...] of a posterior or a bootstrap, each [...]; NaN
    without draws."""
    if not len(draws):
        return np.full(draws.shape[1:], nan), np.full(draws.shape[1:], nan)
    tail = round((1 - level) / 2, 12)  # 0.025 to the last bit, and not 0.0250...02
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def around_replicates(
    estimate: np.ndarray, replicates: np.ndarray, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The ends [n] of intervals around ``estimate`` [n] from bootstrap replicates [r, n]; NaN below two.

    Student's t with r degrees of freedom, of the errors that replicates show (``replicate_errors``). They
    know how a surrogate varies with its measurements, not what it never learns: where real swaps show larger
    errors, ``factor`` says how many times larger.
    """
    count = len(replicates)
    if count < 2:
        return np.full(len(estimate), nan), np.full(len(estimate), nan)
    half = factor * stdtrit(count, (1 + LEVEL) / 2) * replicate_errors(estimate, replicates)
    return estimate - half, estimate + half


def replicate_errors(estimate: np.ndarray, replicates: np.ndarray) -> np.ndarray:
    """Root mean squared distance [n] of replicates [r, n] from ``estimate`` [n]."""
    return np.asarray(np.sqrt(np.square(replicates - estimate).mean(0)))

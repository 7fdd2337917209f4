"""How near a search came to the optimum of the model that it searched: incumbents, bounds, and the gap
between them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget
from aquabit.search.local_search import improve
from aquabit.search.options import Options, Predict

Bound = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[float, np.ndarray | None]]
"""(allowed [L, C], costs [R, L, C], caps [R]) -> a lower bound of the prediction over all choices of one
allowed column a layer within the limits, and where it was found, as shares [L, C] (None where it knows none);
inf where no choice keeps the limits."""
BoundFactory = Callable[[Choices, np.ndarray], Bound]  # (C rows: what the columns are, allowed [L, C])

NODES = 4  # of the branch and bound inside the loop: a bound of a large model takes seconds
TIGHT = 1e-4  # a gap that counts as none, relative to the incumbent


@dataclass(frozen=True)
class Bounded:
    """The best choice found (``choices``, one row), what is ``predicted`` there, a ``bound`` below
    which nothing within the budget is predicted, and the number of ``nodes`` that it took. The gap may be
    large; it is what is proven."""

    choices: Choices
    predicted: float
    bound: float
    nodes: int

    @property
    def gap(self) -> float:
        """``predicted`` - ``bound``, in the surrogate's unit: 0.1 is ten per cent where that is a
        logarithm."""
        return max(self.predicted - self.bound, 0.0)


@dataclass(frozen=True)
class Proof:
    """What a search proved about the models that it optimised under the budget: of the additive scores their
    optimum, its bound and the gap (``Solution``); of the surrogate itself the best value that was predicted,
    the bound and the gap (``Bounded``; None without a bound).
    """

    optimum: float
    optimum_bound: float
    optimum_gap: float
    predicted: float
    bound: float | None = None
    gap: float | None = None
    nodes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Proof:
        """Raises AquabitError where it is none."""
        try:
            return Proof(**value)
        except TypeError as error:
            raise AquabitError(
                f"{dict(value)!r:.60} is no proof of a search: it needs"
                f" {', '.join(Proof.__dataclass_fields__)}"
            ) from error


def branch_and_bound(
    incumbent: Choices,
    predict: Predict,
    bound: Bound,
    cost_model: CostModel,
    budget: Budget,
    *,
    nodes: int = NODES,
    rows: int = 2000,
    tolerance: float = TIGHT,
    seed: int = 0,
) -> Bounded:
    """The least prediction within ``budget``, from ``incumbent`` (one row), by best-first branch and
    bound.

    A node is a set of columns that each layer may still take. Where its bound was found at fractions, the
    choice of the largest ones is brought within the budget and improved by local search (``rows``
    predictions), and the layer that is most torn is split: its largest column, or all others. Stops after
    ``nodes`` bounds, or at a gap of ``tolerance``; the bound is valid whenever it stops. Raises AquabitError
    where the incumbent is outside the budget.
    """
    options = Options.of(cost_model, budget)
    best = options.columns.join(incumbent)[0]
    if (best < 0).any() or not options.keeps(best):
        raise AquabitError(
            f"the incumbent is outside the budget ({budget}); start from the integer program's solution"
        )
    value = float(predict(options.columns.split(best))[0])
    closed = np.inf  # the least bound of what was given up without being split
    heap: list[tuple[float, int, np.ndarray, np.ndarray | None]] = []
    used = 0

    def push(allowed: np.ndarray, parent: float) -> None:
        nonlocal used, best, value, closed
        used += 1
        low, share = bound(allowed, options.costs, options.caps)
        low = max(low, parent)  # a part of the parent's choices
        if (allowed.sum(1) == 1).all() and low < np.inf:
            only = allowed.argmax(1)
            if not options.keeps(only):
                return
            here = float(predict(options.columns.split(only))[0])
            best, value = (only, here) if here < value else (best, value)
            closed = min(closed, here)
            return
        if share is not None and low < value:
            rounded = options.repair(np.where(allowed, share, -1.0).argmax(1), -share)
            if rounded is not None:
                found = improve(
                    options.columns.split(rounded), predict, cost_model, budget, seed, rows=rows, restarts=0
                )
                if found.predicted < value:
                    best, value = options.columns.join(found.choices)[0], found.predicted
        if low < np.inf:
            heapq.heappush(heap, (low, used, allowed, share))

    push(options.columns.allowed, -np.inf)
    while heap and used < nodes:
        low, _, allowed, share = heap[0]
        if low >= value - tolerance * max(abs(value), abs(low)):
            break
        heapq.heappop(heap)
        layer, column = most_fractional_layer(allowed, share, best)
        only, rest = allowed.copy(), allowed.copy()
        only[layer] = False
        only[layer, column], rest[layer, column] = True, False
        push(only, low)
        push(rest, low)
    lowest = min([closed, value, *(node[0] for node in heap)])
    return Bounded(options.columns.split(best), value, lowest, used)


def most_fractional_layer(allowed: np.ndarray, share: np.ndarray | None, best: np.ndarray) -> tuple[int, int]:
    """The layer whose largest share is smallest, and that column; without shares, or where none is torn,
    the layer with most columns left and the incumbent's."""
    undecided = allowed.sum(1) > 1
    if share is not None:
        share = np.where(allowed, share, -1.0)
        largest = np.where(undecided, share.max(1), np.inf)
        layer = int(largest.argmin())
        if largest[layer] < 1 - 1e-6:
            return layer, int(share[layer].argmax())
    layer = int(np.where(undecided, allowed.sum(1), 0).argmax())
    return layer, int(best[layer]) if allowed[layer, best[layer]] else int(allowed[layer].argmax())

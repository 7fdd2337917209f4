"""How near a search came to the optimum of the model that it searched: incumbents, bounds, and the gap
between them."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.jsonio import record
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
    def from_dict(value: Any) -> Proof:
        """Raises AquabitError where it is none."""
        return record(Proof, value, "the stored proof of a search")


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
    search = _BranchAndBound(incumbent, predict, bound, cost_model, budget, rows, seed)
    search.push(search.options.columns.allowed, -np.inf)
    while search.heap and search.used < nodes:
        low, _, allowed, share = search.heap[0]
        if low >= search.value - tolerance * max(abs(search.value), abs(low)):
            break
        heapq.heappop(search.heap)
        layer, column = most_fractional_layer(allowed, share, search.best)
        only, rest = allowed.copy(), allowed.copy()
        only[layer] = False
        only[layer, column], rest[layer, column] = True, False
        search.push(only, low)
        search.push(rest, low)
    lowest = min([search.closed, search.value, *(node[0] for node in search.heap)])
    return Bounded(search.options.columns.split(search.best), search.value, lowest, search.used)


class _BranchAndBound:
    """The incumbent (columns ``best`` [L], predicted ``value``), the open nodes (``heap``: bound, number,
    columns allowed [L, C], shares), the number of bounds ``used``, and the least bound of what was ``closed``
    without being split."""

    def __init__(
        self,
        incumbent: Choices,
        predict: Predict,
        bound: Bound,
        cost_model: CostModel,
        budget: Budget,
        rows: int,
        seed: int,
    ):
        self.options = Options.of(cost_model, budget)
        self.predict, self.bound, self.cost_model, self.budget = predict, bound, cost_model, budget
        self.rows, self.seed = rows, seed
        self.best = self.options.columns.join(incumbent)[0]
        if (self.best < 0).any() or not self.options.keeps(self.best):
            raise AquabitError(
                f"the incumbent is outside the budget ({budget}); start from the integer program's solution"
            )
        self.value = self._predicted(self.best)
        self.closed, self.used = np.inf, 0
        self.heap: list[tuple[float, int, np.ndarray, np.ndarray | None]] = []

    def _predicted(self, choice: np.ndarray) -> float:
        return float(self.predict(self.options.columns.split(choice))[0])

    def push(self, allowed: np.ndarray, parent: float) -> None:
        """Bound a node, look for a better incumbent near where the bound was found, and open the node."""
        self.used += 1
        low, share = self.bound(allowed, self.options.costs, self.options.caps)
        low = max(low, parent)  # a part of the parent's choices
        if low == np.inf:
            return
        if (allowed.sum(1) == 1).all():
            self._close(allowed.argmax(1))
            return
        if share is not None and low < self.value:
            self._round(np.where(allowed, share, -1.0).argmax(1), share)
        heapq.heappush(self.heap, (low, self.used, allowed, share))

    def _close(self, only: np.ndarray) -> None:
        """Take a node of a single choice [L] for what is predicted of it."""
        if self.options.keeps(only):
            here = self._predicted(only)
            self.best, self.value = (only, here) if here < self.value else (self.best, self.value)
            self.closed = min(self.closed, here)

    def _round(self, choice: np.ndarray, share: np.ndarray) -> None:
        """Bring a choice [L] within the budget, improve it, and keep it where it beats the incumbent."""
        rounded = self.options.repair(choice, -share)
        if rounded is None:
            return
        start = self.options.columns.split(rounded)
        found = improve(
            start, self.predict, self.cost_model, self.budget, self.seed, rows=self.rows, restarts=0
        )
        if found.predicted < self.value:
            self.best, self.value = self.options.columns.join(found.choices)[0], found.predicted


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

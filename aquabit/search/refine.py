"""Refinement in context: the integer program again, over what single changes do where the incumbent stands, within a trust region.

Damages are measured from full precision, each alone. Where many layers are rounded, their errors add up with signs: a gradient at the
incumbent knows how each layer's error lies in the sum of all. It holds for small changes, hence the trust region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget
from aquabit.search.integer_program import solve

RADII = (2, 4, 8, 16, 32)  # layers that may change at once: each size of a step is tried, the judge says which one was too large
Chosen = tuple[np.ndarray, np.ndarray]  # (weights [L], acts [L])


@dataclass(frozen=True)
class Seen:
    """What is known where a configuration stands: the judge's ``value`` of it, and the predicted ``change`` [L, schemes, A] of the value by
    each single choice, 0 at its own; infinite where a layer may not take it."""

    value: float
    change: np.ndarray


@dataclass(frozen=True)
class Step:
    """A configuration that refinement went through: the judge's ``value`` of it, the one that was ``predicted``, and how many layers
    ``changed`` from the one before."""

    weights: np.ndarray
    acts: np.ndarray
    value: float
    predicted: float
    changed: int


def in_context(slopes: np.ndarray, overlap: np.ndarray, damages: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Change [L, C] of a sum of squares |D|^2 by each single choice, 0 at ``own`` [L], from what is known of J_l E_lc, the error that
    choice c of layer l makes in D: ``slopes`` = 2 D . J_l E_lc, ``damages`` = |J_l E_lc|^2, and ``overlap``, the cosine between E_lc and
    the error of the layer's own choice, which stands for that of J_l E_lc.

    The layer's own error leaves and the other one comes: |D - a + b|^2 - |D|^2 = 2 D . (b - a) + |a|^2 + |b|^2 - 2 a . b.
    """
    rows = np.arange(len(own))
    mine, slope = damages[rows, own][:, None], slopes[rows, own][:, None]
    with np.errstate(invalid="ignore"):
        crossed = np.where(np.isfinite(damages), 2 * overlap * np.sqrt(mine * np.where(np.isfinite(damages), damages, 0.0)), 0.0)
        change = (slopes - slope) + mine + damages - crossed
    change[rows, own] = 0.0
    return np.asarray(np.where(np.isfinite(damages), change, np.inf))


def refine(
    start: Chosen, look: Callable[[Chosen], Seen], judge: Callable[[Sequence[Chosen]], Sequence[float]], cost_model: CostModel, budget:
    Budget, *, rounds: int = 8, radii: Sequence[int] = RADII,
) -> list[Step]:  # fmt: skip
    """The configurations from ``start`` on, each judged better than the one before; the last one is the best.

    Each round looks at the incumbent, solves the program over the changes seen there for each of ``radii``, and takes the proposal that the
    judge finds best, where that is below the incumbent. It ends after ``rounds``, or where nothing is gained: then the radii that are
    smaller than the smallest proposal have been tried too. Deterministic where ``look`` and ``judge`` are. Never outside the budget.
    """
    seen = look(start)
    steps = [Step(*start, seen.value, seen.value, 0)]
    for _ in range(rounds):
        now = steps[-1]
        proposals = _proposals((now.weights, now.acts), seen, cost_model, budget, radii)
        if not proposals:
            break
        values = [float(v) for v in judge([(w, a) for w, a, _ in proposals])]
        best = int(np.argmin(np.where(np.isnan(values), np.inf, values)))
        if not values[best] < now.value:
            break
        weights, acts, predicted = proposals[best]
        steps.append(Step(weights, acts, values[best], predicted, _apart((weights, acts), (now.weights, now.acts))))
        if len(steps) <= rounds:
            seen = look((weights, acts))
    return steps


def _apart(a: Chosen, b: Chosen) -> int:
    return int(((a[0] != b[0]) | (a[1] != b[1])).sum())


def _proposals(
    incumbent: Chosen, seen: Seen, cost_model: CostModel, budget: Budget, radii: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """(weights, acts, predicted value) of the program's optimum within each radius, those that differ from the incumbent and each other."""
    found: list[tuple[np.ndarray, np.ndarray, float]] = []
    for radius in radii:
        if radius > len(incumbent[0]):
            break
        try:
            solved = solve(seen.change, cost_model, budget, near=(*incumbent, radius), relative_gap=1e-3)
        except AquabitError:  # the incumbent itself keeps the budget, so this is a limit on nodes
            continue
        one = (solved.weights, solved.acts)
        if _apart(one, incumbent) and all(_apart(one, (w, a)) for w, a, _ in found):
            found.append((*one, seen.value + solved.score))
    return found

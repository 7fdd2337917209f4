"""Refinement in context: the integer program again, over what single changes do where the incumbent stands,
within a trust region.

Damages are measured from full precision, each alone. Where many layers are rounded, their errors add up with
signs: a gradient at the incumbent knows how each layer's error lies in the sum of all. It holds for small
changes, hence the trust region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget
from aquabit.search.integer_program import solve

# layers that may change at once: each size of a step is tried, the judge says which one was too large
RADII = (4, 8, 16)


@dataclass(frozen=True)
class Seen:
    """What is known where a configuration stands: the judge's ``value`` of it, and the predicted
    ``change`` [L, schemes, A] of the value by each single choice, 0 at its own; infinite where a layer may
    not take it."""

    value: float
    change: np.ndarray


@dataclass(frozen=True)
class Step:
    """A configuration that refinement went through (one row): the judge's ``value`` of it, the one that was
    ``predicted``, and how many layers ``changed`` from the one before."""

    choices: Choices
    value: float
    predicted: float
    changed: int


def crossings(slopes: np.ndarray, overlap: np.ndarray, damages: np.ndarray, own: np.ndarray) -> np.ndarray:
    """2 <D - J_l E_l, J_l E_lc> [..., L, C]: how the error that choice c of layer l makes lies in the errors
    of all other layers, from ``slopes`` [..., L, C] = 2 <D, J_l E_lc>. ``overlap`` [L, C], the cosine between
    E_lc and the error of the layer's ``own`` choice [L], stands for that of J_l E_lc; ``damages`` [L, C] are
    |J_l E_lc|^2. 0 where a layer may not take a choice.
    """
    rows, known = np.arange(len(own)), np.isfinite(damages)
    size = np.sqrt(np.where(known, damages, 0.0))
    cosine = np.where(np.arange(damages.shape[1]) == own[:, None], 1.0, overlap)
    mine = cosine * size * size[rows, own][:, None]
    return np.asarray(np.where(known, slopes - 2 * mine, 0.0))


def shrunk(parts: np.ndarray, damages: np.ndarray) -> np.ndarray:
    """Crossings [L, C] from those of several parts of the inputs [n, L, C], as far as the parts agree
    (empirical Bayes).

    In units of |J E| a crossing is N(m, v) over cells, and its mean over parts has the variance that the
    parts show; m and v are fitted to all cells by moments. Without this, a program picks the cells whose
    crossing is negative by chance.
    """
    known = np.isfinite(damages) & (damages > 0)
    unit = np.where(known, np.sqrt(np.where(known, damages, 1.0)), 1.0)
    scaled = parts / unit
    mean, count = scaled.mean(0), len(parts)
    if count < 2 or not known.any():
        return np.zeros(damages.shape)
    noise = scaled.var(0, ddof=1) / count
    center = float(mean[known].mean())
    true = max(float(mean[known].var() - noise[known].mean()), 0.0)
    kept = true / np.maximum(true + noise, 1e-300)
    return np.asarray(np.where(known, unit * (center + kept * (mean - center)), 0.0))


def in_context(crossing: np.ndarray, damages: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Change [L, C] of a sum of squares |D|^2 by each single choice, 0 at ``own`` [L]: the layer's own
    error leaves with its crossing, and the other one comes with its own. Infinite where a layer may not
    take a choice."""
    total = np.where(np.isfinite(damages), damages + crossing, np.inf)
    return np.asarray(total - total[np.arange(len(own)), own][:, None])


def refine(
    start: Choices,
    look: Callable[[Choices], Seen],
    judge: Callable[[Choices], Sequence[float]],
    cost_model: CostModel,
    budget: Budget,
    *,
    rounds: int = 8,
    radii: Sequence[int] = RADII,
) -> list[Step]:
    """The configurations from ``start`` on, each judged better than the one before; the last one is the best.

    Each round looks at the incumbent, solves the program over the changes seen there for each of ``radii``,
    and takes the proposal that the judge finds best, where that is below the incumbent. It ends after
    ``rounds``, or where nothing is gained. Deterministic where ``look`` and ``judge`` are. Never outside the
    budget.
    """
    seen = look(start)
    steps = [Step(start, seen.value, seen.value, 0)]
    for _ in range(rounds):
        now = steps[-1]
        proposals = _proposals(now.choices, seen, cost_model, budget, radii)
        if not proposals:
            break
        values = [float(v) for v in judge(Choices.concat([choices for choices, _ in proposals]))]
        best = int(np.argmin(np.where(np.isnan(values), np.inf, values)))
        if not values[best] < now.value:
            break
        choices, predicted = proposals[best]
        steps.append(Step(choices, values[best], predicted, int(choices.apart(now.choices)[0])))
        if len(steps) <= rounds:
            seen = look(choices)
    return steps


def _proposals(
    incumbent: Choices, seen: Seen, cost_model: CostModel, budget: Budget, radii: Sequence[int]
) -> list[tuple[Choices, float]]:
    """(one row, predicted value) of the program's optimum within each radius, those that differ from
    the incumbent and each other."""
    found: list[tuple[Choices, float]] = []
    for radius in dict.fromkeys(min(r, incumbent.weights.shape[1]) for r in radii):
        try:
            solved = solve(seen.change, cost_model, budget, near=(incumbent, radius), relative_gap=1e-3)
        except AquabitError:  # the incumbent itself keeps the budget, so this is a limit on nodes
            continue
        if all(solved.choices.apart(other)[0] for other in (incumbent, *(c for c, _ in found))):
            found.append((solved.choices, seen.value + solved.score))
    return found

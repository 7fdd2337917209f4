"""Damages: what each (layer, scheme), and each activation choice, does alone; good configurations are
drawn near their front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.maximum_entropy import Gibbs, solve_gibbs
from aquabit.measuring.session import Session
from aquabit.scheme import FP, Act, AquabitError, Rounding, Scheme, act_text
from aquabit.space import SearchSpace

BUDGET_TOLERANCE_BITS = 0.25  # contexts lie within this many real bits per weight of the budget
CONTEXT_ACT = 8  # activation bits of contexts where the space has them, else its closest to full precision
# of good configurations: 1.05 to 2 times the least damage
EXCESSES = tuple(float(e) for e in np.geomspace(0.05, 1, 6))
TUNING = 10  # solves that may go into finding the nominal mean; at either end of a space none may fit
SEEN = 256  # draws whose mean size is compared with the budget
TRIES = 200  # draws of a context of a given excess before it is given up


@dataclass(frozen=True)
class Damages:
    """``weights`` [L, schemes of the space] and ``acts`` [L, activation choices of the space]: the mean
    squared change of a few images from full precision where that is the only change (``Evaluator.fit``).
    ``fp`` and a16 do none; what a layer may not take is infinite.
    """

    space: SearchSpace
    weights: np.ndarray
    acts: np.ndarray

    @staticmethod
    def of(space: SearchSpace, probes: Mapping[tuple[str, str], Mapping[str, Any]]) -> Damages:
        """From a study's features. Raises AquabitError for the first (layer, scheme) whose damage is not
        known."""

        def known(layer: str, text: str) -> float:
            found = probes.get((layer, text), {}).get("damage")
            if found is None:
                raise AquabitError(
                    f"the damage of {text} in layer {layer!r} is not known; `aquabit measure` probes it"
                )
            return float(found)

        schemes, levels = space.schemes, space.act_choices
        weights = np.full((len(space.choices), len(schemes)), np.inf)
        acts = np.zeros((len(space.choices), len(levels)))
        for i, (layer, row) in enumerate(space.choices.items()):
            weights[i, [schemes.index(s) for s in row]] = [
                0.0 if s == FP else known(layer, str(s)) for s in row
            ]
            if row != (FP,):
                acts[i] = [0.0 if act == 16 else known(layer, act_text(act)) for act in levels]
        return Damages(space, weights, acts)

    def scores(self, activations: tuple[Act, ...]) -> np.ndarray:
        """Scores [L, schemes, A] for ``search.solve`` with these activation choices."""
        columns = [self.space.act_choices.index(a) for a in activations]
        return np.asarray(self.weights[:, :, None] + self.acts[:, None, columns])

    def swap(self, layers: Sequence[int], before: Scheme, after: Scheme) -> float:
        """What a swap of two schemes in ``layers`` adds up to."""
        first, second = (self.weights[list(layers), self.space.columns[s]].sum() for s in (before, after))
        return float(second - first)

    def total(self, choices: Choices) -> np.ndarray:
        """The sum of damages, [n]."""
        rows, column = np.arange(len(self.acts)), choices.act_index((*self.space.act_choices, 16))
        padded = np.concatenate([self.acts, np.zeros((len(self.acts), 1))], 1)
        return np.asarray((self.weights[rows, choices.weights] + padded[rows, column]).sum(-1))


def known_damages(space: SearchSpace, probes: Mapping[tuple[str, str], Mapping[str, Any]]) -> Damages | None:
    """``Damages.of`` a study's probes; None where one is missing, as in studies that were made without
    probes."""
    try:
        return Damages.of(space, probes)
    except AquabitError:
        return None


def gibbs(damages: Damages, costs: CostModel, bits: float, excesses: Sequence[float]) -> list[Gibbs]:
    """For each of ``excesses`` the distribution whose mean size is ``bits`` per weight and whose mean damage
    is 1 + excess times the least (``solve_gibbs``). Tied layers are one row of it (``space.groups``).
    Codebooks that layers share are not in the mean size: what is drawn is weighed exactly, see
    ``good_contexts``."""
    groups = damages.space.groups
    sizes = groups.sums(costs.bytes * 8 / costs.weights)
    return solve_gibbs(groups.sums(damages.weights), sizes, bits, excesses)


def context_act(space: SearchSpace) -> Rounding:
    """Activations of contexts."""
    return CONTEXT_ACT if CONTEXT_ACT in space.activations else space.closest_act


def check_budget_in_reach(space: SearchSpace, costs: CostModel, bits: float) -> None:
    """Raise AquabitError, naming both ends, where no context can lie within BUDGET_TOLERANCE_BITS of
    ``bits``."""
    low, high = costs.limits(context_act(space))["bits"]
    if not low - BUDGET_TOLERANCE_BITS <= bits <= high + BUDGET_TOLERANCE_BITS:
        raise AquabitError(
            f"bits = {bits:g} is out of reach: this space has {low:.3g} to {high:.3g} bits per weight"
        )


def good_contexts(
    damages: Damages, costs: CostModel, bits: float, count: int, rng: np.random.Generator
) -> Choices:
    """``count`` good configurations within BUDGET_TOLERANCE_BITS real bits per weight of ``bits``.

    Each is a draw of ``gibbs`` around the program's optimum with an excess of its own, log-uniform over
    EXCESSES; activations are at ``context_act``. The nominal mean is adjusted until the real sizes, shared
    codebooks included, lie around ``bits``; what lies beyond BUDGET_TOLERANCE_BITS is drawn again. Raises
    AquabitError where the space cannot reach ``bits``.
    """
    space, act = damages.space, context_act(damages.space)
    check_budget_in_reach(space, costs, bits)
    mean, family = bits, gibbs(damages, costs, bits, EXCESSES)

    def draw(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scheme indices [n, L] of draws with these excesses, and their real bits [n]."""
        drawn = np.empty((len(levels), len(space.choices)), int)
        for level in np.unique(levels):
            own = family[level].draw(int((levels == level).sum()), rng)
            drawn[levels == level] = own[:, space.groups.index]
        return drawn, costs.totals(Choices.at(space, drawn, act))["bits"]

    for _ in range(TUNING):
        miss = bits - float(draw(np.arange(SEEN) % len(EXCESSES))[1].mean())
        if abs(miss) <= BUDGET_TOLERANCE_BITS / 5:
            break
        mean += float(np.clip(miss, -0.5, 0.5))
        family = gibbs(damages, costs, mean, EXCESSES)
    levels, weights = rng.integers(len(EXCESSES), size=count), np.empty((count, len(space.choices)), int)
    left = np.arange(count)
    for _ in range(TRIES):
        drawn, real = draw(levels[left])
        fits = np.abs(real - bits) <= BUDGET_TOLERANCE_BITS
        weights[left[fits]] = drawn[fits]
        left = left[~fits]
        if not len(left):
            return Choices.at(space, weights, act)
    low, high = costs.limits(act)["bits"]
    raise AquabitError(
        f"no good configuration comes within {BUDGET_TOLERANCE_BITS} of {bits:g} bits per weight; this"
        f" space has {low:.3g} to {high:.3g}"
    )


def damages_of(session: Session) -> Damages | None:
    """What a session's study knows of schemes alone, which is all of its space."""
    return known_damages(session.space, session.study.probes())

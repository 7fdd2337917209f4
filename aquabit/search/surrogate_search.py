"""Rounds of fitting a surrogate, proposing by integer program, local search or evolution, and measuring:
``--method surrogate`` and ``evolve``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from aquabit.cost import CostModel
from aquabit.scheme import Budget, Progress, QuantConfig, no_progress
from aquabit.search.integer_program import solve
from aquabit.search.options import Options, Predict
from aquabit.search.proof import BoundFactory
from aquabit.search.proposer import ROWS, Candidate, Proposer
from aquabit.search.search_options import SearchOptions, ladder

TARGETS = 4  # of the front that the loop proposes for beside the budget: the nearest


@dataclass(frozen=True)
class Experiment:
    """What the loop asks: a fresh surrogate of all that was measured (``fit``); to ``measure`` and store
    configurations; every (configuration, value) so far (``measured``; larger = worse, NaN = failed).

    ``screen(configs)`` -> [n] (larger = worse) judges better than the surrogate and cheaper than a
    measurement. ``bound`` makes the bound of the last surrogate that ``fit`` gave.
    """

    fit: Callable[[], Predict]
    measure: Callable[[list[QuantConfig]], None]
    measured: Callable[[], Iterable[tuple[QuantConfig, float]]]
    screen: Callable[[list[QuantConfig]], np.ndarray] | None = None
    bound: BoundFactory | None = None


def find_candidates(
    cost_model: CostModel,
    options: SearchOptions,
    experiment: Experiment,
    *,
    rows: int = ROWS,
    progress: Progress = no_progress,
) -> list[Candidate]:
    """Propose, measure and learn from configurations within the budget and, for the front, within targets
    around it.

    Each round fits a fresh surrogate, solves the integer program on its additive part and improves that by
    local search for ``options.proposed`` configurations that were never measured: five in eight under the
    budget, the rest along the front; fewer only where the space has no more. ``method="evolve"`` proposes
    from the front of an evolution instead. With a screen each round proposes ``options.screened`` times as
    many and measures those that it finds best, and always the surrogate's own first: successive halving by
    ever dearer judges. The last round proves how near to the surrogate's optimum it came. Raises AquabitError
    where the budget cannot be kept.
    """
    budget, rounds = options.budget, options.proposals
    targets = [budget, *ladder(cost_model, budget, options.spread[:TARGETS])]
    _check(cost_model, budget)
    pool = options.screened if experiment.screen is not None else 1
    found: list[Candidate] = []
    steps = rounds * options.proposed * pool
    for number in range(rounds):
        proposer = Proposer(
            cost_model,
            experiment.fit(),
            list(experiment.measured()),
            targets,
            number,
            options.seed,
            evolves=options.method == "evolve",
            rows=rows,
            bound=experiment.bound if number == rounds - 1 else None,
        )
        wanted = schedule(targets, options.proposed, number)
        for slot, target in enumerate(wanted * pool):
            progress("search", number * len(wanted) * pool + slot, steps)
            if not proposer.add(target) and target is not budget:
                proposer.add(budget)
        chosen = proposer.candidates
        if not chosen:
            break
        if experiment.screen is not None and len(chosen) > len(wanted):
            chosen = best_of(chosen, wanted, experiment.screen([c.config for c in chosen]))
        experiment.measure([c.config for c in chosen])
        found += chosen
    progress("search", steps, steps)
    return found


def best_of(candidates: Sequence[Candidate], wanted: Sequence[Budget], values: np.ndarray) -> list[Candidate]:
    """As many candidates as ``wanted`` has targets, for each target its best by ``values`` [n] (larger =
    worse), in the order of proposal; the first candidate stays, and a target that has too few leaves its
    places to the best of the others."""
    ranked = np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable")
    order = [0, *(int(i) for i in ranked if i != 0)]
    places, kept = Counter(wanted), list[int]()
    for i in order:
        if places[candidates[i].target] > 0:
            places[candidates[i].target] -= 1
            kept.append(i)
    kept += [i for i in order if i not in kept][: len(wanted) - len(kept)]
    return [candidates[i] for i in sorted(kept)]


def schedule(targets: Sequence[Budget], per_round: int, number: int) -> list[Budget]:
    """The target of each of a round's proposals: five in eight the budget (``targets[0]``), the others in
    turn over the rounds."""
    others = list(targets[1:])
    share = per_round * 3 // 8 if others else 0
    return [targets[0]] * (per_round - share) + [
        others[(number * share + i) % len(others)] for i in range(share)
    ]


def _check(cost_model: CostModel, budget: Budget) -> None:
    """Raise AquabitError where limits cannot be kept together."""
    options = Options.of(cost_model, budget)
    space = cost_model.space
    shape = (len(space.choices), len(space.schemes), len(options.columns.activations))
    solve(np.zeros(shape), cost_model, budget)

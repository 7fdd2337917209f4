"""Evolution of ``--method evolve``: NSGA-II (pymoo's) over whole fronts, what the surrogate predicts against
each limited cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget
from aquabit.search.options import Options, Predict


def check_installed() -> None:
    """Raise AquabitError, with the command that helps, where pymoo is not installed."""
    try:
        import pymoo.optimize  # noqa: F401
    except ImportError as error:
        raise AquabitError(
            "the method evolve needs pymoo, which is not installed: pip install 'aquabit[evolve]'"
        ) from error


def evolve(
    predict: Predict,
    cost_model: CostModel,
    targets: Sequence[Budget],
    starts: Sequence[Choices] = (),
    *,
    population: int = 80,
    generations: int = 60,
    seed: int = 0,
) -> Choices:
    """The n configurations of the front that NSGA-II (Deb et al., 2002) ends with: none is
    predicted better and cheaper than another.

    The objectives are the prediction and every cost that ``targets`` limit (size, BOPs, latency); a gene is
    the place of a layer's column in the order of their size. Configurations lie between the smallest and the
    largest target. ``starts`` (one row each, as of integer programs) are in the first population, the
    rest are random crossings of them with random configurations. Equal under equal seeds. Raises AquabitError
    where pymoo is not installed.
    """
    check_installed()
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.optimize import minimize

    every = [Options.of(cost_model, target) for target in targets]
    options, largest, smallest = (
        every[0],
        np.max([o.caps for o in every], 0),
        np.min([o.caps for o in every], 0),
    )
    columns, free = options.columns, options.columns.free
    order = [
        np.flatnonzero(row)[np.argsort(options.costs[0, i, row], kind="stable")]
        for i, row in enumerate(columns.allowed)
    ]
    place = np.full(columns.allowed.shape, -1)
    for i, row in enumerate(order):
        place[i, row] = np.arange(len(row))
    base = np.array([row[0] for row in order])
    if not len(free):
        return columns.split(base)

    def choices(genes: np.ndarray) -> np.ndarray:
        choice = np.repeat(base[None], len(genes), 0)
        for g, i in enumerate(free):
            choice[:, i] = order[i][genes[:, g]]
        return choice

    class Trade(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            choice = choices(np.asarray(x, int))
            used = options.used(choice)
            value = np.asarray(predict(columns.split(choice)), float)
            out["F"] = np.stack([np.where(np.isfinite(value), value, 1e30), *(used / largest[:, None])], 1)
            out["G"] = np.stack(
                [*(used / largest[:, None] - 1), 0.9 * smallest[0] / largest[0] - used[0] / largest[0]], 1
            )

    rng = np.random.default_rng(seed)
    counts = np.array([len(order[i]) for i in free])
    known = [c for c in (columns.join(start)[0] for start in starts) if (c >= 0).all()]
    first = np.array([place[free, c[free]] for c in known], int).reshape(-1, len(free))[:population]
    drawn = rng.integers(counts, size=(population - len(first), len(free)))
    if len(first):  # a share of each start that differs from row to row, the rest at random
        keep = rng.random(drawn.shape) < rng.random((len(drawn), 1))
        drawn = np.where(keep, first[rng.integers(len(first), size=len(drawn))], drawn)
    algorithm = NSGA2(
        pop_size=population,
        sampling=np.concatenate([first, drawn]),
        crossover=UniformCrossover(),
        mutation=PM(
            prob=1.0,
            prob_var=max(1.0, len(free) / 20) / len(free),
            eta=5,
            vtype=float,
            repair=RoundingRepair(),
        ),
    )
    problem = Trade(
        n_var=len(free), n_obj=1 + len(largest), n_ieq_constr=1 + len(largest), xl=0, xu=counts - 1, vtype=int
    )
    found = minimize(problem, algorithm, ("n_gen", generations), seed=seed, verbose=False)
    genes = (
        np.zeros((0, len(free)), int)
        if found.X is None
        else np.unique(np.atleast_2d(found.X).astype(int), axis=0)
    )
    return columns.split(choices(genes))

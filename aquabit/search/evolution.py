"""Evolution of ``--method evolve``: NSGA-II (pymoo's) over whole fronts, what the surrogate predicts against
each limited cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget
from aquabit.search.options import Options, Predict

POPULATION = 80  # configurations of a generation


def check_installed() -> None:
    """Raise AquabitError, with the command that helps, where pymoo is not installed."""
    try:
        import pymoo.optimize  # noqa: F401
    except ImportError as error:
        raise AquabitError(
            "the method evolve needs pymoo, which is not installed: pip install 'aquabit[evolve]'"
        ) from error


@dataclass(frozen=True)
class _Genes:
    """Columns [n, L] as genes [n, F], one for each free layer: the place of its column in the ``order`` of
    their size."""

    free: np.ndarray
    order: list[np.ndarray]

    @staticmethod
    def of(options: Options) -> _Genes:
        sizes = options.costs[0]
        allowed = (np.flatnonzero(row) for row in options.columns.allowed)
        order = [own[np.argsort(sizes[i, own], kind="stable")] for i, own in enumerate(allowed)]
        return _Genes(options.columns.free, order)

    @property
    def counts(self) -> np.ndarray:
        """How many values each gene has, [F]."""
        return np.array([len(self.order[i]) for i in self.free])

    def read(self, genes: np.ndarray) -> np.ndarray:
        choice = np.repeat(np.array([[row[0] for row in self.order]]), len(genes), 0)
        for g, i in enumerate(self.free):
            choice[:, i] = self.order[i][genes[:, g]]
        return choice

    def write(self, choice: np.ndarray) -> np.ndarray:
        """The inverse of ``read``."""
        places = [[int(np.flatnonzero(self.order[i] == row[i])[0]) for i in self.free] for row in choice]
        return np.array(places, int).reshape(-1, len(self.free))

    def first(self, starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The first population: ``starts`` (columns [n, L]), then random crossings of them with random
        configurations."""
        first = self.write(starts)[:POPULATION]
        drawn = rng.integers(self.counts, size=(POPULATION - len(first), len(self.free)))
        if len(first):  # a share of each start that differs from row to row, the rest at random
            keep = rng.random(drawn.shape) < rng.random((len(drawn), 1))
            drawn = np.where(keep, first[rng.integers(len(first), size=len(drawn))], drawn)
        return np.concatenate([first, drawn])


def evolve(
    predict: Predict,
    cost_model: CostModel,
    targets: Sequence[Budget],
    starts: Sequence[Choices] = (),
    *,
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
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.optimize import minimize

    every = [Options.of(cost_model, target) for target in targets]
    columns, genes = every[0].columns, _Genes.of(every[0])
    count = len(genes.free)
    if not count:
        return columns.split(genes.read(np.zeros((1, 0), int)))
    known = [c for c in (columns.join(start)[0] for start in starts) if (c >= 0).all()]
    first = genes.first(np.array(known, int).reshape(-1, len(columns.allowed)), np.random.default_rng(seed))
    changed = max(1.0, count / 20) / count  # of a gene: one in 20, and at least one in all
    algorithm = NSGA2(
        pop_size=POPULATION,
        sampling=first,
        crossover=UniformCrossover(),
        mutation=PM(prob=1.0, prob_var=changed, eta=5, vtype=float, repair=RoundingRepair()),
    )
    problem = _trade(predict, genes, every)
    found = minimize(problem, algorithm, ("n_gen", generations), seed=seed, verbose=False)
    front = np.zeros((0, count)) if found.X is None else np.unique(np.atleast_2d(found.X).astype(int), axis=0)
    return columns.split(genes.read(front.astype(int)))


def _trade(predict: Predict, genes: _Genes, every: Sequence[Options]) -> Any:
    """pymoo's problem: the prediction against each cost, between the smallest and the largest of the limits
    of ``every`` target."""
    from pymoo.core.problem import Problem

    options, limits = every[0], np.array([o.caps for o in every])
    largest, smallest = limits.max(0), limits.min(0)

    class Trade(Problem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            choice = genes.read(np.asarray(x, int))
            used = options.used(choice)
            value = np.asarray(predict(options.columns.split(choice)), float)
            out["F"] = np.stack([np.where(np.isfinite(value), value, 1e30), *(used / largest[:, None])], 1)
            out["G"] = np.stack(
                [*(used / largest[:, None] - 1), 0.9 * smallest[0] / largest[0] - used[0] / largest[0]], 1
            )

    size, costs = len(genes.free), len(largest)
    return Trade(n_var=size, n_obj=1 + costs, n_ieq_constr=1 + costs, xl=0, xu=genes.counts - 1, vtype=int)

"""Local search of ``--method surrogate``: single-layer changes and exchanges between two layers that the
surrogate predicts better, never outside the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget, act_text
from aquabit.search.options import Options, Predict, kernel_operations

BATCH = 4096  # rows that are predicted at once: bounds memory
LIFTS = 256  # first halves of pairs that are ranked against every other change; more only slows the ranking


@dataclass(frozen=True)
class Improved:
    """A configuration (``choices``, one row), the ``predicted`` value there and at the start, and the
    ``rows`` of prediction it took."""

    choices: Choices
    predicted: float
    start: float
    rows: int


class _Counted:
    """``predict`` over columns [n, L] in batches, counting rows against a limit; values that are not
    numbers count as infinitely bad."""

    def __init__(self, predict: Predict, options: Options, limit: int):
        self.predict, self.options, self.left, self.rows = predict, options, limit, 0

    def __call__(self, choice: np.ndarray) -> np.ndarray:
        self.rows += len(choice)
        self.left -= len(choice)
        if not len(choice):
            return np.zeros(0)
        parts = [
            self.predict(self.options.columns.split(choice[i : i + BATCH]))
            for i in range(0, len(choice), BATCH)
        ]
        values = np.concatenate([np.asarray(p, float) for p in parts])
        return np.where(np.isnan(values), np.inf, values)


def improve(
    origin: Choices,
    predict: Predict,
    cost_model: CostModel,
    budget: Budget,
    seed: int = 0,
    *,
    rows: int = 60_000,
    pairs: int = 1000,
    restarts: int = 8,
) -> Improved:
    """The best predicted configuration found from ``origin`` (one row) by steepest descent and
    ``restarts`` perturbations of the best.

    Each step predicts every single-layer change and the ``pairs`` most promising exchanges within the budget,
    and takes the best; at most ``rows`` rows are predicted in all. Never outside the budget, never predicted
    worse than the start, equal under equal seeds. Raises AquabitError where the start is outside the budget
    or the space.
    """
    options = Options.of(cost_model, budget)
    choice = options.columns.join(origin)[0]
    if (choice < 0).any():
        layer = int(np.argmax(choice < 0))
        name = cost_model.space.layers[options.columns.groups.first[layer]]
        cost_model.space.check(origin.config, extra_schemes=True)  # says so where it breaks a tie
        has = origin.config[name]
        raise AquabitError(
            f"the start gives layer {name!r} {has.weight} and {act_text(has.act)}, which it may not take"
            f" under {budget}"
        )
    if not options.keeps(choice):
        raise AquabitError(
            f"the start is outside the budget ({budget}); start from the integer program's solution"
        )
    counted, rng = _Counted(predict, options, max(rows, 1)), np.random.default_rng(seed)
    start = float(counted(choice[None])[0])
    best, value, singles = _descend(choice, start, counted, pairs)
    for _ in range(restarts):
        kicked = _kick(best, singles, options, rng)
        if kicked is None or counted.left < 1:
            continue
        trial, reached, table = _descend(kicked, float(counted(kicked[None])[0]), counted, pairs)
        if reached < value:
            best, value, singles = trial, reached, table
    return Improved(options.columns.split(best), value, start, counted.rows)


def lighten(
    choices: Choices,
    predict: Predict,
    cost_model: CostModel,
    budget: Budget,
    slack: float,
    *,
    rows: int = 20_000,
) -> Choices:
    """A configuration (one row) changed in single layers to need fewer operations of the kernel, while the
    prediction stays within ``slack`` of what it was and the budget is kept: a tie goes to the formats that
    run fastest. At most ``rows`` rows are predicted.
    """
    options = Options.of(cost_model, budget)
    choice, work = options.columns.join(choices)[0], kernel_operations(cost_model, options)
    counted, layers = _Counted(predict, options, rows), np.arange(len(choice))
    value: float | None = None
    while True:
        saved = work[layers, choice][:, None] - work
        layer, column = np.nonzero(options.columns.allowed & (saved > 1e-9 * work.max()))
        single = np.repeat(choice[None], len(layer), 0)
        single[np.arange(len(layer)), layer] = column
        kept = np.flatnonzero(options.keeps(single))
        if not len(kept) or counted.left < len(kept) + 1:
            break
        value = float(counted(choice[None])[0]) if value is None else value
        if not np.isfinite(value):
            break
        kept = kept[counted(single[kept]) <= value + slack]
        if not len(kept):
            break
        choice = single[kept[np.argmax(saved[layer[kept], column[kept]])]]
    return options.columns.split(choice)


def _descend(
    choice: np.ndarray, value: float, counted: _Counted, pairs: int
) -> tuple[np.ndarray, float, np.ndarray]:
    """Columns [L] where no considered change is predicted better, their value, and the value [L, C] of
    every single change there."""
    options, rows = counted.options, np.arange(len(choice))
    table = np.where(options.columns.allowed, value, np.inf)
    while True:
        changes = options.columns.allowed.copy()
        changes[rows, choice] = False
        layer, column = np.argwhere(changes).T
        if counted.left < len(layer) or not len(layer):
            return choice, value, table
        single = np.repeat(choice[None], len(layer), 0)
        single[np.arange(len(layer)), layer] = column
        values = counted(single)
        table = np.full(changes.shape, np.inf)
        table[rows, choice], table[layer, column] = value, values
        inside = np.where(options.keeps(single), values, np.inf)
        best, reached = single[inside.argmin()], float(inside.min())
        first, second = _exchanges(choice, value, layer, column, values, options, min(pairs, counted.left))
        if len(first):
            double = single[first]
            double[np.arange(len(first)), layer[second]] = column[second]
            # two changes that share codebooks do not cost what each does alone
            double = double[options.keeps(double)]
            paired = counted(double)
            if len(double) and paired.min() < reached:
                best, reached = double[paired.argmin()], float(paired.min())
        if not reached < value:
            return choice, value, table
        choice, value = best, reached


def _exchanges(
    choice: np.ndarray,
    value: float,
    layer: np.ndarray,
    column: np.ndarray,
    values: np.ndarray,
    options: Options,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (first, second) into the single changes: the ``count`` pairs within the budget whose values
    have the least sum.

    First halves are the changes predicted better (at most LIFTS of them, by gain per cost), or the least bad
    where none is.
    """
    change = options.changes(choice)[:, layer, column]
    slack = options.caps - options.used(choice)
    weight = np.maximum((change / np.maximum(options.caps, 1)[:, None]).max(0), 1e-9)
    better = np.flatnonzero(values < value)
    if len(better) > LIFTS:
        gain = np.minimum(value - values[better], 1e290) / weight[better]  # weights are 1e-9 and more
        better = np.sort(better[np.argsort(-gain, kind="stable")[:LIFTS]])
    elif not len(better):
        better = np.sort(np.argsort(values, kind="stable")[:64])
    total = values[better][:, None] + values[None]
    good = np.isfinite(total) & (layer[better][:, None] != layer[None])
    for r in range(len(slack)):
        good &= change[r][better][:, None] + change[r][None] <= slack[r]
    first, second = np.nonzero(good)
    order = total[first, second]
    if len(order) > count:
        keep = np.sort(np.argpartition(order, count - 1)[:count]) if count else np.array([], int)
        first, second = first[keep], second[keep]
    return better[first], second


def _kick(
    choice: np.ndarray, singles: np.ndarray, options: Options, rng: np.random.Generator
) -> np.ndarray | None:
    """``choice`` with a few layers changed at random, brought back within the budget where ``singles`` [L,
    C] says it hurts least."""
    free = options.columns.free
    if not len(free):
        return None
    moved = choice.copy()
    count = min(len(free), int(rng.integers(2, max(3, len(free) // 8) + 1)))
    for layer in rng.choice(free, size=count, replace=False):
        moved[layer] = rng.choice(np.flatnonzero(options.columns.allowed[layer]))
    return options.repair(moved, singles)

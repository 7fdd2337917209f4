"""One (scheme, activation bits) per layer of least total score under hard limits: a multiple-choice
knapsack, solved by HiGHS."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import Act, AquabitError, Budget
from aquabit.search.options import Columns, Options, Predict, activation_choices, fixed_act, kernel_operations
from aquabit.space import SearchSpace

# the largest difference between two scores of a layer: HiGHS's absolute gap of 1e-6 is then one in 10^10
SCALE = 1e4
NODES = 20_000  # a limit on nodes, not on seconds, so that the same seed gives the same answer
BATCH = 4096  # rows that are predicted at once: bounds memory


@dataclass(frozen=True)
class Solution:
    """A configuration (``choices``, one row), its total ``score``, and a proven lower ``bound`` on any total.

    ``gap`` is score - bound relative to the largest difference between two totals: 0 where the optimum is
    proven.
    """

    choices: Choices
    score: float
    bound: float
    gap: float


Cut = tuple[Choices, int]  # (one row, layers that must differ)


def solve(
    scores: np.ndarray,
    cost_model: CostModel,
    budget: Budget,
    *,
    cuts: Sequence[Cut] = (),
    relative_gap: float = 0.0,
    ties: float | None = None,
    near: Cut | None = None,
) -> Solution:
    """The configuration of least total score within every limit of ``budget``, exactly (bytes are whole
    numbers).

    Tied layers of the space are one row of the program, whose scores and costs are their sums. With ``ties``,
    totals that exceed the least by no more than this share of the largest difference between
    two totals count as equal, and of them the configuration of fewest operations is taken
    (``kernel_operations``): a second program, in which the score is one more limit.

    ``scores`` is [L, schemes, A] over ``space.schemes`` and ``activation_choices(space, budget)``; cells that
    a layer may not take are ignored. ``cuts`` ask for solutions that differ from known ones in so many layers
    or more, ``near`` for one that differs from a known one in so many or fewer (a trust region). Raises
    AquabitError with the smallest and the largest possible cost where the limits cannot be kept, alone or
    together, and for scores that are not finite or of the wrong shape.
    """
    options = Options.of(cost_model, budget)
    table = _table(scores, cost_model, options)
    spans = _spans(table, options)
    unit = SCALE / spans.max() if spans.max() > 0 else 1.0
    scaled = (table - np.where(options.columns.allowed, table, np.inf).min(1, keepdims=True)) * unit
    scaled = np.where(options.columns.allowed, scaled, 0.0)
    excluded = [(options.columns.join(known)[0], d) for known, d in cuts]
    if near is not None:
        known, radius = near
        if radius < 1:
            raise AquabitError(f"a trust region of {radius} layers is empty; give at least 1")
        excluded.append((options.columns.join(known)[0], -radius))
    program = _Program(cost_model, budget, options, tuple(excluded))
    found = program.exact(scaled, relative_gap)
    if found is None:
        raise AquabitError(_infeasible(options, cost_model, budget, bool(cuts) or near is not None))
    choice, bound = found
    if ties is not None:
        choice = program.lightest(choice, scaled, ties * unit * float(spans.sum()))
    rows = np.arange(len(choice))
    score, above = float(table[rows, choice].sum()), float(scaled[rows, choice].sum())
    # in scaled units; the bound counts from the sum of the layers' smallest scores
    missing = max(above - bound, 0.0)
    gap = missing / max(unit * float(spans.sum()), 1e-300)
    return Solution(options.columns.split(choice), score, float(score - missing / unit), float(gap))


@dataclass(frozen=True)
class _Program:
    """What an answer must keep: the budget, as ``options`` count it, and its distance from known choices
    (``cuts``: columns [L], and in how many layers to differ at least; a negative number: at most)."""

    cost_model: CostModel
    budget: Budget
    options: Options
    cuts: tuple[tuple[np.ndarray, int], ...]

    def exact(self, scores: np.ndarray, relative_gap: float) -> tuple[np.ndarray, float] | None:
        """``_milp`` whose answer keeps the budget exactly: HiGHS rounds within tolerances, which may slip
        over a limit by some bytes.

        An answer that slipped is forbidden, which keeps the optimum; after eight, the last is repaired and
        the bound given up.
        """
        choice, cuts = None, self.cuts
        for _ in range(8):
            choice, bound = _milp(scores, self.options, cuts, relative_gap)
            if choice is None:
                return None
            if self._keeps(choice):
                return choice, bound
            cuts = (*cuts, (choice, 1))
        mended = None if choice is None else self.options.repair(choice, scores)
        # scores here are never negative
        return None if mended is None or not self._keeps(mended) else (mended, 0.0)

    def lightest(self, choice: np.ndarray, scores: np.ndarray, slack: float) -> np.ndarray:
        """Of the choices [L] whose total score is at most ``slack`` above that of ``choice``, one of fewest
        operations."""
        rows, options = np.arange(len(choice)), self.options
        allowed, work = options.columns.allowed, kernel_operations(self.cost_model, options)
        work = np.where(allowed, work - np.where(allowed, work, np.inf).min(1, keepdims=True), 0.0)
        if not work.max() > 0:
            return choice
        cap = float(scores[rows, choice].sum()) + slack + 1e-9
        limited = replace(
            options,
            names=(*options.names, "score"),
            costs=np.concatenate([options.costs, scores[None]]),
            caps=np.append(options.caps, cap),
            openings=tuple(replace(o, costs=np.append(o.costs, 0.0)) for o in options.openings),
        )
        try:
            found = replace(self, options=limited).exact(work * (SCALE / work.max()), 1e-6)
        except AquabitError:  # it ran out of nodes
            return choice
        return choice if found is None or work[rows, found[0]].sum() >= work[rows, choice].sum() else found[0]

    def _keeps(self, choice: np.ndarray) -> bool:
        totals = self.cost_model.totals(self.options.columns.split(choice))
        return bool(self.cost_model.within(totals, self.budget)[0]) and bool(self.options.keeps(choice))


def _table(scores: np.ndarray, cost_model: CostModel, options: Options) -> np.ndarray:
    """Scores as float64 [L, C], checked; those of tied layers added up."""
    shape = (len(cost_model.space.choices), len(cost_model.space.schemes), len(options.columns.activations))
    if scores.shape != shape:
        raise AquabitError(
            f"scores have shape {scores.shape}; this space and budget take [layers, schemes, activations] ="
            f" {shape}"
        )
    table, groups = np.asarray(scores, float).reshape(shape[0], -1), options.columns.groups
    bad = np.argwhere(options.columns.allowed[groups.index] & ~np.isfinite(table))
    if len(bad):
        layer, column = bad[0]
        name, scheme = cost_model.space.layers[layer], cost_model.space.schemes[column // shape[2]]
        raise AquabitError(
            f"the score of layer {name!r} at {scheme} is {table[layer, column]}; scores must be finite"
        )
    return groups.sums(table)


def _spans(table: np.ndarray, options: Options) -> np.ndarray:
    """Largest less smallest score of each layer, [L]."""
    allowed = options.columns.allowed
    return np.asarray(np.where(allowed, table, -np.inf).max(1) - np.where(allowed, table, np.inf).min(1))


# weights of the cells and of the openings, and the most they may sum to
Row = tuple[np.ndarray, np.ndarray, float]


def _milp(
    scores: np.ndarray,
    options: Options,
    cuts: Sequence[tuple[np.ndarray, int]],
    relative_gap: float,
    limits: Sequence[int] | None = None,
    opening_scores: np.ndarray | None = None,
) -> tuple[np.ndarray | None, float]:
    """Columns [L] and a lower bound on the total of ``scores`` [L, C]; (None, inf) where no choice keeps the
    limits.

    ``limits`` names the rows of ``options.costs`` to keep (default: all). Each allowed cell is a variable, 1
    where it is chosen. Shared codebooks are further variables, each 1 where a layer uses them;
    ``opening_scores`` are theirs (default: none).
    """
    layer, column = np.argwhere(options.columns.allowed).T
    count, openings = len(layer), len(options.openings)
    size = count + openings
    picks = csr_matrix((np.ones(count), (layer, np.arange(count))), shape=(len(scores), size))
    kept = range(len(options.caps)) if limits is None else limits
    rows = [
        *_limit_rows(options, layer, column, kept),
        *_opening_rows(options, layer, column),
        *_cut_rows(cuts, layer, column, len(scores), openings),
    ]
    with _silent():
        found = milp(
            np.concatenate(
                [scores[layer, column], np.zeros(openings) if opening_scores is None else opening_scores]
            ),
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(picks, np.ones(len(scores)), np.ones(len(scores))),
                *(
                    LinearConstraint(csr_matrix(np.concatenate([a, b])[None]), -np.inf, most)
                    for a, b, most in rows
                ),
            ],
            options={"mip_rel_gap": relative_gap, "node_limit": NODES},
        )
    if found.x is None and found.status == 1:
        raise AquabitError(f"the integer program stopped after {NODES} nodes without a solution")
    if found.x is None:
        return None, np.inf
    share = np.full(scores.shape, -1.0)
    share[layer, column] = found.x[:count]
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
    return share.argmax(1), float(bound)


def _limit_rows(
    options: Options, layer: np.ndarray, column: np.ndarray, limits: Iterable[int]
) -> Iterator[Row]:
    """Limits of costs. These enter as the excess over the layer's smallest, divided by the largest of them,
    so that rows of bytes and of BOPs are alike to HiGHS."""
    for r in limits:
        least = np.where(options.columns.allowed, options.costs[r], np.inf).min(1)
        excess = options.costs[r][layer, column] - least[layer]
        once = np.array([o.costs[r] for o in options.openings])
        unit = 1e3 / max(float(excess.max()), float(once.max(initial=0.0)), 1e-300)
        yield excess * unit, once * unit, (options.caps[r] - least.sum()) * unit


def _opening_rows(options: Options, layer: np.ndarray, column: np.ndarray) -> Iterator[Row]:
    """A layer uses shared codebooks only where they are there."""
    for opening, own in zip(options.openings, np.eye(len(options.openings)), strict=True):
        for member in opening.layers:
            yield ((layer == member) & opening.columns[column]).astype(float), -own, 0.0


def _cut_rows(
    cuts: Sequence[tuple[np.ndarray, int]], layer: np.ndarray, column: np.ndarray, layers: int, openings: int
) -> Iterator[Row]:
    """Distances from known choices: at least so many layers differ, or at most where the number is
    negative."""
    for known, differ in cuts:
        same, none = (known[layer] == column).astype(float), np.zeros(openings)
        yield (-same, none, -(layers + float(differ))) if differ < 0 else (same, none, layers - float(differ))


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what C code prints: the HiGHS of scipy 1.17 leaves a debug line on stdout, whatever its options
    say, amid ``--json -``."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else None
    try:
        stdout = os.dup(1) if flush else -1
    except OSError:  # closed
        stdout = -1
    if flush is None or stdout < 0:
        yield
        return
    flush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def _infeasible(options: Options, cost_model: CostModel, budget: Budget, cut: bool) -> str:
    """One sentence that says what each limit can reach while the others are kept."""
    if cut and _milp(np.zeros(options.costs.shape[1:]), options, (), 0.0)[0] is not None:
        return f"no further configuration within {budget} differs enough from those that are known"
    fixed = fixed_act(options.columns.activations)
    reach = []
    for r, name in enumerate(options.names):
        others = [k for k in range(len(options.names)) if k != r]
        unit = SCALE / max(float(options.costs[r].max()), 1e-300)
        tables = np.array([opening.costs[r] * unit for opening in options.openings])
        choice, _ = _milp(options.costs[r] * unit, options, (), 0.0, others, tables)
        low, high = cost_model.limits(fixed)[name]
        if choice is None:  # more than one limit is at fault
            exclude = " and ".join(options.names[k] for k in others)
            reach.append(
                f"{name} alone can reach {low:.6g} to {high:.6g}, while {exclude} exclude each other"
            )
            continue
        totals = cost_model.totals(options.columns.split(choice))
        beside = f" with {' and '.join(options.names[k] for k in others)} kept" if others else ""
        reach.append(f"{name} can reach {float(totals[name][0]):.6g}{beside}, and at most {high:.6g}")
    return f"the budget ({budget}) cannot be kept: {'; '.join(reach)}"


def choice_effects(
    predict: Predict, space: SearchSpace, contexts: Choices, activations: tuple[Act, ...] | None = None
) -> np.ndarray:
    """Predicted change [n, L, schemes, A] when one layer of context n takes a choice instead of its first (a
    constant per layer, which no optimum depends on): averaged over contexts, scores for ``solve``. Tied
    layers change together, and the first of them has it all.

    The axis A is ``activations``, by default the fixed one of a budget in bits or bytes. Cells that a layer
    may not take are infinite. Costs n x sum of the layers' choices rows of ``predict``.
    """
    columns = Columns.of(space, activations or activation_choices(space))
    layer, column = np.argwhere(columns.allowed).T
    each, changed = columns.each, columns.groups.index == layer[:, None]
    out = np.full((len(contexts), *columns.allowed.shape), np.inf)
    base = columns.allowed.argmax(1)
    for n, context in enumerate(contexts):
        many = context[np.zeros(len(layer), int)]
        many = replace(
            many,
            weights=np.where(changed, each.weights[column], many.weights),
            acts=np.where(changed, each.acts[column], many.acts),
        )
        for start in range(0, len(layer), BATCH):
            part = slice(start, start + BATCH)
            out[n, layer[part], column[part]] = predict(many[part])
        out[n] -= out[n, np.arange(len(base)), base][:, None]
    every = np.where(columns.allowed[columns.groups.index], 0.0, np.inf) + np.zeros((len(contexts), 1, 1))
    every[:, columns.groups.first] = out
    return every.reshape(*every.shape[:2], -1, len(columns.activations))

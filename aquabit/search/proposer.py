"""What one round of a surrogate's search proposes: the integer program's optimum over its additive part,
improved by local search, or members of an evolution's front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget, QuantConfig
from aquabit.search.evolution import evolve
from aquabit.search.integer_program import Solution, choice_effects, solve
from aquabit.search.local_search import improve, lighten
from aquabit.search.options import Options, Predict
from aquabit.search.proof import BoundFactory, Proof, branch_and_bound
from aquabit.space import BITS_RANGE

CONTEXTS = 16  # configurations that effects of single choices are averaged over
# predictions of single choices for one target, which set the number of contexts of large models, at least 4
CONTEXT_ROWS = 15_000
ROWS = 15_000  # predictions of one local search
# proposals for one target whose local search has all rows; later ones, which a screen is to judge, a quarter
THOROUGH = 8
# predictions that differ by less, relative to the spread of those of the measured configurations, are equal;
# of equal ones the configuration of fewer operations is proposed
TIES = 1e-3


@dataclass(frozen=True)
class Candidate:
    """A configuration that the search proposed in ``round`` under ``target``, and the surrogate's value
    for it then (larger = worse); with a round's first under the budget, what was proved of that surrogate."""

    config: QuantConfig
    target: Budget
    round: int
    predicted: float
    proof: Proof | None = None


@dataclass
class _Aim:
    """What a round knows of one target: effects [n, L, S, A] of single choices in n contexts, and the best
    measured configuration (one row)."""

    options: Options
    effects: np.ndarray
    warm: Choices | None
    tries: int = 0
    solution: Solution | None = None  # of the mean effects over all contexts


@dataclass
class Proposer:
    """One round's proposals, each new and apart from the others of its round."""

    cost_model: CostModel
    predict: Predict
    measured: list[tuple[QuantConfig, float]]
    targets: Sequence[Budget]
    round: int
    seed: int
    evolves: bool = False  # proposals are of the front of an evolution
    rows: int = ROWS
    bound: BoundFactory | None = None
    candidates: list[Candidate] = field(default_factory=list)
    aims: dict[Budget, _Aim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.space = self.cost_model.space
        known = set(self.space.schemes)
        inside = [(c, v) for c, v in self.measured if all(c[k].weight in known for k in self.space.choices)]
        self.known_digests = {c.digest for c, _ in self.measured}
        self.known = Choices.of(self.space, [c for c, _ in inside])
        self.values = np.array([v for _, v in inside], float)
        self.picked: list[Choices] = []  # this round's proposals
        self.front: Choices | None = None  # of the evolution
        predicted = np.asarray(self.predict(self.known), float) if len(inside) else np.zeros(0)
        finite = predicted[np.isfinite(predicted)]
        self.slack = TIES * float(finite.max() - finite.min()) if len(finite) else 0.0
        self.known_hashes = self._hash(self.known)

    def add(self, target: Budget) -> bool:
        """One more candidate under ``target``; False where none is left."""
        aim = self.aims.get(target) or self.aims.setdefault(target, self._aim(target))
        rng = np.random.default_rng([self.seed, self.round, len(self.candidates)])
        apart = max(1, len(aim.options.columns.free) // 20)
        aim.tries += 1
        start = self._evolved(target, apart) if self.evolves else self._searched(aim, target, apart, rng)
        if start is None or not self._new(start):
            start = self._perturbed(aim, target, rng)
        if start is None:
            return False
        proof = None
        if target == self.targets[0] and aim.tries == 1:
            start, proof = self._proved(aim, target, start)
        predicted = float(self.predict(start)[0])
        self.candidates.append(Candidate(start.config, target, self.round, predicted, proof))
        self.picked.append(start)
        return True

    def _searched(self, aim: _Aim, target: Budget, apart: int, rng: np.random.Generator) -> Choices | None:
        """The integer program's optimum, or the best measured configuration at the second try, improved on
        the surrogate; of ties the one of fewest operations."""
        start = aim.warm if aim.tries == 2 and aim.warm is not None else self._start(aim, target, apart, rng)
        if start is None:
            return None
        avoiding = self._avoiding(apart)
        rows = self.rows if aim.tries <= THOROUGH else self.rows // 4
        found = improve(start, avoiding, self.cost_model, target, int(rng.integers(1 << 31)), rows=rows)
        return lighten(found.choices, avoiding, self.cost_model, target, self.slack)

    def _evolved(self, target: Budget, apart: int) -> Choices | None:
        """The best predicted member within ``target`` of one front for all targets, not known and apart
        from the round's others; it starts from the integer program's optimum of each target."""
        if self.front is None:
            starts = []
            for other in self.targets:
                aim = self.aims.get(other) or self.aims.setdefault(other, self._aim(other))
                first = self._start(aim, other, apart, np.random.default_rng(self.seed))
                starts += [start for start in (first, aim.warm) if start is not None]
            seed = self.seed + self.round
            self.front = evolve(self.predict, self.cost_model, self.targets, starts, seed=seed)
        if not len(self.front):
            return None
        inside = self.cost_model.within(self.cost_model.totals(self.front), target)
        values = np.where(inside, self._avoiding(apart)(self.front), np.inf)
        best = int(values.argmin())
        return self.front[best] if np.isfinite(values[best]) else None

    def _proved(self, aim: _Aim, target: Budget, start: Choices) -> tuple[Choices, Proof | None]:
        """The proof for the budget, and ``start``, or what branch and bound finds better where that is
        new."""
        if aim.solution is None:
            return start, None
        additive = (aim.solution.score, aim.solution.bound, aim.solution.gap)
        inside = [c for c in (start, aim.warm) if c is not None]
        values = [float(self.predict(c)[0]) for c in inside]
        best = inside[int(np.argmin(values))]
        if self.bound is None:
            return start, Proof(*additive, predicted=min(values))
        below = self.bound(aim.options.columns.each, aim.options.columns.allowed)
        found = branch_and_bound(
            best, self.predict, below, self.cost_model, target, rows=self.rows // 4, seed=self.seed
        )
        if found.predicted < values[0] - self.slack and self._new(found.choices):
            start = found.choices
        bound, gap = (found.bound, found.gap) if np.isfinite(found.bound) else (None, None)
        return start, Proof(*additive, found.predicted, bound, gap, found.nodes)

    def _aim(self, target: Budget) -> _Aim:
        """Effects in the measured configurations nearest to the target, filled up with random ones; and
        the best measured within it."""
        options = Options.of(self.cost_model, target)
        known = options.columns.settle(self.known)
        choice = options.columns.join(known)
        usable = np.flatnonzero((choice >= 0).all(1) & np.isfinite(self.values))
        known, values, choice = known[usable], self.values[usable], choice[usable]
        contexts = min(CONTEXTS, max(4, CONTEXT_ROWS // max(int(options.columns.allowed.sum()), 1)))
        distance = np.abs(options.used(choice) / options.caps[:, None] - 1).max(0)
        near = np.argsort(distance, kind="stable")[:contexts]
        missing = contexts - len(near)
        center = 8 * options.caps[0] / self.cost_model.weights
        bits_range = (center * 0.9, center) if options.names[0] in ("bits", "bytes") else BITS_RANGE
        more = Choices.of(self.space, self.space.sample(max(missing, 0), self.seed, bits_range))
        both = Choices.concat([known[near], options.columns.settle(more)])
        effects = choice_effects(self.predict, self.space, both, options.columns.activations)
        kept = np.flatnonzero(options.keeps(choice))
        best = kept[np.argmin(values[kept])] if len(kept) else None
        return _Aim(options, effects, None if best is None else known[best])

    def _start(self, aim: _Aim, target: Budget, apart: int, rng: np.random.Generator) -> Choices | None:
        """The integer program's optimum for the mean effects over all contexts, later over a bootstrap;
        None where cuts leave none."""
        count = len(aim.effects)
        rows = np.arange(count) if aim.tries == 1 else rng.integers(count, size=count)
        columns = aim.options.columns
        cuts = [(other, apart) for other in self.picked if (columns.join(other) >= 0).all()]
        try:
            mean = aim.effects[rows].mean(0)
            found = solve(mean, self.cost_model, target, cuts=cuts, relative_gap=1e-3, ties=TIES)
        except AquabitError:
            return None
        aim.solution = aim.solution or found
        return found.choices

    @staticmethod
    def _hash(choices: Choices) -> np.ndarray:
        """One integer for each row, [n]; equal only by a chance of one in 2^60."""
        factors = np.random.default_rng(0).integers(1 << 62, size=(2, choices.weights.shape[1]))
        return np.asarray((choices.weights * factors[0] + choices.acts * factors[1]).sum(-1))  # wraps around

    def _avoiding(self, apart: int) -> Predict:
        """The surrogate with infinity on what is known already and on what is close to this round's other
        proposals."""

        def predict(choices: Choices) -> np.ndarray:
            values = np.array(self.predict(choices), float)
            values[np.isin(self._hash(choices), self.known_hashes)] = np.inf
            for other in self.picked:
                values[choices.apart(other) < apart] = np.inf
            return values

        return predict

    def _new(self, one: Choices) -> bool:
        digest = one.config.digest
        return digest not in self.known_digests and digest not in {c.config.digest for c in self.candidates}

    def _perturbed(self, aim: _Aim, target: Budget, rng: np.random.Generator) -> Choices | None:
        """The first new configuration among 300 random changes, ever wider, of the integer program's
        optimum; None where all are known."""
        scores = aim.effects.mean(0)
        try:
            origin = solve(scores, self.cost_model, target, relative_gap=1e-3)
        except AquabitError:
            return None
        columns, free = aim.options.columns, aim.options.columns.free
        center = columns.join(origin.choices)[0]
        for attempt in range(300 if len(free) else 0):
            moved = center.copy()
            for layer in rng.choice(free, size=min(len(free), 1 + attempt // 20), replace=False):
                moved[layer] = rng.choice(np.flatnonzero(columns.allowed[layer]))
            mended = aim.options.repair(moved, columns.groups.sums(scores.reshape(len(scores), -1)))
            if mended is not None and self._new(columns.split(mended)):
                return columns.split(mended)
        return None

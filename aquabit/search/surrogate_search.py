"""Rounds of fitting a surrogate, proposing by integer program, local search or evolution, and measuring:
``--method surrogate`` and ``evolve``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget, Progress, QuantConfig, no_progress
from aquabit.search.evolution import check_installed, evolve
from aquabit.search.integer_program import Cut, Solution, choice_effects, solve
from aquabit.search.local_search import improve, lighten
from aquabit.search.options import Options, Predict, fixed_act
from aquabit.search.proof import BoundFactory, Proof, branch_and_bound
from aquabit.space import BITS_RANGE, SearchSpace

METHODS = ("program", "surrogate", "evolve")
# predictions of single choices for one target, which set the number of contexts of large models, at least 4
CONTEXT_ROWS = 15_000
# predictions that differ by less, relative to the spread of those of the measured configurations, are equal
TIES = 1e-3
SPREAD = (
    0.9,
    1.1,
    0.8,
    1.25,
)  # limits of the front's other targets relative to the budget's, the nearest first
Measured = Iterable[tuple[QuantConfig, float]]
Screened = Callable[[list[QuantConfig]], np.ndarray]


@dataclass(frozen=True)
class Candidate:
    """A configuration that the search proposed in ``round`` under ``target``, and the surrogate's value
    for it then (larger = worse); with a round's first under the budget, what was proved of that surrogate."""

    config: QuantConfig
    target: Budget
    round: int
    predicted: float
    proof: Proof | None = None


def find_candidates(
    space: SearchSpace,
    cost_model: CostModel,
    budget: Budget,
    predict_factory: Callable[[], Predict],
    measure: Callable[[list[QuantConfig]], None],
    measured: Callable[[], Measured],
    uniform: Sequence[QuantConfig] = (),
    *,
    rounds: int = 2,
    per_round: int = 8,
    spread: Sequence[float] = SPREAD,
    contexts: int = 16,
    rows: int = 15_000,
    seed: int = 0,
    method: str = "program",
    ties: float = TIES,
    bound: BoundFactory | None = None,
    screen: Screened | None = None,
    pool: int = 4,
    progress: Progress = no_progress,
) -> list[Candidate]:
    """Propose, measure and learn from configurations within ``budget`` and, for the front, within targets
    scaled by ``spread``.

    Each round fits a fresh surrogate (``predict_factory()``), and solves the integer program on its additive
    part and improves that by local search for ``per_round`` configurations that were never measured: five in
    eight under the budget, the rest along the front. ``measure(configs)`` measures and stores them;
    ``measured()`` gives every (configuration, value) so far, larger = worse, NaN = failed. ``uniform``
    configurations within some target and not measured yet are measured first. Fewer than ``per_round`` are
    proposed only where the space has no more. ``method="evolve"`` proposes from the front of an evolution
    (``evolve``) instead. Predictions that differ by ``ties`` of their spread or less count as equal, and the
    configuration of fewer operations is proposed. With ``screen`` each round proposes ``pool`` times as many
    and measures those that ``screen(configs)`` -> [n] (larger = worse, better informed than the surrogate)
    finds best, and always the surrogate's own first: successive halving by ever dearer judges. ``bound``
    makes the bound of the last surrogate that ``predict_factory`` gave, for the proof of the last round.
    Raises AquabitError where the budget cannot be kept.
    """
    check_method(method)
    targets = [budget, *ladder(cost_model, budget, spread)]
    _check(cost_model, budget)
    known = {c.digest for c, _ in measured()}
    totals = [(c, cost_model.totals(Choices.of(space, [c]))) for c in uniform if c.digest not in known]
    baselines = [c for c, t in totals if any(cost_model.within(t, b)[0] for b in targets)]
    if baselines:
        measure(baselines)
    found: list[Candidate] = []
    steps = rounds * per_round * (pool if screen is not None else 1)
    for number in range(rounds):
        proposer = Proposer(
            space,
            cost_model,
            predict_factory(),
            list(measured()),
            number,
            contexts,
            rows,
            seed,
            targets,
            method,
            ties,
            bound if number == rounds - 1 else None,
        )
        wanted = schedule(targets, per_round, number)
        slots = wanted * (pool if screen is not None else 1)
        for slot, target in enumerate(slots):
            progress("search", number * len(slots) + slot, steps)
            if not proposer.add(target) and target is not budget:
                proposer.add(budget)
        chosen = proposer.candidates
        if not chosen:
            break
        if screen is not None and len(chosen) > len(wanted):
            chosen = best_of(chosen, wanted, screen([c.config for c in chosen]))
        measure([c.config for c in chosen])
        found += chosen
    progress("search", steps, steps)
    return found


def best_of(candidates: Sequence[Candidate], wanted: Sequence[Budget], values: np.ndarray) -> list[Candidate]:
    """As many candidates as ``wanted`` has targets, for each target its best by ``values`` [n] (larger =
    worse), in the order of proposal; the first candidate stays, and a target that has too few leaves its
    places to the best of the others."""
    order = [
        0,
        *(int(i) for i in np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable") if i != 0),
    ]
    places, kept = Counter(wanted), list[int]()
    for i in order:
        if places[candidates[i].target] > 0:
            places[candidates[i].target] -= 1
            kept.append(i)
    kept += [i for i in order if i not in kept][: len(wanted) - len(kept)]
    return [candidates[i] for i in sorted(kept)]


def check_method(method: str) -> None:
    """Raise AquabitError for an unknown search method, and for one whose library is not installed."""
    if method not in METHODS:
        raise AquabitError(f"the search method {method!r} is unknown; known: {', '.join(METHODS)}")
    if method == "evolve":
        check_installed()


def ladder(cost_model: CostModel, budget: Budget, spread: Sequence[float] = SPREAD) -> list[Budget]:
    """The budget with all limits scaled by each factor of ``spread``, kept within what the space can
    reach; none twice."""
    limits = cost_model.limits(fixed_act(Options.of(cost_model, budget).columns.activations))
    found: list[Budget] = []
    for factor in spread:
        scaled: dict[str, float] = {}
        for name, value in budget.limits().items():
            rest = (
                float(cost_model.other_bytes) if name == "bytes" else 0.0
            )  # biases and norms are not quantized
            if name == "latency_ms" and cost_model.latency is not None:
                rest = cost_model.latency.rest
            goal = min(rest + (value - rest) * factor, limits[name][1])
            scaled[name] = int(goal) if name == "bytes" else goal
        target = Budget(**scaled)  # type: ignore[arg-type]
        if all(scaled[k] > limits[k][0] for k in scaled) and target not in (budget, *found):
            found.append(target)
    return found


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
    shape = (len(options.columns.allowed), len(cost_model.space.schemes), len(options.columns.activations))
    solve(np.zeros(shape), cost_model, budget)


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

    space: SearchSpace
    cost_model: CostModel
    predict: Predict
    measured: list[tuple[QuantConfig, float]]
    round: int
    contexts: int
    rows: int
    seed: int
    targets: Sequence[Budget]
    method: str = "program"
    ties: float = TIES
    bound: BoundFactory | None = None
    # proposals for one target whose local search has all rows; later ones, which a screen is to judge, a
    # quarter
    thorough: int = 8
    candidates: list[Candidate] = field(default_factory=list)
    aims: dict[Budget, _Aim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = set(self.space.schemes)
        inside = [(c, v) for c, v in self.measured if all(c[k].weight in known for k in self.space.choices)]
        self.known_digests = {c.digest for c, _ in self.measured}
        self.known = Choices.of(self.space, [c for c, _ in inside])
        self.values = np.array([v for _, v in inside], float)
        self.picked: list[Choices] = []  # this round's proposals
        self.front: Choices | None = None  # of the evolution
        predicted = np.asarray(self.predict(self.known), float) if len(inside) else np.zeros(0)
        finite = predicted[np.isfinite(predicted)]
        self.slack = self.ties * float(finite.max() - finite.min()) if len(finite) else 0.0
        self.known_hashes = self._hash(self.known)

    def add(self, target: Budget) -> bool:
        """One more candidate under ``target``; False where none is left."""
        aim = self.aims.get(target) or self.aims.setdefault(target, self._aim(target))
        rng = np.random.default_rng([self.seed, self.round, len(self.candidates)])
        apart = max(1, len(aim.options.columns.free) // 20)
        aim.tries += 1
        start = (
            self._evolved(target, apart)
            if self.method == "evolve"
            else self._searched(aim, target, apart, rng)
        )
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
        rows = self.rows if aim.tries <= self.thorough else self.rows // 4
        found = improve(start, avoiding, self.cost_model, target, int(rng.integers(1 << 31)), rows=rows)
        return lighten(found.choices, avoiding, self.cost_model, target, self.slack)

    def _evolved(self, target: Budget, apart: int) -> Choices | None:
        """The best predicted member within ``target`` of one front for all targets, not known and apart
        from the round's others; it starts from the integer program's optimum of each target."""
        if self.front is None:
            starts = []
            for other in self.targets:
                aim = self.aims.get(other) or self.aims.setdefault(other, self._aim(other))
                starts += [
                    s
                    for s in (self._start(aim, other, apart, np.random.default_rng(self.seed)), aim.warm)
                    if s is not None
                ]
            self.front = evolve(
                self.predict, self.cost_model, self.targets, starts, seed=self.seed + self.round
            )
        if not len(self.front):
            return None
        values = np.where(
            self.cost_model.within(self.cost_model.totals(self.front), target),
            self._avoiding(apart)(self.front),
            np.inf,
        )
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
        bound = self.bound(aim.options.columns.each, aim.options.columns.allowed)
        found = branch_and_bound(
            best, self.predict, bound, self.cost_model, target, rows=self.rows // 4, seed=self.seed
        )
        if found.predicted < values[0] - self.slack and self._new(found.choices):
            start = found.choices
        proven = np.isfinite(found.bound)
        return start, Proof(
            *additive,
            found.predicted,
            found.bound if proven else None,
            found.gap if proven else None,
            found.nodes,
        )

    def _aim(self, target: Budget) -> _Aim:
        """Effects in the measured configurations nearest to the target, filled up with random ones; and
        the best measured within it."""
        options = Options.of(self.cost_model, target)
        known = options.columns.settle(self.known)
        choice = options.columns.join(known)
        usable = np.flatnonzero((choice >= 0).all(1) & np.isfinite(self.values))
        known, values, choice = known[usable], self.values[usable], choice[usable]
        contexts = min(self.contexts, max(4, CONTEXT_ROWS // max(int(options.columns.allowed.sum()), 1)))
        distance = np.abs(options.used(choice) / options.caps[:, None] - 1).max(0)
        near = np.argsort(distance, kind="stable")[:contexts]
        missing = contexts - len(near)
        center = (
            8 * options.caps[0] / self.cost_model.weights if options.names[0] in ("bits", "bytes") else None
        )
        bits_range = BITS_RANGE if center is None else (center * 0.9, center)
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
        cuts: list[Cut] = []
        for other in self.picked:
            if (aim.options.columns.join(other) >= 0).all():
                cuts.append((other, apart))
        try:
            found = solve(
                aim.effects[rows].mean(0),
                self.cost_model,
                target,
                cuts=cuts,
                relative_gap=1e-3,
                ties=self.ties,
            )
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
            mended = aim.options.repair(moved, scores.reshape(len(scores), -1))
            if mended is not None and self._new(columns.split(mended)):
                return columns.split(mended)
        return None

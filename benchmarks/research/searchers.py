"""Searchers under one interface: each spends a number of measurements and ends with measured candidates.
For comparisons at equal cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import ceil

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.layer_formats import expected_loss
from aquabit.scheme import FP, AquabitError, Budget, QuantConfig
from aquabit.search.integer_program import Cut, solve
from aquabit.search.options import Options, Predict
from aquabit.search.proposer import Proposer
from aquabit.search.surrogate_search import best_of
from aquabit.space import BITS_RANGE, SearchSpace

Found = list[tuple[QuantConfig, float]]
OutputErrorSurrogate = Callable[[Found, list[QuantConfig]], Sequence[float]]
PROPOSALS = 0.2  # the share of the measurements that a searcher keeps for what it proposes
SAMPLES = 0.5  # the share that ``surrogate`` spends on random configurations before it proposes
ROUNDS = 5  # of fitting and proposing
POOL = 4  # configurations proposed for each that is measured, where a screen chooses
SWAPS = 16  # one-layer swaps that share a context


@dataclass(frozen=True)
class Problem:
    """What a searcher is given: ``measure(configs)`` gives their values (larger = worse, NaN = failed),
    ``measurements`` limits how many configurations it is called with in all. ``targets`` are budgets of
    one kind. ``fit(configs, values)`` makes a surrogate, which model-based searchers need; ``start`` are
    measurements that were paid for before, for those that can use them. ``screen(known, proposed)`` judges
    proposals by something cheaper than a measurement, given all that is known; each configuration that it
    sees for the first time, known ones too, costs ``screen_cost`` measurements."""

    space: SearchSpace
    cost_model: CostModel
    targets: Sequence[Budget]
    measure: Callable[[list[QuantConfig]], Sequence[float]]
    measurements: int
    seed: int = 0
    fit: Callable[[list[QuantConfig], np.ndarray], Predict] | None = None
    start: Sequence[tuple[QuantConfig, float]] = ()
    screen: OutputErrorSurrogate | None = None
    screen_cost: float = 0.0

    def __post_init__(self) -> None:
        if not self.targets:
            raise AquabitError("a search needs at least one target budget, got none")
        if self.measurements < len(self.targets):
            raise AquabitError(
                f"{self.measurements} measurements are too few for {len(self.targets)} targets; give at least"
                " one each"
            )
        kinds = {tuple(t.limits()) for t in self.targets}
        if len(kinds) > 1:
            raise AquabitError(
                f"targets limit different costs ({', '.join('+'.join(k) for k in sorted(kinds))}); give"
                " targets of one kind"
            )


@dataclass
class _Ledger:
    """What was measured, and how many measurements are left; nothing is measured twice."""

    problem: Problem
    values: dict[str, float] = field(default_factory=dict)
    found: Found = field(default_factory=list)
    screened: set[str] = field(default_factory=set)

    @property
    def left(self) -> int:
        return max(
            0,
            int(
                self.problem.measurements
                - len(self.found)
                - len(self.screened) * self.problem.screen_cost
                + 1e-9
            ),
        )

    def measure(self, configs: Iterable[QuantConfig]) -> None:
        """Measure what is new, as far as measurements are left."""
        new = {c.digest: c for c in configs if c.digest not in self.values}
        asked = list(new.values())[: self.left]
        if not asked:
            return
        for config, value in zip(asked, self.problem.measure(asked), strict=True):
            self.values[config.digest] = float(value)
            self.found.append((config, float(value)))

    def propose(self, scores: np.ndarray) -> None:
        """Spend what is left on the integer program's optima for ``scores`` [L, S, A] under each target in
        turn, each apart from the earlier ones."""
        costs, targets = self.problem.cost_model, list(self.problem.targets)
        apart = max(1, len(self.problem.space.free_layers()) // 20)
        cuts: dict[Budget, list[Cut]] = {t: [] for t in targets}
        while self.left and targets:
            for target in list(targets):
                try:
                    best = solve(scores, costs, target, cuts=cuts[target], relative_gap=1e-3)
                except AquabitError:  # none is left that is far enough from those
                    targets.remove(target)
                    continue
                cuts[target].append((best.choices, apart))
                self.measure(best.choices.configs())


Searcher = Callable[[Problem], Found]


def uniform(problem: Problem) -> Found:
    """One scheme for all layers: all that lie within some target, largest first."""
    ledger = _Ledger(problem)
    ledger.measure(_uniforms(problem))
    return ledger.found


def _uniforms(problem: Problem) -> list[QuantConfig]:
    space = problem.space
    options = Options.of(problem.cost_model, problem.targets[0])
    acts = [a for a in options.columns.activations if a in space.activations]
    configs = [space.uniform(s, a) for s in space.common_schemes() for a in acts]
    totals = [problem.cost_model.totals(Choices.of(space, [c])) for c in configs]
    order = np.argsort([-float(t["bytes"][0]) for t in totals], kind="stable")
    return [
        configs[i] for i in order if any(problem.cost_model.within(totals[i], t)[0] for t in problem.targets)
    ]


def random_best(problem: Problem) -> Found:
    """Random configurations within each target in turn: the best of them is what chance finds."""
    ledger = _Ledger(problem)
    for tries in range(100):
        if not ledger.left:
            break
        share = ceil(ledger.left / len(problem.targets))
        drawn = [
            random_within(problem.space, problem.cost_model, target, share, problem.seed + 1000 * tries + i)
            for i, target in enumerate(problem.targets)
        ]
        rows = [one.configs() for one in drawn]
        ledger.measure(config for row in zip_longest(*rows) for config in row if config is not None)
    return ledger.found


def greedy(problem: Problem) -> Found:
    """AIMET's automatic mixed precision: every layer at its highest, one (layer, scheme) lowered at a time
    and measured; then all in the order of damage per saving, as far as each target asks. Measurements that
    are left go to the prefixes that follow.
    """
    ledger, options = _Ledger(problem), Options.of(problem.cost_model, problem.targets[0])
    highest = np.where(options.columns.allowed, options.costs[0], -1.0).argmax(1)
    damage = _single_damages(ledger, options, highest)
    weight = (options.costs / np.maximum(options.caps, 1)[:, None, None]).sum(0)
    saving = weight[np.arange(len(highest)), highest][:, None] - weight
    layer, column = np.nonzero(options.columns.allowed & (saving > 0))
    order = np.argsort(np.maximum(damage[layer, column], 0) / saving[layer, column], kind="stable")
    choice, prefixes = highest.copy(), [highest]
    for k in order:
        if weight[layer[k], column[k]] < weight[layer[k], choice[layer[k]]]:
            choice = choice.copy()
            choice[layer[k]] = column[k]
            prefixes.append(choice)
    found = options.columns.split(np.array(prefixes))
    totals = problem.cost_model.totals(found)
    fits = [np.flatnonzero(problem.cost_model.within(totals, target)) for target in problem.targets]
    turns = [i for row in zip_longest(*fits) for i in row if i is not None]
    ledger.measure(found[np.array(turns, int)].configs())
    return ledger.found


def additive(problem: Problem) -> Found:
    """Sony MCT, NVIDIA ModelOpt, MixDQ: damages of single layers in the full-precision model, measured one
    at a time, add up; the integer program's optimum for each target, then the next best ones."""
    ledger, options = _Ledger(problem), Options.of(problem.cost_model, problem.targets[0])
    free = problem.space.full_precision()
    damage = _single_damages(ledger, options, None, free)
    ledger.propose(_scores(problem, options, damage))
    return ledger.found


def swaps(problem: Problem) -> Found:
    """All measurements spent on real one-layer swaps in random configurations within the targets, which
    share contexts: n swaps cost n measurements and one for each context. The mean effect of a layer,
    shrunk towards that of all, sets its scores for the integer program."""
    ledger, space, rng = _Ledger(problem), problem.space, np.random.default_rng([problem.seed, 3])
    options = Options.of(problem.cost_model, problem.targets[0])
    error, center = _expected(problem, options), _center(problem, options)
    bits = np.repeat(
        [[space.code_bits(k, s) for s in space.schemes] for k in space.choices],
        len(options.columns.activations),
        axis=1,
    )
    free, layers, turn = options.columns.free, np.arange(len(bits)), list[int]()
    reserve, number = _reserve(problem), 0
    rows: list[tuple[int, float, float]] = []  # layer, change of the expected error, change of the value
    while ledger.left > reserve + 1 and len(free) and number < 100 * problem.measurements:
        target = problem.targets[number % len(problem.targets)]
        drawn = random_within(space, problem.cost_model, target, 1, problem.seed + number)
        number += 1
        if not len(drawn):
            continue
        context = options.columns.join(drawn)[0]
        changed = [context]
        for _ in range(min(SWAPS, ledger.left - reserve - 1, len(free))):
            turn = turn or [int(i) for i in rng.permutation(free)]  # every layer once before any twice
            layer = turn.pop()
            goal = center + (-1 if bits[layer, context[layer]] >= center else 1)
            far = np.where(options.columns.allowed[layer], np.abs(bits[layer] - goal), np.inf)
            far[context[layer]] = np.inf
            other = context.copy()
            other[layer] = rng.choice(np.flatnonzero(far == far.min()))
            changed.append(other)
        configs = options.columns.split(np.array(changed)).configs()
        ledger.measure(configs)
        values = [ledger.values.get(c.digest, np.nan) for c in configs]
        for one, value in zip(changed[1:], values[1:], strict=True):
            layer = int(np.flatnonzero(one != context)[0])
            rows.append(
                (layer, float((error[layers, one] - error[layers, context])[layer]), value - values[0])
            )
    known = np.array([r for r in rows if np.isfinite(r[2]) and r[1]]).reshape(-1, 3)
    swapped, step, change = known[:, 0].astype(int), known[:, 1], known[:, 2]
    slope = _slopes(swapped, step, change, len(bits))
    ledger.propose(_scores(problem, options, slope[:, None] * error))
    return ledger.found


def _slopes(layer: np.ndarray, step: np.ndarray, change: np.ndarray, layers: int) -> np.ndarray:
    """Value per expected error of each layer [layers], of swaps of ``layer`` by ``step`` that gave ``change``
    (each [n]): least squares, shrunk towards the pooled slope by the ratio of the variance of a change to
    that of the layers' slopes; positive.
    """
    power, product = np.bincount(layer, step**2, layers), np.bincount(layer, step * change, layers)
    pooled = max(float(product.sum() / max(power.sum(), 1e-300)), 1e-12)
    seen = power > 0
    own = np.where(seen, product / np.where(seen, power, 1), pooled)
    noise = float(((change - own[layer] * step) ** 2).sum() / max(len(change) - seen.sum(), 1))
    spread = float(np.var(own[seen]) - noise * np.mean(1 / power[seen])) if seen.any() else 0.0
    prior = noise / max(spread, 0.01 * pooled**2)
    return np.asarray(
        np.maximum((product + prior * pooled) / np.maximum(power + prior, 1e-300), 0.01 * pooled)
    )


def surrogate(problem: Problem) -> Found:
    """Ours: uniform configurations and random ones around the targets (or ``start``), then rounds of
    fitting, proposing under each target in turn, and measuring, as ``find_candidates`` does."""
    ledger, space, costs = _Ledger(problem), problem.space, problem.cost_model
    if problem.fit is None:
        raise AquabitError(
            "the searcher surrogate needs `fit`, which makes a surrogate of configurations and values"
        )
    for config, value in problem.start:
        ledger.values[config.digest] = float(value)
    ledger.measure(_uniforms(problem))
    options = Options.of(costs, problem.targets[0])
    if not problem.start:
        center, reach = _center(problem, options), 0.6
        drawn = space.sample(
            max(1, int(SAMPLES * problem.measurements)),
            problem.seed,
            (max(center - reach, 1.0), center + reach),
        )
        ledger.measure(options.columns.settle(Choices.of(space, drawn)).configs())
    size = max(len(problem.targets), ceil(ledger.left / ROUNDS))
    for number in range(10 * ROUNDS):
        if not ledger.left:
            break
        known = [*problem.start, *ledger.found]
        usable = [(c, v) for c, v in known if np.isfinite(v)]
        predict = problem.fit([c for c, _ in usable], np.array([v for _, v in usable]))
        proposer = Proposer(costs, predict, known, problem.targets, number, problem.seed)
        wanted = [problem.targets[slot % len(problem.targets)] for slot in range(min(size, ledger.left))]
        for target in wanted * (POOL if problem.screen else 1):
            proposer.add(target)
        chosen = proposer.candidates
        if not chosen:
            break
        if problem.screen is not None:
            asked = [c.config for c in chosen]
            ledger.screened.update(c.digest for c in (*(c for c, _ in usable), *asked))
            if not ledger.left:
                break
            chosen = best_of(chosen, wanted[: ledger.left], np.asarray(problem.screen(usable, asked), float))
        ledger.measure(c.config for c in chosen)
    return ledger.found


SEARCHERS: dict[str, Searcher] = {
    "uniform": uniform,
    "random": random_best,
    "greedy": greedy,
    "additive": additive,
    "swaps": swaps,
    "surrogate": surrogate,
}


def find_searcher(name: str) -> Searcher:
    """Raises AquabitError, listing what is known, for any other name."""
    if name not in SEARCHERS:
        raise AquabitError(f"the searcher {name!r} is unknown; known: {', '.join(SEARCHERS)}")
    return SEARCHERS[name]


def random_within(
    space: SearchSpace, cost_model: CostModel, target: Budget, count: int, seed: int
) -> Choices:
    """Up to ``count`` random configurations that keep ``target``
    and have nine tenths of its first limit or more: of maximum entropy over bit levels as
    ``SearchSpace.sample`` draws, others rejected; where too few fit, drawn ones are repaired at random."""
    options, rng = Options.of(cost_model, target), np.random.default_rng(seed)
    size = options.names[0] in ("bits", "bytes")
    top = float(8 * options.caps[0] / cost_model.weights) if size else BITS_RANGE[1]
    kept, choice = np.zeros((0, len(space.choices)), int), np.zeros((0, len(space.choices)), int)
    for _ in range(4):
        means = np.linspace(top - 0.8, top, 5) if size else np.linspace(*BITS_RANGE, 5)
        choice = rng.permutation(
            np.concatenate([_drawn(space, options, float(m), count + 1, rng) for m in means])
        )
        near = options.keeps(choice) & (options.used(choice)[0] >= 0.9 * options.caps[0])
        kept = np.concatenate([kept, choice[near]])
        if len(kept) >= count:
            return options.columns.split(kept[:count])
    mended = [
        options.repair(c, rng.random(options.columns.allowed.shape)) for c in choice[: count - len(kept)]
    ]
    return options.columns.split(np.concatenate([kept, *(m[None] for m in mended if m is not None)]))


def _drawn(
    space: SearchSpace, options: Options, mean: float, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Columns [count, L]: bit levels of maximum entropy with a mean, any scheme of a level, any activation
    choice that is open."""
    place, width = {s: j for j, s in enumerate(space.schemes)}, len(options.columns.activations)
    out = np.empty((count, len(space.choices)), int)
    for i, layer in enumerate(space.choices):
        chance = {place[s]: p for s, p in space.scheme_odds(layer, mean).items()}
        acts = np.flatnonzero(options.columns.allowed[i].reshape(-1, width)[next(iter(chance))])
        out[:, i] = width * rng.choice(list(chance), count, p=list(chance.values())) + rng.choice(acts, count)
    return out


def _reserve(problem: Problem) -> int:
    return max(len(problem.targets), round(PROPOSALS * problem.measurements))


def _center(problem: Problem, options: Options) -> float:
    """Mean bits per weight of the targets, where they limit size, else of the usual range."""
    if options.names[0] not in ("bits", "bytes"):
        return float(np.mean(BITS_RANGE))
    return float(
        np.mean(
            [
                8 * Options.of(problem.cost_model, t).caps[0] / problem.cost_model.weights
                for t in problem.targets
            ]
        )
    )


def _expected(problem: Problem, options: Options) -> np.ndarray:
    """Expected relative error [L, C] of each choice, of weights and of activations (as uniform codes of a
    few standard deviations)."""
    space = problem.space
    weight = np.array(
        [
            [0.0 if s == FP else expected_loss(s) * 4.0 ** -space.code_bits(k, s) for s in space.schemes]
            for k in space.choices
        ]
    )
    bits = options.columns.each.mean_bits.T
    acts = np.where(bits == 16, 0.0, 4.0**-bits)
    return np.asarray(np.repeat(weight, len(options.columns.activations), axis=1) + acts)


def _single_damages(
    ledger: _Ledger, options: Options, base: np.ndarray | None, start: QuantConfig | None = None
) -> np.ndarray:
    """What each choice [L, C] does alone to the value of ``start``, or of the columns ``base`` [L], measured
    one at a time until the reserve for proposals is all that is left.

    Choices nearest to the targets' bits are measured first, for all layers before the next. The damage of the
    others follows from the layer's measured ones: the ratio of damage to expected error, in logarithms, is
    interpolated over the logarithm of the expected error, and is that of the nearest end beyond them; a layer
    without any takes the median of all.
    """
    problem, columns = ledger.problem, options.columns
    space, rng, reserve = problem.space, np.random.default_rng([problem.seed, 4]), _reserve(ledger.problem)
    error, center = _expected(problem, options), _center(problem, options)
    bits = np.repeat(
        [[space.code_bits(k, s) for s in space.schemes] for k in space.choices],
        len(columns.activations),
        axis=1,
    )
    start = start if start is not None else columns.split(np.asarray(base)).config
    far = np.where(columns.allowed, np.abs(bits - center), np.inf)
    if base is not None:
        far[np.arange(len(base)), base] = np.inf
    order = np.argsort(far, axis=1, kind="stable")
    pairs = [
        (int(i), int(order[i, rank]))
        for rank in range(order.shape[1])
        for i in rng.permutation(columns.free)
        if np.isfinite(far[i, order[i, rank]])
    ]
    pairs = pairs[: max(ledger.left - reserve - 1, 0)]
    weights = columns.each.weights
    acts = columns.each.act_index((*columns.activations, 16))
    levels = (*columns.activations, 16)
    changed = [
        start.with_layer(
            space.layers[i],
            (
                choice := space.choice(space.layers[i], space.schemes[weights[c, i]], levels[acts[c, i]])
            ).weight,
            choice.act,
            choice.codebook,
            space.steps,
        )
        for i, c in pairs
    ]
    ledger.measure([start, *changed])
    alone = ledger.values[start.digest]
    ratio = np.full(error.shape, np.nan)
    found = np.array([ledger.values.get(c.digest, np.nan) - alone for c in changed])
    positive = found[found > 0]
    least = 0.01 * float(np.median(positive)) if len(positive) else 1e-12  # what noise makes negative
    for (i, c), damage in zip(pairs, found, strict=True):
        if np.isfinite(damage) and error[i, c] > 0:
            ratio[i, c] = np.log(max(damage, least) / error[i, c])
    overall = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else 0.0
    out = np.zeros(error.shape)
    for i in range(len(error)):
        known = np.flatnonzero(np.isfinite(ratio[i]))
        place = np.log(np.maximum(error[i], 1e-12))
        known = known[np.argsort(place[known], kind="stable")]
        level = np.interp(place, place[known], ratio[i, known]) if len(known) else overall
        out[i] = np.exp(level) * error[i]
        out[i, known] = np.exp(ratio[i, known]) * error[i, known]
    return out


def _scores(problem: Problem, options: Options, table: np.ndarray) -> np.ndarray:
    """A table [L, C] as ``solve`` takes it."""
    return table.reshape(len(table), len(problem.space.schemes), len(options.columns.activations))

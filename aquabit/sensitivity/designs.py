"""Designs: which configurations ``measure`` draws. The first n of a design are the same whatever the
total, so that studies continue."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.maximum_entropy import Gibbs, level_odds, share_odds
from aquabit.measuring.session import Session
from aquabit.scheme import (
    FP,
    Act,
    AquabitError,
    LayerChoice,
    Progress,
    QuantConfig,
    Rounding,
    Scheme,
    no_progress,
    parse_swap,
)
from aquabit.sensitivity.damages import EXCESSES, Damages, context_act, damages_of, gibbs
from aquabit.sensitivity.effects.predicted import default_swap, find_players, refits
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.shared_contexts import group_numbers
from aquabit.sensitivity.surrogate.estimators import Surrogate
from aquabit.space import BITS_RANGE, SearchSpace

DESIGNS = {
    "near": "good configurations: draws near the front of the known damages, evenly over the budgets",
    "random": (
        "independent draws of any scheme, ruined ones included, that cover the budgets evenly (Qua2SeDiMo)"
    ),
    "balanced": (
        "nearly orthogonal draws: budgets evenly spread, each layer at each of its schemes equally often"
    ),
    "swaps": "good configurations near 3 bits, each followed by copies of it with one layer swapped",
    "disagreement": "a random start, then batches on which refitted surrogates disagree",
}
DEFAULT = "near:0.75"  # the random quarter shows what ruins a model, which a search must know to avoid
SWAP_RANGE = (2.75, 3.25)  # mean bits of their contexts
# swaps that share a context, at most half of the layers: each costs one measurement and its share of the
# context's
PER_CONTEXT = 24
BLOCK, CANDIDATES = 24, 16  # configurations that are balanced together; permutations tried for a layer
TOTALS = 4.0  # what sums near their targets are worth beside deviations that are orthogonal
OPERATOR_SHIFT = 0.5  # bits by which the mean of an operator type may lie above or below the configuration's
# means at which maximum-entropy odds are computed; linear in between, which keeps the mean
GRID = np.linspace(*BITS_RANGE, 33)
# mean bits at which ``near`` solves for odds; linear in between, which keeps the mean and adds up to 3 % of
# damage
MEANS = 9
PLASTIC = 1.324717957244746  # of Roberts' two-dimensional low-discrepancy sequence
START, GROWTH = 40, 0.5  # configurations drawn at random; size of a batch over what was measured before it
POOL, JUDGES = 400, 12  # candidates of a batch, and refitted surrogates that judge them
MIN_LABELS = 20  # labels below which nothing is fitted


@dataclass(frozen=True)
class Design:
    """A design by name; ``share`` of its configurations are the design's own, the rest random."""

    name: str
    share: float = 1.0

    @staticmethod
    def parse(text: str) -> Design:
        """``swaps`` or ``swaps:0.5``; raises AquabitError naming what is known."""
        name, colon, share = text.partition(":")
        if name not in DESIGNS:
            raise AquabitError(f"design {text!r} is unknown; known: {', '.join(DESIGNS)}")
        try:
            value = float(share) if colon else 1.0
        except ValueError:
            value = math.nan
        if not 0 < value <= 1 or (value < 1 and name == "disagreement"):
            raise AquabitError(
                f"design {text!r}: its share must be a number above 0 and up to 1, as in swaps:0.5;"
                " disagreement takes none"
            )
        return Design(name, value)

    def draw(
        self,
        space: SearchSpace,
        count: int,
        seed: int,
        damages: Damages | None = None,
        costs: CostModel | None = None,
    ) -> list[QuantConfig]:
        """The first ``count`` configurations; those of disagreement are its random start, see ``next_batch``.

        ``near`` needs the damages and costs of the space (AquabitError without); contexts of ``swaps`` are
        good ones where they are given.
        """
        if self.name not in ("near", "balanced", "swaps"):
            return space.sample(count, seed)
        own = [math.floor((i + 1) * self.share) > math.floor(i * self.share) for i in range(count)]
        if self.name == "near":
            if damages is None or costs is None:
                raise AquabitError(
                    "design near draws by what schemes do alone, which is not known yet; `aquabit measure`"
                    " probes it"
                )
            drawn = near(damages, costs, sum(own), seed)
        elif self.name == "balanced":
            drawn = balanced(space, sum(own), seed)
        else:
            drawn = swaps(space, sum(own), seed, damages=damages, costs=costs)
        chosen, rest = iter(drawn), iter(space.sample(count - sum(own), seed))
        return [next(chosen if mine else rest) for mine in own]


def near(
    damages: Damages,
    costs: CostModel,
    count: int,
    seed: int,
    bits_range: tuple[float, float] = BITS_RANGE,
    act: Rounding | None = None,
) -> list[QuantConfig]:
    """``count`` good configurations: draws of ``damages.gibbs`` with mean bits uniform over what the space
    reaches of ``bits_range``, and an excess damage log-uniform over EXCESSES.

    Activations are all at ``act`` where it is given. Else they are at the highest bits in half of the
    configurations, and in the others a drawn share of the layers is lower (``SearchSpace.lower_acts``): each
    with odds exp(-beta x the damage of it - price), beta as for the weights, the price such that the mean
    share is the drawn one; of all distributions with that share and mean damage the one of largest entropy.
    Configuration i depends on (seed, i), the damages and the costs alone.
    """
    drawn = _Near(damages, costs, bits_range)
    return [drawn(np.random.default_rng([seed, 8, i]), act) for i in range(count)]


class _Near:
    """Gibbs odds at MEANS mean bits and all EXCESSES."""

    def __init__(self, damages: Damages, costs: CostModel, bits_range: tuple[float, float]):
        self.damages, self.space = damages, damages.space
        low, high = costs.limits(context_act(self.space))["bits"]
        self.means = np.unique(np.clip(np.linspace(*bits_range, MEANS), low, high))
        self.families = [gibbs(damages, costs, float(mean), EXCESSES) for mean in self.means]
        self.groups, rows = self.space.groups, list(self.space.choices.values())
        self.excluded = np.array([rows[i] == (FP,) for i in self.groups.first])

    def __call__(self, rng: np.random.Generator, act: Rounding | None) -> QuantConfig:
        odds = self._odds(rng.uniform(self.means[0], self.means[-1]), int(rng.integers(len(EXCESSES))))
        weights = odds.draw(1, rng)[:, self.groups.index]
        share = rng.uniform() if rng.random() < 0.5 and act is None else 0.0
        drawn = Choices.at(self.space, weights, self.space.closest_act if act is None else act)
        if share > 0 and not self.excluded.all():
            levels = self.space.act_choices
            others = [levels.index(a) for a in self.space.lower_acts(share, rng)]
            choice = np.array(others)[rng.integers(len(others), size=len(self.excluded))]
            low = self._low(choice, share, odds.beta, rng) & ~self.excluded
            lower = Choices.picked(self.space, weights, choice[None, self.groups.index], levels)
            acts = np.where(low[self.groups.index], lower.acts, drawn.acts)
            drawn = Choices(self.space, weights, acts)
        return drawn.config

    def _odds(self, bits: float, level: int) -> Gibbs:
        place = float(np.interp(bits, self.means, np.arange(len(self.means))))
        first = min(int(place), len(self.means) - 1)
        after, part = min(first + 1, len(self.means) - 1), place - first
        a, b = self.families[first][level], self.families[after][level]
        beta = float(np.exp((1 - part) * np.log(a.beta) + part * np.log(b.beta)))
        return Gibbs((1 - part) * a.odds + part * b.odds, beta, (1 - part) * a.price + part * b.price)

    def _low(self, choice: np.ndarray, share: float, beta: float, rng: np.random.Generator) -> np.ndarray:
        """Boolean [G]: which groups of layers take their lower activation, ``choice`` of the space's."""
        rows, highest = np.arange(len(choice)), self.space.act_choices.index(self.space.closest_act)
        damage = self.groups.sums(self.damages.acts)
        worse = damage[rows, choice] - damage[:, highest]
        return np.asarray(rng.random(len(choice)) < share_odds(beta * worse, ~self.excluded, share))


def swaps(
    space: SearchSpace, count: int, seed: int, damages: Damages | None = None, costs: CostModel | None = None
) -> list[QuantConfig]:
    """Contexts, each followed by PER_CONTEXT configurations with one layer at the other end of the space's
    own swap (layers without its schemes are swapped between their nearest).

    Contexts have mean bits in SWAP_RANGE and their activations at 8 bits, as those that effects speak of by
    default: good configurations (``near``) where damages and costs are given, else those of the balanced
    design. A difference within a context has no noise of the context's other layers, and what a context does
    to the size of effects it does to many layers, so that their order keeps. Layers that are swapped start at
    random ends of the swap, the others are as drawn; every layer has its turn before one has its second.
    """
    players = find_players(space, parse_swap(default_swap(space)))
    per = max(1, min(PER_CONTEXT, len(players) // 2))
    bases = math.ceil(count / (1 + per))
    if damages is None or costs is None:
        drawn = balanced(
            replace(space, activations=(context_act(space),), steps=None), bases, seed, SWAP_RANGE
        )
    else:
        drawn = near(damages, costs, bases, seed, SWAP_RANGE, context_act(space))
    contexts = [space.config(c.layers) for c in drawn]
    rng, order, out = np.random.default_rng([seed, 4]), list[int](), list[QuantConfig]()

    for context in contexts:
        order += rng.permutation(len(players)).tolist() if len(order) < per else []
        turn = list(dict.fromkeys(order))[:per]  # a layer may end one round and begin the next
        for i in turn:
            order.remove(i)
        chosen = [(players[i], bool(up)) for i, up in zip(turn, rng.random(per) < 0.5, strict=True)]
        for player, up in chosen:
            context = space.swapped(context, player.layer, player.before if up else player.after)
        out.append(context)
        for player, up in chosen:
            out.append(space.swapped(context, player.layer, player.after if up else player.before))
    return out[:count]


def balanced(
    space: SearchSpace, count: int, seed: int, bits_range: tuple[float, float] = BITS_RANGE
) -> list[QuantConfig]:
    """``count`` configurations in blocks of BLOCK that are balanced like a nearly orthogonal array.

    Target means of bits and shares of lower activations follow a low-discrepancy sequence; the means of
    operator types lie around the target, stratified too. A layer's levels in a block are maximum-entropy
    quantiles of one number in each of BLOCK strata; of CANDIDATES permutations of them the one is taken that
    keeps the sums of configurations near their targets and the layer's deviations orthogonal to those of the
    layers before it. Methods of a level are dealt from a deck, so that each comes as often as any other.
    """
    drawn = _Balanced(space, seed, bits_range)
    found: list[QuantConfig] = []
    while len(found) < count:
        found += drawn.block()
    return found[:count]


class _Balanced:
    """The state that one block hands to the next: covered levels and what was dealt of methods."""

    def __init__(self, space: SearchSpace, seed: int, bits_range: tuple[float, float]):
        self.space, self.seed, self.range, self.blocks = space, seed, bits_range, 0
        self.layers = space.grouped()  # tied ones are drawn as one, the first of them
        self.levels = [space.bit_levels(layer) for layer, *_ in self.layers]
        self.operator = [(space.operators or {}).get(layer, "") for layer, *_ in self.layers]
        self.decks: dict[tuple[int, float], list[Scheme]] = {}
        # of deviations, over the blocks so far
        self.products = np.zeros((len(self.levels), len(self.levels)))
        every = {tuple(levels) for levels in self.levels}
        self.tables = {levels: np.array([level_odds(levels, mean) for mean in GRID]) for levels in every}
        self.offset = np.random.default_rng([seed, 3]).random(2)

    def block(self) -> list[QuantConfig]:
        rng = np.random.default_rng([self.seed, 3, self.blocks])
        number = self.blocks * BLOCK + np.arange(BLOCK)[:, None]
        target, share = ((self.offset + (number + 1) / PLASTIC ** np.array([1, 2])) % 1).T
        self.blocks += 1
        bits = self._bits(self.range[0] + target * (self.range[1] - self.range[0]), rng)
        lower = np.maximum(2 * share - 1, 0)  # half of the configurations have none
        others = [self.space.lower_acts(float(s), rng) for s in lower]
        rows: list[dict[str, LayerChoice]] = [{} for _ in range(BLOCK)]
        for i, group in enumerate(self.layers):
            low = (rng.permutation(BLOCK) + rng.random(BLOCK)) / BLOCK < lower
            excluded = self.space.choices[group[0]] == (FP,)
            for row, level, is_low, acts in zip(rows, bits[:, i], low, others, strict=True):
                act: Act = acts[int(rng.integers(len(acts)))] if is_low else self.space.closest_act
                scheme = self._deal(i, float(level), rng)
                row |= {k: self.space.choice(k, scheme, 16 if excluded else act) for k in group}
        return [self.space.config(row) for row in rows]

    def _bits(self, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Levels [BLOCK, layers]."""
        means = {}
        for operator in sorted(set(self.operator)):
            shift = (rng.permutation(BLOCK) + rng.random(BLOCK)) / BLOCK * 2 - 1
            means[operator] = np.clip(target + OPERATOR_SHIFT * shift, *BITS_RANGE)
        bits, deviation = np.empty((2, BLOCK, len(self.levels)))
        total = np.zeros(BLOCK)
        for i, (levels, operator) in enumerate(zip(self.levels, self.operator, strict=True)):
            values, mean = np.array(list(levels)), means[operator]
            odds = np.stack([np.interp(mean, GRID, p) for p in self.tables[tuple(levels)].T], 1)
            edges = np.cumsum(odds, 1)[:, :-1]
            strata = rng.permuted(np.tile(np.arange(BLOCK), (CANDIDATES, 1)), axis=1)
            place = (strata + rng.random((CANDIDATES, BLOCK))) / BLOCK
            drawn = values[(place[..., None] > edges).sum(2)]
            off = drawn - odds @ values
            products = self.products[i, :i] + off @ deviation[:, :i]
            crossed = np.square(products).sum(1) / (self.blocks * (off.var() + 1e-12))
            best = int(np.argmin(crossed + TOTALS * np.square(total + off).sum(1)))
            bits[:, i], deviation[:, i] = drawn[best], off[best]
            total += off[best] + mean - target
            self.products[i, :i] = products[best]
        return bits

    def _deal(self, layer: int, level: float, rng: np.random.Generator) -> Scheme:
        methods = self.levels[layer][level]
        if len(methods) == 1:
            return methods[0]
        deck = self.decks.setdefault((layer, level), [])
        if not deck:
            deck += [methods[j] for j in rng.permutation(len(methods))]
        return deck.pop()


def batches(total: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the batches of disagreement up to ``total`` configurations; each is as long whatever
    the total."""
    first = START
    while first < total:
        end = first + max(1, int(GROWTH * first))
        yield first, end
        first = end


def next_batch(
    encoder: Encoder, configs: list[QuantConfig], y: np.ndarray, surrogate: Surrogate, size: int, seed: int
) -> list[QuantConfig]:
    """``size`` configurations on which surrogates disagree that are refitted to ``configs`` (all that is
    known) with labels ``y`` (NaN where one failed), the most telling first.

    Of POOL random candidates those are taken, one after the other, whose prediction varies most over JUDGES
    refits, given the ones already taken (a Gaussian process with the covariance of the refits), so that a
    batch does not ask one thing twice.
    """
    space, known, usable = encoder.space, {c.digest for c in configs}, np.isfinite(y)
    drawn = space.sample(POOL + size, int(np.random.default_rng([seed, 5, len(configs)]).integers(2**31)))
    pool = [c for c in drawn if c.digest not in known]
    if usable.sum() < MIN_LABELS:
        return pool[:size]
    rows = Choices.of(space, [c for c, u in zip(configs, usable, strict=True) if u])
    judges = refits(surrogate, encoder(rows), y[usable], group_numbers(rows), JUDGES, seed + len(configs))
    features = encoder.encode(pool)
    found = np.array([judge.predict(features) for judge in judges])
    return [pool[i] for i in telling(np.cov(found.T), min(size, len(pool)))]


def telling(covariance: np.ndarray, size: int) -> list[int]:
    """``size`` indices, each of the largest variance that is left once those before it are measured, with
    noise of the median variance."""
    left = np.array(covariance, float)
    noise, taken = float(np.median(left.diagonal())) + 1e-30, list[int]()
    for _ in range(size):
        variance = left.diagonal().copy()
        variance[taken] = -np.inf
        best = int(np.argmax(variance))
        taken.append(best)
        left -= np.outer(left[best], left[best]) / (left[best, best] + noise)
    return taken


def draw(session: Session, design: str, samples: int, seed: int) -> list[QuantConfig]:
    """The first ``samples`` configurations of a design, of a session's space and damages."""
    return Design.parse(design).draw(session.space, samples, seed, damages_of(session), session.costs)


def measure_disagreement(session: Session, samples: int, seed: int, progress: Progress = no_progress) -> None:
    """``samples`` configurations of the design disagreement: measure, refit, choose, and so on. A batch
    depends on the design's own measurements before it alone, so that an interrupted study continues with
    the same one."""
    study, space, metric = session.study, session.space, session.protocol.objective
    encoder = Encoder(space, session.model.graph, study.errors(), study.probes())
    surrogate = Surrogate(seed=seed, direction=session.protocol.direction())
    configs = Design("disagreement").draw(space, min(samples, START), seed)
    session.measure(configs, "sample", progress)
    for first, end in batches(samples):
        table = study.measurements(session.protocol)
        known = dict(zip(table.config, table[metric].astype(float), strict=True)) if metric in table else {}
        labels = np.array([known.get(c.digest, np.nan) for c in configs])
        configs += next_batch(encoder, configs, labels, surrogate, end - first, seed)[: samples - first]
        session.measure(configs, "sample", progress)


def shard_of(configs: Sequence[QuantConfig], shard: str | None) -> list[QuantConfig]:
    """Every n-th configuration for ``i/n`` (i from 1)."""
    if shard is None:
        return list(configs)
    part, _, count = shard.partition("/")
    if not (part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise AquabitError(f"shard {shard!r} must be i/n with 1 <= i <= n, as in 2/4")
    return list(configs)[int(part) - 1 :: int(count)]

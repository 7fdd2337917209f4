"""validate: real one-layer swaps in good configurations near the budget, on seeds that nothing was fitted
to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from aquabit.cost import CostModel
from aquabit.measuring.session import Session
from aquabit.scheme import AquabitError, Progress, QuantConfig, Scheme, no_progress, parse_swap
from aquabit.sensitivity.damages import Damages, damages_of
from aquabit.sensitivity.effects.context_effects import DRAWN
from aquabit.sensitivity.effects.predicted import Player, draw_contexts, find_players, named_swap
from aquabit.sensitivity.explaining import Question, predicted_effects
from aquabit.sensitivity.surrogate.fit import fit_from_study
from aquabit.space import SearchSpace

BLOCK = 1  # block of fresh seeds that real swaps are measured on
CONTEXTS = 2  # contexts a layer is swapped in, before another round
# contexts that layers share: where one is at an end of its swap already, that end is measured once for all
# such layers
POOL = 16
Half = Literal["top", "random"]
HALVES: tuple[Half, ...] = ("top", "random")


@dataclass(frozen=True)
class PlannedSwap:
    """One layer, and what is tied to it, swapped between two schemes inside one context: its two ``ends``."""

    layer: str
    before: Scheme
    after: Scheme
    context: QuantConfig
    ends: tuple[QuantConfig, QuantConfig]
    checks: Half = "random"  # why the layer was chosen: the ranking puts it first, or by chance


def chosen_layers(ranked: Sequence[str], count: int, seed: int) -> list[tuple[str, Half]]:
    """``count`` of the layers, as they take turns: those that ``ranked`` (worst first) begins with, and a
    random sample of the rest.

    The first layers of a larger count are those of a smaller one, except that a random one may become a top
    one.
    """
    count = min(count, len(ranked))
    top = list(ranked[: (count + 1) // 2])
    order = [sorted(ranked)[i] for i in np.random.default_rng([seed, 71]).permutation(len(ranked))]
    rest = [layer for layer in order if layer not in top][: count - len(top)]
    first: list[tuple[str, Half]] = [(k, "top") for k in top]
    second: list[tuple[str, Half]] = [(k, "random") for k in rest]
    return [turn for turns in zip_longest(first, second) for turn in turns if turn is not None]


class Contexts:
    """Good configurations near ``bits``, POOL a block, the same whatever is swapped in them."""

    def __init__(self, space: SearchSpace, costs: CostModel, damages: Damages | None, bits: float, seed: int):
        self.space, self.costs, self.damages, self.bits, self.seed = space, costs, damages, bits, seed
        self.block = lru_cache(None)(self._block)

    def _block(self, number: int) -> list[QuantConfig]:
        rng = np.random.default_rng([self.seed, 72, number])
        return draw_contexts(self.space, self.costs, self.bits, POOL, rng, self.damages).configs()

    def of(self, player: Player, number: int) -> QuantConfig:
        """The ``number``-th context of a layer: those of a block that have it at an end of its swap come
        first, in an order of its own."""
        block = self.block(number // POOL)
        order = np.random.default_rng([self.seed, 73, player.column]).permutation(POOL).tolist()
        order.sort(key=lambda i: block[i][player.layer].weight not in (player.before, player.after))
        return block[order[number % POOL]]


def plan_swaps(
    players: Sequence[Player], ranked: Sequence[str], contexts: Contexts, count: int, seed: int
) -> list[PlannedSwap]:
    """``count`` swaps of ``chosen_layers``, each in CONTEXTS contexts; more layers before more contexts."""
    by_name, space = {p.layer: p for p in players}, contexts.space
    turns = chosen_layers(ranked, -(-count // CONTEXTS), seed)
    flips = []
    for i in range(count):
        layer, half = turns[i // CONTEXTS % len(turns)]
        number = i // CONTEXTS // len(turns) * CONTEXTS + i % CONTEXTS
        player = by_name[layer]
        context = contexts.of(player, number)
        before, after = (space.swapped(context, layer, s) for s in (player.before, player.after))
        flips.append(PlannedSwap(layer, player.before, player.after, context, (before, after), half))
    return flips


def rank_layers(
    session: Session,
    players: Sequence[Player],
    bits: float,
    damages: Damages | None,
    progress: Progress = no_progress,
) -> list[str]:
    """Layers, worst first: by their predicted effects, as ``explain`` has them, where a surrogate can be
    fitted; else by what their swap alone does to a few images; without either in the space's order."""
    try:
        fitted = fit_from_study(session.study, progress=progress, baselines=())
        drawn = draw_contexts(fitted.space, fitted.cost, bits, DRAWN, np.random.default_rng([0, 0]), damages)
        found = predicted_effects(session.study, fitted, Question(list(players), drawn, 0), progress)
        effect = found.effects.effect(fitted.space.columns)
    except AquabitError:
        effect = np.zeros(len(players))
        if damages is not None:
            effect = np.array([damages.swap(p.columns, p.before, p.after) for p in players])
    return [players[i].layer for i in np.argsort(-effect, kind="stable")]


def validate_in(
    session: Session,
    count: int,
    swap: str | None = None,
    bits: float = 3.0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Measure planned swaps, two measurements each or one where a context is shared, and note which
    configurations belong together.

    The fact "validation_plan" of the study lists, for each (swap, bits, seed, number of measurements that
    were ranked by), the ranking and the (layer, swap) of either half; the same call measures the same swaps
    again. ``swap``: default, the space's own.
    """
    if count < 1:
        raise AquabitError(f"flips is {count}; it must be at least 1")
    study, space, protocol = session.study, session.space, session.protocol.block(BLOCK)
    chosen, damages = named_swap(space, swap), damages_of(session)
    players = find_players(space, parse_swap(chosen))
    contexts = Contexts(space, session.costs, damages, bits, seed)
    contexts.block(0)  # raises where the budget is out of reach, before anything is measured
    key = {"swap": chosen, "bits": bits, "seed": seed, "measurements": len(study.known(session.protocol))}
    plans: list[dict[str, Any]] = study.get("validation_plan") or []
    old = next((p for p in plans if all(p[k] == v for k, v in key.items())), None)
    ranked = old["ranked"] if old else rank_layers(session, players, bits, damages, progress)
    flips = plan_swaps(players, ranked, contexts, count, seed)
    if old is None or count > old["flips"]:
        pairs = {h: [(f.layer, f"{f.before}:{f.after}") for f in flips if f.checks == h] for h in HALVES}
        halves: dict[str, Any] = {h: [list(pair) for pair in dict.fromkeys(own)] for h, own in pairs.items()}
        now: dict[str, Any] = {**key, "flips": count, "ranked": ranked, **halves}
        study.set(validation_plan=[*(p for p in plans if p is not old), now])
    session.measure_full([protocol], "fresh seeds", progress)
    session.measure([end for flip in flips for end in flip.ends], "flip", progress, [protocol], "real swaps")
    for flip in flips:
        before, after = (end.digest for end in flip.ends)
        study.add_swap(flip.layer, str(flip.before), str(flip.after), before, after, protocol)

"""validate: real one-layer swaps in random contexts near the budget, on seeds that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Progress, QuantConfig, Scheme, no_progress, parse_swap
from aquabit.sensitivity.effects import draw_contexts
from aquabit.sensitivity.measure import Session
from aquabit.space import SearchSpace

BLOCK = 1  # block of fresh seeds that real swaps are measured on
CONTEXTS = 2  # random contexts a layer is swapped in


@dataclass(frozen=True)
class Flip:
    """One layer swapped between two schemes inside one context."""

    layer: str
    before: Scheme
    after: Scheme
    context: QuantConfig
    codebook: str | None  # the codebooks that the layer may share

    @property
    def ends(self) -> tuple[QuantConfig, QuantConfig]:
        before, after = (
            self.context.with_layer(self.layer, s, codebook=self.codebook if s.shared else None) for s in (self.before, self.after)
        )
        return before, after


def plan_flips(space: SearchSpace, costs: CostModel, count: int, swap: str, bits: float, seed: int) -> list[Flip]:
    """``count`` swaps: layers drawn at random, each in CONTEXTS random contexts of its own; more layers before more contexts."""
    before, after = parse_swap(swap)
    players = [k for k in space.free_layers() if before in space.choices[k] and after in space.choices[k]]
    if not players:
        raise AquabitError(f"no layer may take both {before} and {after}; choose a --swap of schemes in the space")
    order = [players[i] for i in np.random.default_rng([seed, 71]).permutation(len(players))]
    pairs = [
        (layer, c) for start in range(0, count, CONTEXTS) for layer in [order[(start // CONTEXTS) % len(order)]] for c in range(CONTEXTS)
    ]
    contexts = space.configs(*draw_contexts(space, costs, bits, len(pairs[:count]), np.random.default_rng([seed, 72])))
    names = space.codebooks or {}
    return [Flip(layer, before, after, context, names.get(layer)) for (layer, _), context in zip(pairs[:count], contexts, strict=True)]


def validate_in(session: Session, count: int, swap: str, bits: float, seed: int, progress: Progress = no_progress) -> None:
    """Measure planned swaps, two measurements each, and note which configurations belong together."""
    if count < 1:
        raise AquabitError(f"flips is {count}; it must be at least 1")
    protocol = session.protocol.block(BLOCK)
    flips = plan_flips(session.space, session.costs, count, swap, bits, seed)
    session.measure([session.space.full_precision()], "reference", progress, [protocol], "full precision, fresh seeds")
    session.measure([end for flip in flips for end in flip.ends], "flip", progress, [protocol], "real swaps")
    for flip in flips:
        before, after = (end.digest for end in flip.ends)
        session.study.add_flip(flip.layer, str(flip.before), str(flip.after), before, after, protocol)

"""validate: real one-layer swaps in random contexts near the budget, on seeds that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Progress, QuantConfig, Scheme, no_progress, parse_swap
from aquabit.sensitivity.measure import Session
from aquabit.space import SearchSpace

BLOCK = 1  # block of fresh seeds that real swaps are measured on
CONTEXTS = 2  # random contexts a layer is swapped in
NEAR = 0.25  # bits a weight


@dataclass(frozen=True)
class Flip:
    """One layer swapped between two schemes inside one context."""

    layer: str
    before: Scheme
    after: Scheme
    context: QuantConfig

    @property
    def ends(self) -> tuple[QuantConfig, QuantConfig]:
        return self.context.with_layer(self.layer, self.before), self.context.with_layer(self.layer, self.after)


def random_contexts(space: SearchSpace, costs: CostModel, bits: float, count: int, seed: int) -> list[QuantConfig]:
    """``count`` random configurations within 0.25 bits a weight of ``bits`` with all activations at the space's highest bits."""
    act = max(space.activations)
    low, high = costs.limits(act)["bits"]
    if not low - NEAR <= bits <= high + NEAR:
        raise AquabitError(f"bits = {bits:g} is out of range: this space can reach {low:.3f} to {high:.3f} bits a weight")
    found: list[QuantConfig] = []
    span = (max(1.0, bits - 1.0), bits + 0.5)  # scales and codebooks come on top of the codes' bits
    for attempt in range(200):
        drawn = space.sample(max(16, count), int(np.random.default_rng([seed, attempt]).integers(1 << 31)), span)
        weights, acts = space.indices(drawn)
        acts = np.where(acts == 16, 16, act)
        near = np.abs(costs.totals(weights, acts)["bits"] - bits) <= NEAR
        found += space.configs(weights[near], acts[near])
        if len(found) >= count:
            return found[:count]
    raise AquabitError(f"no random configuration lies within {NEAR} of {bits:g} bits a weight; the space reaches {low:.3f} to {high:.3f}")


def plan_flips(space: SearchSpace, costs: CostModel, count: int, swap: str, bits: float, seed: int) -> list[Flip]:
    """``count`` swaps: layers drawn at random, each in CONTEXTS random contexts of its own; more layers before more contexts."""
    before, after = parse_swap(swap)
    players = [k for k in space.free_layers() if before in space.choices[k] and after in space.choices[k]]
    if not players:
        raise AquabitError(f"no layer may take both {before} and {after}; choose a --swap of schemes in the space")
    order = [players[i] for i in np.random.default_rng([seed, 71]).permutation(len(players))]
    pairs = [(layer, c) for start in range(0, count, CONTEXTS) for layer in [order[(start // CONTEXTS) % len(order)]] for c in range(CONTEXTS)]
    contexts = random_contexts(space, costs, bits, len(pairs[:count]), seed + 7_000_003)
    return [Flip(layer, before, after, context) for (layer, _), context in zip(pairs[:count], contexts, strict=True)]


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

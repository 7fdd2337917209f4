"""Which activation bits each denoising step gets: PTQD's rule by signal-to-noise ratio, and controls of
equal BOPs to judge it by."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor
from typing import Any

from aquabit.scheme import AquabitError, QuantConfig, StepGroups

MOST_GROUPS = 5
TRIES = 400  # random patterns, or random orders of layers, that are tried


# ---- PTQD's rule
# ------------------------------------------------------------------------------------------------------------


def signal_ratios(scheduler: Any) -> list[float]:
    """alpha_t^2 / sigma_t^2 = abar_t / (1 - abar_t) of every timestep that a scheduler is set to, in order of
    sampling.

    Raises AquabitError for a scheduler that names no ``alphas_cumprod`` (flow matching, say).
    """
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        raise AquabitError(
            f"{type(scheduler).__name__} has no alphas_cumprod; PTQD's rule is defined for diffusion with a"
            " noise schedule"
        )
    steps = [float(products[int(t)]) for t in scheduler.timesteps]
    return [a / (1 - a) for a in steps]


def snr_bits(snr: Mapping[int, Sequence[float]], ratios: Sequence[float]) -> list[int]:
    """Activation bits of every step: the fewest b whose SNR_b(t) = ||eps|| / ||Delta_b|| exceeds alpha_t^2 /
    sigma_t^2, else the most (PTQD, section 3.4). ``snr`` maps bits to a value a step. Raises AquabitError
    where numbers of steps differ.
    """
    wrong = [f"a{b} has {len(row)}" for b, row in snr.items() if len(row) != len(ratios)]
    if not snr or wrong:
        raise AquabitError(
            f"the rule needs an SNR for each of {len(ratios)} steps at every width;"
            f" {wrong[0] if wrong else 'none is given'}"
        )
    return [
        min((b for b in sorted(snr) if snr[b][t] > ratio), default=max(snr)) for t, ratio in enumerate(ratios)
    ]


def merged(bits: Sequence[int], groups: int = MOST_GROUPS) -> list[int]:
    """``bits`` of every step in at most so many contiguous groups, changed in as few steps as possible; of
    equal ones that with the most bits, then with the fewest groups."""
    widths = sorted(set(bits))
    # state -> (changed steps, -sum of bits, groups), and the path; one entry per (width of the last group,
    # groups so far)
    states: dict[tuple[int, int], tuple[tuple[int, int], list[int]]] = {
        (w, 1): ((w != bits[0], -w), [w]) for w in widths
    }
    for wanted in bits[1:]:
        following: dict[tuple[int, int], tuple[tuple[int, int], list[int]]] = {}
        for (last, count), ((changed, total), path) in states.items():
            for width in widths:
                key = (width, count + (width != last))
                cost = (changed + (width != wanted), total - width)
                if key[1] <= groups and (key not in following or cost < following[key][0]):
                    following[key] = (cost, [*path, width])
        states = following
    best = min(states, key=lambda key: (states[key][0], key[1]))
    return states[best][1]


def snr_rule(
    snr: Mapping[int, Sequence[float]], ratios: Sequence[float], groups: int = MOST_GROUPS
) -> tuple[StepGroups | None, tuple[int, ...]]:
    """PTQD's rule in at most ``groups`` contiguous groups (``snr_bits``, ``merged``): the groups, and the
    bits of each. No groups (None) and one number where all steps take the same bits."""
    return grouped(merged(snr_bits(snr, ratios), groups))


def grouped(bits: Sequence[int]) -> tuple[StepGroups | None, tuple[int, ...]]:
    """Groups of equal neighbours, and the bits of each; raises AquabitError for more than five."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(bits)) if a != b)]
    return (StepGroups(len(bits), tuple(starts)) if len(starts) > 1 else None), tuple(bits[s] for s in starts)


# ---- configurations
# ------------------------------------------------------------------------------------------------------------


def stepped(base: QuantConfig, rows: Mapping[str, Sequence[int]]) -> QuantConfig:
    """``base`` with the activation bits of every step for the layers of ``rows``; raises AquabitError
    where that takes more than five groups."""
    total = len(next(iter(rows.values())))
    starts = [s for s in range(total) if s == 0 or any(row[s] != row[s - 1] for row in rows.values())]
    steps = StepGroups(total, tuple(starts)) if len(starts) > 1 else None
    layers = {k: replace(base[k], act=tuple(row[s] for s in starts)) for k, row in rows.items()}
    return replace(base, layers={**base.layers, **layers}, steps=steps)


def chosen_layers(costs: Mapping[str, float], share: float, seed: int = 0) -> set[str]:
    """Layers whose ``costs`` make up ``share`` of all as nearly as possible: random orders, filled up
    greedily."""
    goal, rng = share * sum(costs.values()), random.Random(seed)
    best: tuple[float, set[str]] = (goal, set())
    for _ in range(TRIES):
        names, taken, left = list(costs), set[str](), goal
        rng.shuffle(names)
        for name in names:
            if costs[name] <= left * (1 + 1e-12):
                taken.add(name)
                left -= costs[name]
        if left < best[0]:
            best = (left, taken)
        if best[0] <= 1e-4 * goal:
            break
    return best[1]


@dataclass(frozen=True)
class Mix:
    """What controls of equal BOPs have in common: ``base`` with the layers of ``costs`` at ``low`` and
    ``high`` activation bits, ``mean`` on average over steps and layers. ``costs`` are the layers' BOPs per
    activation bit; ``seed`` says which layers, where they differ.
    """

    base: QuantConfig
    low: int
    high: int
    mean: float
    costs: Mapping[str, float]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.low < self.high or not self.low <= self.mean <= self.high:
            raise AquabitError(
                f"a mean of {self.mean:g} activation bits cannot be mixed from a{self.low} and a{self.high};"
                " it must lie between them"
            )

    def filled(self, pattern: Callable[[int], list[int]], total: int) -> QuantConfig:
        """``pattern`` (of the number of steps at ``low``) for all layers; a part of a step is met by some
        layers that have one more such step, beside a boundary."""
        exact = total * (self.high - self.mean) / (self.high - self.low)
        count = floor(exact + 1e-9)
        bits = pattern(count)
        rows = dict.fromkeys(self.costs, bits)
        if exact - count > 1e-9:
            more = pattern(count + 1)
            if sum(a != b for a, b in zip(bits, more, strict=True)) != 1:
                more = list(bits)
                more[_edge(bits, self.high, self.low)[0]] = self.low
            rows |= dict.fromkeys(chosen_layers(self.costs, exact - count, self.seed), more)
        return stepped(self.base, rows)


def _edge(bits: Sequence[int], old: int, new: int) -> list[int]:
    """Steps at ``old`` beside one at ``new``; both ends where there is none."""
    beside = [
        t for t, b in enumerate(bits) if b == old and new in (*bits[max(t - 1, 0) : t], *bits[t + 1 : t + 2])
    ]
    return beside or [0, len(bits) - 1]


def uniform(mix: Mix) -> QuantConfig:
    """The same bits in all steps: some layers take ``high``, the others ``low``."""
    up = chosen_layers(mix.costs, (mix.mean - mix.low) / (mix.high - mix.low), mix.seed)
    layers = {k: replace(mix.base[k], act=mix.high if k in up else mix.low) for k in mix.costs}
    return replace(mix.base, layers={**mix.base.layers, **layers}, steps=None)


def low_then_high(mix: Mix, total: int) -> QuantConfig:
    """``low`` in the first of ``total`` steps and ``high`` in the others."""
    return mix.filled(lambda count: [mix.low] * count + [mix.high] * (total - count), total)


def high_then_low(mix: Mix, total: int) -> QuantConfig:
    """``high`` in the first of ``total`` steps and ``low`` in the others."""
    return mix.filled(lambda count: [mix.high] * (total - count) + [mix.low] * count, total)


def by_snr(mix: Mix, snr: Sequence[float], ratios: Sequence[float]) -> QuantConfig:
    """PTQD's rule with its threshold scaled until the mean is met: the steps with the largest SNR_low(t) /
    (alpha_t^2 / sigma_t^2) take ``low``, in at most four contiguous groups."""
    margin = [s / r if r > 0 else float("inf") for s, r in zip(snr, ratios, strict=True)]
    order = sorted(range(len(margin)), key=lambda t: (-margin[t], t))

    def pattern(count: int) -> list[int]:
        first = set(order[:count])
        bits = merged([mix.low if t in first else mix.high for t in range(len(margin))], MOST_GROUPS - 1)
        # merging may have changed the number: steps beside a boundary, by their margin
        while (have := bits.count(mix.low)) != count:
            old, new, sign = (mix.high, mix.low, 1) if have < count else (mix.low, mix.high, -1)
            bits[max(_edge(bits, old, new), key=lambda t: sign * margin[t])] = new
        return bits

    return mix.filled(pattern, len(margin))


def random_bits(mix: Mix, total: int) -> QuantConfig:
    """Three or four random contiguous groups of ``low`` and ``high`` in turn (fewer where the mean allows
    no more), by the mix's seed."""
    rng = random.Random(mix.seed)

    def pattern(count: int) -> list[int]:
        for _ in range(TRIES if total > 3 else 0):
            starts = sorted(rng.sample(range(1, total), rng.randint(2, 3)))
            turn = (mix.low, mix.high) if rng.random() < 0.5 else (mix.high, mix.low)
            bits = [turn[sum(s <= t for s in starts) % 2] for t in range(total)]
            if bits.count(mix.low) == count:
                return bits
        return [mix.low] * count + [mix.high] * (total - count)

    return mix.filled(pattern, total)

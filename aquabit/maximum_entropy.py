"""Draws of largest entropy: of all distributions with a given mean, the one that assumes nothing else. Random
configurations and good ones are drawn so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special

PRICE_ROUNDS = 50  # of bisection for a price: what odds as sharp as SHARP can tell apart
BETA_ROUNDS = 20  # of bisection for beta: to 4e-5 of itself
# beta of odds that heed no damage, and of the program's own choice; damages are scaled to at most 1
FLAT, SHARP = 1e-6, 1e12


def bisect(below: Callable[[Any], Any], low: Any, high: Any, rounds: int) -> tuple[Any, Any]:
    """Both ends of what is left of [low, high] around the point up to which ``below(x)`` is True, after
    ``rounds`` halvings or where no number lies between them; for arrays elementwise."""
    for _ in range(rounds):
        middle = (low + high) / 2
        if np.all((middle == low) | (middle == high)):
            break
        small = below(middle)
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    return low, high


@lru_cache(maxsize=1024)
def level_odds(levels: tuple[float, ...], mean: float) -> np.ndarray:
    """Probabilities over ``levels`` with the given mean: p ~ exp(rate * level); the mean is clipped
    inside. Not to be written to: it is kept for the next layer with these levels."""
    values = np.asarray(levels, float)
    mean = float(np.clip(mean, values.min() + 1e-3, values.max() - 1e-3))

    def odds(rate: float) -> np.ndarray:
        exponent = rate * (values - mean)
        w = np.exp(exponent - exponent.max())
        return np.asarray(w / w.sum())

    if len(values) == 1:
        return np.ones(1)
    low, high = bisect(lambda rate: odds(rate) @ values < mean, -1e4, 1e4, 200)
    return odds((low + high) / 2)


def share_odds(worse: np.ndarray, counted: np.ndarray, share: float) -> np.ndarray:
    """Probabilities [n] of a change that is ``worse`` [n] by so much each (in units of beta): 1 / (1 +
    exp(worse - price)), the price such that their mean over the ``counted`` (Boolean [n]) is ``share``."""
    own = worse[counted]
    ends = -float(own.max()) - 40, -float(own.min()) + 40
    _, price = bisect(lambda at: special.expit(-own - at).mean() > share, *ends, PRICE_ROUNDS)
    return np.asarray(special.expit(-worse - price))


@dataclass(frozen=True)
class Gibbs:
    """Independent draws of one scheme a row with probability p ~ exp(-beta (damage + price x size)): of
    all distributions with the same mean size and mean damage the one of largest entropy. ``odds`` [G,
    schemes]; a row is a layer, or several that choose together."""

    odds: np.ndarray
    beta: float
    price: float

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Scheme indices [count, G]."""
        uniform = rng.random((count, len(self.odds)))
        edges = np.cumsum(self.odds, 1)
        edges /= edges[:, -1:]
        return np.asarray((uniform[..., None] > edges[None, :, :-1]).sum(-1))


def solve_gibbs(damage: np.ndarray, size: np.ndarray, mean: float, excesses: Sequence[float]) -> list[Gibbs]:
    """For each of ``excesses`` the distribution of this mean total ``size`` whose mean total ``damage`` is
    1 + excess times the least that any mixture of that size has (the optimum of the program, its last layer
    split).

    Both are [L, schemes], damage infinite where a layer may not take a scheme. ``mean`` is kept inside what
    can be reached, an excess below what equal odds have.
    """
    allowed = np.isfinite(damage)
    table = np.where(allowed, damage, 0.0)
    unit = max(float(np.ptp(table, axis=1).max()), 1e-300)
    scaled = table / unit
    low = float(np.where(allowed, size, np.inf).min(1).sum())
    high = float(np.where(allowed, size, -np.inf).max(1).sum())
    size = np.where(allowed, size, 0.0)
    goal = float(np.clip(mean, low + 1e-6 * (high - low), high - 1e-6 * (high - low)))

    def odds(beta: np.ndarray, price: np.ndarray) -> np.ndarray:
        exponent = np.where(allowed, -beta[:, None, None] * (scaled + price[:, None, None] * size), -np.inf)
        weights = np.exp(exponent - exponent.max(-1, keepdims=True))
        return np.asarray(weights / weights.sum(-1, keepdims=True))

    def at(beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Odds [betas, L, schemes] of mean size ``goal``, and their prices [betas]; a negative price makes
        large schemes likely."""
        reach = np.full(len(beta), 60.0)
        _, price = bisect(
            lambda at: (odds(beta, np.sinh(at)) * size).sum((1, 2)) > goal, -reach, reach, PRICE_ROUNDS
        )
        return odds(beta, np.sinh(price)), np.sinh(price)

    least, flat = (at(np.array([SHARP, FLAT]))[0] * scaled).sum((1, 2))
    wanted = np.minimum((1 + np.asarray(excesses, float)) * least, flat)
    ends = np.full(len(wanted), np.log(FLAT)), np.full(len(wanted), np.log(SHARP))
    _, log_beta = bisect(lambda b: (at(np.exp(b))[0] * scaled).sum((1, 2)) > wanted, *ends, BETA_ROUNDS)
    beta = np.exp(log_beta)
    chances, price = at(beta)
    return [Gibbs(o, float(b) / unit, float(p) * unit) for o, b, p in zip(chances, beta, price, strict=True)]

"""Predictions and real swaps combined by precision, as empirical Bayes does, on a scale where small and large effects are equally noisy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from aquabit.sensitivity.effects import Player

WORTH = 1.5  # contexts of real swaps that a prediction is worth
PRIOR_FREEDOM = 4.0  # what the pooled spread between contexts weighs, in degrees of freedom, beside a layer's own
PRIOR_LAYERS = 4  # what WORTH weighs, in layers, beside the errors that real swaps show
UNCHECKED = 0.65  # standard error of a prediction beside its own spread, where no real swap says better
FLOOR = 0.2  # standard error that no number of swaps takes away: a few contexts are not all contexts
COMMON = 0.3  # of the error variance is shared by all layers, which a mean over layers keeps
DRAWS = 200


@dataclass(frozen=True)
class Combined:
    """Per player: the combined effect with its 90 % interval and draws [DRAWS, players] of what it may be (none without an interval)."""

    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    draws: np.ndarray


def combine(
    players: Sequence[Player], predicted: np.ndarray, replicates: np.ndarray, swaps: pd.DataFrame, widen: float = 1.0, seed: int = 0
) -> Combined:  # fmt: skip
    """Predicted effects [players], refitted as ``replicates`` [r, players], combined with real swaps (layer, before, after, and what each
    worsened as ``real``; swaps between other schemes do not count).

    Effects differ by orders of magnitude and spread over contexts in proportion, so all is done on asinh(effect / median size). There a
    real mean has its own variance, moderated by the pooled one; a prediction the variance that WORTH contexts leave, or more where the
    layers that were swapped show more; each side weighs by its precision. Back in units the effects are scaled so that those of swapped
    layers add up to the real ones, since means of a skewed scale are too small. A layer without swaps keeps its prediction, on that scale.
    Without any swap the effects are the predictions, and the variance is that of the replicates and UNCHECKED. ``widen`` multiplies
    standard errors. Fewer than two replicates: no intervals.

    The constants were chosen on real effects of the bundled models in 16 contexts; benchmarks/results/surrogate.md has other contexts.
    """
    values = [_real(p, swaps) for p in players]
    known = np.array([len(v) > 0 for v in values])
    size, back = _size(predicted), 1.0
    if known.any():
        size = _size(np.concatenate(values))
        ratio = _size(predicted[known]) / size  # predictions and swaps may disagree on how large effects are
        scaled = predicted / ratio ** (known.sum() / (known.sum() + PRIOR_LAYERS))
        place, error = _posterior(np.arcsinh(scaled / size), [np.arcsinh(v / size) for v in values])
        effect = size * np.sinh(place)
        agreed = sum(float(v.mean()) * np.sign(e) for v, e in zip(values, effect, strict=True) if len(v))
        back = agreed / float(np.abs(effect[known]).sum()) if agreed > 0 else 1.0
        effect = back * effect
    else:
        place, effect = np.arcsinh(predicted / size), predicted
        own = np.square(np.arcsinh(replicates / size) - place).mean(0) if len(replicates) else np.zeros(len(predicted))
        error = (own + np.median(own)) / 2 + UNCHECKED**2
    error = widen * np.sqrt(error)
    if len(replicates) < 2:
        none = np.full(len(predicted), np.nan)
        return Combined(effect, none, none, np.empty((0, len(predicted))))
    reach = stats.norm.ppf(0.95) * error
    rng = np.random.default_rng([seed, 6])
    noise = np.sqrt(COMMON) * rng.normal(size=(DRAWS, 1)) + np.sqrt(1 - COMMON) * rng.normal(size=(DRAWS, len(predicted)))
    low, high, draws = (back * size * np.sinh(place + shift) for shift in (-reach, reach, noise * error))
    return Combined(effect, low, high, draws)


def real_means(players: Sequence[Player], swaps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The mean [players] of each player's real swaps (NaN without), and their number."""
    values = [_real(p, swaps) for p in players]
    return np.array([v.mean() if len(v) else np.nan for v in values]), np.array([len(v) for v in values])


def _real(player: Player, swaps: pd.DataFrame) -> np.ndarray:
    own = (swaps.layer == player.layer) & (swaps.before == str(player.before)) & (swaps.after == str(player.after))
    return swaps.real[own].to_numpy(float)


def _size(values: np.ndarray) -> float:
    """The median size, above 0."""
    found = np.abs(values)
    return float(np.median(found)) or float(found.max()) or 1.0


def _posterior(place: np.ndarray, values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances [players] of predictions at ``place`` and real swaps, all on the asinh scale."""
    count = np.array([len(v) for v in values])
    known = count > 0
    mean = np.array([v.mean() if len(v) else 0.0 for v in values])
    within = np.array([np.square(v - v.mean()).sum() if len(v) else 0.0 for v in values])
    squared = np.square(mean - place)
    freedom = np.maximum(count - 1, 0)
    if freedom.any():
        pooled = float((within / np.maximum(freedom, 1))[freedom > 0].mean())
    else:
        pooled = float(squared[known].mean()) / (1 + 1 / WORTH)
    pooled = max(pooled, 1e-12)
    between = (within + PRIOR_FREEDOM * pooled) / (freedom + PRIOR_FREEDOM) / np.maximum(count, 1)
    stated = pooled / WORTH
    # how much larger squared distances are than the stated error and the real mean's own lead to expect
    ratio = np.median([*(squared / (stated + between))[known] / stats.chi2.ppf(0.5, 1), *[1.0] * PRIOR_LAYERS])
    predictions = max(stated, float(ratio * np.median((stated + between)[known]) - np.median(between[known])))
    weight = np.where(known, predictions / (predictions + between), 0.0)
    return place + weight * (mean - place), (1 - weight) * predictions + FLOOR**2

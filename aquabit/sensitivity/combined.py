"""The ranking that users see once there are real swaps: predictions and real means combined by precision, as empirical Bayes does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from aquabit.sensitivity.effects import Player

PRIOR_SWAPS = 2.0  # what the pooled spread between contexts weighs, in degrees of freedom, beside a layer's own
PRIOR_LAYERS = 4.0  # what the stated intervals of predictions weigh, in layers, beside the errors that real swaps show
LEAST_ERROR = 0.1  # predictions are never taken as more exact than this share of their stated spread


@dataclass(frozen=True)
class Combined:
    """Per player: the combined effect with its 90 % interval and replicates, the mean of real swaps (NaN without) and their number."""

    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    replicates: np.ndarray
    real: np.ndarray
    swaps: np.ndarray


def combine(
    players: Sequence[Player], predicted: np.ndarray, low: np.ndarray, high: np.ndarray, replicates: np.ndarray, flips: pd.DataFrame,
    seed: int = 0,
) -> Combined | None:  # fmt: skip
    """Predicted effects [players] with intervals and replicates [r, players], and real swaps (the table of ``predict_flips``); None where
    no swap is one of the players'.

    A layer's real effect is the prediction plus the mean of what its real swaps worsen beyond their prediction in the same context,
    which spares it most of the differences between contexts. Its variance is the layer's own over contexts, moderated by a pooled one that
    grows with the size of the effect; a layer with one swap has the pooled one. The error variance of a prediction is that of
    its interval times one factor, estimated from the layers that have both. Each side weighs by its precision; a layer without
    real swaps keeps its prediction, and an interval as wide as the factor says.
    """
    surprises = [_surprises(p, flips) for p in players]
    count = np.array([len(s) for s in surprises])
    if not count.any():
        return None
    known = np.flatnonzero(count)
    surprise = np.array([s.mean() if len(s) else np.nan for s in surprises])
    size = predicted**2 + np.median(np.abs(predicted)) ** 2 + np.finfo(float).tiny
    variance = _variance_of_means(surprises, surprise, size)
    stated = (high - low) / 2 / stats.norm.ppf(0.95)
    given = np.isfinite(stated)  # without replicates nothing is stated, and no interval is
    stated = np.where(given & (stated > 0), stated, np.sqrt(size)) ** 2
    error = stated * _factor(surprise[known] ** 2, variance[known], stated[known])
    weight = np.zeros(len(players))
    weight[known] = error[known] / (error[known] + variance[known])
    effect = predicted + weight * np.where(count > 0, surprise, 0)
    half = np.where(given, stats.norm.ppf(0.95) * np.sqrt((1 - weight) * error), np.nan)
    noise = np.random.default_rng([seed, 6]).normal(size=replicates.shape) * np.where(count > 0, np.sqrt(variance), 0)
    spread = np.sqrt(error / stated) * (replicates - predicted)
    real = np.array([_worsened(p, flips).mean() if n else np.nan for p, n in zip(players, count, strict=True)])
    return Combined(effect, effect - half, effect + half, effect + (1 - weight) * spread + weight * noise, real, count)


def _own(player: Player, flips: pd.DataFrame) -> pd.DataFrame:
    return flips[(flips.layer == player.layer) & (flips.before == str(player.before)) & (flips.after == str(player.after))]


def _worsened(player: Player, flips: pd.DataFrame) -> np.ndarray:
    return _own(player, flips).real.to_numpy(float)


def _surprises(player: Player, flips: pd.DataFrame) -> np.ndarray:
    own = _own(player, flips)
    return np.asarray((own.real - own.predicted).to_numpy(float))


def _variance_of_means(values: Sequence[np.ndarray], mean: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Of each layer's mean over contexts; NaN without values. Where no layer has two values nothing separates the spread over contexts from
    errors of prediction: each is taken as half of what is seen."""
    count = np.array([len(v) for v in values])
    within = np.array([np.square(v - v.mean()).sum() if len(v) else 0.0 for v in values])
    freedom = np.maximum(count - 1, 0)
    known = count > 0
    pooled = (within / size).sum() / freedom.sum() if freedom.any() else float((mean[known] ** 2 / size[known]).mean()) / 2
    out = np.full(len(values), np.nan)
    each = (within + PRIOR_SWAPS * pooled * size) / (freedom + PRIOR_SWAPS)
    out[known] = np.maximum(each[known], np.finfo(float).tiny) / count[known]
    return out


def _factor(squared: np.ndarray, variance: np.ndarray, stated: np.ndarray) -> float:
    """The error variance of predictions over the stated one: moments of the surprises, layers with exact real means counting most."""
    weight = (stated / (stated + variance)) ** 2
    found = (PRIOR_LAYERS + (weight * (squared - variance) / stated).sum()) / (PRIOR_LAYERS + weight.sum())
    return float(max(found, LEAST_ERROR**2))

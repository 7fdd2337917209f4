"""Predictions and real swaps combined by hierarchical Bayes: what either is worth is fitted to the study's
own swaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from aquabit.sensitivity.effects.posterior import DRAWS, draw_effects
from aquabit.sensitivity.effects.predicted import Player
from aquabit.stats import around_replicates, between_percentiles, replicate_errors


@dataclass(frozen=True)
class Combined:
    """Per player: the combined effect with its 95 % interval and joint draws [draws, players] of what it may
    be (none without an interval).

    ``ratio``: how many times larger the errors of predictions are than their replicates say, as swaps show; 1
    without swaps, never less.
    """

    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    draws: np.ndarray
    ratio: float = 1.0


def combine(
    players: Sequence[Player],
    predicted: np.ndarray,
    replicates: np.ndarray,
    swaps: pd.DataFrame,
    seed: int = 0,
) -> Combined:
    """Predicted effects [players], refitted as ``replicates`` [r, players], combined with real swaps (layer,
    before, after, and what each worsened as ``real``; swaps between other schemes do not count).

    With swaps: medians and 95 % intervals of ``posterior.draw_effects``, each effect's mean over contexts in
    the objective's units. Replicates do not count.

    Without any swap: the predictions, with the intervals of ``around_replicates``. These do not know the
    surrogate's bias; none below two replicates.
    """
    values = [_real(p, swaps) for p in players]
    known, rng = [len(v) > 0 for v in values], np.random.default_rng([seed, 6])
    if not any(known):
        low, high = around_replicates(predicted, replicates)
        return Combined(predicted, low, high, predicted + _errors(predicted, replicates, rng))
    with np.errstate(over="ignore", invalid="ignore"):  # steps too far to compute are not taken
        draws = draw_effects(np.asarray(predicted, float), values, rng)
    effect, (low, high) = np.quantile(draws, 0.5, axis=0), between_percentiles(draws)
    return Combined(effect, low, high, draws, _ratio(predicted[known], replicates[:, known], draws[:, known]))


def _errors(predicted: np.ndarray, replicates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws [draws, players] of a multivariate Student t with the replicates' covariance, so that errors
    that layers share remain in a mean over them; none below two replicates."""
    count = len(replicates)
    if count < 2:
        return np.empty((0, len(predicted)))
    normal = rng.normal(size=(DRAWS, count)) @ (replicates - predicted) / np.sqrt(count)
    return np.asarray(normal * np.sqrt(count / rng.chisquare(count, (DRAWS, 1))))


def real_means(players: Sequence[Player], swaps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The mean [players] of each player's real swaps (NaN without), and their number."""
    values = [_real(p, swaps) for p in players]
    return np.array([v.mean() if len(v) else np.nan for v in values]), np.array([len(v) for v in values])


def _real(player: Player, swaps: pd.DataFrame) -> np.ndarray:
    own = (swaps.layer == player.layer) & (swaps.before == str(player.before))
    return swaps.real[own & (swaps.after == str(player.after))].to_numpy(float)


def _ratio(predicted: np.ndarray, replicates: np.ndarray, draws: np.ndarray) -> float:
    """The median distance of ``draws`` [draws, swapped layers] from predictions, over the one that
    replicates expect; at least 1."""
    if len(replicates) < 2:
        return 1.0
    error = replicate_errors(predicted, replicates)
    distance = np.abs(draws - predicted)[:, error > 0] / error[error > 0]
    if not distance.size:
        return 1.0
    return max(1.0, float(np.median(distance)) / float(stats.t.ppf(0.75, len(replicates))))

"""Scores of predictions, all oriented larger = worse; within-budget SRCC is the one to quote (DESIGN
section 2)."""

from __future__ import annotations

import numpy as np
from scipy import stats

from aquabit.scheme import AquabitError
from aquabit.stats import between_percentiles

# times the least error at their size: what good ones have at most (DESIGN section 2, "good configuration")
GOOD = 1.25
NEAR = 0.5  # bits within which good ones are compared: front and excess change little there
ENOUGH = 20  # good ones below which they are not scored
FLAT = 1e-9  # residuals below this share of what they were taken from are rounding, not ranking


def srcc(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman rank correlation; 0 where either side is constant, since a constant ranks nothing."""
    a, b = _paired(a, b)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b; 0 where either side is constant."""
    a, b = _paired(a, b)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.kendalltau(a, b).statistic)


def ndcg10(y: np.ndarray, predicted: np.ndarray) -> float:
    """NDCG@10 with linear gains: a configuration gains (worst - its value) / (worst - best), ranked by
    prediction, smallest first.

    Configurations predicted equal share the mean gain of their tie, so that the order of the rows does not
    matter. 1 where all are equal.
    """
    y, predicted = _paired(y, predicted)
    if len(y) == 0 or np.ptp(y) == 0:
        return 1.0
    gain = (y.max() - y) / np.ptp(y)
    _, tie = np.unique(predicted, return_inverse=True)
    shared = (np.bincount(tie, gain) / np.bincount(tie))[tie]
    top = min(10, len(y))
    discount = 1 / np.log2(np.arange(2, top + 2))
    reached = shared[np.argsort(predicted, kind="stable")[:top]] @ discount
    return float(reached / (np.sort(gain)[::-1][:top] @ discount))


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    """Coefficient of determination; NaN where ``y`` is constant."""
    y, predicted = _paired(y, predicted)
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    return float(1 - ((y - predicted) ** 2).sum() / total) if total > 0 else float("nan")


def budget_terms(bits: np.ndarray, mean_act: np.ndarray, standardise: bool = True) -> np.ndarray:
    """The ten terms [n, 10] of a cubic in (real weight bits, mean activation bits), both standardised
    first; a constant one becomes 0."""
    bits, acts = np.asarray(bits, float), np.asarray(mean_act, float)
    if standardise:
        bits, acts = _standardised(bits), _standardised(acts)
    return np.stack([bits**i * acts**j for i in range(4) for j in range(4 - i)], 1)


def budget_residuals(
    values: np.ndarray, bits: np.ndarray, mean_act: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """``values`` minus a cubic in bits and activation bits, each row's cubic fitted on the rows of the other
    folds.

    ``values`` [n] are labels or out-of-fold predictions. With ``values`` [folds, n], row f being what the
    model fitted without fold f says of every configuration, the cubic is fitted to that same model's
    predictions of the training folds.
    """
    values, terms = np.asarray(values, float), budget_terms(bits, mean_act)
    per_fold = np.broadcast_to(values, (int(fold.max()) + 1, len(fold)))
    out = np.zeros(len(fold))
    for f, row in enumerate(per_fold):
        train, test = fold != f, fold == f
        if not train.any():
            raise AquabitError("within-budget SRCC needs at least two folds")
        center = row[train].mean()
        cubic, *_ = np.linalg.lstsq(terms[train], row[train] - center, rcond=1e-9)
        out[test] = row[test] - center - terms[test] @ cubic
    return out


def within_budget_srcc(
    y: np.ndarray, predicted: np.ndarray, bits: np.ndarray, mean_act: np.ndarray, fold: np.ndarray
) -> float:
    """SRCC of what is left of raw labels and of predictions once the budget explains its part (DESIGN section
    2).

    From both a cubic (all ten terms) in real weight bits and mean activation bits is subtracted, fitted on
    the training folds; the residuals of all folds are pooled. Constant residuals score 0. ``predicted`` is
    [n], out of fold, or [folds, n] (see ``budget_residuals``); ``fold`` [n] numbers the folds from 0.
    """
    left = residual_pair(y, predicted, bits, mean_act, fold)
    return 0.0 if left is None else srcc(*left)


def residual_pair(
    y: np.ndarray, predicted: np.ndarray, bits: np.ndarray, mean_act: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """What ``within_budget_srcc`` ranks: the residuals [n] of labels and of predictions; None where either
    is constant."""
    fold = np.asarray(fold, int)
    left = []
    for values in (np.asarray(y, float), np.asarray(predicted, float)):
        residual = budget_residuals(values, bits, mean_act, fold)
        if _flat(residual, values):
            return None
        left.append(residual)
    return left[0], left[1]


def _flat(residual: np.ndarray, values: np.ndarray) -> bool:
    """Whether nothing is left of ``values`` that ranks them."""
    size = max(float(np.abs(values).max()), np.finfo(float).tiny)
    return bool(not np.isfinite(residual).all() or np.ptp(residual) <= FLAT * size)


def within_budget_interval(
    y: np.ndarray,
    predicted: np.ndarray,
    bits: np.ndarray,
    mean_act: np.ndarray,
    fold: np.ndarray,
    seed: int = 0,
    replicates: int = 400,
) -> tuple[float, float]:
    """95 % interval of ``within_budget_srcc`` by drawing configurations with replacement; (0, 0) where
    residuals are constant."""
    left = residual_pair(y, predicted, bits, mean_act, fold)
    if left is None:
        return 0.0, 0.0
    rng = np.random.default_rng([seed, 3])
    drawn = rng.integers(len(left[0]), size=(replicates, len(left[0])))
    found = [srcc(left[0][rows], left[1][rows]) for rows in drawn]
    low, high = between_percentiles(np.array(found))
    return float(low), float(high)


def all_scores(
    y: np.ndarray, predicted: np.ndarray, bits: np.ndarray, mean_act: np.ndarray, fold: np.ndarray
) -> dict[str, float]:
    """The five scores of out-of-fold predictions (forms as in ``within_budget_srcc``), labels and
    predictions in the same units."""
    fold, predicted = np.asarray(fold, int), np.asarray(predicted, float)
    held_out = predicted if predicted.ndim == 1 else predicted[fold, np.arange(len(fold))]
    return {
        "within_budget_srcc": within_budget_srcc(y, predicted, bits, mean_act, fold),
        "srcc": srcc(y, held_out),
        "kendall": kendall(y, held_out),
        "ndcg10": ndcg10(y, held_out),
        "r2": r2(y, held_out),
    }


def good_ones(error: np.ndarray, bits: np.ndarray, within: float = GOOD) -> np.ndarray:
    """Boolean [n]: which configurations have at most ``within`` times the least error of all that are no
    larger than they are.

    ``error`` [n] is above full precision's (a mean squared distance to its images, or the oriented difference
    of an objective), ``bits`` [n] the real size. The least error is of what was measured, since sums of
    damages, which say what might be reached, are of other images. Configurations no worse than full precision
    (errors of 0 and below) are good.
    """
    error, bits = _paired(error, bits)
    order = np.lexsort((error, bits))
    least = np.empty(len(error))
    least[order] = np.minimum.accumulate(error[order])
    return np.asarray(error <= np.maximum(within * least, 0.0))


def good_residuals(values: np.ndarray, bits: np.ndarray, mean_act: np.ndarray) -> np.ndarray:
    """What is left of values [n] of good ones once what their size explains is subtracted: around each row a
    quadratic in real bits and a line in mean activation bits, fitted to all rows with Gaussian weights of
    NEAR bits.

    Local, since good ones lie along a front that no one cubic follows from 2 to 8 bits, and what it misses
    would count as ranking.
    """
    bits = np.asarray(bits, float)
    acts = _standardised(np.asarray(mean_act, float))
    values = np.asarray(values, float)
    left, out = values - values.mean(), np.empty(len(values))
    for i in range(len(values)):
        off = bits - bits[i]
        root = np.exp(-np.square(off / NEAR) / 4)  # square root of the weights
        terms = np.stack([np.ones(len(bits)), off, off**2, acts - acts[i]], 1)
        out[i] = left[i] - np.linalg.lstsq(terms * root[:, None], left * root, rcond=1e-9)[0][0]
    return out


def among_good_srcc(
    y: np.ndarray, predicted: np.ndarray, bits: np.ndarray, mean_act: np.ndarray, good: np.ndarray
) -> float | None:
    """Within-budget SRCC of held-out predictions among ``good`` configurations (``good_ones``); None below
    ENOUGH of them.

    Both sides [n] are oriented, larger = worse, on the scale that was fitted, since errors of good ones
    shrink with their size.
    """
    good = np.asarray(good, bool)
    if good.sum() < ENOUGH:
        return None
    left = []
    for values in (np.asarray(y, float)[good], np.asarray(predicted, float)[good]):
        residual = good_residuals(values, bits[good], mean_act[good])
        if _flat(residual, values):
            return 0.0
        left.append(residual)
    return srcc(*left)


def noise_ceiling(
    first: np.ndarray, second: np.ndarray, bits: np.ndarray, mean_act: np.ndarray
) -> float | None:
    """sqrt(reliability) of labels from two seed sets: the within-budget SRCC that a perfect predictor of the
    mean could reach.

    The reliability is the SRCC between the two sets after the cubic is subtracted from each; None below 20
    configurations.
    """
    if len(first) < 20:
        return None
    terms = budget_terms(bits, mean_act)
    both = np.asarray(first, float), np.asarray(second, float)
    left = [v - terms @ np.linalg.lstsq(terms, v, rcond=1e-9)[0] for v in both]
    return float(np.sqrt(max(0.0, srcc(*left))))


def good_ceiling(
    first: np.ndarray, second: np.ndarray, bits: np.ndarray, mean_act: np.ndarray, good: np.ndarray
) -> float | None:
    """``noise_ceiling`` of ``among_good_srcc``; None below ENOUGH good ones."""
    reliability = among_good_srcc(first, second, bits, mean_act, good)
    return None if reliability is None else float(np.sqrt(max(0.0, reliability)))


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1:
        raise AquabitError(f"scores compare two lists of one length, not shapes {a.shape} and {b.shape}")
    return a, b


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = values.std() if len(values) else 0.0
    flat = spread <= 1e-9 * max(1.0, float(np.abs(values).max(initial=0.0)))
    return np.zeros_like(values) if flat else (values - values.mean()) / spread

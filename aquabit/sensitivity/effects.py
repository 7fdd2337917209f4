"""Predicted effects of swaps in random contexts, their intervals, and TreeSHAP by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from aquabit.cost import CostModel
from aquabit.scheme import FP, AquabitError, Progress, Scheme, no_progress
from aquabit.sensitivity.encoder import Encoder
from aquabit.sensitivity.estimators import Estimator, Surrogate, predict_all
from aquabit.sensitivity.surrogate import FittedSurrogate
from aquabit.space import SearchSpace, maximum_entropy

REACH = 0.25  # contexts lie within this many real bits per weight of the budget
CONTEXT_ACT = 8  # where the space has it, else its highest
TUNING = 20  # draws that may go into finding the nominal mean; at either end of a space none may fit
CHUNK = 2048  # configurations encoded at once: bounds memory, and stays in the cache: twice as fast as 8192 on 300 layers


@dataclass(frozen=True)
class Player:
    """One layer with a choice, and the swap that its effect speaks of."""

    layer: str
    column: int  # of index matrices
    before: Scheme
    after: Scheme
    schemes: tuple[Scheme, ...]


@dataclass(frozen=True)
class Effects:
    """Mean predicted objective per (player, scheme) over the contexts, positive = worse; replicates in the leading axis."""

    players: list[Player]
    value: np.ndarray  # [players, schemes of the space], NaN where a layer may not take it
    replicates: np.ndarray  # [replicates, players] effects

    def of_schemes(self, index: int, space_schemes: Sequence[Scheme]) -> dict[str, float]:
        """Effect of going from the swap's first scheme to each other one of the layer."""
        player, column = self.players[index], {s: j for j, s in enumerate(space_schemes)}
        start = self.value[index, column[player.before]]
        return {str(s): float(self.value[index, column[s]] - start) for s in player.schemes if s != player.before}

    def effect(self, space_schemes: Sequence[Scheme]) -> np.ndarray:
        return np.array([self.of_schemes(i, space_schemes)[str(p.after)] for i, p in enumerate(self.players)])


def find_players(space: SearchSpace, swap: tuple[Scheme, Scheme]) -> list[Player]:
    """The layers with a choice. One that lacks a named scheme uses its own nearest in bits, of the same kind where it can;
    a layer whose two nearest are one scheme has no swap and is left out."""
    found = []
    for column, (layer, row) in enumerate(space.choices.items()):

        def nearest(wanted: Scheme, layer: str = layer, row: tuple[Scheme, ...] = row) -> Scheme:
            bits = space.code_bits(layer, wanted)
            return min(row, key=lambda s: (s != wanted, abs(space.code_bits(layer, s) - bits), s.kind != wanted.kind))

        before, after = nearest(swap[0]), nearest(swap[1])
        if before != after:
            found.append(Player(layer, column, before, after, row))
    if not found:
        raise AquabitError(f"no layer has both ends of the swap {swap[0]}:{swap[1]}; the space has {', '.join(map(str, space.schemes))}")
    return found


def draw_contexts(space: SearchSpace, cost: CostModel, bits: float, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Index matrices of ``count`` random configurations within 0.25 real bits per weight of ``bits``, activations at 8 bits.

    Drawn as ``SearchSpace.sample`` draws (maximum entropy over bit levels, then a method), the nominal mean adjusted until the
    real one fits, the rest rejected. Raises AquabitError where the space cannot reach ``bits``.
    """
    act = CONTEXT_ACT if CONTEXT_ACT in space.activations else max(space.activations)
    low, high = cost.limits(act)["bits"]
    if not low - REACH <= bits <= high + REACH:
        raise AquabitError(f"bits = {bits:g} is out of reach: this space has {low:.3g} to {high:.3g} bits per weight")
    excluded = np.array([row == (FP,) for row in space.choices.values()])
    acts = np.tile(np.where(excluded, 16, act), (count, 1))
    mean, kept, have = bits, [], 0
    for attempt in range(200):
        drawn = _draw(space, mean, 4 * count, rng)
        real = cost.totals(drawn, acts[:1].repeat(len(drawn), 0))["bits"]
        miss = bits - float(real.mean())
        if abs(miss) <= REACH / 5 or attempt >= TUNING:  # else the mean first: contexts are to lie around the budget, not beside it
            fits = drawn[np.abs(real - bits) <= REACH]
            kept.append(fits)
            have += len(fits)
            if have >= count:
                return np.concatenate(kept)[:count], acts
        mean += float(np.clip(miss, -0.5, 0.5))
    raise AquabitError(f"no random configuration comes within {REACH} of {bits:g} bits per weight; this space has {low:.3g} to {high:.3g}")


def _draw(space: SearchSpace, mean: float, count: int, rng: np.random.Generator) -> np.ndarray:
    column = {s: j for j, s in enumerate(space.schemes)}
    odds: dict[tuple[float, ...], np.ndarray] = {}
    out = np.empty((count, len(space.choices)), int)
    for i, layer in enumerate(space.choices):
        levels = space.bit_levels(layer)
        key = tuple(levels)
        if key not in odds:
            odds[key] = maximum_entropy(key, mean)
        chance = {s: p / len(row) for (_, row), p in zip(levels.items(), odds[key], strict=True) for s in row}
        out[:, i] = rng.choice([column[s] for s in chance], count, p=np.array(list(chance.values())))
    return out


def swapped(
    fitted: FittedSurrogate, players: list[Player], weights: np.ndarray, acts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Features of every context with every scheme of every player, in chunks: (features, players, scheme columns), contexts innermost."""
    column = {s: j for j, s in enumerate(fitted.space.schemes)}
    pairs = [(i, column[s]) for i, p in enumerate(players) for s in p.schemes]
    step = max(1, CHUNK // len(weights))
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        changed = np.tile(weights, (len(part), 1, 1))
        for k, (player, scheme) in enumerate(part):
            changed[k, :, players[player].column] = scheme
        features = fitted.features(changed.reshape(-1, weights.shape[1]), np.tile(acts, (len(part), 1)))
        yield features, np.array([p for p, _ in part]), np.array([s for _, s in part])


def bootstrap(fitted: FittedSurrogate, replicates: int, seed: int, progress: Progress = no_progress) -> list[Estimator]:
    """The surrogate refitted to measurements drawn with replacement (``Estimator.replicate``)."""
    features, models = fitted.features(fitted.weights, fitted.acts), []
    for r in range(replicates):
        rng = np.random.default_rng([seed, 1, r])
        rows = rng.integers(len(fitted.y), size=len(fitted.y))
        models.append(fitted.surrogate.replicate(rng, seed + 1 + r).fit(features[rows], fitted.y[rows]))
        progress("refit for intervals", r + 1, replicates)
    return models


def predict_effects(
    fitted: FittedSurrogate, players: list[Player], contexts: tuple[np.ndarray, np.ndarray], models: Sequence[Estimator],
    seed: int = 0, progress: Progress = no_progress,
) -> Effects:  # fmt: skip
    """Mean predicted objective of each (player, scheme), in units, positive = worse; each replicate also redraws the contexts."""
    weights, acts = contexts
    n, shape = len(weights), (len(models) + 1, len(players), len(fitted.space.schemes))
    share = np.full((len(models) + 1, n), 1.0 / n)
    for r in range(len(models)):
        share[r + 1] = np.random.default_rng([seed, 2, r]).multinomial(n, share[0]) / n
    value, everyone = np.full(shape, np.nan), (fitted.surrogate, *models)
    for features, player, scheme in swapped(fitted, players, weights, acts):
        for m, (model, predicted) in enumerate(zip(everyone, predict_all(everyone, features), strict=True)):
            units = model.to_units(predicted).reshape(len(player), n)
            value[m, player, scheme] = fitted.sign * (units @ share[m])
        progress("predict swaps", int(player[-1]) + 1, len(players))
    column = {s: j for j, s in enumerate(fitted.space.schemes)}
    rows = np.arange(len(players))
    before, after = [column[p.before] for p in players], [column[p.after] for p in players]
    return Effects(players, value[0], value[1:, rows, after] - value[1:, rows, before])


def interval(effect: np.ndarray, replicates: np.ndarray, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """90 % interval [n] around ``effect`` from bootstrap replicates [r, n]; NaN below two replicates.

    The 5th and 95th percentiles of a replicate's distance from the effect, the farther one to both sides, since a surrogate shrinks
    towards no effect and its replicates shrink again; widened by Student's t for few replicates, and never narrower than the
    median layer's, since one that was shrunk to nothing varies too little. On synthetic truth (60 layers, 120 and 300
    measurements, 8 draws) 72 to 95 % of the true effects lay inside, 87 % on average; bare percentiles held 48 to 65 %. ``factor``
    widens it further, as too few measurements demand.
    """
    count = len(replicates)
    if count < 2:
        return np.full(len(effect), np.nan), np.full(len(effect), np.nan)
    widen = factor * float(stats.t.ppf(0.95, count - 1) / stats.norm.ppf(0.95)) * np.sqrt(1 + 1 / count)
    half = widen * np.abs(np.percentile(replicates - effect, [5, 95], axis=0)).max(0)
    half = np.maximum(half, np.median(half))
    return effect - half, effect + half


def shap_by_layer(fitted: FittedSurrogate) -> tuple[np.ndarray, float]:
    """SHAP values [n, layers] of the training configurations in log units, and their base; rows sum to the prediction.

    What a layer's own columns get is its own; an aggregate's value is split among its members by their share of its deviation from
    the mean. Members that deviate the other way get none, so shares lie in [0, 1] and sum to 1. Raises AquabitError for estimators
    other than the trees.
    """
    if not isinstance(fitted.surrogate, Surrogate):
        raise AquabitError(f"TreeSHAP explains boosted trees, not {type(fitted.surrogate).__name__}: fit with estimator gbdt")
    values, base = fitted.surrogate.contributions(fitted.encoder(fitted.weights, fitted.acts))
    parts = member_parts(fitted.encoder, fitted.weights, fitted.acts)
    out = np.zeros(fitted.weights.shape)
    for c, (name, members) in enumerate(zip(fitted.encoder.columns, fitted.encoder.members, strict=True)):
        if len(members) == 1:
            out[:, members[0]] += values[:, c]
            continue
        index = list(members)
        part = parts[name.split(":")[0]][:, index]
        deviation = part - part.mean(0)
        toward = np.maximum(deviation * np.sign(deviation.sum(1, keepdims=True)), 0)
        total = toward.sum(1, keepdims=True)
        share = np.where(total > 0, toward / np.where(total > 0, total, 1), 1 / len(index))
        out[:, index] += values[:, [c]] * share
    return out, base


def member_parts(encoder: Encoder, weights: np.ndarray, acts: np.ndarray) -> Mapping[str, np.ndarray]:
    """What each layer adds to the aggregates, [n, layers] by kind of column."""
    rows = np.arange(weights.shape[1])
    low, order = encoder.lowness(acts)
    parts = {
        "error": encoder.error[rows, weights],
        "actshare": low,
        "ordershare": order,
        "bits": encoder.bits[rows, weights] * encoder.size_share,
    }
    if encoder.probed:
        parts["damage"] = parts["shift"] = encoder.damages(weights, acts)
    return parts


def signed_shap(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Per layer: mean SHAP value where the layer's weight error is above its median, less the mean elsewhere; 0 without both."""
    out = np.zeros(values.shape[1])
    for i in range(values.shape[1]):
        high = error[:, i] > np.median(error[:, i])
        if high.any() and not high.all():
            out[i] = values[high, i].mean() - values[~high, i].mean()
    return out

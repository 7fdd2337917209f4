"""Predicted effects of swaps in good configurations near a budget, their intervals, and TreeSHAP by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from aquabit.choices import Choices, Variant
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Progress, Scheme, no_progress, parse_swap
from aquabit.sensitivity.damages import (
    BUDGET_TOLERANCE_BITS,
    Damages,
    check_budget_in_reach,
    context_act,
    good_contexts,
)
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.shared_contexts import group_numbers
from aquabit.sensitivity.surrogate.estimators import Surrogate, predict_all
from aquabit.sensitivity.surrogate.fit import FittedSurrogate
from aquabit.sensitivity.surrogate.regressor import Estimator
from aquabit.space import SearchSpace

SWAP = "usq4h:usq2h"  # where at least half of the free layers may take both, see ``default_swap``
APART, ENDS = 1.0, (4.0, 2.0)  # code bits that a default swap's ends differ by at least, and are to be near
TUNING = 20  # draws that may go into finding the nominal mean; at either end of a space none may fit
# configurations encoded at once: bounds memory, and stays in the cache: twice as fast as 8192 on 300 layers
CHUNK = 2048


@dataclass(frozen=True)
class Player:
    """One layer with a choice, and the swap that its effect speaks of; of tied layers, which are swapped
    together, the first stands for all."""

    layer: str
    columns: tuple[int, ...]  # the places among the space's layers of those that are swapped
    before: Scheme
    after: Scheme
    schemes: tuple[Scheme, ...]

    @property
    def column(self) -> int:
        """The place of its layer."""
        return self.columns[0]

    def at(self, scheme: int) -> tuple[tuple[int, int], ...]:
        """The variant of a row in which it takes a scheme (index into ``space.schemes``)."""
        return tuple((column, scheme) for column in self.columns)


@dataclass(frozen=True)
class Effects:
    """Mean predicted objective per (player, scheme) over the contexts, positive = worse; replicates in the
    leading axis."""

    players: list[Player]
    value: np.ndarray  # [players, schemes of the space], NaN where a layer may not take it
    replicates: np.ndarray  # [replicates, players] effects

    def of_schemes(self, index: int, column: Mapping[Scheme, int]) -> dict[str, float]:
        """Effect of going from the swap's first scheme to each other one of the layer; ``column`` is the
        space's (``SearchSpace.columns``)."""
        player = self.players[index]
        start = self.value[index, column[player.before]]
        return {
            str(s): float(self.value[index, column[s]] - start) for s in player.schemes if s != player.before
        }

    def effect(self, column: Mapping[Scheme, int]) -> np.ndarray:
        return np.array([self.of_schemes(i, column)[str(p.after)] for i, p in enumerate(self.players)])


def find_players(space: SearchSpace, swap: tuple[Scheme, Scheme]) -> list[Player]:
    """The layers with a choice. One that lacks a named scheme uses its own nearest in bits, of the same
    kind where it can; a layer whose two nearest are one scheme has no swap and is left out."""
    found = []
    for number, (layer, *_) in enumerate(space.grouped()):
        row = space.choices[layer]

        def nearest(wanted: Scheme, layer: str = layer, row: tuple[Scheme, ...] = row) -> Scheme:
            bits = space.code_bits(layer, wanted)

            def distance(s: Scheme) -> tuple[bool, float, bool]:
                return s != wanted, abs(space.code_bits(layer, s) - bits), s.record is not wanted.record

            return min(row, key=distance)

        before, after = nearest(swap[0]), nearest(swap[1])
        if before != after:
            found.append(Player(layer, tuple(space.groups.members(number)), before, after, row))
    if not found:
        raise AquabitError(
            f"no layer has both ends of the swap {swap[0]}:{swap[1]}; the space has"
            f" {', '.join(map(str, space.schemes))}"
        )
    return found


def default_swap(space: SearchSpace) -> str:
    """The swap that effects speak of where none is named: SWAP where at least half of the free layers may
    take both of its schemes; else, of all pairs of schemes that differ by APART code bits or more, the one
    that most layers may take, then the one nearest to ENDS, then one of two schemes of a kind, output-aware
    where it can.

    Raises AquabitError where no layer may take two such schemes.
    """
    free = [set(space.choices[layer]) for layer in space.free_layers()]
    named = parse_swap(SWAP)
    if free and 2 * sum(row.issuperset(named) for row in free) >= len(free):
        return SWAP
    ranked: list[tuple[tuple[float, ...], str]] = []
    for before, after in permutations(space.schemes, 2):
        layers = [k for k in space.free_layers() if before in space.choices[k] and after in space.choices[k]]
        if not layers:
            continue
        bits = [float(np.mean([space.code_bits(k, s) for k in layers])) for s in (before, after)]
        if bits[0] - bits[1] >= APART - 1e-9:
            off = sum(abs(b - end) for b, end in zip(bits, ENDS, strict=True))
            unlike = (before.record is not after.record) + (before.calibrated != after.calibrated)
            ranked.append(((-len(layers), round(off, 6), unlike, not before.calibrated), f"{before}:{after}"))
    if not ranked:
        raise AquabitError(
            f"no layer may take two schemes that differ by {APART:g} bit or more, so no swap can say where it"
            f" hurts; the space has {', '.join(map(str, space.schemes))}: add a scheme of fewer bits, or name"
            " a --swap"
        )
    return min(ranked, key=lambda row: row[0])[1]


def named_swap(space: SearchSpace, swap: str | None = None) -> str:
    """``swap``, or the space's own. Raises AquabitError, before anything is measured, where no layer can
    be swapped so."""
    chosen = default_swap(space) if swap is None else swap
    find_players(space, parse_swap(chosen))
    return chosen


def draw_contexts(
    space: SearchSpace,
    cost: CostModel,
    bits: float,
    count: int,
    rng: np.random.Generator,
    damages: Damages | None = None,
) -> Choices:
    """``count`` configurations within 0.25 real bits per weight of ``bits``, activations at
    8 bits: good ones (``good_contexts``) where the damages are known.

    Where they are not (a study without probes), random ones, drawn as ``SearchSpace.sample`` draws (maximum
    entropy over bit levels, then a method), the nominal mean adjusted until the real one fits, the rest
    rejected. Raises AquabitError where the space cannot reach ``bits``.
    """
    if damages is not None:
        return good_contexts(damages, cost, bits, count, rng)
    check_budget_in_reach(space, cost, bits)
    mean, kept, have = bits, list[Choices](), 0
    for attempt in range(200):
        drawn = Choices.at(space, _draw(space, mean, 4 * count, rng), context_act(space))
        real = cost.totals(drawn)["bits"]
        miss = bits - float(real.mean())
        # the mean first: contexts are to lie around the budget, not beside it
        if abs(miss) <= BUDGET_TOLERANCE_BITS / 5 or attempt >= TUNING:
            fits = drawn[np.abs(real - bits) <= BUDGET_TOLERANCE_BITS]
            kept.append(fits)
            have += len(fits)
            if have >= count:
                return Choices.concat(kept)[:count]
        mean += float(np.clip(miss, -0.5, 0.5))
    low, high = cost.limits(context_act(space))["bits"]
    raise AquabitError(
        f"no random configuration comes within {BUDGET_TOLERANCE_BITS} of {bits:g} bits per weight; this"
        f" space has {low:.3g} to {high:.3g}"
    )


def _draw(space: SearchSpace, mean: float, count: int, rng: np.random.Generator) -> np.ndarray:
    column = space.columns
    out = np.empty((count, len(space.choices)), int)
    for i, (layer, *_) in enumerate(space.grouped()):
        odds = space.scheme_odds(layer, mean)
        drawn = rng.choice([column[s] for s in odds], count, p=list(odds.values()))
        out[:, space.groups.members(i)] = drawn[:, None]
    return out


def mean_predictions(
    fitted: FittedSurrogate,
    models: Sequence[Estimator],
    contexts: Choices,
    variants: Sequence[Variant],
    seed: int = 0,
    units: bool = True,
    progress: Progress = no_progress,
    what: str = "predict swaps",
) -> np.ndarray:
    """Mean prediction over the contexts of each variant, positive = worse, [1 + models, variants]: of the
    surrogate, then of each model over contexts that it redraws. In the objective's units, or
    (``units=False``) on the fitted, mostly logarithmic, scale.
    """
    n = len(contexts)
    share = np.full((len(models) + 1, n), 1.0 / n)
    for r in range(len(models)):
        share[r + 1] = np.random.default_rng([seed, 2, r]).multinomial(n, share[0]) / n
    everyone = (fitted.surrogate, *models)
    out = np.empty((len(everyone), len(variants)))
    step = max(1, CHUNK // n)
    for start in range(0, len(variants), step):
        part = variants[start : start + step]
        features = fitted.features(contexts.under(part))
        for m, (model, z) in enumerate(zip(everyone, predict_all(everyone, features), strict=True)):
            values = fitted.sign * model.to_units(z) if units else z
            out[m, start : start + len(part)] = values.reshape(len(part), n) @ share[m]
        progress(what, start + len(part), len(variants))
    return out


def bootstrap(
    fitted: FittedSurrogate, replicates: int, seed: int, progress: Progress = no_progress
) -> list[Estimator]:
    """The surrogate refitted to measurements drawn with replacement; see ``refits``."""
    features, groups = fitted.features(fitted.choices), group_numbers(fitted.choices)
    return refits(fitted.surrogate, features, fitted.y, groups, replicates, seed, progress)


def refits(
    surrogate: Estimator,
    features: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    replicates: int,
    seed: int,
    progress: Progress = no_progress,
) -> list[Estimator]:
    """``surrogate`` refitted (``Estimator.replicate``) to ``groups`` of rows drawn with replacement."""
    members = [np.flatnonzero(groups == g) for g in range(int(groups.max()) + 1)]
    models = []
    for r in range(replicates):
        rng = np.random.default_rng([seed, 1, r])
        rows = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        models.append(surrogate.replicate(rng, seed + 1 + r).fit(features[rows], y[rows]))
        progress("refit for intervals", r + 1, replicates)
    return models


def predict_effects(
    fitted: FittedSurrogate,
    players: list[Player],
    contexts: Choices,
    models: Sequence[Estimator],
    seed: int = 0,
    progress: Progress = no_progress,
) -> Effects:
    """Mean predicted objective of each (player, scheme), in units, positive = worse; each replicate, of
    the named swap alone, also redraws the contexts."""
    column = fitted.space.columns
    value = np.full((len(players), len(column)), np.nan)

    def predict(pairs: list[tuple[int, int]], models: Sequence[Estimator], what: str) -> np.ndarray:
        variants = [players[i].at(s) for i, s in pairs]
        found = mean_predictions(fitted, models, contexts, variants, seed, True, progress, what)
        value[[i for i, _ in pairs], [s for _, s in pairs]] = found[0]
        return found[1:]

    ends = predict(
        [(i, column[s]) for i, p in enumerate(players) for s in (p.before, p.after)], models, "predict swaps"
    )
    others = [
        (i, column[s]) for i, p in enumerate(players) for s in p.schemes if s not in (p.before, p.after)
    ]
    predict(others, [], "predict other schemes")
    return Effects(players, value, ends[:, 1::2] - ends[:, ::2])


def shap_by_layer(fitted: FittedSurrogate) -> tuple[np.ndarray, float]:
    """SHAP values [n, layers] of the training configurations in log units, and their base; rows sum to the
    prediction.

    What a layer's own columns get is its own; an aggregate's value is split among its members by their share
    of its deviation from the mean. Members that deviate the other way get none, so shares lie in [0, 1] and
    sum to 1. Raises AquabitError for estimators other than the trees.
    """
    if not isinstance(fitted.surrogate, Surrogate):
        raise AquabitError(
            f"TreeSHAP explains boosted trees, not {type(fitted.surrogate).__name__}: fit with estimator gbdt"
        )
    values, base = fitted.surrogate.contributions(fitted.encoder(fitted.choices))
    parts = member_parts(fitted.encoder, fitted.choices)
    out = np.zeros(fitted.choices.weights.shape)
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


def member_parts(encoder: Encoder, choices: Choices) -> Mapping[str, np.ndarray]:
    """What each layer adds to the aggregates, [n, layers] by kind of column."""
    weights, rows = choices.weights, np.arange(choices.weights.shape[1])
    low, order = encoder.activation_reduction(choices.group_codes)
    parts = {
        "error": encoder.error[rows, weights],
        "actshare": low,
        "ordershare": order,
        "bits": encoder.bits[rows, weights] * encoder.size_share,
    }
    if encoder.probed:
        parts["damage"] = parts["shift"] = encoder.damages(choices)
    return parts


def signed_shap(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Per layer: mean SHAP value where the layer's weight error is above its median, less the mean
    elsewhere; 0 without both."""
    out = np.zeros(values.shape[1])
    for i in range(values.shape[1]):
        high = error[:, i] > np.median(error[:, i])
        if high.any() and not high.all():
            out[i] = values[high, i].mean() - values[~high, i].mean()
    return out

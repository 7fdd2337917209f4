"""How other tools search, over given scores of single layers and our exact bytes; used by
benchmarks/rivals.py.

A table of scores is [L, schemes of the space], larger = worse, infinite where a layer may not take a scheme.
Sources, read in November 2026: sony/model_optimization (greedy_solution_refinement_procedure), thu-nics/MixDQ
(integer_programming.py), quic/aimet (amp: accuracy list and Pareto list), Disty0/sdnq
(sdnq_quantize_layer_weight_dynamic), nvidia-modelopt 0.47.0 (initialize_candidate_stats).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget
from aquabit.search.integer_program import solve

RATIOS, LOWER, STEPS = (
    (0.46, 1.36),
    0.3,
    10,
)  # MixDQ's grid: content's mean bits over quality's, and total bits from 0.3 below the target
# of its programs, which MixDQ keeps to 0.02 bit only: proving optimality takes seconds each, and a budget has
# 200
GRID_GAP = 1e-3

Weights = np.ndarray  # scheme indices [L] into ``space.schemes``


def highest(space: Any, costs: Any) -> np.ndarray:
    """The largest scheme of every layer [L], which MCT and AIMET start from."""
    return np.where(space.allowed(), costs.bytes, -1).argmax(1)


def prices(costs: Any) -> np.ndarray:
    """Bytes [L, schemes] with an equal part of shared codebooks for each layer that may use them, for
    rivals that compare single layers."""
    found = costs.bytes.astype(float)
    for tables in costs.shared:
        found[tables.layers, tables.column] += tables.bytes / len(tables.layers)
    return np.asarray(found)


def bytes_of(costs: Any, weights: np.ndarray) -> np.ndarray:
    """True bytes [n] of all weights of scheme indices [n, L]."""
    return np.asarray(costs.totals(Choices.at(costs.space, weights, 8))["bytes"] - costs.other_bytes)


def cap(costs: Any, bits: float) -> float:
    """The bytes that all weights may take, with the tolerance of ``CostModel.within``."""
    return float(np.floor(bits * costs.weights / 8 * (1 + 1e-12)))


def falling(table: np.ndarray, costs: Any) -> np.ndarray:
    """ModelOpt's candidates: no score is above that of a smaller one."""
    price = np.where(np.isfinite(table), prices(costs), np.inf)
    order = np.argsort(price, axis=1, kind="stable")
    out = np.empty_like(table)
    np.put_along_axis(out, order, np.minimum.accumulate(np.take_along_axis(table, order, 1), axis=1), 1)
    return np.where(np.isfinite(table), out, np.inf)


def exact(table: np.ndarray, costs: Any, bits: float, relative_gap: float = 0.0) -> Weights:
    """The scheme indices of least total score [L, schemes] within a budget."""
    return solve(table[:, :, None], costs, Budget(bits=bits), relative_gap=relative_gap).choices.weights[0]


def raised(weights: Weights, table: np.ndarray, costs: Any, bits: float) -> Weights:
    """MCT's ``greedy_solution_refinement_procedure``: again and again the layer and the larger scheme that
    add the fewest bytes, within the budget. Schemes whose score is not lower are left out, which its bit
    widths never are."""
    price, rows = prices(costs), np.arange(len(weights))
    while True:
        better = (price > price[rows, weights][:, None]) & (table < table[rows, weights][:, None])
        layer, column = np.nonzero(better & np.isfinite(table))
        changed = np.repeat(weights[None], len(layer), 0)
        changed[np.arange(len(layer)), layer] = column
        sizes = bytes_of(costs, changed) if len(layer) else np.zeros(0)
        fitting = np.flatnonzero(sizes <= cap(costs, bits))
        if not len(fitting):
            return weights
        weights = changed[fitting[np.argmin(sizes[fitting])]]


def lowered(damage: np.ndarray, costs: Any, bits: float, per_byte: bool) -> Weights:
    """AIMET's list: all layers at their highest, then one (layer, scheme) after the other in the order of
    damage [L, schemes] (``per_byte``: of damage per byte saved), until the budget is met. Entries that are no
    smaller than what the layer has by then are passed over.
    """
    price, choice = prices(costs), highest(costs.space, costs)
    rows = np.arange(len(choice))
    saving = price[rows, choice][:, None] - price
    layer, column = np.nonzero(np.isfinite(damage) & (saving > 0))
    key = damage[layer, column] / (saving[layer, column] if per_byte else 1.0)
    for k in np.lexsort((-price[layer, column], key)):
        if bytes_of(costs, choice[None])[0] <= cap(costs, bits):
            return choice
        if price[layer[k], column[k]] < price[layer[k], choice[layer[k]]]:
            choice[layer[k]] = column[k]
    if bytes_of(costs, choice[None])[0] <= cap(costs, bits):
        return choice
    raise AquabitError(f"{bits:g} bits are fewer than all schemes at their smallest take")


def thresholded(error: np.ndarray, costs: Any, bits: float) -> Weights:
    """SDNQ's rule: each layer takes its smallest scheme of error [L, schemes] at most t, its largest where
    none is; t is the least of all errors whose configuration is within the budget."""
    price = np.where(np.isfinite(error), prices(costs), np.inf)
    top = highest(costs.space, costs)
    for t in np.unique(error[np.isfinite(error)]):
        small = np.where(error <= t, price, np.inf)
        weights = np.where(np.isfinite(small).any(1), small.argmin(1), top)
        if bytes_of(costs, weights[None])[0] <= cap(costs, bits):
            return weights
    raise AquabitError(f"{bits:g} bits are fewer than all schemes at their smallest take")


def mean_bits(share: float, ratio: float, total: float) -> tuple[float, float]:
    """MixDQ's ``get_mean_bit``: mean bits of (quality, content) layers whose ratio is ``ratio`` (content
    over quality) and whose mean over all weights is ``total``; ``share``: content's weights over
    quality's."""
    quality = total * (1 + share) / (ratio * share + 1)
    return quality, ratio * quality


def split_programs(
    table: np.ndarray, content: np.ndarray, graph: Any, space: Any, bits: float
) -> list[Weights]:
    """MixDQ: for each of 10 totals up to ``bits`` and 10 ratios an exact program over the content layers
    (boolean [L]) and one over the others; points that a group cannot reach are left out, as MixDQ leaves
    out those outside its widths."""
    groups = []
    for mask in (~content, content):
        part = replace(
            space,
            choices={
                k: row for k, row, m in zip(space.choices, space.choices.values(), mask, strict=True) if m
            },
        )
        columns = [space.schemes.index(s) for s in part.schemes]
        groups.append(
            (CostModel(graph, part), np.array(columns), table[mask][:, columns], np.flatnonzero(mask))
        )
    share = groups[1][0].weights / groups[0][0].weights
    found: dict[bytes, Weights] = {}
    for total in np.linspace(bits - LOWER, bits, STEPS):
        for ratio in np.linspace(*RATIOS, STEPS):
            choice = np.zeros(len(content), int)
            try:
                for (costs, columns, part, index), mean in zip(
                    groups, mean_bits(share, ratio, total), strict=True
                ):
                    choice[index] = columns[
                        exact(part, costs, min(mean, costs.limits(8)["bits"][1]), GRID_GAP)
                    ]
            except AquabitError:
                continue
            found.setdefault(choice.tobytes(), choice)
    return list(found.values())

"""Encoder: configurations to features for the surrogate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx
import numpy as np

from aquabit.choices import Choices, by_group, by_rounding, in_order
from aquabit.graph import layers as graph_layers
from aquabit.measuring.evaluator import SKETCH
from aquabit.scheme import FP, ROUNDINGS, AquabitError, QuantConfig, Rounding, act_bits, act_code, act_text
from aquabit.space import SearchSpace

# Bits between the smallest and the largest value that have the same squared error: on normal tokens of 64 to
# 1,024 values, as they are and behind a GELU, "i8" has that of 7.1 to 7.9 bits, "f8" that of 5.6 to 6.2
EQUAL_BITS: Mapping[Rounding, float] = {"i8": 7.5, "f8": 5.9}


def reduction(rounding: Rounding) -> float:
    """How low a rounding is: a6 = 1, a8 = 0, a16 = -1/2, "i8" and "f8" as their ``EQUAL_BITS``."""
    return max(8 - EQUAL_BITS.get(rounding, act_bits(rounding)), -1) / 2


class Encoder:
    """Configurations to surrogate features: what each layer does, and operator, block and model aggregates.

    ``errors`` maps (layer, scheme) to the relative squared weight error. Columns of one layer are
    ``weight:NAME`` (log10 of the error) and ``act:NAME`` (``reduction``); ``error:`` and ``actshare:`` ones
    are their means over an operator type, a block, or the model. ``probes`` maps (layer, scheme) and (layer,
    "a6") to what happens to a few images when it is the only change: then ``damage:`` columns are added for
    layers and groups, and ``shift:`` columns, squared lengths of the summed sketches, which see where layers
    amplify or cancel each other. Where activation bits may change between groups of steps, ``act:`` is their
    mean over steps, and ``order:`` (with ``ordershare:`` means) how much lower they are in the last steps
    than in the first. ``members`` names the layers behind every column.
    """

    FLOOR = 1e-7  # relative error of 16-bit storage, so that log10 is finite

    def __init__(
        self,
        space: SearchSpace,
        graph: nx.DiGraph,
        errors: Mapping[tuple[str, str], float],
        probes: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    ):
        self.space, nodes = space, graph_layers(graph)
        self.graph = graph
        self.error = self._table(errors)
        self.bits = np.array([[space.code_bits(k, s) for s in space.schemes] for k in space.choices])
        sizes = np.array([float(np.prod(nodes[k]["shape"])) for k in space.choices])
        self.size_share = sizes / sizes.sum()
        groups: dict[str, list[int]] = {"model": list(range(len(sizes)))}
        for i, layer in enumerate(space.choices):
            groups.setdefault(f"operator:{nodes[layer]['operator']}", []).append(i)
            groups.setdefault(f"block:{nodes[layer]['block']}", []).append(i)
        self.groups = {k: v for k, v in groups.items() if len(v) > 1}
        self.incidence = np.zeros((len(sizes), len(self.groups)))
        for g, rows in enumerate(self.groups.values()):
            self.incidence[rows, g] = 1.0
        names = space.layers
        own = [(i,) for i in range(len(sizes))]
        grouped = [tuple(rows) for rows in self.groups.values()]
        everyone = tuple(range(len(sizes)))
        self.columns = [f"weight:{n}" for n in names] + [f"act:{n}" for n in names]
        self.columns += (
            [f"error:{g}" for g in self.groups] + [f"actshare:{g}" for g in self.groups] + ["bits"]
        )
        self.members: list[tuple[int, ...]] = [*own, *own, *grouped, *grouped, everyone]
        if space.steps is not None:
            self.columns += [f"order:{n}" for n in names] + [f"ordershare:{g}" for g in self.groups]
            self.members += [*own, *grouped]
        self.levels = in_order((*ROUNDINGS, *space.act_choices))  # activation choices that are known
        self.probed = probes is not None and self._probe_tables(probes)
        if self.probed:
            self.columns += [f"damage:{n}" for n in (*names, *self.groups)]
            self.columns += ["damage:roots", "shift:all", "shift:common"]
            self.members += [*own, *grouped, everyone, everyone, everyone]

    def _table(self, errors: Mapping[tuple[str, str], float]) -> np.ndarray:
        """[layers, schemes] of floored errors, NaN where a layer may not take a scheme and nothing is
        known."""
        out = np.full(self.space.allowed().shape, np.nan)
        for i, (layer, row) in enumerate(self.space.choices.items()):
            for j, scheme in enumerate(self.space.schemes):
                known = 0.0 if scheme == FP else errors.get((layer, str(scheme)))
                if known is None and scheme in row:
                    raise AquabitError(
                        f"no weight error is known for layer {layer!r} at {scheme}; run measure first"
                    )
                out[i, j] = np.nan if known is None else max(known, self.FLOOR)
        return out

    def _probe_tables(self, probes: Mapping[tuple[str, str], Mapping[str, Any]]) -> bool:
        """damage [layers, schemes], sketch [layers, schemes, SKETCH] and the same per activation bits;
        False where some are missing."""
        layers, schemes = self.space.layers, self.space.schemes
        levels = [*map(str, schemes), *map(act_text, self.levels)]
        shape = len(layers), len(levels)
        self.damage, self.sketch = np.zeros(shape), np.zeros((*shape, SKETCH), np.float32)
        for i, layer in enumerate(layers):
            row = self.space.choices[layer]
            acts = [act_text(a) for a in self.space.act_choices if row != (FP,)]
            needed = {*map(str, row), *acts} - {"fp", "a16"}
            for j, level in enumerate(levels):
                found = probes.get((layer, level))
                if found is None and level in needed:
                    return False
                if found is not None:
                    self.damage[i, j], self.sketch[i, j] = found["damage"], found["sketch"]
        return True

    def damages(self, choices: Choices) -> np.ndarray:
        """What each layer alone does to the images, [n, layers]: weights' and activations' damage added."""
        rows = np.arange(choices.weights.shape[1])
        return np.asarray(
            self.damage[rows, choices.weights] + self.damage[rows, self.activation_columns(choices)]
        )

    def sketches(self, choices: Choices, part: slice = slice(None)) -> np.ndarray:
        """Sketches of what each layer alone does, weights' and activations' added, [n, layers, SKETCH] or a
        part of the last axis."""
        rows = np.arange(choices.weights.shape[1])
        own, activation = choices.weights, self.activation_columns(choices)
        return np.asarray(self.sketch[rows, own, part] + self.sketch[rows, activation, part])

    def activation_columns(self, choices: Choices) -> np.ndarray:
        """Columns [n, layers] of ``damage`` and ``sketch`` that activation choices have."""
        return len(self.space.schemes) + choices.act_index(self.levels)

    def activation_reduction(self, group_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How low activations [..., groups] are, by their codes (``reduction``), as the mean over steps, and
        in the last group of steps less that in the first, each [...]."""
        low = by_rounding(reduction)[group_codes]
        return self.space.over_steps(low), low[..., -1] - low[..., 0]

    def level_reduction(self) -> tuple[np.ndarray, np.ndarray]:
        """``activation_reduction`` of each of ``levels``, each [levels, 1]."""
        groups = 1 if self.space.steps is None else len(self.space.steps.starts)
        parts = [[act_code(part) for part in by_group(a, groups)] for a in self.levels]
        return self.activation_reduction(np.array(parts)[:, None])

    def __call__(self, choices: Choices) -> np.ndarray:
        """Features [n, columns] of rows, float32."""
        weights, rows = choices.weights, np.arange(choices.weights.shape[1])
        error = self.error[rows, weights]
        low, order = self.activation_reduction(choices.group_codes)
        bits = (self.bits[rows, weights] * self.size_share).sum(1, keepdims=True)
        size = self.incidence.sum(0)
        parts = [
            np.log10(error),
            low,
            np.log10(error @ self.incidence / size),
            low @ self.incidence / size,
            bits,
        ]
        if self.space.steps is not None:
            parts += [order, order @ self.incidence / size]
        if self.probed:
            damage = self.damages(choices)
            roots = np.sqrt(damage).sum(1, keepdims=True) ** 2
            own = np.concatenate([damage, damage @ self.incidence, roots, *self._shifts(choices)], 1)
            parts.append(np.log10(own + self.FLOOR))
        return np.concatenate(parts, 1).astype(np.float32)

    def _shifts(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        """Squared lengths [n, 1] of the summed sketches: of all deviations, and of those common to all
        images."""
        weights, activation = choices.weights, self.activation_columns(choices)
        total = np.zeros((len(weights), SKETCH), np.float32)
        for i in range(weights.shape[1]):  # a layer at a time bounds memory: n x SKETCH
            total += self.sketch[i, weights[:, i]] + self.sketch[i, activation[:, i]]
        every, common = np.split(np.square(total), [SKETCH * 3 // 4], 1)
        return every.sum(1, keepdims=True), common.sum(1, keepdims=True)

    def encode(self, configs: Iterable[QuantConfig]) -> np.ndarray:
        return self(Choices.of(self.space, configs))

    def one_hot(self, choices: Choices) -> np.ndarray:
        """The additive encoding of integer-programming peers: one column per (layer, scheme) and (layer,
        activation)."""
        schemes = np.eye(len(self.space.schemes))[choices.weights].reshape(len(choices), -1)
        low = np.eye(len(self.levels))[choices.act_index(self.levels)].reshape(len(choices), -1)
        return np.concatenate([schemes, low], 1)

"""Bits, bytes, BOPs and latency of a configuration. This is the one size function; tests hold it equal to
what is packed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import networkx as nx
import numpy as np
from scipy.optimize import linear_sum_assignment

from aquabit.choices import Choices, by_rounding
from aquabit.graph import dense_macs
from aquabit.graph import layers as graph_layers
from aquabit.scheme import (
    CODE_SHIFT,
    FP,
    ROUNDINGS,
    Act,
    AquabitError,
    Budget,
    QuantConfig,
    Rounding,
    Scheme,
    StepGroups,
    act_bits,
    act_code,
    act_text,
    rounding_of,
)
from aquabit.space import SearchSpace

RANGE_BYTES = 8  # of a static range: two float32
FULL_BITS = 32  # BOPs count what is not quantized at 32 bits (PTQD, section 4.1)


@dataclass(frozen=True)
class Cost:
    """Exact cost of one configuration."""

    bits_per_weight: float  # of all Linear and Conv2d weights, codebooks, scales and offsets included
    bytes: int  # of the saved denoiser's tensors
    # multiply-adds x weight bits x activation bits, of one image in one denoiser call; dense weights at
    # FULL_BITS
    bops: float
    # of the table kernel, of one image in one denoiser call; decoded layers count as dense
    multiply_adds: float
    lut_adds: float  # table entries that the table kernel adds

    @property
    def operations(self) -> float:
        """Multiply-adds, an add counted as half of one."""
        return self.multiply_adds + self.lut_adds / 2


@dataclass(frozen=True)
class Latency:
    """Measured milliseconds of one denoiser call: ``layers`` [layers, schemes, activations] over
    ``space.schemes`` and ``activations`` (NaN where a layer may not take it), and ``rest``, what the call
    takes besides. A configuration takes their sum, averaged over the steps where its activation bits
    change."""

    layers: np.ndarray
    activations: tuple[Rounding, ...]
    rest: float

    def of(self, choices: Choices) -> np.ndarray:
        """Milliseconds [n, layers]; raises AquabitError for activation bits that were not measured."""
        parts, rows = choices.group_codes, np.arange(choices.weights.shape[1])
        column = np.full(1 << CODE_SHIFT, -1)
        column[[act_code(a) for a in self.activations]] = range(len(self.activations))
        if (column[parts] < 0).any():
            asked = {rounding_of(code) for code in np.ravel(parts).tolist()}
            raise AquabitError(
                f"latency is known for activations {_texts(self.activations)} only, not for all of"
                f" {_texts(asked)}"
            )
        return choices.space.over_steps(self.layers[rows[:, None], choices.weights[..., None], column[parts]])


def _texts(roundings: Iterable[Rounding]) -> str:
    return ", ".join(act_text(a) for a in ROUNDINGS if a in set(roundings))


def bop_bits(rounding: Rounding) -> int:
    """Activation bits as BOPs count them (FULL_BITS for 16)."""
    return FULL_BITS if rounding == 16 else act_bits(rounding)


def mean_act_bits(act: Act, steps: StepGroups | None) -> float:
    """The same, averaged over the steps."""
    if not isinstance(act, tuple):
        return float(bop_bits(act))
    assert steps is not None  # a configuration with groups names them
    return sum(s * bop_bits(part) for s, part in zip(steps.shares, act, strict=True))


def weight_bytes(shape: tuple[int, ...], scheme: Scheme) -> int:
    """Bytes of one stored weight [out, in] or [out, in, kh, kw], without codebooks that it shares with
    other layers."""
    codes, codebooks = scheme.stored_bytes(shape)
    return codes if scheme.shared else codes + codebooks


@dataclass(frozen=True)
class SharedTables:
    """The codebooks ``name``, which count once where any of ``layers`` (indices) takes the scheme in
    ``column``."""

    name: str
    layers: np.ndarray
    column: int
    bytes: int

    def used(self, weights: np.ndarray) -> np.ndarray:
        """Boolean [...] for scheme indices [..., layers of the model]."""
        return np.asarray((weights[..., self.layers] == self.column).any(-1))


class CostModel:
    """Cost tables of a space: bytes [layers, schemes] without shared codebooks, which are ``shared``; BOPs
    and, once it was measured (``timed``), latency per (layer, scheme, activation bits)."""

    latency: Latency | None = None

    def __init__(self, graph: nx.DiGraph, space: SearchSpace):
        nodes = graph_layers(graph)
        self.space, schemes = space, space.schemes
        shapes = self.shapes = [tuple(nodes[k]["shape"]) for k in space.choices]
        rows = list(zip(shapes, space.choices.values(), strict=True))
        # 0 where a layer could not even store what others may take
        sizes = [
            [0 if q not in row and q.refuses(s) else weight_bytes(s, q) for q in schemes] for s, row in rows
        ]
        self.bytes = np.array(sizes, dtype=np.int64)
        self.macs = np.array([float(nodes[k]["macs"]) for k in space.choices])
        areas = [prod(s[2:]) for s in shapes]
        self.weight_bits = np.array(
            [[FULL_BITS if q == FP else q.code_bits(a) for q in schemes] for a in areas]
        )
        self.operations = np.array([[q.operations(s) for q in schemes] for s in shapes])
        self.shared = self._shared()
        self.range_tensors = [
            1 + (nodes[k].get("split") is not None and len(s) > 2) + bool(nodes[k].get("attention"))
            for k, s in zip(space.choices, shapes, strict=True)
        ]
        self.weights = sum(prod(s) for s in shapes)
        self.other_bytes = int(graph.graph.get("other_bytes") or 2 * graph.graph["other_elements"])
        self.other_macs = dense_macs(graph)
        self.other_bops = float(self.other_macs * FULL_BITS**2)

    def _shared(self) -> list[SharedTables]:
        members: dict[tuple[str, int], list[int]] = {}
        schemes, column = self.space.schemes, self.space.columns
        for i, (layer, row) in enumerate(self.space.choices.items()):
            for scheme in row:
                if scheme.shared:
                    members.setdefault((self.space.codebook(layer), column[scheme]), []).append(i)
        return [
            SharedTables(n, np.array(m), c, schemes[c].stored_bytes(self.shapes[m[0]])[1])
            for (n, c), m in members.items()
        ]

    def act_bits(self, choices: Choices) -> np.ndarray:
        """Activation bits as BOPs count them, averaged over the steps, [n, layers]."""
        return self.space.over_steps(by_rounding(bop_bits)[choices.group_codes])

    def totals(self, choices: Choices) -> dict[str, np.ndarray]:
        """bits, bytes and bops, each [n]; latency_ms where it was measured."""
        weights, rows = choices.weights, np.arange(choices.weights.shape[1])
        weight_bytes = self.bytes[rows, weights].sum(1)
        for tables in self.shared:
            weight_bytes = weight_bytes + tables.bytes * tables.used(weights)
        bops = (self.macs * self.weight_bits[rows, weights] * self.act_bits(choices)).sum(1)
        found = {
            "bits": 8 * weight_bytes / self.weights,
            "bytes": weight_bytes + self.other_bytes,
            "bops": bops + self.other_bops,
        }
        if self.latency is not None:
            found["latency_ms"] = self.latency.of(choices).sum(1) + self.latency.rest
        return found

    def timed(self, latency: Latency) -> CostModel:
        """The same model with measured latency as a further cost."""
        shape = (len(self.shapes), len(self.space.schemes), len(latency.activations))
        if latency.layers.shape != shape:
            raise AquabitError(
                f"latency has shape {latency.layers.shape}; this space takes [layers, schemes, activations] ="
                f" {shape}"
            )
        other = copy.copy(self)
        other.latency = latency
        return other

    def __call__(self, config: QuantConfig) -> Cost:
        """Of any configuration of the model, also one with schemes outside the space."""
        self.space.check(config, extra_schemes=True, broken_ties=True)
        size, bops, multiply_adds, lut_adds, tables = 0, self.other_bops, float(self.other_macs), 0.0, {}
        for layer, shape, macs in zip(self.space.choices, self.shapes, self.macs, strict=True):
            choice = config[layer]
            size += weight_bytes(shape, choice.weight)
            own = choice.weight.table_operations(shape)
            multiply_adds, lut_adds = multiply_adds + float(macs) * own[0], lut_adds + float(macs) * own[1]
            if choice.weight.shared:
                tables[choice.codebook, choice.weight] = choice.weight.stored_bytes(shape)[1]
            weight_bits = FULL_BITS if choice.weight == FP else choice.weight.code_bits(prod(shape[2:]))
            bops += float(macs) * weight_bits * mean_act_bits(choice.act, config.steps)
        size += sum(tables.values())
        ranges = sum(
            RANGE_BYTES * n * config.range_parts(k)
            for k, n in zip(self.space.choices, self.range_tensors, strict=True)
        )
        return Cost(8 * size / self.weights, size + self.other_bytes + ranges, bops, multiply_adds, lut_adds)

    def totals_of(self, config: QuantConfig) -> dict[str, float]:
        """bits, bytes and bops of one configuration as plain numbers."""
        cost = self(config)
        return {"bits": cost.bits_per_weight, "bytes": cost.bytes, "bops": cost.bops}

    def limits(self, act: Rounding | None = None) -> dict[str, tuple[float, float]]:
        """Smallest and largest possible value of each cost, ``act`` fixing the activations of all
        layers."""
        groups = self.space.groups
        allowed = self.space.allowed()[groups.first]
        acts = [act] if act else list(self.space.activations)
        low, high = self._size_limits(allowed)
        excluded = allowed[:, 0] & (allowed.sum(1) == 1)
        ends = min(map(bop_bits, acts)), max(map(bop_bits, acts))
        per_act = [np.where(excluded, FULL_BITS, bits) for bits in ends]
        work = groups.sums(self.macs[:, None] * self.weight_bits)
        bops_low = (per_act[0] * np.where(allowed, work, np.inf).min(1)).sum()
        bops_high = (per_act[1] * np.where(allowed, work, 0).max(1)).sum()
        found = {
            "bits": (8 * low / self.weights, 8 * high / self.weights),
            "bytes": (int(low + self.other_bytes), int(high + self.other_bytes)),
            "bops": (float(bops_low) + self.other_bops, float(bops_high) + self.other_bops),
        }
        if self.latency is not None:
            found["latency_ms"] = self._latency_limits(self.latency, acts, allowed, excluded)
        return found

    def _latency_limits(
        self, latency: Latency, acts: list[Rounding], allowed: np.ndarray, excluded: np.ndarray
    ) -> tuple[float, float]:
        kept = np.array([a in acts for a in latency.activations])
        widths = np.where(excluded[:, None], np.array([a == 16 for a in latency.activations]), kept)
        cells, times = allowed[:, :, None] & widths[:, None, :], self.space.groups.sums(latency.layers)
        low, high = (np.where(cells, times, worst) for worst in (np.inf, -np.inf))
        return float(low.min((1, 2)).sum() + latency.rest), float(high.max((1, 2)).sum() + latency.rest)

    def _size_limits(self, allowed: np.ndarray) -> tuple[int, int]:
        """Smallest and largest bytes of all weights, for every combination of the codebooks that the same
        layers may use which are there or not; ``allowed`` [G, schemes] is of groups that choose together."""
        sizes, own, bundles = self.space.groups.sums(self.bytes), allowed.copy(), self._bundles()
        for tables in (t for bundle in bundles for t in bundle):
            own[tables.layers, tables.column] = False
        low, high = np.where(own, sizes, 1 << 60).min(1), np.where(own, sizes, -1).max(1)
        apart = np.ones(len(low), bool)
        least = most = 0
        for bundle in bundles:
            index = np.unique(np.concatenate([t.layers for t in bundle]))
            apart[index] = False
            picks = product((False, True), repeat=len(bundle))
            both = [_opened(sizes, low, high, index, [*zip(bundle, pick, strict=True)]) for pick in picks]
            ends = [b for b in both if b is not None]
            least, most = least + min(b[0] for b in ends), most + max(b[1] for b in ends)
        return int(low[apart].sum()) + least, int(high[apart].sum()) + most

    def _bundles(self) -> list[list[SharedTables]]:
        """Shared codebooks, their ``layers`` being groups that choose together: those of one scheme and the
        same groups as one, in lists that have no group in common."""
        merged: dict[tuple[int, bytes], SharedTables] = {}
        for t in self.shared:
            rows = np.unique(self.space.groups.index[t.layers])
            key = t.column, rows.tobytes()
            merged[key] = replace(t, layers=rows, bytes=t.bytes + (merged[key].bytes if key in merged else 0))
        bundles: list[list[SharedTables]] = []
        for t in merged.values():
            near = [any(np.isin(t.layers, o.layers).any() for o in bundle) for bundle in bundles]
            joined = [o for bundle, is_near in zip(bundles, near, strict=True) if is_near for o in bundle]
            bundles = [b for b, is_near in zip(bundles, near, strict=True) if not is_near] + [[*joined, t]]
        return bundles

    def check(self, budget: Budget, act: Rounding | None = None) -> None:
        """Raise AquabitError, naming both ends, where a budget is below the smallest or above the largest
        possible cost."""
        for name, value in budget.limits().items():
            reach = self.limits(act)
            if name not in reach:
                raise AquabitError(
                    f"a budget in {name} needs latencies that were measured on this machine: search with"
                    " --latency measures them"
                )
            low, high = reach[name]
            if value < low * (1 - 1e-12) or value > high * (1 + 1e-12):
                raise AquabitError(
                    f"budget {name} = {value:g} is out of range: this space can reach {low:.6g} to {high:.6g}"
                )

    def within(self, totals: dict[str, np.ndarray], budget: Budget) -> np.ndarray:
        """Boolean [n]: which configurations keep every limit."""
        keep: Any = True
        for name, value in budget.limits().items():
            keep = keep & (totals[name] <= value * (1 + 1e-12))
        return np.asarray(keep)


def _opened(
    sizes: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    index: np.ndarray,
    tables: Sequence[tuple[SharedTables, bool]],
) -> tuple[int, int] | None:
    """Smallest and largest bytes of the rows ``index`` where exactly those of ``tables`` are there that say
    so; None where they cannot be. ``sizes`` [G, schemes] are of what is stored besides, ``low`` and ``high``
    [G] of what a row may take without shared codebooks.

    The smallest may leave some of them unused: without those it is smaller still. The largest has a user for
    each, whoever loses least; where tied layers use several at once it has none that it must have, and may be
    more than can be reached.
    """
    low, high = low.copy(), high.copy()
    there = [(t, _users(t, tables)) for t, is_there in tables if is_there]
    for t, users in there:
        low[users] = np.minimum(low[users], sizes[users, t.column])
        high[users] = np.maximum(high[users], sizes[users, t.column])
    if (high[index] < 0).any() or any(not len(users) for _, users in there):
        return None
    extra, least_loss = sum(t.bytes for t, _ in there), 0
    used = [(t.column, row) for t, users in there for row in users]
    if there and len(set(used)) == len(used):
        if len(there) > len(index):
            return None
        lost = [(users, high - sizes[:, t.column]) for t, users in there]
        loss = np.array([np.where(np.isin(index, users), own[index], 1e18) for users, own in lost])
        least_loss = loss[linear_sum_assignment(loss)].sum()
    return int(low[index].sum()) + extra, int(high[index].sum() - least_loss) + extra


def _users(own: SharedTables, tables: Sequence[tuple[SharedTables, bool]]) -> np.ndarray:
    """The rows that may use codebooks: tied layers need all of their scheme's."""
    missing = [t.layers for t, is_there in tables if not is_there and t.column == own.column]
    return np.setdiff1d(own.layers, np.concatenate([*missing, np.array([], int)]))

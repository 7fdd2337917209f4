"""Lower bounds of what a surrogate predicts over many configurations at once: a linear program over its
trees and its ridge part."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix, vstack

from aquabit.choices import Choices
from aquabit.measuring.evaluator import SKETCH
from aquabit.scheme import AquabitError
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.estimators import Surrogate

TANGENTS = 6  # that stand for a logarithm from above
ULPS = 8 * 2.0**-24  # relative error of features in float32, with room
SKETCH_ERROR = 1e-6  # error of the sketches' sums in float32 relative to the sum of their lengths, with room


@dataclass(frozen=True)
class _Column:
    """A feature that is ``outer`` (rising) of a sum over layers of ``parts`` [L, C] of their choices;
    ``layers`` [k] are those that it depends on. ``concave`` from ``concave_from`` on."""

    layers: np.ndarray
    parts: np.ndarray
    outer: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[float], float]
    slope: Callable[[np.ndarray], np.ndarray] | None = None  # None: it is the sum itself
    concave_from: float = 0.0


def _columns(encoder: Encoder, each: Choices) -> list[_Column | None]:
    """What each feature is of the choices that ``each`` (C rows) gives the layers; None for a kind that is
    not such a sum.

    This is the table of kinds for features of several layers. A new kind has a row here, or nothing is known
    of it: the trees that split on it may give any of their leaves, and where the ridge has a weight for it
    there is no bound. Features of one layer need no row.
    """
    weights, floor = each.weights.T, encoder.FLOOR
    rows = np.arange(len(weights))[:, None]
    low, order = (part.T for part in encoder.activation_reduction(each.group_bits))
    tables = {
        "error": encoder.error[rows, weights],
        "low": low,
        "order": order,
        "bits": encoder.bits[rows, weights] * encoder.size_share[:, None],
    }
    if encoder.probed:
        tables["damage"] = encoder.damages(each).T
        tables["root"] = np.sqrt(tables["damage"])

    def log(table: str, layers: np.ndarray, mean: bool = False, add: float = 0.0) -> _Column:
        parts = tables[table] / (len(layers) if mean else 1)
        return _Column(
            layers,
            parts,
            lambda s: np.log10(s + add),
            lambda f: float(10.0**f - add),
            lambda s: 1 / (np.log(10) * (s + add)),
        )

    def plain(table: str, layers: np.ndarray, mean: bool = False) -> _Column:
        return _Column(layers, tables[table] / (len(layers) if mean else 1), np.asarray, float)

    def roots(layers: np.ndarray) -> _Column:
        return _Column(
            layers,
            tables["root"],
            lambda s: np.log10(s**2 + floor),
            lambda f: float(np.sqrt(max(10.0**f - floor, 0.0))),
            lambda s: 2 * s / (np.log(10) * (s**2 + floor)),
            concave_from=floor**0.5,
        )

    kinds: dict[str, Callable[[np.ndarray], _Column]] = {
        "error": lambda k: log("error", k, mean=True),
        "actshare": lambda k: plain("low", k, mean=True),
        "bits": lambda k: plain("bits", k),
        "ordershare": lambda k: plain("order", k, mean=True),
        "damage": lambda k: log("damage", k, add=floor),
    }
    found: list[_Column | None] = []
    for name, members in zip(encoder.columns, encoder.members, strict=True):
        make = roots if name == "damage:roots" else kinds.get(name.split(":")[0])
        found.append(None if make is None or len(members) == 1 else make(np.array(members)))
    return found


def _own_values(encoder: Encoder, each: Choices) -> tuple[np.ndarray, np.ndarray]:
    """The layer [F] that alone decides each feature, -1 where there is none, and the values [F, C] at its
    choices: as encoded."""
    values, (count, layers) = encoder(each), each.weights.shape
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(count), (layers, 1)), axis=1)
    rows = np.arange(layers)[:, None]
    mixed = encoder(Choices(each.space, each.weights.T[rows, shuffled].T, each.acts.T[rows, shuffled].T))
    layer = np.full(len(encoder.columns), -1)
    for f, members in enumerate(encoder.members):
        if len(members) == 1 and np.array_equal(values[shuffled[members[0]], f], mixed[:, f], equal_nan=True):
            layer[f] = members[0]
    return layer, values.T


@dataclass(frozen=True)
class _Trees:
    """Leaves of all trees: ``tree`` [N], ``value`` [N] (divided by the number of averaged boosters); and the
    splits: ``feature``, ``threshold`` [S], with the pairs (split, leaf) of the leaves to the ``left``
    (feature < threshold) and to the ``right``.
    """

    tree: np.ndarray
    value: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @staticmethod
    def of(boosters: list[Any]) -> _Trees:
        tree, value, feature, threshold = list[int](), list[float](), list[int](), list[float]()
        left, right = list[tuple[int, int]](), list[tuple[int, int]]()

        def walk(body: dict[str, Any], node: int, number: int, share: float) -> list[int]:
            if body["left_children"][node] < 0:
                tree.append(number)
                value.append(share * float(body["split_conditions"][node]))
                return [len(tree) - 1]
            split = len(feature)
            feature.append(int(body["split_indices"][node]))
            threshold.append(float(np.float32(body["split_conditions"][node])))
            below = [
                walk(body, body[side][node], number, share) for side in ("left_children", "right_children")
            ]
            left.extend((split, leaf) for leaf in below[0])
            right.extend((split, leaf) for leaf in below[1])
            return [*below[0], *below[1]]

        number = 0
        for booster in boosters:
            for body in json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]["trees"]:
                walk(body, 0, number, 1 / len(boosters))
                number += 1
        pairs = (np.array(p, int).reshape(-1, 2) for p in (left, right))
        return _Trees(
            np.array(tree, int), np.array(value), np.array(feature, int), np.array(threshold), *pairs
        )


class EnsembleBound:
    """``bound(allowed, costs, caps)``: a number that no prediction of ``surrogate`` is below, over all
    choices of one column a layer among the ``allowed`` [L, C] that keep the limits (their summed ``costs``
    [R, L, C] at most ``caps`` [R]), and the fractional choice [L, C] that it was found at; (inf, None) where
    none keeps them.

    Row c of ``each`` gives every layer column c; ``allowed`` says which there are at all. It is the optimum
    of a linear program: shares of columns, and of the leaves of each tree, of which those on one side of a
    split weigh no more than what goes there (Mišić,
    "Optimization of tree ensembles", 2020); a split on an aggregate, as on the error of an operator type, is
    tied to its sum by the largest and the smallest it can be; the ridge part is exact for columns of one
    layer, and for the logarithm of a sum its chord, or its tangents. Exact where one column a layer is left,
    every kind of feature is known, and no sum lies on a threshold. Raises AquabitError for an estimator that
    is not the boosted one.
    """

    def __init__(self, surrogate: Surrogate, encoder: Encoder, each: Choices, allowed: np.ndarray):
        if not hasattr(surrogate, "boosters_"):
            raise AquabitError(f"bounds are known for boosted trees only, not for {type(surrogate).__name__}")
        self.surrogate, self.encoder, self.shape = surrogate, encoder, allowed.shape
        none = np.zeros_like(each.weights)
        blank = Choices.picked(each.space, none, none, encoder.levels[:1])
        acts = np.where(allowed.T, each.acts, blank.acts)
        each = Choices(each.space, np.where(allowed.T, each.weights, none), acts)
        self.each, self.root = each, allowed
        self.columns = _columns(encoder, each)
        self.trees = _Trees.of(surrogate.boosters_)
        linear = surrogate.linear_
        self.ridge = np.zeros(len(self.columns)) if linear is None else surrogate.linear * linear.weights
        self.constant = (
            0.0
            if linear is None
            else surrogate.linear * (linear.intercept - float(linear.weights @ linear.mean))
        )
        self.layer, self.value = _own_values(encoder, each)
        self.own = self.layer >= 0
        self.table = np.zeros(self.shape)  # the ridge's columns of one layer
        for f in np.flatnonzero(self.own):
            self.table[self.layer[f]] += self.ridge[f] * self.value[f].astype(float)
        self.table = np.where(allowed, self.table, 0.0)
        self._floors: tuple[bytes, dict[int, float]] = (b"", {})  # of the limits that they were made for
        self._assemble()

    def _assemble(self) -> None:
        """Variables: x (allowed cells), p (leaves), z (splits on aggregates), s (sums), r (logarithms from
        above); the rows that no domain changes."""
        layer, column = self.cells = tuple(np.argwhere(self.root).T)
        used = {int(f) for f in (*self.trees.feature, *np.flatnonzero(self.ridge)) if not self.own[f]}
        self.sums = sorted(f for f in used if self.columns[f] is not None)
        self.above = [f for f in self.sums if self._column(f).slope is not None and self.ridge[f] < 0]
        shared = [s for s, f in enumerate(self.trees.feature) if not self.own[f]]
        keys = sorted({(int(self.trees.feature[s]), float(self.trees.threshold[s])) for s in shared})
        self.keys, place = keys, {key: i for i, key in enumerate(keys)}
        sizes = [len(layer), len(self.trees.tree), len(keys), len(self.sums), len(self.above)]
        self.x, self.p, self.z, self.s, self.r = np.cumsum([0, *sizes])[:5].tolist()
        self.count = sum(sizes)
        parts = []
        for pairs, side in ((self.trees.left, 1.0), (self.trees.right, -1.0)):
            rows, cols, values = [pairs[:, 0]], [self.p + pairs[:, 1]], [np.ones(len(pairs))]
            high = np.zeros(len(self.trees.feature))
            for s, (f, threshold) in enumerate(zip(self.trees.feature, self.trees.threshold, strict=True)):
                if not self.own[f]:  # leaves to the left weigh at most z, to the right at most 1 - z
                    cols.append(np.array([self.z + place[int(f), float(threshold)]]))
                    rows.append(np.array([s]))
                    values.append(np.array([-side]))
                    high[s] = 0.0 if side > 0 else 1.0
                    continue
                goes = (self.value[f] < np.float32(threshold)) == (side > 0)
                hit = np.flatnonzero((layer == self.layer[f]) & goes[column])
                cols.append(self.x + hit)
                rows.append(np.full(len(hit), s))
                values.append(-np.ones(len(hit)))
            shape = (len(self.trees.feature), self.count)
            parts.append(
                (
                    coo_matrix(
                        (np.concatenate(values), (np.concatenate(rows), np.concatenate(cols))), shape
                    ).tocsr(),
                    high,
                )
            )
        order = [
            (i, i + 1) for i in range(len(keys) - 1) if keys[i][0] == keys[i + 1][0]
        ]  # below a threshold is below a larger one
        rows_ = np.repeat(np.arange(len(order)), 2)
        cols_ = self.z + np.array(order, int).reshape(-1)
        rising = coo_matrix(
            (np.tile([1.0, -1.0], len(order)), (rows_, cols_)), (len(order), self.count)
        ).tocsr()
        self.below = vstack([parts[0][0], parts[1][0], rising]).tocsr()
        self.below_high = np.concatenate([parts[0][1], parts[1][1], np.zeros(len(order))])
        picks = coo_matrix(
            (np.ones(len(layer)), (layer, self.x + np.arange(len(layer)))), (self.shape[0], self.count)
        )
        count = int(self.trees.tree.max(initial=-1)) + 1
        leaves = coo_matrix(
            (np.ones(len(self.trees.tree)), (self.trees.tree, self.p + np.arange(len(self.trees.tree)))),
            (count, self.count),
        )
        equal, self.unit = [picks, leaves], np.ones(len(self.sums))
        for i, f in enumerate(self.sums):
            part = self._parts(f)[layer, column]
            self.unit[i] = max(float(np.abs(part).max()), 1e-30)  # sums in units of their largest part
            at = np.flatnonzero(part)
            values_, cols__ = np.append(part[at] / self.unit[i], -1.0), np.append(self.x + at, self.s + i)
            equal.append(coo_matrix((values_, (np.zeros(len(cols__), int), cols__)), (1, self.count)))
        self.equal = vstack(equal).tocsr()
        self.equal_to = np.concatenate([np.ones(self.shape[0] + count), np.zeros(len(self.sums))])

    def _column(self, f: int) -> _Column:
        column = self.columns[f]
        assert column is not None
        return column

    def _parts(self, f: int) -> np.ndarray:
        """Parts [L, C] of a sum, zero in layers that it does not depend on."""
        column, out = self._column(f), np.zeros(self.shape)
        out[column.layers] = np.where(self.root[column.layers], column.parts[column.layers], 0.0)
        return out

    def interval(self, f: int, allowed: np.ndarray) -> tuple[float, float]:
        """Smallest and largest value of the sum behind a known feature."""
        parts = self._column(f).parts[self._column(f).layers]
        inside = allowed[self._column(f).layers]
        return float(np.where(inside, parts, np.inf).min(1).sum()), float(
            np.where(inside, parts, -np.inf).max(1).sum()
        )

    def _least(self, costs: np.ndarray, caps: np.ndarray) -> dict[int, float]:
        """A lower bound of each sum within the limits: a budget leaves no room for small errors
        everywhere. Kept for the next call."""
        key = costs.tobytes() + caps.tobytes()
        if self._floors[0] != key:
            layer, column = self.cells
            limits, room = self._limits(self.root, costs, caps)
            picks, found = self.equal[: self.shape[0], self.x : self.p], dict[int, float]()
            for f in self.sums:
                part = self._parts(f)[layer, column]
                unit = max(float(np.abs(part).max()), 1e-30)
                least = linprog(
                    part / unit, limits[:, : self.p], room, picks, np.ones(self.shape[0]), method="highs"
                )  # x from 0 on
                found[f] = (
                    (least.fun - 1e-7 * max(abs(least.fun), 1.0)) * unit if least.x is not None else -np.inf
                )
            self._floors = (key, found)
        return self._floors[1]

    def _unknown(self, allowed: np.ndarray) -> dict[int, tuple[float, float]]:
        """Intervals of the features that are no sums: those of sketches by the triangle inequality, any
        other from -inf to inf."""
        found = {f: (-np.inf, np.inf) for f, c in enumerate(self.columns) if c is None and not self.own[f]}
        names = {"shift:all": slice(0, SKETCH * 3 // 4), "shift:common": slice(SKETCH * 3 // 4, SKETCH)}
        for f in found:
            part = names.get(self.encoder.columns[f])
            if part is None:
                continue
            sketch = self.encoder.sketches(self.each, part).swapaxes(0, 1).astype(float)
            middle = (sketch * allowed[..., None]).sum(1) / allowed.sum(1)[:, None]
            reach = np.where(allowed, np.linalg.norm(sketch - middle[:, None], axis=2), 0.0).max(1).sum()
            length = float(np.linalg.norm(middle.sum(0)))
            room = SKETCH_ERROR * float(np.where(allowed, np.linalg.norm(sketch, axis=2), 0.0).max(1).sum())
            low, high = max(length - reach - room, 0.0) ** 2, (length + reach + room) ** 2
            found[f] = (float(np.log10(low + self.encoder.FLOOR)), float(np.log10(high + self.encoder.FLOOR)))
        return found

    def __call__(
        self, allowed: np.ndarray, costs: np.ndarray, caps: np.ndarray
    ) -> tuple[float, np.ndarray | None]:
        layer, column = self.cells
        objective, constant = np.zeros(self.count), self.constant
        objective[self.x : self.p], objective[self.p : self.z] = self.table[layer, column], self.trees.value
        low, high = np.zeros(self.count), np.ones(self.count)
        high[self.x : self.p] = allowed[layer, column]
        floors, intervals = self._least(costs, caps), {f: self.interval(f, allowed) for f in self.sums}
        if any(b < floors[f] for f, (_, b) in intervals.items()):
            return np.inf, None  # the sum cannot be that small within the limits
        ends = {f: (max(a, floors[f]), b) for f, (a, b) in intervals.items()}
        unknown = self._unknown(allowed)
        rows: list[tuple[list[int], list[float], float]] = []  # columns, values, at most
        for i, f in enumerate(self.sums):
            a, b = (end / self.unit[i] for end in ends[f])
            low[self.s + i], high[self.s + i] = a - 1e-9 * abs(a), b + 1e-9 * abs(b)
            constant += self._ridge(f, i, ends[f], objective, rows, low, high)
        for f, (a, b) in unknown.items():
            if self.ridge[f]:
                constant += min(self.ridge[f] * a, self.ridge[f] * b)
        for k, (f, threshold) in enumerate(self.keys):
            self._link(k, f, threshold, ends.get(f), unknown.get(f), rows, low, high)
        limits, room = self._limits(allowed, costs, caps)
        if constant == -np.inf or (room < 0).any():
            return (np.inf if (room < 0).any() else -np.inf), None
        at = np.repeat(np.arange(len(rows)), [len(r[0]) for r in rows])
        flat = [np.concatenate([np.asarray(r[k]) for r in rows]) if rows else np.zeros(0) for k in (0, 1)]
        more = coo_matrix((flat[1], (at, flat[0].astype(int))), (len(rows), self.count)).tocsr()
        above = np.concatenate([self.below_high, [r[2] for r in rows], room])
        found = linprog(
            objective,
            A_ub=vstack([self.below, more, limits]).tocsr(),
            b_ub=above,
            A_eq=self.equal,
            b_eq=self.equal_to,
            bounds=np.stack([low, high], 1),
            method="highs",
        )
        if found.status == 2:
            return np.inf, None
        if found.x is None:
            return -np.inf, None  # the solver gave up: nothing is known
        share = np.zeros(self.shape)
        share[layer, column] = found.x[self.x : self.p]
        total = (found.fun + constant) * self.surrogate.spread_ + self.surrogate.center_
        return (
            float(total - 1e-5 * self.surrogate.spread_),
            share,
        )  # float32 sums of leaves, the solver's tolerance

    def _ridge(
        self,
        f: int,
        i: int,
        ends: tuple[float, float],
        objective: np.ndarray,
        rows: list[tuple[list[int], list[float], float]],
        low: np.ndarray,
        high: np.ndarray,
    ) -> float:
        """Put the ridge's share of sum ``f`` into the program; gives what is constant of it."""
        weight, column, unit = float(self.ridge[f]), self._column(f), self.unit[i]
        (a, b), wide = ends, ends[1] - ends[0] > 1e-9 * max(abs(ends[0]), abs(ends[1]))
        if not weight:
            return 0.0
        if column.slope is None:
            objective[self.s + i] += weight * unit
            return -abs(weight) * ULPS * max(abs(a), abs(b))
        values = [float(v) for v in column.outer(np.array(ends))]
        room = ULPS * max(map(abs, values))  # of float32
        if weight > 0:
            if not wide or a < column.concave_from:
                return weight * (values[0] - room)
            steep = (values[1] - values[0]) / (b - a)
            objective[self.s + i] += weight * steep * unit
            return weight * (values[0] - steep * a - room)
        r = self.r + self.above.index(f)
        objective[r], low[r], high[r] = weight, -np.inf, values[1] + room
        if wide and a >= column.concave_from and a > 0:
            for t in np.geomspace(a, b, TANGENTS):
                slope, at = float(column.slope(np.array(t))), float(column.outer(np.array(t)))
                rows.append(([r, self.s + i], [1.0, -slope * unit], at - slope * float(t) + room))
        return 0.0

    def _link(
        self,
        k: int,
        f: int,
        threshold: float,
        ends: tuple[float, float] | None,
        around: tuple[float, float] | None,
        rows: list[tuple[list[int], list[float], float]],
        low: np.ndarray,
        high: np.ndarray,
    ) -> None:
        """Split ``k``: z = 1 where feature ``f`` is below ``threshold``; fixed where the domain decides,
        else tied to the sum."""
        z, room = self.z + k, ULPS * abs(threshold) + 1e-12
        if ends is None:
            assert around is not None
            if around[0] >= threshold + room:
                high[z] = 0.0
            elif around[1] < threshold - room:
                low[z] = 1.0
            return
        column, i = self._column(f), self.sums.index(f)
        a, b = ends
        with np.errstate(divide="ignore"):
            first, last = float(column.outer(np.array(a))), float(column.outer(np.array(b)))
        if first >= threshold + room:
            high[z] = 0.0
        elif last < threshold - room:
            low[z] = 1.0
        else:
            most, least = column.inverse(threshold + room), column.inverse(threshold - room)
            unit, s = self.unit[i], self.s + i
            if b > most:  # z = 1: the sum is at most `most`
                rows.append(([s, z], [1.0, (b - most) / unit], b / unit + 1e-9))
            if a < least:  # z = 0: it is at least `least`
                rows.append(([s, z], [-1.0, -(least - a) / unit], -least / unit + 1e-9))

    def _limits(
        self, allowed: np.ndarray, costs: np.ndarray, caps: np.ndarray
    ) -> tuple[csr_matrix, np.ndarray]:
        """Rows of the limits, each as the excess over the layers' cheapest columns relative to what is
        left."""
        layer, column = self.cells
        least = np.where(allowed, costs, np.inf).min(2)
        room = caps - least.sum(1) + 1e-9 * np.abs(caps)
        excess = (costs - least[:, :, None])[:, layer, column]
        excess = np.where(allowed[layer, column], excess, 0.0)
        unit = np.maximum(np.maximum(room, excess.max(1)), 1e-300)
        wide = np.zeros((len(caps), self.count))
        wide[:, self.x : self.p] = excess / unit[:, None]
        return csr_matrix(wide), room / unit

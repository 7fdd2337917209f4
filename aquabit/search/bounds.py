"""Lower bounds of what a surrogate predicts over many configurations at once: a linear program over its
trees and its ridge part."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix, vstack

from aquabit.choices import Choices
from aquabit.measuring.evaluator import SKETCH
from aquabit.scheme import AquabitError
from aquabit.search.ensemble_parts import FeatureSum, Leaves, feature_sums, own_values
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.estimators import Surrogate
from aquabit.tied_groups import Groups

TANGENTS = 6  # that stand for a logarithm from above
ULPS = 8 * 2.0**-24  # relative error of features in float32, with room
SKETCH_ERROR = 1e-6  # error of the sketches' sums in float32 relative to the sum of their lengths, with room


class EnsembleBound:
    """``bound(allowed, costs, caps)``: a number that no prediction of ``surrogate`` is below, over all
    choices of one column a layer among the ``allowed`` [L, C] that keep the limits (their summed ``costs``
    [R, L, C] at most ``caps`` [R]), and the fractional choice [L, C] that it was found at; (inf, None) where
    none keeps them.

    Row c of ``each`` gives every layer column c; ``allowed`` says which there are at all. Where ``groups``
    tie layers, rows of ``allowed`` and ``costs`` are theirs. It is the optimum
    of a linear program: shares of columns, and of the leaves of each tree, of which those on one side of a
    split weigh no more than what goes there (Mišić,
    "Optimization of tree ensembles", 2020); a split on an aggregate, as on the error of an operator type, is
    tied to its sum by the largest and the smallest it can be; the ridge part is exact for columns of one
    layer, and for the logarithm of a sum its chord, or its tangents. Exact where one column a layer is left,
    every kind of feature is known, and no sum lies on a threshold. Raises AquabitError for an estimator that
    is not the boosted one.
    """

    def __init__(
        self,
        surrogate: Surrogate,
        encoder: Encoder,
        each: Choices,
        allowed: np.ndarray,
        groups: Groups | None = None,
    ):
        if not hasattr(surrogate, "boosters_"):
            raise AquabitError(f"bounds are known for boosted trees only, not for {type(surrogate).__name__}")
        self.surrogate, self.encoder, self.shape = surrogate, encoder, allowed.shape
        none = np.zeros_like(each.weights)
        self.groups = groups or each.space.groups
        blank, own = Choices.picked(each.space, none, none, encoder.levels[:1]), allowed[self.groups.index].T
        acts = np.where(own, each.acts, blank.acts)
        each = Choices(each.space, np.where(own, each.weights, none), acts)
        self.each, self.root = each, allowed
        self.columns = feature_sums(encoder, each)
        self.trees = Leaves.of(surrogate.boosters_)
        linear, share = surrogate.linear_, surrogate.share_
        self.ridge, self.constant = np.zeros(len(self.columns)), 0.0
        if linear is not None:
            self.ridge[linear.columns] = share * linear.weights
            self.constant = share * (linear.intercept - float(linear.weights @ linear.mean))
        layer, self.value = own_values(encoder, each)
        self.own = layer >= 0
        self.layer = np.where(self.own, self.groups.index[layer], -1)
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
        trees = self.trees
        used = {int(f) for f in (*trees.feature, *np.flatnonzero(self.ridge)) if not self.own[f]}
        self.sums = sorted(f for f in used if self.columns[f] is not None)
        self.above = [f for f in self.sums if self._column(f).slope is not None and self.ridge[f] < 0]
        splits = zip(trees.feature, trees.threshold, strict=True)
        self.keys = sorted({(int(f), float(threshold)) for f, threshold in splits if not self.own[f]})
        sizes = [len(layer), len(trees.tree), len(self.keys), len(self.sums), len(self.above)]
        self.x, self.p, self.z, self.s, self.r = np.cumsum([0, *sizes])[:5].tolist()
        self.count = sum(sizes)
        sides = [self._leaf_rows(trees.left, left=True), self._leaf_rows(trees.right, left=False)]
        rising = self._rising_rows()
        self.below = vstack([*(rows for rows, _ in sides), rising]).tocsr()
        self.below_high = np.concatenate([*(high for _, high in sides), np.zeros(rising.shape[0])])
        picks = self._rows(np.ones(len(layer)), layer, self.x + np.arange(len(layer)), self.shape[0])
        number = int(trees.tree.max(initial=-1)) + 1
        leaves = self._rows(np.ones(len(trees.tree)), trees.tree, self.p + np.arange(len(trees.tree)), number)
        equal, self.unit = [picks, leaves], np.ones(len(self.sums))
        for i, f in enumerate(self.sums):
            part = self._parts(f)[layer, column]
            self.unit[i] = max(float(np.abs(part).max()), 1e-30)  # sums in units of their largest part
            at = np.flatnonzero(part)
            values, columns = np.append(part[at] / self.unit[i], -1.0), np.append(self.x + at, self.s + i)
            equal.append(self._rows(values, np.zeros(len(columns), int), columns, 1))
        self.equal = vstack(equal).tocsr()
        self.equal_to = np.concatenate([np.ones(self.shape[0] + number), np.zeros(len(self.sums))])

    def _rows(self, values: np.ndarray, rows: np.ndarray, columns: np.ndarray, count: int) -> Any:
        """A sparse matrix of ``count`` rows over all variables."""
        return coo_matrix((values, (rows, columns)), (count, self.count)).tocsr()

    def _leaf_rows(self, pairs: np.ndarray, left: bool) -> tuple[Any, np.ndarray]:
        """Leaves on one side of a split weigh no more than what goes there: the columns of its layer, or, of
        a split on an aggregate, z to the left and 1 - z to the right. ``pairs`` are (split, leaf)."""
        layer, column = self.cells
        trees, place = self.trees, {key: i for i, key in enumerate(self.keys)}
        rows, cols, values = [pairs[:, 0]], [self.p + pairs[:, 1]], [np.ones(len(pairs))]
        high = np.zeros(len(trees.feature))
        for s, (f, threshold) in enumerate(zip(trees.feature, trees.threshold, strict=True)):
            if self.own[f]:
                goes = (self.value[f] < np.float32(threshold)) == left
                hit = np.flatnonzero((layer == self.layer[f]) & goes[column])
                cols.append(self.x + hit)
                values.append(-np.ones(len(hit)))
            else:
                cols.append(np.array([self.z + place[int(f), float(threshold)]]))
                values.append(np.array([-1.0 if left else 1.0]))
                high[s] = 0.0 if left else 1.0
            rows.append(np.full(len(cols[-1]), s))
        weights, at, variables = (np.concatenate(part) for part in (values, rows, cols))
        return self._rows(weights, at, variables, len(trees.feature)), high

    def _rising_rows(self) -> Any:
        """What is below a threshold is below a larger one."""
        keys = self.keys
        order = [(i, i + 1) for i in range(len(keys) - 1) if keys[i][0] == keys[i + 1][0]]
        rows, columns = np.repeat(np.arange(len(order)), 2), self.z + np.array(order, int).reshape(-1)
        return self._rows(np.tile([1.0, -1.0], len(order)), rows, columns, len(order))

    def _column(self, f: int) -> FeatureSum:
        column = self.columns[f]
        assert column is not None
        return column

    def _parts(self, f: int) -> np.ndarray:
        """Parts [L, C] of a sum, those of tied layers added up; zero in layers that it does not depend on."""
        column = self._column(f)
        out = np.zeros((len(self.groups.index), self.shape[1]))
        out[column.layers] = column.parts[column.layers]
        return np.where(self.root, self.groups.sums(out), 0.0)

    def interval(self, f: int, allowed: np.ndarray) -> tuple[float, float]:
        """Smallest and largest value of the sum behind a known feature."""
        rows = np.unique(self.groups.index[self._column(f).layers])
        parts, inside = self._parts(f)[rows], allowed[rows]
        low, high = np.where(inside, parts, np.inf).min(1), np.where(inside, parts, -np.inf).max(1)
        return float(low.sum()), float(high.sum())

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
                ones = np.ones(self.shape[0])  # x from 0 on
                least = linprog(part / unit, limits[:, : self.p], room, picks, ones, method="highs")
                known = least.x is not None
                found[f] = (least.fun - 1e-7 * max(abs(least.fun), 1.0)) * unit if known else -np.inf
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
            sketch = self.groups.sums(self.encoder.sketches(self.each, part).swapaxes(0, 1).astype(float))
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
        # float32 sums of leaves, the solver's tolerance
        return float(total - 1e-5 * self.surrogate.spread_), share

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

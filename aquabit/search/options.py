"""Options: what each layer may take under a budget, as columns of one matrix, with the exact cost of every
cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.scheme import FP, Act, Budget, Rounding
from aquabit.space import SearchSpace
from aquabit.tied_groups import Groups

Predict = Callable[[Choices], np.ndarray]  # n rows -> [n], larger = worse


def activation_choices(space: SearchSpace, budget: Budget | None = None) -> tuple[Act, ...]:
    """Activation choices open to a search: all of the space's, those that change between groups of steps
    included, where BOPs or latency are limited, which depend on them, else a8 alone (or the closest to full
    precision that the space has)."""
    if budget is not None and (budget.bops is not None or budget.latency_ms is not None):
        return space.act_choices
    return (8,) if 8 in space.activations else (space.closest_act,)


def fixed_act(activations: tuple[Act, ...]) -> Rounding | None:
    """The activations of all layers where there is no choice, else None."""
    first = activations[0]
    return None if len(activations) > 1 or isinstance(first, tuple) else first


@dataclass(frozen=True)
class Columns:
    """Column c = s * len(activations) + a stands for scheme s (index into ``space.schemes``) with the
    activation choice ``activations[a]``.

    ``allowed`` is [L, C]; row c of ``each`` gives every layer column c. An excluded layer has one allowed
    column, whose activation bits are 16. Where the space ties layers, L counts ``groups``: tied layers are
    one row, here and in everything that is indexed by columns.
    """

    activations: tuple[Act, ...]
    allowed: np.ndarray
    each: Choices
    groups: Groups

    @staticmethod
    def of(space: SearchSpace, activations: tuple[Act, ...]) -> Columns:
        count, layers = len(activations), len(space.choices)
        allowed = np.repeat(space.allowed(), count, axis=1)
        column = np.repeat(np.arange(allowed.shape[1])[:, None], layers, 1)
        index = column % count
        for i, row in enumerate(space.choices.values()):
            if row == (FP,):
                allowed[i, 1:] = False  # schemes start with fp
                index[0, i] = count
        each = Choices.picked(space, column // count, index, (*activations, 16))
        return Columns(activations, allowed[space.groups.first], each, space.groups)

    @property
    def free(self) -> np.ndarray:
        """Layers [F] that have more than one column to choose from."""
        return np.flatnonzero(self.allowed.sum(1) > 1)

    def settle(self, choices: Choices) -> Choices:
        """Rows with their activations as they are where there is a choice, else the fixed ones."""
        if len(self.activations) > 1:
            return choices
        return replace(choices, acts=np.broadcast_to(self.each.acts[0], choices.acts.shape))

    def split(self, choice: np.ndarray) -> Choices:
        """Columns [n, L], or those of one configuration [L], to rows."""
        choice = np.atleast_2d(choice)[:, self.groups.index]
        acts = self.each.acts[choice, np.arange(choice.shape[1])]
        return Choices(self.each.space, choice // len(self.activations), acts)

    def join(self, choices: Choices) -> np.ndarray:
        """The inverse of ``split``, [n, L]; -1 where a layer may not take what it has, and where tied layers
        differ."""
        found, index = np.full(choices.weights.shape, -1), self.groups.index
        rows = np.arange(len(index))
        for a in range(len(self.activations)):
            column = choices.weights * len(self.activations) + a
            match = self.allowed[index, column] & (self.each.acts[column, rows] == choices.acts)
            found = np.where(match & (found < 0), column, found)
        joined = found[:, self.groups.first]
        torn, member = np.nonzero(found != joined[:, index])
        joined[torn, index[member]] = -1
        return joined


@dataclass(frozen=True)
class Opening:
    """What costs [R] once where any of ``layers`` [k] takes one of ``columns`` (boolean [C]): codebooks
    that layers share."""

    layers: np.ndarray
    columns: np.ndarray
    costs: np.ndarray

    def users(self, choice: np.ndarray) -> np.ndarray:
        """Boolean [..., k] for columns [..., L]."""
        return np.asarray(self.columns[choice[..., self.layers]])


@dataclass(frozen=True)
class Options:
    """Columns with their exact costs [R, L, C] and the R upper limits ``caps`` [R]: bytes of all weights,
    BOPs and latency where limited.

    ``openings`` cost on top of ``costs``, once each.
    """

    columns: Columns
    names: tuple[str, ...]  # of the R limits
    costs: np.ndarray
    caps: np.ndarray
    openings: tuple[Opening, ...] = ()

    @staticmethod
    def of(cost_model: CostModel, budget: Budget) -> Options:
        """Raises AquabitError, naming both ends, where one limit alone cannot be kept or exceeds what the
        space can reach."""
        space = cost_model.space
        activations = activation_choices(space, budget)
        cost_model.check(budget, fixed_act(activations))
        columns = Columns.of(space, activations)
        every, groups = columns.each.weights[:, 0], columns.groups
        names, costs, caps = [], [], []
        if budget.bits is not None or budget.bytes is not None:
            by_bits = by_bytes = np.inf
            if budget.bits is not None:
                by_bits = floor(budget.bits * cost_model.weights / 8 * (1 + 1e-12))
            if budget.bytes is not None:
                by_bytes = floor(budget.bytes * (1 + 1e-12)) - cost_model.other_bytes
            names.append("bits" if by_bits <= by_bytes else "bytes")
            # whole numbers below 2^53: sums are exact
            costs.append(groups.sums(cost_model.bytes[:, every].astype(float)))
            caps.append(float(min(by_bits, by_bytes)))
        if budget.bops is not None:
            names.append("bops")
            acts = cost_model.act_bits(columns.each).T
            costs.append(groups.sums(cost_model.macs[:, None] * cost_model.weight_bits[:, every] * acts))
            # inside the tolerance of CostModel.within
            caps.append(budget.bops * (1 + 5e-13) - cost_model.other_bops)
        if budget.latency_ms is not None:
            assert cost_model.latency is not None  # checked above
            names.append("latency_ms")
            per_column = cost_model.latency.of(columns.each).T
            # what a layer may not take was not measured
            costs.append(np.where(columns.allowed, groups.sums(per_column), 0.0))
            caps.append(budget.latency_ms * (1 + 5e-13) - cost_model.latency.rest)
        sized = np.array([name in ("bits", "bytes") for name in names], float)
        tables = cost_model.shared if sized.any() else []
        users = [np.unique(groups.index[t.layers]) for t in tables]
        openings = tuple(
            Opening(rows, every == t.column, sized * t.bytes) for t, rows in zip(tables, users, strict=True)
        )
        return Options(columns, tuple(names), np.stack(costs), np.array(caps), openings)

    def used(self, choice: np.ndarray) -> np.ndarray:
        """Costs [R, ...] of columns [..., L]."""
        total = self.costs[:, np.arange(choice.shape[-1]), choice].sum(-1)
        for opening in self.openings:
            total = total + np.multiply.outer(opening.costs, opening.users(choice).any(-1))
        return np.asarray(total)

    def changes(self, choice: np.ndarray) -> np.ndarray:
        """What each single change of ``choice`` [L] adds to the costs, exactly: [R, L, C]."""
        change = self.costs - self.costs[:, np.arange(len(choice)), choice][:, :, None]
        for opening in self.openings:
            users = opening.users(choice)
            others = (users.sum() - users)[:, None] > 0
            after = (opening.columns[None] | others).astype(float)
            change[:, opening.layers] += opening.costs[:, None, None] * (after - float(users.any()))
        return np.asarray(change)

    def keeps(self, choice: np.ndarray) -> np.ndarray:
        """Boolean [...]: which rows of columns [..., L] keep every limit."""
        used = self.used(choice)
        return np.asarray((used <= self.caps.reshape(-1, *[1] * (used.ndim - 1))).all(0))

    def overrun(self, used: np.ndarray) -> np.ndarray:
        """How far costs [R, ...] exceed their limits, as the sum over limits of the excess relative to the
        limit, [...]."""
        caps = self.caps.reshape(-1, *[1] * (used.ndim - 1))
        return np.asarray((np.maximum(used - caps, 0) / np.maximum(caps, 1)).sum(0))

    def repair(self, choice: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
        """Change single layers of ``choice`` [L] until every limit is kept.

        Each time the change with the least rise of ``scores`` [L, C] per overrun removed; None where none
        reduces the overrun.
        """
        choice, rows = choice.copy(), np.arange(len(choice))
        while not self.keeps(choice):
            used, change = self.used(choice), self.changes(choice)
            gain = self.overrun(used) - self.overrun(used[:, None, None] + change)
            # from infinitely bad to infinitely bad is no rise that can be weighed
            with np.errstate(invalid="ignore"):
                rise = np.maximum(scores - scores[rows, choice][:, None], 0)
            useful = self.columns.allowed & (gain > 1e-15) & np.isfinite(rise)
            if not useful.any():
                return None
            unit = max(float(rise[useful].max()), 1e-300)  # whatever scores are measured in
            price = (np.where(useful, rise, 0) / unit + 1e-12) / np.where(useful, gain, 1)
            price = np.where(useful, price, np.inf)
            layer, column = np.unravel_index(int(np.argmin(price)), price.shape)
            choice[layer] = column
        return choice


def kernel_operations(cost_model: CostModel, options: Options) -> np.ndarray:
    """Operations [L, C] of the kernel at each column (``Scheme.operations``: multiply-adds, an add counted
    as half of one)."""
    work = options.columns.groups.sums(cost_model.macs[:, None] * cost_model.operations)
    return np.repeat(work, len(options.columns.activations), axis=1)

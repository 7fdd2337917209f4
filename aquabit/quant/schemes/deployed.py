"""The formats that other programs run (``aquabit.deployed_kinds``): each is its layout, and all are fitted
here.

Without H the squared error of the weight is made small; with H, for ``...h``, tr(dW H dW^T), by the same
steps as ``usq3h``, from scales that are best for H's diagonal. What is over coded scales is found for that
diagonal and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.fixed_levels import ascending_levels, table
from aquabit.quant.schemes.factors import Store
from aquabit.quant.schemes.grouped import Best, Groups, ideal, near, one_for_all, settled
from aquabit.quant.schemes.levels import Problem, problem_of
from aquabit.quant.schemes.output_aware import fitted
from aquabit.quant.schemes.progress import Report
from aquabit.quant.schemes.scalar import as_rows
from aquabit.quant.schemes.scaled import Scaled, StoredAffine
from aquabit.scheme import Scheme
from aquabit.scheme_record import Layout


def fit(
    weights: Sequence[Tensor], scheme: Scheme, hessians: Sequence[Tensor | None], seed: int, report: Report
) -> list[CodebookWeight]:
    """Each weight on its own; with H where the scheme is output-aware."""
    return [_fit(w, scheme, h) for w, h in zip(weights, hessians, strict=True)]


def _fit(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> CodebookWeight:
    layout = scheme.layout(tuple(weight.shape))
    problem = _problem(weight, hessian, layout) if scheme.output_aware else None
    grid = Grid.of(weight, layout, problem)
    index, best = (grid.index(grid.best), grid.best) if problem is None else _with_feedback(problem, grid)
    codes = (
        ascending_levels(layout.levels, layout.bits)[1].to(index.device)[index.long()].flatten(1).t()[:, None]
    )
    offset = None if grid.offset is None or best.offset is None else grid.offset.stored(best.offset)
    scale, shape = grid.scale.stored(best.scale), tuple(weight.shape)
    return CodebookWeight.from_codes(
        codes, None, scale, offset, shape, layout.bits, layout.order, layout.levels
    )


def _problem(weight: Tensor, hessian: Tensor | None, layout: Layout) -> Problem:
    """Where codes are looked up in a table, the columns of a scale stay together."""
    row = prod(weight.shape[1:])
    together = 1 if table(layout.levels) is None else row // (layout.scales or 1)
    return problem_of(weight, hessian, layout.order, 1 if together == row else together)


@dataclass(frozen=True)
class Grid:
    """Groups of a weight, the numbers that their scales and offsets can have, and the best of these."""

    groups: Groups
    layout: Layout
    scale: Store
    offset: Store | None
    best: Best

    @staticmethod
    def of(weight: Tensor, layout: Layout, problem: Problem | None) -> Grid:
        rows = as_rows(weight, layout.order)
        values = ascending_levels(layout.levels, layout.bits)[0].to(rows.device)
        n, factors = layout.scales or 1, layout.factors
        mass = None if problem is None else _by_rows(problem, problem.diagonal, n)
        sunk = layout.offset and factors.coded
        x = rows.reshape(len(rows), n, -1)
        groups = Groups(x, mass, values, table(layout.levels) is None, layout.offset, sunk)
        scale, offset = Store(factors), Store(replace(factors, negative=True)) if layout.offset else None
        if factors.whole:
            best = one_for_all(groups, layout.bits, scale)
            return Grid(groups, layout, replace(scale, one=best.scale[:1]), None, best)
        first = ideal(groups, layout.bits, layout)
        if not factors.coded:
            return Grid(groups, layout, scale, offset, first)
        scale = Store.of(first.scale, factors)
        if first.offset is not None:
            offset = Store.of(first.offset, factors)
        best, scale, offset = settled(groups, scale, offset, first)
        return Grid(groups, layout, scale, offset, best)

    def index(self, best: Best) -> Tensor:
        """Places of the nearest levels, [out, n, size]."""
        return self.groups.index(best.scale, best.offset)

    def searched(self, mass: Tensor) -> Best:
        """What can be stored that is best where errors weigh ``mass`` [out, n, size]."""
        if self.scale.one is not None:
            return self.best
        groups = replace(self.groups, mass=mass)
        first = ideal(groups, self.layout.bits, self.layout)
        return near(groups, self.scale, self.offset, first) if self.layout.factors.coded else first

    def rounded(self, parameters: Tensor) -> Tensor:
        """Parameters of levels [G, P, n], or [G, P, 2 n], as they can be stored."""
        flat = parameters.flatten(0, 1)
        if self.offset is None:
            return self.scale.rounded(flat).reshape(parameters.shape)
        scale, offset = flat.chunk(2, 1)
        both = torch.cat([self.scale.rounded(scale), self.offset.rounded(offset)], 1)
        return both.reshape(parameters.shape)


def _by_rows(problem: Problem, columns: Tensor, n: int) -> Tensor:
    """What inputs weigh [G, R], for every weight in stored order: [out, n, size]."""
    rows = problem.stored(columns[..., None].expand(problem.weight.shape)).t()
    return rows.reshape(len(rows), n, -1)


def _with_feedback(problem: Problem, grid: Grid) -> tuple[Tensor, Best]:
    """Places of levels [out, n, size] and scales by error feedback and descent; never worse than the nearest
    levels of ``grid.best``."""
    (out, n, size), groups = grid.groups.x.shape, problem.weight.shape[0]

    def parameters(best: Best) -> Tensor:
        both = best.scale if best.offset is None else torch.cat([best.scale, best.offset], 1)
        return both.reshape(groups, out // groups, -1)

    def first(mass: Tensor) -> Tensor:
        return parameters(grid.searched(_by_rows(problem, mass, n)))

    part, values = problem.order // size, grid.groups.values
    levels: StoredAffine | Scaled
    if grid.offset is None:
        levels = Scaled(part, n, values, grid.groups.even, grid.rounded, first)
    else:
        levels = StoredAffine(part, n, len(values) - 1, grid.rounded, first)
    codes = problem.ordered(grid.index(grid.best).reshape(out, -1).t().byte())
    state = fitted(problem, levels, parameters(grid.best), codes)
    scale, *offset = state.parameters.reshape(out, -1, n).unbind(1)
    index = problem.stored(state.codes).t().reshape(out, n, size)
    return index, Best(scale, offset[0] if offset else None, state.loss)

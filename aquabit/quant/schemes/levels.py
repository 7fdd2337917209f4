"""What output-aware scalar quantizers work on: a weight with its H, the levels its codes stand for, and the
state of a fit.

A weight is [G, R, P]: G groups of a grouped convolution, R inputs in decreasing order of H's diagonal, P
outputs; parameters of the levels are [G, P, m], or [1, 1, m] where all outputs share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from aquabit.kernels import scalar_search
from aquabit.kernels.scalar_search import Even
from aquabit.quant.calibration.hessian import check_hessian, damped
from aquabit.quant.schemes.scalar import as_rows, halves, lloyd
from aquabit.quant.sharing import shared

# of the full range, tried for a first grid
SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52, 0.46, 0.4)
# half ranges tried, in weighted standard deviations
DEVIATIONS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.3, 2.6, 3.0, 3.5, 4.2)

CHUNK = (
    1 << 17
)  # weights whose first grid is found together: what is made of them stays in a processor's cache


class Coded(NamedTuple):
    """Codes [G, R, P] uint8 on their grid, and each row's loss [G, P] float64."""

    parameters: Tensor
    codes: Tensor
    loss: Tensor


class State(NamedTuple):
    """The same with H dW^T and, where ``Levels.moved`` has it, H codes, both [G, R, P]."""

    parameters: Tensor
    codes: Tensor
    loss: Tensor
    product: Tensor
    moved: Tensor | None


@dataclass(frozen=True)
class Problem:
    """A weight in the order in which error feedback goes through its inputs: ``weight`` [G, R, P] and H [G,
    R, R], or its diagonal [G, R].

    ``order`` [G, R] is each column's place in the stored row, ``product`` [G, R, P] is H W^T.
    """

    weight: Tensor
    hessian: Tensor
    order: Tensor
    product: Tensor

    def times(self, difference: Tensor) -> Tensor:
        """H dW^T, [G, R, P]."""
        return self.hessian[..., None] * difference if self.hessian.ndim == 2 else self.hessian @ difference

    @cached_property
    def ones(self) -> Tensor:
        """H 1, [G, R, 1]."""
        return (self.hessian if self.hessian.ndim == 2 else self.hessian.sum(2))[..., None]

    @property
    def diagonal(self) -> Tensor:
        return self.hessian if self.hessian.ndim == 2 else self.hessian.diagonal(dim1=1, dim2=2)

    @property
    def inverse_diagonal(self) -> Tensor:
        return torch.where(self.diagonal > 0, 1 / self.diagonal, 0.0)

    def stored(self, columns: Tensor) -> Tensor:
        """Columns [G, R, P] in stored order, [R, G * P]."""
        back = torch.empty_like(columns).scatter_(1, self.order[..., None].expand_as(columns), columns)
        return back.transpose(0, 1).reshape(columns.shape[1], -1)

    def ordered(self, rows: Tensor) -> Tensor:
        """The inverse of ``stored``."""
        columns = rows.reshape(rows.shape[0], len(self.order), -1).transpose(0, 1)
        return columns.gather(1, self.order[..., None].expand_as(columns)).contiguous()


@shared
def problem_of(weight: Tensor, hessian: Tensor | None, stored: str = "inputs", together: int = 1) -> Problem:
    """Rows and H in one order: that of storage (``stored``: CodebookWeight's), then by decreasing diagonal of
    H (GPTQ's act-order), where so many neighbours stay ``together``. An H of zeros is the identity."""
    rows, h = as_rows(weight, stored), check_hessian(hessian, weight, definite=False)
    if not bool((h if h.ndim == 2 else h.diagonal(dim1=1, dim2=2)).any(1).all()):
        h = torch.stack([damped(each, 0.0) for each in h])
    place = torch.arange(rows.shape[1], device=h.device)
    if weight.ndim == 4 and stored == "inputs":
        place = place.reshape(weight.shape[1:]).permute(1, 2, 0).reshape(-1)
    diagonal = (h if h.ndim == 2 else h.diagonal(dim1=1, dim2=2))[:, place]
    order = _heaviest_first(diagonal, together)
    rows_of_h = torch.stack([each[place[o]] for each, o in zip(h, order, strict=True)])
    h = rows_of_h if h.ndim == 2 else rows_of_h.gather(2, place[order][:, None].expand_as(h))
    empty = Problem(rows, h, order, rows)
    columns = empty.ordered(rows.t())
    return Problem(columns, h, order, empty.times(columns))


def _heaviest_first(diagonal: Tensor, together: int) -> Tensor:
    """Columns [G, R] by decreasing diagonal: groups of ``together``, and columns within a group."""
    parts = diagonal.reshape(len(diagonal), -1, together)
    inside = parts.argsort(dim=2, descending=True, stable=True)
    groups = parts.sum(2).argsort(dim=1, descending=True, stable=True)
    first = groups[..., None] * together
    return (first + inside.gather(1, groups[..., None].expand_as(inside))).flatten(1)


class Affine:
    """Levels scale * code + offset; parameters [G, P, 2 n]: n scales, then n offsets, one pair for each
    n-th part of a row."""

    shared = False

    def __init__(self, part: Tensor, n: int, steps: int, rounded: Callable[[Tensor], Tensor] = halves):
        self.rounded = rounded  # parameters as they are stored
        self.part, self.n, self.steps = part, n, steps
        self.members = one_hot(part, n).transpose(1, 2).float()  # [G, n, R]

    def of(self, parameters: Tensor) -> Even:
        """The levels as a code search takes them."""
        g, p, _ = parameters.shape
        scale, offset = parameters.float().reshape(g, p, 2, self.n).permute(2, 0, 3, 1)
        return Even(scale, offset, self.part, self.steps)

    def spread(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of every column, [G, R, P], or [G, 1, P] where a row has one."""
        g, p, _ = parameters.shape
        pair = parameters.reshape(g, p, 2, self.n).permute(2, 0, 3, 1).float()
        if self.n > 1:
            pair = pair.gather(2, self.part[None, :, :, None].expand(2, g, self.part.shape[1], p))
        return pair[0], pair[1]

    def decode(self, parameters: Tensor, codes: Tensor) -> Tensor:
        scale, offset = self.spread(parameters)
        return torch.addcmul(offset, scale, codes.float())

    def nearest(self, parameters: Tensor, target: Tensor) -> Tensor:
        return self._steps(parameters, target).byte()

    def _steps(self, parameters: Tensor, target: Tensor) -> Tensor:
        scale, offset = self.spread(parameters)
        inverse = torch.where(scale.abs() > scalar_search.SMALL, 1 / scale, 0.0)
        return (target - offset).mul_(inverse).round_().clamp_(0, self.steps)

    def moved(self, problem: Problem, codes: Tensor) -> Tensor | None:
        """H codes where a row has one scale: then no other product with H is needed (around their middle,
        for float32's sake)."""
        return problem.times(codes.float() - self.steps / 2) if self.n == 1 else None

    def moved_on(self, state: State, product: Tensor) -> Tensor | None:
        """H codes of other codes on the grid of ``state``, whose H dW^T is ``product``."""
        if state.moved is None:
            return None
        scale, _ = self.spread(state.parameters)
        inverse = torch.where(scale.abs() > scalar_search.SMALL, 1 / scale, 0.0)
        return torch.addcmul(state.moved, state.product - product, inverse)

    def image(self, problem: Problem, parameters: Tensor, codes: Tensor, moved: Tensor | None) -> Tensor:
        """H of what the parameters decode to."""
        if moved is None:
            return problem.times(self.decode(parameters, codes))
        scale, offset = self.spread(parameters)
        return torch.addcmul(problem.ones * (offset + self.steps / 2 * scale), scale, moved)

    def gradient(self, product: Tensor, codes: Tensor) -> Tensor:
        """Derivative of <decoded, product> by the parameters, float64."""
        both = torch.cat([self.members @ (codes * product), self.members @ product], 1)
        return both.transpose(1, 2).double()

    def preconditioner(self, diagonal: Tensor, codes: Tensor) -> Callable[[Tensor], Tensor]:
        """Inverses of the 2 x 2 normal matrices of each scale and offset under H's diagonal."""
        h, steps = diagonal[..., None].expand(codes.shape), codes.float()
        b, c = self.gradient(h, codes).split(self.n, 2)
        a = (self.members @ (steps.square() * h)).transpose(1, 2).double()
        determinant = a * c - b * b
        regular = determinant > 1e-6 * a * c

        def solve(r: Tensor) -> Tensor:
            x, y = r.split(self.n, 2)
            scale = torch.where(regular, (c * x - b * y) / determinant, 0.0)
            return torch.cat(
                [scale, torch.where(regular, (a * y - b * x) / determinant, torch.where(c > 0, y / c, 0.0))],
                2,
            )

        return solve

    def scaled(self, parameters: Tensor, factor: float) -> Tensor:
        """The same middle, ``factor`` times the range."""
        scale, offset = parameters.split(self.n, 2)
        return self.rounded(torch.cat([scale * factor, offset + scale * (1 - factor) * self.steps / 2], 2))

    def sorted(self, parameters: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return parameters, codes

    def grid(self, weight: Tensor, mass: Tensor) -> Tensor:
        """For each row and part the range of least squared error weighted by ``mass`` [G, R]: of the full
        range and shares of it around its middle, and of multiples of the weighted deviation around the
        weighted mean (outliers may weigh nothing).
        """
        width = max(1, CHUNK // max(1, weight.shape[0] * weight.shape[1]))
        return torch.cat([self._grid(part.contiguous(), mass) for part in weight.split(width, 2)], 1)

    def _grid(self, weight: Tensor, mass: Tensor) -> Tensor:
        g, _, p = weight.shape
        index = self.part[..., None].expand_as(weight)
        empty = weight.new_zeros(g, self.n, p)
        low, high = (
            empty.scatter_reduce(1, index, weight, r, include_self=False).transpose(1, 2)
            for r in ("amin", "amax")
        )
        weighted = self.members * mass[:, None]
        total, mean, square = ((weighted @ weight**i).transpose(1, 2) for i in range(3))
        mean, square = torch.where(total > 0, mean / total, 0.0), torch.where(total > 0, square / total, 0.0)
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        full, normal = (
            torch.cat([2 * half / self.steps, m - half], 2)
            for m, half in (((low + high) / 2, (high - low) / 2), (mean, deviation))
        )
        best, least = self.rounded(full), torch.full_like(low, torch.inf)
        for around, factor in [(full, f) for f in SHARES] + [(normal, f) for f in DEVIATIONS]:
            grid = self.scaled(around, factor)
            scale, offset = self.spread(grid)
            steps = self._steps(grid, weight)
            error = (weighted @ steps.mul_(scale).add_(offset).sub_(weight).square_()).transpose(1, 2)
            won = error < least
            best, least = torch.where(won.repeat(1, 1, 2), grid, best), torch.where(won, error, least)
        return best


class Table:
    """Levels from a table of K values; parameters [G, P, K], or [1, 1, K] where the tensor shares it."""

    def __init__(self, k: int, shared: bool):
        self.k, self.shared = k, shared

    def rounded(self, parameters: Tensor) -> Tensor:
        """Parameters as they are stored."""
        return halves(parameters)

    def of(self, parameters: Tensor) -> scalar_search.Table:
        """The levels as a code search takes them."""
        return scalar_search.Table(parameters.float().transpose(1, 2))

    def decode(self, parameters: Tensor, codes: Tensor) -> Tensor:
        if self.shared:
            return parameters.float()[0, 0].index_select(0, codes.reshape(-1).int()).reshape(codes.shape)
        return parameters.float().transpose(1, 2).gather(1, codes.long())

    def nearest(self, parameters: Tensor, target: Tensor) -> Tensor:
        return self.of(parameters).encoded(target, slice(None))[1].contiguous()

    def moved(self, problem: Problem, codes: Tensor) -> None:
        return None

    def moved_on(self, state: State, product: Tensor) -> None:
        return None

    def image(self, problem: Problem, parameters: Tensor, codes: Tensor, moved: Tensor | None) -> Tensor:
        return problem.times(self.decode(parameters, codes))

    def gradient(self, product: Tensor, codes: Tensor) -> Tensor:
        """Derivative of <decoded, product> by the table; float64, below which float16 tables hide the
        order of a GPU's additions."""
        g, _, p = codes.shape
        sums = torch.zeros(g, self.k, p, dtype=torch.float64, device=codes.device).scatter_add_(
            1, codes.long(), product.double()
        )
        return sums.sum((0, 2)).reshape(1, 1, -1) if self.shared else sums.transpose(1, 2)

    def preconditioner(self, diagonal: Tensor, codes: Tensor) -> Callable[[Tensor], Tensor]:
        mass = self.gradient(diagonal[..., None].expand(codes.shape), codes)
        inverse = torch.where(mass > 0, 1 / mass, 0.0)
        return lambda r: r * inverse

    def scaled(self, parameters: Tensor, factor: float) -> Tensor:
        middle = parameters.mean(2, keepdim=True)
        return self.rounded(middle + factor * (parameters - middle))

    def sorted(self, parameters: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest levels are searched for in ascending tables."""
        table, order = parameters.sort(-1)
        if torch.equal(table, parameters):
            return (table, codes)
        return (table, self.decode(order.argsort(dim=-1), codes).byte())

    def grid(self, weight: Tensor, mass: Tensor) -> Tensor:
        """Centres of a k-means weighted by ``mass`` [G, R]."""
        g, _, p = weight.shape
        tables = (1, 1) if self.shared else (g, p)
        data, mass = (
            t.transpose(1, 2).reshape(prod(tables), -1) for t in (weight, mass[..., None].expand_as(weight))
        )
        return halves(lloyd(data, self.k, mass)).reshape(*tables, self.k)


class Levels(Protocol):
    """What a fit asks of its levels."""

    @property
    def shared(self) -> bool: ...

    def of(self, parameters: Tensor) -> scalar_search.Levels: ...

    def decode(self, parameters: Tensor, codes: Tensor) -> Tensor: ...

    def nearest(self, parameters: Tensor, target: Tensor) -> Tensor: ...

    def moved(self, problem: Problem, codes: Tensor) -> Tensor | None: ...

    def moved_on(self, state: State, product: Tensor) -> Tensor | None: ...

    def image(self, problem: Problem, parameters: Tensor, codes: Tensor, moved: Tensor | None) -> Tensor: ...

    def gradient(self, product: Tensor, codes: Tensor) -> Tensor: ...

    def preconditioner(self, diagonal: Tensor, codes: Tensor) -> Callable[[Tensor], Tensor]: ...

    def scaled(self, parameters: Tensor, factor: float) -> Tensor: ...

    def rounded(self, parameters: Tensor) -> Tensor: ...

    def sorted(self, parameters: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]: ...

    def grid(self, weight: Tensor, mass: Tensor) -> Tensor: ...

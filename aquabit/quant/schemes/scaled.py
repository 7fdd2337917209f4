"""Levels of output-aware fits whose scales, and offsets, are those that a format of another program has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from aquabit.kernels import scalar_search
from aquabit.quant.schemes.levels import Affine, Problem, State

Rounded = Callable[[Tensor], Tensor]  # parameters [G, P, m] as they can be stored


class StoredAffine(Affine):
    """``Affine`` whose first grid is given."""

    def __init__(self, part: Tensor, n: int, steps: int, rounded: Rounded, first: Callable[[Tensor], Tensor]):
        super().__init__(part, n, steps, rounded)
        self.first = first

    def grid(self, weight: Tensor, mass: Tensor) -> Tensor:
        return self.first(mass)


class Scaled:
    """Levels scale * value of a table [K], ascending, that all share; parameters [G, P, n]: a scale for each
    n-th part of a row. ``even``: the values are whole numbers in a row."""

    shared = False

    def __init__(
        self,
        part: Tensor,
        n: int,
        values: Tensor,
        even: bool,
        rounded: Rounded,
        first: Callable[[Tensor], Tensor],
    ):
        self.part, self.n, self.values, self.even = part, n, values, even
        self.rounded, self.first = rounded, first
        self.members = one_hot(part, n).transpose(1, 2).float()  # [G, n, R]

    def of(self, parameters: Tensor) -> scalar_search.Levels:
        """The levels as a code search takes them."""
        scale = parameters.float().transpose(1, 2)
        if self.even:
            return scalar_search.Even(scale, scale * self.values[0], self.part, len(self.values) - 1)
        return scalar_search.Scaled(self.values, scale, self.part)

    def spread(self, parameters: Tensor) -> Tensor:
        """The scale of every column, [G, R, P], or [G, 1, P] where a row has one."""
        scale = parameters.transpose(1, 2).float()
        if self.n == 1:
            return scale
        return scale.gather(1, self.part[..., None].expand(-1, -1, scale.shape[2]))

    def unscaled(self, codes: Tensor) -> Tensor:
        return self.values[codes.int()]

    def decode(self, parameters: Tensor, codes: Tensor) -> Tensor:
        return self.unscaled(codes) * self.spread(parameters)

    def nearest(self, parameters: Tensor, target: Tensor) -> Tensor:
        return self.of(parameters).encoded(target, slice(None))[1]

    def moved(self, problem: Problem, codes: Tensor) -> Tensor | None:
        return None

    def moved_on(self, state: State, product: Tensor) -> Tensor | None:
        return None

    def image(self, problem: Problem, parameters: Tensor, codes: Tensor, moved: Tensor | None) -> Tensor:
        return problem.times(self.decode(parameters, codes))

    def gradient(self, product: Tensor, codes: Tensor) -> Tensor:
        """Derivative of <decoded, product> by the scales, float64."""
        return (self.members @ (self.unscaled(codes) * product)).transpose(1, 2).double()

    def preconditioner(self, diagonal: Tensor, codes: Tensor) -> Callable[[Tensor], Tensor]:
        mass = self.gradient(self.unscaled(codes) * diagonal[..., None], codes)
        inverse = torch.where(mass > 0, 1 / mass, 0.0)
        return lambda r: r * inverse

    def scaled(self, parameters: Tensor, factor: float) -> Tensor:
        return self.rounded(parameters * factor)

    def sorted(self, parameters: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return parameters, codes

    def grid(self, weight: Tensor, mass: Tensor) -> Tensor:
        return self.first(mass)

"""What the additive quantizer works on: the problem (weights, metric, sizes) and its state (tables,
scales, codes)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from aquabit.quant.schemes.scalar import halves


@dataclass(frozen=True)
class Problem:
    """Rows of weights with the metric of their inputs.

    ``weight`` [Z, O, R]: Z blocks of O rows, each block with its own ``hessian`` [Z, R, R], or diagonal [Z,
    R]; R = groups x size. ``tables``: how many sets of tables there are; block z uses set z // (Z / tables).
    """

    weight: Tensor
    hessian: Tensor
    tables: int
    codebooks: int  # M
    codewords: int  # K
    size: int  # g

    @property
    def diagonal(self) -> bool:
        return self.hessian.ndim == 2

    @property
    def groups(self) -> int:
        return self.weight.shape[2] // self.size

    @property
    def per_table(self) -> int:
        """Blocks that use one set of tables."""
        return len(self.weight) // self.tables

    def times(self, rows: Tensor) -> Tensor:
        """Rows [Z, O, R] times H."""
        return rows * self.hessian[:, None] if self.diagonal else torch.bmm(rows, self.hessian)

    def block(self, group: int) -> Tensor:
        """H of one group's inputs, [Z, g, g]."""
        at = slice(group * self.size, (group + 1) * self.size)
        return torch.diag_embed(self.hessian[:, at]) if self.diagonal else self.hessian[:, at, at]

    def blocks(self) -> Tensor:
        """All diagonal blocks, [Z, groups, g, g]."""
        return torch.stack([self.block(n) for n in range(self.groups)], 1)

    @cached_property
    def weight_by_h(self) -> Tensor:
        """W H, [Z, O, R]."""
        return self.times(self.weight)

    @cached_property
    def norm(self) -> float:
        """tr(W H W^T)."""
        return float((self.weight_by_h * self.weight).sum(dtype=torch.float64))


@dataclass
class State:
    """``tables`` [T, M, K, g], ``scale`` [Z, O], ``codes`` [Z, O, groups, M] int64 (all zero until they
    are searched).

    ``gradient`` [Z, O, R] is (W - W_hat) H where it is known: scales, tables and searches pass it on, so that
    a round multiplies by H once for its codes and once for each step of its tables."""

    tables: Tensor
    scale: Tensor
    codes: Tensor
    gradient: Tensor | None = None

    def of_blocks(self, m: int) -> Tensor:
        """Table m of every block, [Z, K, g]."""
        return self.tables[:, m].repeat_interleave(len(self.scale) // len(self.tables), 0)

    def unscaled(self, tables: Tensor | None = None) -> Tensor:
        """Sums of codewords [Z, O, R]."""
        table = self.tables if tables is None else tables
        t, m, k, g = table.shape
        z, o, n, _ = self.codes.shape
        index = self.codes.reshape(t, -1, m) + (torch.arange(t * m, device=table.device) * k).reshape(t, 1, m)
        return embedding_bag(index.reshape(-1, m), table.reshape(-1, g), mode="sum").reshape(z, o, n * g)

    def decoded(self) -> Tensor:
        """The weights that the state stands for, [Z, O, R]."""
        return self.unscaled() * self.scale[..., None]

    def residual_gradient(self, problem: Problem) -> Tensor:
        """(W - W_hat) H, made where it is not known."""
        if self.gradient is None:
            self.gradient = problem.times(problem.weight - self.decoded())
        return self.gradient

    def copy(self) -> State:
        """A state of its own; tables, scales and gradients are replaced, never written into, so only codes
        are copied."""
        return State(self.tables, self.scale, self.codes.clone(), self.gradient)

    def take_(self, other: State, tables: Tensor) -> None:
        """The other's state for the sets of tables where the mask [T] is true."""
        blocks = tables.repeat_interleave(len(self.scale) // len(self.tables))
        self.tables = torch.where(tables[:, None, None, None], other.tables, self.tables)
        self.scale = torch.where(blocks[:, None], other.scale, self.scale)
        self.codes = torch.where(blocks[:, None, None, None], other.codes, self.codes)
        both = self.gradient is not None and other.gradient is not None
        self.gradient = torch.where(blocks[:, None, None], other.gradient, self.gradient) if both else None  # type: ignore[arg-type]

    def round_(self) -> None:
        """Tables and scales as float16 stores them. Tables are brought to a largest entry of 1 first, so
        that neither overflows."""
        top = self.tables.abs().amax(dim=(1, 2, 3)).clamp_min(1e-30)
        self.tables = (self.tables / top[:, None, None, None]).half().float()
        factor = top.repeat_interleave(len(self.scale) // len(self.tables))
        self.scale, self.gradient = halves(self.scale * factor[:, None]), None

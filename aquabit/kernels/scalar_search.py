"""The output-aware scalar quantizers' code search: in C++ on a CPU, and its reference in torch.

A weight is columns [G, R, P]: G groups of a grouped convolution, R inputs, P outputs, with H [G, R, R]. What
a code stands for is ``Even`` or ``Table``. Two searches minimise tr(dW H dW^T), row by row: error feedback
finds codes from nothing (GPTQ), and coordinate descent makes each code in turn the best one given all others
(QuantEase). Where few codes change, the native descent costs little: a comparison for a weight that keeps
its level, a row of H for one that does not.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.kernels.extension import chosen
from aquabit.kernels.extension import native as _native

Backend = Literal["native", "reference"]

BLOCK = 64  # columns whose feedback is summed one by one; the others hear of them in one product
SMALL = 1e-12  # scales up to this are as good as none


class Even(NamedTuple):
    """Levels offset + scale * code, codes from 0 to ``steps``: ``scale`` and ``offset`` [G, n, P], column j
    having the pair ``part`` [G, R] int64 says."""

    scale: Tensor
    offset: Tensor
    part: Tensor
    steps: int

    def encoded(self, target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """The nearest levels of targets [G, columns, P], and their codes."""
        scale, offset = (t.gather(1, self._index(columns, t)) for t in (self.scale, self.offset))
        inverse = torch.where(scale.abs() > SMALL, 1 / scale, 0.0)
        codes = ((target - offset) * inverse).clamp(0, self.steps).round_()
        return offset + scale * codes, codes.byte()

    def decoded(self, codes: Tensor) -> Tensor:
        scale, offset = (t.gather(1, self._index(slice(None), t)) for t in (self.scale, self.offset))
        return offset + scale * codes

    def _index(self, columns: slice, like: Tensor) -> Tensor:
        return self.part[:, columns, None].expand(-1, -1, like.shape[2])


class Table(NamedTuple):
    """Levels ``values`` [G, K, P], ascending along K; the first and last size may be 1, for all."""

    values: Tensor

    def encoded(self, target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """The nearest levels of targets [G, columns, P], and their codes."""
        tables = self.values.transpose(1, 2)
        bounds = ((tables[..., 1:] + tables[..., :-1]) / 2).contiguous()
        if bounds[..., 0].numel() == 1 or not bounds.shape[2]:
            codes = torch.bucketize(target.contiguous(), bounds.reshape(-1))
        else:
            wide = bounds.expand(len(target), target.shape[2], -1).contiguous()
            codes = torch.searchsorted(wide, target.transpose(1, 2).contiguous()).transpose(1, 2)
        return self.decoded(codes), codes.byte()

    def decoded(self, codes: Tensor) -> Tensor:
        return self.values.expand(len(codes), -1, codes.shape[2]).gather(1, codes.long())


class Scaled(NamedTuple):
    """Levels scale * value: ``values`` [K] ascending, for all; ``scale`` [G, n, P], column j having the one
    that ``part`` [G, R] int64 says. Columns of a part must be neighbours: each part is searched as a table.
    """

    values: Tensor
    scale: Tensor
    part: Tensor

    def encoded(self, target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """The nearest levels of targets [G, columns, P], and their codes."""
        scale = self._scale(columns, target)
        inverse = torch.where(scale.abs() > SMALL, 1 / scale, 0.0)
        bounds = (self.values[1:] + self.values[:-1]) / 2
        codes = torch.bucketize((target * inverse).contiguous(), bounds)
        return scale * self.values[codes], codes.byte()

    def decoded(self, codes: Tensor) -> Tensor:
        return self._scale(slice(None), codes) * self.values[codes.int()]

    def blocks(self) -> list[tuple[int, int]]:
        """Columns [start, stop) of at most BLOCK that have one scale a row."""
        row = self.part.shape[1]
        ends = [j for j in range(1, row) if j % BLOCK == 0]
        ends += (self.part.diff(dim=1) != 0).any(0).nonzero()[:, 0].add(1).tolist()
        edges = sorted({0, *ends, row})
        return list(pairwise(edges))

    def table(self, start: int) -> tuple[Table, Tensor]:
        """The levels of the columns from ``start`` on, ascending, and where that turned them [G, 1, P]."""
        index = self.part[:, start, None, None].expand(-1, 1, self.scale.shape[2])
        scale = self.scale.gather(1, index)
        levels = self.values[None, :, None] * scale
        turned = scale < 0
        return Table(torch.where(turned, levels.flip(1), levels).contiguous()), turned

    def turn_(self, codes: Tensor, turned: Tensor) -> None:
        """Codes [G, columns, P] of ascending levels as those of ``values``, and back."""
        codes.copy_(torch.where(turned, len(self.values) - 1 - codes, codes))

    def _scale(self, columns: slice, like: Tensor) -> Tensor:
        index = self.part[:, columns, None].expand(-1, -1, like.shape[2])
        return self.scale.gather(1, index)


Levels = Even | Table | Scaled


class Fed(NamedTuple):
    """``codes`` uint8 and ``change`` = weight - levels, [G, R, P]; each row's ``loss`` [G, P] float64."""

    codes: Tensor
    change: Tensor
    loss: Tensor


class Descended(NamedTuple):
    """``codes`` uint8 and ``product`` = H dW^T, [G, R, P]; each row's ``loss`` [G, P] float64."""

    codes: Tensor
    product: Tensor
    loss: Tensor


def feed(
    weight: Tensor, gain: Tensor, mass: Tensor, levels: Levels, *, backend: Backend | None = None
) -> Fed:
    """Codes of ``weight`` [G, R, P] column by column, each the nearest to w_j + ``gain``_j dW, with dW = w -
    level of the columns before it.

    ``gain`` [G, R, R] is read below its diagonal; a miss of column j's target costs ``mass`` [G, R]. Raises
    AquabitError where ``backend`` cannot serve.
    """
    step = _feed_natively if select(backend, weight) == "native" else _feed_reference
    target, (groups, row, outputs) = weight.clone(memory_format=torch.contiguous_format), weight.shape
    fed = Fed(
        torch.empty_like(target, dtype=torch.uint8),
        torch.empty_like(target),
        target.new_zeros(groups, outputs, dtype=torch.float64),
    )
    call = _Feed(
        weight.contiguous(), target, gain.contiguous(), mass.contiguous(), *fed, levels=_plain(levels)
    )
    whole = [(start, min(start + BLOCK, row)) for start in range(0, row, BLOCK)]
    for start, stop in levels.blocks() if isinstance(levels, Scaled) else whole:
        if isinstance(levels, Scaled):
            table, turned = levels.table(start)
            step(call._replace(levels=table, start=start, stop=stop))
            levels.turn_(fed.codes[:, start:stop], turned)
        else:
            step(call._replace(start=start, stop=stop))
        if stop < row:
            target[:, stop:].baddbmm_(gain[:, stop:, start:stop], fed.change[:, start:stop])
    return fed


def descend(
    codes: Tensor,
    product: Tensor,
    loss: Tensor,
    hessian: Tensor,
    levels: Levels,
    sweeps: int = 1,
    least: float = 0.0,
    *,
    backend: Backend | None = None,
) -> Descended:
    """Up to ``sweeps`` times every code of ``codes`` [G, R, P] in turn the best one given all others, under
    ``hessian`` [G, R, R].

    ``product`` is H dW^T for these codes, ``loss`` [G, P] that of each row; a row gets another sweep where
    the last one gained more than the share ``least`` of its loss. No row's loss rises. Raises AquabitError
    where ``backend`` cannot serve.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    if isinstance(levels, Scaled):
        return _descend_by_blocks(Descended(codes, product, loss), hessian, levels, sweeps, least, backend)
    found = Descended(
        *(t.clone(memory_format=torch.contiguous_format) for t in (codes, product, loss.double()))
    )
    call = _Descent(hessian.contiguous(), inverse, *found, _plain(levels), sweeps, least)
    if select(backend, product) == "native":
        _call(_native.scalar_descend, call)
    else:
        _descend_reference(call)
    return found


def _descend_by_blocks(
    start: Descended, hessian: Tensor, levels: Scaled, sweeps: int, least: float, backend: Backend | None
) -> Descended:
    """``descend`` block after block of columns that share a scale; all rows take part in every sweep."""
    codes, product, loss = (t.clone() for t in start)
    for _ in range(sweeps):
        before = loss.clone()
        for first, last in levels.blocks():
            at = slice(first, last)
            table, turned = levels.table(first)
            part = codes[:, at].clone()
            levels.turn_(part, turned)
            own = hessian[:, at, at].contiguous()
            found = descend(part, product[:, at].contiguous(), loss, own, table, backend=backend)
            change = table.decoded(found.codes) - table.decoded(part)
            product.baddbmm_(hessian[:, :, at], change, alpha=-1)
            levels.turn_(found.codes, turned)
            codes[:, at], loss = found.codes, found.loss
        if not bool((before - loss > least * before).any()):
            break
    return Descended(codes, product, loss)


def select(backend: Backend | None, columns: Tensor) -> Backend:
    """What serves these tensors: ``backend``, or the best there is. Raises AquabitError where ``backend``
    cannot."""
    return chosen(backend, _missing(columns))


def _missing(columns: Tensor) -> str | None:
    if not hasattr(_native, "scalar_feed"):
        return "needs the C++ extension, which is not there"
    if columns.device.type != "cpu" or columns.dtype != torch.float32:
        return f"works on float32 on a CPU, not on {columns.dtype} on {columns.device}"
    return None


class _Feed(NamedTuple):
    """What the extension reads, by these names; it checks shapes and kinds. ``codes``, ``change`` and
    ``loss`` are written to, in the columns from ``start`` to ``stop``."""

    weight: Tensor
    target: Tensor
    gain: Tensor
    mass: Tensor
    codes: Tensor
    change: Tensor
    loss: Tensor
    levels: Levels
    start: int = 0
    stop: int = 0


class _Descent(NamedTuple):
    """The same for descent; ``codes``, ``product`` and ``loss`` are changed in place."""

    hessian: Tensor
    inverse: Tensor
    codes: Tensor
    product: Tensor
    loss: Tensor
    levels: Levels
    sweeps: int
    least: float


def _plain(levels: Levels) -> Levels:
    if isinstance(levels, Table):
        return Table(levels.values.float().contiguous())
    if isinstance(levels, Scaled):
        return levels
    scale, offset = (t.float().contiguous() for t in (levels.scale, levels.offset))
    return Even(scale, offset, levels.part.contiguous(), levels.steps)


def _call(function: object, call: _Feed | _Descent, level: int = 0) -> None:
    """``level``: index into the extension's list of instruction sets, best first. Raises AquabitError for
    tensors that do not fit each other."""
    assert callable(function)
    try:
        function(call, torch.get_num_threads(), level)
    except ValueError as error:
        raise AquabitError(f"the code search: {error}") from None


def _feed_natively(call: _Feed, level: int = 0) -> None:
    _call(_native.scalar_feed, call, level)


def _feed_reference(call: _Feed) -> None:
    start, stop = call.start, call.stop
    for j in range(start, stop):
        at = slice(j, j + 1)
        wanted = torch.baddbmm(call.target[:, at], call.gain[:, at, start:j], call.change[:, start:j])
        level, call.codes[:, at] = call.levels.encoded(wanted, at)
        call.change[:, at] = call.weight[:, at] - level
        call.loss.add_(call.mass[:, j, None] * (wanted - level)[:, 0].square())


def _descend_reference(call: _Descent) -> None:
    hessian, inverse, codes, product, loss, levels, sweeps, least = call
    values, active = levels.decoded(codes), torch.ones_like(loss, dtype=torch.bool)
    for _ in range(sweeps):
        gained = torch.zeros_like(loss)
        for start in range(0, product.shape[1], BLOCK):
            stop = min(start + BLOCK, product.shape[1])
            change = torch.zeros_like(product[:, start:stop])
            for j in range(start, stop):
                at = slice(j, j + 1)
                pull = torch.baddbmm(
                    product[:, at], hessian[:, at, start:j], change[:, : j - start], alpha=-1
                )
                level, code = levels.encoded(values[:, at] + pull * inverse[:, at, None], at)
                step = level - values[:, at]
                gain = step * (step * hessian[:, at, at] - 2 * pull)
                moves = (gain < 0) & active[:, None] & (inverse[:, at, None] > 0)
                change[:, j - start] = torch.where(moves, step, 0.0)[:, 0]
                values[:, at], codes[:, at] = (
                    torch.where(moves, new, old)
                    for new, old in ((level, values[:, at]), (code, codes[:, at]))
                )
                gained += torch.where(moves, gain, 0.0)[:, 0]
            product.baddbmm_(hessian[:, :, start:stop], change, alpha=-1)
        active &= -gained > least * loss
        loss += gained
        if not bool(active.any()):
            break

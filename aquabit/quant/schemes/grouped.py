"""Scales, offsets and codes of groups of weights, by search: the least squared error that a format of
another program can have, or nearly so.

Groups are x [rows, n, size], each weight's error weighed by ``mass``, of the same shape. First come the
scales that would be best, were they any floats; then the numbers that can be stored near them, each tried;
where scales are coded, what is over them is refitted to the codes, and they are tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aquabit.quant.schemes.factors import Store
from aquabit.scheme_record import Layout

STEPS = 16  # scales tried for a group, evenly spaced shares of the one that reaches the largest weight
SHARES = {8: (0.85, 1.03), 6: (0.75, 1.05), 5: (0.65, 1.1)}  # by bits; fewer bits:
WIDE = (0.35, 1.2)
REFITS = 3  # least squares for scales, and codes for them, in turns
ROUNDS = 3  # scales under refitted factors
CHUNK = 1 << 18  # weights that are searched together
TINY = 1e-30


@dataclass(frozen=True)
class Groups:
    """Groups of weights and what their codes may stand for: ``values`` [K] ascending, ``even`` where they are
    whole numbers in a row; ``offset``: what is added, too, is fitted, ``sunk`` to at most 0."""

    x: Tensor
    mass: Tensor | None
    values: Tensor
    even: bool
    offset: bool
    sunk: bool

    def part(self, rows: slice) -> Groups:
        mass = self.mass if self.mass is None or len(self.mass) == 1 else self.mass[rows]
        return replace(self, x=self.x[rows], mass=mass)

    def index(self, scale: Tensor, offset: Tensor | None) -> Tensor:
        """The nearest levels' places in ``values``, by scales and offsets [rows, n]."""
        inverse = torch.where(scale.abs() > TINY, 1 / scale, 0.0)[..., None]
        wanted = (self.x if offset is None else self.x - offset[..., None]) * inverse
        if self.even:
            low, high = float(self.values[0]), float(self.values[-1])
            return wanted.round_().clamp_(low, high).sub_(low).to(torch.int16)
        bounds = (self.values[1:] + self.values[:-1]) / 2
        return torch.bucketize(wanted.contiguous(), bounds, out_int32=True)

    def looked_up(self, index: Tensor) -> Tensor:
        return index + self.values[0] if self.even else self.values[index]

    def weighed(self, errors: Tensor) -> Tensor:
        return errors if self.mass is None else errors * self.mass

    def tried(self, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Levels, before they are scaled, and the error of each group [rows, n]."""
        found = self.looked_up(self.index(scale, offset))
        decoded = found * scale[..., None]
        if offset is not None:
            decoded += offset[..., None]
        return found, self.weighed(decoded.sub_(self.x).square_()).sum(2)

    def refitted(self, levels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Least squares for scale and offset [rows, n], by the levels of codes."""
        heavy = self.weighed(levels)
        square, cross = (heavy * levels).sum(2), (heavy * self.x).sum(2)
        alone = torch.where(square > 0, cross / square, 0.0)
        if not self.offset:
            return alone, None
        total = self.weighed(torch.ones_like(self.x)).sum(2)
        one, sums = heavy.sum(2), self.weighed(self.x).sum(2)
        determinant = square * total - one * one
        regular = determinant > 1e-6 * square * total
        scale = torch.where(regular, (cross * total - one * sums) / determinant, 0.0)
        offset = torch.where(
            regular, (square * sums - one * cross) / determinant, sums / total.clamp_min(TINY)
        )
        if not self.sunk:
            return scale, offset
        above = offset > 0
        return torch.where(above, alone, scale), torch.where(above, 0.0, offset)


@dataclass
class Best:
    """The best scale and offset of each group so far [rows, n], and their errors."""

    scale: Tensor
    offset: Tensor | None
    error: Tensor

    def offer(self, scale: Tensor, offset: Tensor | None, error: Tensor) -> None:
        better = error < self.error
        self.scale, self.error = (
            torch.where(better, a, b) for a, b in ((scale, self.scale), (error, self.error))
        )
        if self.offset is not None and offset is not None:
            self.offset = torch.where(better, offset, self.offset)


def ideal(groups: Groups, bits: int, layout: Layout) -> Best:
    """The best scales and offsets that can be stored, or any floats where scales are coded."""
    loose = Store(replace(layout.factors, kind="float32")) if layout.factors.coded else Store(layout.factors)
    return _joined([_ideal(groups.part(rows), bits, loose) for rows in _portions(groups.x)])


def one_for_all(groups: Groups, bits: int, store: Store) -> Best:
    """The best scale of a weight that has one, beside the rows [out, 1]."""
    most, parts = groups.x.abs().max() / groups.values[-1], _portions(groups.x)
    best, least = most, torch.tensor(torch.inf)
    for share in [1.0, *torch.linspace(*SHARES.get(bits, WIDE), STEPS).tolist()]:
        scale = store.rounded((most * share).reshape(1, 1))
        error = torch.stack([groups.part(p).tried(scale, None)[1].sum() for p in parts]).sum()
        if error < least:
            best, least = scale, error
    return Best(best.reshape(1, 1).expand(len(groups.x), 1), None, least)


def _joined(found: list[Best]) -> Best:
    offsets = [part.offset for part in found if part.offset is not None]
    scale, error = torch.cat([part.scale for part in found]), torch.cat([part.error for part in found])
    return Best(scale, torch.cat(offsets) if offsets else None, error)


def _portions(x: Tensor) -> list[slice]:
    size = max(1, CHUNK // max(1, x[0].numel()))
    return [slice(at, at + size) for at in range(0, len(x), size)]


def _ideal(groups: Groups, bits: int, store: Store) -> Best:
    infinite = torch.full(groups.x.shape[:2], torch.inf, device=groups.x.device)
    best = Best(torch.zeros_like(infinite), torch.zeros_like(infinite) if groups.offset else None, infinite)

    def offer(scale: Tensor, offset: Tensor | None) -> Tensor:
        scale, offset = store.rounded(scale), None if offset is None else _offset(store, offset)
        levels, error = groups.tried(scale, offset)
        best.offer(scale, offset, error)
        return levels

    for scale, offset in _candidates(groups, bits, store.factors.negative):
        offer(scale, offset)
    for _ in range(REFITS):
        levels, _ = groups.tried(best.scale, best.offset)
        offer(*groups.refitted(levels))
    return best


def _offset(store: Store, offset: Tensor) -> Tensor:
    """Offsets as they are stored; they may be below 0 where scales may not."""
    return Store(replace(store.factors, negative=True)).rounded(offset)


def _candidates(groups: Groups, bits: int, negative: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Scales, with offsets, that reach the largest weights, and shares of them."""
    low, high = float(groups.values[0]), float(groups.values[-1])
    shares = [1.0, *torch.linspace(*SHARES.get(bits, WIDE), STEPS).tolist()]
    if groups.offset:
        bottom, top = groups.x.amin(2), groups.x.amax(2)
        if groups.sunk:
            bottom = bottom.clamp_max(0)
        middle, half = (top + bottom) / 2, (top - bottom) / 2
        spread = [(2 * half * share / (high - low), middle - half * share) for share in shares]
        return [(s, o.clamp_max(0) if groups.sunk else o) for s, o in spread]
    most = groups.x.abs().amax(2)
    if not negative:
        ends = {abs(low), abs(high)}
        shares += [min(ends) / max(ends)]
        return [(most / min(ends) * share, None) for share in shares]
    extreme = groups.x.gather(2, groups.x.abs().argmax(2, keepdim=True))[..., 0]
    return [(extreme / end * share, None) for end in (low, high) for share in shares]


def settled(
    groups: Groups, scale: Store, offset: Store | None, first: Best
) -> tuple[Best, Store, Store | None]:
    """Coded scales and offsets near ``first``, under what is over them, refitted where that helps."""
    best = near(groups, scale, offset, first)
    if scale.factors.over != "float16":
        return best, scale, offset
    for _ in range(ROUNDS):
        scales, offsets = _refitted_overs(groups, scale, offset, best)
        trial = near(groups, scales, offsets, first)
        every = scale.factors.every
        won = _summed(trial.error, every) < _summed(best.error, every)
        if not bool(won.any()):
            break
        each = won.repeat_interleave(every, 1)
        scale = replace(scale, over=torch.where(each, scales.over, scale.over))  # type: ignore[arg-type]
        if offset is not None and offsets is not None:
            offset = replace(offset, over=torch.where(each, offsets.over, offset.over))  # type: ignore[arg-type]
        best.offer(trial.scale, trial.offset, torch.where(each, trial.error, torch.inf))
        best = Best(
            torch.where(each, trial.scale, best.scale),
            None if best.offset is None else torch.where(each, trial.offset, best.offset),  # type: ignore[arg-type]
            torch.where(each, trial.error, best.error),
        )
        first = best
    return best, scale, offset


def _summed(error: Tensor, every: int) -> Tensor:
    """Errors of super-blocks, [rows, n / every]."""
    return error.reshape(len(error), -1, every).sum(2)


def near(groups: Groups, scale: Store, offset: Store | None, first: Best) -> Best:
    """The best of what can be stored around ``first``."""
    found = []
    for rows in _portions(groups.x):
        part, (s, o) = groups.part(rows), (_rows(store, rows) for store in (scale, offset))
        assert s is not None
        at = s.index(first.scale[rows])
        below = None if o is None or first.offset is None else o.index(first.offset[rows])
        best = None
        for step in (0, -1, 1) if o is not None else (0, -1, 1, -2, 2):
            for other in (0, -1, 1) if o is not None else (0,):
                tried = s.number(at + step)
                lower = None if o is None or below is None else o.number(below + other)
                _, error = part.tried(tried, lower)
                if best is None:
                    best = Best(tried, lower, error)
                best.offer(tried, lower, error)
        assert best is not None
        found.append(best)
    return _joined(found)


def _rows(store: Store | None, rows: slice) -> Store | None:
    return store if store is None or store.over is None else replace(store, over=store.over[rows])


def _refitted_overs(
    groups: Groups, scale: Store, offset: Store | None, best: Best
) -> tuple[Store, Store | None]:
    """What is over scales and offsets, by least squares for their codes and those of the weights."""
    parts = [_normal(groups, scale, offset, best, rows) for rows in _portions(groups.x)]
    sums = torch.stack([torch.cat(column) for column in zip(*parts, strict=True)])
    a, b, c, x, y = (_summed(t, scale.factors.every) for t in sums)
    if offset is None:
        return scale.under(torch.where(a > 0, x / a, 0.0).reshape(-1), best.scale), None
    determinant = a * c - b * b
    regular = determinant > 1e-6 * a * c
    first = torch.where(regular, (c * x - b * y) / determinant, torch.where(a > 0, x / a, 0.0))
    second = torch.where(regular, (a * y - b * x) / determinant, 0.0)
    return scale.under(first.reshape(-1), best.scale), offset.under(second.reshape(-1), best.scale)


def _normal(
    groups: Groups, scale: Store, offset: Store | None, best: Best, rows: slice
) -> tuple[Tensor, ...]:
    """Of each group [rows, n] the normal equations of what is over its scale and its offset."""
    part, s, o = groups.part(rows), _rows(scale, rows), _rows(offset, rows)
    at = best.scale[rows]
    lower = None if best.offset is None else best.offset[rows]
    levels, _ = part.tried(at, lower)
    assert s is not None and s.values is not None
    unit = levels * s.values[s.index(at)][..., None]
    heavy = part.weighed(unit)
    a, x = (heavy * unit).sum(2), (heavy * part.x).sum(2)
    if o is None or lower is None or o.values is None:
        return a, torch.zeros_like(a), torch.zeros_like(a), x, torch.zeros_like(a)
    below = o.values[o.index(lower)][..., None].expand(unit.shape)
    c, y = part.weighed(below * below).sum(2), part.weighed(below * part.x).sum(2)
    return a, (heavy * below).sum(2), c, x, y

"""Output-aware scalar quantizers: the format of ``usq`` and ``vq``, fitted to tr(dW H dW^T) instead of the weight's own error.

Codes come from sequential error feedback (GPTQ, in the form that QuIP calls LDLQ and shows to be equal); then least squares for the grid
alternates with coordinate descent over the codes (QuantEase). Inside this file a weight is [G, R, P]: G groups of a grouped
convolution, R inputs in decreasing order of H's diagonal, P outputs; parameters of the grid are [G, P, m], or [1, 1, m] where all
outputs share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.hessian import check_hessian, damped
from aquabit.quant.scalar import LLOYD_ITERATIONS, as_rows, kmeans, uniform
from aquabit.scheme import Scheme

BLOCK = 64  # columns whose feedback is summed one by one; the others hear of them in one product
SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52, 0.46, 0.4)  # of the full range, tried for a first grid
DEVIATIONS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.3, 2.6, 3.0, 3.5, 4.2)  # half ranges tried, in weighted standard deviations
RANGES = (0.95, 1.05)  # of the best of them, tried with error feedback too: every row keeps its best
FEEDS, LEAST_FEED = 6, 3e-3  # fresh feedback on a refitted grid, and the relative improvement below which it stops
ROUNDS, LEAST_ROUND = 8, 1e-3  # refit and descent in turns
POLISHES, LEAST_POLISH = 20, 2e-4  # descent alone, on the grid as stored
REFIT_STEPS, LEAST_STEP = 3, 1e-2  # products with H in a refit; a step that gains less than this share of the first is the last

Encoder = Callable[[Tensor, int], Tensor]  # the levels nearest to targets [G, 1, P] of column j; their codes are written on the way


class State(NamedTuple):
    """Parameters and codes [G, R, P]; each row's loss [G, P]; H dW^T and, where ``Levels.moved`` has it, H codes, both [G, R, P]."""

    parameters: Tensor
    codes: Tensor
    loss: Tensor
    product: Tensor
    moved: Tensor | None


@dataclass(frozen=True)
class Problem:
    """weight [G, R, P] and H [G, R, R], or its diagonal [G, R]; ``order`` [G, R] is each column's place in the stored row."""

    weight: Tensor
    hessian: Tensor
    order: Tensor
    product: Tensor

    def times(self, difference: Tensor) -> Tensor:
        """H dW^T, [G, R, P]."""
        return self.hessian[..., None] * difference if self.hessian.ndim == 2 else self.hessian @ difference

    @property
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


def problem_of(weight: Tensor, hessian: Tensor | None) -> Problem:
    """Rows and H in one order: that of storage, then by decreasing diagonal of H (GPTQ's act-order). An H of zeros is the identity."""
    rows, h = as_rows(weight), check_hessian(hessian, weight)
    h = torch.stack([damped(each, 0.0) for each in h])
    place = torch.arange(rows.shape[1], device=h.device)
    if weight.ndim == 4:
        place = place.reshape(weight.shape[1:]).permute(1, 2, 0).reshape(-1)
    diagonal = (h if h.ndim == 2 else h.diagonal(dim1=1, dim2=2))[:, place]
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    rows_of_h = torch.stack([each[place[o]] for each, o in zip(h, order, strict=True)])
    h = rows_of_h if h.ndim == 2 else rows_of_h.gather(2, place[order][:, None].expand_as(h))
    empty = Problem(rows, h, order, rows)
    columns = empty.ordered(rows.t())
    return Problem(columns, h, order, empty.times(columns))


class Affine:
    """Levels scale * code + offset; parameters [G, P, 2 n]: n scales, then n offsets, one pair for each n-th part of a row."""

    shared, dtype = False, torch.float32

    def __init__(self, part: Tensor, n: int, steps: int):
        self.part, self.n, self.steps = part, n, steps
        self.members = one_hot(part, n).transpose(1, 2).float()  # [G, n, R]

    def spread(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of every column, [G, R, P], or [G, 1, P] where a row has one."""
        g, p, _ = parameters.shape
        pair = parameters.reshape(g, p, 2, self.n).permute(2, 0, 3, 1).float()
        if self.n > 1:
            pair = pair.gather(2, self.part[None, :, :, None].expand(2, g, self.part.shape[1], p))
        return pair[0], pair[1]

    def decode(self, parameters: Tensor, codes: Tensor) -> Tensor:
        scale, offset = self.spread(parameters)
        return torch.addcmul(offset, scale, codes)

    def units(self, parameters: Tensor, values: Tensor) -> Tensor:
        """``values`` in the unit a sweep works in: codes where a row has one scale, so that a level is a rounded number."""
        return values.clone() if self.n > 1 else self._fractions(parameters, values)

    def _fractions(self, parameters: Tensor, values: Tensor) -> Tensor:
        scale, offset = self.spread(parameters)
        return torch.where(scale.abs() > 1e-12, (values - offset) / scale, 0.0)

    def encoder(self, parameters: Tensor, codes: Tensor) -> Encoder:
        found = codes.split(1, 1)
        if self.n == 1:
            return lambda target, j: torch.clamp(target, 0, self.steps, out=found[j]).round_()
        scale, offset = self.spread(parameters)
        inverse = torch.where(scale.abs() > 1e-12, 1 / scale, 0.0)
        s, o, inv, shift = (t.split(1, 1) for t in (scale, offset, inverse, -offset * inverse))

        def encode(target: Tensor, j: int) -> Tensor:
            torch.addcmul(shift[j], target, inv[j], out=found[j]).round_().clamp_(0, self.steps)
            return torch.addcmul(o[j], found[j], s[j])

        return encode

    def nearest(self, parameters: Tensor, target: Tensor) -> Tensor:
        return self._fractions(parameters, target).round_().clamp_(0, self.steps)

    def moved(self, problem: Problem, codes: Tensor) -> Tensor | None:
        """H codes where a row has one scale: then no other product with H is needed (around their middle, for float32's sake)."""
        return problem.times(codes - self.steps / 2) if self.n == 1 else None

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
        h = diagonal[..., None].expand_as(codes)
        b, c = self.gradient(h, codes).split(self.n, 2)
        a = (self.members @ (codes * codes * h)).transpose(1, 2).double()
        determinant = a * c - b * b
        regular = determinant > 1e-6 * a * c

        def solve(r: Tensor) -> Tensor:
            x, y = r.split(self.n, 2)
            scale = torch.where(regular, (c * x - b * y) / determinant, 0.0)
            return torch.cat([scale, torch.where(regular, (a * y - b * x) / determinant, torch.where(c > 0, y / c, 0.0))], 2)

        return solve

    def scaled(self, parameters: Tensor, factor: float) -> Tensor:
        """The same middle, ``factor`` times the range."""
        scale, offset = parameters.split(self.n, 2)
        return halves(torch.cat([scale * factor, offset + scale * (1 - factor) * self.steps / 2], 2))

    def sorted(self, parameters: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return parameters, codes

    def grid(self, weight: Tensor, mass: Tensor) -> Tensor:
        """For each row and part the range of least squared error weighted by ``mass`` [G, R]: of the full range and shares of it
        around its middle, and of multiples of the weighted deviation around the weighted mean (outliers may weigh nothing).
        """
        g, _, p = weight.shape
        index, empty, h = self.part[..., None].expand_as(weight), weight.new_zeros(g, self.n, p), mass[..., None]
        low, high = (empty.scatter_reduce(1, index, weight, r, include_self=False).transpose(1, 2) for r in ("amin", "amax"))
        total, mean, square = ((self.members @ (h * weight**i)).transpose(1, 2) for i in range(3))
        mean, square = torch.where(total > 0, mean / total, 0.0), torch.where(total > 0, square / total, 0.0)
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        full, normal = (
            torch.cat([2 * half / self.steps, m - half], 2) for m, half in (((low + high) / 2, (high - low) / 2), (mean, deviation))
        )
        best, least = halves(full), torch.full_like(low, torch.inf)
        for around, factor in [(full, f) for f in SHARES] + [(normal, f) for f in DEVIATIONS]:
            grid = self.scaled(around, factor)
            error = (self.decode(grid, self.nearest(grid, weight)) - weight).square() * h
            error = (self.members @ error).transpose(1, 2)
            won = error < least
            best, least = torch.where(won.repeat(1, 1, 2), grid, best), torch.where(won, error, least)
        return best


class Table:
    """Levels from a table of K values; parameters [G, P, K], or [1, 1, K] where the tensor shares it."""

    dtype = torch.long

    def __init__(self, k: int, shared: bool):
        self.k, self.shared = k, shared

    def decode(self, parameters: Tensor, codes: Tensor) -> Tensor:
        if self.shared:
            return parameters.float()[0, 0].index_select(0, codes.reshape(-1)).reshape(codes.shape)
        return parameters.float().transpose(1, 2).gather(1, codes)

    def units(self, parameters: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    def encoder(self, parameters: Tensor, codes: Tensor) -> Encoder:
        found, boundaries = codes.split(1, 1), self.boundaries(parameters)

        def encode(target: Tensor, j: int) -> Tensor:
            found[j].copy_(self.search(boundaries, target))
            return self.decode(parameters, found[j])

        return encode

    def nearest(self, parameters: Tensor, target: Tensor) -> Tensor:
        return self.search(self.boundaries(parameters), target).contiguous()

    def boundaries(self, parameters: Tensor) -> Tensor:
        return ((parameters[..., 1:] + parameters[..., :-1]) / 2).contiguous()

    def search(self, boundaries: Tensor, target: Tensor) -> Tensor:
        if self.shared:
            return torch.bucketize(target.contiguous(), boundaries[0, 0])
        return torch.searchsorted(boundaries, target.transpose(1, 2).contiguous()).transpose(1, 2)

    def moved(self, problem: Problem, codes: Tensor) -> None:
        return None

    def image(self, problem: Problem, parameters: Tensor, codes: Tensor, moved: Tensor | None) -> Tensor:
        return problem.times(self.decode(parameters, codes))

    def gradient(self, product: Tensor, codes: Tensor) -> Tensor:
        """Derivative of <decoded, product> by the table; float64, below which float16 tables hide the order of a GPU's additions."""
        g, _, p = codes.shape
        sums = torch.zeros(g, self.k, p, dtype=torch.float64, device=codes.device).scatter_add_(1, codes, product.double())
        return sums.sum((0, 2)).reshape(1, 1, -1) if self.shared else sums.transpose(1, 2)

    def preconditioner(self, diagonal: Tensor, codes: Tensor) -> Callable[[Tensor], Tensor]:
        mass = self.gradient(diagonal[..., None].expand(codes.shape), codes)
        inverse = torch.where(mass > 0, 1 / mass, 0.0)
        return lambda r: r * inverse

    def scaled(self, parameters: Tensor, factor: float) -> Tensor:
        middle = parameters.mean(2, keepdim=True)
        return halves(middle + factor * (parameters - middle))

    def sorted(self, parameters: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest levels are searched for in ascending tables."""
        table, order = parameters.sort(-1)
        return (table, codes) if torch.equal(table, parameters) else (table, self.decode(order.argsort(dim=-1), codes).long())

    def grid(self, weight: Tensor, mass: Tensor) -> Tensor:
        """Centres of a k-means weighted by ``mass`` [G, R]."""
        g, _, p = weight.shape
        tables = (1, 1) if self.shared else (g, p)
        data, mass = (t.transpose(1, 2).reshape(prod(tables), -1) for t in (weight, mass[..., None].expand_as(weight)))
        return halves(weighted_lloyd(data, mass, self.k)).reshape(*tables, self.k)


Levels = Affine | Table


def halves(x: Tensor) -> Tensor:
    return x.float().clamp(-65504.0, 65504.0).half().float()


def feedback_gain(problem: Problem) -> tuple[Tensor | None, Tensor]:
    """A of LDLQ [G, R, R], strictly lower triangular: the target of column j is w_j + A_j dW, with dW of the columns before it.

    H = U D U^T with a unit upper U, and A = U^T - 1: the Cholesky factor of H with its columns reversed. Also D [G, R]: with targets
    t_j the loss is sum_j D_j (t_j - level)^2, so that D, not H's diagonal, is what weighs a column. A is None for a diagonal H.
    """
    h = problem.hessian
    if h.ndim == 2:
        return None, h
    mean = problem.diagonal.mean(1)[:, None, None]
    eye = torch.eye(h.shape[1], device=h.device)
    for jitter in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        factor, info = torch.linalg.cholesky_ex(h.flip(1, 2) + jitter * mean * eye)
        if not bool(info.any()):
            upper = factor.flip(1, 2)
            scale = upper.diagonal(dim1=1, dim2=2)
            return (upper / scale[:, None]).transpose(1, 2).tril(-1).contiguous(), scale.square()
    return torch.zeros_like(h), problem.diagonal


def descent_gain(problem: Problem) -> Tensor:
    """A of coordinate descent: H_jk / H_jj; a sweep never reads its diagonal."""
    return problem.hessian * problem.inverse_diagonal[..., None]


def sweep(target: Tensor, values: Tensor, gain: Tensor, encode: Encoder) -> None:
    """Quantize column by column towards ``target`` = W + A (W - values), [G, R, P], which follows the changes (in place)."""
    size = target.shape[1]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        change = torch.empty_like(target[:, start:stop])
        now, old, new = (t.split(1, 1) for t in (target[:, start:stop], values[:, start:stop], change))
        rows = gain[:, start:stop, start:stop].split(1, 1)
        for i in range(stop - start):
            wanted = torch.baddbmm(now[i], rows[i][..., :i], change[:, :i]) if i else now[i]
            torch.sub(old[i], encode(wanted, start + i), out=new[i])
        if stop < size:
            target[:, stop:].baddbmm_(gain[:, stop:, start:stop], change)


def pooled(levels: Levels, per_row: Tensor) -> Tensor:
    """What is chosen together: [G, P], or [1, 1] where all rows share the grid."""
    return per_row.sum().reshape(1, 1) if levels.shared else per_row


def state_of(problem: Problem, levels: Levels, parameters: Tensor, codes: Tensor) -> State:
    moved = levels.moved(problem, codes)
    product = problem.product - levels.image(problem, parameters, codes, moved)
    return State(parameters, codes, ((problem.weight - levels.decode(parameters, codes)) * product).sum(1), product, moved)


def better(levels: Levels, a: State, b: State) -> State:
    """The one of the smaller loss, row by row where every row has its own grid; ``a`` where they are equal."""
    won = pooled(levels, b.loss) < pooled(levels, a.loss)
    wide, row = won[:, None], won[..., None]
    moved = None if a.moved is None or b.moved is None else torch.where(wide, b.moved, a.moved)
    parameters, loss = torch.where(row, b.parameters, a.parameters), torch.where(won, b.loss, a.loss)
    return State(parameters, torch.where(wide, b.codes, a.codes), loss, torch.where(wide, b.product, a.product), moved)


def refit(problem: Problem, levels: Levels, state: State, steps: int = REFIT_STEPS, least: float = LEAST_STEP) -> Tensor:
    """The grid of least tr(dW H dW^T) for the codes of ``state``, unrounded float64: preconditioned conjugate gradients.

    Two steps are exact for one scale and offset a row, K steps for a table; fewer still only go down.
    """
    parameters, product = state.parameters.double(), state.product
    precondition = levels.preconditioner(problem.diagonal, state.codes)
    direction, first = torch.zeros_like(parameters), 0.0
    start = before = torch.zeros_like(parameters[..., 0])
    for _ in range(steps):
        residual = levels.gradient(product, state.codes)
        z = precondition(residual)
        slope = (residual * z).sum(2)
        start = torch.maximum(start, slope)
        slope = torch.where(slope > 1e-9 * start, slope, 0.0)  # beyond that float32 has only noise to follow
        direction = z + torch.where(before > 0, slope / before, 0.0)[..., None] * direction
        image = levels.image(problem, direction, state.codes, state.moved)
        curvature = pooled(levels, (levels.decode(direction, state.codes) * image).sum(1).double())
        length = torch.where(curvature > 0, slope / curvature, 0.0)
        parameters, product = parameters + length[..., None] * direction, product - length[:, None].float() * image
        gained, before = float((length * slope).sum()), slope
        first = max(first, gained)
        if gained <= least * first:
            break
    return parameters


def refitted(problem: Problem, levels: Levels, state: State) -> State:
    """``state`` on its best grid, as that is stored."""
    grid = halves(refit(problem, levels, state))
    values = levels.decode(grid, state.codes)
    product = problem.product - levels.image(problem, grid, state.codes, state.moved)
    parameters, codes = levels.sorted(grid, state.codes)
    return State(parameters, codes, ((problem.weight - values) * product).sum(1), product, state.moved)


def fed(problem: Problem, levels: Levels, gain: Tensor | None, parameters: Tensor) -> State:
    """Codes by sequential error feedback on a given grid; the nearest levels where H is diagonal."""
    if gain is None:
        return state_of(problem, levels, parameters, levels.nearest(parameters, problem.weight))
    codes, start = torch.zeros_like(problem.weight, dtype=levels.dtype), levels.units(parameters, problem.weight)
    sweep(start.clone(), start, gain, levels.encoder(parameters, codes))
    return state_of(problem, levels, parameters, codes)


def descended(problem: Problem, levels: Levels, gain: Tensor | None, state: State) -> State:
    """Every code in turn the best one given all others: one sweep of coordinate descent (QuantEase)."""
    if gain is None:
        return fed(problem, levels, None, state.parameters)
    values = levels.decode(state.parameters, state.codes)
    target, codes = values + state.product * problem.inverse_diagonal[..., None], torch.zeros_like(state.codes)
    target, values = (levels.units(state.parameters, x) for x in (target, values))
    sweep(target, values, gain, levels.encoder(state.parameters, codes))
    return state_of(problem, levels, state.parameters, codes)


def started(problem: Problem, levels: Levels, gain: Tensor | None, grids: list[Tensor]) -> State:
    """Feedback on each grid, side by side where rows have their own, then each row keeping its best."""
    if levels.shared:
        return reduce(partial(better, levels), (fed(problem, levels, gain, grid) for grid in grids))
    n, p = len(grids), problem.weight.shape[2]
    wide = replace(problem, weight=problem.weight.repeat(1, 1, n), product=problem.product.repeat(1, 1, n))
    state = fed(wide, levels, gain, torch.cat(grids, 1))
    best = state.loss.reshape(-1, n, p).argmin(1) * p + torch.arange(p, device=state.loss.device)  # [G, P]
    grid = state.parameters.gather(1, best[..., None].expand(-1, -1, state.parameters.shape[2]))
    return state_of(problem, levels, grid, state.codes.gather(2, best[:, None].expand_as(problem.weight)))


def fitted(problem: Problem, levels: Levels, plain: State) -> State:
    """Feedback, feedback again on refitted grids, then refit and descent in turns, then descent; never worse than ``plain``."""
    dense = problem.hessian.ndim == 3
    gain, mass = feedback_gain(problem)
    grid = levels.grid(problem.weight, mass)
    grids = [grid, plain.parameters]
    if not levels.shared:
        grids += [levels.scaled(grid, r) for r in RANGES]
    current = best = started(problem, levels, gain, grids)
    for _ in range(FEEDS):
        old = refitted(problem, levels, current)
        current = fed(problem, levels, gain, old.parameters)
        if levels.shared:  # on the same table each row may keep the better codes
            codes = torch.where((current.loss < old.loss)[:, None], current.codes, old.codes)
            current = state_of(problem, levels, old.parameters, codes)
        last, best = best, better(levels, best, current)
        if not improved(last, best, LEAST_FEED):
            break
    gain, current = descent_gain(problem) if dense else None, best
    for _ in range(ROUNDS):
        current = descended(problem, levels, gain, refitted(problem, levels, current))
        last, best = best, better(levels, best, current)
        if not improved(last, best, LEAST_ROUND):
            break
    for _ in range(POLISHES):
        last, best = best, better(levels, best, descended(problem, levels, gain, best))
        if not improved(last, best, LEAST_POLISH):
            break
    return no_worse(problem, levels, best, plain)


def improved(last: State, best: State, least: float) -> bool:
    before, after = float(last.loss.sum()), float(best.loss.sum())
    return before - after > least * before


def no_worse(problem: Problem, levels: Levels, state: State, plain: State) -> State:
    """``plain`` where it is better; in float64 where that is a close call."""
    if bool((pooled(levels, plain.loss) > 1.01 * pooled(levels, state.loss)).all()):
        return state
    wide = replace(problem, hessian=problem.hessian.double())

    def exact(s: State) -> State:
        difference = (problem.weight - levels.decode(s.parameters, s.codes)).double()
        return s._replace(loss=(difference * wide.times(difference)).sum(1))

    return better(levels, exact(plain), exact(state))


def weighted_lloyd(data: Tensor, mass: Tensor, k: int) -> Tensor:
    """Centres [n, k] of a one-dimensional k-means of ``data`` [n, m] whose points weigh ``mass`` [n, m]; see scalar.lloyd."""
    ordered, index = data.double().contiguous().sort(1)
    mass = mass.double().gather(1, index)
    total, first, second = (pad((mass * ordered**i).cumsum(1), (1, 0)) for i in range(3))
    n, m = data.shape
    fraction = ((torch.arange(k, device=data.device, dtype=torch.float64) + 0.5) / k).expand(n, k)
    quantile = torch.searchsorted(total[:, 1:].contiguous(), fraction * total[:, -1:]).clamp_max(m - 1)
    best, least = ordered[:, :1].expand(n, k), torch.full((n, 1), torch.inf, dtype=torch.float64, device=data.device)
    for centres in (ordered.gather(1, quantile), ordered[:, :1] + (ordered[:, -1:] - ordered[:, :1]) * fraction):
        for _ in range(LLOYD_ITERATIONS):
            cuts = torch.searchsorted(ordered, ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous())
            edges = pad(pad(cuts, (1, 0)), (0, 1), value=m)
            weights, sums, squares = (t.gather(1, edges).diff(dim=1) for t in (total, first, second))
            error = (squares - 2 * centres * sums + centres.square() * weights).sum(1, keepdim=True)
            best, least = torch.where(error < least, centres, best), torch.minimum(error, least)
            moved = torch.where(weights > 0, sums / weights, centres).sort(1).values
            if torch.equal(moved, centres):
                break
            centres = moved
    return best.float()


def uniform_with_feedback(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> CodebookWeight:
    """``usq*h``: what ``uniform`` stores, fitted to tr(dW H dW^T).

    ``weight`` [out, in] or [out, in, kh, kw]; ``hessian`` as check_hessian takes it (its errors are raised here), None for the
    identity. Deterministic, and never worse than ``uniform``.
    """
    problem, plain = problem_of(weight, hessian), uniform(weight, scheme)
    assert plain.scale is not None and plain.offset is not None
    (g, row, _), out = problem.weight.shape, weight.shape[0]
    n = plain.scale.numel() // out
    levels = Affine(problem.order // ceil(row / n), n, (1 << scheme.bits) - 1)
    grid = torch.cat([t.float().reshape(g, -1, n) for t in (plain.scale, plain.offset)], 2)
    begin = state_of(problem, levels, grid, problem.ordered(plain.codes[:, 0].float()))
    state = fitted(problem, levels, begin)
    scale, offset = state.parameters.reshape(out, 2, n).unbind(1)
    codes = problem.stored(state.codes).to(torch.int32)[:, None]
    shape = (out,) if n == 1 else (out, n)
    return CodebookWeight.from_codes(codes, None, scale.reshape(shape), offset.reshape(shape), tuple(weight.shape), scheme.bits)


def kmeans_with_feedback(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> CodebookWeight:
    """``vq*h`` and ``vq*ch``: what ``kmeans`` stores, fitted to tr(dW H dW^T); see ``uniform_with_feedback``."""
    problem, plain = problem_of(weight, hessian), kmeans(weight, scheme)
    assert plain.codebooks is not None
    k, shared = 1 << scheme.bits, not scheme.per_channel
    levels, w = Table(k, shared), problem.weight
    tables = (1, 1, k) if shared else (w.shape[0], w.shape[2], k)
    begin = state_of(problem, levels, halves(plain.codebooks).reshape(tables), problem.ordered(plain.codes[:, 0].long()))
    state = fitted(problem, levels, begin)
    codes, books = problem.stored(state.codes).to(torch.int32)[:, None], state.parameters.reshape(-1, 1, k, 1)
    return CodebookWeight.from_codes(codes, books, None, None, tuple(weight.shape), scheme.bits)

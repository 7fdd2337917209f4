"""Output-aware scalar quantizers: codes and levels of ``usq`` and ``vq`` fitted to tr(dW H dW^T) instead of
the weight's own error.

Codes come from sequential error feedback (GPTQ, in the form that QuIP calls LDLQ and shows to be equal); then
least squares for the levels alternates with coordinate descent over the codes (QuantEase). Shapes are those
of ``aquabit.quant.schemes.levels``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor

from aquabit.quant.schemes.levels import Encoder, Levels, Problem, State
from aquabit.quant.schemes.scalar import halves

BLOCK = 64  # columns whose feedback is summed one by one; the others hear of them in one product
RANGES = (0.95, 1.05)  # times the first grid's, tried with error feedback too: every row keeps its best
# fresh feedback on a refitted grid, and the relative improvement below which it stops
FEEDS, LEAST_FEED = (6, 3e-3)
ROUNDS, LEAST_ROUND = 8, 1e-3  # refit and descent in turns
POLISHES, LEAST_POLISH = 20, 2e-4  # descent alone, on the grid as stored
# products with H in a refit; a step that gains less than this share of the first is the last
REFIT_STEPS, LEAST_STEP = (3, 1e-2)


def feedback_gain(problem: Problem) -> tuple[Tensor | None, Tensor]:
    """A of LDLQ [G, R, R], strictly lower triangular: the target of column j is w_j + A_j dW, with dW of the
    columns before it.

    H = U D U^T with a unit upper U, and A = U^T - 1: the Cholesky factor of H with its columns reversed. Also
    D [G, R]: with targets t_j the loss is sum_j D_j (t_j - level)^2, so that D, not H's diagonal, is what
    weighs a column. A is None for a diagonal H.
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
    """Quantize column by column towards ``target`` = W + A (W - values), [G, R, P], which follows the
    changes (in place)."""
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
    return State(
        parameters,
        codes,
        ((problem.weight - levels.decode(parameters, codes)) * product).sum(1),
        product,
        moved,
    )


def better(levels: Levels, a: State, b: State) -> State:
    """The one of the smaller loss, row by row where every row has its own grid; ``a`` where they are
    equal."""
    won = pooled(levels, b.loss) < pooled(levels, a.loss)
    wide, row = won[:, None], won[..., None]
    moved = None if a.moved is None or b.moved is None else torch.where(wide, b.moved, a.moved)
    parameters, loss = torch.where(row, b.parameters, a.parameters), torch.where(won, b.loss, a.loss)
    return State(
        parameters, torch.where(wide, b.codes, a.codes), loss, torch.where(wide, b.product, a.product), moved
    )


def refit(
    problem: Problem, levels: Levels, state: State, steps: int = REFIT_STEPS, least: float = LEAST_STEP
) -> Tensor:
    """The grid of least tr(dW H dW^T) for the codes of ``state``, unrounded float64: preconditioned conjugate
    gradients.

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
        parameters = parameters + length[..., None] * direction
        product = product - length[:, None].float() * image
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
    codes = torch.zeros_like(problem.weight, dtype=levels.dtype)
    start = levels.units(parameters, problem.weight)
    sweep(start.clone(), start, gain, levels.encoder(parameters, codes))
    return state_of(problem, levels, parameters, codes)


def descended(problem: Problem, levels: Levels, gain: Tensor | None, state: State) -> State:
    """Every code in turn the best one given all others: one sweep of coordinate descent (QuantEase)."""
    if gain is None:
        return fed(problem, levels, None, state.parameters)
    values = levels.decode(state.parameters, state.codes)
    target = values + state.product * problem.inverse_diagonal[..., None]
    codes = torch.zeros_like(state.codes)
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
    """Feedback, feedback again on refitted grids, then refit and descent in turns, then descent; never
    worse than ``plain``."""
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
    """``plain`` where it is better. In float64: with a singular H the float32 loss of a fit that errs where
    inputs never are is a difference of large numbers, and may be below 0."""
    wide = replace(problem, hessian=problem.hessian.double())

    def exact(s: State) -> State:
        difference = (problem.weight - levels.decode(s.parameters, s.codes)).double()
        return s._replace(loss=(difference * wide.times(difference)).sum(1))

    return better(levels, exact(plain), exact(state))

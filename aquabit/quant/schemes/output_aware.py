"""Output-aware scalar quantizers: codes and levels of ``usq`` and ``vq`` fitted to tr(dW H dW^T) instead of
the weight's own error.

Codes come from sequential error feedback (GPTQ, in the form that QuIP calls LDLQ and shows to be equal); then
least squares for the levels alternates with coordinate descent over the codes (QuantEase). Shapes are those
of ``aquabit.quant.schemes.levels``; the codes are searched in ``aquabit.kernels.scalar_search``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquabit.kernels.scalar_search import descend, feed
from aquabit.quant.calibration.hessian import COLUMNS, times_wide
from aquabit.quant.schemes.levels import Coded, Levels, Problem, State
from aquabit.quant.sharing import shared

RANGES = (0.95, 1.05)  # times the first grid's, tried with error feedback too: every row keeps its best
# fresh feedback on a refitted grid, and the relative improvement below which it stops
FEEDS, LEAST_FEED = (6, 3e-3)
ROUNDS, LEAST_ROUND = 8, 1e-3  # refit and descent in turns
POLISHES, LEAST_POLISH = 20, 2e-4  # descent alone, on the grid as stored
# products with H in a refit; a step that gains less than this share of the first is the last
REFIT_STEPS, LEAST_STEP = (3, 1e-2)


@shared
def feedback_gain(problem: Problem) -> tuple[Tensor | None, Tensor]:
    """A of LDLQ [G, R, R], strictly lower triangular: the target of column j is w_j + A_j dW, with dW of the
    columns before it.

    H = U D U^T with a unit upper U, and A = U^T - 1: the Cholesky factor of H with its columns reversed. Also
    D [G, R]: with targets t_j the loss is sum_j D_j (t_j - level)^2, so that D, not H's diagonal, is what
    weighs a column. A is None for a diagonal H. Made in float64: a factorisation in float32 depends on the
    number of threads, and what it decides would.
    """
    h = problem.hessian
    if h.ndim == 2:
        return None, h
    mean = problem.diagonal.mean(1, keepdim=True)
    for jitter in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        factor, info = _factor(h, jitter * mean)
        if not bool(info.any()):
            lower = torch.empty_like(h)  # by rows, so that no other copy of H's size is made
            scale = factor.diagonal(dim1=1, dim2=2).float().flip(1)
            total = h.shape[1]
            for start in range(0, total, COLUMNS):
                end = min(start + COLUMNS, total)
                part = factor[:, :, total - end : total - start].float().flip(1, 2)  # columns of U
                lower[:, start:end] = (part / scale[:, None, start:end]).transpose(1, 2)
            return lower.tril_(-1), scale.square()
    return torch.zeros_like(h), problem.diagonal


def _factor(h: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of H + jitter with rows and columns reversed, in float64, and LAPACK's
    info; one copy of H at a time."""
    flipped = torch.empty(h.shape, dtype=torch.float64, device=h.device)
    total = h.shape[1]
    for start in range(0, total, COLUMNS):
        end = min(start + COLUMNS, total)
        flipped[:, start:end] = h[:, total - end : total - start].flip(1, 2)
    flipped.diagonal(dim1=1, dim2=2).add_(jitter)
    columns = flipped.transpose(1, 2)  # LAPACK's own order: nothing is copied where that is a CPU's
    info = torch.empty(len(h), dtype=torch.int32, device=h.device)
    if h.is_cuda:
        return torch.linalg.cholesky_ex(columns)
    factor, info = torch.linalg.cholesky_ex(columns, out=(columns, info))
    return factor, info


def pooled(levels: Levels, per_row: Tensor) -> Tensor:
    """What is chosen together: [G, P], or [1, 1] where all rows share the grid."""
    return per_row.sum().reshape(1, 1) if levels.shared else per_row


def row_losses(difference: Tensor, product: Tensor) -> Tensor:
    return (difference * product).sum(1).double()


def state_of(problem: Problem, levels: Levels, parameters: Tensor, codes: Tensor) -> State:
    moved = levels.moved(problem, codes)
    product = problem.product - levels.image(problem, parameters, codes, moved)
    loss = row_losses(problem.weight - levels.decode(parameters, codes), product)
    return State(parameters, codes, loss, product, moved)


def better(levels: Levels, a: Coded, b: Coded) -> Coded:
    """The one of the smaller loss, row by row where every row has its own grid; ``a`` where they are
    equal."""
    return chosen(pooled(levels, b.loss) < pooled(levels, a.loss), a, b)


def chosen(won: Tensor, a: Coded, b: Coded) -> Coded:
    """``b`` where it has ``won`` [G, P], or [1, 1]."""
    return Coded(
        torch.where(won[..., None], b.parameters, a.parameters),
        torch.where(won[:, None], b.codes, a.codes),
        torch.where(won, b.loss, a.loss),
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
    grid = levels.rounded(refit(problem, levels, state))
    product = problem.product - levels.image(problem, grid, state.codes, state.moved)
    loss = row_losses(problem.weight - levels.decode(grid, state.codes), product)
    parameters, codes = levels.sorted(grid, state.codes)
    return State(parameters, codes, loss, product, state.moved)


def fed(problem: Problem, levels: Levels, gain: Tensor | None, mass: Tensor, parameters: Tensor) -> Coded:
    """Codes by sequential error feedback on a given grid; the nearest levels where H is diagonal."""
    if gain is None:
        codes = levels.nearest(parameters, problem.weight)
        difference = problem.weight - levels.decode(parameters, codes)
        return Coded(parameters, codes, row_losses(difference, problem.times(difference)))
    found = feed(problem.weight, gain, mass, levels.of(parameters))
    return Coded(parameters, found.codes, found.loss)


def descended(problem: Problem, levels: Levels, state: State, sweeps: int = 1, least: float = 0.0) -> State:
    """Every code in turn the best one given all others: sweeps of coordinate descent (QuantEase)."""
    if problem.hessian.ndim == 2:
        return state_of(problem, levels, state.parameters, levels.nearest(state.parameters, problem.weight))
    found = descend(
        state.codes, state.product, state.loss, problem.hessian, levels.of(state.parameters), sweeps, least
    )
    moved = levels.moved_on(state, found.product)
    return State(state.parameters, found.codes, found.loss, found.product, moved)


def fed_again(problem: Problem, levels: Levels, gain: Tensor | None, mass: Tensor, last: Coded) -> Coded:
    """Feedback on the best grid for the codes of ``last``. On a table that all rows share each row may keep
    its codes."""
    state = state_of(problem, levels, last.parameters, last.codes)
    if not levels.shared:
        grid, _ = levels.sorted(levels.rounded(refit(problem, levels, state)), state.codes)
        return fed(problem, levels, gain, mass, grid)
    old = refitted(problem, levels, state)
    fresh = fed(problem, levels, gain, mass, old.parameters)
    won = fresh.loss < old.loss
    codes = torch.where(won[:, None], fresh.codes, old.codes)
    return Coded(fresh.parameters, codes, torch.where(won, fresh.loss, old.loss))


def fitted(problem: Problem, levels: Levels, plain: Tensor, codes: Tensor) -> Coded:
    """Feedback, feedback again on refitted grids, then refit and descent in turns, then descent; never
    worse than the grid ``plain`` with ``codes``."""
    gain, mass = feedback_gain(problem)
    grid = levels.grid(problem.weight, mass)
    grids = [plain]
    if not levels.shared:
        grids += [levels.scaled(grid, r) for r in RANGES]
    best = fed(problem, levels, gain, mass, grid)
    for other in grids:
        best = better(levels, best, fed(problem, levels, gain, mass, other))
    current = best
    for _ in range(FEEDS):
        current = fed_again(problem, levels, gain, mass, current)
        last, best = best, better(levels, best, current)
        if not improved(last, best, LEAST_FEED):
            break
    state = state_of(problem, levels, best.parameters, best.codes)
    best = coded(state)
    for _ in range(ROUNDS):
        state = descended(problem, levels, refitted(problem, levels, state))
        last, best = best, better(levels, best, coded(state))
        if not improved(last, best, LEAST_ROUND):
            break
    state = state_of(problem, levels, best.parameters, best.codes)
    best = coded(descended(problem, levels, state, POLISHES, LEAST_POLISH))
    return no_worse(problem, levels, best, Coded(plain, codes, torch.zeros_like(best.loss)))


def coded(state: State) -> Coded:
    return Coded(*state[:3])


def improved(last: Coded, best: Coded, least: float) -> bool:
    before, after = float(last.loss.sum()), float(best.loss.sum())
    return before - after > least * before


def no_worse(problem: Problem, levels: Levels, fit: Coded, plain: Coded) -> Coded:
    """``plain`` where it is better. In float64: with a singular H the float32 loss of a fit that errs where
    inputs never are is a difference of large numbers, and may be below 0."""
    ours, theirs = ((problem.weight - levels.decode(c.parameters, c.codes)).double() for c in (fit, plain))
    product = times_wide((ours - theirs).transpose(1, 2), problem.hessian).transpose(1, 2)
    lost = ((ours + theirs) * product).sum(1)  # one loss less the other
    return chosen(pooled(levels, lost) < 0, plain, fit)

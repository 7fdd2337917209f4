"""Tables and scales of the additive quantizer given the codes: conjugate gradients without a matrix, and
closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from aquabit.quant.schemes.additive.state import Problem, State

ITERATIONS = 3  # from the last tables; more change the outcome by less than one in a thousand


def fit_tables(problem: Problem, state: State, iterations: int = ITERATIONS) -> Tensor:
    """Least squares for the tables by preconditioned conjugate gradients from where they are; the losses
    tr(dW H dW^T) afterwards, [T].

    The normal operator C -> A^T(s (s A(C)) H) decodes, multiplies by H, and adds up by code; the
    preconditioner is its diagonal block per codeword. Unused codewords have no gradient and stay.
    """
    scale = state.scale[..., None]
    residual, gradient = problem.weight - state.decoded(), state.residual_gradient(problem)
    right = _adjoint(problem, state, gradient * scale)
    inverse = _preconditioner(problem, state)
    z = torch.einsum("tmkij,tmkj->tmki", inverse, right)
    direction, power = z, (right * z).sum(dim=(1, 2, 3))
    for left in reversed(range(iterations)):
        step_rows = state.unscaled(direction) * scale
        by_h = problem.times(step_rows)
        curvature = (step_rows * by_h).reshape(problem.tables, -1).sum(1)
        alpha = torch.where(curvature > 0, power / curvature.clamp_min(1e-30), torch.zeros_like(power))
        state.tables = state.tables + alpha[:, None, None, None] * direction
        by_row = alpha.repeat_interleave(problem.per_table)[:, None, None]
        residual, gradient = residual - by_row * step_rows, gradient - by_row * by_h
        if not left:
            break
        right = _adjoint(problem, state, gradient * scale)
        z = torch.einsum("tmkij,tmkj->tmki", inverse, right)
        renewed = (right * z).sum(dim=(1, 2, 3))
        direction = z + (renewed / power.clamp_min(1e-30))[:, None, None, None] * direction
        power = renewed
    state.gradient = gradient
    return (residual * gradient).reshape(problem.tables, -1).sum(1, dtype=torch.float64)


def _adjoint(problem: Problem, state: State, rows: Tensor) -> Tensor:
    """Rows [Z, O, R] added up by the codes of their groups: [T, M, K, g]."""
    t, m, k, g = state.tables.shape
    out = torch.zeros(m, t * k, g, device=rows.device)
    flat = rows.reshape(-1, g)
    base = (torch.arange(t, device=rows.device) * k)[:, None]
    for i in range(m):
        index = (state.codes[..., i].reshape(t, -1) + base).reshape(-1)
        if rows.is_cuda:  # index_add_ adds in any order there
            out[i].index_put_((index,), flat, accumulate=True)
        else:
            out[i].index_add_(0, index, flat)
    return out.reshape(m, t, k, g).transpose(0, 1)


def _preconditioner(problem: Problem, state: State) -> Tensor:
    """Inverses of sum s^2 H_nn over the groups that use a codeword, [T, M, K, g, g]; zero where none does."""
    t, m, k, g = state.tables.shape
    z, o, n, _ = state.codes.shape
    mass = state.scale.square()[..., None].expand(z, o, n).transpose(1, 2)
    blocks = problem.blocks().reshape(t, -1, g, g)
    eye = torch.eye(g, device=blocks.device)
    found = []
    for i in range(m):
        share = torch.zeros(z, n, k, device=blocks.device).scatter_add_(
            2, state.codes[..., i].transpose(1, 2).contiguous(), mass
        )
        weights = torch.einsum("tbk,tbij->tkij", share.reshape(t, -1, k), blocks)
        trace = weights.diagonal(dim1=2, dim2=3).mean(2)
        used = trace > 0
        safe = weights + (1e-4 * trace + (~used).float())[..., None, None] * eye
        found.append(torch.linalg.inv(safe) * used[..., None, None])
    return torch.stack(found, 1)


def fit_scales(problem: Problem, state: State) -> None:
    """Least squares for each row's scale, which changes by the factor (w H q^T) / (q H q^T) with q the row as
    it is decoded; a row without either keeps its own."""
    decoded, gradient = state.decoded(), state.residual_gradient(problem)
    by_h = problem.weight_by_h - gradient
    over, under = (by_h * problem.weight).sum(2), (by_h * decoded).sum(2)
    usable = under > 1e-20 * under.mean().clamp_min(1e-30)
    factor = torch.where(usable, over / under.clamp_min(1e-30), torch.ones_like(over))
    state.scale = state.scale * factor
    state.gradient = problem.weight_by_h - factor[..., None] * by_h

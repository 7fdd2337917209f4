"""Codes of the additive quantizer: assignment with error feedback, and search on the residual gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquabit.kernels.additive_search import feedback_search, sweep_search
from aquabit.quant.schemes.additive.state import Problem, State

LAZY = 256  # inputs that hear of each other's changes at once; the rest follows once a block
JITTER = 1e-3  # of the mean diagonal: error feedback inverts H, the loss does not see it
SMALL = 1e-30


@dataclass(frozen=True)
class Feedback:
    """What error feedback needs of H, once for a problem: with H^-1 = U^T U the ``coupling`` U [Z, R, R],
    ``inverse`` of its corners U_nn [Z, groups, g, g], and the ``metric`` U_nn^-1 U_nn^-T, in which an
    error counts when later groups make up for it. Without coupling (diagonal H) the metric is H_nn."""

    metric: Tensor
    inverse: Tensor | None = None
    coupling: Tensor | None = None

    @staticmethod
    def of(problem: Problem) -> Feedback:
        size, total = problem.size, problem.weight.shape[2]
        if problem.diagonal:
            return Feedback(problem.blocks())
        upper = _inverse_factor(problem.hessian)
        corners = torch.stack([upper[:, i : i + size, i : i + size] for i in range(0, total, size)], 1)
        inverse = torch.linalg.solve_triangular(
            corners, torch.eye(size, device=upper.device).expand_as(corners), upper=True
        )
        return Feedback(inverse @ inverse.transpose(2, 3), inverse, upper)


def feedback(problem: Problem, state: State, factor: Feedback, beam: int = 1) -> None:
    """Codes group after group in the metric that is left once later groups make up for the error, which they
    then are given.

    GPTQ's update for vectors: with H^-1 = U^T U, group n costs ||(w - q) U_nn^-1||^2, and later inputs move
    by -(w - q) U_nn^-1 U_n,rest.
    """
    state.gradient = None
    if factor.coupling is None or factor.inverse is None:
        state.codes = feedback_search(problem.weight, factor.metric, state.tables, state.scale, beam).codes
        return
    rows, size, total = problem.weight.clone(), problem.size, problem.weight.shape[2]
    span = max(LAZY // size, 1) * size
    for start in range(0, total, span):
        at = slice(start, start + span)
        rest = slice(start + span, None)
        groups = slice(start // size, (start + span) // size)
        inverse, coupling = factor.inverse[:, groups], factor.coupling
        found = feedback_search(
            rows[..., at],
            factor.metric[:, groups],
            state.tables,
            state.scale,
            beam,
            inverse=inverse,
            coupling=coupling[:, at, at],
        )
        state.codes[:, :, groups] = found.codes
        rows[..., rest] -= torch.bmm(found.moved, coupling[:, at, rest])


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with (H + jitter)^-1 = U^T U, [Z, R, R]; jitter grows until the factorisation holds."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    for jitter in (JITTER, 1e-2, 1e-1, 1.0):
        flipped = hessian.flip(1, 2)
        flipped.diagonal(dim1=1, dim2=2).add_(jitter * diagonal.mean(1, keepdim=True).clamp_min(SMALL))
        lower, info = torch.linalg.cholesky_ex(flipped)
        del flipped  # of wide layers each of these is a gigabyte
        if not bool(info.any()):  # H + jitter = V V^T with V upper, and U = V^-1
            upper = lower.flip(1, 2)
            del lower
            eye = torch.eye(hessian.shape[-1], device=hessian.device).expand_as(hessian)
            return torch.linalg.solve_triangular(upper, eye, upper=True)
    return torch.diag_embed(hessian.diagonal(dim1=1, dim2=2).clamp_min(SMALL).rsqrt())


def sweep(problem: Problem, state: State, beam: int = 1) -> float:
    """Search every group's codes once, in order, given all others; the loss tr(dW H dW^T) afterwards. No code
    change raises the loss.

    G = (W - W_hat) H is kept up to date: replacing a group's vector by one that differs by d costs d H_nn d^T
    - 2 d G_n^T.
    """
    decoded, metric = state.decoded(), problem.blocks()
    gradient = state.residual_gradient(problem).clone()
    loss = ((problem.weight - decoded) * gradient).sum(dtype=torch.float64)
    size, total = problem.size, problem.weight.shape[2]
    span = total if problem.diagonal else max(LAZY // size, 1) * size
    for start in range(0, total, span):
        at = slice(start, start + span)
        groups = slice(start // size, (start + span) // size)
        coupling = None if problem.diagonal else problem.hessian[:, at, at]
        found = sweep_search(
            gradient[..., at],
            decoded[..., at],
            state.codes[:, :, groups],
            metric[:, groups],
            state.tables,
            state.scale,
            beam,
            coupling=coupling,
        )
        state.codes[:, :, groups] = found.codes
        loss += found.gain.sum()
        if coupling is None:
            gradient -= found.moved * problem.hessian[:, None]
        else:
            gradient.baddbmm_(found.moved, problem.hessian[:, at], alpha=-1)
    state.gradient = gradient
    return float(loss)

"""Codes of the additive quantizer: assignment with error feedback, and search on the residual gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from aquabit.quant.additive_state import Problem, State

LAZY = 256  # inputs whose gradient is kept up to date within a block; the rest follows once a block
FEEDBACK_LIMIT = 8192  # inputs above which the inverse of H costs more than the sweeps it saves
JITTER = 1e-3  # of the mean diagonal: error feedback inverts H, the loss does not see it
SMALL = 1e-30


def feedback(problem: Problem, state: State, beam: int = 1) -> None:
    """Codes group after group in the metric that is left once later groups make up for the error, which they then are given.

    GPTQ's update for vectors: with H^-1 = U^T U, group n costs ||(w - q) U_nn^-1||^2, and later inputs move by -(w - q) U_nn^-1 U_n,rest.
    """
    if problem.diagonal or problem.weight.shape[2] > FEEDBACK_LIMIT:
        for n in range(problem.groups):
            at = slice(n * problem.size, (n + 1) * problem.size)
            _choose(problem, state, n, _unscaled(problem.weight[..., at], state.scale), problem.block(n), beam, fresh=True)
        return
    upper = _inverse_factor(problem.hessian)
    rows, size, total = problem.weight.clone(), problem.size, problem.weight.shape[2]
    span = max(LAZY // size, 1) * size
    for start in range(0, total, span):
        stop = min(start + span, total)
        errors = torch.zeros_like(rows[..., start:stop])
        for begin in range(start, stop, size):
            at = slice(begin, begin + size)
            inverse = torch.linalg.solve_triangular(upper[:, at, at], torch.eye(size, device=rows.device), upper=True)
            metric = inverse @ inverse.transpose(1, 2)
            chosen = _choose(problem, state, begin // size, _unscaled(rows[..., at], state.scale), metric, beam, fresh=True)
            error = torch.bmm(rows[..., at] - chosen * state.scale[..., None], inverse)
            errors[..., begin - start : begin - start + size] = error
            if begin + size < stop:
                rows[..., begin + size : stop] -= torch.bmm(error, upper[:, at, begin + size : stop])
        if stop < total:
            rows[..., stop:] -= torch.bmm(errors, upper[:, start:stop, stop:])


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with (H + jitter)^-1 = U^T U, [Z, R, R]; jitter grows until the factorisation holds."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(SMALL)
    eye = torch.eye(hessian.shape[-1], device=hessian.device)
    for jitter in (JITTER, 1e-2, 1e-1, 1.0):
        lower, info = torch.linalg.cholesky_ex(hessian + (jitter * mean)[:, None, None] * eye)
        if not bool(info.any()):
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex((inverse + inverse.transpose(1, 2)) / 2, upper=True)
            if not bool(info.any()):
                return upper
    return torch.diag_embed(hessian.diagonal(dim1=1, dim2=2).clamp_min(SMALL).rsqrt())


def _unscaled(rows: Tensor, scale: Tensor) -> Tensor:
    return rows / torch.where(scale.abs() > SMALL, scale, torch.ones_like(scale))[..., None]


def sweep(problem: Problem, state: State, beam: int = 1) -> float:
    """Search every group's codes once, in order, given all others; the loss tr(dW H dW^T) afterwards. No code change raises the loss.

    G = (W - W_hat) H is kept up to date: replacing a group's vector by one that differs by d costs d H_nn d^T - 2 d G_n^T.
    """
    decoded = state.decoded()
    gradient = problem.times(problem.weight - decoded)
    size, total = problem.size, problem.weight.shape[2]
    span = total if problem.diagonal else max(LAZY // size, 1) * size
    for start in range(0, total, span):
        stop = min(start + span, total)
        moved = torch.zeros_like(decoded[..., start:stop])
        for begin in range(start, stop, size):
            at, n = slice(begin, begin + size), begin // size
            block, before = problem.block(n), decoded[..., at]
            old = _unscaled(before, state.scale)
            pull = _unscaled(gradient[..., at], state.scale) + torch.bmm(old, block)
            change = _choose(problem, state, n, pull, block, beam, pulled=True) * state.scale[..., None] - before
            moved[..., begin - start : begin - start + size] = change
            if not problem.diagonal and begin + size < stop:
                gradient[..., begin + size : stop] -= torch.bmm(change, problem.hessian[:, at, begin + size : stop])
        decoded[..., start:stop] += moved
        if stop < total:
            gradient[..., stop:] -= torch.bmm(moved, problem.hessian[:, start:stop, stop:])
    left = problem.weight - decoded
    return float((problem.times(left) * left).sum(dtype=torch.float64))


def _choose(
    problem: Problem, state: State, n: int, target: Tensor, metric: Tensor, beam: int, *, fresh: bool = False, pulled: bool = False
) -> Tensor:  # fmt: skip
    """Codes of group n that minimise c metric c^T - 2 c pull^T over sums c of codewords; their sum [Z, O, g].

    ``target`` is the vector to approach (pull = target metric), or ``pulled`` the pull itself. From the codes there are (unless
    ``fresh``) one codeword after another is replaced by its best; a ``beam`` above 1 also searches from nothing, and the better stays.
    """
    pull = target if pulled else torch.bmm(target, metric)
    tables = [state.of_blocks(m) for m in range(problem.codebooks)]
    own = [(torch.bmm(t, metric) * t).sum(2)[:, None] for t in tables]  # [Z, 1, K]
    codes = state.codes[:, :, n]
    chosen = [_rows(t, codes[..., m]) for m, t in enumerate(tables)]
    if fresh:
        chosen = [torch.zeros_like(pull) for _ in tables]
    total = torch.stack(chosen).sum(0) if len(chosen) > 1 else chosen[0]
    picked = list(codes.unbind(-1))
    for m in range(problem.codebooks):
        others = total - chosen[m]
        left = pull - torch.bmm(others, metric) if problem.codebooks > 1 else pull
        picked[m] = torch.baddbmm(own[m], left, tables[m].transpose(1, 2), alpha=-2).argmin(2)
        chosen[m] = _rows(tables[m], picked[m])
        total = others + chosen[m]
    found = torch.stack(picked, -1)
    if beam > 1:
        found, total = _beam(pull, metric, tables, own, beam, found, total)
    state.codes[:, :, n] = found
    return total


def _rows(table: Tensor, codes: Tensor) -> Tensor:
    """table [Z, K, g] at codes [Z, O]: [Z, O, g]."""
    return table.gather(1, codes[..., None].expand(-1, -1, table.shape[2]))


def _cost(total: Tensor, pull: Tensor, metric: Tensor) -> Tensor:
    return ((torch.bmm(total, metric) - 2 * pull) * total).sum(2)


def _beam(
    pull: Tensor, metric: Tensor, tables: list[Tensor], own: list[Tensor], beam: int, found: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The better, row by row, of ``found`` (its sum ``total``) and the best of ``beam`` partial sums grown codebook by codebook."""
    z, o, g = pull.shape
    sums, value = pull.new_zeros(z, o, 1, g), pull.new_zeros(z, o, 1)
    codes = torch.zeros(z, o, 1, 0, dtype=torch.int64, device=pull.device)
    for m, table in enumerate(tables):
        width, k = sums.shape[2], table.shape[1]
        left = pull[:, :, None] - torch.bmm(sums.reshape(z, o * width, g), metric).reshape(z, o, width, g)
        score = torch.baddbmm(own[m], left.reshape(z, o * width, g), table.transpose(1, 2), alpha=-2).reshape(z, o, width, k)
        score = (score + value[..., None]).reshape(z, o, width * k)
        keep = min(beam if m + 1 < len(tables) else 1, width * k)
        value, at = score.topk(keep, 2, largest=False)
        parent, code = at // k, at % k
        sums = sums.gather(2, parent[..., None].expand(-1, -1, -1, g)) + _rows(table, code.reshape(z, -1)).reshape(z, o, keep, g)
        codes = torch.cat([codes.gather(2, parent[..., None].expand(-1, -1, -1, codes.shape[3])), code[..., None]], 3)
    better = _cost(sums[:, :, 0], pull, metric) < _cost(total, pull, metric)
    return torch.where(better[..., None], codes[:, :, 0], found), torch.where(better[..., None], sums[:, :, 0], total)

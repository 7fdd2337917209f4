"""First tables of the additive quantizer: residual k-means in the metric in which errors will count."""

from __future__ import annotations

import torch
from torch import Tensor

from aquabit.kernels.additive_search import feedback_search
from aquabit.quant.schemes.additive.state import Problem, State

ITERATIONS = 8
ROWS = (
    256  # rows of weights (per set of tables) that k-means looks at, at least; more where codewords are many
)
PER_CODEWORD = 48  # groups a codeword, at least, where there are as many


def initial_tables(problem: Problem, blocks: Tensor, seed: int) -> State:
    """Scales and tables; codes are still zero.

    k-means minimises sum s^2 (w - c)^T B_n (w - c) over the groups of a sample of rows, one codebook after
    another on the residual. ``blocks`` B [Z, groups, g, g] are the metric of ``Feedback``, up to a tenth
    better than H_nn on inputs that are correlated.
    """
    state = start(
        problem,
        torch.zeros(
            problem.tables, problem.codebooks, problem.codewords, problem.size, device=problem.weight.device
        ),
    )
    scale, tables = state.scale, state.tables
    for t in range(problem.tables):
        generator = torch.Generator().manual_seed(seed)  # anew: a weight is fitted as it would be alone
        part = slice(t * problem.per_table, (t + 1) * problem.per_table)
        rows = _sampled(problem, generator).to(scale.device)
        w, s = problem.weight[part, rows], scale[part, rows]
        points = (w / s.clamp_min(1e-30)[..., None]).reshape(
            problem.per_table, len(rows), problem.groups, problem.size
        )
        for m in range(problem.codebooks):
            tables[t, m], points = _kmeans(points, s.square(), blocks[part], problem.codewords, generator)
    return state


def start(problem: Problem, tables: Tensor) -> State:
    """A state with some tables, scales that are the root mean squares of rows, and codes zero."""
    z, o, _ = problem.weight.shape
    codes = torch.zeros(z, o, problem.groups, problem.codebooks, dtype=torch.int64, device=tables.device)
    return State(tables, problem.weight.square().mean(2).sqrt(), codes)


def _sampled(problem: Problem, generator: torch.Generator) -> Tensor:
    rows = problem.weight.shape[1]
    wanted = max(
        ROWS // problem.per_table, PER_CODEWORD * problem.codewords // (problem.groups * problem.per_table), 1
    )
    if wanted < rows:
        return torch.randperm(rows, generator=generator)[:wanted].sort().values
    return torch.arange(rows)


def _kmeans(
    points: Tensor, weight: Tensor, blocks: Tensor, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Centres [k, g] of points [P, O, N, g] weighted by [P, O] in the metric of ``blocks`` [P, N, g, g], and
    what they leave over.

    Points that no centre is needed for (fewer distinct ones than k) leave centres zero. An empty centre moves
    to a point far from its own.
    """
    p, o, n, g = points.shape
    flat = points.transpose(1, 2).reshape(p * n, o, g)  # one metric a row of the batch
    metric, mass = blocks.reshape(p * n, g, g), weight[:, None].expand(p, n, o).reshape(p * n, o)
    centres = _first(flat, k, generator)
    assigned = torch.zeros(p * n, o, dtype=torch.int64, device=points.device)
    by_metric = torch.bmm(flat, metric)  # w H
    eye = torch.eye(g, device=points.device)
    for _ in range(ITERATIONS):
        assigned = _nearest(flat, metric, centres)
        share = torch.zeros(p * n, k, device=points.device).scatter_add_(1, assigned, mass)
        weights = torch.einsum("bk,bij->kij", share, metric)
        sums = torch.zeros(k, g, device=points.device).index_add_(
            0, assigned.reshape(-1), (by_metric * mass[..., None]).reshape(-1, g)
        )
        trace = weights.diagonal(dim1=1, dim2=2).mean(1)
        used = trace > 0
        solved = torch.linalg.solve(
            weights + (1e-6 * trace + (~used).float())[:, None, None] * eye, sums[..., None]
        )[..., 0]
        centres = torch.where(used[:, None], solved, centres)
        empty = torch.nonzero(share.sum(0) == 0)[:, 0]
        if len(empty) and p * n * o >= k:
            _refill(centres, empty, flat, assigned, generator)
    assigned = _nearest(flat, metric, centres)
    counts = torch.bincount(assigned.reshape(-1), minlength=k)
    centres = torch.where(counts[:, None] > 0, centres, torch.zeros_like(centres))
    left = (flat - centres[assigned]).reshape(p, n, o, g).transpose(1, 2)
    return centres, left


def _first(flat: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k points drawn at random; all points and zeros where there are fewer."""
    points = flat.reshape(-1, flat.shape[-1])
    if len(points) <= k:
        return torch.cat([points, points.new_zeros(k - len(points), points.shape[1])])
    return points[torch.randperm(len(points), generator=generator)[:k].to(points.device)].clone()


def _nearest(flat: Tensor, metric: Tensor, centres: Tensor) -> Tensor:
    """Index [B, O] of the nearest centre of each point in its metric, in chunks that bound memory."""
    step, tables = max(1, (1 << 24) // max(1, flat.shape[1] * len(centres))), centres[None, None]
    ones = flat.new_ones(flat.shape[:2])
    parts = [
        feedback_search(flat[i : i + step], metric[i : i + step, None], tables, ones[i : i + step]).codes[
            ..., 0, 0
        ]
        for i in range(0, len(flat), step)
    ]
    return torch.cat(parts)


def _refill(
    centres: Tensor, empty: Tensor, flat: Tensor, assigned: Tensor, generator: torch.Generator
) -> None:
    """Empty centres move onto the points that are farthest from theirs, among a random sample."""
    points, own = flat.reshape(-1, flat.shape[-1]), assigned.reshape(-1)
    sample = torch.randperm(len(points), generator=generator)[: max(4096, 2 * len(empty))].to(points.device)
    far = (
        (points[sample] - centres[own[sample]])
        .square()
        .sum(1)
        .argsort(descending=True, stable=True)[: len(empty)]
    )
    centres[empty[: len(far)]] = points[sample[far]]

"""``usq``: evenly spaced levels, a scale and an offset for each output channel or group of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.schemes.levels import Affine, problem_of
from aquabit.quant.schemes.output_aware import fitted
from aquabit.quant.schemes.progress import Report
from aquabit.quant.schemes.scalar import as_rows, halves
from aquabit.scheme import Scheme

CLIP_STEPS = 24  # shrunken ranges tried per row, from the full range down to CLIP_LEAST of it
CLIP_LEAST = 0.35
CHUNK = 1 << 18  # weights that are fitted together: what is made of them stays in a processor's cache


def fit(
    weights: Sequence[Tensor], scheme: Scheme, hessians: Sequence[Tensor | None], seed: int, report: Report
) -> list[CodebookWeight]:
    """Each weight on its own; with H where the scheme is output-aware."""
    if scheme.output_aware:
        return [uniform_with_feedback(w, scheme, h) for w, h in zip(weights, hessians, strict=True)]
    return [uniform(w, scheme) for w in weights]


def uniform(weight: Tensor, scheme: Scheme) -> CodebookWeight:
    """Affine codes {0 .. 2^b - 1} with a scale and an offset per row, or for each of n = ceil(row /
    ``scheme.group``) groups of inputs.

    Groups are as decoding has them, ceil(row / n) inputs each: where ``scheme.group`` does not divide a row,
    they come out more even. Each range is shrunk towards its middle by the factor, of CLIP_STEPS tried, with
    the least squared error after scale and offset are rounded to float16.
    """
    rows = as_rows(weight)
    out, row = rows.shape
    n = ceil(row / (scheme.group or row))
    size = ceil(row / n)
    padded = pad(rows, (0, n * size - row), value=float("nan")).reshape(out * n, size)
    low = padded.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    high = padded.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    steps = (1 << scheme.bits) - 1
    scale, offset = torch.ones_like(low), torch.zeros_like(low)
    for rows in torch.arange(len(padded), device=padded.device).split(max(1, CHUNK // size)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        ends = low[part], high[part]
        scale[part], offset[part] = _least(padded[part], *ends, steps, padded=n * size > row)
    codes = _codes(padded, scale, offset, steps).nan_to_num().reshape(out, n * size)[:, :row]
    shape = (out,) if n == 1 else (out, n)
    return CodebookWeight.from_codes(
        codes.t().to(torch.int32)[:, None],
        None,
        scale.reshape(shape),
        offset.reshape(shape),
        tuple(weight.shape),
        scheme.bits,
    )


def _least(x: Tensor, low: Tensor, high: Tensor, steps: int, padded: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset [n, 1] with the least squared error among CLIP_STEPS ranges around the middle of x
    [n, size], whose ends are ``low`` and ``high``; where x is ``padded``, with NaN, those do not count."""
    best = torch.full_like(low, torch.inf)
    scale, offset, off = torch.ones_like(low), torch.zeros_like(low), torch.empty_like(x)
    middle = (low + high) / 2
    for shrink in torch.linspace(1.0, CLIP_LEAST, CLIP_STEPS).tolist():
        half = (high - low) / 2 * shrink
        s, o = halves(2 * half / steps), halves(middle - half)
        torch.sub(x, o, out=off).div_(s.clamp_min(1e-12)).round_().clamp_(0, steps).mul_(s).add_(o).sub_(x)
        if padded:
            off.nan_to_num_()
        error = off.square_().sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset


def _codes(x: Tensor, scale: Tensor, offset: Tensor, steps: int) -> Tensor:
    return ((x - offset) / scale.clamp_min(1e-12)).round_().clamp_(0, steps)


def uniform_with_feedback(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> CodebookWeight:
    """``usq*h``: what ``uniform`` stores, fitted to tr(dW H dW^T).

    ``weight`` [out, in] or [out, in, kh, kw]; ``hessian`` as check_hessian takes it (its errors are raised
    here), None for the identity. Deterministic, and never worse than ``uniform``.
    """
    problem, plain = problem_of(weight, hessian), uniform(weight, scheme)
    assert plain.scale is not None and plain.offset is not None
    (g, row, _), out = problem.weight.shape, weight.shape[0]
    n = plain.scale.numel() // out
    levels = Affine(problem.order // ceil(row / n), n, (1 << scheme.bits) - 1)
    grid = torch.cat([t.float().reshape(g, -1, n) for t in (plain.scale, plain.offset)], 2)
    begin = grid, problem.ordered(plain.codes[:, 0].byte())
    state = fitted(problem, levels, *begin)
    scale, offset = state.parameters.reshape(out, 2, n).unbind(1)
    codes = problem.stored(state.codes).to(torch.int32)[:, None]
    shape = (out,) if n == 1 else (out, n)
    return CodebookWeight.from_codes(
        codes, None, scale.reshape(shape), offset.reshape(shape), tuple(weight.shape), scheme.bits
    )

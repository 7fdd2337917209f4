"""``usq``: evenly spaced levels, a scale and an offset for each output channel or group of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.schemes.levels import Affine, problem_of
from aquabit.quant.schemes.output_aware import fitted
from aquabit.quant.schemes.progress import Report
from aquabit.quant.schemes.scalar import FLOAT16_MAX, MOST_GAIN, as_rows, halves, unit_gain
from aquabit.scheme import Scheme

CLIP_STEPS = 24  # shrunken ranges tried per row, from the full range down to CLIP_LEAST of it
CLIP_LEAST = 0.35
SMALLEST = 2.0**-24  # of float16, above 0
CHUNK = 1 << 18  # weights that are fitted together: what is made of them stays in a processor's cache

# scale, offset [n, 1] and codes [n, size] of groups [n, size] between two ends, for so many steps; where they
# are padded, with NaN, those do not count
FitGroups = Callable[[Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor, Tensor]]


def fit(
    weights: Sequence[Tensor], scheme: Scheme, hessians: Sequence[Tensor | None], seed: int, report: Report
) -> list[CodebookWeight]:
    """Each weight on its own; with H where the scheme is output-aware."""
    if scheme.output_aware:
        return [uniform_with_feedback(w, scheme, h) for w, h in zip(weights, hessians, strict=True)]
    return [uniform(w, scheme, gain_one if scheme.unit_gain else least_squares) for w in weights]


def uniform(weight: Tensor, scheme: Scheme, fit_groups: FitGroups) -> CodebookWeight:
    """Affine codes {0 .. 2^b - 1} with a scale and an offset per row, or for each of n = ceil(row /
    ``scheme.group``) groups of inputs, fitted by ``fit_groups``.

    Groups are as decoding has them, ceil(row / n) inputs each: where ``scheme.group`` does not divide a row,
    they come out more even.
    """
    rows = as_rows(weight)
    out, row = rows.shape
    n = ceil(row / (scheme.group or row))
    size = ceil(row / n)
    padded = pad(rows, (0, n * size - row), value=float("nan")).reshape(out * n, size)
    low = padded.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    high = padded.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    scale, offset, codes = torch.ones_like(low), torch.zeros_like(low), torch.empty_like(padded)
    for rows in torch.arange(len(padded), device=padded.device).split(max(1, CHUNK // size)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        ends, steps = (low[part], high[part]), (1 << scheme.bits) - 1
        scale[part], offset[part], codes[part] = fit_groups(padded[part], *ends, steps, n * size > row)
    codes = codes.nan_to_num_().reshape(out, n * size)[:, :row]
    shape = (out,) if n == 1 else (out, n)
    return CodebookWeight.from_codes(
        codes.t().to(torch.int32)[:, None],
        None,
        scale.reshape(shape),
        offset.reshape(shape),
        tuple(weight.shape),
        scheme.bits,
    )


def least_squares(
    x: Tensor, low: Tensor, high: Tensor, steps: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The range, of CLIP_STEPS shrunken around the middle of x, with the least squared error after scale and
    offset are rounded to float16."""
    best = torch.full_like(low, torch.inf)
    scale, offset, off = torch.ones_like(low), torch.zeros_like(low), torch.empty_like(x)
    middle = (low + high) / 2
    for shrink in _shrinks():
        half = (high - low) / 2 * shrink
        s, o = _step(half, steps), halves(middle - half)
        torch.sub(x, o, out=off).div_(s.clamp_min(1e-12)).round_().clamp_(0, steps).mul_(s).add_(o).sub_(x)
        if padded:
            off.nan_to_num_()
        error = off.square_().sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset, _codes(x, scale, offset, steps)


def gain_one(x: Tensor, low: Tensor, high: Tensor, steps: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The range, of CLIP_STEPS shrunken around the middle of x, with the least sum of |x_i - middle| e_i^2
    over its errors e; for its codes, the scale and the offset of gain 1 (``unit_gain``).

    Errors of large weights count more: clipped weights are wrong all in one direction, which outputs add up,
    and rounded ones are not. Least squares alone clips more than images like (benchmarks/datafree.py).
    """
    middle, half = (low + high) / 2, ((high - low) / 2).clamp_min(torch.finfo(x.dtype).tiny)
    unit = (x - middle) / half  # of -1 to 1: squares of small weights are no numbers
    best, share, off = torch.full_like(low, torch.inf), torch.ones_like(low), torch.empty_like(x)
    weight = unit.abs().nan_to_num_()
    for shrink in _shrinks():
        step = 2 * shrink / steps
        torch.add(unit, shrink, out=off).div_(step).round_().clamp_(0, steps).mul_(step).sub_(shrink)
        off.sub_(unit)
        if padded:
            off.nan_to_num_()
        error = off.square_().mul_(weight).sum(1, keepdim=True)
        better = error < best
        best, share = torch.where(better, error, best), torch.where(better, shrink, share)
    half = (high - low) / 2 * share
    scale, offset = _step(half, steps), halves(middle - half)
    codes = _codes(x, scale, offset, steps)
    own_scale, own_offset, holds = unit_gain(x, codes, padded)
    holds &= ((own_scale * steps + own_offset).abs() <= FLOAT16_MAX) & (own_scale <= MOST_GAIN * scale)
    if bool(holds.all()):
        return own_scale, own_offset, codes
    # constant rows, and those of weights that float16 does not tell apart
    plain = least_squares(x, low, high, steps, padded)
    scale, offset, codes = (
        torch.where(holds, a, b) for a, b in zip((own_scale, own_offset, codes), plain, strict=True)
    )
    return scale, offset, codes


def _step(half: Tensor, steps: int) -> Tensor:
    """The scale of levels over a range of twice ``half``, as it is stored: where float16 would make it 0, the
    smallest that it has, and fewer levels are used (rows near 1e-6 at 8 bits)."""
    return torch.where(half > 0, halves(2 * half / steps).clamp_min(SMALLEST), 0.0)


def _shrinks() -> list[float]:
    found: list[float] = torch.linspace(1.0, CLIP_LEAST, CLIP_STEPS).tolist()
    return found


def _codes(x: Tensor, scale: Tensor, offset: Tensor, steps: int) -> Tensor:
    return ((x - offset) / scale.clamp_min(1e-12)).round_().clamp_(0, steps)


def uniform_with_feedback(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> CodebookWeight:
    """``usq*h``: what ``uniform`` stores, fitted to tr(dW H dW^T), from ``least_squares`` on.

    ``weight`` [out, in] or [out, in, kh, kw]; ``hessian`` as check_hessian takes it (its errors are raised
    here), None for the identity. Deterministic, and never worse than what it starts from.
    """
    problem, plain = problem_of(weight, hessian), uniform(weight, scheme, least_squares)
    assert isinstance(plain.scale, Tensor) and isinstance(plain.offset, Tensor)
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

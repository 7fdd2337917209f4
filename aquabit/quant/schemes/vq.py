"""``vq``: levels chosen by k-means, one table for the tensor or, as ``vq*c``, one for each output channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.schemes.levels import Table, problem_of
from aquabit.quant.schemes.output_aware import fitted
from aquabit.quant.schemes.progress import Report
from aquabit.quant.schemes.scalar import FLOAT16_MAX, MOST_GAIN, as_rows, halves, lloyd, unit_gain
from aquabit.scheme import Scheme


def fit(
    weights: Sequence[Tensor], scheme: Scheme, hessians: Sequence[Tensor | None], seed: int, report: Report
) -> list[CodebookWeight]:
    """Each weight on its own; with H where the scheme is output-aware."""
    if scheme.output_aware:
        return [kmeans_with_feedback(w, scheme, h) for w, h in zip(weights, hessians, strict=True)]
    return [kmeans(w, scheme, gain_one=scheme.unit_gain) for w in weights]


def kmeans(weight: Tensor, scheme: Scheme, gain_one: bool) -> CodebookWeight:
    """2^b values chosen by one-dimensional k-means, shared by the tensor or, for ``vq*c``, by an output
    channel.

    ``gain_one``: each table t is spread around its mean to scale * t + offset (``unit_gain``), so that what
    it decodes to is not shrunken, as the means of clusters are; codes stay.
    """
    rows = as_rows(weight)
    data = rows if scheme.per_channel else rows.reshape(1, -1)
    centres = halves(lloyd(data, 1 << scheme.bits)).sort(1).values
    boundaries = (centres[:, 1:] + centres[:, :-1]) / 2
    codes = torch.searchsorted(boundaries.contiguous(), data.contiguous())
    if gain_one:
        scale, offset, holds = unit_gain(data, centres.gather(1, codes))
        spread = scale * centres + offset
        # below what float16 tells apart there is no gain to speak of
        holds &= (spread.abs().amax(1, keepdim=True) <= FLOAT16_MAX) & (scale <= MOST_GAIN)
        centres = torch.where(holds, spread, centres)
    codes = codes.reshape(rows.shape)
    return CodebookWeight.from_codes(
        codes.t().to(torch.int32)[:, None],
        centres[:, None, :, None],
        None,
        None,
        tuple(weight.shape),
        scheme.bits,
    )


def kmeans_with_feedback(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> CodebookWeight:
    """``vq*h`` and ``vq*ch``: what ``kmeans`` stores, fitted to tr(dW H dW^T); see
    ``uniform_with_feedback``."""
    problem, plain = problem_of(weight, hessian), kmeans(weight, scheme, gain_one=False)
    assert plain.codebooks is not None
    k, shared = 1 << scheme.bits, not scheme.per_channel
    levels, w = Table(k, shared), problem.weight
    tables = (1, 1, k) if shared else (w.shape[0], w.shape[2], k)
    begin = plain.codebooks.float().reshape(tables), problem.ordered(plain.codes[:, 0].byte())
    state = fitted(problem, levels, *begin)
    codes, books = problem.stored(state.codes).to(torch.int32)[:, None], state.parameters.reshape(-1, 1, k, 1)
    return CodebookWeight.from_codes(codes, books, None, None, tuple(weight.shape), scheme.bits)

"""Scalar quantizers: uniform (USQ) per output channel or group, and k-means (VQ) over the tensor or per
output channel."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from aquabit.kernels.codebook import CodebookWeight
from aquabit.scheme import AquabitError, Scheme

CLIP_STEPS = 24  # shrunken ranges tried per row, from the full range down to CLIP_LEAST of it
CLIP_LEAST = 0.35
LLOYD_ITERATIONS = 60


def as_rows(weight: Tensor) -> Tensor:
    """A weight as [out, row] float32: a Linear as it is, a convolution in the order (kh, kw, cin), cin
    fastest."""
    if weight.ndim not in (2, 4):
        raise AquabitError(
            f"a weight has shape {list(weight.shape)}; it must be [out, in] or [out, in, kh, kw]"
        )
    wide = weight.detach().float()
    return wide if weight.ndim == 2 else wide.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


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
    best = torch.full_like(low, torch.inf)
    scale, offset = torch.ones_like(low), torch.zeros_like(low)
    for shrink in torch.linspace(1.0, CLIP_LEAST, CLIP_STEPS).tolist():
        middle, half = (low + high) / 2, (high - low) / 2 * shrink
        s, o = halves(2 * half / steps), halves(middle - half)
        error = (_codes(padded, s, o, steps) * s + o - padded).nan_to_num().square().sum(1, keepdim=True)
        better = error < best
        best, scale, offset = (
            torch.where(better, error, best),
            torch.where(better, s, scale),
            torch.where(better, o, offset),
        )
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


def halves(x: Tensor) -> Tensor:
    """Rounded to float16 as it is stored, the largest finite one where that is exceeded; float32."""
    return x.float().clamp(-65504.0, 65504.0).half().float()


def _codes(x: Tensor, scale: Tensor, offset: Tensor, steps: int) -> Tensor:
    return ((x - offset) / scale.clamp_min(1e-12)).round_().clamp_(0, steps)


def kmeans(weight: Tensor, scheme: Scheme) -> CodebookWeight:
    """2^b values chosen by one-dimensional k-means, shared by the tensor or, for ``vq*c``, by an output
    channel."""
    rows = as_rows(weight)
    data = rows if scheme.per_channel else rows.reshape(1, -1)
    centres = halves(lloyd(data, 1 << scheme.bits)).sort(1).values
    boundaries = (centres[:, 1:] + centres[:, :-1]) / 2
    codes = torch.searchsorted(boundaries.contiguous(), data.contiguous()).reshape(rows.shape)
    return CodebookWeight.from_codes(
        codes.t().to(torch.int32)[:, None],
        centres[:, None, :, None],
        None,
        None,
        tuple(weight.shape),
        scheme.bits,
    )


def lloyd(data: Tensor, k: int, mass: Tensor | None = None) -> Tensor:
    """Centres [n, k] of a one-dimensional k-means per row of ``data`` [n, m], from quantiles and from an even
    grid, the better kept.

    Points weigh ``mass`` [n, m], one each where it is None. On sorted values a cluster is an interval, so an
    iteration costs k binary searches in prefix sums (float64), not n * m * k.
    """
    ordered, index = data.contiguous().sort(1)
    ordered = ordered.double()
    weights = torch.ones_like(ordered) if mass is None else mass.double().gather(1, index)
    total, first, second = (pad((weights * ordered**i).cumsum(1), (1, 0)) for i in range(3))
    n, m = data.shape
    fraction = ((torch.arange(k, device=data.device, dtype=torch.float64) + 0.5) / k).expand(n, k)
    at = torch.searchsorted(total[:, 1:].contiguous(), fraction * total[:, -1:], right=True).clamp_max(m - 1)
    results = []
    for centres in (ordered.gather(1, at), ordered[:, :1] + (ordered[:, -1:] - ordered[:, :1]) * fraction):
        for _ in range(LLOYD_ITERATIONS):
            cuts = torch.searchsorted(ordered, ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous())
            edges = pad(pad(cuts, (1, 0)), (0, 1), value=m)
            masses, sums, squares = (t.gather(1, edges).diff(dim=1) for t in (total, first, second))
            moved = torch.where(masses > 0, sums / masses, centres).sort(1).values
            if torch.equal(moved, centres):
                break
            centres = moved
        error = (squares - 2 * centres * sums + centres.square() * masses).sum(1, keepdim=True)
        results.append((centres, error))
    (a, error_a), (b, error_b) = results
    return torch.where(error_a <= error_b, a, b).float()

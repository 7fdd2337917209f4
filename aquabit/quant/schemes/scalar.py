"""What scalar quantizers share: rows, float16 rounding, gain 1 and one-dimensional k-means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from aquabit.scheme import AquabitError

LLOYD_ITERATIONS = 60
FLOAT16_MAX = 65504.0
MOST_GAIN = 2.0  # that levels are spread by; more is asked for only where float16 does not tell weights apart


def as_rows(weight: Tensor, order: str = "inputs") -> Tensor:
    """A weight as [out, row] float32: a Linear as it is, a convolution in the order (kh, kw, cin), cin
    fastest, or, "flat", as it is too."""
    if weight.ndim not in (2, 4):
        raise AquabitError(
            f"a weight has shape {list(weight.shape)}; it must be [out, in] or [out, in, kh, kw]"
        )
    wide = weight.detach().float()
    return (
        wide.flatten(1)
        if weight.ndim == 2 or order == "flat"
        else wide.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    )


def halves(x: Tensor) -> Tensor:
    """Rounded to float16 as it is stored, the largest finite one where that is exceeded; float32."""
    return x.float().clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()


def unit_gain(x: Tensor, y: Tensor, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset [n, 1] with which q = scale * y + offset of each row has the mean of x and gain 1,
    cov(x, q) = var(x), and where there are such [n, 1]; x, y [n, m], ``padded`` with NaN where nothing
    counts.

    scale = var(x) / cov(x, y), offset = mean(x) - scale * mean(y), both as float16 stores them. It is the
    regression of y on x turned around: q - x is uncorrelated with x, where a least squares q is shrunken, by
    the squared correlation of x and y.
    """
    mean, level = ((t.nanmean if padded else t.mean)(1, keepdim=True) for t in (x, y))
    around, other = x - mean, y - level
    if padded:
        around, other = around.nan_to_num_(), other.nan_to_num_()
    covariance = other.mul_(around).sum(1, keepdim=True)
    variance = around.square_().sum(1, keepdim=True)
    scale = halves(variance / covariance)
    offset = halves(mean - scale * level)
    # a constant row has none (0 / 0), and what is beyond float16 is not stored
    holds = (scale > 0) & (scale < FLOAT16_MAX) & (offset.abs() < FLOAT16_MAX)
    return scale, offset, holds


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

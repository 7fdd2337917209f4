"""Second moments of a layer's input (H): their form, their checks, and the output error they measure.

H belongs to a weight as ``weight.flatten(1)`` sees its inputs: [R, R] with R = in, or (cin / groups) * kh *
kw in that order; one per group of a grouped convolution, [groups, R, R]; or its diagonal alone, [R]. With dW
= W - W_hat the expected squared output error is tr(dW H dW^T) (AQLM, eq. 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquabit.quant.sharing import shared
from aquabit.scheme import AquabitError

DAMPING = 0.01  # of the mean diagonal, added to the diagonal of measured moments (GPTQ, section 3.3)
COLUMNS = 1024  # of H that are in float64 at a time
SQUARES = 2.0**40  # mean diagonals beyond, or below its inverse, are scaled: their products end float32
TOLERANCE = 1e-4  # an eigenvalue more negative than this share of the largest is no rounding error


def check_hessian(hessian: Tensor | None, weight: Tensor, definite: bool = True) -> Tensor:
    """H as float32 [groups, R, R], or [groups, R] for a diagonal or no H at all (identity); symmetrised.

    Rounding noise is lifted to positive semi-definite, unless ``conditioned`` has seen to that (``definite``
    False): of a wide layer a factorisation takes seconds. Raises AquabitError for NaN, a wrong shape,
    negative diagonal entries or a matrix that is not positive semi-definite.
    """
    if hessian is None:
        return torch.ones(1, weight[0].numel(), device=weight.device)
    h = _checked(hessian, weight)
    return _semi_definite(h) if definite and h.ndim == 3 else h


@shared
def _checked(hessian: Tensor, weight: Tensor) -> Tensor:
    """What ``check_hessian`` says of one that need not be definite."""
    row = weight[0].numel()
    h = hessian.detach().to(weight.device, torch.float32)
    if h.ndim not in (1, 2, 3) or any(n != row for n in h.shape[-2:] if h.ndim > 1) or h.shape[-1] != row:
        raise AquabitError(
            f"H is {list(hessian.shape)}; a weight {list(weight.shape)} needs [{row}, {row}] or its diagonal"
            f" [{row}]"
        )
    h = h[None] if h.ndim < 3 else h
    if weight.shape[0] % len(h):
        raise AquabitError(
            f"H has {len(h)} groups, which do not divide the {weight.shape[0]} outputs of a weight"
            f" {list(weight.shape)}"
        )
    bad = int((~torch.isfinite(h)).sum())
    if bad:
        raise AquabitError(
            f"{bad} of {h.numel()} entries of H are not finite; a calibration input overflowed or holds NaN"
        )
    diagonal = h if hessian.ndim == 1 else h.diagonal(dim1=1, dim2=2)
    if float(diagonal.min()) < 0:
        raise AquabitError(
            f"H has a negative diagonal entry ({float(diagonal.min()):.3g}); second moments are never"
            " negative"
        )
    return h if hessian.ndim == 1 else _symmetric(h)


def _symmetric(h: Tensor) -> Tensor:
    """H itself where it is: of a wide layer each copy is a gigabyte."""
    return h if torch.equal(h, h.transpose(1, 2)) else (h + h.transpose(1, 2)).mul_(0.5)


def _raised(h: Tensor, by: Tensor) -> Tensor:
    """A copy of H [G, R, R] with ``by`` [G, 1] added to the diagonal."""
    raised = h.clone()
    raised.diagonal(dim1=1, dim2=2).add_(by)
    return raised


@shared
def _semi_definite(h: Tensor) -> Tensor:
    mean = h.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    if not float(mean.max()) or bool((torch.linalg.cholesky_ex(_raised(h, 1e-6 * mean)).info == 0).all()):
        return h
    values = torch.linalg.eigvalsh(h.double())
    low, high = float(values.min()), float(values.max())
    if low < -TOLERANCE * high:
        raise AquabitError(
            f"H is not positive semi-definite: its smallest eigenvalue is {low:.3g}, its largest {high:.3g}"
        )
    return _raised(h, 1e-6 * mean - values.min(1, keepdim=True).values.clamp_max(0).float() * 1.01)


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """H with ``damping`` times its mean diagonal added to the diagonal; H of inputs that are all zero
    becomes the identity."""
    if hessian.ndim == 1:
        mean = hessian.mean()
        return hessian + damping * mean if float(mean) > 0 else torch.ones_like(hessian)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    out = hessian.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(
        torch.where(mean > 0, damping * mean, torch.ones_like(mean)).expand_as(diagonal)
    )
    return out


@shared
def conditioned(hessian: Tensor, weight: Tensor) -> Tensor:
    """H as a weight can be fitted to it: damped as measured moments are where its smallest eigenvalue is less
    than half of that, and of a mean diagonal that float32 squares. Any other H is returned as it is.

    Where inputs never are, H asks nothing of the weight, and a fit to it alone puts errors there that are any
    number of times the weight: 10^11 times with H of rank 1, against 1.2 to 3 times of damped ones
    (tests/quant/test_weights.py). Raises AquabitError as ``check_hessian``.
    """
    h = check_hessian(hessian, weight, definite=False)
    diagonal = h if hessian.ndim == 1 else h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    far = (mean > 0) & ((mean < 1 / SQUARES) | (mean > SQUARES))
    scale = torch.where(far, torch.exp2(-torch.log2(mean.clamp_min(1e-38)).round()), 1.0)
    weak = (diagonal.amin(-1) < DAMPING / 2 * mean) | (mean == 0)
    if hessian.ndim > 1 and not bool((weak | far).any()):
        # damped moments pass in float32; what does not is looked at again
        weak = torch.linalg.cholesky_ex(_raised(h, -DAMPING / 2 * mean[:, None])).info > 0
    if not bool((weak | far).any()):
        return hessian
    if hessian.ndim > 1:
        h = check_hessian(hessian, weight)
        lowered = (h * (1 / mean.clamp_min(1e-38))[:, None, None]).double()
        lowered.diagonal(dim1=-2, dim2=-1).sub_(DAMPING / 2)
        weak = (torch.linalg.cholesky_ex(lowered).info > 0) | (mean == 0)
        if not bool((weak | far).any()):
            return hessian
    each = [damped(one * s) if bad else one * s for one, s, bad in zip(h, scale, weak, strict=True)]
    return each[0] if hessian.ndim < 3 else torch.stack(each)


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor | None = None) -> float:
    """tr(dW H dW^T) / tr(W H W^T), the relative squared output error (relative weight error without H); in
    float64."""
    h = check_hessian(hessian, weight)
    rows = weight.detach().double().reshape(len(h), -1, weight[0].numel())
    difference = rows - decoded.detach().to(weight.device).double().reshape(rows.shape)
    error, norm = _moment(difference, h), _own_moment(weight, h)
    return float(error / norm) if float(norm) > 0 else 0.0


@shared
def _own_moment(weight: Tensor, hessian: Tensor) -> Tensor:
    """tr(W H W^T), a scalar in float64."""
    return _moment(weight.detach().double().reshape(len(hessian), -1, weight[0].numel()), hessian)


def _moment(rows: Tensor, hessian: Tensor) -> Tensor:
    return (times_wide(rows, hessian) * rows).sum()


def times_wide(rows: Tensor, hessian: Tensor) -> Tensor:
    """float64 rows [G, P, R] times a symmetric float32 H [G, R, R] or [G, R], which is never held in float64
    whole."""
    if hessian.ndim == 2:
        return rows * hessian[:, None].double()
    parts = hessian.split(COLUMNS, dim=2)
    return torch.cat([rows @ part.double() for part in parts], 2)

"""quantize_weight: one weight, one scheme, one CodebookWeight; quantize_weights: several of one shape
together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aquabit.deployed_kinds import DEPLOYED
from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.calibration.hessian import conditioned
from aquabit.quant.schemes import aq, deployed, usq, vq
from aquabit.quant.schemes.progress import Report, no_report
from aquabit.quant.schemes.scalar import FLOAT16_MAX
from aquabit.scheme import FP, AquabitError, Scheme

# weights of one shape, scheme, H, seed, report
FitWeights = Callable[[Sequence[Tensor], Scheme, Sequence[Tensor | None], int, Report], list[CodebookWeight]]
OTHERS: dict[str, FitWeights] = {kind.name: deployed.fit for kind in DEPLOYED}
FITS: dict[str, FitWeights] = {"usq": usq.fit, "vq": vq.fit, "aq": aq.fit, **OTHERS}  # every kind but ``fp``


def quantize_weight(
    weight: Tensor, scheme: str | Scheme, hessian: Tensor | None = None, seed: int = 0
) -> CodebookWeight:
    """Fit ``scheme`` to a weight [out, in] or [out, in, kh, kw].

    ``usq`` and ``vq`` have gain 1, cov(w, q) = var(w) in each row, group or table, where least squares would
    shrink the weight; at 8 bits they minimise its squared error. ``usq3h``, ``vq3h`` and ``aq`` minimise the
    output error tr(dW H dW^T) with ``hessian``, the second moments of the layer's input: [R, R] over
    ``weight.flatten(1)``, [groups, R, R] for a grouped convolution, or a diagonal [R]. ``aq`` takes the
    identity where none is given. H that leaves some inputs out, of rank 1 for instance, is damped as measured
    moments are, so that no weights become many times too large. Only ``aq`` draws from ``seed``. Raises
    AquabitError for weights or H that are not finite, H of the wrong shape or not positive semi-definite,
    ``h`` schemes without H, and H for a scheme that does not use it.
    """
    parsed = Scheme.parse(scheme)
    if parsed.shared:
        raise AquabitError(
            f"scheme {parsed} shares its codebooks: fit the layers together with quantize_weights, or name"
            f" {str(parsed)[:-1]}"
        )
    return quantize_weights([weight], parsed, [hessian], seed)[0]


def quantize_weights(
    weights: Sequence[Tensor],
    scheme: str | Scheme,
    hessians: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    report: Report = no_report,
) -> list[CodebookWeight]:
    """``quantize_weight`` for weights of one shape, together; where the scheme shares codebooks, all hold the
    same tensor.

    ``report`` hears of every step of an additive fit.
    """
    parsed, moments = Scheme.parse(scheme), list(hessians or [None] * len(weights))
    if parsed == FP:
        raise AquabitError("scheme fp stores the weight as it is; there is nothing to fit")
    for weight, hessian in zip(weights, moments, strict=True):
        _check(weight, parsed, hessian)
    moments = [None if h is None else conditioned(h, w) for w, h in zip(weights, moments, strict=True)]
    return FITS[parsed.kind](weights, parsed, moments, seed, report)


def _check(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> None:
    if weight.ndim not in (2, 4) or not weight.numel() or not weight.is_floating_point():
        raise AquabitError(
            f"the weight is {weight.dtype} {list(weight.shape)}; it must be a floating-point tensor [out, in]"
            " or [out, in, kh, kw], each at least 1"
        )
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise AquabitError(
            f"{bad} of {weight.numel()} weights are not finite (NaN or Inf); the model file is damaged or"
            " overflowed"
        )
    largest = float(weight.abs().max())
    if largest > FLOAT16_MAX:
        raise AquabitError(
            f"weights reach {largest:.4g}; what is stored are floats of 16 bits, which end at"
            f" {FLOAT16_MAX:.0f}: leave the layer at fp"
        )
    if scheme.output_aware and hessian is None:
        raise AquabitError(
            f"scheme {scheme} is fitted with H, and none is given; give hessian=, or name {str(scheme)[:-1]}"
        )
    if not scheme.calibrated and hessian is not None:
        raise AquabitError(
            f"scheme {scheme} is fitted to the weight alone and would ignore H; name {scheme}h to use it"
        )


def vanished(weight: Tensor, coded: CodebookWeight) -> int:
    """Outputs whose weights, not all zero, were too small for scales of 16 bits, and are zero now."""
    rows = weight.detach().flatten(1).abs().amax(1) > 0
    stored = coded.dequantize().flatten(1).abs().amax(1) > 0
    return int((rows & ~stored.to(rows.device)).sum())


def relative_error(weight: Tensor, coded: CodebookWeight) -> float:
    """Squared error of the decoded weight over the weight's squared norm."""
    wide = weight.detach().double()
    norm = float(wide.square().sum())
    error = float((coded.dequantize().double() - wide).square().sum())
    return error / norm if norm else 0.0

"""quantize_weight: one weight, one scheme, one CodebookWeight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.scalar import kmeans, uniform
from aquabit.scheme import AquabitError, Scheme

QUANTIZERS: dict[str, Callable[[Tensor, Scheme], CodebookWeight]] = {"usq": uniform, "vq": kmeans}


def quantize_weight(weight: Tensor, scheme: str | Scheme, hessian: Tensor | None = None, seed: int = 0) -> CodebookWeight:
    """Fit ``scheme`` to a weight [out, in] or [out, in, kh, kw].

    The scalar quantizers are deterministic and minimise the weight's squared error; ``hessian`` and ``seed`` belong to the output-aware
    schemes. Raises AquabitError for a weight that is not finite, and for schemes that this version cannot fit.
    """
    parsed = Scheme.parse(scheme)
    if parsed.kind not in QUANTIZERS or parsed.output_aware or hessian is not None:
        raise AquabitError(f"scheme {parsed} cannot be fitted yet: additive and output-aware quantizers arrive later; usq and vq are here")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise AquabitError(f"{bad} of {weight.numel()} weights are not finite (NaN or Inf); the model file is damaged or overflowed")
    return QUANTIZERS[parsed.kind](weight, parsed)


def relative_error(weight: Tensor, coded: CodebookWeight) -> float:
    """Squared error of the decoded weight over the weight's squared norm."""
    wide = weight.detach().double()
    norm = float(wide.square().sum())
    error = float((coded.dequantize().double() - wide).square().sum())
    return error / norm if norm else 0.0

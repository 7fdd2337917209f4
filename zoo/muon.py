"""Muon in float32."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Newton-Schulz (Keller Jordan's Muon), as torch has them
NEWTON_SCHULZ_STEPS = 5


class Float32Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` (Nesterov, no weight decay, ``match_rms_adamw``) for matrices, with products in
    float32, all matrices of a shape at once: on a processor without instructions for bfloat16 torch's own
    takes three times as long as the rest of a training step."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            updates = defaultdict[torch.Size, list[tuple[nn.Parameter, Tensor]]](list)
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                updates[parameter.shape].append((parameter, parameter.grad.lerp(momentum, MOMENTUM)))
            for shape, pairs in updates.items():
                turned = orthogonal(torch.stack([update for _, update in pairs]))
                for (parameter, _), update in zip(pairs, turned, strict=True):
                    parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with all singular values near 1."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x

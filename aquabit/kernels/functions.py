"""Activation functions that kernels apply to what a layer reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

GATED = 8  # of codes: inputs are values and, behind them, as many gates


class Function(NamedTuple):
    """``code`` as the extension knows it (native/decode/types.h), and the same in torch."""

    code: int
    curve: Callable[[Tensor], Tensor]

    @property
    def gated(self) -> bool:
        return bool(self.code & GATED)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., n], or [..., 2 n] where it is gated: [..., n]."""
        if not self.gated:
            return self.curve(x)
        values, gates = x.chunk(2, -1)
        return values * self.curve(gates)


def _quick(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


def _tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


GELU, GELU_TANH = Function(1, functional.gelu), Function(2, _tanh)
SILU, QUICK_GELU = Function(3, functional.silu), Function(4, _quick)
GEGLU, SWIGLU = Function(GATED | 1, functional.gelu), Function(GATED | 3, functional.silu)

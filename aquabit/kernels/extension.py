"""The C++ extension, or None where it was not built. Modules take it from here, not from the package, which
imports them."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Literal

from torch import Tensor, float32  # before the extension: one libgomp then serves both

from aquabit.errors import AquabitError

INSTRUCTIONS = (
    "amx",
    "avx512vnni",
    "avx512",
    "avxvnni",
    "avx2",
    "baseline",
)  # that kernels are compiled for, best first
if (_most := os.environ.get("AQUABIT_INSTRUCTIONS", "")) and _most not in INSTRUCTIONS:
    raise AquabitError(
        f"AQUABIT_INSTRUCTIONS={_most!r} is unknown; the best that kernels may use is one of"
        f" {', '.join(INSTRUCTIONS)}"
    )

native: Any = None
why_not = ""  # it is not there
try:
    native = import_module("aquabit.kernels._native")
except ImportError as error:
    why_not = str(error)


def chosen(backend: str | None, missing: str | None) -> Literal["native", "reference"]:
    """Which of a search's two forms serves: ``backend``, or the extension where nothing is ``missing`` for
    it. Raises AquabitError for an unknown one, and for the extension where it cannot."""
    if backend not in (None, "native", "reference"):
        raise AquabitError(f"{backend=} is unknown; there are 'native' and 'reference'")
    if backend == "native" and missing:
        raise AquabitError(f"the native code search {missing}; backend='reference' serves any tensor")
    return "reference" if backend == "reference" or missing else "native"


def plain(x: Tensor) -> Tensor:
    """Float32 values in a row, as the extension reads them by their address: ``x`` itself where it is so."""
    if x.dtype != float32:
        x = x.float()
    return x if x.is_contiguous() else x.contiguous()


def plain_bias(bias: Tensor | None, outputs: int) -> Tensor | None:
    """A bias as the extension reads it, which is given its address only. Raises AquabitError for one of
    another number of outputs."""
    if bias is not None and bias.shape != (outputs,):
        raise AquabitError(f"bias is {list(bias.shape)}; a weight of {outputs} outputs needs [{outputs}]")
    return None if bias is None else plain(bias)

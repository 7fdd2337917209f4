"""Raw: a kernel's call for one weight and one shape of input, by addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

Run: TypeAlias = Callable[
    [int, int, int], bool
]  # addresses of x, the result, and a bias or 0; whether it was done


class Raw(NamedTuple):
    """``run`` reads values in a row and writes such, of float32, or of bfloat16 (the bias too) where it is
    ``narrow``. ``rounds``: it rounds the activations itself. ``follows``: the result of an image in
    channels_last is so, too. ``reading`` makes ``run`` of inputs that a function of the code is applied to
    first."""

    run: Run
    rounds: bool
    narrow: bool = False
    follows: bool = False
    reading: Callable[[int], Run] | None = None

"""Numbers of weights: torch operators take numbers and tensors, so a weight that kernels read has a number,
by which an operator finds it when it runs. What is compiled takes the number as a tensor (``handle``): a
plain one would be part of the program, which would serve that weight only, and no layer like it."""

from __future__ import annotations

from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

from aquabit.errors import AquabitError

_Weight = TypeVar("_Weight")
_by_number: WeakValueDictionary[int, Any] = WeakValueDictionary()
_count = count()


def numbered(weight: _Weight) -> _Weight:
    """``weight`` with a number of its own, as its attributes ``number`` and ``handle``, int64 of no
    dimensions on the CPU (a copy may come with those of its original). Weights are frozen; their numbers are
    no part of what they are."""
    if _by_number.get(getattr(weight, "number", -1)) is not weight:
        number = next(_count)
        object.__setattr__(weight, "number", number)
        object.__setattr__(weight, "handle", torch.tensor(number, device="cpu"))
        _by_number[number] = weight
    return weight


def weight_at(number: int) -> Any:
    """The weight of that number; raises AquabitError where it is gone."""
    weight = _by_number.get(number)
    if weight is None:
        raise AquabitError(
            f"there is no weight with the number {number}: it was freed; keep it while it runs"
        )
    return weight

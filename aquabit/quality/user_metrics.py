"""UserMetric: a function of the user's as a metric."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from aquabit.quality.paired import Array
from aquabit.scheme import AquabitError
from aquabit.user_code import FAILURES, named_function


class NonFiniteValues(AquabitError):
    """A metric gave a NaN or an infinity for some images."""


class UserMetric:
    """``module:function``, called once per micro batch as ``function(images, full_precision_images,
    conditions)``.

    Both images are float32 tensors [n, 3, h, w] in [0, 1] on the CPU, of the same seeds; conditions is a list
    of n prompts or class labels, or None. It returns n numbers, whose mean over all images is the metric.
    Where a model makes no ``images`` they are its numbers as they are, [n, ...].
    ``function.direction`` must be "min" (lower is better) or "max". The digest is that of the module's
    source, so that numbers of an edited function never mix with those before. Raises AquabitError for a
    module or function that is not there.
    """

    def __init__(self, name: str, images: bool = True) -> None:
        self.name, self.images = name, images
        self._function, found = named_function(name, "metric")
        function = name.partition(":")[2]
        said = getattr(self._function, "direction", None)
        if said not in ("min", "max"):
            raise AquabitError(
                f'metric {name!r} has direction {said!r}; set {function}.direction = "min" (lower is better)'
                ' or "max"'
            )
        self.direction: Literal["min", "max"] = said
        try:
            source = inspect.getsource(found)
        except (OSError, TypeError):
            source = name  # compiled: its name must do
        self.digest = hashlib.sha256(source.encode()).hexdigest()[:16]

    def __call__(self, images: Tensor, full: Tensor, conditions: Sequence[Any] | None) -> Array:
        """Values [n]; raises AquabitError where the function fails or returns something else,
        NonFiniteValues where values are."""
        grey = self.images and images.shape[1] == 1
        given = [x.expand(-1, 3, -1, -1).clone() if grey else x.clone() for x in (images, full)]
        try:
            values = np.asarray(
                self._function(*given, None if conditions is None else list(conditions)), dtype=np.float64
            )
        except FAILURES as error:
            raise AquabitError(f"metric {self.name!r} failed ({type(error).__name__}: {error})") from error
        if values.shape != (len(images),):
            raise AquabitError(
                f"metric {self.name!r} returned shape {list(values.shape)}; expected one number an image,"
                f" [{len(images)}]"
            )
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise NonFiniteValues(
                f"metric {self.name!r} is NaN or infinite for {bad} of {len(values)} images"
            )
        return values

"""Images from what a pipeline's call returns, in whatever form that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aquabit.scheme import AquabitError

FIELDS = ("images", "frames", "image", "videos")  # what pipelines call them, as attribute or key


def images_of(output: Any, samples: int, name: str) -> Tensor:
    """Images [samples, c, h, w] of the output of a pipeline's call, float32 on its device; of videos every
    frame is one, [samples * frames, c, h, w], in order of sample, then time.

    They may stand in a field of FIELDS or first in a tuple, as tensors, arrays, pictures, or (nested) lists
    of these; with channels first or last; whole numbers count to 255. Raises AquabitError, naming the
    pipeline, where they are something else or not a multiple of ``samples``.
    """
    found = _stacked(_field(output, name), name)
    if found.ndim not in (4, 5) or (found.ndim == 5 and len(found) != samples):
        raise AquabitError(
            f"{name} returns {list(found.shape)} numbers for {samples} samples; images [n, c, h, w] or videos"
            " [n, frames, c, h, w] are needed"
        )
    images = found.flatten(0, 1) if found.ndim == 5 else found
    if images.shape[1] > 4 >= images.shape[-1]:
        images = images.movedim(-1, 1)
    if images.shape[1] > 4 or len(images) % samples:
        raise AquabitError(
            f"{name} returns {list(found.shape)} numbers for {samples} samples; images of 1 to 4 channels, as"
            " many of each sample, are needed"
        )
    return images if images.is_floating_point() else images.float() / 255


def _field(output: Any, name: str) -> Any:
    for field in FIELDS:
        value = output.get(field) if isinstance(output, Mapping) else getattr(output, field, None)
        if value is not None:
            return value
    if isinstance(output, tuple) and output and not isinstance(output, Mapping):
        return output[0]
    if isinstance(output, Tensor | np.ndarray | list):
        return output
    raise AquabitError(
        f"{name} returns a {type(output).__name__}, which holds no images: none of {', '.join(FIELDS)}"
    )


def _stacked(value: Any, name: str) -> Tensor:
    """Tensors, arrays, pictures, or lists of these, as one tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and value:
        parts = [_stacked(part, name) for part in value]
        if len({part.shape for part in parts}) > 1:
            raise AquabitError(f"{name} returns images of different sizes; give it a resolution")
        return torch.stack(parts)
    try:
        array = np.asarray(value)
        if array.ndim == 2:
            array = array[..., None]  # a grey picture
        return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise AquabitError(f"{name} returns a {type(value).__name__} where images are expected") from error

"""Which layers read the same tensor: H is measured once for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aquabit.quant.calibration.full_precision import FullPrecision, Layer, watching
from aquabit.quant.calibration.recording import Call, part_of
from aquabit.quant.layers import QuantLinear
from aquabit.scheme import AquabitError

Group = tuple[str, ...]  # layers that read the same tensor


def input_groups(model: FullPrecision, calls: Sequence[Call]) -> list[Group]:
    """Layers that read the same tensor (q, k and v; projections of one time embedding), in the order in which
    they first run.

    Members have equal inputs, to the bit, in the first, the middle and the last recorded call, and are of one
    kind, width and geometry (kernel, stride, padding, dilation, groups, split): H is the same for all. A
    layer that runs more than once in a call stays alone; one that does not run is left out. Leaves the model
    in full precision. Raises AquabitError for no calls and for a packed model.
    """
    if not calls:
        raise AquabitError(
            "no denoiser call was recorded; which layers read the same tensor is seen in calls"
        )
    parts: dict[str, list[Call]] = {}  # layers of several networks read different tensors
    for call in calls:
        parts.setdefault(part_of(call), []).append(call)
    return [group for own in parts.values() for group in _groups(model, own)]


def _groups(model: FullPrecision, calls: Sequence[Call]) -> list[Group]:
    checked = [calls[i] for i in sorted({0, len(calls) // 2, len(calls) - 1})]
    inputs: dict[str, list[Any]] = defaultdict(list)
    with watching(
        model.layers, lambda name, x: inputs[name].append((tuple(x.shape), float(x.sum(dtype=torch.float64))))
    ):
        for _ in model.replay(checked[:1]):
            pass
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, values in inputs.items():
        alike[name if len(values) > 1 else (_geometry(model.layers[name]), values[0])].append(name)
    groups = [tuple(names) for names in alike.values()]
    for call in checked:
        groups = _refined(model, call, groups)
    order = {name: i for i, name in enumerate(inputs)}
    return sorted(groups, key=lambda group: order[group[0]])


def _refined(model: FullPrecision, call: Call, groups: list[Group]) -> list[Group]:
    """Groups split by what their members read in one call."""
    home = {name: i for i, group in enumerate(groups) if len(group) > 1 for name in group}
    parts: dict[int, list[tuple[Tensor, list[str]]]] = defaultdict(list)

    def see(name: str, x: Tensor) -> None:
        for first, names in parts[home[name]]:
            if torch.equal(first, x):
                names.append(name)
                return
        parts[home[name]].append((x.clone(), [name]))

    with watching({name: model.layers[name] for name in home}, see):
        for _ in model.replay([call]):
            pass
    alone = [group for group in groups if len(group) == 1]
    return alone + [tuple(names) for found in parts.values() for _, names in found]


def _geometry(layer: Layer) -> tuple[object, ...]:
    if isinstance(layer, QuantLinear):
        return ("linear", layer.in_features)
    return ("conv", layer.shape[1:], layer.stride, layer.padding, layer.dilation, layer.groups, layer.split)

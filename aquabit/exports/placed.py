"""Where the layers of a model lie in a file of tensors, by the names that the file has: the model's own, or
published ones, with or without a prefix, where several layers may be one tensor."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from itertools import accumulate
from typing import NamedTuple

from aquabit.exports.comfy_names import encoder_places
from aquabit.exports.gguf_names import LDM, Place, reference_names
from aquabit.graph import LayerGraph, layers
from aquabit.scheme import AquabitError

Shape = tuple[int, ...]


class Part(NamedTuple):
    """Where a layer's weight lies: the tensor and the rows that are the layer's, in order."""

    tensor: str
    rows: tuple[slice, ...]


def parts_of(
    path: str, tensors: Container[str], shape: Callable[[str], Shape], graph: LayerGraph
) -> dict[str, Part]:
    """Where the layers of a model lie in the file at ``path``, whose tensors have these names and shapes.
    Raises AquabitError where it lacks layers of the model, or has them in other shapes."""
    if "parts" in graph.graph:
        raise AquabitError(
            f"{path} holds one network, and the model has {', '.join(graph.graph['parts'])}; give one"
            " component"
        )
    nodes = layers(graph)
    names = [f"{name}.weight" for name in nodes]
    places = _found(path, tensors, str(graph.graph.get("model_class", "")), names)
    shapes = {f"{name}.weight": tuple(node["shape"]) for name, node in nodes.items()}
    return {
        part.removesuffix(".weight"): rows
        for place in places
        for part, rows in _rows(path, shape(place.name), place, shapes).items()
    }


def _found(path: str, tensors: Container[str], model_class: str, names: list[str]) -> tuple[Place, ...]:
    own = tuple(Place(name, (name,)) for name in names)
    published = reference_names(model_class, names)
    candidates = [() if published is None else published[1], encoder_places(model_class, names), own]
    best: tuple[Place, ...] = own
    fewest = len(names) + 1
    for places in candidates:
        for prefix in ("", LDM):
            there = tuple(Place(prefix + p.name.removeprefix(LDM), p.parts, p.swapped) for p in places)
            lacking = sum(p.name not in tensors for p in there)
            if places and lacking < fewest:
                best, fewest = there, lacking
    if fewest:
        lacks = next(p.name for p in best if p.name not in tensors)
        own_name = model_class or "this model"
        raise AquabitError(
            f"{path} is no file of this model: it lacks {lacks!r} ({fewest} of {len(best)} tensors with"
            f" layers of {own_name})"
        )
    return best


def _rows(path: str, shape: Shape, place: Place, shapes: Mapping[str, Shape]) -> dict[str, Part]:
    """The rows of a tensor that each part has; raises AquabitError where shapes are others."""
    wanted = [shapes[part] for part in place.parts]
    counts = [shape[0] for shape in wanted]
    total = sum(counts)
    ours = (total, *wanted[0][1:])
    if [n for n in shape if n != 1] != [n for n in ours if n != 1]:  # ggml leaves ones out
        raise AquabitError(
            f"{path} is no file of this model: {place.name} is {list(shape)} there, {list(ours)} here"
        )
    if place.swapped:  # one part, whose halves lie the other way round
        return {place.parts[0]: Part(place.name, (slice(total // 2, total), slice(0, total // 2)))}
    ends = [*accumulate(counts)]
    return {
        part: Part(place.name, (slice(end - count, end),))
        for part, count, end in zip(place.parts, counts, ends, strict=True)
    }

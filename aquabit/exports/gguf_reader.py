"""GGUF files of others: which format each layer of a model has in one, as a configuration of ours, and the
weights themselves. Files are untrusted input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aquabit.exports.gguf_blocks import FIELDS
from aquabit.exports.gguf_file import SHAPE, GGUFFile, read_file
from aquabit.exports.gguf_names import ARCHITECTURES, LDM, Place, places_of
from aquabit.graph import LayerGraph, fixed_layers, layers
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SCHEMES = {name.upper(): Scheme.parse(name) for name in FIELDS} | dict.fromkeys(DENSE, FP)


class Part(NamedTuple):
    """Where a layer's weight lies: the tensor and the rows that are the layer's, in order."""

    tensor: str
    rows: tuple[slice, ...]


def read(path: str | Path, graph: LayerGraph, fingerprint: str) -> QuantConfig:
    """The configuration that a GGUF file of this model is: each layer at the scheme of its tensor's type,
    activations off. ``graph`` is the model's, ``fingerprint`` its own.

    Raises AquabitError where the file is none of GGUF or damaged, lacks layers of the model or has them in
    other shapes, for types that are no schemes of ours, and for blocks that do not end with a row.
    """
    file = read_file(path)
    parts, fixed = _parts(file, graph), fixed_layers(graph)
    kinds = {layer: file.tensors[part.tensor].kind for layer, part in parts.items()}
    _check_known(file, {part.tensor for layer, part in parts.items() if layer not in fixed})
    chosen = {layer: FP if layer in fixed else SCHEMES[kind] for layer, kind in kinds.items()}
    _check_rows(file, chosen, graph)
    return QuantConfig(fingerprint, {k: LayerChoice(s, 16) for k, s in chosen.items()})


def read_weights(path: str | Path, graph: LayerGraph) -> Iterator[tuple[str, Tensor]]:
    """(layer, weight in float32) of a GGUF file of this model, one after the other, decoded by the gguf
    package. Raises AquabitError as ``read``, and where the package is not installed."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise AquabitError(
            f"{path} is decoded by the package gguf; install it: pip install 'aquabit[gguf]'"
        ) from None
    file, nodes = read_file(path), layers(graph)
    parts = _parts(file, graph)
    _check_known(file, {part.tensor for part in parts.values()})
    for layer, part in parts.items():
        stored = file.tensors[part.tensor]
        data = file.bytes_of(part.tensor)
        if stored.kind in DENSE:
            values = torch.tensor(data).view(DENSE[stored.kind]).float()
        else:
            values = torch.from_numpy(dequantize(data, GGMLQuantizationType[stored.kind]))
        shape = tuple(nodes[layer]["shape"])
        rows = values.reshape(-1, prod(shape[1:]))
        yield layer, torch.cat([rows[one] for one in part.rows]).reshape(shape)


def _check_rows(file: GGUFFile, chosen: Mapping[str, Scheme], graph: LayerGraph) -> None:
    """Converters of U-Nets lay weights out in rows of 256, whatever their inputs are; blocks of ours lie
    within a row."""
    nodes = layers(graph)
    across = [n for n, s in chosen.items() if s != FP and s.refuses(tuple(nodes[n]["shape"])) is not None]
    if across:
        name, shape = across[0], tuple(nodes[across[0]]["shape"])
        raise AquabitError(
            f"{file.path} has {chosen[name]} for layer {name!r}, whose rows of {prod(shape[1:])} weights its"
            f" blocks cross ({len(across)} such layers); no scheme here does: read_weights gives its weights"
        )


def _check_known(file: GGUFFile, tensors: set[str]) -> None:
    unknown = Counter(kind for name in tensors if (kind := file.tensors[name].kind) not in SCHEMES)
    if unknown:
        listed = ", ".join(f"{kind} ({count} tensors)" for kind, count in unknown.most_common())
        raise AquabitError(f"{file.path} has layers of types that are no schemes here: {listed}")


def _parts(file: GGUFFile, graph: LayerGraph) -> dict[str, Part]:
    """Where the layers of a model lie in a file."""
    if "parts" in graph.graph:
        raise AquabitError(
            f"{file.path} holds one network, and the model has {', '.join(graph.graph['parts'])}; give one"
            " component"
        )
    nodes = layers(graph)
    names = [f"{name}.weight" for name in nodes]
    places = _found(file, str(graph.graph.get("model_class", "")), names)
    shapes = {f"{name}.weight": tuple(node["shape"]) for name, node in nodes.items()}
    return {
        part.removesuffix(".weight"): rows
        for place in places
        for part, rows in _rows(file, place, shapes).items()
    }


def _found(file: GGUFFile, model_class: str, names: list[str]) -> tuple[Place, ...]:
    """The places of all layers by the names that the file has: the model's own, or published ones, with or
    without a prefix."""
    own = tuple(Place(name, (name,)) for name in names)
    published = ARCHITECTURES.get(model_class)
    candidates = [own] if published is None else [places_of(published, names), own]
    best: tuple[Place, ...] = own
    fewest = len(names) + 1
    for places in candidates:
        for prefix in ("", LDM):
            there = tuple(Place(prefix + p.name.removeprefix(LDM), p.parts, p.swapped) for p in places)
            lacking = sum(p.name not in file.tensors for p in there)
            if places and lacking < fewest:
                best, fewest = there, lacking
    if fewest:
        lacks = next(p.name for p in best if p.name not in file.tensors)
        own_name = model_class or "this model"
        raise AquabitError(
            f"{file.path} is no file of this model: it lacks {lacks!r} ({fewest} of {len(best)} tensors with"
            f" layers of {own_name})"
        )
    return best


def _rows(file: GGUFFile, place: Place, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """The rows of a tensor that each part has; raises AquabitError where shapes are others."""
    wanted = [shapes[part] for part in place.parts]
    counts = [shape[0] for shape in wanted]
    total, shape = sum(counts), _shape(file, place.name)
    ours = (total, *wanted[0][1:])
    if [n for n in shape if n != 1] != [n for n in ours if n != 1]:  # ggml leaves ones out
        raise AquabitError(
            f"{file.path} is no file of this model: {place.name} is {list(shape)} there, {list(ours)} here"
        )
    if place.swapped:  # one part, whose halves lie the other way round
        return {place.parts[0]: Part(place.name, (slice(total // 2, total), slice(0, total // 2)))}
    ends = [*accumulate(counts)]
    return {
        part: Part(place.name, (slice(end - count, end),))
        for part, count, end in zip(place.parts, counts, ends, strict=True)
    }


def _shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    """A tensor's shape, as it was before it was laid out for blocks."""
    said, stored = file.values.get(SHAPE + name), file.tensors[name]
    if (
        isinstance(said, tuple)
        and all(type(n) is int and n > 0 for n in said)
        and prod(said) == prod(stored.shape)
    ):
        return said
    return stored.shape

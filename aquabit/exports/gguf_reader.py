"""GGUF files of others: which format each layer of a model has in one, as a configuration of ours, and the
weights themselves. Files are untrusted input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from aquabit.exports.gguf_blocks import FIELDS
from aquabit.exports.gguf_file import SHAPE, GGUFFile, read_file
from aquabit.exports.placed import Part, parts_of
from aquabit.graph import LayerGraph, fixed_layers, layers
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SCHEMES = {name.upper(): Scheme.parse(name) for name in FIELDS} | dict.fromkeys(DENSE, FP)


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
            f"{path} is decoded by the package gguf; install or update it: pip install -U 'aquabit[gguf]'"
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
    return parts_of(str(file.path), file.tensors, partial(_shape, file), graph)


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

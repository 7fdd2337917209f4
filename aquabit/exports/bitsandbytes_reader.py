"""bitsandbytes: which layers are nf4 in a folder, or by a configuration, as a configuration of ours, and the
weights themselves. Files are untrusted input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod

import torch
from torch import Tensor

from aquabit.exports.bitsandbytes import KIND, STATE, skipped_by
from aquabit.exports.stored_folder import FLOATS, StoredFolder, check_shape, one_network, validated
from aquabit.graph import LayerGraph, fixed_layers
from aquabit.jsonio import parse_object
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme

LARGEST_STATE = 4096  # bytes of JSON beside a weight
BLOCKS = [64 << i for i in range(7)]  # weights that share a scale
BLOCK = 64  # weights that share a scale, where nothing else is said


@dataclass(frozen=True)
class Described:
    """``quantization_config``, as far as it decides on formats."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    llm_int8_skip_modules: list[str] | None = None


@dataclass(frozen=True)
class State:
    """``quant_state`` of a weight."""

    quant_type: str
    blocksize: int
    shape: list[int]
    nested_blocksize: int | None = None
    nested_offset: float = 0.0


def read(folder: StoredFolder, graph: LayerGraph, fingerprint: str) -> QuantConfig:
    """The configuration that a folder of this model is, or asks for: nf4 as each weight is stored, or, where
    they are not quantized yet, as the configuration says; int8 for 8 bits (LLM.int8); activations off.

    Raises AquabitError where the folder is of another model, and for fp4 and blocks that are no scheme here.
    """
    nodes, fixed = one_network(graph, folder.path), fixed_layers(graph)
    described = validated(Described, folder.described, f"{folder.path}: quantization_config")
    found = {}
    for name, node in nodes.items():
        shape = tuple(node["shape"])
        scheme = _stored(folder, name, shape)
        if scheme is None:
            is_linear = node["kind"] == "linear" and not folder.files
            scheme = _asked(folder, name, shape, described) if is_linear else FP
        found[name] = LayerChoice(FP if name in fixed else scheme, 16)
    return QuantConfig(fingerprint, found)


def _asked(folder: StoredFolder, name: str, shape: tuple[int, ...], described: Described) -> Scheme:
    """What a configuration alone makes of a Linear layer."""
    if skipped_by(name, described.llm_int8_skip_modules or ()) is not None:
        return FP
    if described.load_in_8bit:
        return Scheme.parse("int8")
    if not described.load_in_4bit or described.bnb_4bit_quant_type != KIND:
        kind = described.bnb_4bit_quant_type if described.load_in_4bit else "nothing"
        raise AquabitError(
            f"{folder.path} asks for {kind}, which no scheme here is; nf4 and 8 bits can be read"
        )
    return _nf4(folder, name, shape, BLOCK, described.bnb_4bit_use_double_quant)


def _stored(folder: StoredFolder, name: str, shape: tuple[int, ...]) -> Scheme | None:
    """The scheme by which a folder holds a layer's weight; None where it is dense there, or not there."""
    weight = f"{name}.weight"
    if f"{name}.SCB" in folder.files:
        check_shape(folder, weight, shape, ("I8",))
        check_shape(folder, f"{name}.SCB", (shape[0],))
        return Scheme.parse("int8")
    state = _state(folder, name, shape)
    if state is None:
        if folder.files:
            check_shape(folder, weight, shape)
        return None
    nested = f"{weight}.nested_absmax" in folder.files
    scheme = _nf4(folder, name, shape, state.blocksize, nested)
    blocks = prod(shape) // state.blocksize
    check_shape(folder, weight, (prod(shape) // 2, 1), ("U8",))
    check_shape(folder, f"{weight}.quant_map", (16,))
    check_shape(folder, f"{weight}.absmax", (blocks,), ("U8",) if nested else FLOATS)
    if nested:
        size = state.nested_blocksize
        if size is None or size < 1 or not isfinite(state.nested_offset):
            raise AquabitError(f"{folder.path}: {weight} has nested blocks of {size!r}, which are none")
        check_shape(folder, f"{weight}.nested_absmax", (-(-blocks // size),))
        check_shape(folder, f"{weight}.nested_quant_map", (256,))
    return scheme


def _state(folder: StoredFolder, name: str, shape: tuple[int, ...]) -> State | None:
    """What is said beside a weight."""
    weight = f"{name}.weight"
    states = [key for key in folder.files if key.startswith(f"{weight}.quant_state.")]
    if not states:
        return None
    (key,) = states[:1]
    source = f"{folder.path}: {key}"
    held = folder.tensor(key) if prod(folder.shape(key)) <= LARGEST_STATE else torch.zeros(0)
    if held.dtype != torch.uint8 or not held.numel():
        raise AquabitError(f"{source} is no JSON of at most {LARGEST_STATE} bytes")
    state = validated(State, parse_object(bytes(held.tolist()), source), source)
    if key != f"{weight}.{STATE}" or state.quant_type != KIND:
        raise AquabitError(f"{source} is {state.quant_type}, which no scheme here is; nf4 can be read")
    if tuple(state.shape) != shape:
        raise AquabitError(
            f"{folder.path} is no folder of this model: {weight} is {state.shape} there, {list(shape)} here"
        )
    return state


def _nf4(folder: StoredFolder, name: str, shape: tuple[int, ...], block: int, nested: bool) -> Scheme:
    """nf4 of blocks; raises AquabitError where they go over the ends of rows."""
    text = f"nf4g{block}" + ("d" if nested else "")
    why = f"blocks of {block} are none of a scheme" if block not in BLOCKS else None
    why = why or Scheme.parse(text).refuses(shape)
    if why is not None:
        raise AquabitError(f"{folder.path}: layer {name!r} is no {text} here: {why}")
    return Scheme.parse(text)


def read_weights(folder: StoredFolder, graph: LayerGraph) -> Iterator[tuple[str, Tensor]]:
    """(layer, weight in float32) of a folder of this model with weights, one after the other."""
    for name, node in one_network(graph, folder.path).items():
        yield name, _decoded(folder, name, tuple(node["shape"]))


def _decoded(folder: StoredFolder, name: str, shape: tuple[int, ...]) -> Tensor:
    weight = f"{name}.weight"
    scheme, held = _stored(folder, name, shape), folder.tensor(weight)
    if scheme is None:
        return held.float()
    if f"{name}.SCB" in folder.files:
        return held.float() * (folder.tensor(f"{name}.SCB").float().reshape(-1, 1) / 127)
    state = _state(folder, name, shape)
    assert state is not None
    scales, levels = folder.tensor(f"{weight}.absmax"), folder.tensor(f"{weight}.quant_map").float()
    if scheme.nested:
        table = folder.tensor(f"{weight}.nested_quant_map").float()
        over = folder.tensor(f"{weight}.nested_absmax").float()
        each = over[torch.arange(len(scales)) // (state.nested_blocksize or len(scales))]
        scales = table[scales.long()] * each + state.nested_offset
    codes = torch.cat([held >> 4, held & 15], 1).flatten().long()
    return (levels[codes].reshape(-1, state.blocksize) * scales.float()[:, None]).reshape(shape)

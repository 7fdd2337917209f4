"""SDNQ's folders: the format that each layer has in one, as a configuration of ours, and the weights
themselves. Files are untrusted input."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from aquabit.exports.bit_places import PLACES, unpack
from aquabit.exports.sdnq import METHOD
from aquabit.exports.stored_folder import StoredFolder, check_shape, one_network, validated
from aquabit.graph import LayerGraph, fixed_layers
from aquabit.kernels.fixed_levels import level_values
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme

E2M1, E4M3 = "float4_e2m1fn", "float8_e4m3fn"
SHORT = {"fp4": E2M1, "fp8": E4M3}  # names that SDNQ takes, too
BLOCK_SCALES = {"float8_e4m3fn": ("nvfp4", 16), "float8_e8m0fnu": ("mxfp4", 32)}
HELD = {"int8": ("I8",), E4M3: ("F8_E4M3",)}  # how codes lie; of other types in bytes
SCALE_TYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
WHOLE_NUMBERS = re.compile(r"(u?)int([2-8])")


@dataclass(frozen=True)
class Settings:
    """What SDNQ's configuration says of a layer, of those that decide how it is decoded."""

    weights_dtype: str = "int8"
    scale_dtype: str | None = None
    use_svd: bool = False
    use_hadamard: bool = False
    use_codebook: bool = False
    use_codebook_scale: bool = False


@dataclass(frozen=True)
class Described(Settings):
    """The whole: settings for all, and for some by their names."""

    modules_dtype_dict: dict[str, list[str]] = field(default_factory=dict)
    modules_quant_config: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A layer's weight as it lies: its scheme here (``fp``: it is not quantized), what SDNQ calls its codes,
    and the groups of inputs with a scale each."""

    scheme: Scheme
    dtype: str = ""
    groups: int = 1


def read(folder: StoredFolder, graph: LayerGraph, fingerprint: str) -> QuantConfig:
    """The configuration that a folder of this model is: every layer at the scheme whose format it has there,
    activations off.

    Raises AquabitError where the folder is of another model, and for what no scheme here is: rotated weights,
    those with a part of low rank, and other types of codes.
    """
    fixed = fixed_layers(graph)
    found = {name: FP if name in fixed else one.scheme for name, one in _stored(folder, graph).items()}
    return QuantConfig(fingerprint, {name: LayerChoice(scheme, 16) for name, scheme in found.items()})


def read_weights(folder: StoredFolder, graph: LayerGraph) -> Iterator[tuple[str, Tensor]]:
    """(layer, weight in float32) of a folder of this model, one after the other."""
    nodes = one_network(graph, folder.path)
    for name, one in _stored(folder, graph).items():
        yield name, _decoded(folder, name, one, tuple(nodes[name]["shape"]))


def _stored(folder: StoredFolder, graph: LayerGraph) -> dict[str, Stored]:
    nodes = one_network(graph, folder.path)
    if not folder.files:
        raise AquabitError(f"{folder.path} is a configuration of {METHOD}; name the folder with its weights")
    described = validated(Described, folder.described, f"{folder.path}: quantization_config")
    return {name: _of(folder, name, tuple(node["shape"]), described) for name, node in nodes.items()}


def _of(folder: StoredFolder, name: str, shape: tuple[int, ...], described: Described) -> Stored:
    """How one layer lies, its shapes checked."""
    if f"{name}.scale" not in folder.files:
        check_shape(folder, f"{name}.weight", shape)
        return Stored(FP)
    settings = settings_of(f"{name}.weight", described, folder.path)
    if f"{name}.svd_up" in folder.files or settings.use_hadamard:
        what = "is rotated" if settings.use_hadamard else "has a part of low rank (SVD)"
        raise AquabitError(f"{folder.path}: layer {name!r} {what}, which no scheme here is")
    dtype = SHORT.get(settings.weights_dtype, settings.weights_dtype)
    scheme, groups = _scheme(folder, name, shape, replace(settings, weights_dtype=dtype))
    grouped = shape if groups == 1 else (shape[0], groups, shape[1] // groups, *shape[2:])
    check_shape(folder, f"{name}.weight", _packed_shape(grouped, dtype), HELD.get(dtype, ("U8",)))
    if scheme.kind == "usq":
        check_shape(folder, f"{name}.zero_point", folder.shape(f"{name}.scale"))
    elif f"{name}.zero_point" in folder.files:
        raise AquabitError(
            f"{folder.path}: layer {name!r} has codes {dtype}, and a zero_point, which they lack"
        )
    return Stored(scheme, dtype, groups)


def settings_of(parameter: str, described: Described, source: str) -> Settings:
    """What is said of a layer's weight, by SDNQ's rules: the first entry whose name it has, then the first
    list of a type with such an entry."""
    own = next((v for k, v in described.modules_quant_config.items() if matches(parameter, k)), {})
    plain = {k: v for k, v in vars(described).items() if k in Settings.__dataclass_fields__}
    found = validated(Settings, {**plain, **own}, f"{source}: modules_quant_config")
    lists = described.modules_dtype_dict.items()
    key = next((k.lower() for k, names in lists if any(matches(parameter, n) for n in names)), None)
    return found if key is None else replace(found, weights_dtype=_least(found.weights_dtype, key, source))


def matches(parameter: str, entry: str) -> bool:
    """Whether an entry names a parameter, as SDNQ has it: "." before the beginning of its name, the whole,
    one of the parts between dots, or a pattern."""
    if entry.startswith("."):
        return parameter.startswith(entry[1:])
    if entry == parameter or entry in parameter.split("."):
        return True
    first, *rest = entry.split("*")
    at = len(first) if rest and parameter.startswith(first) else -1
    for piece in rest:
        found = -1 if at < 0 else parameter.find(piece, at)
        at = -1 if found < 0 else found + len(piece)
    return at >= 0


def _least(dtype: str, key: str, source: str) -> str:
    """A type by its name in ``modules_dtype_dict``: as it is, or "minimum_6bit", which raises whole numbers
    of fewer bits."""
    least = re.fullmatch(r"(?:minimum)?[-_]?(u?)(?:int)?(\d{1,3})[-_]?(?:bits?)?", key)
    if least is None or not (key.startswith("minimum") or key.endswith(("bit", "bits"))):
        return key
    numbers, bits = WHOLE_NUMBERS.fullmatch(dtype), int(least[2])
    if numbers is None:
        raise AquabitError(f"{source}: modules_dtype_dict has {key!r}, and {dtype!r} are no whole numbers")
    if int(numbers[2]) >= bits:
        return dtype
    return f"{'u' if least[1] or bits <= 4 else ''}int{bits}"


def _scheme(
    folder: StoredFolder, name: str, shape: tuple[int, ...], settings: Settings
) -> tuple[Scheme, int]:
    """The scheme that a layer's format is here, and the groups of its inputs."""
    dtype, scale = settings.weights_dtype, folder.shape(f"{name}.scale")
    numbers = WHOLE_NUMBERS.fullmatch(dtype)
    if settings.use_codebook and numbers and numbers[1]:
        size = 1 << int(numbers[2])
        check_shape(folder, f"{name}.scale", scale)
        if scale == (size,):
            return Scheme.parse(f"vq{numbers[2]}"), 1
        if scale == (shape[0], size, *(1 for _ in shape[2:])):
            return Scheme.parse(f"vq{numbers[2]}c"), 1
        raise AquabitError(f"{folder.path}: layer {name!r} has a table for each group, which no scheme is")
    groups = _groups(folder, name, shape, scale)
    whole = prod(scale) == 1 and shape[0] > 1
    if dtype == E2M1 and settings.scale_dtype in BLOCK_SCALES and not settings.use_codebook_scale:
        kind, group = BLOCK_SCALES[settings.scale_dtype]
        check_shape(folder, f"{name}.scale_2", (1,))
        check_shape(folder, f"{name}.scale", scale, (SCALE_TYPES[settings.scale_dtype],))
        if shape[1] == group * groups:
            return Scheme.parse(kind), groups
    if settings.scale_dtype in (None, "none"):
        check_shape(folder, f"{name}.scale", scale)
        if dtype == E4M3 and groups == 1 and (whole or _one_scale(folder, name)):
            return Scheme.parse("fp8" if whole else "fp8c"), groups
        if numbers and not whole:
            kind = "usq" if numbers[1] else "int"
            plain = groups == 1 and _one_scale(folder, name)
            return Scheme.parse(f"{kind}{numbers[2]}" + ("" if plain else f"g{shape[1] // groups}")), groups
    kinds = f"codes {dtype}, scales {settings.scale_dtype or 'float32'} {list(scale)}"
    raise AquabitError(f"{folder.path}: layer {name!r} has {kinds}, which no scheme here is")


def _groups(folder: StoredFolder, name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> int:
    """How many groups of inputs have scales of their own; raises AquabitError for scales of other shapes."""
    taps, rows = shape[2:], (shape[0], 1, *shape[2:])
    one = tuple(1 for _ in shape)
    if scale in (rows, one):
        return 1
    groups = scale[1] if len(scale) == len(shape) + 1 else 0
    if groups < 2 or shape[1] % groups or scale != (shape[0], groups, 1, *taps):
        raise AquabitError(
            f"{folder.path} is no folder of this model: {name}.scale is {list(scale)}, the weight"
            f" {list(shape)}"
        )
    return groups


def _one_scale(folder: StoredFolder, name: str) -> bool:
    """Whether all taps of a convolution have the same scale, and the same offset."""
    for part in ("scale", "zero_point"):
        if f"{name}.{part}" in folder.files and len(folder.shape(f"{name}.{part}")) == 4:
            numbers = folder.tensor(f"{name}.{part}").float().flatten(1)
            if not bool((numbers == numbers[:, :1]).all()):
                return False
    return True


def _packed_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape of codes where they lie, of a weight of ``shape``, groups apart."""
    places = PLACES.get(_bits(dtype))
    if places is None:
        return shape
    count = prod(shape) // places.codes
    return (count,) if places.flat else (count, len(places.bytes))


def _bits(dtype: str) -> int:
    numbers = WHOLE_NUMBERS.fullmatch(dtype)
    return int(numbers[2]) if numbers else 4 if dtype == E2M1 else 8


def _decoded(folder: StoredFolder, name: str, one: Stored, shape: tuple[int, ...]) -> Tensor:
    """The weight that SDNQ computes, in float32."""
    held = folder.tensor(f"{name}.weight")
    if one.scheme == FP:
        return held.float()
    bits = _bits(one.dtype)
    grouped = shape if one.groups == 1 else (shape[0], one.groups, shape[1] // one.groups, *shape[2:])
    codes = (unpack(held, bits) if bits in PLACES else held).reshape(grouped)
    scale = folder.tensor(f"{name}.scale")
    if one.scheme.kind == "vq":
        index = codes.long()
        table = scale.float()
        return (table[index] if table.ndim == 1 else table.gather(1, index)).reshape(shape)
    numbers = scale.float()
    if one.scheme.kind in ("nvfp4", "mxfp4"):
        numbers = numbers * folder.tensor(f"{name}.scale_2").float()
    values = level_values("e2m1", 4, codes) if one.dtype == E2M1 else codes.float()
    if one.dtype.startswith("int") and bits < 8:
        values = values - (1 << (bits - 1))
    decoded = values * numbers
    if one.scheme.kind == "usq":
        decoded = decoded + folder.tensor(f"{name}.zero_point").float()
    return decoded.reshape(shape)

"""ComfyUI's quantized files of others: which format each layer has, as a configuration of ours. A layer's
format is in the file's header or in a tensor beside its weight, as JSON; older files say nothing and hold
weights as 8-bit floats. Files are untrusted input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aquabit.exports.comfy import FORMATS, METADATA, VERSION
from aquabit.exports.placed import Shape, parts_of
from aquabit.exports.stored_folder import FLOATS, opened, validated
from aquabit.graph import LayerGraph, fixed_layers
from aquabit.jsonio import parse_json
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme

MARK = ".comfy_quant"  # after a layer's name: the bytes of its format's JSON
FLOAT8 = "F8_E4M3"  # of safetensors
SCHEMES = {stored: Scheme.parse(scheme) for scheme, stored in FORMATS.items()}
PACKED = "nvfp4"  # whose tensors hold two codes a byte


@dataclass(frozen=True)
class Stored:
    """What a file says of one layer. ``convrot``: its inputs are rotated first; ComfyUI also reads that in
    ``params``."""

    format: str
    convrot: bool = False
    params: Any = None

    @property
    def name(self) -> str:
        rotated = self.convrot or (isinstance(self.params, dict) and self.params.get("convrot"))
        return f"{self.format} of rotated weights" if rotated else self.format


@dataclass(frozen=True)
class Header:
    """``_quantization_metadata``: the formats of layers by their names."""

    format_version: str = VERSION
    layers: dict[str, Stored] = field(default_factory=dict)


def is_comfy(path: str | Path) -> bool:
    """Whether a file is one of tensors that says how layers are quantized, or has weights in 8-bit floats."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return False
    with opened(Path(path)) as file:
        if METADATA in (file.metadata() or {}):
            return True
        names = list(file.keys())
        return any(n.endswith(MARK) or file.get_slice(n).get_dtype() == FLOAT8 for n in names)


def read(path: str | Path, graph: LayerGraph, fingerprint: str) -> QuantConfig:
    """The configuration that a file of this model is, activations off. ``graph`` is the model's,
    ``fingerprint`` its own.

    Raises AquabitError where the file is damaged, lacks layers of the model or has them in other shapes, and
    for formats that are no schemes of ours.
    """
    with opened(Path(path)) as file:
        names = set(file.keys())
        said = _formats(file, names, str(path))
        parts = parts_of(str(path), names, partial(_shape, file, said), graph)
        fixed = fixed_layers(graph)
        found = {
            layer: _format(file, said, part.tensor) for layer, part in parts.items() if layer not in fixed
        }
    unknown = Counter(name for name in found.values() if name is not None and name not in SCHEMES)
    if unknown:
        listed = ", ".join(f"{name} ({count} layers)" for name, count in unknown.most_common())
        raise AquabitError(f"{path} has layers in formats that are no schemes here: {listed}")
    chosen = {layer: FP if name is None else SCHEMES[name] for layer, name in found.items()}
    return QuantConfig(fingerprint, {k: LayerChoice(chosen.get(k, FP), 16) for k in parts})


def _formats(file: Any, names: set[str], path: str) -> dict[str, Stored]:
    """Layer -> what is said of it."""
    text, found = (file.metadata() or {}).get(METADATA), dict[str, Stored]()
    if text is not None:
        header = validated(Header, parse_json(text, path), f"{path}: {METADATA}")
        if header.format_version.partition(".")[0] != VERSION.partition(".")[0]:
            raise AquabitError(
                f"{path} is of format version {header.format_version!r:.20}; known is {VERSION}"
            )
        found = header.layers
    for name in names:
        if name.endswith(MARK):
            if file.get_slice(name).get_dtype() != "U8":
                raise AquabitError(f"{path} is damaged: {name} must be bytes")
            text = file.get_tensor(name).numpy().tobytes().decode(errors="replace")
            found[name.removesuffix(MARK)] = validated(Stored, parse_json(text, path), f"{path}: {name}")
    return found


def _shape(file: Any, said: Mapping[str, Stored], name: str) -> Shape:
    shape = tuple(file.get_slice(name).get_shape())
    one = said.get(name.removesuffix(".weight"))
    return (*shape[:-1], 2 * shape[-1]) if one is not None and one.format == PACKED and shape else shape


def _format(file: Any, said: Mapping[str, Stored], name: str) -> str | None:
    """ComfyUI's name for how a tensor is stored; None for full precision."""
    one = said.get(name.removesuffix(".weight"))
    if one is not None:
        return one.name
    dtype = str(file.get_slice(name).get_dtype())
    if dtype in FLOATS:
        return None
    return FORMATS["fp8"] if dtype == FLOAT8 else dtype

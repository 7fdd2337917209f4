"""GGUF files of denoisers: what diffusers' ``from_single_file`` (with GGUFQuantizationConfig) and
ComfyUI-GGUF load.

A layer in one of GGUF's formats is its codes as they are; everything else is stored as it was measured, at 16
bits, and at 32 what is small (a dimension alone) or what these programs do not read as bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from aquabit.exports.exported import Exported, lost_beside_weights
from aquabit.exports.gguf_blocks import FIELDS, to_blocks
from aquabit.exports.gguf_file import PLAIN, SHAPE, Value, Written, read_file, write_file
from aquabit.exports.gguf_names import ARCHITECTURES, TEXT_ENCODERS, Place, reference_names
from aquabit.exports.sd_cpp_rules import sentences
from aquabit.graph import layers
from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.model import rounded, storage_dtype
from aquabit.scheme import FP, AquabitError, Scheme

OWN = "aquabit"  # the architecture of what no other program knows
WRITER = "general.quantized_by"  # how a file of ours is known
# ggml's GGML_MAX_NAME is 64, closing zero included; stable-diffusion.cpp builds it with 128, and the
# converter of ComfyUI-GGUF takes names of up to 127
LONGEST_NAME, SHORT_NAME = 127, 63
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: how blocks are laid out
FILE_TYPES = {  # llama.cpp's numbers of files that are mostly of a type
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
}
QUANTIZED = {name.upper() for name in FIELDS}


@dataclass(frozen=True)
class Plan:
    """What a file is to hold: its architecture, where the tensors lie, and which program knows the names."""

    architecture: str
    places: tuple[Place, ...]
    readers: str

    @property
    def is_loaded(self) -> bool:
        """Whether another program loads it, and only Linear layers may be quantized."""
        return self.readers != ""


def plan_of(network: nn.Module) -> Plan:
    """What a file of this network is to hold."""
    names, own = list(network.state_dict()), type(network)
    found = reference_names(own.__name__, names)
    if found is not None and own.__name__ in TEXT_ENCODERS:
        return Plan(*found, "ComfyUI-GGUF")
    if found is not None:
        return Plan(*found, "ComfyUI-GGUF, stable-diffusion.cpp and diffusers")
    places = tuple(Place(name, (name,)) for name in names)
    return Plan(OWN, places, "diffusers" if hasattr(own, "from_single_file") else "")


def check(exported: Exported) -> None:
    """Raise AquabitError where a GGUF file cannot hold what is to be written: a scheme that is no format of
    GGUF, a convolution that no loader takes quantized, layers of one tensor at several schemes, a name that
    is too long."""
    plan, config, nodes = plan_of(exported.network), exported.config, layers(exported.graph)
    for name, choice in config.layers.items():
        if choice.weight == FP:
            continue
        if choice.weight.kind not in FIELDS:
            raise AquabitError(
                f"layer {name!r} is {choice.weight}, which a GGUF file cannot hold; its formats are"
                f" {', '.join(FIELDS)}: search with --target gguf"
            )
        if plan.is_loaded and nodes[name]["kind"] != "linear":
            raise AquabitError(
                f"layer {name!r} is a convolution at {choice.weight}; diffusers loads only Linear layers of a"
                " GGUF file quantized: it must be fp, as --target gguf of search keeps it"
            )
    for place in plan.places:
        _check_place(place, exported)


def _check_place(place: Place, exported: Exported) -> None:
    size = len(place.name.encode())
    if size > LONGEST_NAME:
        raise AquabitError(
            f"the name {place.name!r} has {size} bytes; programs that read GGUF take at most {LONGEST_NAME}"
        )
    schemes = {part: _scheme(exported, part) for part in place.parts}
    if len({str(s).removesuffix("h") for s in schemes.values()}) > 1:
        listed = ", ".join(f"{part.removesuffix('.weight')} {scheme}" for part, scheme in schemes.items())
        raise AquabitError(
            f"{listed}: they are one tensor of a GGUF file, {place.name}, and must have one scheme; search"
            " with --target gguf, which ties them"
        )


def write(exported: Exported, out: Path) -> list[str]:
    """Write the file; what is to be said of it."""
    check(exported)
    plan = plan_of(exported.network)
    state = exported.network.state_dict()
    dense = _dense_kinds(exported)
    values: dict[str, Value] = {"general.architecture": plan.architecture}
    tensors = []
    for place in plan.places:
        shapes = [tuple(state[part].shape) for part in place.parts]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        scheme = _scheme(exported, place.parts[0])
        if scheme == FP:
            kinds = {dense[part] for part in place.parts}
            kind = kinds.pop() if len(kinds) == 1 else "F32"
            make = partial(_values, [state[part] for part in place.parts], kind, place.swapped)
        else:
            kind = scheme.kind.upper()
            coded = [exported.weights[_layer(exported, part)] for part in place.parts]
            make = partial(_blocks, coded, scheme, place.swapped)
            if len(shape) > 2:
                values[SHAPE + place.name] = shape
                shape = (shape[0], prod(shape[1:]))
        tensors.append(Written(place.name, kind, shape, make))
    most = _most(tensors)
    values |= {
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": FILE_TYPES.get(most, FILE_TYPES["F16"]),
        WRITER: OWN,
        "aquabit.config": exported.config.digest,
    }
    write_file(out, values, tensors)
    return said(exported, plan, tensors)


def _layer(exported: Exported, tensor: str) -> str:
    """The layer whose weight a tensor is (of several that share it, the one that is configured), if any."""
    layer = tensor.removesuffix(".weight")
    return str(exported.graph.graph.get("tied", {}).get(layer, layer)) if layer != tensor else ""


def _scheme(exported: Exported, tensor: str) -> Scheme:
    return exported.config[_layer(exported, tensor)].weight


def is_ours(path: Path) -> bool:
    """Whether a file is a GGUF file that was written here, and may be replaced."""
    try:
        return read_file(path).values.get(WRITER) == OWN
    except AquabitError:
        return False


def _dense_kinds(exported: Exported) -> dict[str, str]:
    """The types of tensors that are not quantized; bfloat16 is read only as the weight of a Linear."""
    linear = {f"{n}.weight" for n, node in layers(exported.graph).items() if node["kind"] == "linear"}
    linear -= {f"{n}.weight" for n in exported.graph.graph.get("uncalled", ())}
    found = {}
    for name, tensor in exported.network.state_dict().items():
        kind = PLAIN.get(storage_dtype(tensor), "I8")
        if tensor.is_floating_point() and (tensor.dim() < 2 or (kind == "BF16" and name not in linear)):
            kind = "F32"
        found[name] = kind
    return found


def _values(tensors: Sequence[Tensor], kind: str, swapped: bool) -> Tensor:
    dtype = next(dtype for dtype, name in PLAIN.items() if name == kind)
    return _joined([rounded(t.detach()).to(dtype) for t in tensors], swapped)


def _blocks(coded: Sequence[CodebookWeight], scheme: Scheme, swapped: bool) -> Tensor:
    return _joined([to_blocks(one.to("cpu"), scheme) for one in coded], swapped)


def _joined(rows: Sequence[Tensor], swapped: bool) -> Tensor:
    one = rows[0] if len(rows) == 1 else torch.cat(list(rows))
    return torch.cat(one.chunk(2)[::-1]) if swapped else one


def _most(tensors: Iterable[Written]) -> str:
    """The type that most weights have."""
    counts: Counter[str] = Counter()
    for one in tensors:
        counts[one.kind] += prod(one.shape)
    return counts.most_common(1)[0][0] if counts else "F16"


def said(exported: Exported, plan: Plan, tensors: Sequence[Written]) -> list[str]:
    """What is to be said of a file: who reads it, what is lost, and the rules for stable-diffusion.cpp."""
    kinds, own = Counter(one.kind for one in tensors), type(exported.network).__name__
    found = [f"{len(tensors)} tensors: {', '.join(f'{kind} {n}' for kind, n in kinds.most_common())}"]
    if plan.architecture != OWN:
        verb = "reads" if own in TEXT_ENCODERS else "read"
        found.append(f"architecture {plan.architecture}, with the names that {plan.readers} {verb}")
    else:
        by = f": {plan.readers} reads them, ComfyUI-GGUF does not" if plan.is_loaded else ""
        found.append(f"architecture {OWN}: no other names of {own} are known, so its own are written{by}")
    large = [one.name for one in tensors if len(one.shape) > MOST_DIMENSIONS]
    if large:
        found.append(
            f"{large[0]} has more than {MOST_DIMENSIONS} dimensions ({len(large)} such tensors): ggml reads"
            " no such file, ComfyUI-GGUF, diffusers and the gguf package do"
        )
    long = [one.name for one in tensors if len(one.name.encode()) > SHORT_NAME]
    if long:
        found.append(
            f"{long[0]} has more than {SHORT_NAME} characters ({len(long)} such tensors): what is built with"
            " ggml's own limit does not read it"
        )
    found += _splits(exported, plan)
    found += lost_beside_weights(exported.config)
    if own in ARCHITECTURES and plan.architecture != OWN:
        found += sentences({one.name: one.kind if one.kind in QUANTIZED else "" for one in tensors})
    return found


def _splits(exported: Exported, plan: Plan) -> list[str]:
    """Where diffusers takes the sizes of one tensor's parts for granted, and this model has others."""
    known = ARCHITECTURES.get(type(exported.network).__name__)
    if plan.architecture == OWN or known is None or known.split is None:
        return []
    end, rows = known.split
    state = exported.network.state_dict()
    for place in plan.places:
        if place.name.endswith(f"{end}.weight") and len(state[place.parts[0]]) != rows:
            return [
                f"diffusers takes {rows} rows of {place.name} for its first part, which has"
                f" {len(state[place.parts[0]])} here: it reads this model wrongly from these names"
            ]
    return []

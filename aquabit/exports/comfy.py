"""ComfyUI's quantized files: one safetensors file, whose header says how each quantized layer is stored.

A layer's weight holds codes, ``weight_scale`` beside it the scales, ``weight_scale_2`` what is over those of
nvfp4 (ComfyUI's QUANTIZATION.md; comfy-kitchen, which decodes them, 0.2.40). fp8 has one scale for a tensor,
int8 one for each output, nvfp4 and mxfp8 those of blocks in the order in which tensor cores take them. Layers
whose inputs are at 16 bits here are marked ``full_precision_matrix_mult``: the others ComfyUI rounds, by its
own ranges; of text encoders it rounds none. Those of int8 it rounds per token, as "i8", marked or not, where
it computes in the type of the other tensors. Names are those of ``comfy_names``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquabit.exports.comfy_names import TOKENIZERS, plan_of
from aquabit.exports.exported import Exported, lost_beside_weights
from aquabit.exports.gguf_names import Place
from aquabit.files import writing
from aquabit.graph import layers
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.coded_scale import CodedScale
from aquabit.quant.model import storage_dtype
from aquabit.scheme import FP, AquabitError, LayerChoice, Scheme
from aquabit.targets import COMFY

METHOD = "comfy"
METADATA, VERSION = "_quantization_metadata", "1.0"
NOTE = "aquabit.config"  # of the header: how a file of ours is known
FORMATS = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4", "mxfp8": "mxfp8", "int8": "int8_tensorwise"}
TILE = (128, 4)  # of scales that lie together (cuBLAS, block scaling factors); 32 rows apart share 16 bytes
# rows and inputs that ComfyUI fills up with zeros where they are no multiple
EVEN = {"nvfp4": 16, "mxfp8": 32}


def format_of(scheme: Scheme) -> str | None:
    """ComfyUI's name for a scheme, or None."""
    return FORMATS.get(str(scheme).removesuffix("h"))


def check(exported: Exported) -> None:
    """Raise AquabitError for a layer that ComfyUI cannot hold as it is."""
    nodes, own = layers(exported.graph), type(exported.network).__name__
    for name, choice in exported.config.layers.items():
        scheme, node = choice.weight, nodes[name]
        why = None
        if scheme == FP:
            continue
        if format_of(scheme) is None:
            why = f"ComfyUI's formats are {', '.join(FORMATS)} of the schemes here"
        elif node["kind"] != "linear":
            why = "ComfyUI quantizes Linear layers"
        elif any(size % EVEN.get(scheme.kind, 1) for size in node["shape"]):
            why = f"rows and inputs of {list(node['shape'])} must be multiples of {EVEN[scheme.kind]}"
        else:
            why = COMFY.network(scheme, name, node, own)
        if why is not None:
            raise AquabitError(
                f"layer {name!r} cannot be {scheme}: {why}; leave it at fp, or search with --target comfy"
            )
    for place in plan_of(exported.network).places:
        _check_place(place, exported)


def _check_place(place: Place, exported: Exported) -> None:
    """Raise AquabitError for layers that are one tensor of a file and cannot share what is stored once."""
    found = {part: _choice(exported, part) for part in place.parts}
    forms = {format_of(choice.weight) for choice in found.values()}
    if len(found) == 1 or forms in ({None}, {FORMATS["int8"]}, {FORMATS["mxfp8"]}):
        return
    listed = ", ".join(f"{part.removesuffix('.weight')} {choice.weight}" for part, choice in found.items())
    raise AquabitError(
        f"{listed}: they are one tensor of ComfyUI's, {place.name}, and have scales of their own;"
        " together they can be int8, mxfp8 or fp"
    )


def _choice(exported: Exported, tensor: str) -> LayerChoice:
    """What the layer whose weight a tensor is gets; of another tensor: full precision."""
    layer = tensor.removesuffix(".weight")
    first = exported.graph.graph.get("tied", {}).get(layer, layer)
    return exported.config[first] if layer != tensor else LayerChoice()


def write(exported: Exported, out: Path) -> list[str]:
    """Write the file; what is lost or worth saying."""
    plan, state = plan_of(exported.network), exported.network.state_dict()
    tied = exported.graph.graph.get("tied", {})
    tensors, said_of, kinds = dict[str, Tensor](), dict[str, Any](), Counter[str]()
    for place in plan.places:
        choices = [_choice(exported, part) for part in place.parts]
        kind = format_of(choices[0].weight)
        if kind is None:
            rows = [state[part].detach().cpu() for part in place.parts]
            tensors[place.name] = _joined([t.to(storage_dtype(t)) for t in rows], place.swapped)
            continue
        names = [part.removesuffix(".weight") for part in place.parts]
        coded = [exported.weights[tied.get(name, name)].to("cpu") for name in names]
        layer = place.name.removesuffix(".weight")
        tensors |= {f"{layer}.{part}": t for part, t in stored(coded, kind, place.swapped).items()}
        plain = all(choice.act == 16 for choice in choices)
        said_of[layer] = {"format": kind, **({"full_precision_matrix_mult": True} if plain else {})}
        kinds[kind] += 1
    about = {METADATA: json.dumps({"format_version": VERSION, "layers": said_of})}
    with writing(out) as temporary:
        own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(own, temporary, {"format": "pt", NOTE: exported.config.digest, **about})
    listed = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    found = [f"{len(tensors)} tensors, with {plan.said}: {listed}"]
    if plan.is_encoder:
        found += _of_encoder(exported)
    else:
        found += _rounded_there(exported)
    return [*found, *lost_beside_weights(exported.config)]


def _of_encoder(exported: Exported) -> list[str]:
    """What is to be said of a text encoder's file."""
    tokenizer, found = TOKENIZERS.get(type(exported.network).__name__), list[str]()
    if tokenizer is not None:
        found.append(
            f"ComfyUI takes this encoder's tokenizer from the tensor {tokenizer} of the file, which is not"
            " written: copy it from the published file"
        )
    rounded = sum(c.act in ("i8", "f8") for c in exported.config.layers.values())
    if rounded:
        found.append(
            f"inputs of {rounded} layers are rounded here, and by ComfyUI's text encoders only where they"
            " compute in the type of the file's other tensors"
        )
    return found


def _rounded_there(exported: Exported) -> list[str]:
    """What is to be said of int8 layers whose inputs are not rounded here."""
    chosen = exported.config.layers.values()
    plain = sum(format_of(c.weight) == FORMATS["int8"] and c.act == 16 for c in chosen)
    if not plain:
        return []
    return [
        f"ComfyUI rounds the inputs of int8 layers to int8 per token, which those of {plain} layers are not"
        ' here: measure with --target comfy and the activations "i8"'
    ]


def _joined(rows: Sequence[Tensor], swapped: bool) -> Tensor:
    one = torch.cat(list(rows)) if len(rows) > 1 else rows[0]
    return torch.cat(one.chunk(2)[::-1]) if swapped else one


def stored(coded: Sequence[CodebookWeight], kind: str, swapped: bool = False) -> dict[str, Tensor]:
    """The tensors of layers' weights [out, in] that are one there, their rows after each other, by the names
    that they have beside its bias."""
    codes = _joined([weight.codes[:, 0].t() for weight in coded], swapped)
    scales = [weight.scale for weight in coded]
    if kind == "nvfp4":
        (scale,) = scales
        assert isinstance(scale, CodedScale) and scale.over is not None
        pairs = codes.reshape(len(codes), -1, 2)
        return {
            "weight": pairs[..., 0] << 4 | pairs[..., 1],
            "weight_scale": tiled(_joined([scale.integers], swapped)).view(torch.float8_e4m3fn),
            "weight_scale_2": scale.over.reshape(()),
        }
    if kind == "mxfp8":
        integers = _joined([scale.integers for scale in scales if isinstance(scale, CodedScale)], swapped)
        return {
            "weight": codes.contiguous().view(torch.float8_e4m3fn),
            "weight_scale": tiled(integers).view(torch.float8_e8m0fnu),
        }
    numbers = [scale.float().reshape(-1, 1) for scale in scales if scale is not None]
    if kind == "float8_e4m3fn":
        return {
            "weight": codes.contiguous().view(torch.float8_e4m3fn),
            "weight_scale": numbers[0].reshape(()),
        }
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    return {"weight": signed, "weight_scale": _joined(numbers, swapped)}


def tiled(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] as tensor cores take them, filled up with zeros to whole tiles of 128 x 4: in a
    tile the scales of row r are at 16 (r mod 32) + 4 (r / 32)."""
    rows, blocks = (-(-n // size) for n, size in zip(scales.shape, TILE, strict=True))
    whole = scales.new_zeros(rows * TILE[0], blocks * TILE[1])
    whole[: scales.shape[0], : scales.shape[1]] = scales
    parts = whole.reshape(rows, 4, 32, blocks, 4).permute(0, 3, 2, 1, 4)
    return parts.reshape(rows * TILE[0], blocks * TILE[1])


def is_ours(path: Path) -> bool:
    """Whether a file was written here, and may be replaced."""
    try:
        with safe_open(path, "pt") as file:
            return NOTE in (file.metadata() or {})
    except Exception:  # safetensors' own error is one of Rust
        return False

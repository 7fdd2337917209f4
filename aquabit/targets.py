"""Targets: what other programs can hold of a model, so that a search offers nothing else.

Each rule says why a layer cannot hold a scheme, as facts of the program's documentation and code, which its
docstring names. A layer that can hold nothing stays in half precision, as every program has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase as fnmatch
from math import prod
from typing import Any

from aquabit.deployed_kinds import GGUF as GGUF_KINDS
from aquabit.scheme import FP, AquabitError, Rounding, Scheme, act_text
from aquabit.ties import Tied, find_ties

Node = Mapping[str, Any]  # a layer's attributes in the graph: kind ("linear" or "conv"), shape, groups, ...
Lists = tuple[tuple[str, ...], ...]  # patterns of layers that are tied, as in a space file

SDNQ_PACKED = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8}  # bits -> weights that share whole bytes
WEIGHTS_ONLY: tuple[Rounding, ...] = (16,)  # activations of programs that round weights alone


def _with_any(scheme: Scheme, act: Rounding) -> str | None:
    """Inputs are rounded whatever the weight is."""
    return None


def _in_any(scheme: Scheme, name: str, node: Node, model: str) -> str | None:
    """A layer is held whatever network it is of."""
    return None


@dataclass(frozen=True)
class Target:
    """What a program can hold: text forms of its default space (``schemes``; of ours none: that has formats
    of each layer's own), the ``activations`` that it computes with as ours are rounded, why a scheme does not
    go with some of them (``pairs``), why it is not held by a layer of this name in a network of this class
    (``network``), and the layers that it fuses, which must share a scheme (``fused``, by class of the
    denoiser)."""

    name: str
    schemes: tuple[str, ...]
    rule: Callable[[Scheme, Node], str | None] = field(repr=False)
    activations: tuple[Rounding, ...] = WEIGHTS_ONLY
    pairs: Callable[[Scheme, Rounding], str | None] = field(default=_with_any, repr=False)
    network: Callable[[Scheme, str, Node, str], str | None] = field(default=_in_any, repr=False)
    fused: Mapping[str, Lists] = field(default_factory=dict)
    one_scale: tuple[str, ...] = ()  # kinds with one scale a tensor, which layers that it fuses cannot share

    def refusal(self, scheme: Scheme, name: str, node: Node, model: str) -> str | None:
        """Why layer ``name`` of a denoiser of class ``model`` cannot hold a scheme; None where it can."""
        if scheme == FP:
            return None
        if scheme.kind in self.one_scale and any(fnmatch(name, p) for row in self.tied(model) for p in row):
            return f"{self.name} has one {scheme.kind} scale for the tensor that it shares with others"
        why = self.rule(scheme, node) or self.network(scheme, name, node, model)
        return why or scheme.refuses(tuple(node["shape"]))

    def beside(self, scheme: Scheme, act: Rounding) -> str | None:
        """Why inputs that are rounded so (16: not at all) cannot meet a scheme there; None where they can."""
        if act not in self.activations:
            return f"{self.name} has no {act_text(act)}"
        return self.pairs(scheme, act)

    def tied(self, model: str) -> Lists:
        """Lists of patterns of the layers of a class of denoisers that must share a scheme; of several in one
        graph ("A+B"), whose layers bear the names of their parts first, those of each."""
        classes = dict.fromkeys(model.split("+"))
        lists = [patterns for name in classes for patterns in self.fused.get(name, ())]
        return tuple(_within(model, patterns) for patterns in lists)

    def on(self, nodes: Mapping[str, Node], model: str, schemes: Iterable[Scheme] | None = None) -> Held:
        """What it can hold of the layers of a denoiser of class ``model``, of these ``schemes`` (default: its
        own)."""
        asked = [s for s in (map(Scheme.parse, self.schemes) if schemes is None else schemes) if s != FP]
        dense, tied = dict[str, str](), find_ties(self.tied(model), list(nodes), strict=False)
        for name, node in nodes.items():
            why = [self.refusal(s, name, node, model) for s in asked]
            if why and None not in why:
                # what is said of most schemes, of equals the last, which asks for least
                dense[name] = str(Counter(reversed(why)).most_common(1)[0][0])
        for group in tied:
            first = next((name for name in group if name in dense), None)
            if first is not None:
                dense |= {k: f"stored with {first}, which stays dense" for k in group if k not in dense}
        return Held(self.name, len(nodes), dense, tied)


@dataclass(frozen=True)
class Held:
    """What a target can hold of a model of so many ``layers``: those that stay ``dense``, with the reason,
    and the groups that it fuses (``tied``)."""

    target: str
    layers: int
    dense: Mapping[str, str]
    tied: Tied

    @property
    def notes(self) -> list[str]:
        """What is to be said of it: a sentence for each reason, counted, with the first names."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.dense.items():
            reasons.setdefault(why, []).append(name)
        found = [
            f"{len(names)} of {self.layers} layers {'stays' if len(names) == 1 else 'stay'} dense for"
            f" {self.target} ({why}): {_first(names)}"
            for why, names in reasons.items()
        ]
        groups = ["/".join(group) for group in self.tied]
        if groups:
            found.append(
                f"{len(groups)} groups of layers are one tensor each for {self.target} and choose together:"
                f" {_first(groups, 1)}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tied": [list(group) for group in self.tied]}


def _within(model: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Patterns of a network's layers as they are named where it may be one of several ("A+B")."""
    part = "*." if "+" in model else ""
    return tuple(part + pattern for pattern in patterns)


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def target_named(name: str | None) -> Target | None:
    """A target by its name; None where nothing is restricted. Raises AquabitError for an unknown one."""
    if name is None or name == AQUABIT.name:
        return None
    if name not in TARGETS:
        raise AquabitError(f"the target {name!r} is unknown; known: {', '.join(TARGETS)}")
    return TARGETS[name]


def _forms(target: str, scheme: Scheme, known: Sequence[str]) -> str | None:
    """Why a scheme is none of a target's, which are told by their kind and, of integers, their bits."""
    form = f"{scheme.kind}{scheme.bits}" if scheme.kind in ("int", "usq") else scheme.kind
    return None if form in known else f"{target} has no {scheme}"


def _linear_only(node: Node, who: str) -> str | None:
    return None if node["kind"] == "linear" else f"{who} quantizes Linear layers alone"


def _gguf(scheme: Scheme, node: Node) -> str | None:
    """Source: diffusers 0.42.1, quantizers/gguf/utils.py: only the weights of Linear modules are replaced by
    ones that decode (a convolution would compute with the bytes), and its table of types has all of ours;
    ggml-common.h of llama.cpp for blocks, which lie within a row: 32 weights, of K types 256. F16 and F32 are
    read as they are."""
    forms = _forms("GGUF", scheme, [kind.name for kind in GGUF_KINDS])
    return forms or _linear_only(node, "diffusers' GGUF loader")


def _sdnq(scheme: Scheme, node: Node) -> str | None:
    """Source: sdnq 0.2.8 (PyPI), common.py (dtype_dict: int2 to int8, uint2 to uint8 with a zero point, which
    our ``usq`` is, float8_e4m3fn) and quantizer.py: Linear, and Conv2d with ``quant_conv``; groups are of
    input channels at one tap and divide them, and a tap of a convolution without groups has a scale of its
    own, which may repeat that of its row. What is quantized already has no least size (utils.py); codes share
    whole bytes. Its quantized product rounds inputs as ``i8`` and ``f8`` (quant_utils.py, quantize_int_mm and
    quantize_fp_mm), but of 32 tokens and more alone (layers/linear/linear_int8.py): files ask for none."""
    known = [*(f"{kind}{bits}" for kind in ("int", "usq") for bits in range(2, 9)), "fp8"]
    if (why := _forms("SDNQ", scheme, known)) is not None:
        return why
    channels, group = node["shape"][1], scheme.group or 1
    if channels % group:
        return f"its {channels} inputs must be a multiple of {group}"
    together = SDNQ_PACKED.get(scheme.bits, 1) if scheme.kind in ("int", "usq") else 1
    weights = prod(node["shape"])
    return None if weights % together == 0 else f"its {weights} weights must be a multiple of {together}"


def _bitsandbytes(scheme: Scheme, node: Node) -> str | None:
    """Source: bitsandbytes 0.50.2, functional.py (QuantState: each layer stores its type, block size, and
    whether scales are nested) and diffusers 0.42.1, quantizers/bitsandbytes/utils.py: Linear only. Blocks are
    of the flattened weight, and ours lie within a row. LLM.int8 rounds activations too and is another
    mode of a whole model, which mixes with no 4-bit layer."""
    if scheme.kind == "int":
        return "bitsandbytes' int8 is a mode of a whole model that rounds activations too"
    return _forms("bitsandbytes", scheme, ["nf4"]) or _linear_only(node, "diffusers with bitsandbytes")


def _torchao(scheme: Scheme, node: Node) -> str | None:
    """Source: torchao 0.18.0, quantization/quant_api.py (IntxWeightOnlyConfig: symmetric int2 to int8 per row
    or group; Float8WeightOnlyConfig per tensor or row) and prototype/mx_formats (NVFP4WeightOnlyConfig: both
    sides multiples of 16; mxfp4 rounds activations too); diffusers 0.42.1, torchao_quantizer.py: Linear
    only."""
    known = [*(f"int{bits}" for bits in range(2, 9)), "fp8", "nvfp4"]
    why = _forms("torchao (weights alone)", scheme, known) or _linear_only(node, "diffusers with torchao")
    if why is None and scheme.kind == "nvfp4" and node["shape"][0] % 16:
        return f"its {node['shape'][0]} outputs must be a multiple of 16"
    return why


def _modelopt(scheme: Scheme, node: Node) -> str | None:
    """Source: nvidia-modelopt 0.47.0, torch/quantization/nn (Linear and Conv2d are quantized) and
    nn/modules/tensor_quantizer.py: what is stored compressed is int4 in blocks, int8, fp8, nvfp4, mxfp4 and
    mxfp8; blocks are of the last axis, which of a convolution is the kernel's width, so that it has none."""
    why = _forms("ModelOpt", scheme, ["int4", "int8", "fp8", "nvfp4", "mxfp4", "mxfp8"])
    if why is None and scheme.kind == "int" and (scheme.bits == 4) != (scheme.group is not None):
        why = "ModelOpt stores int4 in blocks and int8 per channel"
    if why is None and node["kind"] != "linear" and scheme.group is not None:
        return "ModelOpt has no blocks of input channels in a convolution"
    return why


def _comfy(scheme: Scheme, node: Node) -> str | None:
    """Source: ComfyUI, QUANTIZATION.md (layers of a file name their format; Linear layers are loaded so) and
    comfy/quant_ops.py, QUANT_ALGOS (float8_e4m3fn with one scale a tensor; nvfp4 in groups of 16 under e4m3
    scales and one float32, both sides multiples of 16; mxfp8, of 32; int8 with a scale for each row), decoded
    by comfy-kitchen 0.2.40. With ``full_precision_matrix_mult`` activations stay
    as they are, but for int8 (``_comfy_pairs``); else those of fp8 are rounded under one scale of all
    tokens."""
    why = _forms("ComfyUI", scheme, ["fp8", "nvfp4", "mxfp8", "int8"]) or _linear_only(node, "ComfyUI")
    if why is None and scheme.kind == "fp8" and scheme.per_channel:
        return "ComfyUI's fp8 has one scale a tensor"
    if why is None and scheme.kind == "int" and scheme.group is not None:
        return "ComfyUI's int8 has a scale for each output channel"
    even = {"nvfp4": 16, "mxfp8": 32}.get(scheme.kind, 1)
    if why is None and any(size % even for size in node["shape"]):
        return f"both sides of {list(node['shape'])} must be multiples of {even}"
    return why


def _torchao_pairs(scheme: Scheme, act: Rounding) -> str | None:
    """Source: torchao 0.18.0, quantization/quant_api.py: Int8DynamicActivationInt8WeightConfig and
    Float8DynamicActivationFloat8WeightConfig, per token where weights have a scale for each output. Float8 is
    rounded as ours is (quant_primitives.py, _choose_scale_float8); symmetric int8 to -128 .. 127 under the
    largest value / 127.5 (workflows/int8/int8_tensor.py), where ours has 127."""
    if act == "i8" and not (scheme.kind == "int" and scheme.bits == 8 and scheme.group is None):
        return "torchao multiplies symmetric int8 inputs by int8 weights with a scale for each output"
    if act == "f8" and not (scheme.kind == "fp8" and scheme.per_channel):
        return "torchao multiplies float8 inputs, a scale for each token, by fp8c weights"
    return None


def _comfy_pairs(scheme: Scheme, act: Rounding) -> str | None:
    """Source: comfy_kitchen/tensor/int8.py: an int8 weight rounds its inputs per token, as ``i8``
    (backends/eager/quantization.py, quantize_int8_rowwise); ComfyUI 0.29.0, comfy/ops.py, cast_bias_weight,
    decodes it before, whatever the file says, only where it computes in another type than that of the file's
    other tensors (text encoders)."""
    if act == 16:
        return "ComfyUI rounds the inputs of int8 layers: give it i8" if scheme.kind == "int" else None
    return None if scheme.kind == "int" else "ComfyUI multiplies inputs in int8 by int8 weights"


# layers from whose number of inputs ComfyUI tells a model's sizes: nvfp4, two weights a byte, would halve it
SIZES: Mapping[str, tuple[str, ...]] = {
    "UNet2DConditionModel": ("*.transformer_blocks.0.attn2.to_k", "add_embedding.linear_1"),
    "SD3Transformer2DModel": ("context_embedder", "time_text_embed.text_embedder.linear_1"),
    "FluxTransformer2DModel": ("x_embedder", "context_embedder", "time_text_embed.text_embedder.linear_1"),
    "ChromaTransformer2DModel": ("context_embedder",),
    "Flux2Transformer2DModel": ("x_embedder", "context_embedder"),
    "AuraFlowTransformer2DModel": ("context_embedder",),
    "CosmosTransformer3DModel": ("patch_embed.proj",),
    "HunyuanVideoTransformer3DModel": ("context_embedder.proj_in",),
    "LTXVideoTransformer3DModel": ("transformer_blocks.0.attn2.to_k",),
    "LTX2VideoTransformer3DModel": ("transformer_blocks.0.attn2.to_k",),
    "Lumina2Transformer2DModel": ("time_caption_embed.caption_embedder.1",),
    "ZImageTransformer2DModel": ("cap_embedder.1",),
    "QwenImageTransformer2DModel": ("img_in",),
    "QwenImage21Transformer2DModel": ("img_in",),
}
_CLIP = ("*encoder.layers.*.self_attn.*", "*encoder.layers.*.mlp.fc?", "text_projection")
_T5 = ("encoder.block.*",)
ENCODERS: Mapping[str, tuple[str, ...]] = {  # text encoders of classes of which some are not decoded
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
}
T5_WIDTHS = {768: "base", 1472: "ByT5 small", 2048: "XL"}  # of T5s that ComfyUI knows and does not decode


def _comfy_network(scheme: Scheme, name: str, node: Node, model: str) -> str | None:
    """Source: ComfyUI 0.29.0, comfy/model_detection.py (detect_unet_config, calculate_transformer_depth),
    comfy/sd.py (load_text_encoder_state_dicts: how layers are quantized is handed to T5-XXL, UMT5-XXL and to
    language models) and comfy/sd1_clip.py: without it codes are loaded as if they were weights."""
    for own in model.split("+"):
        if scheme.kind == "nvfp4" and any(fnmatch(name, p) for p in _within(model, SIZES.get(own, ()))):
            return "ComfyUI tells the model's sizes from its inputs, which nvfp4 halves in a file"
        if any(fnmatch(name, p) for p in _within(model, ENCODERS.get(own, ()))):
            if ENCODERS[own] is _CLIP:
                return "ComfyUI decodes no CLIP text encoder"
            width = next((size for size in node["shape"] if size in T5_WIDTHS), None)
            if width is not None:
                return f"ComfyUI decodes no T5 text encoder but XXL, and this is {T5_WIDTHS[width]}"
    return None


def _aquabit(scheme: Scheme, node: Node) -> str | None:
    """Our own packed models hold every scheme."""
    return None


_QKV = ("*.to_q", "*.to_k", "*.to_v")
_ADDED = ("*.add_q_proj", "*.add_k_proj", "*.add_v_proj")
_SINGLE = (
    "single_transformer_blocks.*.attn.to_q",
    "single_transformer_blocks.*.attn.to_k",
    "single_transformer_blocks.*.attn.to_v",
    "single_transformer_blocks.*.proj_mlp",
)
_DOUBLE = (("transformer_blocks.*.to_q", "transformer_blocks.*.to_k", "transformer_blocks.*.to_v"), _ADDED)
_REFINER = tuple(f"context_embedder.*.to_{part}" for part in "qkv")
# tensors that hold several layers in the original files, which diffusers 0.42.1 splits by rows
# (loaders/single_file_utils.py, the function of each class)
FUSED: Mapping[str, Lists] = {
    "FluxTransformer2DModel": (*_DOUBLE, _SINGLE),
    "ChromaTransformer2DModel": (*_DOUBLE, _SINGLE),
    "Flux2Transformer2DModel": (_QKV, _ADDED),
    "SD3Transformer2DModel": (_QKV, _ADDED),
    "MochiTransformer3DModel": (_QKV, _ADDED),
    "HunyuanVideoTransformer3DModel": (*_DOUBLE, _SINGLE, _REFINER),
    "Lumina2Transformer2DModel": (_QKV,),
    "MiniMaxH3Transformer3DModel": (_QKV,),
    "QwenImage21Transformer2DModel": (("*.img_mlp.gate_layer", "*.img_mlp.proj"),),
    "SanaTransformer2DModel": (
        tuple(f"*.attn1.to_{part}" for part in "qkv"),
        ("*.attn2.to_k", "*.attn2.to_v"),
    ),
    "ZImageTransformer2DModel": (_QKV,),
}

GGUF = Target(
    "gguf",
    ("q2_Kh", "q3_Kh", "q4_Kh", "q5_Kh", "q6_Kh", "q4_0h", "iq4_nlh", "q5_0h", "q5_1h", "q8_0h"),
    _gguf,
    fused=FUSED,
)
SDNQ = Target("sdnq", ("usq2g32h", "usq3g32h", "usq4g32h", "usq4h", "usq5h", "usq6h", "int8h"), _sdnq)
BITSANDBYTES = Target("bitsandbytes", ("nf4g64h", "nf4g64dh", "nf4g128dh", "nf4g256dh"), _bitsandbytes)
TORCHAO = Target(
    "torchao",
    ("int2g32h", "int3g32h", "int4g32h", "int4g64h", "nvfp4h", "int6h", "int8h", "fp8ch"),
    _torchao,
    (16, "i8", "f8"),
    _torchao_pairs,
)
MODELOPT = Target(
    "modelopt",
    ("int4g32h", "int4g128h", "nvfp4h", "mxfp4h", "int8h", "mxfp8h", "fp8h"),
    _modelopt,
    (16, "i8", "f8"),
)
COMFY = Target(
    "comfy",
    ("nvfp4h", "mxfp8h", "fp8h", "int8h"),
    _comfy,
    (16, "i8"),
    _comfy_pairs,
    _comfy_network,
    fused=FUSED,
    one_scale=("fp8", "nvfp4"),
)
AQUABIT = Target("aquabit", (), _aquabit, (16, 8, "i8", "f8", 6))
TARGETS: Mapping[str, Target] = {
    t.name: t for t in (GGUF, SDNQ, BITSANDBYTES, TORCHAO, MODELOPT, COMFY, AQUABIT)
}

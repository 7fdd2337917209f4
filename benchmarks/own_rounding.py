"""How other programs' own quantizers round a weight, decoded by their own code: what benchmarks/targets.py
measures beside our rounding to the same formats.

A format is named as our scheme of it is. Programs are imported when they are asked for: each is one package
of ``PACKAGES`` (and what it needs itself), which installs in seconds beside torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.scheme import AquabitError, Scheme

PACKAGES: Mapping[str, str] = {
    "gguf": "gguf",
    "sdnq": "sdnq",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "modelopt": "nvidia-modelopt",
}


def installed(target: str) -> str | None:
    """The package by which a target rounds, with its version; None where it is not installed."""
    try:
        return f"{PACKAGES[target]} {version(PACKAGES[target])}"
    except PackageNotFoundError:
        return None


def own_rounding(target: str, scheme: Scheme, weight: Tensor) -> Tensor:
    """What a target's own quantizer makes of a float32 weight [out, in] or [out, in, kh, kw] at the format
    that ``scheme`` is there: decoded, float32, in the same shape. Raises AquabitError for a target that is
    not installed, and for a format that its quantizer does not make here."""
    if installed(target) is None:
        raise AquabitError(f"{PACKAGES[target]} is not installed: pip install {PACKAGES[target]}")
    with torch.no_grad():
        found = PROGRAMS[target](scheme, weight.detach().float().cpu())
    if found is None:
        raise AquabitError(f"{PACKAGES[target]} does not quantize to {scheme} here")
    return found.detach().float().reshape(weight.shape).clone()


def _gguf(scheme: Scheme, weight: Tensor) -> Tensor | None:
    """gguf.quants, which converters write files with; K types it only decodes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[scheme.kind.upper()]
    try:
        blocks = quantize(weight.flatten(1).numpy(), kind)
    except NotImplementedError:
        return None
    return torch.from_numpy(dequantize(blocks, kind))


def _sdnq(scheme: Scheme, weight: Tensor) -> Tensor | None:
    """As SDNQ quantizes a layer: a scale for each row, or group of channels, at each tap of a convolution."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # before it is imported: it would compile
    from sdnq.quantizer import sdnq_quantize_layer_weight

    if scheme.kind not in ("int", "usq"):
        return None
    kind = f"{'u' if scheme.kind == 'usq' else ''}int{scheme.bits}"
    layer = "Linear" if weight.ndim == 2 else "Conv2d"
    group, wide = scheme.group or -1, torch.float32
    decode, stored = sdnq_quantize_layer_weight(weight, layer, kind, group_size=group, torch_dtype=wide)
    return decode(**stored, dtype=wide, skip_compile=True)


def _bitsandbytes(scheme: Scheme, weight: Tensor) -> Tensor | None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if scheme.kind != "nf4":
        return None
    codes, state = quantize_4bit(weight, None, None, scheme.group, scheme.nested, "nf4")
    return dequantize_4bit(codes, state)


def _torchao(scheme: Scheme, weight: Tensor) -> Tensor | None:
    """``quantize_`` with the configurations of whole numbers, weights only."""
    import torchao.quantization as ao

    if scheme.kind != "int" or weight.ndim != 2:
        return None
    kinds: dict[str, Any] = {"weight_dtype": getattr(torch, f"int{scheme.bits}")}
    grain = ao.PerAxis(0) if scheme.group is None else ao.PerGroup(scheme.group)
    per_row = scheme.bits == 8 and scheme.group is None
    config = ao.Int8WeightOnlyConfig() if per_row else ao.IntxWeightOnlyConfig(**kinds, granularity=grain)
    model = _model(weight)
    ao.quantize_(model, config)
    return model[0].weight.dequantize()


def _modelopt(scheme: Scheme, weight: Tensor) -> Tensor | None:
    """``mtq.quantize`` with the ranges of the recipe that it ships (INT4_BLOCKWISE_WEIGHT_ONLY_CFG: the
    largest weight), in groups of ours."""
    import modelopt.torch.quantization as mtq

    if scheme.kind != "int" or (scheme.group is not None and weight.ndim != 2):
        return None
    grain: dict[str, Any] = {"axis": 0} if scheme.group is None else {"block_sizes": {-1: scheme.group}}
    every = {"quantizer_name": "*", "enable": False}
    own = {"quantizer_name": "0.weight_quantizer", "cfg": {"num_bits": scheme.bits, **grain}}
    model = _model(weight)
    mtq.quantize(model, {"quant_cfg": [every, own], "algorithm": "max"})
    return model[0].weight_quantizer(model[0].weight)


def _model(weight: Tensor) -> Any:
    """A layer with this weight, in a network."""
    out, inputs, *taps = weight.shape
    layer: Any = nn.Conv2d(inputs, out, taps, bias=False) if taps else nn.Linear(inputs, out, bias=False)
    layer.weight.copy_(weight)
    return nn.Sequential(layer).eval()


PROGRAMS: Mapping[str, Callable[[Scheme, Tensor], Tensor | None]] = {
    "gguf": _gguf,
    "sdnq": _sdnq,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "modelopt": _modelopt,
}

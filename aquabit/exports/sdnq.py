"""SDNQ (sdnq 0.2, SD.Next's quantization): a model's folder that diffusers or transformers loads with it.

A layer's weight holds codes, its scale, and what is added its zero_point, both float32: SDNQ computes code *
scale + zero_point in float32, which is what ours decode to, bit for bit (a code of 8 bits times a float16
scale is exact, so that one rounding is left). Groups are of channels, a convolution's at each tap. What a
layer is, its entry in ``modules_quant_config`` says; those without one are as most are. Entries go by the
beginning of names, ".LAYER.": by "LAYER.weight" SDNQ 0.2.8 finds the weight's, but not the scale's, makes
scales that are codes float32, and then multiplies them in place at every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aquabit.exports.bit_places import PLACES, pack
from aquabit.exports.exported import Exported, lost_beside_weights
from aquabit.exports.model_folder import (
    check_model,
    choices,
    counted,
    dense_tensors,
    loader_of,
    loading,
    write_model,
)
from aquabit.kernels.codebook import CodebookWeight, Scale
from aquabit.kernels.coded_scale import CodedScale
from aquabit.scheme import AquabitError, Scheme

METHOD, VERSION = "sdnq", "0.2.8"  # the version whose files these are like
WHOLE, ROW = -2, -1  # group sizes: one scale for the tensor, and for each output (and tap)
CLASSES = ("Linear", "Conv2d")  # SDNQ goes by the very name of a module's class
ROUNDED = (
    "loaded at bfloat16, diffusers 0.42 rounds the scales first; at float32 and float16 weights are these"
)
IMPORTED = "import sdnq first, by which transformers knows it"
BY_HAND = "sdnq.load_sdnq_model(DIR, model_cls=FUNCTION) loads it, where FUNCTION() makes the dense model"
SCALES = {"e4m3": "float8_e4m3fn", "e8m0": "float8_e8m0fnu"}  # of scales that are codes


class Form(NamedTuple):
    """What SDNQ calls a layer's format: the type of its codes, the group that shares a scale, the type of
    scales that are codes, and whether codes name entries of a table."""

    weights_dtype: str
    group_size: int
    scale_dtype: str | None = None
    use_codebook: bool = False

    def described(self) -> dict[str, Any]:
        """As an entry of ``modules_quant_config``."""
        return self._asdict()


def form(scheme: Scheme, shape: tuple[int, ...]) -> Form | str:
    """SDNQ's form of a weight [out, in] or [out, in, kh, kw], or why it has none."""
    inputs, group, bits = shape[1], scheme.group, scheme.bits
    dtype, why = _dtype(scheme), scheme.refuses(shape)
    if dtype is None or why is not None:
        return why or f"SDNQ has no format for {scheme}"
    places = PLACES.get(_packed_bits(dtype))
    if places is not None and prod(shape) % places.codes:
        return f"SDNQ packs {places.codes} codes of {bits} bits together, and {prod(shape)} are no multiple"
    if scheme.kind == "vq":
        if scheme.per_channel and prod(shape[2:]) > 1:
            return "SDNQ keeps a table for each output and tap, not for each output"
        return Form(dtype, ROW if scheme.per_channel else WHOLE, None, True)
    if scheme.kind == "fp8" and not scheme.per_channel:
        return Form(dtype, WHOLE)
    coded = SCALES.get(scheme.layout(shape).factors.kind)
    if group is None or group == inputs or (group > inputs and prod(shape[2:]) == 1):
        return Form(dtype, ROW, coded)
    if inputs % group:
        return f"SDNQ's groups divide the inputs, and {group} does not divide {inputs}"
    return Form(dtype, group, coded)


def _dtype(scheme: Scheme) -> str | None:
    """The name of the codes' type."""
    if scheme.kind in ("usq", "vq", "int"):
        name = "int" if scheme.kind == "int" else "uint"
        return f"{name}{scheme.bits}" if 2 <= scheme.bits <= 8 else None
    return {"fp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn", "mxfp4": "float4_e2m1fn"}.get(scheme.kind)


def _packed_bits(dtype: str) -> int:
    """Bits of a type whose codes share bytes; 8 where they do not."""
    return 4 if dtype == "float4_e2m1fn" else 8 if dtype.startswith("float8") else int(dtype.split("int")[1])


def check(exported: Exported) -> None:
    """Raise AquabitError for a layer that SDNQ cannot hold as it is."""
    check_model(exported, "SDNQ")
    modules = dict(exported.network.named_modules(remove_duplicate=False))
    cast = _cast(exported.network)
    for name, choice in choices(exported).items():
        module = modules[name]
        found = form(choice.weight, tuple(module.weight.shape))
        if isinstance(found, Form) and found.weights_dtype != "int8" and name in cast:
            found = f"{type(exported.network).__name__} casts its inputs to the type of what is stored"
        if type(module).__name__ not in CLASSES:
            found = f"SDNQ takes {' and '.join(CLASSES)}, and it is a {type(module).__name__}"
        if isinstance(found, str):
            raise AquabitError(
                f"layer {name!r} cannot be {choice.weight}: {found}; leave it at fp, or search with --target"
                " sdnq"
            )


def _cast(network: Any) -> set[str]:
    """Layers of a model of transformers that cast their inputs to the type of the weight's tensor, but for
    int8, as T5 does before those that it keeps in float32 (modeling_t5.py, T5DenseActDense)."""
    kept: Any = getattr(network, "_keep_in_fp32_modules", None) or ()
    if loader_of(network) != "transformers":
        return set()
    return {name for name, _ in network.named_modules() if name.rpartition(".")[2] in kept}


def write(exported: Exported, out: Path) -> list[str]:
    """Write the folder; what is lost or worth saying. It loads by ``from_pretrained`` of the model's class
    where ``sdnq`` is installed (transformers: imported), a model of one's own by ``BY_HAND``."""
    found = choices(exported)
    tensors = dense_tensors(exported.network, found)
    forms: dict[str, Form] = {}
    first = exported.graph.graph.get("tied", {})
    for name, choice in found.items():
        weight = exported.weights[first.get(name, name)]
        own = form(choice.weight, weight.shape)
        assert isinstance(own, Form)
        forms[name] = own
        tensors |= {f"{name}.{part}": t for part, t in stored(weight, own).items()}
    network = exported.network
    about = {"diffusers": [ROUNDED], "transformers": [IMPORTED], "none": []}[loader_of(network)]
    said = [counted(exported, tensors), *loading(network, BY_HAND), *about]
    said += lost_beside_weights(exported.config)
    write_model(exported, out, _described(exported, forms), tensors, to=METHOD, said=said)
    return said


def _described(exported: Exported, forms: Mapping[str, Form]) -> dict[str, Any]:
    """``quantization_config``: the commonest form for all, an entry for each layer that has another, and the
    names of what is not quantized."""
    modules = dict(exported.network.named_modules(remove_duplicate=False))
    common = Counter(f for f in forms.values() if f.scale_dtype is None and not f.use_codebook)
    usual = common.most_common(1)[0][0] if common else Form("int8", ROW)
    entries = {f".{name}.": f.described() for name, f in forms.items() if f != usual}
    weighted = {n for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor)}
    return {
        "quant_method": METHOD,
        "sdnq_version": VERSION,
        "weights_dtype": usual.weights_dtype,
        "group_size": usual.group_size,
        "modules_quant_config": entries,
        "modules_to_not_convert": sorted(f"{name}.weight" for name in weighted - forms.keys()),
        "quant_conv": any(type(modules[name]).__name__ == "Conv2d" for name in forms),
        "dequantize_fp32": True,
        "add_skip_keys": False,
        "use_quantized_matmul": False,
        "minimum_allowed_numel": 0,
        "minimum_allowed_channel_size": 0,
    }


# ---- tensors


def stored(weight: CodebookWeight, own: Form) -> dict[str, Tensor]:
    """The tensors of a layer's weight, by the names that they have beside its bias."""
    codes = _codes(weight)
    if own.group_size > 0:
        codes = codes.unflatten(1, (-1, own.group_size))
    found = {"weight": _weight(codes, own.weights_dtype)}
    if own.use_codebook:
        assert weight.codebooks is not None
        tables = weight.codebooks.float()[:, 0, :, 0]  # [1 or out, K]
        wide = tables[0] if own.group_size == WHOLE else tables.reshape(*tables.shape, *codes.shape[2:])
        return {**found, "scale": wide}
    grouped = own.group_size > 0
    for part, factor in (("scale", weight.scale), ("zero_point", weight.offset)):
        if factor is not None:
            numbers, above = _numbers(factor, own)
            whole = own.group_size == WHOLE
            one = [1] * len(weight.shape)
            found[part] = numbers.reshape(one) if whole else _placed(numbers, weight.shape, grouped)
            found |= {f"{part}_2": above} if above is not None else {}
    return found


def _codes(weight: CodebookWeight) -> Tensor:
    """Codes in the shape of the weight, uint8."""
    flat = weight.codes[:, 0]  # [row, out]
    if len(weight.shape) == 2:
        return flat.t()
    out, inputs, kh, kw = weight.shape
    return flat.reshape(kh, kw, inputs, out).permute(3, 2, 0, 1)


def _weight(codes: Tensor, dtype: str) -> Tensor:
    if dtype == "float8_e4m3fn":
        return codes.contiguous().view(torch.float8_e4m3fn)
    if dtype == "int8":
        return (codes.to(torch.int16) - 128).to(torch.int8)
    return codes if dtype == "uint8" else pack(codes.flatten(), _packed_bits(dtype))


def _numbers(factor: Scale, own: Form) -> tuple[Tensor, Tensor | None]:
    """Scales or offsets as stored, and what is over those that are codes."""
    if not isinstance(factor, CodedScale):
        return factor.float(), None
    assert own.scale_dtype is not None
    numbers = factor.integers.view(getattr(torch, own.scale_dtype))
    return numbers, torch.ones(1) if factor.over is None else factor.over.float().reshape(1)


def _placed(numbers: Tensor, shape: tuple[int, ...], grouped: bool) -> Tensor:
    """Numbers [out] or [out, n] where SDNQ multiplies them: [out, 1, kh, kw] for a row of a convolution,
    [out, groups, 1, kh, kw] for groups; a number for all taps is repeated."""
    out, taps = shape[0], shape[2:]
    rows = numbers.reshape(out, -1)
    if rows.shape[1] == 1:
        placed = rows.reshape(out, 1, *(1 for _ in taps)).expand(out, 1, *taps)
    else:
        placed = rows.reshape(out, *taps, -1).movedim(-1, 1)
    return placed.unsqueeze(2) if grouped else placed

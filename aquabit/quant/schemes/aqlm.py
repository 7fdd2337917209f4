"""AQLM's stored layers, read and written bit for bit (AQLM, aqlm package, QuantizedLinear)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.scheme import AquabitError

NAMES = ("codes", "codebooks", "scales")
MOST_BITS = 16  # of a code: AQLM would go on to int32, with tables that no layer repays


def from_aqlm(tensors: Mapping[str, Tensor], nbits: int, in_features: int) -> CodebookWeight:
    """A weight [out, in_features] from the tensors of a layer that AQLM stored (AQLM, aqlm package,
    QuantizedLinear).

    ``codes`` [out, in_features / g, M] are int8 up to 8 bits and int16 above, from -2^(nbits - 1) to 2^(nbits
    - 1) - 1, where a negative one stands for itself plus 2^nbits (its ``pack_int_data``); ``codebooks`` are
    [M, 2^nbits, 1, g] and ``scales`` [out, 1, 1, 1]. Float16 is taken as it is, other float types where
    float16 holds every value. Further names, such as ``bias``, are left to the caller. Raises AquabitError
    for missing tensors, other shapes or types, codes out of range, values that float16 does not hold, groups
    of several outputs and scales per group.
    """
    missing = [name for name in NAMES if name not in tensors]
    if missing:
        raise AquabitError(
            f"a layer of AQLM has {', '.join(NAMES)}; {', '.join(missing)} missing among {sorted(tensors)}"
        )
    codes, codebooks, scales = (tensors[name] for name in NAMES)
    _check_shapes(codes, codebooks, scales, nbits, in_features)
    tables = _float16("codebooks", codebooks).squeeze(2)[None]
    unsigned = _unwrap(codes, nbits).permute(1, 2, 0)
    scale = _float16("scales", scales).reshape(-1)
    return CodebookWeight.from_codes(unsigned, tables, scale, None, (len(codes), in_features), nbits)


def to_aqlm(weight: CodebookWeight) -> dict[str, Tensor]:
    """``codes``, ``codebooks`` and ``scales`` of a linear weight as AQLM stores them (AQLM, aqlm package,
    QuantizedLinear).

    Shapes and types are those that ``from_aqlm`` documents, floats in float16, and ``from_aqlm`` gives back
    an equal weight. Raises AquabitError for what AQLM's layer cannot hold: convolutions, uniform
    quantization, tables per channel, offsets, scales that are not one per output, a last group that is
    padded, and codes above 16 bits.
    """
    refusal = _refusal(weight)
    if refusal is not None:
        raise AquabitError(f"AQLM cannot hold this weight: {refusal}")
    assert weight.codebooks is not None and isinstance(weight.scale, Tensor)
    return {
        "codes": _wrap(weight.codes.permute(2, 0, 1), weight.bits).contiguous(),
        "codebooks": weight.codebooks[0].unsqueeze(2).contiguous(),
        "scales": weight.scale.reshape(-1, 1, 1, 1).contiguous(),
    }


def _check_shapes(codes: Tensor, codebooks: Tensor, scales: Tensor, nbits: int, in_features: int) -> None:
    if not 1 <= nbits <= MOST_BITS:
        raise AquabitError(f"codes of {nbits} bits are not supported; 1 to {MOST_BITS} are")
    if codebooks.ndim != 4 or codebooks.shape[1] != 1 << nbits:
        raise AquabitError(
            f"codebooks are {list(codebooks.shape)}; codes of {nbits} bits need [M, {1 << nbits}, 1, g]"
        )
    count, _, out_group, group = codebooks.shape
    if out_group != 1:
        raise AquabitError(
            f"out_group_size is {out_group}; only layers of AQLM with out_group_size 1 can be read"
        )
    if not group or in_features % group:
        raise AquabitError(f"in_features is {in_features}, which groups of {group} inputs do not divide")
    if codes.ndim != 3 or tuple(codes.shape[1:]) != (in_features // group, count):
        raise AquabitError(
            f"codes are {list(codes.shape)}; {in_features} inputs need [out, {in_features // group}, {count}]"
        )
    if tuple(scales.shape) != (len(codes), 1, 1, 1):
        raise AquabitError(
            f"scales are {list(scales.shape)}; one per output is needed, [{len(codes)}, 1, 1, 1]"
        )


def _refusal(weight: CodebookWeight) -> str | None:
    tables, scale, shape = weight.codebooks, weight.scale, list(weight.shape)
    if len(shape) != 2 or weight.order != "inputs":
        return (
            f"it is {shape} in groups of order {weight.order!r}, and AQLM holds linear layers [out, in] in"
            " groups of inputs"
        )
    if tables is None:
        return "it is uniform, without codebooks"
    if len(tables) != 1:
        return f"it has codebooks for each of {len(tables)} channels, and AQLM shares them"
    if weight.offset is not None:
        return f"it has an offset {list(weight.offset.shape)}, and AQLM has none"
    if scale is None or scale.ndim != 1:
        return (
            f"its scale is {None if scale is None else list(scale.shape)}, and AQLM needs one per output,"
            f" [{shape[0]}]"
        )
    if shape[1] % weight.group:
        return f"groups of {weight.group} do not divide its {shape[1]} inputs"
    return None


def _code_type(nbits: int) -> torch.dtype:
    return torch.int8 if nbits <= 8 else torch.int16


def _wrap(codes: Tensor, nbits: int) -> Tensor:
    """Unsigned codes as AQLM stores them, values from 2^(nbits - 1) on as negative ones."""
    wide = codes.to(torch.int32)
    return (wide - (wide >= 1 << (nbits - 1)) * (1 << nbits)).to(_code_type(nbits))


def _unwrap(codes: Tensor, nbits: int) -> Tensor:
    """Unsigned int32 codes from stored ones."""
    if codes.dtype != _code_type(nbits):
        raise AquabitError(f"codes are {codes.dtype}; AQLM stores {nbits} bits as {_code_type(nbits)}")
    wide, half = codes.to(torch.int32), 1 << (nbits - 1)
    if bool(((wide < -half) | (wide >= half)).any()):
        raise AquabitError(
            f"codes range from {int(wide.min())} to {int(wide.max())}; {nbits} bits are stored as {-half} to"
            f" {half - 1}"
        )
    return wide % (1 << nbits)


def _float16(name: str, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        raise AquabitError(f"{name} are {values.dtype}; they need to be floats")
    if values.dtype == torch.float16:
        return values
    narrow = values.to(torch.float16)
    different = int((narrow.to(values.dtype) != values).sum())
    if different:
        raise AquabitError(
            f"{different} of {values.numel()} values of {name} are {values.dtype} that float16 does not hold"
            " exactly"
        )
    return narrow

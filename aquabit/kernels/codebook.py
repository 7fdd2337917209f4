"""CodebookWeight: the format of every quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from aquabit.kernels.coded_scale import CodedScale
from aquabit.kernels.fixed_levels import check_levels, level_values
from aquabit.kernels.packing import pack as pack
from aquabit.kernels.packing import unpack as unpack
from aquabit.scheme import AquabitError
from aquabit.scheme_record import Layout, Levels

Order = Literal["inputs", "kernel", "flat"]
Scale = Tensor | CodedScale


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """W[o, group j] = scale[o] * sum_m codebooks[c, m, codes[j, m, o]] + offset[o], stored packed.

    ``packed`` holds codes [groups, M, out] at ``bits`` bits each; ``codebooks`` [C, M, K, g] float16 with C =
    1, or C = out for tables per channel, or None for a scalar table that ``levels`` names: {0 .. 2^bits - 1}
    of uniform quantization, or what a format is defined by; ``scale`` and ``offset`` [out] or [out, n] (n
    groups of inputs) float16, float32, or coded themselves; [1] float32: one for all. Groups of a Linear run
    along the inputs; those of a convolution along (kh, kw, cin), cin fastest (``order="inputs"``), as the
    weight lies, (cin, kh, kw) (``"flat"``), or are one kernel slice per input channel (``"kernel"``). A last
    group that does not divide is padded; the padding is cut on decoding.
    """

    packed: Tensor
    codebooks: Tensor | None
    scale: Scale | None
    offset: Scale | None
    shape: tuple[int, ...]
    bits: int
    order: Order = "inputs"
    levels: Levels = "uniform"

    def __post_init__(self) -> None:
        _check_shape(self.shape, self.bits, self.order)
        _check_tensor("codes", self.packed, torch.uint8, self.packed)
        _check_tensor("codebooks", self.codebooks, torch.float16, self.packed)
        for name in ("scale", "offset"):
            _check_factor(name, getattr(self, name), self.packed, self.levels)
        out, row = self.shape[0], prod(self.shape[1:])
        if self.codebooks is not None:
            tables = tuple(self.codebooks.shape)
            fits = len(tables) == 4 and tables[0] in (1, out) and tables[2] == 1 << self.bits
            if not fits or min(tables) < 1:
                raise AquabitError(
                    f"codebooks are {list(tables)}; needed are [1 or {out}, M, {1 << self.bits}, g]"
                )
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if value is not None and (
                value.ndim not in (1, 2)
                or (value.shape[0] != out and tuple(value.shape) != (1,))
                or not 1 <= prod(value.shape[1:]) <= row
            ):
                raise AquabitError(
                    f"{name} is {list(value.shape)}; a weight {list(self.shape)} needs [{out}], or [{out}, n]"
                    " for n groups of inputs"
                )
        if self.order == "kernel" and (
            self.group != prod(self.shape[2:]) or self.offset is not None or _by_groups(self.scale)
        ):
            raise AquabitError(
                f"codes of kernel slices cover {prod(self.shape[2:])} weights each, with a scale for each"
                f" output and no offset; here they cover {self.group}, with scale {_size(self.scale)} and"
                f" offset {_size(self.offset)}"
            )
        expected = ceil_divide(self.groups * self.codebook_count * out * self.bits, 8)
        if tuple(self.packed.shape) != (expected,):
            raise AquabitError(
                f"codes are {self.packed.dtype} {list(self.packed.shape)}; a weight {list(self.shape)} needs"
                f" uint8 [{expected}]"
            )

    @staticmethod
    def from_codes(
        codes: Tensor,
        codebooks: Tensor | None,
        scale: Scale | None,
        offset: Scale | None,
        shape: tuple[int, ...],
        bits: int,
        order: Order = "inputs",
        levels: Levels = "uniform",
    ) -> CodebookWeight:
        """Pack integer codes [groups, M, out]; tables and scales are rounded to float16, except for scales
        that are coded, and those of formats with levels of their own."""
        tables = None if codebooks is None else codebooks.to(torch.float16).contiguous()
        scales, offsets = (
            t.to(torch.float16).contiguous() if isinstance(t, Tensor) and levels == "uniform" else t
            for t in (scale, offset)
        )
        return CodebookWeight(pack(codes, bits), tables, scales, offsets, tuple(shape), bits, order, levels)

    @property
    def group(self) -> int:
        """Weights that one code covers (g)."""
        return 1 if self.codebooks is None else int(self.codebooks.shape[3])

    @property
    def codebook_count(self) -> int:
        """Codebooks that are added (M)."""
        return 1 if self.codebooks is None else int(self.codebooks.shape[1])

    @property
    def groups(self) -> int:
        return self.shape[1] if self.order == "kernel" else ceil_divide(prod(self.shape[1:]), self.group)

    @property
    def codes(self) -> Tensor:
        """Unpacked codes [groups, M, out], uint8 (int32 above 8 bits)."""
        count = self.groups * self.codebook_count * self.shape[0]
        return unpack(self.packed, self.bits, count).reshape(self.groups, self.codebook_count, self.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name: codes, codebooks, scale and offset; of coded ones ``scale_over`` and
        ``scale_base`` too."""
        named = {"codes": self.packed, "codebooks": self.codebooks}
        for name in ("scale", "offset"):
            value: Scale | None = getattr(self, name)
            named |= value.tensors(name) if isinstance(value, CodedScale) else {name: value}
        return {k: v for k, v in named.items() if v is not None}

    def holding(self, tensors: Mapping[str, Tensor]) -> CodebookWeight:
        """The same weight with other tensors of the same content, by ``tensors``'s names."""
        scale, offset = (
            value.holding(tensors, name) if isinstance(value, CodedScale) else tensors.get(name)
            for name, value in (("scale", self.scale), ("offset", self.offset))
        )
        return replace(
            self, packed=tensors["codes"], codebooks=tensors.get("codebooks"), scale=scale, offset=offset
        )

    @property
    def held_codes(self) -> Tensor:
        return self.packed

    @property
    def codebook_values(self) -> Tensor | None:
        return self.codebooks

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / prod(self.shape)

    def to(self, device: torch.device | str) -> CodebookWeight:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved |= {k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor | CodedScale)}
        return CodebookWeight(**moved)

    def dequantize(self, codes: Tensor | None = None) -> Tensor:
        """The weight in its original shape, float32; ``codes`` are its unpacked ones where the caller has
        them."""
        values = self._decoded_rows(self.codes if codes is None else codes)  # [groups * g, out]
        row = prod(self.shape[1:])
        if self.order == "kernel":
            if self.scale is not None:
                values = values * self.scale.float().reshape(-1)
            return values.reshape(*self.shape[1:], self.shape[0]).movedim(-1, 0).contiguous()
        values = self._scaled(values[:row])
        if len(self.shape) == 2 or self.order == "flat":
            return values.t().reshape(self.shape).contiguous()
        out, cin, kh, kw = self.shape
        return values.reshape(kh, kw, cin, out).permute(3, 2, 0, 1).contiguous()

    def _decoded_rows(self, codes: Tensor) -> Tensor:
        """Sums of codewords without scale and offset: [groups * g, out] float32."""
        if self.codebooks is None:
            return level_values(self.levels, self.bits, codes[:, 0])
        tables = self.codebooks.float()
        if tables.shape[0] == 1 and self.group == 1 and self.codebook_count == 1:
            return tables[0, 0, :, 0][codes[:, 0].int()]
        if tables.shape[0] == 1:
            total = sum(
                tables[0, m][codes[:, m].int()] for m in range(self.codebook_count)
            )  # [groups, out, g]
        else:
            rows = torch.arange(self.shape[0], device=codes.device)
            total = sum(tables[rows, m, codes[:, m].long()] for m in range(self.codebook_count))
        assert isinstance(total, Tensor)
        return total.permute(0, 2, 1).reshape(-1, self.shape[0])

    def _scaled(self, values: Tensor) -> Tensor:
        """scale * values + offset, group-wise where scale and offset are [out, n]."""
        row = values.shape[0]
        for name, apply in (("scale", torch.mul), ("offset", torch.add)):
            factor: Scale | None = getattr(self, name)
            if factor is None:
                continue
            wide = factor.float()
            if wide.ndim == 2:
                wide = (
                    wide.t().repeat_interleave(ceil_divide(row, wide.shape[1]), 0)[:row]
                    if wide.shape[1] > 1
                    else wide.t()
                )
            values = apply(values, wide)
        return values


LARGEST = 1 << 40  # weights of a layer; the kernels count in 64 bits
MOST_BITS = 16  # of a code


def _check_shape(shape: Any, bits: Any, order: Any) -> None:
    """Raise AquabitError for what no weight can be."""
    whole = isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape)
    if not whole or len(shape) not in (2, 4) or prod(shape) > LARGEST:
        raise AquabitError(
            f"the shape is {shape!r:.60}; a weight has [out, in] or [out, in, kh, kw], each at least 1"
        )
    if type(bits) is not int or not 1 <= bits <= MOST_BITS:
        raise AquabitError(f"codes have {bits!r:.20} bits; they have 1 to {MOST_BITS}")
    if order not in ("inputs", "kernel", "flat") or (order != "inputs" and len(shape) == 2):
        raise AquabitError(
            f"the order of codes is {order!r:.20}; it is inputs, or flat or kernel for a convolution (this"
            f" weight is {list(shape)})"
        )


def _check_tensor(name: str, value: Any, dtype: torch.dtype, codes: Tensor) -> None:
    """Raise AquabitError for a part of another type, or on another device."""
    if value is None and name != "codes":
        return
    if not isinstance(value, Tensor) or value.dtype != dtype:
        said = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
        raise AquabitError(f"{name} are {said}; they must be a tensor of {dtype}")
    if value.device != codes.device:
        raise AquabitError(f"the codes are on {codes.device}, {name} on {value.device}; move one of them")


def _check_factor(name: str, value: Any, codes: Tensor, levels: Levels) -> None:
    """Raise AquabitError for scales or offsets of another type, or on another device: float16, or float32
    where a format has levels of its own."""
    if isinstance(value, CodedScale):
        value.check(name)
        _check_tensor(name, value.codes, torch.uint8, codes)
    else:
        wide = isinstance(value, Tensor) and value.dtype == torch.float32 and levels != "uniform"
        _check_tensor(name, value, torch.float32 if wide else torch.float16, codes)


def _by_groups(factor: Scale | None) -> bool:
    return factor is not None and factor.ndim == 2 and factor.shape[1] > 1


def _size(value: Scale | None) -> str:
    return "none" if value is None else str(list(value.shape))


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def from_tensors(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    bits: int,
    order: str = "inputs",
    layout: Layout | None = None,
) -> CodebookWeight:
    """A weight from what ``CodebookWeight.tensors`` stored, its levels and scales as ``layout`` says (None:
    uniform and float16); raises AquabitError where something is missing or of another size."""
    if "codes" not in tensors or order not in ("inputs", "kernel", "flat"):
        raise AquabitError(
            f"a stored weight needs codes and an order of inputs, kernel or flat; it has {sorted(tensors)}"
            f" and {order!r}"
        )
    said = layout or Layout(bits)
    values: dict[str, Any] = {"codebooks": tensors.get("codebooks")}
    for name in ("scale", "offset"):
        values[name] = tensors.get(name)
        if said.factors.coded and name in tensors:
            size = (shape[0], said.scales or 1)
            values[name] = CodedScale(tensors[name], None, None, said.factors, size).holding(tensors, name)
    for name, value in values.items():
        if isinstance(value, CodedScale):
            value.check(name)
        if value is not None and (isinstance(value, CodedScale) or value.is_floating_point()):
            found = value.float()
            if not bool(found.isfinite().all()):
                bad = int((~found.isfinite()).sum())
                raise AquabitError(
                    f"{bad} of {found.numel()} numbers of {name} are not finite; it is damaged"
                )
    weight = CodebookWeight(
        tensors["codes"],
        values["codebooks"],
        values["scale"],
        values["offset"],
        tuple(shape),
        bits,
        order,  # type: ignore[arg-type]
        said.levels,
    )
    check_levels(weight.levels, weight.packed)
    return weight

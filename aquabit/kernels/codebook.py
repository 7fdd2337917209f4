"""CodebookWeight: the format of every quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, gcd, prod
from typing import Any, Literal

import torch
from torch import Tensor

from aquabit.scheme import AquabitError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes of any shape, each below 2^bits, as a little-endian bit stream: uint8 [ceil(n * bits /
    8)]."""
    flat = codes.reshape(-1).to(torch.int32)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise AquabitError(
            f"codes range from {int(flat.min())} to {int(flat.max())}; {bits} bits hold 0 to"
            f" {(1 << bits) - 1}"
        )
    per_period, period_bytes = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    size = ceil(flat.numel() * bits / 8)
    padded = torch.zeros(ceil(flat.numel() / per_period) * per_period, dtype=torch.int32, device=codes.device)
    padded[: flat.numel()] = flat
    columns = padded.reshape(-1, per_period)
    out = torch.zeros(len(columns), period_bytes + 2, dtype=torch.int32, device=codes.device)
    for i in range(per_period):
        byte, shift = divmod(i * bits, 8)
        word = columns[:, i] << shift
        for k in range(ceil((shift + bits) / 8)):
            out[:, byte + k] |= (word >> (8 * k)) & 255
    return out[:, :period_bytes].to(torch.uint8).reshape(-1)[:size].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of a bit stream, uint8 [count] (int32 above 8 bits)."""
    dtype = torch.uint8 if bits <= 8 else torch.int32
    if bits == 8:
        return packed[:count]
    per_period, period_bytes = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    periods = ceil(count / per_period)
    full = packed
    if packed.numel() < periods * period_bytes:
        full = torch.zeros(periods * period_bytes, dtype=torch.uint8, device=packed.device)
        full[: packed.numel()] = packed
    source = full.reshape(periods, period_bytes)
    wide = torch.uint8 if bits in (1, 2, 4) else torch.int32
    parts = source.to(wide)
    out = torch.empty(periods, per_period, dtype=dtype, device=packed.device)
    mask = (1 << bits) - 1
    for i in range(per_period):
        byte, shift = divmod(i * bits, 8)
        word = parts[:, byte] >> shift
        for k in range(1, ceil((shift + bits) / 8)):
            word = word | (parts[:, byte + k] << (8 * k - shift))
        out[:, i] = word & mask
    return out.reshape(-1)[:count]


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """W[o, group j] = scale[o] * sum_m codebooks[c, m, codes[j, m, o]] + offset[o], stored packed.

    ``packed`` holds codes [groups, M, out] at ``bits`` bits each; ``codebooks`` [C, M, K, g] float16 with C =
    1, or C = out for tables per channel, or None for the implied scalar table {0 .. 2^bits - 1} of uniform
    quantization; ``scale`` and ``offset`` [out] or [out, n] float16 (n groups of inputs). Groups of a Linear
    run along the inputs; those of a convolution along (kh, kw, cin), cin fastest (``order="inputs"``), or are
    one kernel slice per input channel (``order="kernel"``). A last group that does not divide is padded; the
    padding is cut on decoding.
    """

    packed: Tensor
    codebooks: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    bits: int
    order: Literal["inputs", "kernel"] = "inputs"

    def __post_init__(self) -> None:
        _check_shape(self.shape, self.bits, self.order)
        _check_tensor("codes", self.packed, torch.uint8, self.packed)
        for name in ("codebooks", "scale", "offset"):
            _check_tensor(name, getattr(self, name), torch.float16, self.packed)
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
                value.ndim not in (1, 2) or value.shape[0] != out or not 1 <= prod(value.shape[1:]) <= row
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
        scale: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, ...],
        bits: int,
        order: Literal["inputs", "kernel"] = "inputs",
    ) -> CodebookWeight:
        """Pack integer codes [groups, M, out]; tables and scales are rounded to float16."""
        tables, scales, offsets = (
            None if t is None else t.to(torch.float16).contiguous() for t in (codebooks, scale, offset)
        )
        return CodebookWeight(pack(codes, bits), tables, scales, offsets, tuple(shape), bits, order)

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
        """What is stored, by name: codes, codebooks, scale, offset."""
        named = {
            "codes": self.packed,
            "codebooks": self.codebooks,
            "scale": self.scale,
            "offset": self.offset,
        }
        return {k: v for k, v in named.items() if v is not None}

    def holding(self, tensors: Mapping[str, Tensor]) -> CodebookWeight:
        """The same weight with other tensors of the same content, by ``tensors``'s names."""
        codebooks, scale, offset = (tensors.get(name) for name in ("codebooks", "scale", "offset"))
        return CodebookWeight(tensors["codes"], codebooks, scale, offset, self.shape, self.bits, self.order)

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
        moved |= {k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)}
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
        if len(self.shape) == 2:
            return values.t().contiguous()
        out, cin, kh, kw = self.shape
        return values.reshape(kh, kw, cin, out).permute(3, 2, 0, 1).contiguous()

    def _decoded_rows(self, codes: Tensor) -> Tensor:
        """Sums of codewords without scale and offset: [groups * g, out] float32."""
        if self.codebooks is None:
            return codes[:, 0].float()
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
            factor: Tensor | None = getattr(self, name)
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
    if order not in ("inputs", "kernel") or (order == "kernel" and len(shape) == 2):
        raise AquabitError(
            f"the order of codes is {order!r:.20}; it is inputs, or kernel for a convolution (this weight is"
            f" {list(shape)})"
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


def _by_groups(factor: Tensor | None) -> bool:
    return factor is not None and factor.ndim == 2 and factor.shape[1] > 1


def _size(value: Tensor | None) -> str:
    return "none" if value is None else str(list(value.shape))


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def from_tensors(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], bits: int, order: str = "inputs"
) -> CodebookWeight:
    """A weight from what ``CodebookWeight.tensors`` stored; raises AquabitError where something is missing
    or of another size."""
    if "codes" not in tensors or order not in ("inputs", "kernel"):
        raise AquabitError(
            f"a stored weight needs codes and an order of inputs or kernel; it has {sorted(tensors)} and"
            f" {order!r}"
        )
    tables, scale, offset = (tensors.get(k) for k in ("codebooks", "scale", "offset"))
    for name, value in (("codebooks", tables), ("scale", scale), ("offset", offset)):
        if value is not None and value.is_floating_point() and not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            raise AquabitError(f"{bad} of {value.numel()} numbers of {name} are not finite; it is damaged")
    return CodebookWeight(
        tensors["codes"],
        tables,
        scale,
        offset,
        tuple(shape),
        bits,
        "kernel" if order == "kernel" else "inputs",
    )

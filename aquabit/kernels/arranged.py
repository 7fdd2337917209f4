"""A CodebookWeight as the native kernels read it, made once at load: rows of whole bytes, scalar codes fused,
groups in reading order.

A row of weights is cut into segments that lie within one tap of the kernel and one group of scales. Each is a
run of *lookups*: a lookup is a code of one codebook, or ``fused`` neighbouring scalar codes as one, the first
in the lowest bits (2 bits by 4, 3 and 4 bits by 2). A lookup takes a byte, or half of one (the first in the
low half) where its codebook has at most 16 codewords. Nothing is lost: ``restore`` gives the stored weight
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight, Scale, ceil_divide, pack
from aquabit.kernels.fixed_levels import table
from aquabit.kernels.registry import numbered
from aquabit.scheme import AquabitError

FUSED = {1: 8, 2: 4, 3: 2, 4: 2}  # scalar codes that one lookup takes, by their bits
NIBBLE = 4  # bits of a lookup of which two share a byte
HELD = ("codes", "tables", "scale", "offset")
STORED = "stored_"  # before the names of tensors that are kept as they are stored


class Segment(NamedTuple):
    """Inputs [start, start + inputs) at one tap of the kernel, under one group of scales."""

    tap: int
    start: int
    inputs: int
    scales: int


@dataclass(frozen=True, eq=False)
class Arranged:
    """``codes`` uint8 [out, bytes]; ``tables`` float32 [C, M, K, g], C = 1 or out, None for uniform codes
    {0 .. 2^bits - 1}; ``scale`` float32 [out, n] (ones where none is stored), ``offset`` [out, n] or None.
    Signed codes are uniform ones with an offset. ``stored`` is the weight that they came from, whose codes
    are empty (one zero for all)."""

    codes: Tensor
    tables: Tensor | None
    scale: Tensor
    offset: Tensor | None
    stored: CodebookWeight
    shape: tuple[int, ...]
    bits: int
    codebooks: int  # M
    group: int  # inputs of a codeword: g
    fused: int
    order: str
    segments: tuple[Segment, ...]
    derived: dict[str, Any] = field(
        default_factory=dict, init=False
    )  # what each backend made of it for itself: anything with ``tensors()``
    number: int = field(default=-1, init=False)  # of this very object: registry.py
    handle: Tensor = field(init=False)  # the same, as compiled code takes it

    def __post_init__(self) -> None:
        numbered(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a weight of its own: what kernels made of this one holds its addresses."""
        return {**self.__dict__, "derived": {}, "number": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        numbered(self)

    @property
    def width(self) -> int:
        """Bits that a lookup takes: 4 or 8."""
        return NIBBLE if self.bits * self.fused <= NIBBLE else 8

    @property
    def span(self) -> int:
        """Inputs of a lookup: g, or the fused codes (kernel order: the kernel's area, of one channel)."""
        return self.group * self.fused

    @property
    def channels(self) -> int:
        """Input channels that one lookup covers."""
        return 1 if self.order == "kernel" else self.span

    @property
    def scalar(self) -> bool:
        """Whether codes stand for single weights."""
        return self.group == 1 and self.codebooks == 1 and self.order != "kernel"

    def lookups(self, segment: Segment) -> int:
        return ceil(segment.inputs / self.channels) * self.codebooks

    def segment_bytes(self, segment: Segment) -> int:
        return ceil(self.lookups(segment) * self.width / 8)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        kept = {f"{STORED}{name}": t for name, t in self.stored.tensors().items() if name != "codes"}
        named = {name: getattr(self, name) for name in HELD} | kept
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def holding(self, tensors: Mapping[str, Tensor]) -> Arranged:
        """The same weight with other tensors of the same content, by ``tensors``'s names."""
        own: dict[str, Any] = {name: tensors.get(name) for name in HELD}
        kept = {n.removeprefix(STORED): t for n, t in tensors.items() if n.startswith(STORED)}
        codes = self.stored.packed
        if codes.device != own["codes"].device:
            codes = _no_codes(len(codes), own["codes"].device)
        return replace(self, stored=self.stored.holding({**kept, "codes": codes}), **own)

    @property
    def held_codes(self) -> Tensor:
        return self.codes

    @property
    def codebook_values(self) -> Tensor | None:
        """The codebooks as kernels read them."""
        return self.tables

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors lie: ``share_memory_`` and offloading give them other memory."""
        held = (self.codes, self.tables, self.scale, self.offset)
        return tuple(0 if t is None else t.data_ptr() for t in held)

    def held(self) -> Mapping[int, int]:
        """Bytes of every storage that is held, by address: layers may share some."""
        mine = [*self.tensors().values(), *(t for d in self.derived.values() for t in d.tensors())]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in mine}

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(self.held().values())

    def to(self, device: torch.device | str) -> Arranged:
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        moved |= {k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)}
        kept = {name: t.to(device) for name, t in self.stored.tensors().items() if name != "codes"}
        codes = _no_codes(len(self.stored.packed), device)
        moved["stored"] = self.stored.holding({**kept, "codes": codes})
        return Arranged(**moved)

    def restore(self) -> CodebookWeight:
        """The weight that was arranged, to the bit."""
        codes = _unlaid(self).permute(1, 2, 0)  # [groups, M, out]
        return replace(self.stored, packed=pack(codes, self.bits))

    def dequantize(self) -> Tensor:
        """The weight in its original shape, float32."""
        return self.stored.dequantize(_unlaid(self).permute(1, 2, 0))


def arranges(weight: CodebookWeight) -> str | None:
    """Why ``weight`` cannot be arranged, or None: lookups have at most 8 bits, and groups of a convolution
    lie within a tap."""
    if weight.bits > 8:
        return f"codes of {weight.bits} bits do not fit a byte"
    counts = {n for n in (_columns(weight.scale), _columns(weight.offset)) if n > 1}
    if len(counts) > 1:
        return f"scales and offsets have different groups of inputs: {sorted(counts)}"
    if (
        weight.order == "inputs"
        and weight.group > 1
        and any(s.inputs % weight.group for s in _segments(weight))
    ):
        return (
            f"groups of {weight.group} inputs do not fit into {weight.shape[1]} channels or a group of scales"
        )
    return None


def arrange(weight: CodebookWeight) -> Arranged:
    """``weight`` laid out for the native kernels; raises AquabitError where ``arranges`` says why not."""
    why = arranges(weight)
    if why:
        raise AquabitError(f"a weight {list(weight.shape)} cannot be arranged for the native kernels: {why}")
    single = weight.group == 1 and weight.codebook_count == 1 and weight.order != "kernel"
    tables, scale, offset = numbers(weight)
    empty = Arranged(
        weight.packed,
        tables,
        scale,
        offset,
        replace(weight, packed=_no_codes(len(weight.packed), weight.packed.device)),
        tuple(weight.shape),
        weight.bits,
        weight.codebook_count,
        weight.group,
        FUSED.get(weight.bits, 1) if single else 1,
        weight.order,
        _segments(weight),
    )
    return replace(empty, codes=_laid(empty, weight.codes.to(torch.uint8).permute(2, 0, 1)))


def _no_codes(size: int, device: torch.device | str) -> Tensor:
    """In the place of packed codes that are held elsewhere."""
    return torch.zeros((), dtype=torch.uint8, device=device).expand(size)


def numbers(weight: CodebookWeight) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Tables, scale and offset of ``Arranged``."""
    out, count = weight.shape[0], max(_columns(weight.scale), _columns(weight.offset))
    ones = torch.ones(out, device=weight.packed.device)
    scale = _spread(ones if weight.scale is None else weight.scale, out, count)
    offset = None if weight.offset is None else _spread(weight.offset, out, count)
    if weight.levels == "signed":
        below = -(1 << (weight.bits - 1)) * scale
        offset = below if offset is None else offset + below
    return _tables(weight), scale, offset


def _tables(weight: CodebookWeight) -> Tensor | None:
    """Codebooks as float32, or what codes stand for by definition; None for whole numbers."""
    if weight.codebooks is not None:
        return weight.codebooks.float().contiguous()
    values = table(weight.levels)
    return None if values is None else values.to(weight.packed.device)[None, None, :, None].clone()


def _columns(factor: Scale | None) -> int:
    return 1 if factor is None or factor.ndim == 1 else factor.shape[1]


def _spread(factor: Scale, out: int, count: int) -> Tensor:
    """[out], [1] or [out, 1 or count] as float32 [out, count]: kernels read scale and offset of a segment at
    the same place."""
    return factor.float().reshape(factor.shape[0], -1).expand(out, count).contiguous()


def _segments(weight: CodebookWeight) -> tuple[Segment, ...]:
    channels, area = weight.shape[1], prod(weight.shape[2:])
    count = max(_columns(weight.scale), _columns(weight.offset))
    if weight.order == "kernel":
        return (Segment(0, 0, channels, 0),)
    size = ceil_divide(channels * area, count)
    found = []
    if weight.order == "flat":
        for tap in range(area):
            at = 0
            while at < channels:  # to the first channel of the next group of scales
                group = (at * area + tap) // size
                end = min(channels, ceil_divide((group + 1) * size - tap, area))
                found.append(Segment(tap, at, end - at, group))
                at = end
        return tuple(found)
    for tap in range(area):
        at = tap * channels
        while at < (tap + 1) * channels:
            end = min((tap + 1) * channels, (at // size + 1) * size)
            found.append(Segment(tap, at - tap * channels, end - at, at // size))
            at = end
    return tuple(found)


def _places(arranged: Arranged, segment: Segment) -> slice:
    """The groups of a segment among the groups of a row, as they are stored."""
    if arranged.order == "kernel":
        return slice(0, segment.inputs)
    if arranged.order == "flat":
        area = prod(arranged.shape[2:])
        first = segment.start * area + segment.tap
        return slice(first, first + (segment.inputs - 1) * area + 1, area)
    first = (segment.tap * arranged.shape[1] + segment.start) // arranged.group
    return slice(first, first + segment.inputs // arranged.group)


def _laid(arranged: Arranged, codes: Tensor) -> Tensor:
    """codes [out, groups, M] uint8 as rows of bytes."""
    out, parts = len(codes), []
    for segment in arranged.segments:
        run = codes[:, _places(arranged, segment)]
        if arranged.fused > 1:
            run = torch.nn.functional.pad(run[..., 0], (0, -segment.inputs % arranged.fused)).reshape(
                out, -1, arranged.fused
            )
            run = _joined(run, arranged.bits)
        run = run.reshape(out, -1)
        if arranged.width == NIBBLE:
            run = _joined(torch.nn.functional.pad(run, (0, run.shape[1] % 2)).reshape(out, -1, 2), NIBBLE)
        parts.append(run)
    return torch.cat(parts, 1).contiguous()


def _joined(parts: Tensor, bits: int) -> Tensor:
    """[..., f] codes as one each, the first in the lowest bits."""
    whole = torch.zeros_like(parts[..., 0])
    for i in range(parts.shape[-1]):
        whole |= parts[..., i] << (bits * i)
    return whole


def _unlaid(arranged: Arranged) -> Tensor:
    """Codes [out, groups, M] from rows of bytes."""
    out, at, parts = arranged.shape[0], 0, []
    for segment in arranged.segments:
        size = arranged.segment_bytes(segment)
        run = arranged.codes[:, at : at + size]
        at += size
        if arranged.width == NIBBLE:
            run = torch.stack([run & 15, run >> 4], 2).reshape(out, -1)
        run = run[:, : arranged.lookups(segment)]
        if arranged.fused > 1:
            shifts = torch.arange(arranged.fused, device=run.device, dtype=torch.uint8) * arranged.bits
            run = ((run[..., None] >> shifts) & ((1 << arranged.bits) - 1)).reshape(out, -1)[
                :, : segment.inputs
            ]
        parts.append(run.reshape(out, -1, arranged.codebooks))
    if arranged.order != "flat":
        return torch.cat(parts, 1)
    codes = torch.empty(out, prod(arranged.shape[1:]), 1, dtype=torch.uint8, device=arranged.codes.device)
    for segment, run in zip(arranged.segments, parts, strict=True):
        codes[:, _places(arranged, segment)] = run
    return codes

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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight, ceil_divide, pack
from aquabit.kernels.registry import numbered
from aquabit.scheme import AquabitError

FUSED = {1: 8, 2: 4, 3: 2, 4: 2}  # scalar codes that one lookup takes, by their bits
NIBBLE = 4  # bits of a lookup of which two share a byte
HELD = ("codes", "tables", "scale", "offset")
STORED = ("stored_codebooks", "stored_scale", "stored_offset")


class Segment(NamedTuple):
    """Inputs [start, start + inputs) at one tap of the kernel, under one group of scales."""

    tap: int
    start: int
    inputs: int
    scales: int


@dataclass(frozen=True, eq=False)
class Arranged:
    """``codes`` uint8 [out, bytes]; ``tables`` float32 [C, M, K, g] as stored, C = 1 or out, None for
    uniform codes {0 .. 2^bits - 1}; ``scale`` float32 [out, n] (ones where none is stored), ``offset``
    [out, n] or None; ``stored`` are the float16 codebooks, scale and offset that they came from."""

    codes: Tensor
    tables: Tensor | None
    scale: Tensor
    offset: Tensor | None
    stored: tuple[Tensor | None, Tensor | None, Tensor | None]
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
        return self.group == 1 and self.codebooks == 1 and self.order == "inputs"

    def lookups(self, segment: Segment) -> int:
        return ceil(segment.inputs / self.channels) * self.codebooks

    def segment_bytes(self, segment: Segment) -> int:
        return ceil(self.lookups(segment) * self.width / 8)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        stored = zip(STORED, self.stored, strict=True)
        named = {name: getattr(self, name) for name in HELD} | dict(stored)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def holding(self, tensors: Mapping[str, Tensor]) -> Arranged:
        """The same weight with other tensors of the same content, by ``tensors``'s names."""
        own: dict[str, Any] = {name: tensors.get(name) for name in HELD}
        codebooks, scale, offset = (tensors.get(name) for name in STORED)
        return replace(self, stored=(codebooks, scale, offset), **own)

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
        moved["stored"] = tuple(None if t is None else t.to(device) for t in self.stored)
        return Arranged(**moved)

    def restore(self) -> CodebookWeight:
        """The weight that was arranged, to the bit."""
        codes = _unlaid(self).permute(1, 2, 0)  # [groups, M, out]
        tables, scale, offset = self.stored
        order: Literal["inputs", "kernel"] = "kernel" if self.order == "kernel" else "inputs"
        return CodebookWeight(pack(codes, self.bits), tables, scale, offset, self.shape, self.bits, order)


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
    single = weight.group == 1 and weight.codebook_count == 1 and weight.order == "inputs"
    out, count = weight.shape[0], max(_columns(weight.scale), _columns(weight.offset))
    scale = _spread(
        torch.ones(out, device=weight.packed.device) if weight.scale is None else weight.scale, out, count
    )
    offset = None if weight.offset is None else _spread(weight.offset, out, count)
    tables = None if weight.codebooks is None else weight.codebooks.float().contiguous()
    empty = Arranged(
        weight.packed,
        tables,
        scale,
        offset,
        (weight.codebooks, weight.scale, weight.offset),
        tuple(weight.shape),
        weight.bits,
        weight.codebook_count,
        weight.group,
        FUSED.get(weight.bits, 1) if single else 1,
        weight.order,
        _segments(weight),
    )
    return replace(empty, codes=_laid(empty, weight.codes.to(torch.uint8).permute(2, 0, 1)))


def _columns(factor: Tensor | None) -> int:
    return 1 if factor is None or factor.ndim == 1 else factor.shape[1]


def _spread(factor: Tensor, out: int, count: int) -> Tensor:
    """[out] or [out, 1 or count] as float32 [out, count]: kernels read scale and offset of a segment at
    the same place."""
    return factor.float().reshape(out, -1).expand(out, count).contiguous()


def _segments(weight: CodebookWeight) -> tuple[Segment, ...]:
    channels, area = weight.shape[1], prod(weight.shape[2:])
    count = max(_columns(weight.scale), _columns(weight.offset))
    if weight.order == "kernel":
        return (Segment(0, 0, channels, 0),)
    size = ceil_divide(channels * area, count)
    found = []
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
    return torch.cat(parts, 1)

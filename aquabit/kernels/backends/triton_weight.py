"""A coded weight as the Triton kernels read it.

``Arranged`` cuts a row where a tap or a group of scales ends and pads each piece to whole bytes. A GPU
computes addresses per element, so a row in one run is simpler and faster: the lookup of position k is k //
span, whatever the piece. Where the pieces fill their bytes (all Linear layers with row scales, kernel slices,
almost all others) both are the same bytes, and an ``Arranged`` weight is used as it is, without a copy.
Groups that reach across taps, which ``Arranged`` has not, are served too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from aquabit.kernels.arranged import FUSED, Arranged, Segment, _laid, _unlaid, numbers
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.coded_scale import CodedScale
from aquabit.kernels.registry import numbered
from aquabit.scheme import AquabitError

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """``codes`` uint8 [out, bytes], one run of lookups a row; ``tables`` [C, M, K, g] (C = 1 or out) or
    None for uniform codes; ``scale`` and ``offset`` [out] or [out, n] or None, all float16 or float32.
    ``wide``: sums of codewords may leave float16.
    """

    codes: Tensor
    tables: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    bits: int
    codebooks: int  # M
    group: int  # weights of a codeword: g
    fused: int  # scalar codes in a lookup
    width: int  # bits of a lookup: 4 or 8
    kernel_order: bool
    wide: bool
    number: int = field(default=-1, init=False)  # of this very object: registry.py

    def __post_init__(self) -> None:
        """Everything that the kernels take on trust; they would read past the end of tensors that are too
        small."""
        out, places = self.shape[0], -(-prod(self.shape[1:]) // self.group)
        lookups = -(-places // self.fused) * self.codebooks
        expected = (out, -(-lookups * self.width // 8))
        if (
            self.codes.dtype != torch.uint8
            or tuple(self.codes.shape) != expected
            or self.bits * self.fused > self.width
            or self.width > 8
        ):
            raise AquabitError(
                f"codes are {self.codes.dtype} {list(self.codes.shape)}; a weight {list(self.shape)} needs"
                f" uint8 {list(expected)}"
            )
        tail = (self.codebooks, 1 << self.bits, self.group)
        if self.tables is not None and tuple(self.tables.shape) not in ((1, *tail), (out, *tail)):
            raise AquabitError(
                f"tables are {list(self.tables.shape)}; needed are [1 or {out}, {', '.join(map(str, tail))}]"
            )
        if (self.tables is None or self.fused > 1) and self.group * self.codebooks != 1:
            raise AquabitError(
                f"scalar codes have one codebook of single weights, not {self.codebooks} of {self.group}"
            )
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if value is not None and (value.ndim not in (1, 2) or len(value) != out or value.numel() < out):
                raise AquabitError(f"{name} is {list(value.shape)}; needed is [{out}] or [{out}, n]")
        for name in ("codes", "tables", "scale", "offset"):
            value = getattr(self, name)
            if value is not None and (value.device != self.codes.device or not value.is_contiguous()):
                raise AquabitError(
                    f"{name} is on {value.device} with strides {value.stride()}; needed is"
                    f" {self.codes.device}, contiguous"
                )
        numbered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a weight of its own."""
        self.__dict__.update(state)
        numbered(self)

    @property
    def per_row(self) -> bool:
        """Whether each output has tables of its own."""
        return self.tables is not None and len(self.tables) > 1

    @cached_property
    def facts(self) -> tuple[Any, ...]:
        """What kernels are compiled for, beside what their arguments show."""
        read = (self.bits, self.width, self.fused, self.group, self.codebooks, self.kernel_order, self.wide)
        return *read, self.per_row, self.shape[2:]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; those of an ``Arranged`` weight may be shared with it."""
        return sum(
            t.numel() * t.element_size()
            for t in (self.codes, self.tables, self.scale, self.offset)
            if t is not None
        )

    def to(self, device: torch.device | str) -> TritonWeight:
        tables, scale, offset = (
            None if t is None else t.to(device) for t in (self.tables, self.scale, self.offset)
        )
        return replace(self, codes=self.codes.to(device), tables=tables, scale=scale, offset=offset)


def why_not_laid_out(weight: CodebookWeight | Arranged | TritonWeight) -> str | None:
    """Why the kernels cannot read ``weight``, or None."""
    if weight.bits > 8:
        return f"codes of {weight.bits} bits do not fit a byte"
    return None


def lay_out(weight: CodebookWeight | Arranged) -> TritonWeight:
    """``weight`` for the Triton kernels, on its device; raises AquabitError where ``why_not_laid_out``
    says why not."""
    why = why_not_laid_out(weight)
    if why:
        raise AquabitError(f"a weight {list(weight.shape)} cannot be laid out for the triton kernels: {why}")
    run = _one_run(weight)
    tables, scale, offset = (None if t is None else t.contiguous() for t in _numbers(run.stored))
    wide = (
        tables is not None
        and not tables.is_meta
        and float(tables.float().abs().amax((0, 2, 3)).sum()) > _FLOAT16_MAX
    )
    return TritonWeight(
        run.codes.contiguous(),
        tables,
        scale,
        offset,
        run.shape,
        run.bits,
        run.codebooks,
        run.group,
        run.fused,
        run.width,
        weight.order != "inputs",
        wide,
    )


def _numbers(stored: CodebookWeight) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Tables, scale and offset: as they are stored, or float32 where those are codes themselves or
    implied."""
    tables, scale, offset = stored.codebooks, stored.scale, stored.offset
    if stored.levels != "uniform" or isinstance(scale, CodedScale) or isinstance(offset, CodedScale):
        return numbers(stored)
    return tables, scale, offset


def _one_run(weight: CodebookWeight | Arranged) -> Arranged:
    """``weight`` arranged with one segment over the whole row, in stored order."""
    order = "kernel" if weight.order == "kernel" else "inputs"
    if isinstance(weight, Arranged):
        whole = Segment(0, 0, weight.shape[1] if order == "kernel" else prod(weight.shape[1:]), 0)
        joined = replace(weight, segments=(whole,), order=order)
        if (
            order == weight.order
            and joined.segment_bytes(whole) == weight.codes.shape[1]
            and all(_seamless(weight, s) for s in weight.segments[:-1])
        ):
            return joined
        return replace(joined, codes=_laid(joined, _unlaid(weight)))
    single = weight.group == 1 and weight.codebook_count == 1 and weight.order != "kernel"
    count = weight.groups if weight.order == "kernel" else weight.groups * weight.group
    empty = Arranged(
        weight.packed,
        weight.codebooks,
        weight.packed,
        None,
        weight,
        tuple(weight.shape),
        weight.bits,
        weight.codebook_count,
        weight.group,
        FUSED.get(weight.bits, 1) if single else 1,
        order,
        (Segment(0, 0, count, 0),),
    )
    return replace(empty, codes=_laid(empty, weight.codes.permute(2, 0, 1)))


def _seamless(weight: Arranged, segment: Segment) -> bool:
    """Whether a segment fills its bytes, so that the next one's lookups follow without a gap."""
    return segment.inputs % weight.channels == 0 and weight.lookups(segment) * weight.width % 8 == 0

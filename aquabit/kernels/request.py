"""Request: all that a choice of kernel may depend on, as plain values; and the text that a measured time
is kept under."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from math import log2, prod
from typing import Any, Literal

import torch

from aquabit.activation_bits import Rounding, act_bits, act_text
from aquabit.kernels.arranged import FUSED, Arranged, arranges
from aquabit.kernels.arranged import _segments as segments_of
from aquabit.kernels.codebook import CodebookWeight, Order
from aquabit.kernels.geometry import UNPADDED, Geometry, Pair
from aquabit.scheme_record import Layout, Levels

Accuracy = Literal["fast", "exact"]
MOST_ROWS = 4096  # tokens, or pixels of all images: from there on time grows in proportion


class _Hashed:
    """Of a frozen dataclass: its hash is computed once, since every call of a layer asks for it."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_hash"}  # texts hash otherwise elsewhere


@dataclass(frozen=True)
class Format(_Hashed):
    """What a coded weight is, without its numbers. ``unarranged`` says why it has no ``Arranged`` form, or
    is None where it has."""

    shape: tuple[int, ...]
    bits: int  # of one code
    codebooks: int  # M
    group: int  # g
    order: Order
    tables: Literal[
        "uniform", "shared", "channel", "none"
    ]  # implied {0 .. 2^bits - 1}; one set for all, or an output; not coded
    scales: int | None  # groups of inputs with a scale each, 1 for one a row; None where nothing is scaled
    offset: bool
    unarranged: str | None = None
    levels: Levels = "uniform"  # what codes stand for by definition: some are multiplied as integers
    __hash__ = _Hashed.__hash__

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        scales = "" if self.scales is None else f" s{self.scales}"
        levels = "" if self.levels == "uniform" else f" {self.levels}"
        return (
            f"{size} {self.tables}{self.codebooks}x{self.bits}g{self.group}"
            f" {self.order}{scales}{'o' if self.offset else ''}{levels}"
        )

    @property
    def scalar(self) -> bool:
        """Whether codes stand for single weights."""
        return self.group == 1 and self.codebooks == 1 and self.order != "kernel"


def full_format(shape: tuple[int, ...]) -> Format:
    """Of a weight that is not coded but kept at 16 bits."""
    return Format(shape, 16, 1, 1, "inputs", "none", None, False, "it is not coded")


@cache
def hollow_weight(form: Format) -> CodebookWeight:
    """A weight of that format with no numbers in it (all zeros, which take no memory), for those who ask
    only what it is."""
    out, row = form.shape[0], prod(form.shape[1:])
    groups = form.shape[1] if form.order == "kernel" else -(-row // form.group)
    tables = {"shared": 1, "channel": out}.get(form.tables)
    half = torch.zeros((), dtype=torch.float16)
    codebooks = None if tables is None else half.expand(tables, form.codebooks, 1 << form.bits, form.group)
    many = (out, form.scales) if form.scales and form.scales > 1 else (out,)
    scale, offset = (half.expand(many) if there else None for there in (form.scales is not None, form.offset))
    codes = torch.zeros((), dtype=torch.uint8).expand(-(-groups * form.codebooks * out * form.bits // 8))
    return CodebookWeight(codes, codebooks, scale, offset, form.shape, form.bits, form.order)


@cache
def empty_like(form: Format) -> CodebookWeight | Arranged:
    """``hollow_weight`` as kernels would read it."""
    weight = hollow_weight(form)
    if form.unarranged is not None:
        return weight
    out, zero = form.shape[0], torch.zeros(())
    many = (out, form.scales or 1)
    tables = None if weight.codebooks is None else zero.expand(weight.codebooks.shape)
    fused = FUSED.get(form.bits, 1) if form.scalar else 1
    return Arranged(
        torch.zeros((), dtype=torch.uint8).expand(out, 0),
        tables,
        zero.expand(many),
        zero.expand(many) if form.offset else None,
        weight,
        form.shape,
        form.bits,
        form.codebooks,
        form.group,
        fused,
        form.order,
        segments_of(weight),
    )


def format_of(weight: CodebookWeight | Arranged) -> Format:
    """The facts of a weight, the same before and after it is arranged."""
    if isinstance(weight, Arranged):
        return replace(format_of(weight.stored), unarranged=None)
    codebooks, scale, offset = weight.codebooks, weight.scale, weight.offset
    tables: Levels | Literal["shared", "channel"] = weight.levels
    if codebooks is not None:
        tables = "shared" if codebooks.shape[0] == 1 else "channel"
    groups = [t.shape[1] if t.ndim == 2 else 1 for t in (scale, offset) if t is not None]
    layout = Layout(
        weight.bits,
        weight.codebook_count,
        weight.group,
        weight.order,
        tables,
        max(groups, default=None),
        offset is not None,
    )
    return replace(format_of_layout(layout, tuple(weight.shape)), unarranged=arranges(weight))


def format_of_layout(layout: Layout, shape: tuple[int, ...]) -> Format:
    """The facts of a weight of a layout, as kernels see them: signed codes are uniform ones with an offset,
    and other levels a table for all. Whether it can be arranged is left open."""
    tables: Literal["uniform", "shared", "channel", "none"] = "shared"
    if layout.tables in ("uniform", "signed"):
        tables = "uniform"
    elif layout.tables == "channel" or layout.tables == "none":
        tables = layout.tables
    offset = layout.offset or layout.tables == "signed"
    code = (layout.bits, layout.codebooks, layout.group, layout.order)
    return Format(shape, *code, tables, layout.scales, offset, levels=layout.levels)


@dataclass(frozen=True)
class Request(_Hashed):
    """One call of a layer. ``rows`` are tokens (linear) or images (convolution), as ``bucket`` counts them;
    ``size`` is the height and width of a convolution's input. ``dense`` says that a dense copy of the weight
    is kept, ``gradient`` that one is wanted.
    """

    kind: Literal["linear", "conv2d"]
    format: Format
    rows: int
    size: Pair = (0, 0)
    geometry: Geometry = UNPADDED
    act: Rounding = 16
    split: int | None = None
    accuracy: Accuracy = "fast"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    dense: bool = False
    gradient: bool = False
    __hash__ = _Hashed.__hash__

    @property
    def key(self) -> str:
        """What its time is kept under. Activations of 8 bits and fewer take the same time, but for those that
        are symmetric or float8; so do all that is left to float kernels."""
        conv = ""
        if self.kind == "conv2d":
            numbers = (*self.size, *self.geometry.numbers, self.split or 0)
            conv = f" at {'x'.join(map(str, numbers[:2]))} " + ",".join(map(str, numbers[2:]))
        act: Rounding = self.act
        if isinstance(act, int):
            act = 16 if act >= 16 else 8 if act <= 8 else 15
        return (
            f"{self.kind} {self.format} {self.rows} rows{conv} {act_text(act)} {self.accuracy} {self.dtype}"
            f" {self.device}"
        )

    @property
    def integers(self) -> bool:
        """Whether activations are integers of at most 8 bits."""
        return self.act != "f8" and act_bits(self.act) <= 8

    @property
    def multiply_adds(self) -> int:
        """Of the dense layer."""
        return prod(self.format.shape) * self.rows * (prod(self.output) if self.kind == "conv2d" else 1)

    @property
    def output(self) -> Pair:
        """Height and width of a convolution's output."""
        return self.geometry.output(self.size, self.format.shape[2:])


def bucket(rows: int, pixels: int = 1) -> int:
    """``rows`` as a power of two, the nearest in ratio, at most as many as hold MOST_ROWS pixels."""
    most = max(1, MOST_ROWS // max(pixels, 1))
    most = 1 << most.bit_length() - 1
    return min(most, 1 << round(log2(rows))) if rows > 1 else 1

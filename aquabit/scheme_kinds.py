"""The kinds of schemes without torch: how each is written, how a weight of it is stored, how reports draw it.

``Scheme`` looks its kind up in ``KINDS`` and nobody else asks for it. What needs torch, the fit, is one file
for each kind in ``aquabit.quant.schemes``, whose docstring says how to add a kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal, NamedTuple, Protocol

HALF = 2  # bytes of a float16: what scales, offsets, codebooks and weights in full precision are stored in
WORD = 8  # inputs that the ``k`` form covers where a kernel is 1 x 1 (AQUATIC-Diff)


class Fields(Protocol):
    """What a kind reads of a ``Scheme``."""

    @property
    def bits(self) -> int: ...
    @property
    def codebooks(self) -> int: ...
    @property
    def group(self) -> int | None: ...
    @property
    def per_channel(self) -> bool: ...
    @property
    def output_aware(self) -> bool: ...
    @property
    def shared(self) -> bool: ...


@dataclass(frozen=True)
class Layout:
    """What is stored of one weight. Its size, its kernel format and the shapes of its tensors follow from it.

    ``codes`` of ``bits`` bits, ``codebooks`` (M) of them for each ``group`` (g) weights, in the order
    "inputs" or "kernel" (see ``CodebookWeight``). ``tables`` says what codes stand for: "uniform" the whole
    numbers themselves, "shared" one set of codebooks, "channel" a set for each output, "none" the weight as
    it is. ``scales`` of a row, None where nothing is scaled, each with an ``offset`` or without.
    """

    bits: int
    codebooks: int = 1
    group: int = 1
    order: Literal["inputs", "kernel"] = "inputs"
    tables: Literal["uniform", "shared", "channel", "none"] = "uniform"
    scales: int | None = None
    offset: bool = False

    def codebook_shape(self, out: int) -> tuple[int, int, int, int] | None:
        """[C, M, K, g] of the codebooks of ``out`` outputs; None where codes need none."""
        sets = {"shared": 1, "channel": out}.get(self.tables)
        return None if sets is None else (sets, self.codebooks, 1 << self.bits, self.group)

    def stored_bytes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of a weight [out, in] or [out, in, kh, kw]: (packed codes with scales and offsets,
        codebooks)."""
        out, row = shape[0], prod(shape[1:])
        codes = ceil(out * ceil(row / self.group) * self.codebooks * self.bits / 8)
        scales = HALF * out * (self.scales or 0) * (1 + self.offset)
        return codes + scales, HALF * prod(self.codebook_shape(out) or (0,))


class Look(NamedTuple):
    """How reports show a scheme: the method's name in legends, and matplotlib's marker and hatch; of uniform
    configurations the name of their family, the legend and the colour (Okabe and Ito, 2008) of its line."""

    method: str
    marker: str
    hatch: str
    family: str = ""
    legend: str = "uniform"
    colour: str = "#E69F00"


@dataclass(frozen=True)
class SchemeKind:
    """One kind of schemes: its text form in both directions, its storage, and what others have to know of it.

    ``fields`` makes ``Scheme``'s fields of a match of ``pattern``; ``text`` is the inverse. ``codeword`` is
    the number of weights that M codes cover, by the kernel's area kh * kw. ``examples`` are texts of every
    variant: they are named in error messages, and the contract test runs them all.
    """

    name: str
    examples: tuple[str, ...]
    pattern: str
    fields: Callable[[re.Match[str]], dict[str, Any]]
    text: Callable[[Fields], str]
    layout: Callable[[Fields, tuple[int, ...]], Layout]
    look: Callable[[Fields], Look]
    codeword: Callable[[Fields, int], int] = lambda scheme, area: 1
    most_bits: int = 8  # of one code
    always_calibrated: bool = False  # fitted with H wherever there is one, without a final ``h``
    even: bool = False  # levels are evenly spaced, as those of plain integers
    additive: bool = False  # a weight is a sum of codewords, for which kernels make tables
    ranged: bool = False  # ``group`` counts inputs that share a scale
    unlike_even: str | None = None  # what a library of evenly spaced levels cannot express
    plain_name: str = ""  # of a uniform configuration whose layers have formats of their own


# ---- one entry for each kind


def _usq_fields(match: re.Match[str]) -> dict[str, Any]:
    group = match["group"]
    return {
        "bits": int(match["bits"]),
        "group": int(group) if group else None,
        "output_aware": bool(match["h"]),
    }


def _usq_layout(scheme: Fields, shape: tuple[int, ...]) -> Layout:
    row = prod(shape[1:])
    return Layout(scheme.bits, scales=ceil(row / (scheme.group or row)), offset=True)


def _vq_fields(match: re.Match[str]) -> dict[str, Any]:
    return {"bits": int(match["bits"]), "per_channel": bool(match["c"]), "output_aware": bool(match["h"])}


def _aq_fields(match: re.Match[str]) -> dict[str, Any]:
    group = match["group"]
    return {
        "bits": int(match["bits"]),
        "codebooks": int(match["codebooks"]),
        "group": int(group) if group else None,
        "shared": bool(match["s"]),
    }


def _aq_codeword(scheme: Fields, area: int) -> int:
    return scheme.group or (area if area > 1 else WORD)


def _aq_layout(scheme: Fields, shape: tuple[int, ...]) -> Layout:
    area = prod(shape[2:])
    order: Literal["inputs", "kernel"] = "kernel" if scheme.group is None and area > 1 else "inputs"
    return Layout(scheme.bits, scheme.codebooks, _aq_codeword(scheme, area), order, "shared", scales=1)


def _flag(value: bool, letter: str) -> str:
    return letter if value else ""


def _family(scheme: Fields, name: str, plain: str, aware: str) -> tuple[str, str, str]:
    """Family, legend and colour of a kind that has an output-aware form."""
    if scheme.output_aware:
        return f"{name} h", f"uniform {name}, output-aware", aware
    return name, f"uniform {name}", plain


_FULL = SchemeKind(
    name="fp",
    examples=("fp",),
    pattern=r"fp",
    fields=lambda match: {},
    text=lambda scheme: "fp",
    layout=lambda scheme, shape: Layout(8 * HALF, tables="none"),
    look=lambda scheme: Look("fp", "D", ""),
    most_bits=8 * HALF,
)
_UNIFORM = SchemeKind(
    name="usq",
    examples=("usq4", "usq4g64", "usq3h", "usq3g32h"),
    pattern=r"usq(?P<bits>\d+)(?:g(?P<group>\d+))?(?P<h>h?)",
    fields=_usq_fields,
    text=lambda s: f"usq{s.bits}" + (f"g{s.group}" if s.group else "") + _flag(s.output_aware, "h"),
    layout=_usq_layout,
    look=lambda s: Look("usq", "s", "", *_family(s, "usq", "#E69F00", "#56B4E9")),
    even=True,
    ranged=True,
)
_KMEANS = SchemeKind(
    name="vq",
    examples=("vq3", "vq3c", "vq3h", "vq3ch"),
    pattern=r"vq(?P<bits>\d+)(?P<c>c?)(?P<h>h?)",
    fields=_vq_fields,
    text=lambda s: f"vq{s.bits}" + _flag(s.per_channel, "c") + _flag(s.output_aware, "h"),
    layout=lambda s, shape: Layout(s.bits, tables="channel" if s.per_channel else "shared"),
    look=lambda s: Look(
        *(("vqc", "v", "xxxx") if s.per_channel else ("vq", "^", "////")),
        *_family(s, "vq", "#8C8C8C", "#CC79A7"),
    ),
    unlike_even="k-means codebook: evenly spaced levels instead",
)
_ADDITIVE = SchemeKind(
    name="aq",
    examples=("aq2x8g8", "aq2x8k", "aq2x8g8s"),
    pattern=r"aq(?P<codebooks>\d+)x(?P<bits>\d+)(?:g(?P<group>\d+)|k)(?P<s>s?)",
    fields=_aq_fields,
    text=lambda s: f"aq{s.codebooks}x{s.bits}" + (f"g{s.group}" if s.group else "k") + _flag(s.shared, "s"),
    layout=_aq_layout,
    look=lambda scheme: Look("aq", "o", "\\\\\\\\", "aq", "additive, a format per layer", "#009E73"),
    codeword=_aq_codeword,
    most_bits=16,
    always_calibrated=True,
    additive=True,
    unlike_even="additive codebooks: evenly spaced levels instead",
    plain_name="additive codebooks",
)
KINDS: Mapping[str, SchemeKind] = {kind.name: kind for kind in (_FULL, _UNIFORM, _KMEANS, _ADDITIVE)}


def uniform_name(stored: str) -> str:
    """What people call a uniform configuration: its scheme, or what is said of the kind where its layers have
    formats of their own, which a study stores as their kinds (``aq+usq``)."""
    kinds = [KINDS[name] for name in stored.split("+") if name in KINDS]
    return next((kind.plain_name for kind in kinds if kind.plain_name), stored)

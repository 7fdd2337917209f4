"""Scheme, and the kinds there are: how each is written, how a weight of it is stored, how reports draw it.

``Scheme`` looks its kind up in ``KINDS`` and nobody else asks for it. What needs torch, the fit, is one file
for each kind in ``aquabit.quant.schemes``, whose docstring says how to add a kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal, NamedTuple

from aquabit.errors import AquabitError

HALF = 2  # bytes of a float16: what scales, offsets, codebooks and weights in full precision are stored in
LONGEST = 60  # characters of a scheme's name
# raised where ``Scheme.unit_gain`` ones are fitted otherwise: banks keep them apart, and no study mixes them.
# 1 were least squares
UNIT_GAIN_FITS = 2
WIDEST = 8  # bits of codes that are as good as the weight
WORD = 8  # inputs that the ``k`` form covers where a kernel is 1 x 1 (AQUATIC-Diff)


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

    The named groups of ``pattern`` are fields of ``Scheme``, numbers or flags (a letter or nothing); ``text``
    is the inverse. ``codeword`` is the number of weights that M codes cover, by the kernel's area kh * kw.
    ``examples`` are texts of every variant: they are named in error messages, and the contract test runs them
    all.
    """

    name: str
    examples: tuple[str, ...]
    pattern: str
    text: Callable[[Scheme], str]
    layout: Callable[[Scheme, tuple[int, ...]], Layout]
    look: Callable[[Scheme], Look]
    codeword: Callable[[Scheme, int], int] = lambda scheme, area: 1
    most_bits: int = 8  # of one code
    always_calibrated: bool = False  # fitted with H wherever there is one, without a final ``h``
    even: bool = False  # levels are evenly spaced, as those of plain integers
    additive: bool = False  # a weight is a sum of codewords, for which kernels make tables
    ranged: bool = False  # ``group`` counts inputs that share a scale
    unlike_even: str | None = None  # what a library of evenly spaced levels cannot express
    plain_name: str = ""  # of a uniform configuration whose layers have formats of their own


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored; ``Scheme.parse(str(s)) == s``.

    ``fp`` full precision at 16 bits; ``usq4`` uniform per output channel, ``usq4g64`` per 64 inputs; ``vq3``
    k-means over the tensor, ``vq3c`` per output channel; ``aq2x8g8`` two codebooks of 2^8 vectors of 8
    weights, ``aq2x8k`` one k x k kernel slice a group (where the kernel is 1 x 1, 8 inputs); ``aq2x8g8s`` the
    same with its codebooks shared by the layers of one operator type and shape. A final ``h`` means fitted
    output-aware; ``aq`` always is.
    """

    kind: str = "fp"  # a name in KINDS; ask ``record`` what it means
    bits: int = 16  # bits of one code
    codebooks: int = 1
    # usq: inputs that share a scale; aq: weights a codeword covers; None: the whole row, or kernel slice
    group: int | None = None
    per_channel: bool = False
    output_aware: bool = False
    shared: bool = False

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """The scheme that ``text`` names; raises AquabitError where it names none."""
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise AquabitError(f"scheme {text!r:.60} must be text, as in usq4; {_known_forms()}")
        if len(text) > LONGEST:  # numbers that are none of a scheme
            raise AquabitError(f"unknown scheme {text[:LONGEST]!r}...; {_known_forms()}")
        for record in KINDS.values():
            match = re.fullmatch(record.pattern, text)
            if match is None:
                continue
            found = {name: value for name, value in match.groupdict().items() if value is not None}
            fields: dict[str, Any] = {k: int(v) if v.isdigit() else bool(v) for k, v in found.items()}
            scheme, most = Scheme(record.name, **fields), record.most_bits
            counts = scheme.codebooks >= 1 and scheme.group != 0
            if not 1 <= scheme.bits <= most or not counts or str(scheme) != text:
                raise AquabitError(
                    f"scheme {text!r} is out of range: codes have 1 to {most} bits, counts start at 1;"
                    f" {_known_forms()}"
                )
            return scheme
        raise AquabitError(f"unknown scheme {text!r}; {_known_forms()}")

    def __str__(self) -> str:
        return self.record.text(self)

    @property
    def record(self) -> SchemeKind:
        """What is known of the kind: the one place where ``kind`` is asked."""
        return KINDS[self.kind]

    @property
    def calibrated(self) -> bool:
        """Fitted with the second moments of the layer's input (H), so that a fit belongs to a calibration."""
        return self.output_aware or self.record.always_calibrated

    @property
    def unit_gain(self) -> bool:
        """Fitted to the weight alone, and then to gain 1. 8 bits need it not: least squares shrinks them by
        about a ten-thousandth."""
        return not self.calibrated and self.bits < WIDEST

    @property
    def additive(self) -> bool:
        """Whether a weight is a sum of codewords."""
        return self.record.additive

    @property
    def range_group(self) -> int | None:
        """Inputs that share a scale; None where a row has one scale, or none."""
        return self.group if self.record.ranged else None

    @property
    def look(self) -> Look:
        """How reports show it."""
        return self.record.look(self)

    def code_bits(self, kernel_area: int = 1) -> float:
        """Bits of codes per weight, without codebooks and scales; ``kernel_area`` = kh * kw serves the
        ``k`` form."""
        return self.codebooks * self.bits / self.group_size(kernel_area)

    def group_size(self, kernel_area: int = 1) -> int:
        """Weights that one codeword covers (1 where each weight has a code of its own), by the kernel's area
        kh * kw."""
        return self.record.codeword(self, kernel_area)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """What is stored of a weight [out, in] or [out, in, kh, kw]."""
        return self.record.layout(self, shape)

    def stored_bytes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of one stored weight [out, in] or [out, in, kh, kw]: (packed codes with float16 scales and
        offsets, float16 codebooks)."""
        return self.layout(shape).stored_bytes(shape)

    def table_operations(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """(multiply-adds, adds) of the table kernel relative to the dense layer's multiply-adds: M K / out
        to make the tables, divided by the kernel's area where its taps share them (groups of ``gN``), and
        M / g table entries added (AQUATIC-Diff). (1, 0) for schemes that are counted as decoded and
        multiplied: those that are not additive."""
        if not self.additive:
            return 1.0, 0.0
        area = prod(shape[2:])
        size, taps = self.group_size(area), 1 if self.group is None else area
        return self.codebooks * 2**self.bits / (taps * shape[0]), self.codebooks / size

    def operations(self, shape: tuple[int, ...]) -> float:
        """Both parts of ``table_operations`` as one number: an add is half a multiply-add."""
        multiply_adds, adds = self.table_operations(shape)
        return multiply_adds + adds / 2


# ---- one entry for each kind


def _usq_layout(scheme: Scheme, shape: tuple[int, ...]) -> Layout:
    row = prod(shape[1:])
    return Layout(scheme.bits, scales=ceil(row / (scheme.group or row)), offset=True)


def _aq_codeword(scheme: Scheme, area: int) -> int:
    return scheme.group or (area if area > 1 else WORD)


def _aq_layout(scheme: Scheme, shape: tuple[int, ...]) -> Layout:
    area = prod(shape[2:])
    order: Literal["inputs", "kernel"] = "kernel" if scheme.group is None and area > 1 else "inputs"
    return Layout(scheme.bits, scheme.codebooks, _aq_codeword(scheme, area), order, "shared", scales=1)


def _flag(value: bool, letter: str) -> str:
    return letter if value else ""


def _family(scheme: Scheme, name: str, plain: str, aware: str) -> tuple[str, str, str]:
    """Family, legend and colour of a kind that has an output-aware form."""
    if scheme.output_aware:
        return f"{name} h", f"uniform {name}, output-aware", aware
    return name, f"uniform {name}", plain


FULL = SchemeKind(
    name="fp",
    examples=("fp",),
    pattern=r"fp",
    text=lambda scheme: "fp",
    layout=lambda scheme, shape: Layout(8 * HALF, tables="none"),
    look=lambda scheme: Look("fp", "D", ""),
    most_bits=8 * HALF,
)
UNIFORM = SchemeKind(
    name="usq",
    examples=("usq4", "usq4g64", "usq3h", "usq3g32h"),
    pattern=r"usq(?P<bits>\d+)(?:g(?P<group>\d+))?(?P<output_aware>h?)",
    text=lambda s: f"usq{s.bits}" + (f"g{s.group}" if s.group else "") + _flag(s.output_aware, "h"),
    layout=_usq_layout,
    look=lambda s: Look("usq", "s", "", *_family(s, "usq", "#E69F00", "#56B4E9")),
    even=True,
    ranged=True,
)
KMEANS = SchemeKind(
    name="vq",
    examples=("vq3", "vq3c", "vq3h", "vq3ch"),
    pattern=r"vq(?P<bits>\d+)(?P<per_channel>c?)(?P<output_aware>h?)",
    text=lambda s: f"vq{s.bits}" + _flag(s.per_channel, "c") + _flag(s.output_aware, "h"),
    layout=lambda s, shape: Layout(s.bits, tables="channel" if s.per_channel else "shared"),
    look=lambda s: Look(
        *(("vqc", "v", "xxxx") if s.per_channel else ("vq", "^", "////")),
        *_family(s, "vq", "#8C8C8C", "#CC79A7"),
    ),
    unlike_even="k-means codebook: evenly spaced levels instead",
)
ADDITIVE = SchemeKind(
    name="aq",
    examples=("aq2x8g8", "aq2x8k", "aq2x8g8s"),
    pattern=r"aq(?P<codebooks>\d+)x(?P<bits>\d+)(?:g(?P<group>\d+)|k)(?P<shared>s?)",
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
KINDS: Mapping[str, SchemeKind] = {kind.name: kind for kind in (FULL, UNIFORM, KMEANS, ADDITIVE)}


def _known_forms() -> str:
    return f"known forms: {', '.join(form for kind in KINDS.values() for form in kind.examples)}"


def uniform_name(stored: str) -> str:
    """What people call a uniform configuration: its scheme, or what is said of the kind where its layers have
    formats of their own, which a study stores as their kinds (``aq+usq``)."""
    kinds = [KINDS[name] for name in stored.split("+") if name in KINDS]
    return next((kind.plain_name for kind in kinds if kind.plain_name), stored)


FP = Scheme()


def parse_swap(text: str) -> tuple[Scheme, Scheme]:
    """``"usq4:usq2"`` as two schemes."""
    schemes = [Scheme.parse(part) for part in text.split(":")]
    if len(schemes) != 2 or schemes[0] == schemes[1]:
        raise AquabitError(f"swap {text!r} must name two different schemes, as in usq4:usq2")
    return schemes[0], schemes[1]

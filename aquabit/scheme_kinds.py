"""Scheme, and the kinds there are: how each is written, how a weight of it is stored, how reports draw it.

``Scheme`` looks its kind up in ``KINDS`` and nobody else asks for it. What needs torch, the fit, is one file
for each kind in ``aquabit.quant.schemes``, whose docstring says how to add a kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

from aquabit.deployed_kinds import DEPLOYED
from aquabit.errors import AquabitError
from aquabit.scheme_record import HALF, Layout, Look, SchemeKind, family, flag

LONGEST = 60  # characters of a scheme's name
# raised where ``Scheme.unit_gain`` ones are fitted otherwise: banks keep them apart, and no study mixes them.
# 1 were least squares
UNIT_GAIN_FITS = 2
WIDEST = 8  # bits of codes that are as good as the weight
WORD = 8  # inputs that the ``k`` form covers where a kernel is 1 x 1 (AQUATIC-Diff)


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored; ``Scheme.parse(str(s)) == s``.

    ``fp`` full precision at 16 bits; ``usq4`` uniform per output channel, ``usq4g64`` per 64 inputs; ``vq3``
    k-means over the tensor, ``vq3c`` per output channel; ``aq2x8g8`` two codebooks of 2^8 vectors of 8
    weights, ``aq2x8k`` one k x k kernel slice a group (where the kernel is 1 x 1, 8 inputs); ``aq2x8g8s`` the
    same with its codebooks shared by the layers of one operator type and shape. ``int4g64``, ``nf4g64``,
    ``fp8``, ``mxfp4``, ``nvfp4``, ``q4_K`` and others are what other programs run (``deployed_kinds``). A
    final ``h`` means fitted output-aware; ``aq`` always is.
    """

    kind: str = "fp"  # a name in KINDS; ask ``record`` what it means
    bits: int = 16  # bits of one code
    codebooks: int = 1
    # usq: inputs that share a scale; aq: weights a codeword covers; None: the whole row, or kernel slice
    group: int | None = None
    per_channel: bool = False
    output_aware: bool = False
    shared: bool = False
    nested: bool = False  # scales are coded under scales of their own (nf4)

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
            scheme, most = Scheme(record.name, **{**record.fixed, **fields}), record.most_bits
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
        return self.record.gain_one and not self.calibrated and self.bits < WIDEST

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
        """What is stored of a weight [out, in] or [out, in, kh, kw]; raises AquabitError where it cannot be
        stored so."""
        why = self.refuses(shape)
        if why:
            raise AquabitError(f"{self} cannot hold a weight {list(shape)}: {why}")
        return self.record.layout(self, shape)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight [out, in] or [out, in, kh, kw] cannot be stored so, or None."""
        return self.record.refuses(self, shape)

    def stored_bytes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of one stored weight [out, in] or [out, in, kh, kw]: (packed codes with scales and offsets,
        float16 codebooks)."""
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
    text=lambda s: f"usq{s.bits}" + (f"g{s.group}" if s.group else "") + flag(s.output_aware, "h"),
    layout=_usq_layout,
    look=lambda s: Look("usq", "s", "", *family(s, "usq", "#E69F00", "#56B4E9")),
    even=True,
    ranged=True,
    gain_one=True,
)
KMEANS = SchemeKind(
    name="vq",
    examples=("vq3", "vq3c", "vq3h", "vq3ch"),
    pattern=r"vq(?P<bits>\d+)(?P<per_channel>c?)(?P<output_aware>h?)",
    text=lambda s: f"vq{s.bits}" + flag(s.per_channel, "c") + flag(s.output_aware, "h"),
    layout=lambda s, shape: Layout(s.bits, tables="channel" if s.per_channel else "shared"),
    look=lambda s: Look(
        *(("vqc", "v", "xxxx") if s.per_channel else ("vq", "^", "////")),
        *family(s, "vq", "#8C8C8C", "#CC79A7"),
    ),
    gain_one=True,
    unlike_even="k-means codebook: evenly spaced levels instead",
)
ADDITIVE = SchemeKind(
    name="aq",
    examples=("aq2x8g8", "aq2x8k", "aq2x8g8s"),
    pattern=r"aq(?P<codebooks>\d+)x(?P<bits>\d+)(?:g(?P<group>\d+)|k)(?P<shared>s?)",
    text=lambda s: f"aq{s.codebooks}x{s.bits}" + (f"g{s.group}" if s.group else "k") + flag(s.shared, "s"),
    layout=_aq_layout,
    look=lambda scheme: Look("aq", "o", "\\\\\\\\", "aq", "additive, a format per layer", "#009E73"),
    codeword=_aq_codeword,
    most_bits=16,
    always_calibrated=True,
    additive=True,
    unlike_even="additive codebooks: evenly spaced levels instead",
    plain_name="additive codebooks",
)
KINDS: Mapping[str, SchemeKind] = {kind.name: kind for kind in (FULL, UNIFORM, KMEANS, ADDITIVE, *DEPLOYED)}


def _known_forms() -> str:
    """Of every kind; a final h is left out where the form without it is named."""
    every = [(form, kind.examples) for kind in KINDS.values() for form in kind.examples]
    named = [form for form, beside in every if not (form.endswith("h") and form[:-1] in beside)]
    return f"known forms: {', '.join(named)}"


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

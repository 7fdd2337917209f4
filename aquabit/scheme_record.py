"""What is said of a kind of schemes, and what is stored of one weight: plain values that ``scheme_kinds``
and ``deployed_kinds`` fill in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any, Literal, NamedTuple

HALF = 2  # bytes of a float16: what scales, offsets, codebooks and weights in full precision are stored in

# Codes without stored codebooks stand for what is known: themselves, themselves less 2^(bits - 1), or an
# entry of a table that a format is defined by (kernels/fixed_levels.py).
Levels = Literal["uniform", "signed", "nf4", "e2m1", "e4m3", "iq4_nl"]


@dataclass(frozen=True)
class Factors:
    """How scales are stored, and offsets where there are any: numbers of ``bits`` bits each, of a ``kind``.

    ``over`` is the type of the factors that multiply them (None: there are none), one for each ``every``
    numbers in the order of rows, or 0: one for all; ``base``: a float32 is added to all. ``whole``: there is
    one number for the whole weight. ``negative``: programs have scales below 0 too.
    """

    kind: Literal["float16", "float32", "e8m0", "e4m3", "unsigned", "signed", "dynamic"] = "float16"
    bits: int = 8 * HALF
    over: Literal["float16", "float32"] | None = None
    every: int = 0
    base: bool = False
    whole: bool = False
    negative: bool = False

    @property
    def coded(self) -> bool:
        """Whether the numbers are codes, and not floats as they stand."""
        return self.kind not in ("float16", "float32")

    def shape(self, out: int, scales: int) -> tuple[int, int]:
        """Of the numbers of a weight with ``scales`` in each of ``out`` rows."""
        return (1, 1) if self.whole else (out, scales)

    def overs(self, out: int, scales: int) -> int:
        """How many factors are over the numbers."""
        numbers = prod(self.shape(out, scales))
        return 0 if self.over is None else ceil(numbers / (self.every or numbers))

    def nbytes(self, out: int, scales: int) -> int:
        """Bytes of all numbers and of what is over them."""
        over = {"float16": HALF, "float32": 4, None: 0}[self.over] * self.overs(out, scales)
        return ceil(prod(self.shape(out, scales)) * self.bits / 8) + over + 4 * self.base


PLAIN = Factors()


@dataclass(frozen=True)
class Layout:
    """What is stored of one weight. Its size, its kernel format and the shapes of its tensors follow from it.

    ``codes`` of ``bits`` bits, ``codebooks`` (M) of them for each ``group`` (g) weights, in the order
    "inputs", "kernel" or "flat" (see ``CodebookWeight``). ``tables`` says what codes stand for: "shared" one
    set of codebooks, "channel" a set for each output, "none" the weight as it is, else ``Levels``.
    ``scales`` of a row, None where nothing is scaled, each with an ``offset`` or without, stored as
    ``factors`` says.
    """

    bits: int
    codebooks: int = 1
    group: int = 1
    order: Literal["inputs", "kernel", "flat"] = "inputs"
    tables: Levels | Literal["shared", "channel", "none"] = "uniform"
    scales: int | None = None
    offset: bool = False
    factors: Factors = PLAIN

    def codebook_shape(self, out: int) -> tuple[int, int, int, int] | None:
        """[C, M, K, g] of the codebooks of ``out`` outputs; None where codes need none."""
        sets = {"shared": 1, "channel": out}.get(self.tables)
        return None if sets is None else (sets, self.codebooks, 1 << self.bits, self.group)

    @property
    def levels(self) -> Levels:
        """What codes without codebooks stand for."""
        if self.tables == "shared" or self.tables == "channel" or self.tables == "none":
            return "uniform"
        return self.tables

    def stored_bytes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of a weight [out, in] or [out, in, kh, kw]: (packed codes with scales and offsets,
        codebooks)."""
        out, row = shape[0], prod(shape[1:])
        codes = ceil(out * ceil(row / self.group) * self.codebooks * self.bits / 8)
        scales = self.factors.nbytes(out, self.scales) * (1 + self.offset) if self.scales else 0
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

    The named groups of ``pattern`` are fields of ``Scheme``, numbers or flags (a letter or nothing), and
    ``fixed`` are those that the kind itself says; ``text`` is the inverse. ``codeword`` is the number of
    weights that M codes cover, by the kernel's area kh * kw. ``refuses`` says why a weight of a shape cannot
    be stored so, or None. ``examples`` are texts of every variant: they are named in error messages, and the
    contract test runs them all. Callables get a ``Scheme``.
    """

    name: str
    examples: tuple[str, ...]
    pattern: str
    text: Callable[[Any], str]
    layout: Callable[[Any, tuple[int, ...]], Layout]
    look: Callable[[Any], Look]
    codeword: Callable[[Any, int], int] = lambda scheme, area: 1
    refuses: Callable[[Any, tuple[int, ...]], str | None] = lambda scheme, shape: None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    most_bits: int = 8  # of one code
    always_calibrated: bool = False  # fitted with H wherever there is one, without a final ``h``
    even: bool = False  # levels are evenly spaced, as those of plain integers
    additive: bool = False  # a weight is a sum of codewords, for which kernels make tables
    ranged: bool = False  # ``group`` counts inputs that share a scale
    gain_one: bool = False  # fitted to the weight alone, and then to gain 1, not to least squares
    unlike_even: str | None = None  # what a library of evenly spaced levels cannot express
    plain_name: str = ""  # of a uniform configuration whose layers have formats of their own


def flag(value: bool, letter: str) -> str:
    """A letter of a text form, where it is set."""
    return letter if value else ""


def family(scheme: Any, name: str, plain: str, aware: str) -> tuple[str, str, str]:
    """Family, legend and colour of a kind that has an output-aware form."""
    if scheme.output_aware:
        return f"{name} h", f"uniform {name}, output-aware", aware
    return name, f"uniform {name}", plain

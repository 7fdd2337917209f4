"""The formats that other programs run: what each stores, as facts of its documentation and reference code.

Groups of inputs are those of the program. GGUF's (llama.cpp's ggml-common.h) lie in the order in which a
row is stored, (cin, kh, kw); the others' are of channels at one tap, as SDNQ has them. Sources: OCP
Microscaling 1.0 (mxfp4, mxfp8), NVIDIA's description of NVFP4, OCP 8-bit floats (fp8), QLoRA (arXiv
2305.14314) and bitsandbytes (nf4).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

from aquabit.scheme_record import Factors, Layout, Levels, Look, SchemeKind, family, flag

SUPER = 256  # weights of a super-block of GGUF's k formats
NESTED = 256  # scales of nf4 that share a scale


def _grouped(group: int | None, shape: tuple[int, ...]) -> int:
    """Groups of a row."""
    return prod(shape[1:]) // group if group else 1


def _refuses(scheme: Any, shape: tuple[int, ...]) -> str | None:
    """Why the inputs of a tap do not fall into groups."""
    if scheme.group is None or shape[1] % scheme.group == 0:
        return None
    return f"its {shape[1]} inputs must be a multiple of {scheme.group}"


def _refuses_blocks(size: int, shape: tuple[int, ...]) -> str | None:
    """Why a row does not fall into blocks of ``size`` weights."""
    row = prod(shape[1:])
    return None if row % size == 0 else f"its rows of {row} weights must be a multiple of {size}"


def _kind(
    name: str,
    examples: tuple[str, ...],
    pattern: str,
    tables: Levels,
    factors: Any,
    fixed: Mapping[str, Any] | None = None,
) -> SchemeKind:
    """A kind whose text is ``pattern`` and a final ``h``; ``factors`` of a scheme are its scales'."""

    def text(scheme: Any) -> str:
        group = f"g{scheme.group}" if scheme.group and "group" in pattern else ""
        bits = str(scheme.bits) if "bits" in pattern else ""
        letters = flag(scheme.per_channel, "c") + flag(scheme.nested, "d") + flag(scheme.output_aware, "h")
        return f"{name}{bits}{group}{letters}"

    return SchemeKind(
        name=name,
        examples=examples,
        pattern=pattern + "(?P<output_aware>h?)",
        text=text,
        layout=lambda s, shape: Layout(
            s.bits, tables=tables, scales=_grouped(s.group, shape), factors=factors(s)
        ),
        look=lambda s: Look(name, "P", "..", *family(s, name, "#D55E00", "#0072B2")),
        refuses=_refuses,
        fixed=fixed or {},
        even=tables == "signed",
        ranged=True,
        unlike_even=None if tables == "signed" else f"{name} levels: evenly spaced ones instead",
    )


INTEGERS = _kind(
    "int",
    ("int8", "int4g32", "int4g64", "int8h", "int4g64h"),
    r"int(?P<bits>[2-8])(?:g(?P<group>\d+))?",
    "signed",
    lambda s: Factors(),
)
NF4 = _kind(
    "nf4",
    ("nf4g64", "nf4g64d", "nf4g64h", "nf4g64dh"),
    r"nf4g(?P<group>64|128|256|512|1024|2048|4096)(?P<nested>d?)",
    "nf4",
    lambda s: Factors("dynamic", 8, "float32", NESTED, base=True) if s.nested else Factors("float32", 32),
    {"bits": 4},
)
FP8 = _kind(
    "fp8",
    ("fp8", "fp8c", "fp8h", "fp8ch"),
    r"fp8(?P<per_channel>c?)",
    "e4m3",
    lambda s: Factors("float32", 32, whole=not s.per_channel),
    {"bits": 8},
)
MXFP4 = _kind(
    "mxfp4", ("mxfp4", "mxfp4h"), "mxfp4", "e2m1", lambda s: Factors("e8m0", 8), {"bits": 4, "group": 32}
)
MXFP8 = _kind(
    "mxfp8", ("mxfp8", "mxfp8h"), "mxfp8", "e4m3", lambda s: Factors("e8m0", 8), {"bits": 8, "group": 32}
)
NVFP4 = _kind(
    "nvfp4",
    ("nvfp4", "nvfp4h"),
    "nvfp4",
    "e2m1",
    lambda s: Factors("e4m3", 8, "float32"),
    {"bits": 4, "group": 16},
)


def _gguf(
    name: str, bits: int, group: int, tables: Levels, factors: Factors | None = None, offset: bool = False
) -> SchemeKind:
    """A format of GGUF: blocks of ``group`` weights with a scale, in super-blocks where scales are coded."""
    block = group if factors is None else SUPER

    def layout(scheme: Any, shape: tuple[int, ...]) -> Layout:
        order: Literal["inputs", "flat"] = "flat" if prod(shape[2:]) > 1 else "inputs"
        scales = prod(shape[1:]) // group
        return Layout(
            bits, 1, 1, order, tables, scales, offset, factors or Factors(negative=tables != "uniform")
        )

    return SchemeKind(
        name=name,
        examples=(name, f"{name}h"),
        pattern=f"{name}(?P<output_aware>h?)",
        text=lambda s: name + flag(s.output_aware, "h"),
        layout=layout,
        look=lambda s: Look(name, "X", "++", *family(s, name, "#009E73", "#0072B2")),
        refuses=lambda s, shape: _refuses_blocks(block, shape),
        fixed={"bits": bits, "group": group},
        even=tables != "iq4_nl",
        ranged=True,
        unlike_even=None if tables != "iq4_nl" else f"{name} levels: evenly spaced ones instead",
    )


def _under(kind: Any, bits: int, group: int) -> Factors:
    return Factors(kind, bits, "float16", SUPER // group, negative=kind == "signed")


GGUF = (
    _gguf("q4_0", 4, 32, "signed"),
    _gguf("q4_1", 4, 32, "uniform", offset=True),
    _gguf("q5_0", 5, 32, "signed"),
    _gguf("q5_1", 5, 32, "uniform", offset=True),
    _gguf("q8_0", 8, 32, "signed"),
    _gguf("iq4_nl", 4, 32, "iq4_nl"),
    _gguf("q2_K", 2, 16, "uniform", _under("unsigned", 4, 16), offset=True),
    _gguf("q3_K", 3, 16, "signed", _under("signed", 6, 16)),
    _gguf("q4_K", 4, 32, "uniform", _under("unsigned", 6, 32), offset=True),
    _gguf("q5_K", 5, 32, "uniform", _under("unsigned", 6, 32), offset=True),
    _gguf("q6_K", 6, 16, "signed", _under("signed", 8, 16)),
)
DEPLOYED = (INTEGERS, NF4, FP8, MXFP4, MXFP8, NVFP4, *GGUF)

"""A weight of one of GGUF's formats in the bytes of its blocks, and back (llama.cpp, ggml-common.h).

Every format has a list of fields, in the order of a block's bytes. Codes of more than 4 bits are split: low
bits lie as nibbles or pairs, the rest in a field of their own. Weights that share a byte are not neighbours:
see ``spread``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.coded_scale import CodedScale
from aquabit.scheme import Scheme

Field = Callable[["Block"], Tensor]  # uint8 [blocks, bytes]


class Block(NamedTuple):
    """Blocks of a weight: ``codes`` uint8 [blocks, weights], float16 ``d`` and ``m`` [blocks], the factors of
    scales and offsets, and where these are coded their codes [blocks, n]."""

    codes: Tensor
    d: Tensor
    m: Tensor | None
    scales: Tensor | None
    mins: Tensor | None


def spread(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes of ``bits`` bits, of which 8 / bits share a byte: in every ``run`` weights those that are run *
    bits / 8 apart."""
    per = 8 // bits
    parts = codes.reshape(len(codes), -1, per, run // per).to(torch.int32)
    shifts = torch.arange(per)[None, None, :, None] * bits
    return (parts << shifts).sum(2).to(torch.uint8).flatten(1)


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).reshape(-1, 1).contiguous().view(torch.uint8)


def _d(block: Block) -> Tensor:
    return _half(block.d)


def _m(block: Block) -> Tensor:
    """What is added."""
    assert block.m is not None
    return _half(block.m)


def _minus_m(block: Block) -> Tensor:
    """What is taken off."""
    assert block.m is not None
    return _half(-block.m)


def _low(bits: int, run: int) -> Field:
    return lambda block: spread(block.codes & ((1 << bits) - 1), bits, run)


def _high(shift: int, bits: int, run: int) -> Field:
    return lambda block: spread(block.codes >> shift & ((1 << bits) - 1), bits, run)


def _bits(block: Block) -> Tensor:
    """The fifth bits of 32 weights, one after another."""
    return (block.codes.reshape(len(block.codes), 4, 8).int() >> 4 << torch.arange(8)).sum(2).to(torch.uint8)


def _bytes(block: Block) -> Tensor:
    """Whole numbers of 8 bits about zero, in two's complement."""
    return block.codes ^ 128


def _nibbles(block: Block) -> Tensor:
    """Scales and minimums of 4 bits, a pair a byte (q2_K)."""
    assert block.scales is not None and block.mins is not None
    return block.scales | block.mins << 4


def _twelve(block: Block) -> Tensor:
    """16 scales of 6 bits: the low 4 of number i and i + 8 in byte i, the high 2 in four bytes (q3_K)."""
    assert block.scales is not None
    return torch.cat([spread(block.scales & 15, 4, 16), spread(block.scales >> 4, 2, 16)], 1)


def _scales_and_mins(block: Block) -> Tensor:
    """8 scales and 8 minimums of 6 bits: the first four of each whole, with the high bits of the others above
    them, whose low bits make four bytes (q4_K, q5_K)."""
    assert block.scales is not None and block.mins is not None
    first, last = (torch.stack([t[:, :4], t[:, 4:]]) for t in (block.scales, block.mins))
    above = [pair[0] | pair[1] >> 4 << 6 for pair in (first, last)]
    return torch.cat([*above, (first[1] & 15) | (last[1] & 15) << 4], 1)


def _signed_scales(block: Block) -> Tensor:
    """Scales of 8 bits in two's complement (q6_K)."""
    assert block.scales is not None
    return block.scales ^ 128


FIELDS: dict[str, tuple[Field, ...]] = {
    "q4_0": (_d, _low(4, 32)),
    "q4_1": (_d, _m, _low(4, 32)),
    "q5_0": (_d, _bits, _low(4, 32)),
    "q5_1": (_d, _m, _bits, _low(4, 32)),
    "q8_0": (_d, _bytes),
    "iq4_nl": (_d, _low(4, 32)),
    "q2_K": (_nibbles, _low(2, 128), _d, _minus_m),
    "q3_K": (_high(2, 1, 256), _low(2, 128), _twelve, _d),
    "q4_K": (_d, _minus_m, _scales_and_mins, _low(4, 64)),
    "q5_K": (_d, _minus_m, _scales_and_mins, _high(4, 1, 256), _low(4, 64)),
    "q6_K": (_low(4, 128), _high(4, 2, 128), _signed_scales, _d),
}


def to_blocks(weight: CodebookWeight, scheme: Scheme | str) -> Tensor:
    """The bytes of a weight's blocks, uint8 [out, bytes of a row], as a GGUF file of that type has them.

    Raises AquabitError where ``scheme`` is none of GGUF's, or the weight is not stored so.
    """
    parsed = Scheme.parse(scheme)
    if parsed.kind not in FIELDS:
        raise AquabitError(f"{parsed} is no format of GGUF; they are {', '.join(FIELDS)}")
    layout, out = parsed.layout(weight.shape), weight.shape[0]
    if (weight.levels, weight.bits, weight.order) != (layout.levels, layout.bits, layout.order):
        raise AquabitError(
            f"the weight has {weight.bits} bits of {weight.levels} levels in the order {weight.order};"
            f" {parsed} has {layout.bits} of {layout.levels}, {layout.order}"
        )
    size = (parsed.group or 1) * (layout.factors.every or 1)
    codes = weight.codes[:, 0].t().reshape(-1, size)
    d, scales = _parts(weight.scale)
    m, mins = (None, None) if weight.offset is None else _parts(weight.offset)
    block = Block(codes, d, m, scales, mins)
    return torch.cat([field(block) for field in FIELDS[parsed.kind]], 1).reshape(out, -1)


def _parts(factor: Tensor | CodedScale | None) -> tuple[Tensor, Tensor | None]:
    """Factors of blocks, and the codes under them [blocks, n]."""
    if isinstance(factor, CodedScale):
        assert factor.over is not None
        return factor.over, factor.integers.reshape(len(factor.over), -1)
    assert factor is not None
    return factor.reshape(-1), None

"""What the table kernel makes of an arranged weight, once: its codewords around their mean, as floats and as
integers, and its groups of inputs in blocks, for which a table is made at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isqrt, prod
from typing import NamedTuple

import torch
from torch import Tensor

from aquabit.kernels.arranged import NIBBLE, Arranged, Segment

LOOKUPS = 32
TABLE_BYTES = 1 << 18
DOTS = 4  # inputs of a lookup from which on tables are made by 16-bit dot products
LOSS = 4608  # of a block, at most: see _loss
TAP_LOSS = 3500  # the same where taps share tables: one unit serves a tile
TAP_LOSS_MOST = 5000  # above it convolutions take float32 tables


class _Block(NamedTuple):
    """Groups of inputs from a first channel on, and the runs of codes that refer to them: (tap, byte in a
    row, group of scales). The last group may reach beyond the inputs: what lies there belongs to other
    scales, or is not there at all."""

    first: int
    inputs: int
    groups: int
    runs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """What the extension is told of an arranged weight besides its codes."""

    codewords: Tensor  # [M, K, span], centred; fused: [half, span / 2], which serves both halves
    # the same in int16, in units of word_unit, an even number of them to a codeword; None where fused
    words: Tensor | None
    by_input: Tensor  # the same [M, span, K padded]
    aux_weights: Tensor  # [span]: what centring took away is a sum of inputs, which aux_scale multiplies
    aux_scale: Tensor  # [out, n]
    blocks: Tensor  # int64 [blocks, 4]: first channel, channels, groups, runs
    runs: Tensor  # int64 [runs, 3]
    longest: float  # of all codewords
    word_unit: float


def taps_of(weight: Arranged) -> list[list[Segment]] | None:
    """Segments by tap, or None where taps are not cut alike."""
    by_tap: dict[int, list[Segment]] = {}
    for segment in weight.segments:
        by_tap.setdefault(segment.tap, []).append(segment)
    taps = list(by_tap.values())
    return taps if all([s[1:3] for s in tap] == [s[1:3] for s in taps[0]] for tap in taps) else None


def _blocks(weight: Arranged) -> list[_Block]:
    """Each segment's groups in blocks, which end at whole bytes."""
    taps, starts, at = taps_of(weight), {}, 0
    assert taps is not None
    for segment in weight.segments:
        starts[segment] = at
        at += weight.segment_bytes(segment)
    shared = len(taps) > 1
    per_byte = 2 if weight.width == NIBBLE else 1
    rows = 256 if weight.width == NIBBLE else 1 << weight.bits * weight.fused
    most = min(LOOKUPS, TABLE_BYTES // (64 * rows) * per_byte) // weight.codebooks
    most = isqrt(TAP_LOSS // _loss(weight)) if shared else min(most, isqrt(LOSS // _loss(weight)))
    even = _even(weight)
    most = max(most // even, 1) * even
    blocks = []
    for column in zip(*taps, strict=True):
        count = ceil(column[0].inputs / weight.channels)
        for group in range(0, count, most):
            byte = group * weight.codebooks * weight.width // 8
            runs = tuple((s.tap, starts[s] + byte, s.scales) for s in column)
            first, held = group * weight.channels, min(most, count - group)
            inputs = min(held * weight.channels, column[0].inputs - first)
            blocks.append(_Block(column[0].start + first, inputs, held, runs))
    return blocks


def _loss(weight: Arranged) -> int:
    """Roundings times inputs of one group (at all taps, where they share tables); a block of n groups has
    n^2 as many, and a relative error of about 1.2e-5 times the root of that (measured with Gaussian
    inputs)."""
    runs = prod(weight.shape[2:]) if weight.order != "kernel" else 1
    return runs * weight.codebooks * (2 if weight.fused > 1 else 1) * runs * weight.span


def _even(weight: Arranged) -> int:
    """Groups that blocks have a multiple of, to end at whole bytes."""
    return 2 if weight.width == NIBBLE and weight.codebooks % 2 else 1


def is_rough(weight: Arranged) -> bool:
    """Whether even the smallest block would lose too much in int16."""
    return (
        weight.order != "kernel"
        and prod(weight.shape[2:]) > 1
        and _loss(weight) * _even(weight) ** 2 > TAP_LOSS_MOST
    )


def plan_of(weight: Arranged) -> Plan:
    codewords, aux_weights, aux_scale = _centred(weight)
    padded = ceil(codewords.shape[1] / 16) * 16
    by_input = torch.nn.functional.pad(
        codewords.transpose(1, 2), (0, padded - codewords.shape[1])
    ).contiguous()
    blocks = _blocks(weight)
    table = torch.tensor([[b.first, b.inputs, b.groups, len(b.runs)] for b in blocks])
    runs = torch.tensor([r for b in blocks for r in b.runs])
    fused = weight.fused > 1
    longest = float(codewords.double().norm(dim=2).max()) * (2**0.5 if fused else 1)
    words, word_unit = (None, 1.0) if fused or weight.span < DOTS else _integers(codewords)
    return Plan(codewords, words, by_input, aux_weights, aux_scale, table, runs, longest, word_unit)


def _integers(codewords: Tensor) -> tuple[Tensor, float]:
    """[M, K, span] in int16 of 15 bits, padded to an even span, and their unit: inputs get the bits that
    are left."""
    unit = float(codewords.abs().max()) / 16383 or 1.0
    words = (codewords / unit).round().to(torch.int16)
    return torch.nn.functional.pad(words, (0, words.shape[2] % 2)).contiguous(), unit


def _centred(weight: Arranged) -> tuple[Tensor, Tensor, Tensor]:
    """Codewords around their mean [M, K, span] (fused: of half a lookup), and what the mean is worth:
    weights of inputs, scale by row."""
    if not weight.scalar:
        assert weight.tables is not None
        mean = weight.tables[0].double().mean(1, keepdim=True)
        return (
            (weight.tables[0] - mean).float().contiguous(),
            mean.sum(0)[0].float().contiguous(),
            weight.scale,
        )
    count = 1 << weight.bits
    values = torch.arange(count).double() if weight.tables is None else weight.tables[0, 0, :, 0].double()
    centre = values.mean()
    parts = max(weight.fused // 2, 1)
    codes = torch.arange(count**parts)
    words = torch.stack(
        [(values - centre)[(codes >> weight.bits * i) & (count - 1)] for i in range(parts)], 1
    )
    aux_scale = weight.scale.double() * centre + (0 if weight.offset is None else weight.offset.double())
    return words.float()[None].contiguous(), torch.ones(weight.span), aux_scale.float().contiguous()

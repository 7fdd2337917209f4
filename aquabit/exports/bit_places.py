"""Codes of 2 to 7 bits in bytes, as SDNQ packs them (its packed_int).

Codes that do not fill bytes evenly share them: each byte holds one whole code or more, and the bits that are
left over hold pieces of others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int, int]  # the code's place, its lowest bit here, how many bits


class Places(NamedTuple):
    """Where the bits of ``codes`` codes lie: for each byte its runs, lowest bits first. ``flat``: a
    byte holds whole codes, and bytes lie in a row."""

    codes: int
    bytes: tuple[tuple[Run, ...], ...]

    @property
    def flat(self) -> bool:
        return len(self.bytes) == 1


PLACES = {
    2: Places(4, (((0, 0, 2), (1, 0, 2), (2, 0, 2), (3, 0, 2)),)),
    3: Places(
        8,
        (
            ((0, 0, 3), (3, 0, 3), (6, 0, 2)),
            ((1, 0, 3), (4, 0, 3), (7, 0, 2)),
            ((2, 0, 3), (5, 0, 3), (6, 2, 1), (7, 2, 1)),
        ),
    ),
    4: Places(2, (((0, 0, 4), (1, 0, 4)),)),
    5: Places(
        8,
        (
            *(((i, 0, 5), (5 + i, 0, 3)) for i in range(3)),
            ((3, 0, 5), (5, 3, 2), (7, 4, 1)),
            ((4, 0, 5), (6, 3, 2), (7, 3, 1)),
        ),
    ),
    6: Places(4, tuple(((i, 0, 6), (3, 4 - 2 * i, 2)) for i in range(3))),
    7: Places(8, tuple(((i, 0, 7), (7, 6 - i, 1)) for i in range(7))),
}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [n] as bytes, uint8 [n / codes, bytes] or, where a byte holds whole codes, [bytes]."""
    places = PLACES[bits]
    rows, made = codes.reshape(-1, places.codes).to(torch.int32), list[Tensor]()
    for runs in places.bytes:
        byte, at = torch.zeros(len(rows), dtype=torch.int32), 0
        for code, low, count in runs:
            byte |= (rows[:, code] >> low & ((1 << count) - 1)) << at
            at += count
        made.append(byte.to(torch.uint8))
    return made[0] if places.flat else torch.stack(made, 1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``: codes [n], uint8."""
    places = PLACES[bits]
    held = packed.reshape(-1, len(places.bytes)).to(torch.int32)
    codes = torch.zeros(len(held), places.codes, dtype=torch.int32)
    for byte, runs in enumerate(places.bytes):
        at = 0
        for code, low, count in runs:
            codes[:, code] |= (held[:, byte] >> at & ((1 << count) - 1)) << low
            at += count
    return codes.to(torch.uint8).flatten()

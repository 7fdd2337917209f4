"""Codes as streams of bits."""

from __future__ import annotations

from math import ceil, gcd

import torch
from torch import Tensor

from aquabit.errors import AquabitError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes of any shape, each below 2^bits, as a little-endian bit stream: uint8 [ceil(n * bits /
    8)]."""
    flat = codes.reshape(-1).to(torch.int32)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise AquabitError(
            f"codes range from {int(flat.min())} to {int(flat.max())}; {bits} bits hold 0 to"
            f" {(1 << bits) - 1}"
        )
    per_period, period_bytes = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    size = ceil(flat.numel() * bits / 8)
    padded = torch.zeros(ceil(flat.numel() / per_period) * per_period, dtype=torch.int32, device=codes.device)
    padded[: flat.numel()] = flat
    columns = padded.reshape(-1, per_period)
    out = torch.zeros(len(columns), period_bytes + 2, dtype=torch.int32, device=codes.device)
    for i in range(per_period):
        byte, shift = divmod(i * bits, 8)
        word = columns[:, i] << shift
        for k in range(ceil((shift + bits) / 8)):
            out[:, byte + k] |= (word >> (8 * k)) & 255
    return out[:, :period_bytes].to(torch.uint8).reshape(-1)[:size].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of a bit stream, uint8 [count] (int32 above 8 bits)."""
    dtype = torch.uint8 if bits <= 8 else torch.int32
    if bits == 8:
        return packed[:count]
    per_period, period_bytes = 8 // gcd(bits, 8), bits // gcd(bits, 8)
    periods = ceil(count / per_period)
    full = packed
    if packed.numel() < periods * period_bytes:
        full = torch.zeros(periods * period_bytes, dtype=torch.uint8, device=packed.device)
        full[: packed.numel()] = packed
    source = full.reshape(periods, period_bytes)
    wide = torch.uint8 if bits in (1, 2, 4) else torch.int32
    parts = source.to(wide)
    out = torch.empty(periods, per_period, dtype=dtype, device=packed.device)
    mask = (1 << bits) - 1
    for i in range(per_period):
        byte, shift = divmod(i * bits, 8)
        word = parts[:, byte] >> shift
        for k in range(1, ceil((shift + bits) / 8)):
            word = word | (parts[:, byte + k] << (8 * k - shift))
        out[:, i] = word & mask
    return out.reshape(-1)[:count]

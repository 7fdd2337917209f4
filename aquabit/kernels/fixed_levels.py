"""What codes and coded scales of the formats of other programs stand for."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.scheme_record import Levels

# QLoRA, appendix E, in the digits that bitsandbytes has
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# OCP Microscaling 1.0, section 5.3.3: the high bit is the sign
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# ggml's non-linear levels (ggml-common.h)
IQ4_NL = (-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
NO_NUMBER = 0x7F  # of e4m3, without its sign


@cache
def table(levels: Levels) -> Tensor | None:
    """Values [2^bits] float32 by code; None where they follow from the code. Codes of e4m3 that are no
    numbers stand for 0, and no fit uses them."""
    if levels == "nf4":
        return torch.tensor(NF4)
    if levels == "e2m1":
        return torch.tensor([*E2M1, *(-v for v in E2M1)])
    if levels == "iq4_nl":
        return torch.tensor(IQ4_NL)
    return e4m3().nan_to_num(nan=0.0) if levels == "e4m3" else None


def level_values(levels: Levels, bits: int, codes: Tensor) -> Tensor:
    """What codes of any shape stand for, float32."""
    values = table(levels)
    if values is None:
        return codes.float() - (1 << (bits - 1) if levels == "signed" else 0)
    return values.to(codes.device)[codes.int()]


def nearest_codes(levels: Levels, bits: int, wanted: Tensor) -> Tensor:
    """The codes of the levels that are nearest to numbers of any shape, int64."""
    ascending, codes = ascending_levels(levels, bits)
    bounds = ((ascending[1:] + ascending[:-1]) / 2).to(wanted.device)
    return codes.to(wanted.device)[torch.bucketize(wanted.contiguous(), bounds)]


@cache
def ascending_levels(levels: Levels, bits: int) -> tuple[Tensor, Tensor]:
    """What codes stand for, ascending, and the code of each; of equal values one."""
    values, codes = table(levels), torch.arange(1 << bits)
    if values is None:
        return level_values(levels, bits, codes), codes
    once = torch.tensor([float(v) not in values[:i].tolist() for i, v in enumerate(values)])
    kept = codes[once]
    return values[kept].sort().values, kept[values[kept].argsort()]


def check_levels(levels: Levels, packed: Tensor) -> None:
    """Raise AquabitError for codes that stand for no number."""
    if levels == "e4m3" and bool(((packed & NO_NUMBER) == NO_NUMBER).any()):
        bad = int(((packed & NO_NUMBER) == NO_NUMBER).sum())
        raise AquabitError(f"{bad} of {packed.numel()} codes are no numbers of e4m3; the weight is damaged")


@cache
def e4m3() -> Tensor:
    """OCP's 8-bit floats of 4 bits of exponent, by code: [256] float32."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def e8m0() -> Tensor:
    """Powers of two by code, 2^(code - 127); 255 is no number (OCP Microscaling 1.0, section 5.4.1)."""
    return torch.cat([torch.ldexp(torch.ones(255), torch.arange(255) - 127), torch.tensor([torch.nan])])


@cache
def dynamic() -> Tensor:
    """The levels of dynamic quantization at 8 bits (arXiv 2110.02861), ascending: [256] float32.

    For each exponent i of -6 to 0 the middles of 2^(i + 6) even parts of 0.1 to 1, times 10^i, and their
    negatives; 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found))

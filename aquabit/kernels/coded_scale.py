"""CodedScale: scales, or offsets, that are codes themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.kernels.fixed_levels import dynamic, e4m3, e8m0
from aquabit.kernels.packing import pack, unpack
from aquabit.scheme_record import Factors

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def coded_values(factors: Factors, codes: Tensor) -> Tensor:
    """What codes of any shape stand for, before what is over them: float32."""
    if factors.kind in ("unsigned", "signed"):
        return codes.float() - (1 << (factors.bits - 1) if factors.kind == "signed" else 0)
    tables = {"e8m0": e8m0, "e4m3": e4m3, "dynamic": dynamic}
    return tables[factors.kind]().to(codes.device)[codes.int()]


@dataclass(frozen=True, eq=False)
class CodedScale:
    """scale[o, n] = over * value(code[o, n]) + base, for ``shape`` [out, n].

    ``codes`` are packed in the order of rows; ``over`` is None, or one factor for each ``factors.every`` of
    them, or one for all; ``base`` is None or float32 [1].
    """

    codes: Tensor
    over: Tensor | None
    base: Tensor | None
    factors: Factors
    shape: tuple[int, int]

    @staticmethod
    def from_codes(codes: Tensor, over: Tensor | None, base: Tensor | None, factors: Factors) -> CodedScale:
        """Pack integer codes [out, n]; what is over them is rounded to the type that is stored."""
        kept = None if over is None or factors.over is None else over.to(DTYPES[factors.over])
        return CodedScale(pack(codes, factors.bits), kept, base, factors, (codes.shape[0], codes.shape[1]))

    def check(self, name: str) -> None:
        """Raise AquabitError for tensors of other types and sizes than ``factors`` says."""
        out, n = self.shape
        wanted: dict[str, tuple[torch.dtype, int] | None] = {
            "": (torch.uint8, ceil(out * n * self.factors.bits / 8)),
            "_over": None,
            "_base": (torch.float32, 1) if self.factors.base else None,
        }
        if self.factors.over is not None:
            wanted["_over"] = (DTYPES[self.factors.over], self.factors.overs(out, n))
        found = {"": self.codes, "_over": self.over, "_base": self.base}
        for part, value in found.items():
            form = None if value is None else (value.dtype, value.numel())
            if form != wanted[part] or (value is not None and value.device != self.codes.device):
                raise AquabitError(
                    f"{name}{part} of {out} x {n} scales are {form}; needed are {wanted[part]}"
                )

    @property
    def ndim(self) -> int:
        return 2

    @property
    def integers(self) -> Tensor:
        """The codes, [out, n]."""
        return unpack(self.codes, self.factors.bits, prod(self.shape)).reshape(self.shape)

    def over_each(self) -> Tensor:
        """What is over each number, [out, n] float32; ones where nothing is."""
        if self.over is None:
            return torch.ones(self.shape, device=self.codes.device)
        every = self.factors.every or prod(self.shape)
        return self.over.float().repeat_interleave(every)[: prod(self.shape)].reshape(self.shape)

    def float(self) -> Tensor:
        """The scales, float32 [out, n]."""
        values = coded_values(self.factors, self.integers)
        if self.over is not None:
            values = values * self.over_each()
        return values if self.base is None else values + self.base

    def rows(self, first: int, last: int) -> CodedScale:
        """The scales of rows [first, last): each then has its own factor over it."""
        codes = self.integers[first:last]
        if self.over is None:
            return CodedScale.from_codes(codes, None, self.base, self.factors)
        over = self.over_each()[first:last].reshape(-1)
        return CodedScale.from_codes(codes, over, self.base, replace(self.factors, over="float32", every=1))

    def tensors(self, name: str) -> dict[str, Tensor | None]:
        """What is stored, by name."""
        return {name: self.codes, f"{name}_over": self.over, f"{name}_base": self.base}

    def holding(self, tensors: Mapping[str, Tensor], name: str) -> CodedScale:
        """The same scales with other tensors of the same content."""
        over, base = tensors.get(f"{name}_over"), tensors.get(f"{name}_base")
        return replace(self, codes=tensors[name], over=over, base=base)

    def to(self, device: torch.device | str) -> CodedScale:
        over, base = (None if t is None else t.to(device) for t in (self.over, self.base))
        return replace(self, codes=self.codes.to(device), over=over, base=base)

"""Scales as the formats of other programs store them: what numbers there are, and which is near."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from aquabit.kernels.coded_scale import DTYPES, CodedScale, coded_values
from aquabit.quant.schemes.scalar import halves
from aquabit.scheme_record import Factors

SMALLEST = 2.0**-24  # of float16, above 0


@dataclass(frozen=True)
class Store:
    """Numbers that scales [out, n] (or offsets) can have: all floats of a type; or ``over`` [out, n] times
    one of ``values`` [K] ascending, plus ``base``. ``one`` is the only scale, where there is one for all."""

    factors: Factors
    values: Tensor | None = None
    over: Tensor | None = None
    base: Tensor | None = None
    one: Tensor | None = None

    @staticmethod
    def of(ideal: Tensor, factors: Factors) -> Store:
        """What is over the scales and added to them, from scales [out, n] that would be best."""
        if not factors.coded:
            return Store(factors)
        codes = torch.arange(127 if factors.kind == "e4m3" else 1 << factors.bits, device=ideal.device)
        values = coded_values(factors, codes)
        if factors.kind == "e8m0":
            return Store(factors, values[:-1], torch.ones_like(ideal))
        base = ideal.mean().reshape(1) if factors.base else None
        rest = ideal if base is None else ideal - base
        flat, size = rest.reshape(-1), factors.every or rest.numel()
        blocks = pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        # an extreme becomes the value that is farthest from 0: -2^(bits - 1) of signed ones
        ends = values[[0, -1]]
        end = ends[ends.abs().argmax()]
        over = (extreme.abs() if factors.kind == "dynamic" else extreme) / end
        return Store(factors, values, base=base).under(over.reshape(-1), ideal)

    def under(self, over: Tensor, like: Tensor) -> Store:
        """The same numbers under other factors [blocks], rounded as they are stored."""
        kept = halves(over) if self.factors.over == "float16" else over.float()
        each = kept.repeat_interleave(self.factors.every or like.numel())
        return Store(self.factors, self.values, each[: like.numel()].reshape(like.shape), self.base, self.one)

    def index(self, wanted: Tensor) -> Tensor:
        """The nearest of ``values``."""
        assert self.values is not None and self.over is not None
        rest = wanted if self.base is None else wanted - self.base
        bounds = (self.values[1:] + self.values[:-1]) / 2
        return torch.bucketize(torch.where(self.over != 0, rest / self.over, 0.0).contiguous(), bounds)

    def number(self, index: Tensor) -> Tensor:
        """What an index stands for, to the bit as it is decoded."""
        assert self.values is not None and self.over is not None
        found = self.values[index.clamp(0, len(self.values) - 1)] * self.over
        return found if self.base is None else found + self.base

    def rounded(self, wanted: Tensor) -> Tensor:
        """The nearest numbers that can be stored, float32."""
        if self.one is not None:
            return self.one.expand(wanted.shape)
        if self.values is not None:
            return self.number(self.index(wanted.float()))
        found = halves(wanted) if self.factors.kind == "float16" else wanted.float()
        if self.factors.negative:
            return found
        return torch.where(wanted > 0, found.clamp_min(SMALLEST), 0.0)

    def stored(self, scale: Tensor) -> Tensor | CodedScale:
        """Numbers [out, n] as a weight stores them."""
        if self.factors.whole:
            return scale.reshape(-1)[:1].clone()
        if self.values is None:
            kept = scale.to(DTYPES[self.factors.kind])
            return kept.reshape(-1) if kept.shape[1] == 1 else kept
        over = None
        if self.factors.over is not None and self.over is not None:
            over = self.over.reshape(-1)[:: self.factors.every or prod(scale.shape)].contiguous()
        return CodedScale.from_codes(self.index(scale), over, self.base, self.factors)

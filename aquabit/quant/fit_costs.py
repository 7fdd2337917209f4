"""What fits cost on this machine: a few rows of a few layers are fitted and timed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from aquabit.quant.weights import quantize_weights
from aquabit.scheme import FP, Scheme

ROWS = 128  # of a layer that are fitted: time grows with rows
MOST = 8  # schemes that are timed; others are taken to cost as those of their kind do
WIDEST = 2304  # inputs of a layer that is timed; wider ones are extrapolated
CORRELATION = 0.9  # of neighbouring inputs in the H of timed fits

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FitCost:
    """Seconds a weight of one scheme: ``base`` + ``slope`` times the inputs of an output."""

    base: float
    slope: float

    def seconds(self, shape: Shape) -> float:
        """Of a layer's weight [out, in] or [out, in, kh, kw]."""
        return prod(shape) * (self.base + self.slope * prod(shape[1:]))


def fit_costs(layers: Mapping[Scheme, Iterable[Shape]], device: str = "cpu") -> dict[Scheme, FitCost]:
    """The cost of each scheme, from two widths of the layers that may take it (random weights, correlated
    inputs): of the MOST that most weights may take, and one of each kind; of the others the mean of their
    kind."""
    sizes = {s: sum(map(prod, shapes)) for s, shapes in layers.items() if s != FP}
    ordered = sorted(sizes, key=lambda s: -sizes[s])
    kinds: dict[tuple[str, bool], list[Scheme]] = {}
    for scheme in ordered:
        kinds.setdefault((scheme.kind, scheme.calibrated), []).append(scheme)
    timed = dict.fromkeys((*ordered[:MOST], *(row[0] for row in kinds.values())))
    found = {s: _cost(s, list(layers[s]), device) for s in timed}
    for row in kinds.values():
        own = [found[s] for s in row if s in timed]
        mean = FitCost(sum(c.base for c in own) / len(own), sum(c.slope for c in own) / len(own))
        found |= {s: mean for s in row if s not in timed}
    return found


def _cost(scheme: Scheme, shapes: Sequence[Shape], device: str) -> FitCost:
    timed = [(prod(s[1:]), _timed(scheme, s, device)) for s in _two_widths(shapes)]
    (r0, t0), (r1, t1) = timed[0], timed[-1]
    slope = max(0.0, (t1 - t0) / (r1 - r0)) if r1 > r0 else 0.0
    return FitCost(max(0.0, t0 - slope * r0), slope)


def _two_widths(shapes: Sequence[Shape]) -> list[Shape]:
    """The layer of the median width by weights, and the widest of those that are timed."""
    ordered = sorted(shapes, key=lambda s: prod(s[1:]))
    small = [s for s in ordered if prod(s[1:]) <= WIDEST] or ordered[:1]
    half, total = 0, sum(map(prod, small))
    for shape in small:
        half += prod(shape)
        if 2 * half >= total:
            return [shape, small[-1]] if prod(shape[1:]) < prod(small[-1][1:]) else [shape]
    return [small[-1]]


def _timed(scheme: Scheme, shape: Shape, device: str) -> float:
    """Seconds a weight of one fit of at most ROWS rows."""
    generator = torch.Generator().manual_seed(0)
    rows = min(ROWS, shape[0])
    weights = [
        torch.randn(rows, *shape[1:], generator=generator).to(device) for _ in range(1 + scheme.shared)
    ]
    hessian = _correlated(prod(shape[1:])).to(device) if scheme.calibrated else None
    began = time.perf_counter()
    quantize_weights(weights, scheme, [hessian] * len(weights))
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / sum(w.numel() for w in weights)


def _correlated(width: int) -> Tensor:
    """H [R, R] of inputs whose correlation falls with their distance."""
    place = torch.arange(width)
    return CORRELATION ** (place[:, None] - place).abs().float() + 0.01 * torch.eye(width)

"""Random weights as schemes store them, decoded to float64 by code that shares nothing with the package."""

from __future__ import annotations

from math import ceil, prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.layer_formats import LOSS
from aquabit.scheme import Scheme

SCALAR = (
    *(f"usq{b}" for b in range(1, 9)),
    *(f"usq{b}g64" for b in range(1, 9)),
    *(f"vq{b}" for b in range(1, 9)),
)


PER_CHANNEL = tuple(f"vq{b}c" for b in range(1, 9))


ADDITIVE = tuple(LOSS)


FORMATS = SCALAR + ADDITIVE


class Coded(NamedTuple):
    """``weight`` and what it is made of: codes [groups, M, out], and the weights they stand for, float64
    in the original shape."""

    weight: CodebookWeight
    codes: np.ndarray
    decoded: Tensor


def group_of(name: str, kernel: tuple[int, ...] = ()) -> int:
    """Inputs that a codeword covers, which the channels must be a multiple of; 1 where codewords are
    kernel slices."""
    scheme = Scheme.parse(name)
    return 1 if scheme.kind != "aq" or (scheme.group is None and prod(kernel) > 1) else scheme.group_size(1)


def coded(name: str, shape: tuple[int, ...], seed: int = 0, scaled: bool = True) -> Coded:
    """A random weight as the scheme ``name`` stores it. vq has a scale for each row only where ``scaled``."""
    rng, scheme = np.random.default_rng(seed), Scheme.parse(name)
    area, row, out = prod(shape[2:]), prod(shape[1:]), shape[0]
    order: Literal["inputs", "kernel"] = (
        "kernel" if scheme.kind == "aq" and scheme.group is None and area > 1 else "inputs"
    )
    group = scheme.group_size(area) if scheme.kind == "aq" else 1
    count = 1 << scheme.bits
    codes = rng.integers(0, count, (ceil(row / group), scheme.codebooks, out))
    tables = (
        None
        if scheme.kind == "usq"
        else rng.normal(size=(out if scheme.per_channel else 1, scheme.codebooks, count, group)).astype(
            np.float16
        )
    )
    n = ceil(row / scheme.group) if scheme.kind == "usq" and scheme.group else 1
    size = (out, n) if n > 1 else (out,)
    scale = (0.5 + rng.random(size)).astype(np.float16) if scheme.kind != "vq" or scaled else None
    offset = (
        (-scale * (count - 1) / 2 + rng.normal(size=size) / 4).astype(np.float16)
        if scheme.kind == "usq" and scale is not None
        else None
    )
    held = (None if t is None else torch.from_numpy(t) for t in (tables, scale, offset))
    weight = CodebookWeight.from_codes(torch.from_numpy(codes), *held, shape, scheme.bits, order)
    return Coded(weight, codes, decoded(codes, tables, scale, offset, shape, order))


def decoded(
    codes: np.ndarray,
    tables: np.ndarray | None,
    scale: np.ndarray | None,
    offset: np.ndarray | None,
    shape: tuple[int, ...],
    order: str,
) -> Tensor:
    """W[o, group j] = scale[o] * sum_m tables[m, codes[j, m, o]] + offset[o], group after group, in
    float64."""
    groups, books, out = codes.shape
    row = prod(shape[1:])
    values = np.zeros((out, groups * (1 if tables is None else tables.shape[3])))
    for m in range(books):
        for o in range(out):
            words = (
                codes[:, m, o, None]
                if tables is None
                else tables[o % len(tables), m].astype(np.float64)[codes[:, m, o]]
            )
            values[o] += words.reshape(-1)
    values = values[:, :row]
    values = values * spread(scale, row) if scale is not None else values
    values = values + spread(offset, row) if offset is not None else values
    if len(shape) == 4 and order == "inputs":
        values = values.reshape(out, shape[2], shape[3], shape[1]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(values.reshape(shape)))


def spread(factor: np.ndarray, row: int) -> np.ndarray:
    """[out] or [out, n] over the inputs of a row: n groups of equal size, the last one perhaps smaller."""
    wide = factor.astype(np.float64).reshape(len(factor), -1)
    return np.repeat(wide, ceil(row / wide.shape[1]), 1)[:, :row]

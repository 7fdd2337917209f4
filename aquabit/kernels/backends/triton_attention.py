"""Attention with a rounded softmax on a CUDA device, without ever storing the scores: what
``quantized_attention`` computes, in two passes over blocks of keys."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from aquabit.kernels.backends.triton_kernels import DTYPES, _device, _on, _start, triton_available
from aquabit.kernels.codebook import ceil_divide
from aquabit.scheme import AquabitError

WIDEST = 256  # of a head: wider ones do not fit the registers of a program
NARROWEST = 16  # what the matrix units take
_TILE_INTERPRETED = {"BLOCK_Q": 16, "BLOCK_K": 16}


@cache
def _attention_device() -> Any:
    from aquabit.kernels.backends import triton_attention_device

    return triton_attention_device


def triton_attention_refuses(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> str | None:
    """Why ``triton_attention`` cannot serve these, or None. Whether shapes fit is not asked."""
    why = triton_available()
    if why:
        return why
    needed = "cpu" if _device().INTERPRETED else "cuda"
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    elsewhere = next((t.device for t in given if t.device.type not in (needed, "meta")), None)
    if elsewhere is not None:
        return f"a tensor is on {elsewhere}; it must be on {needed}"
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        found = ", ".join(sorted(map(str, dtypes)))
        return f"the dtypes are {found}; they must be one of float32, bfloat16 or float16"
    if max(query.shape[-1], value.shape[-1]) > WIDEST:
        return f"heads of {query.shape[-1]} and {value.shape[-1]} are wider than {WIDEST}"
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        return f"the mask is {attn_mask.dtype}; it must be bool or numbers that are added"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "it carries no gradient, and one is asked for"
    return None


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale + mask) rounded to 8 bits per query (``fake_quantize``), times v: [..., n, e] in
    the dtype of all three.

    q [..., n, d], k [..., m, d], v [..., m, e] and mask [..., n, m], whose leading dimensions broadcast; the
    mask is of bool (False hides a key) or of numbers that are added; ``scale`` is 1 / sqrt(d) by default.
    Scores, probabilities and sums are float32. A query that sees no key has NaN, as torch's softmax. Raises
    AquabitError for what does not fit.
    """
    why = triton_attention_refuses(query, key, value, attn_mask)
    if why:
        raise AquabitError(f"attention in triton cannot serve: {why}")
    batch = _batch(query, key, value, attn_mask)
    n, m, d = query.shape[-2], key.shape[-2], query.shape[-1]
    four = [_four(t, batch) for t in (query, key, value)]
    mask = None if attn_mask is None else _four(_mask(attn_mask, (*batch, n, m)), batch)
    factor = 1 / math.sqrt(d) if scale is None else float(scale)
    y: Tensor = torch.ops.aquabit.triton_attention(*four, mask, factor)
    return y.reshape(*batch, n, value.shape[-1])


def _batch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> torch.Size:
    """The leading dimensions of all together."""
    shapes = f"q {list(query.shape)}, k {list(key.shape)}, v {list(value.shape)}"
    least = min(query.ndim, key.ndim, value.ndim)
    if (
        least < 2
        or query.shape[-1] != key.shape[-1]
        or key.shape[-2] != value.shape[-2]
        or not query.shape[-1]
    ):
        raise AquabitError(f"{shapes} do not fit; attention takes [..., n, d], [..., m, d] and [..., m, e]")
    others = [t.shape[:-2] for t in (key, value, mask) if t is not None]
    try:
        return torch.broadcast_shapes(query.shape[:-2], *others)
    except RuntimeError as error:
        raise AquabitError(f"the leading dimensions of {shapes} do not broadcast") from error


def _mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        full = mask.expand(shape)
    except RuntimeError as error:
        raise AquabitError(f"the mask is {list(mask.shape)}; it must broadcast to {list(shape)}") from error
    return full.view(torch.uint8) if mask.dtype == torch.bool else full


def _four(tensor: Tensor, batch: torch.Size) -> Tensor:
    """[..., a, b] as [images, heads, a, b], without a copy up to four dimensions."""
    full = tensor.expand(*batch, *tensor.shape[-2:])
    if len(batch) > 2:
        return full.reshape(-1, *full.shape[-3:])
    return full[(None,) * (2 - len(batch))]


_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define(
    "triton_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor"
)


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # heads side by side in each token: joining them then costs no copy
    images, heads, queries, _ = query.shape
    return query.new_empty(images, queries, heads, value.shape[3]).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    y = _attention_fake(query, key, value, mask, scale)
    if y.numel() == 0 or key.shape[2] == 0:
        return y.zero_()
    (images, heads, queries, d), keys, e = query.shape, key.shape[2], value.shape[3]
    masked = 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2

    def chosen() -> tuple[Any, Any, dict[str, Any]]:
        device = _attention_device()
        constants = {"MASK": masked, "D": _padded(d), "E": _padded(e)}
        if _device().INTERPRETED:
            constants |= _TILE_INTERPRETED

        def grid(tile: dict[str, int]) -> tuple[int, int, int]:
            return images * heads * ceil_divide(queries, tile["BLOCK_Q"]), 1, 1

        return device.tuned_attention, grid, constants

    pointers = (query, key, value, query if mask is None else mask, y)
    places = [(0, 0, 0, 0) if t is None else t.stride() for t in (query, key, value, mask)]
    numbers: tuple[Any, ...] = (queries, keys, d, e, heads, *(n for row in places for n in row), scale)
    with _on(query):
        _start(("attention", images, masked), query, pointers, numbers, chosen)
    return y


def _padded(size: int) -> int:
    return max(NARROWEST, 1 << (size - 1).bit_length())


for _key in ("CUDA", "CPU"):  # CPU: the interpreter
    _library.impl("triton_attention", _attention, _key)
torch.library.register_fake("aquabit::triton_attention", _attention_fake, lib=_library)

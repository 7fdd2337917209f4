"""Attention whose probabilities are rounded to 8 bits per query: the reference in torch, the fused kernel on
CPU, and the op that torch.compile sees.

``y = Q(softmax(q k^T scale + mask)) v``, with Q the grid of ``fake_quantize`` for each query, from its least
to its largest probability. The reference makes the scores of some queries at a time and leaves the rest to
torch. The kernel takes blocks of queries through two passes over their keys: scores, their least and largest,
which say the grid; then exponentials, rounded at once, times the values. Scores are float32; with VNNI those
of Q and K that lie on a grid for each token (as layers round them, to 8 or 6 bits or "i8", heads side by
side) are sums of integers, and the rounded probabilities, integers too, meet values of 16 bits (a step for
each channel of 128 keys). Results are within 2e-4 of float64's, by norm; nearly all of that is probabilities
halfway between two points of the grid, where float32's own rounding decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.kernels.backends.triton_attention import triton_attention, triton_attention_refuses
from aquabit.kernels.extension import native as _native
from aquabit.kernels.fake_quant import straight_through

SOFTMAX_BITS = 8
# elements of the reference's block of scores: 4 MB, which caches hold (3 times as fast as 256 MB at 1,024
# tokens)
SCORES_LIMIT = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}  # as the extension numbers them
_LEVELS: tuple[str, ...] = tuple(_native.attention_levels()) if hasattr(_native, "attention_levels") else ()


def attention_levels() -> list[str]:
    """Instruction sets that this machine can run, best first; none without the extension."""
    return list(_LEVELS)


def rounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    level: str | None = None,
) -> Tensor:
    """softmax(q k^T scale + mask), rounded to 8 bits per query, times v: q [..., n, d], k [..., m, d], v
    [..., m, e] -> [..., n, e] in q's dtype.

    Leading dimensions are broadcast, ``mask`` too: [..., n, m], bool (True: the key is seen) or added to the
    scores. A query that sees no key is NaN. ``scale`` is 1 / sqrt(d) where it is not given. Where a gradient
    is asked for the rounding alone is passed over (``straight_through``). On CPU the fused kernel serves
    float32, bfloat16 and float16 without gradients, on CUDA the one in Triton, else the reference. ``level``
    forces an instruction set of ``attention_levels``. Raises AquabitError for shapes and types that do not
    fit and for an unknown level.
    """
    _check(q, k, v, mask)
    factor = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    if not _served(q, k, v, mask):
        if q.device.type == "cuda" and triton_attention_refuses(q, k, v, mask) is None:
            return triton_attention(q, k, v, mask, factor)
        if level is not None:
            raise AquabitError(f"{level=} is of the native kernel, which does not serve here")
        return rounded_attention_reference(q, k, v, mask, factor)
    y: Tensor = torch.ops.aquabit.rounded_attention(q, k, v, mask, factor, _level(level))
    return y


def rounded_attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same as ``rounded_attention``, in plain torch operations and the dtype of ``q``, on any device."""
    queries = q.shape[-2]
    block = max(1, SCORES_LIMIT // max(1, math.prod(q.shape[:-2]) * k.shape[-2]))
    parts = []
    for start in range(0, max(1, queries), block):
        scores = (q[..., start : start + block, :] * scale) @ k.transpose(-1, -2)
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., start : start + block, :]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        parts.append(straight_through(scores.softmax(-1), SOFTMAX_BITS, "token") @ v)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise AquabitError(f"attention takes [.., n, d], [.., m, d] and [.., m, e], not {_shapes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise AquabitError(
            f"attention takes q, k and v of one floating-point type, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if mask is not None and (
        mask.ndim < 2 or mask.shape[-2] not in (1, q.shape[-2]) or mask.shape[-1] not in (1, k.shape[-2])
    ):
        raise AquabitError(
            f"a mask of {q.shape[-2]} queries and {k.shape[-2]} keys is [.., n, m], not {list(mask.shape)}"
        )
    try:
        _sizes(q, k, v, mask)
    except RuntimeError as error:
        masked = "" if mask is None else f" with a mask {list(mask.shape)}"
        raise AquabitError(f"the leading dimensions of {_shapes(q, k, v)}{masked} do not fit") from error


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"


def _served(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the op takes them."""
    if not _LEVELS or q.dtype not in DTYPES or q.device.type not in ("cpu", "meta"):
        return False
    if mask is not None and mask.dtype not in (torch.bool, *DTYPES):
        return False
    learned = q.requires_grad or k.requires_grad or v.requires_grad
    return not (torch.is_grad_enabled() and (learned or (mask is not None and mask.requires_grad)))


def _level(name: str | None) -> int:
    if name is not None and name not in _LEVELS:
        raise AquabitError(f"level {name!r} is unknown; this machine has {', '.join(_LEVELS)}")
    return 0 if name is None else _LEVELS.index(name)


def _sizes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> torch.Size:
    """The leading dimensions of the result."""
    sizes, others = q.shape[:-2], [t.shape[:-2] for t in (k, v, mask) if t is not None]
    return sizes if all(o == sizes for o in others) else torch.broadcast_shapes(sizes, *others)


def _empty(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the result is written to. Of four dimensions, heads lie side by side in each token, as torch's own
    attention leaves them: joining them costs no copy."""
    sizes, rows, columns = _sizes(q, k, v, mask), q.shape[-2], v.shape[-1]
    if len(sizes) == 2:
        return q.new_empty(sizes[0], rows, sizes[1], columns, dtype=dtype).transpose(1, 2)
    return q.new_empty(*sizes, rows, columns, dtype=dtype)


# ---- The op

_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define(
    "rounded_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, int level) -> Tensor"
)


@torch.library.impl(_library, "rounded_attention", "CPU")
def _rounded_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, level: int
) -> Tensor:
    wide = torch.float32 if q.dtype == torch.float16 else q.dtype
    y = _empty(q, k, v, mask, wide)
    if y.numel() and k.numel():
        sizes = y.shape[:-2]
        q_rows, k_rows, v_rows = (_rows(t, wide, sizes) for t in (q, k, v))
        seen = None if mask is None else mask.float() if mask.dtype == torch.float16 else mask
        seen = None if seen is None else seen.expand(*sizes, q.shape[-2], k.shape[-2])
        if _native.attention(  # 2 where Q and K are on grids and were multiplied as integers, 1 where not
            q_rows.data_ptr(),
            k_rows.data_ptr(),
            v_rows.data_ptr(),
            y.data_ptr(),
            0 if seen is None else seen.data_ptr(),
            q_rows.stride(),
            k_rows.stride(),
            v_rows.stride(),
            y.stride(),
            () if seen is None else seen.stride(),
            0 if seen is None else _MASKS[seen.dtype],
            sizes,
            (q.shape[-2], *k.shape[-2:], v.shape[-1]),
            scale,
            wide == torch.bfloat16,
            torch.get_num_threads(),
            level,
        ):
            return y if wide == q.dtype else y.to(q.dtype)
    # no keys, or values that are not finite or nearly so, which the kernel leaves
    return y.copy_(rounded_attention_reference(q, k, v, mask, scale)).to(q.dtype)


def _rows(x: Tensor, dtype: torch.dtype, sizes: torch.Size) -> Tensor:
    """Widened, broadcast, with columns one after another, as the extension reads them."""
    x = x if x.dtype == dtype else x.to(dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.shape[:-2] == sizes else x.expand(*sizes, *x.shape[-2:])


@torch.library.register_fake("aquabit::rounded_attention", lib=_library)
def _rounded_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, level: int
) -> Tensor:
    return _empty(q, k, v, mask, q.dtype)

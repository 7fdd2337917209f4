# mypy: ignore-errors
"""The device code of attention with a rounded softmax; imported only where Triton is. ``triton_attention``
launches it.

Scores are computed twice, a block of keys at a time, and never stored: first for the largest and the smallest
of a query and the sum of exponentials, from which its grid of 256 probabilities follows, then for the levels
of that grid, which multiply the values as whole numbers of at most 255, exact in every dtype.
"""

import triton
import triton.language as tl

from aquabit.kernels.backends.triton_device import _INTERPRETED, _narrow, tuned
from aquabit.kernels.backends.triton_int8_device import TINY, nearest


@triton.jit
def _product(a, b):
    """a [M, K] times b [K, N], float32: in their dtype on the matrix units, float32 in three products of
    tf32, which keep 21 bits of each number."""
    if a.dtype == tl.float32:
        product = tl.dot(a, b, input_precision="tf32x3")
    elif _INTERPRETED:  # it multiplies the bits of bfloat16 as if they were integers
        product = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def _scores(queries, key_at, mask_at, start, keys, k_n, m_k, d_ok, q_ok, scale, MASK, BLOCK_K):
    """q k^T scale + mask [BLOCK_Q, BLOCK_K] of keys from ``start``, and which of these there are [BLOCK_K].
    ``key_at`` [D, 1] and ``mask_at`` [BLOCK_Q, 1] point to the first key."""
    k = start + tl.arange(0, BLOCK_K)
    there = k < keys
    block = tl.load(key_at + k.to(tl.int64)[None, :] * k_n, mask=d_ok[:, None] & there[None, :], other=0.0)
    scores = _product(queries, block) * scale
    if MASK:
        ok = q_ok[:, None] & there[None, :]
        given = tl.load(mask_at + k.to(tl.int64)[None, :] * m_k, mask=ok, other=0)
        if MASK == 1:
            scores = tl.where(given != 0, scores, float("-inf"))
        else:
            scores += given.to(tl.float32)
    return scores, there


@triton.jit
def attention(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    y_ptr,
    queries,
    keys,
    d,
    e,
    heads,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_e,
    m_b,
    m_h,
    m_q,
    m_k,
    scale,
    MASK: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [b, h, queries, e] = round(softmax(q k^T scale + mask)) v, rounded to the grid of 256 points between
    each query's smallest and largest probability (``fake_quantize`` at 8 bits, per token); y lies in memory
    as [b, queries, h, e].

    With probabilities p = step * (level + first), level in {0 .. 255}: y = step * (sum_k level[k] v[k] +
    first * sum_k v[k]). MASK: 0 none, 1 bytes (0 hides a key), 2 numbers that are added. D and E are d and e
    padded to a power of two. Grid: tiles of queries x heads.
    """
    tiles = tl.cdiv(queries, BLOCK_Q)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    n = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_ok, n64 = n < queries, n.to(tl.int64)
    at_d, at_e = tl.arange(0, D), tl.arange(0, E)
    d_ok, e_ok = at_d < d, at_e < e
    query_at = query_ptr + b * q_b + h * q_h + n64[:, None] * q_n + at_d[None, :] * q_d
    key_at = key_ptr + b * k_b + h * k_h + at_d[:, None] * k_d
    value_at = value_ptr + b * v_b + h * v_h + at_e[None, :] * v_e
    mask_at = mask_ptr + b * m_b + h * m_h + n64[:, None] * m_q
    own = tl.load(query_at, mask=q_ok[:, None] & d_ok[None, :], other=0.0)

    highest = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    lowest = tl.full([BLOCK_Q], float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for start in range(0, keys, BLOCK_K):
        scores, there = _scores(own, key_at, mask_at, start, keys, k_n, m_k, d_ok, q_ok, scale, MASK, BLOCK_K)
        lowest = tl.minimum(lowest, tl.min(tl.where(there[None, :], scores, float("inf")), axis=1))
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(scores - base[:, None]), axis=1)
        highest = higher

    base = tl.where(highest == float("-inf"), 0.0, highest)
    inverse = 1.0 / total
    # of a query that sees no key: 0 times infinity, which is no number, as torch's softmax has it
    high, low = tl.exp(highest - base) * inverse, tl.exp(lowest - base) * inverse
    step = tl.div_rn(high * 0.5 - low * 0.5, 127.5)
    constant = step < TINY  # such probabilities stay as they are
    finer = tl.div_rn(1.0, tl.where(constant, 1.0, step))
    first = nearest(low * finer)

    sums = tl.zeros([BLOCK_Q, E], dtype=tl.float32)
    column = tl.zeros([E], dtype=tl.float32)
    for start in range(0, keys, BLOCK_K):
        scores, there = _scores(own, key_at, mask_at, start, keys, k_n, m_k, d_ok, q_ok, scale, MASK, BLOCK_K)
        levels = nearest(tl.exp(scores - base[:, None]) * inverse[:, None] * finer[:, None])
        levels = tl.minimum(tl.maximum(levels - first[:, None], 0.0), 255.0)
        levels = tl.where(constant[:, None], 0.0, tl.where(there[None, :], levels, 0.0))
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(
            value_at + k.to(tl.int64)[:, None] * v_n, mask=there[:, None] & e_ok[None, :], other=0.0
        )
        sums += _product(_narrow(levels, values.dtype), values)
        column += tl.sum(values.to(tl.float32), axis=0)

    first, step = tl.where(constant, high, first), tl.where(constant, 1.0, step)
    y = (sums + first[:, None] * column[None, :]) * step[:, None]
    at = ((b * queries + n64) * heads + h)[:, None] * e + at_e[None, :]
    tl.store(y_ptr + at, _narrow(y, y_ptr.dtype.element_ty), mask=q_ok[:, None] & e_ok[None, :])


# queries and keys of a tile, warps, stages; by whether numbers are float32, and heads wider than 256 bytes:
# larger tiles would not fit a processor, and take long to compile to find out
_TILES = {
    (False, False): {(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)},
    (False, True): {(32, 32, 4, 2), (64, 64, 4, 3)},
    (True, False): {(32, 32, 4, 2), (64, 32, 4, 3)},
    (True, True): {(32, 16, 4, 1), (32, 32, 4, 2)},
}
_CONFIGS = [
    triton.Config({"BLOCK_Q": q, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for q, k, warps, stages in sorted(set().union(*_TILES.values()))
]


def _suited(configs, positional, **named):
    """The tiles for a call's dtype and width."""
    given = positional | named
    size = given["query_ptr"].element_size()
    own = {tile[:2] for tile in _TILES[size == 4, max(given["D"], given["E"]) * size > 256]}
    return [c for c in configs if (c.kwargs["BLOCK_Q"], c.kwargs["BLOCK_K"]) in own]


tuned_attention = tuned(attention, _CONFIGS, ["queries", "keys", "D", "E", "MASK"], _suited)

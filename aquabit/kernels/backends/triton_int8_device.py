# mypy: ignore-errors
"""The device code of the int8 Triton backend; imported only where Triton is. ``triton_int8`` launches it.

Activations are x[t, k] = step[t] * (q[t, k] + shift[t]) on the grid of ``fake_quantize``, q of 8 bits.
Weights are unpacked as ``triton_device`` reads them, and stay integers: w[n, k] = scale * (code - 2^(BITS -
1)) + centre.
"""

import triton
import triton.language as tl

from aquabit.kernels.backends.triton_device import _factor, _lookup, _narrow, _row_factor, _unfused, tuned

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def nearest(values):
    """Whole numbers, halves to the even one, as torch rounds."""
    low = tl.floor(values)
    part = values - low
    odd = low * 0.5 != tl.floor(low * 0.5)
    return tl.where((part > 0.5) | ((part == 0.5) & odd), low + 1.0, low)


@triton.jit
def quantize_tokens(
    x_ptr,
    q_ptr,
    step_ptr,
    shift_ptr,
    sum_ptr,
    row,
    x_b,
    x_c,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q int8 [tokens, row] with step, shift and sum_k q (float32 [tokens] each) of x [tokens, row], on the
    grid of LEVELS + 1 points that ``fake_quantize`` has per token (SYMMETRIC: around zero, "i8").

    A row with a NaN or an infinity has a step of NaN; a constant one a step of 1 and its value as shift.
    Grid: tokens.
    """
    HALF: tl.constexpr = (LEVELS + 1) // 2
    t = tl.program_id(0).to(tl.int64)
    lows = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    highs = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    none = tl.zeros([BLOCK], dtype=tl.float32)  # NaN where a number is not finite
    for k0 in range(0, row, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        ok = k < row
        xs = tl.load(x_ptr + t * x_b + k.to(tl.int64) * x_c, mask=ok, other=0.0).to(tl.float32)
        lows = tl.minimum(lows, tl.where(ok, xs, float("inf")))
        highs = tl.maximum(highs, tl.where(ok, xs, float("-inf")))
        none += xs * 0.0
    low, high = tl.min(lows, axis=0), tl.max(highs, axis=0)
    if SYMMETRIC:
        high = tl.maximum(high, -low)
        low = -high
    step = tl.div_rn(high * 0.5 - low * 0.5, LEVELS * 0.5)
    constant = step < TINY
    inverse = tl.div_rn(1.0, tl.where(constant, 1.0, step))
    zero = nearest(-low * inverse)  # SYMMETRIC: HALF
    bad = tl.sum(none, axis=0)
    keeps = constant | (bad != 0.0)  # no integers then: nothing, or no number, is left to round
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for k0 in range(0, row, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        ok = k < row
        xs = tl.load(x_ptr + t * x_b + k.to(tl.int64) * x_c, mask=ok, other=0.0).to(tl.float32)
        level = tl.minimum(tl.maximum(nearest(xs * inverse) + zero, 0.0), LEVELS * 1.0)
        q = tl.where(keeps, 0.0, tl.where(ok, level - HALF, 0.0)).to(tl.int32)
        tl.store(q_ptr + t * row + k, q.to(tl.int8), mask=ok)
        total += q
    tl.store(step_ptr + t, tl.where(constant, 1.0, step) + bad)
    tl.store(shift_ptr + t, tl.where(constant, low, HALF - zero))
    tl.store(sum_ptr + t, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def int8_matmul(
    q_ptr,
    y_ptr,
    codes_ptr,
    scale_ptr,
    centre_ptr,
    total_ptr,
    bias_ptr,
    step_ptr,
    shift_ptr,
    sum_ptr,
    tokens,
    out,
    row,
    row_bytes,
    scales,
    centres,
    tuned_tokens,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    FUSED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    CENTRE_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """y[t, n] = step[t] * (sum_k q[t, k] * w[n, k] + shift[t] * total[n]) + bias[n], with total[n] the sum
    of w[n].

    Products are int8 times int8 in int32: of a whole row where it has one scale, else of a block of it, whose
    scale multiplies their sum (SCALE_SIZE and CENTRE_SIZE, inputs that share one, are multiples of BLOCK_K;
    0: the row). Grid: tiles of tokens x tiles of outputs.
    """
    GROUPED: tl.constexpr = SCALE_SIZE > 0 or CENTRE_SIZE > 0
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // (SWIZZLE * tiles_n) * SWIZZLE
    high = tl.minimum(tiles_m - first, SWIZZLE)
    m = (first + tile % (SWIZZLE * tiles_n) % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % (SWIZZLE * tiles_n) // high * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok, n_ok, m64, n64 = m < tokens, n < out, m.to(tl.int64), n.to(tl.int64)
    row_scale = _row_factor(scale_ptr, n64, n_ok, HAS_SCALE, SCALE_SIZE)
    row_centre = _row_factor(centre_ptr, n64, n_ok, HAS_CENTRE, CENTRE_SIZE)
    products = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, row, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        qs = tl.load(
            q_ptr + m64[:, None] * row + k[None, :], mask=m_ok[:, None] & (k < row)[None, :], other=0
        )
        lookup = k0 // FUSED + tl.arange(0, BLOCK_K // FUSED)
        codes = _lookup(codes_ptr, n64, n_ok, lookup, row_bytes, BITS, WIDTH, FUSED)
        if FUSED > 1:
            codes = _unfused(codes, BITS, FUSED)
        ws = (codes - (1 << (BITS - 1))).to(tl.int8)
        if GROUPED:
            part = tl.dot(qs, tl.trans(ws), out_dtype=tl.int32).to(tl.float32)
            if HAS_SCALE:
                part *= tl.trans(
                    row_scale
                    if SCALE_SIZE == 0
                    else _factor(scale_ptr, n64, n_ok, k0, row, scales, SCALE_SIZE, BLOCK_K)
                )
            if HAS_CENTRE:
                centre = (
                    row_centre
                    if CENTRE_SIZE == 0
                    else _factor(centre_ptr, n64, n_ok, k0, row, centres, CENTRE_SIZE, BLOCK_K)
                )
                part += tl.sum(qs.to(tl.int32), axis=1).to(tl.float32)[:, None] * tl.trans(centre)
            sums += part
        else:
            products = tl.dot(qs, tl.trans(ws), products, out_dtype=tl.int32)
    if not GROUPED:
        sums = products.to(tl.float32)
        if HAS_SCALE:
            sums *= tl.trans(row_scale)
        if HAS_CENTRE:
            sums += tl.load(sum_ptr + m64, mask=m_ok, other=0.0)[:, None] * tl.trans(row_centre)
    shift = tl.load(shift_ptr + m64, mask=m_ok, other=0.0)
    sums += shift[:, None] * tl.load(total_ptr + n64, mask=n_ok, other=0.0)[None, :]
    sums *= tl.load(step_ptr + m64, mask=m_ok, other=0.0)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n64, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    at = m64[:, None] * out + n64[None, :]
    tl.store(y_ptr + at, _narrow(sums, y_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


def _suited(configs, positional, **named):
    """Tiles not taller than the tokens, and blocks of a row that have one scale."""
    given = positional | named
    low = [c for c in configs if c.kwargs["BLOCK_M"] <= max(16, given["tuned_tokens"])]
    sizes = (given["SCALE_SIZE"], given["CENTRE_SIZE"])
    return [c for c in low if all(size % c.kwargs["BLOCK_K"] == 0 for size in sizes)]


_CONFIGS = [
    triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SWIZZLE": 8}, num_warps=warps, num_stages=stages
    )
    for m, n, k, warps, stages in (
        (16, 32, 128, 4, 4),
        (16, 64, 64, 4, 4),
        (16, 64, 32, 4, 4),
        (64, 64, 32, 4, 4),
        (128, 128, 32, 8, 3),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (64, 64, 128, 4, 3),
        (128, 128, 128, 8, 3),
    )
]
_KEY = ["tuned_tokens", "out", "row", "BITS", "SCALE_SIZE", "CENTRE_SIZE", "HAS_CENTRE"]
tuned_int8_matmul = tuned(int8_matmul, _CONFIGS, _KEY, _suited)

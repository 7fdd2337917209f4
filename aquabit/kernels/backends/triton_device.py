# mypy: ignore-errors
"""The device code of the Triton backend; imported only where Triton is. ``triton_kernels`` launches it.

All kernels read a weight as rows of lookups, as ``Arranged`` lays them out but in one run over the whole row:
lookup ``j * M + m`` is group ``j`` of codebook ``m``, 8 or 4 bits wide, or ``FUSED`` scalar codes in one
byte. Position ``k`` of a row counts weights in stored order. Codes are masked to ``BITS`` bits and tables
have 2^BITS entries, so no code can read past a table.

Tables are gathered through L1, where they stay (2 x 256 x 8 float16 are 8 KB): Triton has no indexable shared
memory, and a codeword of a power-of-two group is one vector load. Decoded tiles go through shared memory into
the matrix units.
"""

import triton
import triton.language as tl


@triton.jit
def _lookup(
    codes_ptr, n64, n_ok, lookup, row_bytes, BITS: tl.constexpr, WIDTH: tl.constexpr, FUSED: tl.constexpr
):
    """Codes [N, L] int32 of rows ``n64`` [N] at ``lookup`` [L]; zero past the row's end. Fused codes stay
    together."""
    byte = lookup // 2 if WIDTH == 4 else lookup
    where = codes_ptr + n64[:, None] * row_bytes + byte[None, :]
    code = tl.load(where, mask=n_ok[:, None] & (byte < row_bytes)[None, :], other=0).to(tl.int32)
    if WIDTH == 4:
        code = code >> ((lookup % 2) * 4)[None, :]
    return code & ((1 << (BITS * FUSED)) - 1)


@triton.jit
def _unfused(codes, BITS: tl.constexpr, FUSED: tl.constexpr):
    """[N, L] fused codes as [N, L * FUSED] single ones; joined, so that a thread keeps the codes of the
    bytes that it reads."""
    MASK: tl.constexpr = (1 << BITS) - 1
    if FUSED == 2:
        single = tl.join(codes & MASK, codes >> BITS)
    elif FUSED == 4:
        even = tl.join(codes & MASK, (codes >> (2 * BITS)) & MASK)
        single = tl.join(even, tl.join((codes >> BITS) & MASK, codes >> (3 * BITS)))
    else:
        tl.static_assert(FUSED == 8)
        first = tl.join(
            tl.join(codes & MASK, (codes >> (4 * BITS)) & MASK),
            tl.join((codes >> (2 * BITS)) & MASK, (codes >> (6 * BITS)) & MASK),
        )
        third = tl.join((codes >> (3 * BITS)) & MASK, codes >> (7 * BITS))
        single = tl.join(first, tl.join(tl.join((codes >> BITS) & MASK, (codes >> (5 * BITS)) & MASK), third))
    return tl.reshape(single, [codes.shape[0], codes.shape[1] * FUSED])


@triton.jit
def _values(
    codes_ptr,
    tables_ptr,
    n64,
    n_ok,
    k0,
    row_bytes,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    FUSED: tl.constexpr,
    GROUP: tl.constexpr,
    BOOKS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PER_ROW: tl.constexpr,
    BY_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_m tables[m, code[n, k // GROUP, m], k % GROUP] for k in [k0, k0 + BLOCK_K): float32 [BLOCK_N,
    BLOCK_K].

    ``BY_GROUP``: GROUP is a power of two that divides BLOCK_K, so each code is read once and its codeword is
    one vector load.
    """
    SIZE: tl.constexpr = GROUP << BITS  # entries of a table
    base = n64 * (BOOKS * SIZE) if PER_ROW else n64 * 0
    if FUSED > 1 or UNIFORM:
        codes = _lookup(
            codes_ptr, n64, n_ok, k0 // FUSED + tl.arange(0, BLOCK_K // FUSED), row_bytes, BITS, WIDTH, FUSED
        )
        if FUSED > 1:
            codes = _unfused(codes, BITS, FUSED)
        if UNIFORM:
            values = codes.to(tl.float32)
        else:
            values = tl.load(tables_ptr + base[:, None] + codes, mask=n_ok[:, None], other=0.0).to(tl.float32)
    elif BY_GROUP:
        COUNT: tl.constexpr = BLOCK_K // GROUP
        inside = tl.arange(0, GROUP)[None, None, :]
        total = tl.zeros([BLOCK_N, COUNT, GROUP], dtype=tl.float32)
        for m in tl.static_range(BOOKS):
            codes = _lookup(
                codes_ptr,
                n64,
                n_ok,
                (k0 // GROUP + tl.arange(0, COUNT)) * BOOKS + m,
                row_bytes,
                BITS,
                WIDTH,
                FUSED,
            )
            at = base[:, None, None] + (codes[:, :, None] * GROUP + m * SIZE + inside)
            total += tl.load(tables_ptr + at, mask=n_ok[:, None, None], other=0.0).to(tl.float32)
        values = tl.reshape(total, [BLOCK_N, BLOCK_K])
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        values = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for m in tl.static_range(BOOKS):
            codes = _lookup(codes_ptr, n64, n_ok, k // GROUP * BOOKS + m, row_bytes, BITS, WIDTH, FUSED)
            at = base[:, None] + (codes * GROUP + m * SIZE + (k % GROUP)[None, :])
            values += tl.load(tables_ptr + at, mask=n_ok[:, None], other=0.0).to(tl.float32)
    return values


@triton.jit
def _row_factor(ptr, n64, n_ok, HAS: tl.constexpr, SIZE: tl.constexpr):
    """The scales or offsets [N, 1] of rows, loaded once before the loop; a placeholder where there is none
    or one for each SIZE inputs."""
    factor = tl.zeros(n64.shape, dtype=tl.float32)
    if HAS and SIZE == 0:
        factor = tl.load(ptr + n64, mask=n_ok, other=0.0).to(tl.float32)
    return factor[:, None]


@triton.jit
def _factor(ptr, n64, n_ok, k0, row, count, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales or offsets [out, count], each for SIZE inputs, at a tile of rows and positions."""
    if SIZE % BLOCK_K == 0:
        factor = tl.load(ptr + n64 * count + k0 // SIZE, mask=n_ok & (k0 < row), other=0.0).to(tl.float32)[
            :, None
        ]
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        mask = n_ok[:, None] & (k < row)[None, :]
        factor = tl.load(ptr + n64[:, None] * count + (k // SIZE)[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    return factor


@triton.jit
def _weights(
    codes_ptr,
    tables_ptr,
    scale_ptr,
    offset_ptr,
    row_scale,
    row_offset,
    n64,
    n_ok,
    k0,
    row,
    row_bytes,
    scales,
    offsets,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    FUSED: tl.constexpr,
    GROUP: tl.constexpr,
    BOOKS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PER_ROW: tl.constexpr,
    BY_GROUP: tl.constexpr,
    IN_TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    OFFSET_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights [BLOCK_N, BLOCK_K] float32, zero past the row's end; with scale and offset if ``IN_TILE``."""
    values = _values(
        codes_ptr,
        tables_ptr,
        n64,
        n_ok,
        k0,
        row_bytes,
        BITS,
        WIDTH,
        FUSED,
        GROUP,
        BOOKS,
        UNIFORM,
        PER_ROW,
        BY_GROUP,
        BLOCK_N,
        BLOCK_K,
    )
    if IN_TILE and HAS_SCALE:
        values *= (
            row_scale
            if SCALE_SIZE == 0
            else _factor(scale_ptr, n64, n_ok, k0, row, scales, SCALE_SIZE, BLOCK_K)
        )
    if IN_TILE and HAS_OFFSET:
        values += (
            row_offset
            if OFFSET_SIZE == 0
            else _factor(offset_ptr, n64, n_ok, k0, row, offsets, OFFSET_SIZE, BLOCK_K)
        )
    k = k0 + tl.arange(0, BLOCK_K)
    return tl.where((k < row)[None, :], values, 0.0)


@triton.jit
def _without(values, BITS: tl.constexpr):
    """float32 rounded to nearest without the lowest BITS bits of its mantissa: 13 makes tf32, 16 bfloat16."""
    raw = values.to(tl.int32, bitcast=True)
    rounded = ((raw + (1 << (BITS - 1))) & -(1 << BITS)).to(tl.float32, bitcast=True)
    return tl.where(values == values, rounded, values)


INTERPRETED = not isinstance(_without, triton.JITFunction)
MIXED = INTERPRETED and isinstance(
    tl.sum, triton.JITFunction
)  # its own library was made for a GPU, our kernels for the interpreter
_INTERPRETED = tl.constexpr(INTERPRETED)
# a compiled kernel takes the arguments of the kernel in their order, constants included (read in 3.6 and 3.7)
DIRECT = not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


@triton.jit
def _narrow(values, dtype: tl.constexpr):
    """float32 values as ``dtype``, rounded to nearest; the interpreter by itself would truncate to
    bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        values = _without(values, 16)
    return values.to(dtype)


@triton.jit
def _dot(xs, ws, total, EXACT: tl.constexpr):
    """total + xs [M, K] times the transposed float32 ws [N, K], which are rounded to the dtype that is
    multiplied."""
    if EXACT:
        total = tl.dot(xs.to(tl.float32), tl.trans(ws), total, input_precision="ieee")
    elif xs.dtype == tl.float32:  # the matrix units would truncate to tf32: twice the error, and one-sided
        total = tl.dot(_without(xs, 13), tl.trans(_without(ws, 13)), total, input_precision="tf32")
    elif _INTERPRETED:  # it multiplies the bits of bfloat16 as if they were integers
        total = tl.dot(xs.to(tl.float32), tl.trans(_narrow(ws, xs.dtype).to(tl.float32)), total)
    else:
        total = tl.dot(xs, tl.trans(_narrow(ws, xs.dtype)), total)
    return total


@triton.jit
def _finished(
    total,
    scale_ptr,
    bias_ptr,
    n64,
    n_ok,
    IN_TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Sums [tokens, N] with the row scale, where the tile has not got it, and the bias."""
    if HAS_SCALE and not IN_TILE:
        total = total * tl.load(scale_ptr + n64, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total = total + tl.load(bias_ptr + n64, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def matmul(
    x_ptr,
    y_ptr,
    codes_ptr,
    tables_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    tokens,
    out,
    row,
    row_bytes,
    scales,
    offsets,
    tuned_tokens,
    x_b,
    x_c,
    x_h,
    x_w,
    y_b,
    y_c,
    y_h,
    y_w,
    channels,
    height,
    width,
    out_h,
    out_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    FUSED: tl.constexpr,
    GROUP: tl.constexpr,
    BOOKS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PER_ROW: tl.constexpr,
    BY_GROUP: tl.constexpr,
    IN_TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    OFFSET_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CONV: tl.constexpr,
    KERNEL_ORDER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """y[t, n] = sum_k x[t, k] * w[n, k]: x a matrix, or (``CONV``) the patches of x [b, c, h, w], t = (b,
    out_h, out_w), never stored.

    Grid: (tiles of tokens x tiles of outputs, groups of the convolution); ``out`` and ``channels`` are those
    of one group. ``tuned_tokens`` only tells the tuner which token counts share a choice.
    """
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out, BLOCK_N)
    tile, part = tl.program_id(0), tl.program_id(1)
    first = (
        tile // (SWIZZLE * tiles_n) * SWIZZLE
    )  # SWIZZLE tiles of tokens go together: decoded rows and x stay in L2
    high = tl.minimum(tiles_m - first, SWIZZLE)
    m = (first + tile % (SWIZZLE * tiles_n) % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % (SWIZZLE * tiles_n) // high * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok, n_ok = m < tokens, n < out
    n64 = (part * out + n).to(tl.int64)
    if CONV:
        oy, ox, b = m // out_w % out_h, m % out_w, (m // (out_w * out_h)).to(tl.int64)
        y0, x0 = oy * stride_h - pad_h, ox * stride_w - pad_w
        y_rows = y_ptr + b * y_b + oy.to(tl.int64) * y_h + ox * y_w
        x_rows = x_ptr + b * x_b + part.to(tl.int64) * channels * x_c
    else:
        y_rows = y_ptr + m.to(tl.int64) * y_b
        x_rows = x_ptr + m.to(tl.int64) * x_b
    row_scale = _row_factor(scale_ptr, n64, n_ok, HAS_SCALE, SCALE_SIZE)
    row_offset = _row_factor(offset_ptr, n64, n_ok, HAS_OFFSET, OFFSET_SIZE)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    part = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, row, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        ok = m_ok[:, None] & (k < row)[None, :]
        if CONV:
            AREA: tl.constexpr = KERNEL_H * KERNEL_W
            if KERNEL_ORDER:
                c, tap = k // AREA, k % AREA
            else:
                c, tap = k % channels, k // channels
            yy = y0[:, None] + (tap // KERNEL_W * dilation_h)[None, :]
            xx = x0[:, None] + (tap % KERNEL_W * dilation_w)[None, :]
            ok = ok & (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
            at = x_rows[:, None] + (c.to(tl.int64) * x_c)[None, :] + yy.to(tl.int64) * x_h + xx * x_w
        else:
            at = x_rows[:, None] + (k.to(tl.int64) * x_c)[None, :]
        xs = tl.load(at, mask=ok, other=0.0)
        ws = _weights(
            codes_ptr,
            tables_ptr,
            scale_ptr,
            offset_ptr,
            row_scale,
            row_offset,
            n64,
            n_ok,
            k0,
            row,
            row_bytes,
            scales,
            offsets,
            BITS,
            WIDTH,
            FUSED,
            GROUP,
            BOOKS,
            UNIFORM,
            PER_ROW,
            BY_GROUP,
            IN_TILE,
            HAS_SCALE,
            HAS_OFFSET,
            SCALE_SIZE,
            OFFSET_SIZE,
            BLOCK_N,
            BLOCK_K,
        )
        # sums of 8 blocks are added apart: the error of one long sum of float32 passes 1e-6 from some
        # thousand inputs on
        if EXACT:
            part = _dot(xs, ws, part, EXACT)
            full = k0 // BLOCK_K % 8 == 7
            total = tl.where(full, total + part, total)
            part = tl.where(full, 0.0, part)
        else:
            total = _dot(xs, ws, total, EXACT)
    if EXACT:
        total += part
    total = _finished(total, scale_ptr, bias_ptr, n64, n_ok, IN_TILE, HAS_SCALE, HAS_BIAS)
    tl.store(
        y_rows[:, None] + (n64 * y_c)[None, :],
        _narrow(total, y_ptr.dtype.element_ty),
        mask=m_ok[:, None] & n_ok[None, :],
    )


@triton.jit
def few_tokens(
    x_ptr,
    y_ptr,
    parts_ptr,
    codes_ptr,
    tables_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    tokens,
    out,
    row,
    row_bytes,
    scales,
    offsets,
    x_b,
    x_c,
    steps,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    FUSED: tl.constexpr,
    GROUP: tl.constexpr,
    BOOKS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PER_ROW: tl.constexpr,
    BY_GROUP: tl.constexpr,
    IN_TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
    OFFSET_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [tokens, out] for at most TOKENS (8) tokens: one pass over the codes in float32, without matrix
    units.

    Grid: (tiles of outputs, splits of the row). Each split takes ``steps`` blocks of the row; with several
    splits (``SPLIT``) it writes parts [splits, tokens, out], which ``add_parts`` adds in a fixed order, so
    that results do not depend on timing.
    """
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, TOKENS)
    n_ok, t_ok, n64 = n < out, t < tokens, n.to(tl.int64)
    row_scale = _row_factor(scale_ptr, n64, n_ok, HAS_SCALE, SCALE_SIZE)
    row_offset = _row_factor(offset_ptr, n64, n_ok, HAS_OFFSET, OFFSET_SIZE)
    total = tl.zeros([TOKENS, BLOCK_N, BLOCK_K], dtype=tl.float32)
    for step in range(0, steps):
        k0 = (split * steps + step) * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        at = x_ptr + t.to(tl.int64)[:, None] * x_b + k.to(tl.int64)[None, :] * x_c
        xs = tl.load(at, mask=t_ok[:, None] & (k < row)[None, :], other=0.0).to(tl.float32)
        ws = _weights(
            codes_ptr,
            tables_ptr,
            scale_ptr,
            offset_ptr,
            row_scale,
            row_offset,
            n64,
            n_ok,
            k0,
            row,
            row_bytes,
            scales,
            offsets,
            BITS,
            WIDTH,
            FUSED,
            GROUP,
            BOOKS,
            UNIFORM,
            PER_ROW,
            BY_GROUP,
            IN_TILE,
            HAS_SCALE,
            HAS_OFFSET,
            SCALE_SIZE,
            OFFSET_SIZE,
            BLOCK_N,
            BLOCK_K,
        )
        total += xs[:, None, :] * ws[None, :, :]
    sums = tl.sum(total, axis=2)
    ok = t_ok[:, None] & n_ok[None, :]
    at = t.to(tl.int64)[:, None] * out + n64[None, :]
    if SPLIT:
        tl.store(parts_ptr + split.to(tl.int64) * tokens * out + at, sums, mask=ok)
    else:
        sums = _finished(sums, scale_ptr, bias_ptr, n64, n_ok, IN_TILE, HAS_SCALE, HAS_BIAS)
        tl.store(y_ptr + at, _narrow(sums, y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def add_parts(
    parts_ptr,
    y_ptr,
    scale_ptr,
    bias_ptr,
    tokens,
    out,
    splits,
    IN_TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [tokens, out] = sum of parts [splits, tokens, out], first to last, with row scale and bias."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, TOKENS)
    n_ok, n64 = n < out, n.to(tl.int64)
    ok = (t < tokens)[:, None] & n_ok[None, :]
    at = t.to(tl.int64)[:, None] * out + n64[None, :]
    total = tl.zeros([TOKENS, BLOCK_N], dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * tokens * out + at, mask=ok, other=0.0)
    total = _finished(total, scale_ptr, bias_ptr, n64, n_ok, IN_TILE, HAS_SCALE, HAS_BIAS)
    tl.store(y_ptr + at, _narrow(total, y_ptr.dtype.element_ty), mask=ok)


def _suited(configs, positional, **named):
    """Tiles not taller than the tokens; without matrix units (exact float32) small ones, as large ones
    spill thousands of bytes."""
    arguments = positional | named
    low = [c for c in configs if c.kwargs["BLOCK_M"] <= max(16, arguments["tuned_tokens"])]
    return [c for c in low if (c.kwargs["BLOCK_K"] <= 16) == bool(arguments["EXACT"])]


_CONFIGS = [
    triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SWIZZLE": 8}, num_warps=warps, num_stages=stages
    )
    for m, n, k, warps, stages in (
        (16, 32, 128, 4, 3),
        (16, 64, 64, 4, 4),
        (32, 64, 64, 4, 4),
        (64, 64, 32, 4, 4),
        (64, 128, 32, 8, 3),
        (64, 64, 64, 4, 3),
        (128, 64, 32, 8, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (16, 64, 16, 4, 2),
        (32, 64, 16, 4, 2),
        (64, 64, 16, 4, 2),
        (64, 64, 16, 8, 2),
        (128, 64, 16, 8, 2),
    )
]
_KEY = [
    "tuned_tokens",
    "out",
    "row",
    "BITS",
    "GROUP",
    "BOOKS",
    "UNIFORM",
    "PER_ROW",
    "IN_TILE",
    "SCALE_SIZE",
    "CONV",
    "KERNEL_ORDER",
    "KERNEL_H",
    "KERNEL_W",
    "EXACT",
]


def timed_briefly(call, quantiles):
    """Times of one tile: a choice among ten needs no more, and a model asks for one for each of its
    shapes."""
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def tuned(kernel, configs, key, suited=None):
    """A kernel that takes the fastest of its tiles; as it is under the interpreter."""
    if INTERPRETED:
        return kernel
    prune = None if suited is None else {"early_config_prune": suited}
    return triton.autotune(configs, key, prune_configs_by=prune, do_bench=timed_briefly)(kernel)


tuned_matmul = tuned(matmul, _CONFIGS, _KEY, _suited)

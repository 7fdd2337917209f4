// Activations to integers, laid out for multiply_block, and its results to tokens: part of level.h.

#include "../find_limits.h"

// Grids as fake_quantize's (fakequant/); false where no integers stand for the values: they are left as they are, or not finite
// with unquantized activations.
INLINE bool grid_of(Limits limits, int64_t bits, bool wide, bool zero_in_range, Grid* grid) {
    if (!limits.finite) {
        *grid = {0, 0, 0, 0, __builtin_nanf(""), 0, 0};
        return bits < 16;
    }
    if (bits >= 16) {
        const float most = limits.high > -limits.low ? limits.high : -limits.low;
        *grid = {0, 0, 0, 0, 0, 0, 0};
        if (most == 0) return true;
        *grid = {kActivation / most, -kActivation, kActivation, 0, most / kActivation, 0, 0};
        return most > 1e-30f && most < 1e30f;
    }
    if (bits < 0) {  // symmetric: bytes have 127 added, which is their zero point
        const float most = limits.high > -limits.low ? limits.high : -limits.low, scale = most / kSymmetricMost;
        *grid = {1 / scale, -kSymmetricMost, kSymmetricMost, wide ? 0 : -kSymmetricMost, scale, 0, wide ? 0 : 127};
        if (most == 0) *grid = {0, 0, 0, 0, 0, 0, 0};
        return most == 0 || scale >= 1.17549435e-38f;
    }
    if (zero_in_range) {
        limits.low = limits.low < 0 ? limits.low : 0;
        limits.high = limits.high > 0 ? limits.high : 0;
    }
    if (limits.low == limits.high) {  // constant: one step of its own size
        *grid = {0, 1, 1, 0, limits.low, 0, 0};
        return true;
    }
    const float levels = static_cast<float>((1 << bits) - 1);
    const float scale = (limits.high * 0.5f - limits.low * 0.5f) / (levels * 0.5f), inverse = 1 / scale;
    const float zero = __builtin_rintf(-limits.low * inverse);
    const bool inside = zero >= 0 && zero <= levels;
    *grid = {inverse, -zero, levels - zero, inside && wide ? 0 : -zero, scale, inside ? 0 : -zero, 0};
    if (inside && !wide) grid->zero = static_cast<int32_t>(zero);
    return scale >= 1.17549435e-38f;
}

// bfloat16 to float32.
static void widen(const uint16_t* from, int64_t n, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = uint32_t(from[i]) << 16;
        __builtin_memcpy(to + i, &bits, sizeof bits);
    }
}

static bool token_grid(const float* x, int64_t n, int64_t bits, bool wide, Grid* grid) {
    return grid_of(limits_of(x, n), bits, wide, false, grid);
}
// Of float32, or of bfloat16 where ``narrow``.
static bool sample_grid(const void* x, bool narrow, int64_t n, int64_t bits, bool wide, Grid* grid) {
    if (!narrow) return grid_of(limits_of(static_cast<const float*>(x), n), bits, wide, true, grid);
    Limits all = {__builtin_inff(), -__builtin_inff(), true};
    float room[1024];
    for (int64_t from = 0; from < n; from += 1024) {
        const int64_t count = smaller_of(1024, n - from);
        widen(static_cast<const uint16_t*>(x) + from, count, room);
        const Limits some = limits_of(room, count);
        all = {some.low < all.low ? some.low : all.low, some.high > all.high ? some.high : all.high, all.finite && some.finite};
    }
    return grid_of(all, bits, wide, true, grid);
}

INLINE int32_t quantized(float x, const Grid& grid) {
    float steps = __builtin_rintf(x * grid.inverse);
    steps = steps > grid.low ? steps : grid.low;
    steps = steps < grid.high ? steps : grid.high;
    return static_cast<int32_t>(steps - grid.base);
}

INLINE void add_errors(const float* x, int64_t n, const Grid& grid, Errors* errors) {
    float error = 0, all = 0;
#pragma omp simd reduction(+ : error, all)
    for (int64_t i = 0; i < n; ++i) {
        const float steps = x[i] * grid.inverse, lost = steps - __builtin_rintf(steps);
        error += lost * lost;
        all += steps * steps;
    }
    errors->error += double(error) * grid.scale * grid.scale;
    errors->all += double(all) * grid.scale * grid.scale;
}

INLINE void quantize_bytes(const float* x, int64_t n, const Grid grid, uint8_t* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const int32_t q = quantized(x[i], grid);
        to[i] = static_cast<uint8_t>(q < 255 ? q : 255);
    }
}

INLINE void quantize_shorts(const float* x, int64_t n, const Grid grid, int16_t* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int16_t>(quantized(x[i], grid));
}

static void quantize_token(const float* x, int64_t n, const Grid* grid, uint8_t* to) { quantize_bytes(x, n, *grid, to); }

// ``count`` (at most kLanes) tokens of ``length`` inputs as [step][kLanes] dwords, steps ``step_bytes`` apart.
static void pack_tokens(const float* x, int64_t count, int64_t length, const Grid* grids, bool wide, uint8_t* out, int64_t step_bytes,
                        Errors* errors) {
    const int64_t per = wide ? 2 : 4, most = per * kLanes, steps = (length + per - 1) / per;
    Ints rows[kLanes];
    for (int64_t t = count; t < kLanes; ++t) rows[t] = Ints{};
    for (int64_t from = 0; from < length; from += most) {
        const int64_t n = smaller_of(most, length - from);
        if (n < most || count < kLanes)
            for (int64_t t = 0; t < kLanes; ++t) rows[t] = Ints{};
        for (int64_t t = 0; t < count; ++t) {
            if (wide)
                quantize_shorts(x + t * length + from, n, grids[t], reinterpret_cast<int16_t*>(rows + t));
            else if (n == most)
                quantize_bytes(x + t * length + from, 4 * kLanes, grids[t], reinterpret_cast<uint8_t*>(rows + t));
            else
                quantize_bytes(x + t * length + from, n, grids[t], reinterpret_cast<uint8_t*>(rows + t));
        }
        transpose(rows);
        for (int64_t s = 0; s < smaller_of(kLanes, steps - from / per); ++s) store_ints(out + (from / per + s) * step_bytes, rows[s]);
    }
    for (int64_t t = 0; errors && t < count; ++t) add_errors(x + t * length, length, grids[t], errors);
}

// Values [i, i + kLanes) of float32, or of bfloat16 where ``narrow``; zeros from ``n`` on.
INLINE Floats load_values(const void* x, const bool narrow, int64_t i, int64_t n) {
    const uint16_t* short_ones = static_cast<const uint16_t*>(x) + i;
    if (!narrow) return load_some(static_cast<const float*>(x) + i, n - i);
    if (n - i >= kLanes) return load_narrow(short_ones);
    uint16_t some[kLanes] = {};
    for (int64_t lane = 0; lane < n - i; ++lane) some[lane] = short_ones[lane];
    return load_narrow(some);
}

// One line of an image, ``channels`` (at most 4 or 2) as [count] dwords.
INLINE void pack_line_of(const void* const* lines, const bool narrow, const int64_t channels, int64_t count, const Grid* const* grids,
                         const bool wide, int32_t* out, Errors* errors) {
    Floats inverse[4], low[4], high[4], error[4], all[4];
    Ints base[4];
#pragma GCC unroll 4
    for (int64_t c = 0; c < channels; ++c) {
        const Grid& grid = *grids[c];
        inverse[c] = splat(grid.inverse), low[c] = splat(grid.low), high[c] = splat(grid.high);
        base[c] = splat_int(static_cast<int32_t>(grid.base)), error[c] = all[c] = Floats{};
    }
    for (int64_t i = 0; i < count; i += kLanes) {
        Ints packed = {};
#pragma GCC unroll 4
        for (int64_t c = 0; c < channels; ++c) {
            const Floats steps = load_values(lines[c], narrow, i, count) * inverse[c];
            Floats inside = steps > low[c] ? steps : low[c];
            inside = inside < high[c] ? inside : high[c];
            const Ints q = nearest(inside);
            packed |= ((q - base[c]) & (wide ? 0xffff : 0xff)) << static_cast<int>(wide ? 16 * c : 8 * c);
            if (wide && errors) {
                const Floats lost = steps - to_floats(q);
                error[c] += lost * lost;
                all[c] += steps * steps;
            }
        }
        if (count - i >= kLanes)
            store_ints(out + i, packed);
        else
            for (int64_t lane = 0; lane < count - i; ++lane) out[i + lane] = packed[lane];
    }
    for (int64_t c = 0; wide && errors && c < channels; ++c) {
        const double squared = double(grids[c]->scale) * grids[c]->scale;
        errors->error += total_of(error[c]) * squared;
        errors->all += total_of(all[c]) * squared;
    }
}

INLINE void pack_line_with(const void* const* lines, const bool narrow, int64_t channels, int64_t count, const Grid* const* grids,
                           bool wide, int32_t* out, Errors* errors) {
    if (channels == 4)
        pack_line_of(lines, narrow, 4, count, grids, false, out, nullptr);
    else if (channels == 2 && wide)
        pack_line_of(lines, narrow, 2, count, grids, true, out, errors);
    else
        pack_line_of(lines, narrow, channels, count, grids, wide, out, errors);
}

static void pack_line(const void* const* lines, bool narrow, int64_t channels, int64_t count, const Grid* const* grids, bool wide,
                      int32_t* out, Errors* errors) {
    if (narrow)
        pack_line_with(lines, true, channels, count, grids, wide, out, errors);
    else
        pack_line_with(lines, false, channels, count, grids, wide, out, errors);
}

// float32 to the nearest bfloat16 (ties to even, any NaN to one), as torch does.
static void narrow(const float* from, int64_t n, uint16_t* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, from + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

// Spans of a tile [rows][stride] of results, whose first position is ``position``, into y [rows, area], float32 or (``narrow``) bfloat16.
static void put_pixels(const float* tile, int64_t stride, int64_t rows, const Span* first, const Span* end, int64_t position, void* y,
                       bool narrow, int64_t area) {
    for (const Span* span = first; span < end; ++span) {
        const float* from = tile + span->position - position;
        int64_t to = span->to;
        if (narrow)
            for (int64_t r = 0; r < rows; ++r, from += stride, to += area) {
                int16_t* here = static_cast<int16_t*>(y) + to;
                if (span->count == kLanes) {
                    store_narrowed(here, to_narrow(load(from)));
                } else {
                    int16_t some[kLanes];
                    store_narrowed(some, to_narrow(load(from)));
                    store_some(here, some, span->count);
                }
            }
        else
            for (int64_t r = 0; r < rows; ++r, from += stride, to += area) {
                float* here = static_cast<float*>(y) + to;
                if (span->count == kLanes)
                    store(here, load(from));
                else
                    store_some(here, from, span->count);
            }
    }
}

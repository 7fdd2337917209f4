// Fake quantization for one instruction set (foreach_level.h): the two passes over a row.

#include "../find_limits.h"

static void find_limits(const float* x, int64_t n, Limits* limits) { *limits = limits_of(x, n); }

static void to_grid(const float* x, float* y, int64_t n, const Grid* grid) {
    const float inverse = grid->inverse, scale = grid->scale, low = grid->low, high = grid->high;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        float steps = __builtin_rintf(x[i] * inverse);
        steps = steps > low ? steps : low;
        steps = steps < high ? steps : high;
        y[i] = steps * scale;
    }
}

// Float8 e4m3fn of |v| <= 448, ties to even: 3 bits behind the leading one, and steps of 2^-9 below 2^-6.
INLINE float e4m3_of(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    bits = (bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000u;
    float normal;
    __builtin_memcpy(&normal, &bits, sizeof normal);
    return __builtin_fabsf(v) < 0.015625f ? __builtin_rintf(v * 512) * 0.001953125f : normal;
}

static void to_e4m3(const float* x, float* y, int64_t n, const Grid* grid) {
    const float scale = grid->scale, low = grid->low, high = grid->high;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        float v = x[i] / scale;
        v = v > low ? v : low;
        v = v < high ? v : high;
        y[i] = e4m3_of(v) * scale;
    }
}

constexpr Level kLevel = {find_limits, to_grid, to_e4m3};

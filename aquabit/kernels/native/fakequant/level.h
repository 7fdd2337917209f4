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

constexpr Level kLevel = {find_limits, to_grid};

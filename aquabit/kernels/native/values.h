// Values of rows of float32 or bfloat16, and powers of two: part of the levels of attention.cpp and decode.cpp.

typedef uint16_t HalfWords __attribute__((vector_size(kBytes / 2)));
typedef uint16_t UnalignedHalfWords __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));

constexpr float kLeast = -125.0f;  // of the exponents: what is below counts as 0

// NaN in ``a`` stays. By intrinsics: compilers make a comparison and a choice of one with a constant.
INLINE Floats larger(Floats a, Floats b) {
#if AQUABIT_LEVEL == 4
    return (Floats)_mm512_max_ps((__m512)b, (__m512)a);
#else
    return a < b ? b : a;
#endif
}
INLINE Floats lesser(Floats a, Floats b) {
#if AQUABIT_LEVEL == 4
    return (Floats)_mm512_min_ps((__m512)b, (__m512)a);
#else
    return smaller(b, a);
#endif
}

// Values of a row from ``at`` on, zeros beyond ``count``.
INLINE Floats read(const void* row, bool narrow, int64_t at, int64_t count) {
    const int64_t left = count - at;
    if (narrow) {
        const uint16_t* x = static_cast<const uint16_t*>(row) + at;
        HalfWords half = {};
        if (left >= kLanes)
            half = *reinterpret_cast<const UnalignedHalfWords*>(x);
        else
            for (int64_t i = 0; i < left; ++i) half[i] = x[i];
        return (Floats)(__builtin_convertvector(half, Words) << 16);
    }
    return load_some(static_cast<const float*>(row) + at, left);
}

// To a row at ``at``, of ``count`` values.
INLINE void write(void* row, bool narrow, int64_t at, int64_t count, Floats x) {
    const int64_t left = smaller_of(count - at, kLanes);
    if (narrow) {  // to the nearest, ties to even; NaN stays
        const Words bits = (Words)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const HalfWords half = __builtin_convertvector((Words)(x == x ? (Ints)rounded : splat_int(0x7fc0)), HalfWords);
        uint16_t* y = static_cast<uint16_t*>(row) + at;
        if (left == kLanes)
            *reinterpret_cast<UnalignedHalfWords*>(y) = half;
        else
            for (int64_t i = 0; i < left; ++i) y[i] = half[i];
        return;
    }
    float* y = static_cast<float*>(row) + at;
    if (left == kLanes)
        store(y, x);
    else
        for (int64_t i = 0; i < left; ++i) y[i] = x[i];
}

// 2^x for x of at most 0, to 2e-7; 2^kLeast for all below it. The polynomial is 2^f on [-1/2, 1/2].
INLINE Floats exp2_of(Floats x) {
    x = larger(x, splat(kLeast));
#if AQUABIT_LEVEL == 4
    const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, 8);
#else
    const Floats shifted = x + 12582912.0f, whole = shifted - 12582912.0f;  // 1.5 * 2^23: the integer is in the mantissa
#endif
    const Floats f = x - whole;
    Floats y = splat(1.3398874e-3f);
    y = y * f + 9.6184373e-3f;
    y = y * f + 5.5503324e-2f;
    y = y * f + 2.4022648e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
#if AQUABIT_LEVEL == 4
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    return (Floats)((Words)y + ((Words)shifted << 23));
#endif
}

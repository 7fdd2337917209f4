// The range of a row, for one instruction set (foreach_level.h): part of the levels of fakequant.cpp and decode.cpp.

INLINE Limits limits_of(const float* x, int64_t n) {
    float low = __builtin_inff(), high = -low;
    int32_t magnitude = 0;  // the largest |x| as bits, whose order is that of the values: a NaN is above infinity
#pragma omp simd reduction(min : low) reduction(max : high) reduction(max : magnitude)
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        magnitude = bits > magnitude ? bits : magnitude;
    }
    return {low, high, magnitude < 0x7f800000};
}

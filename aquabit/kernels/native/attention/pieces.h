// Vectors that the attention kernel reads, writes and computes: part of level.h.

constexpr int kRows = kLanes == 16 ? 8 : 4;     // of a tile
constexpr int kVectors = kLanes == 16 ? 3 : 2;  // of a tile
#ifdef AQUABIT_AMX
constexpr int kUnit = 16;  // rows that blocks are multiples of
#else
constexpr int kUnit = kRows;
#endif
constexpr int64_t kBlock = 128;  // keys whose probabilities are held as integers

INLINE float largest(Floats v) {
#if AQUABIT_LEVEL == 4
    return _mm512_reduce_max_ps((__m512)v);
#else
    float high = v[0];
    for (int i = 1; i < kLanes; ++i) high = v[i] > high ? v[i] : high;
    return high;
#endif
}

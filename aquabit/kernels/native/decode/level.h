// Integer products of activations and decoded rows for one instruction set; included by decode.cpp once per level, inside a namespace and
// under a target pragma of its own, before decode_rows.h and decode_pack.h. No library code and no templates in any of them: what the
// linker shares between levels must not be compiled for one of them.
//
// Activations lie as [step][position] dwords, a step being 4 inputs of 8 bits or 2 of 16: a vector holds one step of neighbouring tokens or
// pixels. Weights lie row after row as they are decoded, and are broadcast. So a tile of weights can be as low as one block of rows, is
// never transposed, and a convolution reads each tap at an offset of its own.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));

INLINE Floats load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
INLINE void store(float* x, Floats v) { *reinterpret_cast<Unaligned*>(x) = v; }
INLINE Ints load_ints(const void* x) { return *reinterpret_cast<const UnalignedInts*>(x); }
INLINE void store_ints(void* x, Ints v) { *reinterpret_cast<UnalignedInts*>(x) = v; }
INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Four inputs of 8 bits, or two of 16, of all rows' lanes.
INLINE Ints broadcast(const uint8_t* at) {
    int32_t dword;
    __builtin_memcpy(&dword, at, sizeof dword);
    return dword - Ints{};
}

// sum + the product of unsigned x and signed w of 8 bits, or of both signed of 16 (``wide``).
INLINE Ints dot(Ints sum, Ints x, Ints w, const bool wide) {
#if AQUABIT_LEVEL == 4
    return wide ? (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w)
                : (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif AQUABIT_LEVEL == 3
    // Pairs cannot saturate: 2 * 255 * 64 < 2^15 for codes of at most 7 bits.
    const __m256i pairs = wide ? _mm256_madd_epi16((__m256i)x, (__m256i)w)
                               : _mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)x, (__m256i)w), _mm256_set1_epi16(1));
    return sum + (Ints)pairs;
#elif AQUABIT_LEVEL == 2
    return sum + (Ints)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
    return sum + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
}

// kRows rows times ``vectors`` vectors of positions, over all pieces of all runs; y is [kRows][kMostVectors * kLanes].
INLINE void multiply_block(const Plan& plan, const Tile& tile, int64_t row, const Activations& a, const bool wide, int64_t vector,
                           const int vectors, float* y) {
    const int64_t at = vector * kLanes, row_bytes = tile.row_bytes;
    const uint8_t* starts[kMostVectors];
    for (int v = 0; v < vectors; ++v) starts[v] = a.values + a.starts[vector + v];
    float sums[kRows * kVectors * kLanes] __attribute__((aligned(64)));
    for (const Range* range = plan.ranges; range < plan.ranges + plan.range_count; ++range) {
        for (int64_t i = range->first; i < range->last; ++i) {
            const Run& run = plan.runs[i];
            Ints acc[kRows][kVectors];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) acc[r][v] = Ints{};
            for (const Piece* piece = plan.pieces + run.first; piece < plan.pieces + run.last; ++piece) {
                const uint8_t* w = tile.slots + row * row_bytes + piece->slot;
                int64_t from = piece->offset;
                for (int64_t step = 0; step < piece->steps; ++step, w += 4, from += a.step_bytes) {
                    Ints x[kVectors];
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v) x[v] = load_ints(starts[v] + from);
#pragma GCC unroll 8
                    for (int r = 0; r < kRows; ++r) {
                        Ints weight = broadcast(w + r * row_bytes);
#if AQUABIT_LEVEL >= 2
                        if (vectors > 1) asm("" : "+v"(weight));  // one broadcast, not one in each product
#endif
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; ++v) acc[r][v] = dot(acc[r][v], x[v], weight, wide);
                    }
                }
            }
            if (!wide)  // zero points times the sums of the weights, in one more step of 16 bits
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    const Ints zero = load_ints(a.zero + range->number * a.positions + at + v * kLanes);
#pragma GCC unroll 8
                    for (int r = 0; r < kRows; ++r)
                        acc[r][v] = dot(acc[r][v], zero, tile.shift[i * tile.rows + row + r] - Ints{}, true);
                }
            const float* factor = tile.factor + i * tile.rows + row;
            const float* offset = tile.offset ? tile.offset + i * tile.rows + row : nullptr;
            const bool first = i == range->first;
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    float* sum = sums + (r * vectors + v) * kLanes;
                    Floats value = to_floats(acc[r][v]) * factor[r];
                    if (!first) value = to_floats(acc[r][v]) * factor[r] + load(sum);
                    if (offset) value = load(a.sums + i * a.positions + at + v * kLanes) * offset[r] + value;
                    store(sum, value);
                }
        }
        const int64_t place = range->number * a.positions + at;
        const float* total = tile.total + (range - plan.ranges) * tile.rows + row;
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < vectors; ++v) {
                float* here = y + (r * kMostVectors + v) * kLanes;
                const Floats rest = load(a.rest + place + v * kLanes), sum = load(sums + (r * vectors + v) * kLanes);
                const Floats before = range == plan.ranges ? tile.bias[row + r] - Floats{} : load(here);
                store(here, before + load(a.scale + place + v * kLanes) * (sum + rest * total[r]));
            }
    }
}

#define BLOCKS(count, wide)                                                                                                    \
    case count + (wide ? 8 : 0):                                                                                              \
        for (int64_t row = 0; row < tile.rows; row += kRows)                                                                  \
            multiply_block(plan, tile, row, a, wide, vector, count, y + row * kMostVectors * kLanes);                         \
        break;

// All rows of a tile; y is [rows][kMostVectors * kLanes].
static void multiply(const Plan& plan, const Tile& tile, const Activations& a, bool wide, int64_t vector, int64_t vectors, float* y) {
    switch (vectors + (wide ? 8 : 0)) {
        BLOCKS(1, true)
        BLOCKS(2, true)
#if AQUABIT_LEVEL >= 3
        BLOCKS(1, false)
        BLOCKS(2, false)
#endif
#if AQUABIT_LEVEL == 4
        BLOCKS(3, true)
        BLOCKS(4, true)
        BLOCKS(3, false)
        BLOCKS(4, false)
#endif
    }
}
#undef BLOCKS

// Sums of the integers of each run, which offsets are multiplied with; ``ones`` is a row of ones.
static void sum(const Plan& plan, const Activations& a, const uint8_t* ones, bool wide, int64_t vector, int64_t vectors) {
    const Range* range = plan.ranges;
    for (int64_t i = 0; i < plan.run_count; ++i) {
        Ints acc[kMostVectors] = {};
        if (i == range->last) ++range;
        for (const Piece* piece = plan.pieces + plan.runs[i].first; piece < plan.pieces + plan.runs[i].last; ++piece)
            for (int64_t step = 0; step < piece->steps; ++step) {
                const Ints w = broadcast(ones + piece->slot + 4 * step);
                for (int64_t v = 0; v < vectors; ++v)
                    acc[v] = dot(acc[v], load_ints(a.values + a.starts[vector + v] + piece->offset + step * a.step_bytes), w,
                                 wide);
            }
        for (int64_t v = 0; v < vectors; ++v) {
            const int64_t at = (vector + v) * kLanes;
            if (!wide) acc[v] -= (load_ints(a.zero + range->number * a.positions + at) & 255) * static_cast<int32_t>(plan.runs[i].inputs);
            store(a.sums + i * a.positions + at, to_floats(acc[v]));
        }
    }
}

// Integer products of activations and decoded rows for one instruction set (foreach_level.h).
//
// Activations lie as [step][position] dwords, a step being 4 inputs of 8 bits or 2 of 16: a vector holds one step of neighbouring tokens or
// pixels. Weights lie row after row as they are decoded, and are broadcast. So a tile of weights can be as low as one block of rows, is
// never transposed, and a convolution reads each tap at an offset of its own.

constexpr int kRows = AQUABIT_LEVEL == 4 ? 6 : 4, kVectors = AQUABIT_LEVEL == 4 ? 4 : 2;  // of a block

// kRows rows times ``vectors`` vectors of positions, over all pieces of all runs; y is [kRows][kMostVectors * kLanes].
// ``wide`` and ``vectors`` are constants where this is called, and not of a template: which products are rounded before
// they are added is the compiler's choice, and that of a template was another one, of other last bits and 3 % slower.
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
                        acc[r][v] = dot(acc[r][v], zero, splat_int(tile.shift[i * tile.rows + row + r]), true);
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
                const Floats before = range == plan.ranges ? splat(tile.bias[row + r]) : load(here);
                store(here, before + load(a.scale + place + v * kLanes) * (sum + rest * total[r]));
            }
    }
}

INLINE void multiply_rows(const Plan& plan, const Tile& tile, const Activations& a, const bool wide, int64_t vector,
                          const int vectors, float* y) {
    for (int64_t row = 0; row < tile.rows; row += kRows)
        multiply_block(plan, tile, row, a, wide, vector, vectors, y + row * kMostVectors * kLanes);
}

// All rows of a tile; y is [rows][kMostVectors * kLanes]. ``wide``: of 16 bits, which is all that SSE2 has products of.
static void multiply(const Plan& plan, const Tile& tile, const Activations& a, bool wide, int64_t vector, int64_t vectors,
                     float* y) {
    switch (vectors + (wide ? 8 : 0)) {
        case 9: return multiply_rows(plan, tile, a, true, vector, 1, y);
        case 10: return multiply_rows(plan, tile, a, true, vector, 2, y);
#if AQUABIT_LEVEL >= 3
        case 1: return multiply_rows(plan, tile, a, false, vector, 1, y);
        case 2: return multiply_rows(plan, tile, a, false, vector, 2, y);
#endif
#if AQUABIT_LEVEL == 4
        case 11: return multiply_rows(plan, tile, a, true, vector, 3, y);
        case 12: return multiply_rows(plan, tile, a, true, vector, 4, y);
        case 3: return multiply_rows(plan, tile, a, false, vector, 3, y);
        case 4: return multiply_rows(plan, tile, a, false, vector, 4, y);
#endif
    }
}

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

#include "rows.h"
#include "pack.h"
#include "few.h"
#include "strips.h"

constexpr Level kLevel = {
    kLanes,      kRows,          kVectors,    AQUABIT_LEVEL >= 3, AQUABIT_LEVEL == 4 ? 8 : 7, multiply,
    sum,         fill_codes,     fill_values, decode_row,         token_grid,                 sample_grid,
    pack_tokens, quantize_token, pack_line,   put_tokens,         serves_strips,              cut_strips,
    lay_bytes,   lay_floats,     dot_bytes,   dot_floats,         widen,                      narrow,
    dot_codes,   dot_values};

// Integer products of activations and decoded rows for one instruction set (foreach_level.h).
//
// Activations lie as [step][position] dwords, a step being 4 inputs of 8 bits or 2 of 16: a vector holds one step of neighbouring tokens or
// pixels. Weights lie row after row as they are decoded, and are broadcast. So a tile of weights can be as low as one block of rows, is
// never transposed, and a convolution reads each tap at an offset of its own.

// kRows rows times kVectors vectors of positions are multiplied at once. Their sums over all runs stay in registers beside those of one
// run, since a run may be as short as a group of 16 inputs. Products of all kinds share two ports of the processor: a run of n inputs
// costs n / 4 integer ones, one with its scale, one with its offset where there are any, and one with zero points that are apart.
constexpr int kRows = kByteBits == 8 ? 6 : 4, kVectors = 2;

// Rows of a block, by once, three and five times their distance: as few registers as that needs.
struct Far {
    int64_t one, three = 3 * one, five = 5 * one;
    const uint8_t* at(const uint8_t* first, int row) const {
        return row == 3 ? first + three : row == 5 ? first + five : first + row * one;
    }
};

// Makes a compiler load what follows after what comes before, and keep addresses out of vector registers: gcc moves what only the end of
// a run needs before its products, and loads their inputs again for each (half as fast).
INLINE void end_of_run() {
#if AQUABIT_LEVEL == 4
    asm volatile("" ::: "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
                 "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19");
#endif
}
INLINE void end_of_products() {
#if AQUABIT_LEVEL == 4
    asm volatile("" ::: "memory");
#endif
}

#if AQUABIT_LEVEL == 3 && !defined(AQUABIT_VNNI)
// Adds the products of ``steps`` steps of 8 bits. AVX2 has those of pairs in 16 bits, and takes two instructions more to add them in 32;
// so they are added in 16 first, ``held`` at a time: for codes of 2 and 3 bits (21 and 9 steps) that was 1.05 to 1.18 times as fast as
// to add each in 32, at 4 steps .92 to 1.08, at 2 steps .8. Registers hold no other sums meanwhile.
constexpr int64_t kLeastHeld = 8;

INLINE void multiply_held(const Far& rows, const uint8_t* w, const uint8_t** from, int64_t steps, int64_t held, int64_t step_bytes,
                          const int vectors, Ints (*acc)[kVectors]) {
    for (; steps > 0; steps -= held) {
        Shorts sums[kRows][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sums[r][v] = Shorts{};
        for (int64_t step = smaller_of(steps, held); step > 0; --step, w += 4) {
            Ints x[kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) x[v] = load_ints(from[v]), from[v] += step_bytes;
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                Ints weight = broadcast(rows.at(w, r));
                if (vectors > 1) asm("" : "+v"(weight));  // one broadcast, not one in each product
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) sums[r][v] = plus(sums[r][v], pairs(x[v], weight));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) acc[r][v] += widened(sums[r][v]);
    }
}
#endif

// kRows rows times ``vectors`` vectors of positions, over all pieces of all runs; y is [kRows][kMostVectors * kLanes].
// ``wide``, ``apart``, ``offsets`` and ``vectors`` are constants where this is called, and not of a template: which products are rounded
// before they are added is the compiler's choice, and that of a template was another one, of other last bits and 3 % slower.
INLINE void multiply_block(const Plan& plan, const Tile& tile, int64_t row, const Activations& a, const bool wide, const bool apart,
                           const bool offsets, int64_t vector, const int vectors, float* y) {
    const int64_t at = vector * kLanes, row_bytes = tile.row_bytes;
    const Far rows = {row_bytes}, known_rows = {kKnown * plan.run_count * 4};
    const uint8_t *known = reinterpret_cast<const uint8_t*>(tile.known) + row * known_rows.one, *slots = tile.slots + row * row_bytes;
    const int64_t step_bytes = a.step_bytes, positions = a.positions, kind = 4 * plan.run_count;
    const uint8_t* starts[kVectors];
    for (int v = 0; v < vectors; ++v) starts[v] = a.values + a.starts[vector + v];
    for (const Range* range = plan.ranges; range < plan.ranges + plan.range_count; ++range) {
        Floats sums[kRows][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sums[r][v] = Floats{};
        const Piece* piece = plan.pieces + plan.runs[range->first].first;
        const float* inputs = a.sums + range->first * a.positions + at;
        const Run* last = plan.runs + range->last;
        for (const Run* run = plan.runs + range->first; run < last; ++run, known += 4, inputs += positions) {
            const uint8_t* start = known + kStart * kind;
            Ints acc[kRows][kVectors];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) acc[r][v] = wide || apart ? Ints{} : broadcast(known_rows.at(start, r));
            for (const Piece* end = plan.pieces + run->last; piece < end; ++piece) {
                const uint8_t* w = slots + piece->slot;
                const uint8_t* from[kVectors];
                for (int v = 0; v < vectors; ++v) from[v] = starts[v] + piece->offset;
#if AQUABIT_LEVEL == 3 && !defined(AQUABIT_VNNI)
                if (!wide && plan.held >= kLeastHeld) {
                    multiply_held(rows, w, from, piece->steps, plan.held, step_bytes, vectors, acc);
                    continue;
                }
#endif
                for (int64_t step = piece->steps; step > 0; --step, w += 4) {
                    Ints x[kVectors];
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v) x[v] = load_ints(from[v]), from[v] += step_bytes;
#pragma GCC unroll 8
                    for (int r = 0; r < kRows; ++r) {
                        Ints weight = broadcast(rows.at(w, r));
#if AQUABIT_LEVEL >= 2
                        if (vectors > 1) asm("" : "+v"(weight));  // one broadcast, not one in each product
#endif
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; ++v) acc[r][v] = dot(acc[r][v], x[v], weight, wide);
                    }
                }
            }
            end_of_products();
            const uint8_t* offset = known + kOffset * kind;
            if (apart)  // zero points times the sums of the weights, in one more step of 16 bits
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    const Ints zero = load_ints(a.zero + range->number * a.positions + at + v * kLanes);
#pragma GCC unroll 8
                    for (int r = 0; r < kRows; ++r) acc[r][v] = dot(acc[r][v], zero, broadcast(known_rows.at(start, r)), true);
                }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    sums[r][v] = to_floats(acc[r][v]) * (Floats)broadcast(known_rows.at(known, r)) + sums[r][v];
                }
            if (offsets)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    const Floats x = load(inputs + v * kLanes);
#pragma GCC unroll 8
                    for (int r = 0; r < kRows; ++r) sums[r][v] = x * (Floats)broadcast(known_rows.at(offset, r)) + sums[r][v];
                }
            end_of_run();
        }
        const int64_t place = range->number * a.positions + at, of = (range - plan.ranges) * tile.rows + row;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                float* here = y + (r * kMostVectors + v) * kLanes;
                Floats sum = sums[r][v] + load(a.rest + place + v * kLanes) * tile.total[of + r];
                if (!wide && !apart) sum = load(a.left + place + v * kLanes) * tile.whole[of + r] + sum;
                const Floats before = range == plan.ranges ? splat(tile.bias[row + r]) : load(here);
                store(here, before + load(a.scale + place + v * kLanes) * sum);
            }
    }
}

// Whole blocks of rows [row, row + rows) of a tile; y is [rows][kMostVectors * kLanes].
INLINE void multiply_rows(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, const bool wide,
                          const bool apart, const bool offsets, int64_t vector, int64_t vectors, float* y) {
    for (const int64_t end = row + rows; row < end; row += kRows, y += kRows * kMostVectors * kLanes)
        if (vectors == 1)
            multiply_block(plan, tile, row, a, wide, apart, offsets, vector, 1, y);
        else
            multiply_block(plan, tile, row, a, wide, apart, offsets, vector, 2, y);
}

#if AQUABIT_LEVEL >= 3
static void multiply_apart(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, int64_t vector,
                           int64_t vectors, float* y) {
    if (tile.offsets)
        multiply_rows(plan, tile, row, rows, a, false, true, true, vector, vectors, y);
    else
        multiply_rows(plan, tile, row, rows, a, false, true, false, vector, vectors, y);
}

static void multiply_together(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, int64_t vector,
                              int64_t vectors, float* y) {
    if (tile.offsets)
        multiply_rows(plan, tile, row, rows, a, false, false, true, vector, vectors, y);
    else
        multiply_rows(plan, tile, row, rows, a, false, false, false, vector, vectors, y);
}
#endif

// ``wide``: of 16 bits, which is all that SSE2 has products of.
static void multiply(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, bool wide, int64_t vector,
                     int64_t vectors, float* y) {
#if AQUABIT_LEVEL >= 3
    if (!wide) return (a.apart ? multiply_apart : multiply_together)(plan, tile, row, rows, a, vector, vectors, y);
#endif
    if (tile.offsets)
        multiply_rows(plan, tile, row, rows, a, true, false, true, vector, vectors, y);
    else
        multiply_rows(plan, tile, row, rows, a, true, false, false, vector, vectors, y);
}

INLINE void sum_vectors(const Plan& plan, const Activations& a, const uint8_t* ones, const bool wide, int64_t vector, const int vectors) {
    const Range* range = plan.ranges;
    for (int64_t i = 0; i < plan.run_count; ++i) {
        Ints acc[kVectors] = {};
        if (i == range->last) ++range;
        for (const Piece* piece = plan.pieces + plan.runs[i].first; piece < plan.pieces + plan.runs[i].last; ++piece)
            for (int64_t step = 0; step < piece->steps; ++step) {
                const Ints w = broadcast(ones + piece->slot + 4 * step);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    acc[v] = dot(acc[v], load_ints(a.values + a.starts[vector + v] + piece->offset + step * a.step_bytes), w,
                                 wide);
            }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            const int64_t at = (vector + v) * kLanes;
            if (!wide) acc[v] -= (load_ints(a.zero + range->number * a.positions + at) & 255) * static_cast<int32_t>(plan.runs[i].inputs);
            store(a.sums + i * a.positions + at, to_floats(acc[v]));
        }
    }
}

// Sums of the integers of each run, which offsets are multiplied with; ``ones`` is a row of ones.
static void sum(const Plan& plan, const Activations& a, const uint8_t* ones, bool wide, int64_t vector, int64_t vectors) {
    if (vectors == kVectors && !wide) return sum_vectors(plan, a, ones, false, vector, kVectors);
    for (int64_t v = vector; v < vector + vectors; ++v) sum_vectors(plan, a, ones, wide, v, 1);
}

#include "../put_tokens.h"
#include "../values.h"
#include "activate.h"
#include "rows.h"
#include "pack.h"
#include "few.h"
#include "strips.h"

constexpr Level kLevel = {
    kLanes,      kRows,          kVectors,    AQUABIT_LEVEL >= 3, kByteBits, multiply,
    sum,         fill_codes,     fill_values, decode_row,         token_grid,                 sample_grid,
    pack_tokens, quantize_token, pack_line,   put_tokens,         put_pixels,                 serves_strips,
    cut_strips,  lay_bytes,      lay_floats,  dot_bytes,          dot_floats,                 widen,
    narrow,      dot_codes,      dot_values,  activate};

// Integer products of activations and decoded rows for one instruction set (foreach_level.h).
//
// Activations lie as [step][position] dwords, a step being 4 inputs of 8 bits or 2 of 16: a vector holds one step of neighbouring tokens or
// pixels. Weights lie row after row as they are decoded, and are broadcast. So a tile of weights can be as low as one block of rows, is
// never transposed, and a convolution reads each tap at an offset of its own.

constexpr int kRows = AQUABIT_LEVEL == 4 ? 6 : 4, kVectors = AQUABIT_LEVEL == 4 ? 4 : 2;  // of a block

// Adds the products of ``steps`` dwords of kRows rows with those of ``vectors`` vectors of positions. ``wide`` and ``vectors`` are constants
// where this is called, and not of a template: of that, other products were rounded before they are added, and it took 3 % longer.
INLINE void add_products(const uint8_t* const* starts, int64_t from, int64_t step_bytes, const uint8_t* w, int64_t row_bytes, int64_t steps,
                         const bool wide, const int vectors, Ints acc[kRows][kVectors]) {
    for (int64_t step = 0; step < steps; ++step, w += 4, from += step_bytes) {
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

// What run ``i`` adds to its range's ``sums`` [kRows][kVectors] (``first``: begins them with): its products, less zero points times the
// weights, at its scale, and what offsets add. A function of its own: in the one that multiplies it cost that its registers.
static NOT_INLINE void add_run(const Tile& tile, int64_t row, const Activations& a, bool wide, int64_t i, int64_t number, int64_t at,
                               int64_t vectors, bool first, const Ints* products, Floats* sums) {
    const float *factor = tile.factor + i * tile.rows + row, *offset = tile.offset ? tile.offset + i * tile.rows + row : nullptr;
    const int32_t* shift = tile.shift + i * tile.rows + row;
    for (int64_t v = 0; v < vectors; ++v) {
        const Ints zero = wide ? Ints{} : load_ints(a.zero + number * a.positions + at + v * kLanes);
        const Floats inputs = offset ? load(a.sums + i * a.positions + at + v * kLanes) : Floats{};
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            Ints product = products[r * kVectors + v];
            if (!wide) product = dot(product, zero, splat_int(shift[r]), true);  // one more step, of 16 bits
            Floats value = to_floats(product) * factor[r];
            if (!first) value += sums[r * kVectors + v];
            if (offset) value += inputs * offset[r];
            sums[r * kVectors + v] = value;
        }
    }
}

// Adds a range's sums, at the scale of its activations, to the results y [kRows][kMostVectors * kLanes]; the ``first``: to the bias.
static NOT_INLINE void add_range(const Tile& tile, int64_t row, const Activations& a, const float* total, int64_t place, int64_t vectors,
                                 bool first, const Floats* sums, float* y) {
    for (int64_t v = 0; v < vectors; ++v) {
        const Floats rest = load(a.rest + place + v * kLanes), scale = load(a.scale + place + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            float* here = y + (r * kMostVectors + v) * kLanes;
            const Floats before = first ? splat(tile.bias[row + r]) : load(here);
            store(here, before + scale * (sums[r * kVectors + v] + rest * total[r]));
        }
    }
}

// kRows rows times ``vectors`` vectors of positions, over all pieces of all runs; y is [kRows][kMostVectors * kLanes].
INLINE void multiply_block(const Plan& plan, const Tile& tile, int64_t row, const Activations& a, const bool wide, int64_t vector,
                           const int vectors, float* y) {
    const int64_t at = vector * kLanes;
    const uint8_t* starts[kMostVectors];
    for (int v = 0; v < vectors; ++v) starts[v] = a.values + a.starts[vector + v];
    Floats sums[kRows * kVectors];
    for (const Range* range = plan.ranges; range < plan.ranges + plan.range_count; ++range) {
        for (int64_t i = range->first; i < range->last; ++i) {
            const Run& run = plan.runs[i];
            Ints acc[kRows][kVectors], products[kRows * kVectors];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) acc[r][v] = Ints{};
            for (const Piece* piece = plan.pieces + run.first; piece < plan.pieces + run.last; ++piece)
                add_products(starts, piece->offset, a.step_bytes, tile.slots + row * tile.row_bytes + piece->slot, tile.row_bytes,
                             piece->steps, wide, vectors, acc);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) products[r * kVectors + v] = acc[r][v];
            add_run(tile, row, a, wide, i, range->number, at, vectors, i == range->first, products, sums);
        }
        add_range(tile, row, a, tile.total + (range - plan.ranges) * tile.rows + row, range->number * a.positions + at, vectors,
                  range == plan.ranges, sums, y);
    }
}

INLINE void multiply_rows(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, const bool wide,
                          int64_t vector, const int vectors, float* y) {
    for (int64_t r = 0; r < rows; r += kRows)
        multiply_block(plan, tile, row + r, a, wide, vector, vectors, y + r * kMostVectors * kLanes);
}

// Whole blocks of rows [row, row + rows) of a tile; y is [rows][kMostVectors * kLanes]. ``wide``: of 16 bits, which is all that SSE2 has
// products of.
static void multiply(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, bool wide, int64_t vector,
                     int64_t vectors, float* y) {
    switch (vectors + (wide ? 8 : 0)) {
        case 9: return multiply_rows(plan, tile, row, rows, a, true, vector, 1, y);
        case 10: return multiply_rows(plan, tile, row, rows, a, true, vector, 2, y);
#if AQUABIT_LEVEL >= 3
        case 1: return multiply_rows(plan, tile, row, rows, a, false, vector, 1, y);
        case 2: return multiply_rows(plan, tile, row, rows, a, false, vector, 2, y);
#endif
#if AQUABIT_LEVEL == 4
        case 11: return multiply_rows(plan, tile, row, rows, a, true, vector, 3, y);
        case 12: return multiply_rows(plan, tile, row, rows, a, true, vector, 4, y);
        case 3: return multiply_rows(plan, tile, row, rows, a, false, vector, 3, y);
        case 4: return multiply_rows(plan, tile, row, rows, a, false, vector, 4, y);
#endif
    }
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

#include "rows.h"
#include "pack.h"
#include "few.h"
#include "strips.h"

constexpr Level kLevel = {
    kLanes,      kRows,          kVectors,    AQUABIT_LEVEL >= 3, AQUABIT_LEVEL == 4 ? 8 : 7, multiply,
    sum,         fill_codes,     fill_values, decode_row,         token_grid,                 sample_grid,
    pack_tokens, quantize_token, pack_line,   put_tokens,         put_pixels,                 serves_strips,
    cut_strips,  lay_bytes,      lay_floats,  dot_bytes,          dot_floats,                 widen,
    narrow,      dot_codes,      dot_values};

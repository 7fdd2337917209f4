// Products of 8 bits by tiles (AMX), in place of those of the level ``avx512vnni``: the same sums, to the bit.
//
// Decoded rows are the signed operand as they lie, 16 rows of 64 inputs; activations the unsigned one, 16 steps of 16 positions. Pieces
// are padded to kTileSteps steps; what activations have there meets zeros.
constexpr int kHalf = 16, kVectors = 2;  // rows of a tile; blocks are two tiles high and two wide

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const TileShapes kShapes;

static void enter() { _tile_loadconfig(&kShapes); }
static void leave() { _tile_release(); }

// The sums of one run, [2 * kHalf][kVectors * kLanes], from where rows, and ``vectors`` vectors of positions, start.
INLINE void multiply_run(const Plan& plan, const Run& run, const uint8_t* slots, int64_t row_bytes, const uint8_t* const* starts,
                         int64_t step_bytes, const int vectors, int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (const Piece* piece = plan.pieces + run.first; piece < plan.pieces + run.last; ++piece) {
        const uint8_t *w = slots + piece->slot, *first = starts[0] + piece->offset, *second = starts[vectors - 1] + piece->offset;
        for (int64_t step = 0; step < piece->steps; step += kTileSteps, w += 4 * kTileSteps) {
            _tile_loadd(4, w, row_bytes);
            _tile_loadd(6, first + step * step_bytes, step_bytes);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(5, w + kHalf * row_bytes, row_bytes);
            _tile_dpbsud(2, 5, 6);
            if (vectors == 1) continue;
            _tile_loadd(7, second + step * step_bytes, step_bytes);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(3, 5, 7);
        }
    }
    constexpr int64_t stride = kVectors * kLanes;
    _tile_stored(0, sums, 4 * stride);
    _tile_stored(2, sums + kHalf * stride, 4 * stride);
    if (vectors > 1) {
        _tile_stored(1, sums + kLanes, 4 * stride);
        _tile_stored(3, sums + kHalf * stride + kLanes, 4 * stride);
    }
    asm volatile("" ::: "memory");
}

// As multiply_block of level.h, of 2 * kHalf rows.
INLINE void multiply_block(const Plan& plan, const Tile& tile, int64_t row, const Activations& a, const bool apart, const bool offsets,
                           int64_t vector, const int vectors, float* y) {
    constexpr int64_t stride = kVectors * kLanes;
    alignas(64) int32_t products[2 * kHalf * stride];
    alignas(64) float sums[2 * kHalf * stride];
    const int64_t at = vector * kLanes, runs = plan.run_count;
    const uint8_t* starts[kVectors] = {};
    for (int v = 0; v < vectors; ++v) starts[v] = a.values + a.starts[vector + v];
    for (const Range* range = plan.ranges; range < plan.ranges + plan.range_count; ++range) {
        const int64_t place = range->number * a.positions + at;
        for (int64_t i = range->first; i < range->last; ++i) {
            multiply_run(plan, plan.runs[i], tile.slots + row * tile.row_bytes, tile.row_bytes, starts, a.step_bytes, vectors, products);
            const float* known = tile.known + row * kKnown * runs + i;
            Ints zero[kVectors];
            Floats inputs[kVectors];
            for (int v = 0; v < vectors; ++v) {
                if (apart) zero[v] = load_ints(a.zero + place + v * kLanes);
                if (offsets) inputs[v] = load(a.sums + i * a.positions + at + v * kLanes);
            }
            for (int r = 0; r < 2 * kHalf; ++r, known += kKnown * runs) {
                const Ints start = broadcast(reinterpret_cast<const uint8_t*>(known + kStart * runs));
                for (int v = 0; v < vectors; ++v) {
                    const Ints own = load_ints(products + r * stride + v * kLanes);
                    const Ints acc = apart ? dot(own, zero[v], start, true) : own + start;
                    float* here = sums + r * stride + v * kLanes;
                    Floats sum = i == range->first ? Floats{} : load(here);
                    sum = to_floats(acc) * splat(known[kFactor * runs]) + sum;
                    if (offsets) sum = inputs[v] * splat(known[kOffset * runs]) + sum;
                    store(here, sum);
                }
            }
        }
        const int64_t of = (range - plan.ranges) * tile.rows + row;
        for (int r = 0; r < 2 * kHalf; ++r)
            for (int v = 0; v < vectors; ++v) {
                float* here = y + r * kMostVectors * kLanes + v * kLanes;
                Floats sum = load(sums + r * stride + v * kLanes) + load(a.rest + place + v * kLanes) * splat(tile.total[of + r]);
                if (!apart) sum = load(a.left + place + v * kLanes) * splat(tile.whole[of + r]) + sum;
                const Floats before = range == plan.ranges ? splat(tile.bias[row + r]) : load(here);
                store(here, before + load(a.scale + place + v * kLanes) * sum);
            }
    }
}

INLINE void multiply_rows(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, const bool apart,
                          const bool offsets, int64_t vector, int64_t vectors, float* y) {
    for (const int64_t end = row + rows; row < end; row += 2 * kHalf, y += 2 * kHalf * kMostVectors * kLanes)
        if (vectors == 1)
            multiply_block(plan, tile, row, a, apart, offsets, vector, 1, y);
        else
            multiply_block(plan, tile, row, a, apart, offsets, vector, 2, y);
}

static void multiply(const Plan& plan, const Tile& tile, int64_t row, int64_t rows, const Activations& a, bool, int64_t vector,
                     int64_t vectors, float* y) {
    if (a.apart && tile.offsets) return multiply_rows(plan, tile, row, rows, a, true, true, vector, vectors, y);
    if (a.apart) return multiply_rows(plan, tile, row, rows, a, true, false, vector, vectors, y);
    if (tile.offsets) return multiply_rows(plan, tile, row, rows, a, false, true, vector, vectors, y);
    multiply_rows(plan, tile, row, rows, a, false, false, vector, vectors, y);
}

constexpr Level of_tiles(Level level) {
    level.rows = 2 * kHalf, level.steps = kTileSteps, level.multiply = multiply, level.enter = enter, level.leave = leave;
    level.without = &avx512vnni::kLevel;
    return level;
}
constexpr Level kLevel = of_tiles(avx512vnni::kLevel);

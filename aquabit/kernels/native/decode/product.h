// A product of decoded rows with packed activations, by threads and tiles. Part of decode.cpp.

constexpr int64_t kNear = 1 << 19;  // bytes of activations that all rows are multiplied with in turn: half of a second-level cache
constexpr int64_t kParallel = 1 << 18;  // multiply-adds below which other threads are not woken
constexpr int64_t kParallelFew = 1 << 20, kParallelBytes = 1 << 21;  // of few tokens, as floats and as integers

// How a call multiplies.
struct Method {
    const Level* level;
    bool codes;     // codes as integers; else decoded values rounded to 16 bits
    bool wide;      // 16 bits
    bool by_scale;  // runs end where a group of scales does
    int64_t most;   // of the activations' integers
    int64_t limit;  // inputs of a run
    int64_t bits;   // of activations; less than 0: symmetric ones
    int64_t threads;

    int64_t per() const { return wide ? 2 : 4; }
    int64_t beyond(int64_t step_bytes) const { return (level->steps - 1) * step_bytes; }  // what is read after the last step
};

// Whether at most a quarter of what tiles would multiply is padding: groups of 32 inputs took .6 to 1.1 times as long without them.
bool fits_tiles(const Weight& w) {
    int64_t inputs = 0, padded = 0;
    for (int64_t n = 0; n < w.segment_count; ++n)
        inputs += w.segments[n].count, padded += rounded_up(w.segments[n].count, 4 * kTileSteps);
    return 3 * padded <= 4 * inputs;
}

Method method_of(const Weight& w, int64_t level, int64_t act, int64_t threads) {
    const Level* l = &level_at(level);
    const int64_t bits = act == kSymmetric ? -8 : act;
    const bool codes = bits <= 8 && w.integers.there, wide = !codes || !l->bytes || w.integers.bits > l->byte_bits;
    const int64_t limit = codes ? kLongestRun : bits <= 8 ? kByteRun : kWideRun;
    if (l->without && (wide || !fits_tiles(w))) l = l->without;
    const bool by_scale = codes || w.length() / std::max(w.scales, w.offsets) >= kOwnRun;
    return {l, codes, wide, by_scale, bits <= 8 ? 256 : kActivation, limit, bits, threads};
}

// A thread's room for decoded rows and results.
struct Scratch {
    Buffer<uint8_t> slots, room;
    Buffer<int32_t> sums;
    Buffer<float> known, total, whole, bias, y;
    Errors errors = {0, 0};
};

// Scales and zero points of positions.
struct Positions {
    int64_t count;
    std::vector<float> scale, rest, left;  // [ranges, count]
    std::vector<int32_t> zero;
    int64_t middle[2] = {0, 0};
    bool near = true;  // all zero points lie near the middle

    // ``grid(range, position)`` is null where nothing is wanted.
    template <class GridAt>
    Positions(int64_t ranges, int64_t positions, const GridAt& grid)
        : count(positions), scale(ranges * positions), rest(ranges * positions), left(ranges * positions), zero(ranges * positions) {
        for (int64_t r = 0; r < ranges; ++r) {
            int64_t low = 255, high = 0;
            for (int64_t i = 0; i < positions; ++i) {
                const Grid* own = grid(r, i);
                if (!own) continue;
                const int64_t at = r * positions + i;
                scale[at] = own->scale, rest[at] = own->rest, left[at] = static_cast<float>(own->zero), zero[at] = own->zero * 0x00800001;
                low = std::min<int64_t>(low, own->zero), high = std::max<int64_t>(high, own->zero);
            }
            middle[r] = (low + high + 1) / 2;
            near = near && high - middle[r] <= kFarthestZero;
            for (int64_t i = r * positions; i < (r + 1) * positions; ++i) left[i] = static_cast<float>(middle[r]) - left[i];
        }
    }

    // Zero points are taken off in integers where they lie far from the middle, and of long runs, where that costs nothing.
    Activations activations(const uint8_t* values, const int64_t* starts, int64_t step_bytes, float* sums, const Plan& plan,
                            int64_t inputs) const {
        const bool apart = !near || inputs > kShortRun * plan.run_count;
        return {values,      starts,      step_bytes, count, scale.data(), rest.data(),
                zero.data(), left.data(), sums,       {middle[0], middle[1]}, apart};
    }
};

// What is multiplied with one group's rows: [first_row, first_row + rows) of the weight.
struct Product {
    const Method& method;
    const Weight& weight;
    const Planned& planned;
    Activations activations;
    int64_t vectors, first_row, rows;

    int64_t row_bytes() const { return rounded_up(planned.plan.slot_bytes, 64) + 64; }
    int64_t room_bytes() const { return weight.length() * (method.codes ? 1 : 5) + 64; }

    // Rows of a tile: all threads' scratch within 1/16 of the dense weight in bfloat16, or kSmallTile each, but at least one block of rows.
    int64_t tile_rows() const {
        const int64_t block = method.level->rows;
        const int64_t budget = std::max(weight.out * weight.length() / 8 / method.threads, kSmallTile) - room_bytes();
        const int64_t share = rounded_up((rows + method.threads - 1) / method.threads, block);
        return std::clamp(budget / row_bytes() / block * block, block, std::max(block, std::min(share, kMostTile / block * block)));
    }

    Scratch scratch(int64_t tile) const {
        const Plan& p = planned.plan;
        return {Buffer<uint8_t>(tile * row_bytes()),
                Buffer<uint8_t>(room_bytes()),
                Buffer<int32_t>(method.codes ? std::max(p.run_count, weight.length() / 4) : 0),
                Buffer<float>(tile * p.run_count * kKnown),
                Buffer<float>(tile * p.range_count),
                Buffer<float>(tile * p.range_count),
                Buffer<float>(tile),
                Buffer<float>(tile * kMostVectors * method.level->lanes)};
    }

    int64_t scratch_bytes(int64_t tile) const { return tile * row_bytes() + room_bytes(); }

    // Rows [from, from + count) of the group, decoded; the rows that fill up the tile are zero.
    Tile fill(int64_t from, int64_t count, Scratch* s) const {
        const Plan& p = planned.plan;
        const int64_t padded = rounded_up(count, method.level->rows);
        for (int64_t r = 0; r < padded; ++r) {
            const int64_t row = first_row + from + r;
            uint8_t* slot = s->slots.get() + r * row_bytes();
            float* known = s->known.get() + r * kKnown * p.run_count;
            s->bias[r] = r < count && weight.bias ? weight.bias[row] : 0;
            if (r >= count) {
                std::memset(slot, 0, row_bytes());
                std::fill(known, known + kKnown * p.run_count, 0.0f);
                for (int64_t i = 0; i < p.range_count; ++i) s->total[i * padded + r] = s->whole[i * padded + r] = 0;
            } else if (method.codes) {
                method.level->fill_codes(weight, p, activations, method.wide, row, reinterpret_cast<int8_t*>(s->room.get()),
                                         s->sums.get(), slot, known, s->total.get() + r, s->whole.get() + r, padded);
            } else {
                method.level->fill_values(weight, p, method.most, row, reinterpret_cast<float*>(s->room.get()), slot, known,
                                          s->total.get() + r, padded, &s->errors);
            }
        }
        return {s->slots.get(), row_bytes(), padded, s->known.get(), s->total.get(), s->whole.get(), s->bias.get(), offsets()};
    }

    bool offsets() const { return method.codes && !weight.integers.centred; }

    // Sums of the activations' integers of each run, which offsets need.
    void sum(int64_t threads) const {
        const Plan& p = planned.plan;
        const Buffer<uint8_t> ones(p.slot_bytes);
        std::memset(ones.get(), 0, p.slot_bytes);
        for (const Piece& piece : planned.pieces)
            for (int64_t k = piece.lead; k < piece.lead + piece.count; ++k) ones[piece.slot + k * (method.wide ? 2 : 1)] = 1;
        const int64_t size = method.level->vectors, blocks = (vectors + size - 1) / size;
        in_parts(blocks, threads, 1, [&](int64_t from, int64_t to, int64_t) {
            for (int64_t b = from; b < to; ++b)
                method.level->sum(p, activations, ones.get(), method.wide, b * size, std::min(size, vectors - b * size));
        });
    }

    // Parts of the activations that all rows are multiplied with in turn: for each thread where there are fewer tiles, and as they fit a
    // cache where rows are decoded quickly.
    int64_t chunks(int64_t blocks, int64_t tiles, int64_t threads) const {
        const int64_t bytes = vectors * method.level->lanes * weight.cin * 4 / method.per();
        return std::min(blocks, std::max(tiles < threads ? threads : 1, method.codes ? bytes / kNear : 1));
    }

    // All of it; sink(results, stride, row, rows, vector, vectors) takes what is done, of at most ``at_once`` rows (whole blocks). Returns
    // scratch bytes of all threads.
    template <class Sink>
    int64_t run(Errors* errors, int64_t at_once, const Sink& sink) const {
        const int64_t threads = rows * vectors * method.level->lanes * weight.length() > kParallel ? method.threads : 1;
        if (offsets()) sum(threads);
        const int64_t tile = tile_rows(), tiles = (rows + tile - 1) / tile, size = method.level->vectors;
        const int64_t blocks = (vectors + size - 1) / size, chunks = this->chunks(blocks, tiles, threads), jobs = tiles * chunks;
        std::vector<Scratch> scratch;
        for (int64_t i = 0; i < std::min(threads, jobs); ++i) scratch.push_back(this->scratch(tile));
        const int64_t stride = kMostVectors * method.level->lanes;
        in_parts(jobs, threads, 1, [&](int64_t from, int64_t to, int64_t part) {
            Scratch& s = scratch[part];
            if (method.level->enter) method.level->enter();
            for (int64_t job = from; job < to; ++job) {
                const int64_t row = job % tiles * tile, count = std::min(tile, rows - row), chunk = job / tiles;
                const Tile decoded = fill(row, count, &s);
                for (int64_t b = blocks * chunk / chunks; b < blocks * (chunk + 1) / chunks; ++b) {
                    const int64_t n = std::min(size, vectors - b * size);
                    for (int64_t r = 0; r < count; r += at_once) {
                        const int64_t some = std::min(at_once, decoded.rows - r);
                        method.level->multiply(planned.plan, decoded, r, some, activations, method.wide, b * size, n, s.y.get());
                        sink(s.y.get(), stride, first_row + row + r, std::min(some, count - r), b * size, n);
                    }
                }
            }
            if (method.level->leave) method.level->leave();
        });
        for (const Scratch& s : scratch) errors->error += s.errors.error, errors->all += s.errors.all;
        return scratch_bytes(tile) * static_cast<int64_t>(scratch.size());
    }
};

double ratio_of(const Errors& e) { return e.error > 0 ? std::sqrt(e.error / e.all) : 0; }

// Whether it was done (0: no integers stand for the activations), relative errors of activations and of weights, bytes of scratch.
using Outcome = std::tuple<int64_t, double, double, int64_t>;

// Products with tokens, and decoded rows. Part of decode.cpp.

// Rows of float32, or of bfloat16 where ``narrow``.
struct Rows {
    void* values;
    int64_t length;
    bool narrow;
    bool past = false;     // the caches: what is written is more than they hold
    int64_t function = 0;  // of what is read; where it is gated, rows are twice as long

    // Values that reading so many rows takes room for.
    int64_t room(int64_t count) const { return function ? (count + 1) * rounded_up(length, kMostLanes) : narrow ? count * length : 0; }

    // Rows [first, first + count) as float32: where they lie, or in ``room``.
    const float* read(const Level& level, int64_t first, int64_t count, float* room) const {
        if (function) {
            const int64_t whole = function & kGated ? 2 * length : length;
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = (first + i) * whole;
                const void* row = narrow ? static_cast<const void*>(static_cast<const uint16_t*>(values) + at) : static_cast<const float*>(values) + at;
                level.activate(row, narrow, length, function, room + i * length);
            }
            return room;
        }
        if (!narrow) return static_cast<const float*>(values) + first * length;
        level.widen(static_cast<const uint16_t*>(values) + first * length, count * length, room);
        return room;
    }
};

// Results of tokens [first, first + count) and rows [row, row + rows) of the weight, from a tile [rows][stride].
void put_results(const Level& level, const float* tile, int64_t stride, int64_t first, int64_t count, int64_t row, int64_t rows, const Rows& y) {
    const int64_t at = first * y.length + row;
    if (!y.narrow) return level.put_tokens(tile, stride, rows, count, static_cast<float*>(y.values) + at, y.length, y.past);
    float room[kMostVectors * kMostLanes * kMostTile];
    level.put_tokens(tile, stride, rows, count, room, rows, false);
    for (int64_t t = 0; t < count; ++t) level.narrow(room + t * rows, rows, static_cast<uint16_t*>(y.values) + at + t * y.length);
}

// x [tokens, in] to y [tokens, out].
Outcome linear_product(const Method& m, const Weight& w, const Rows& x, const Rows& y, int64_t tokens) {
    const int64_t lanes = m.level->lanes, size = m.level->vectors, vectors = (tokens + lanes - 1) / lanes, positions = vectors * lanes;
    const int64_t step_bytes = 4 * lanes * size, steps = (w.cin + m.per() - 1) / m.per(), block_bytes = steps * step_bytes;
    std::vector<int64_t> starts;
    for (int64_t v = 0; v < vectors; ++v) starts.push_back(v / size * block_bytes + v % size * 4 * lanes);
    const Buffer<uint8_t> values((vectors + size - 1) / size * block_bytes + m.beyond(step_bytes));
    std::vector<Grid> grids(positions, Grid{0, 0, 0, 0, 0, 0, 0});
    std::vector<Errors> errors(vectors, Errors{0, 0});
    std::vector<char> usable(vectors, 1);
    in_parts(vectors, tokens * w.cin > 32768 ? m.threads : 1, 1, [&](int64_t from, int64_t to, int64_t) {
        const Buffer<float> room(x.room(lanes));
        for (int64_t v = from; v < to; ++v) {
            const int64_t first = v * lanes, count = std::min(lanes, tokens - first);
            const float* rows = x.read(*m.level, first, count, room.get());
            for (int64_t t = 0; t < count; ++t)
                usable[v] &= m.level->token_grid(rows + t * w.cin, w.cin, m.bits, m.wide, &grids[first + t]);
            if (usable[v])
                m.level->pack_tokens(rows, count, w.cin, &grids[first], m.wide, values.get() + starts[v], step_bytes,
                                     m.bits < 16 ? nullptr : &errors[v]);
        }
    });
    Errors lost = {0, 0}, rounded = {0, 0};
    for (int64_t v = 0; v < vectors; ++v) {
        if (!usable[v]) return {0, 0, 0, 0};
        lost.error += errors[v].error, lost.all += errors[v].all;
    }
    if (ratio_of(lost) > kMostLost) return {0, ratio_of(lost), 0, 0};
    Planned planned;
    make_plan(w, {{0}, step_bytes, 0, w.cin}, m.per(), m.limit, m.by_scale, m.level->steps, &planned);
    const Positions own(1, positions, [&](int64_t, int64_t t) { return t < tokens ? &grids[t] : nullptr; });
    const Buffer<float> sums(m.codes ? planned.plan.run_count * positions : 0);
    const Activations a = own.activations(values.get(), starts.data(), step_bytes, sums.get(), planned.plan, w.cin);
    const Product product = {m, w, planned, a, vectors, 0, w.out};
    const Rows results = {y.values, y.length, y.narrow, tokens * y.length >= kPast};
    const auto sink = [&](const float* tile, int64_t stride, int64_t row, int64_t rows, int64_t vector, int64_t n) {
        const int64_t first = vector * lanes;
        put_results(*m.level, tile, stride, first, std::min(n * lanes, tokens - first), row, rows, results);
    };
    const int64_t bytes = product.run(&rounded, kMostTile, sink);
    return {1, ratio_of(lost), ratio_of(rounded), bytes};
}

// Few tokens times rows that are decoded one by one.
Outcome decoded_few(const Method& m, const Weight& w, const float* x, float* y, int64_t tokens) {
    std::vector<Grid> grids(tokens);
    std::vector<uint8_t> values(m.codes ? tokens * w.cin : 0);
    std::vector<int32_t> sums(w.segment_count * tokens, 0);
    for (int64_t t = 0; m.codes && t < tokens; ++t) {
        if (!m.level->token_grid(x + t * w.cin, w.cin, m.bits, false, &grids[t])) return {0, 0, 0, 0};
        m.level->quantize_token(x + t * w.cin, w.cin, &grids[t], values.data() + t * w.cin);
        for (int64_t n = 0; n < w.segment_count; ++n)
            for (int64_t i = 0; i < w.segments[n].count; ++i) sums[n * tokens + t] += values[t * w.cin + w.segments[n].start + i];
    }
    const int64_t threads = w.out * w.cin > kParallel ? m.threads : 1, room = w.cin * (m.codes ? 1 : 5) + 64;
    in_parts(w.out, threads, 1, [&](int64_t from, int64_t to, int64_t) {
        const Buffer<float> decoded(room / 4 + 1);
        for (int64_t row = from; row < to; ++row)
            if (m.codes)
                m.level->dot_codes(w, row, values.data(), grids.data(), sums.data(), tokens, reinterpret_cast<int8_t*>(decoded.get()),
                                   y + row, w.out);
            else
                m.level->dot_values(w, row, x, tokens, decoded.get(), y + row, w.out);
    });
    return {1, 0, 0, room * std::min(threads, w.out)};
}

// Few tokens as their codes are read, or else decoded.
Outcome few_products(const Method& m, const Weight& w, const float* x, float* y, int64_t tokens) {
    if (!m.level->serves_strips(w, m.codes)) return decoded_few(m, w, x, y, tokens);
    const int64_t lanes = m.level->lanes, unit = m.codes ? 4 : 1, most = w.row_bytes / (unit * lanes) + w.segment_count + 1;
    const int64_t stride = rounded_up(w.segment_count, lanes), inputs = most * w.fused * tokens * lanes;
    const Buffer<Strip> cut(most);
    const Buffer<Grid> grids(tokens);
    const Buffer<int32_t> segments(most * lanes), counts(most * lanes), sums(m.codes ? most * tokens * lanes : 0);
    const Buffer<int8_t> ones(w.integers.levels ? most * w.fused * 4 * lanes : 0);
    const Buffer<float> laid(inputs), totals = zeros(tokens * stride), room(m.codes ? w.cin / 4 + 1 : 0);
    int8_t* bytes = reinterpret_cast<int8_t*>(laid.get());
    Strips strips = {tokens, 0,          stride,     cut.get(),  segments.get(), counts.get(), grids.get(),
                     bytes,  ones.get(), laid.get(), sums.get(), totals.get()};
    m.level->cut_strips(w, unit, &strips);
    for (int64_t t = 0; t < tokens; ++t)
        if (!m.codes)
            m.level->lay_floats(w, x + t * w.cin, t, strips);
        else if (!m.level->lay_bytes(w, x + t * w.cin, m.bits, t, reinterpret_cast<int8_t*>(room.get()), strips))
            return decoded_few(m, w, x, y, tokens);
    const auto rows = m.codes ? m.level->dot_bytes : m.level->dot_floats;
    const int64_t threads = w.out * w.cin * tokens > (m.codes ? kParallelBytes : kParallelFew) ? m.threads : 1;
    in_parts(w.out, threads, 1, [&](int64_t from, int64_t to, int64_t) { rows(w, from, to, strips, y, w.out); });
    return {1, 0, 0, 0};
}

// Few tokens: x [tokens, in] to y [tokens, out], row by row.
Outcome few_tokens(const Method& m, const Weight& w, const Rows& inputs, const Rows& results, int64_t tokens) {
    const Buffer<float> wide(inputs.room(tokens)), room(results.narrow ? tokens * w.out : 0);
    float* y = results.narrow ? room.get() : static_cast<float*>(results.values);
    const float* x = inputs.read(*m.level, 0, tokens, wide.get());
    Outcome done = {1, 0, 0, 0};
    for (int64_t t = 0; t < tokens && std::get<0>(done); t += kDotRows)
        done = few_products(m, w, x + t * w.cin, y + t * w.out, std::min(kDotRows, tokens - t));
    if (results.narrow) m.level->narrow(y, tokens * w.out, static_cast<uint16_t*>(results.values));
    return done;
}

// Rows [first, last) in the weight's own order [.., cin, area], float32.
void decoded_rows(const Level& level, const Weight& w, int64_t first, int64_t last, int64_t threads, float* out) {
    const bool turned = w.area > 1;
    in_parts(last - first, (last - first) * w.length() > 65536 ? threads : 1, 1, [&](int64_t from, int64_t to, int64_t) {
        const Buffer<float> room(w.length() * 5 / 4 + 16);
        for (int64_t r = from; r < to; ++r) {
            level.decode_row(w, first + r, room.get());
            float* here = out + r * w.length();
            if (!turned) std::memcpy(here, room.get(), w.length() * sizeof(float));
            for (int64_t c = 0; turned && c < w.cin; ++c)
                for (int64_t tap = 0; tap < w.area; ++tap) here[c * w.area + tap] = room[tap * w.cin + c];
        }
    });
}

// Products with tokens, and decoded rows. Part of decode.cpp.

// x [tokens, in] to y [tokens, out].
Outcome linear_product(const Method& m, const Weight& w, const float* x, float* y, int64_t tokens) {
    const int64_t lanes = m.level->lanes, size = m.level->vectors, vectors = (tokens + lanes - 1) / lanes, positions = vectors * lanes;
    const int64_t step_bytes = 4 * lanes * size, steps = (w.cin + m.per() - 1) / m.per(), block_bytes = steps * step_bytes;
    std::vector<int64_t> starts;
    for (int64_t v = 0; v < vectors; ++v) starts.push_back(v / size * block_bytes + v % size * 4 * lanes);
    const Buffer<uint8_t> values((vectors + size - 1) / size * block_bytes);
    std::vector<Grid> grids(positions, Grid{0, 0, 0, 0, 0, 0, 0});
    std::vector<Errors> errors(vectors, Errors{0, 0});
    std::vector<char> usable(vectors, 1);
    in_parts(vectors, tokens * w.cin > 32768 ? m.threads : 1, 1, [&](int64_t from, int64_t to, int64_t) {
        for (int64_t v = from; v < to; ++v) {
            const int64_t first = v * lanes, count = std::min(lanes, tokens - first);
            for (int64_t t = first; t < first + count; ++t)
                usable[v] &= m.level->token_grid(x + t * w.cin, w.cin, m.bits, m.wide, &grids[t]);
            if (usable[v])
                m.level->pack_tokens(x + first * w.cin, count, w.cin, &grids[first], m.wide, values.get() + starts[v], step_bytes,
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
    make_plan(w, {{0}, step_bytes, 0, w.cin}, m.per(), m.limit, m.by_scale, &planned);
    std::vector<float> scale(positions), rest(positions);
    std::vector<int32_t> zero(positions);
    for (int64_t t = 0; t < positions; ++t) scale[t] = grids[t].scale, rest[t] = grids[t].rest, zero[t] = grids[t].zero * 0x00800001;
    const Buffer<float> sums(m.codes ? planned.plan.run_count * positions : 0);
    const Activations a = {values.get(), starts.data(), step_bytes, positions, scale.data(), rest.data(), zero.data(), sums.get()};
    const Product product = {m, w, planned, a, vectors, 0, w.out};
    const auto sink = [&](const float* tile, int64_t stride, int64_t row, int64_t rows, int64_t vector, int64_t n) {
        const int64_t first = vector * lanes;
        m.level->put_tokens(tile, stride, rows, std::min(n * lanes, tokens - first), y + first * w.out + row, w.out);
    };
    const int64_t bytes = product.run(&rounded, sink);
    return {1, ratio_of(lost), ratio_of(rounded), bytes};
}

// Few tokens: x [tokens, in] to y [tokens, out], row by row.
Outcome few_tokens(const Method& m, const Weight& w, const float* x, float* y, int64_t tokens) {
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

// A row at a time for few tokens: decoded and multiplied at once; part of level.h.

// Dot products of a segment's integers [count] with those of ``tokens`` tokens, and with ones.
INLINE void dot_segment(const int8_t* w, const uint8_t* x, int64_t stride, const int64_t tokens, int64_t count, bool narrow, int32_t* sums) {
    int64_t done = 0;
    for (int64_t t = 0; t <= tokens; ++t) sums[t] = 0;
#if AQUABIT_LEVEL >= 3
    if (narrow) {
        Ints acc[kDotRows + 1] = {};
        const Ints ones = splat_int(0x01010101);
#pragma GCC unroll 2
        for (; done + kBytes <= count; done += kBytes) {
            const Ints weight = load_ints(w + done);
#pragma GCC unroll 4
            for (int64_t t = 0; t < tokens; ++t) acc[t] = dot(acc[t], load_ints(x + t * stride + done), weight, false);
            acc[tokens] = dot(acc[tokens], ones, weight, false);
        }
        for (int64_t t = 0; t <= tokens; ++t)
            for (int lane = 0; lane < kLanes; ++lane) sums[t] += acc[t][lane];
    }
#endif
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = done; i < count; ++i) sums[t] += x[t * stride + i] * w[i];
    for (int64_t i = done; i < count; ++i) sums[tokens] += w[i];
}

INLINE void dot_codes_of(const Weight& w, int64_t row, const uint8_t* x, const Grid* grids, const int32_t* sums, const int64_t tokens,
                         const int8_t* decoded, float* y, int64_t y_stride) {
    float result[kDotRows] = {};
    double total = 0;
    for (int64_t n = 0; n < w.segment_count; ++n) {
        const Segment& s = w.segments[n];
        int32_t products[kDotRows + 1];
        dot_segment(decoded + s.start, x + s.start, w.cin, tokens, s.count, w.integers.bits <= kByteBits, products);
        const double scale = scale_at(w, row, s.scales) * w.integers.unit, shifted = shifted_at(w, row, s.scales);
        for (int64_t t = 0; t < tokens; ++t)
            result[t] += static_cast<float>(scale) * (products[t] - grids[t].zero * products[tokens]) +
                         static_cast<float>(shifted) * (sums[n * tokens + t] - grids[t].zero * static_cast<int32_t>(s.count));
        total += scale * products[tokens] + shifted * s.count;
    }
    for (int64_t t = 0; t < tokens; ++t)
        y[t * y_stride] = (w.bias ? w.bias[row] : 0) + grids[t].scale * (result[t] + grids[t].rest * static_cast<float>(total));
}

// Row ``row`` of codes as integers times quantized tokens [tokens, cin]; ``sums`` [segments, tokens] of their integers.
static void dot_codes(const Weight& w, int64_t row, const uint8_t* x, const Grid* grids, const int32_t* sums, int64_t tokens, int8_t* room,
                      float* y, int64_t y_stride) {
    expand_integers(w, row, room);
    if (tokens == 1)
        dot_codes_of(w, row, x, grids, sums, 1, room, y, y_stride);
    else if (tokens == 2)
        dot_codes_of(w, row, x, grids, sums, 2, room, y, y_stride);
    else if (tokens == 3)
        dot_codes_of(w, row, x, grids, sums, 3, room, y, y_stride);
    else
        dot_codes_of(w, row, x, grids, sums, 4, room, y, y_stride);
}

// Row ``row`` of any weight, decoded, times tokens [tokens, cin].
static void dot_values(const Weight& w, int64_t row, const float* x, int64_t tokens, float* room, float* y, int64_t y_stride) {
    decode_row(w, row, room);
    const int64_t n = w.length();
    for (int64_t t = 0; t < tokens; ++t) {
        const float* token = x + t * n;
        Floats acc[4] = {};
        int64_t i = 0;
        for (; i + 4 * kLanes <= n; i += 4 * kLanes)
            for (int v = 0; v < 4; ++v) acc[v] += load(token + i + v * kLanes) * load(room + i + v * kLanes);
        const Floats sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
        float total = 0, rest = 0;
        for (; i < n; ++i) rest += token[i] * room[i];
        for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
        y[t * y_stride] = total + rest + (w.bias ? w.bias[row] : 0);
    }
}

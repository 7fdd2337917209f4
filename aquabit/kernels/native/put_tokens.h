// Results to memory, a row for each token; part of the levels that make them a row for each output.

// ``count`` (below kLanes) values; a call of memcpy for each takes longer than the product of a small layer.
template <class T>
INLINE void store_some(T* to, const T* from, int64_t count) {
    int64_t at = 0;
#pragma GCC unroll 4
    for (int64_t part = kLanes / 2; part; part /= 2)
        if (count & part) __builtin_memcpy(to + at, from + at, part * sizeof(T)), at += part;
}

// A tile [rows][stride] of results, transposed into y [tokens, y_stride]; ``past`` the caches where whole lines of them are written.
static void put_tokens(const float* tile, int64_t stride, int64_t rows, int64_t tokens, float* y, int64_t y_stride, bool past) {
    past = past && y_stride % kLanes == 0 && whole_lines(y);
    for (int64_t r = 0; r < rows; r += kLanes)
        for (int64_t t = 0; t < tokens; t += kLanes) {
            Ints part[kLanes];
            const int64_t down = smaller_of(kLanes, rows - r), across = smaller_of(kLanes, tokens - t);
            for (int64_t i = 0; i < kLanes; ++i) part[i] = i < down ? load_ints(tile + (r + i) * stride + t) : Ints{};
            transpose(part);
            for (int64_t i = 0; i < across; ++i)
                if (down == kLanes && past)
                    store_past(y + (t + i) * y_stride + r, part[i]);
                else if (down == kLanes)
                    store_ints(y + (t + i) * y_stride + r, part[i]);
                else
                    store_some(y + (t + i) * y_stride + r, reinterpret_cast<const float*>(part + i), down);
        }
    if (past) end_of_past();
}

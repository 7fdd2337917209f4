// Products of a tile of rows with vectors of columns: part of level.h.

// kRows rows of dwords, ``row_bytes`` apart, times ``vectors`` of columns, ``vector_bytes`` apart: done(row, vector, sum).
template <class Kind, int vectors, class Done>
INLINE void tile(const uint8_t* rows, int64_t row_bytes, const uint8_t* columns, int64_t vector_bytes, int64_t steps, const Done& done) {
    typename Kind::Sums sums[kRows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = typename Kind::Sums{};
    for (int64_t s = 0; s < steps; ++s) {
        Ints w[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) w[v] = load_ints(columns + v * vector_bytes + s * kBytes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Ints x = broadcast(rows + r * row_bytes + 4 * s);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[r][v] = Kind::multiplied(sums[r][v], x, w[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) done(r, v, Kind::value(sums[r][v]));
}

// run(number of vectors as a constant, first vector) over ``count`` vectors, in tiles of nearly one size.
template <class Run>
INLINE void in_tiles(int64_t count, const Run& run) {
    const int64_t tiles = (count + kVectors - 1) / kVectors;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = count * t / tiles, size = count * (t + 1) / tiles - first;
        if (size == 1) run(Constant<1>(), first);
        if (size == 2) run(Constant<2>(), first);
        if constexpr (kVectors >= 3)
            if (size == 3) run(Constant<3>(), first);
    }
}

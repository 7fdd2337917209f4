// Rows of Q, K and V as the tiles take them: part of level.h.

// How two operands lie in dwords, ``per`` values in each, and the sums of their products.
struct Real {
    typedef Floats Sums;
    static constexpr int per = 1;
    INLINE Floats multiplied(Floats sum, Ints x, Ints w) { return sum + (Floats)x * (Floats)w; }
    INLINE Floats value(Floats sum) { return sum; }
};

#ifdef AQUABIT_VNNI
struct Whole {  // 16 bits
    typedef Ints Sums;
    static constexpr int per = 2;
    INLINE Ints multiplied(Ints sum, Ints x, Ints w) { return dot(sum, x, w, true); }
    INLINE Floats value(Ints sum) { return to_floats(sum); }
};
typedef Whole Weighted;  // probabilities and values
#else
typedef Real Weighted;
#endif

// From the tensor's first value to row 0 of a head, in elements.
INLINE int64_t offset_of(const Attention& a, const int64_t* strides, int64_t head) {
    int64_t offset = 0;
    for (int64_t i = a.dimensions - 1; i >= 0; --i) {
        offset += head % a.sizes[i] * strides[i];
        head /= a.sizes[i];
    }
    return offset;
}

INLINE Rows of_head(const Attention& a, const Rows& rows, int64_t head) {
    Rows own = rows;
    own.data = static_cast<char*>(rows.data) + offset_of(a, rows.strides, head) * (rows.narrow ? 2 : 4);
    return own;
}

INLINE void* row_of(const Rows& rows, int64_t i) { return static_cast<char*>(rows.data) + i * rows.stride * (rows.narrow ? 2 : 4); }

// ``zeros`` becomes NaN where a value is not finite, or so large that sums of weighted ones might not be.
INLINE void note(Floats x, Floats* zeros) { *zeros += x * 1e8f * 0.0f; }

// A row times ``factor``, zeros beyond its end up to a whole vector.
INLINE void pack_row(const void* row, bool narrow, int64_t count, float factor, float* to, Floats* zeros) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats x = read(row, narrow, i, count);
        note(x, zeros);
        store(to + i, x * factor);
    }
}

// kLanes rows of ``count`` values, ``stride`` apart, to vectors of one value of each, [count, kLanes].
INLINE void interleave(const float* rows, int64_t stride, int64_t count, float* to) {
    for (int64_t at = 0; at < count; at += kLanes) {
        Floats v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(rows + i * stride + at);
        transpose(v);
        for (int i = 0; i < kLanes && at + i < count; ++i) store(to + (at + i) * kLanes, v[i]);
    }
}

// kLanes columns from ``column`` on of the keys [first, last): vectors of Weighted::per keys, ``steps`` of them, zeros beyond;
// what an integer stands for, and the sum of all that stands there.
INLINE void pack_columns(const Rows& v, int64_t first, int64_t last, int64_t column, int64_t count, [[maybe_unused]] int64_t steps, uint8_t* to,
                         float* scale, float* total, Floats* zeros) {
#ifdef AQUABIT_VNNI
    Floats most = {};
    for (int64_t key = first; key < last; ++key) {
        const Floats x = read(row_of(v, key), v.narrow, column, count);
        note(x, zeros);
        most = larger(most, larger(x, -x));
    }
    const Floats step = most * (1 / 32767.0f), inverse = most > 1e-30f ? 32767.0f / most : Floats{};
    Ints sum = {};
#ifdef AQUABIT_AMX
    for (int64_t s = 0; s < whole_tiles(last - first) / 4; ++s) {
        Ints upper = {}, lower = {};
        for (int64_t key = first + 4 * s, bits = 0; bits < 32 && key < last; ++key, bits += 8) {
            const Ints v16 = nearest(read(row_of(v, key), v.narrow, column, count) * inverse);
            sum += v16;
            upper |= (Ints)(((Words)v16 >> 8 & 255) << static_cast<uint32_t>(bits)), lower |= (Ints)(((Words)v16 & 255) << static_cast<uint32_t>(bits));
        }
        uint8_t* const here = to + s / 16 * 2 * kTileBytes + s % 16 * kBytes;
        store_ints(here, upper), store_ints(here + kTileBytes, lower);
    }
#else
    for (int64_t s = 0; s < steps; ++s) {
        const int64_t key = first + 2 * s;
        Ints one = {}, other = {};
        if (key < last) one = nearest(read(row_of(v, key), v.narrow, column, count) * inverse);
        if (key + 1 < last) other = nearest(read(row_of(v, key + 1), v.narrow, column, count) * inverse);
        sum += one + other;
        store_ints(to + s * kBytes, (one & 0xffff) | (Ints)((Words)other << 16));
    }
#endif
    store(scale, step);
    store(total, load(total) + to_floats(sum) * step);
#else
    Floats sum = {};
    for (int64_t s = 0; s < steps; ++s) {
        const int64_t key = first + s;
        const Floats x = key < last ? read(row_of(v, key), v.narrow, column, count) : Floats{};
        note(x, zeros);
        sum += x;
        store(reinterpret_cast<float*>(to) + s * kLanes, x);
    }
    store(scale, splat(1));
    store(total, load(total) + sum);
#endif
}

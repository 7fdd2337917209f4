// The inner loops of the table kernel for one instruction set: part of lut_level.h.

// Sums of the table rows that a run of bytes names, V <= 4 vectors of columns, which the optimizer keeps in registers: named, not an array.
// V is a constant where this is called, and so are width and stride where they can be.
#define AQUABIT_GATHER(STRUCT, NAME, TYPE, VECTOR)                                                                                    \
    struct STRUCT {                                                                                                                   \
        VECTOR a, b, c, d;                                                                                                            \
    };                                                                                                                                \
    INLINE void NAME##_one(const TYPE* row, STRUCT* s, const int V) {                                                                 \
        const int lanes = sizeof(VECTOR) / sizeof(TYPE);                                                                              \
        s->a = plus(s->a, load(row));                                                                                                            \
        if (V > 1) s->b = plus(s->b, load(row + lanes));                                                                                         \
        if (V > 2) s->c = plus(s->c, load(row + 2 * lanes));                                                                                     \
        if (V > 3) s->d = plus(s->d, load(row + 3 * lanes));                                                                                     \
    }                                                                                                                                 \
    INLINE STRUCT NAME(const TYPE* table, int64_t width, int64_t stride, const uint8_t* codes, int64_t bytes, STRUCT sum, const int V) { \
        STRUCT other = {};                                                                                                            \
        int64_t i = 0;                                                                                                                \
        for (; i + 4 <= bytes; i += 4, table += 4 * stride) {                                                                         \
            NAME##_one(table + codes[i] * width, &sum, V);                                                                            \
            NAME##_one(table + stride + codes[i + 1] * width, &other, V);                                                             \
            NAME##_one(table + 2 * stride + codes[i + 2] * width, &sum, V);                                                           \
            NAME##_one(table + 3 * stride + codes[i + 3] * width, &other, V);                                                         \
        }                                                                                                                             \
        for (; i < bytes; ++i, table += stride) NAME##_one(table + codes[i] * width, &sum, V);                                        \
        sum.a = plus(sum.a, other.a);                                                                                                             \
        if (V > 1) sum.b = plus(sum.b, other.b);                                                                                                  \
        if (V > 2) sum.c = plus(sum.c, other.c);                                                                                                  \
        if (V > 3) sum.d = plus(sum.d, other.d);                                                                                                  \
        return sum;                                                                                                                   \
    }
AQUABIT_GATHER(FourShorts, gather_shorts, int16_t, Shorts)
AQUABIT_GATHER(FourFloats, gather_floats, float, Floats)
#undef AQUABIT_GATHER

// sums (+)= part, at one vector of columns: plain, or with the factors of a group of scales.
struct Factors {
    const float *unit, *aux;
    float scale, offset;
    bool scaled;
};

INLINE void flush(Floats part, const Factors& f, int64_t q, float* sums, bool first) {
    if (f.scaled) part = part * f.scale + f.offset * load(f.aux + q);
    store(sums + q, first ? part : part + load(sums + q));
}

INLINE void flush(Shorts part, const Factors& f, int64_t q, float* sums, bool first) {
    Floats low, high;
    widened(part, &low, &high);
    flush(low * load(f.unit + q), f, q, sums, first);
    flush(high * load(f.unit + q + kLanes), f, q + kLanes, sums, first);
}

// One block of lookups for rows [from, to): of one run, without scales of groups, at a table of known size, which is the common case; and in
// general.
#define AQUABIT_ROWS(NAME, STRUCT, GATHER, TYPE, VECTOR)                                                                              \
    INLINE void NAME##_plain(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to, const int64_t table_rows, const int V) {\
        const int64_t bytes = c.bytes(b), lanes = sizeof(VECTOR) / sizeof(TYPE), row = c.row_bytes, width = V * lanes;                \
        const TYPE* const table = static_cast<const TYPE*>(t.table);                                                                  \
        const uint8_t* codes = c.codes + from * row + b.run->codes;                                                                   \
        float* sums = t.sums + (from - t.first_row) * width;                                                                          \
        const float* const stop = sums + (to - from) * width;                                                                         \
        const Factors f = {t.unit, t.unit, 1, 0, false};                                                                              \
        for (const bool first = t.first; sums < stop; codes += row, sums += width) {                                                  \
            __builtin_prefetch(codes + kAhead * row);                                                                                 \
            __builtin_prefetch(codes + kAhead * row + bytes - 1);                                                                     \
            const STRUCT found = GATHER(table, width, table_rows * width, codes, bytes, STRUCT{}, V);                                 \
            flush(found.a, f, 0, sums, first);                                                                                        \
            if (V > 1) flush(found.b, f, lanes, sums, first);                                                                         \
            if (V > 2) flush(found.c, f, 2 * lanes, sums, first);                                                                     \
            if (V > 3) flush(found.d, f, 3 * lanes, sums, first);                                                                     \
        }                                                                                                                             \
    }                                                                                                                                 \
    __attribute__((noinline)) static void NAME##_64(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to, int vectors) {\
        if (vectors == 1) return NAME##_plain(c, b, t, from, to, 64, 1);                                                              \
        if (vectors == 2) return NAME##_plain(c, b, t, from, to, 64, 2);                                                              \
        NAME##_plain(c, b, t, from, to, 64, 4);                                                                                       \
    }                                                                                                                                 \
    __attribute__((noinline)) static void NAME##_256(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to, int vectors) {\
        if (vectors == 1) return NAME##_plain(c, b, t, from, to, 256, 1);                                                             \
        if (vectors == 2) return NAME##_plain(c, b, t, from, to, 256, 2);                                                             \
        NAME##_plain(c, b, t, from, to, 256, 4);                                                                                      \
    }                                                                                                                                 \
    /* V vectors of columns of one row, over all runs of the block. */                                                                                      \
    INLINE void NAME##_chunk(const Call& c, const Block& b, const Tile& t, const TYPE* const* tables, int64_t o, int64_t q, const int64_t bytes, const int V) {\
        const int64_t width = t.table_width, stride = c.table_rows() * width, lanes = sizeof(VECTOR) / sizeof(TYPE);                                        \
        const bool scaled = c.scale_groups > 1;                                                                                                             \
        const uint8_t* codes = c.codes + o * c.row_bytes;                                                                                                   \
        float* sums = t.sums + (o - t.first_row) * t.width;                                                                                                 \
        bool first = t.first;                                                                                                                               \
        STRUCT found = {};                                                                                                                                  \
        for (int64_t r = 0; r < b.runs; ++r) {                                                                                                              \
            const TYPE* table = tables[r] + q;                                                                                                              \
            const uint8_t* own = codes + b.run[r].codes;                                                                                                    \
            for (int64_t i = 0; i < bytes; ++i, table += stride) GATHER##_one(table + own[i] * width, &found, V);                                           \
            if (!scaled && r + 1 < b.runs) continue;                                                                                                        \
            const int64_t n = o * c.scale_groups + b.run[r].scales;                                                                                         \
            const Factors f = {t.unit, scaled ? t.aux_block + r * t.width : t.unit, scaled ? c.scale[n] : 1, scaled ? c.aux_scale[n] : 0, scaled};          \
            flush(found.a, f, q, sums, first);                                                                                                              \
            if (V > 1) flush(found.b, f, q + lanes, sums, first);                                                                                           \
            if (V > 2) flush(found.c, f, q + 2 * lanes, sums, first);                                                                                       \
            if (V > 3) flush(found.d, f, q + 3 * lanes, sums, first);                                                                                       \
            first = false;                                                                                                                                  \
            found = STRUCT{};                                                                                                                               \
        }                                                                                                                                                   \
    }                                                                                                                                                       \
    INLINE void NAME##_chunks(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to, const int64_t bytes) {                                \
        const TYPE* tables[kTaps];                                                                                                                          \
        for (int64_t r = 0; r < b.runs; ++r) tables[r] = static_cast<const TYPE*>(t.table) + t.offsets[b.run[r].tap];                                       \
        const int64_t lanes = sizeof(VECTOR) / sizeof(TYPE);                                                                                                \
        for (int64_t o = from; o < to; ++o) {                                                                                                               \
            for (int64_t r = 0; r < b.runs; ++r) __builtin_prefetch(c.codes + (o + 2) * c.row_bytes + b.run[r].codes);                                      \
            for (int64_t q = 0, left = t.width / lanes; left > 0;) {                                                                                        \
                const int V = left > 5 || left == 4 ? 4 : left < 3 ? static_cast<int>(left) : 3;                                                            \
                if (V == 4) NAME##_chunk(c, b, t, tables, o, q, bytes, 4);                                                                                  \
                if (V == 3) NAME##_chunk(c, b, t, tables, o, q, bytes, 3);                                                                                  \
                if (V == 2) NAME##_chunk(c, b, t, tables, o, q, bytes, 2);                                                                                  \
                if (V == 1) NAME##_chunk(c, b, t, tables, o, q, bytes, 1);                                                                                  \
                left -= V;                                                                                                                                  \
                q += V * lanes;                                                                                                                             \
            }                                                                                                                                               \
        }                                                                                                                                                   \
    }                                                                                                                                                       \
    static void NAME(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to) {                                                              \
        const int64_t vectors = t.width * sizeof(TYPE) / sizeof(VECTOR), bytes = c.bytes(b);                                                                \
        if (b.runs == 1 && c.scale_groups == 1 && t.table_width == t.width && (vectors < 3 || vectors == 4)) {                                              \
            if (c.table_rows() == 64) return NAME##_64(c, b, t, from, to, static_cast<int>(vectors));                                                       \
            if (c.table_rows() == 256) return NAME##_256(c, b, t, from, to, static_cast<int>(vectors));                                                     \
        }                                                                                                                                                   \
        if (bytes == 1) return NAME##_chunks(c, b, t, from, to, 1);                                                                                         \
        if (bytes == 2) return NAME##_chunks(c, b, t, from, to, 2);                                                                                         \
        if (bytes == 4) return NAME##_chunks(c, b, t, from, to, 4);                                                                                         \
        NAME##_chunks(c, b, t, from, to, bytes);                                                                                                            \
    }
AQUABIT_ROWS(rows_shorts, FourShorts, gather_shorts, int16_t, Shorts)
AQUABIT_ROWS(rows_floats, FourFloats, gather_floats, float, Floats)
#undef AQUABIT_ROWS

static void gather_rows(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to) {
    return c.exact ? rows_floats(c, b, t, from, to) : rows_shorts(c, b, t, from, to);
}

// The inner loops of the table kernel for one instruction set: part of level.h. T is the type of the table's entries.

// Up to four vectors of columns, named and not an array, so that the optimizer keeps them in registers.
template <class T>
struct Four {
    Vector<T> a, b, c, d;
};

template <int vectors, class T>
INLINE void add_row(const T* row, Four<T>* sum) {
    constexpr int lanes = kLanesOf<T>;
    sum->a = plus(sum->a, load(row));
    if (vectors > 1) sum->b = plus(sum->b, load(row + lanes));
    if (vectors > 2) sum->c = plus(sum->c, load(row + 2 * lanes));
    if (vectors > 3) sum->d = plus(sum->d, load(row + 3 * lanes));
}

// Sums of the table rows that a run of bytes names; ``width`` and ``stride`` are constants where they can be.
template <int vectors, class T>
INLINE Four<T> gather(const T* table, int64_t width, int64_t stride, const uint8_t* codes, int64_t bytes) {
    Four<T> sum = {}, other = {};
    int64_t i = 0;
    for (; i + 4 <= bytes; i += 4, table += 4 * stride) {
        add_row<vectors>(table + codes[i] * width, &sum);
        add_row<vectors>(table + stride + codes[i + 1] * width, &other);
        add_row<vectors>(table + 2 * stride + codes[i + 2] * width, &sum);
        add_row<vectors>(table + 3 * stride + codes[i + 3] * width, &other);
    }
    for (; i < bytes; ++i, table += stride) add_row<vectors>(table + codes[i] * width, &sum);
    sum.a = plus(sum.a, other.a);
    if (vectors > 1) sum.b = plus(sum.b, other.b);
    if (vectors > 2) sum.c = plus(sum.c, other.c);
    if (vectors > 3) sum.d = plus(sum.d, other.d);
    return sum;
}

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
    to_floats(part, &low, &high);
    flush(low * load(f.unit + q), f, q, sums, first);
    flush(high * load(f.unit + q + kLanes), f, q + kLanes, sums, first);
}

template <int vectors, class T>
INLINE void flush_all(const Four<T>& part, const Factors& f, int64_t q, float* sums, bool first) {
    constexpr int lanes = kLanesOf<T>;
    flush(part.a, f, q, sums, first);
    if (vectors > 1) flush(part.b, f, q + lanes, sums, first);
    if (vectors > 2) flush(part.c, f, q + 2 * lanes, sums, first);
    if (vectors > 3) flush(part.d, f, q + 3 * lanes, sums, first);
}

// One block of lookups for rows [from, to) in the common case: one run, no scales of groups, a table of known size.
template <class T, int64_t table_rows, int vectors>
INLINE void plain_rows(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to) {
    constexpr int64_t width = vectors * kLanesOf<T>;
    const int64_t bytes = c.bytes(b), row = c.row_bytes;
    const T* const table = static_cast<const T*>(t.table);
    const uint8_t* codes = c.codes + from * row + b.run->codes;
    float* sums = t.sums + (from - t.first_row) * width;
    const float* const stop = sums + (to - from) * width;
    const Factors f = {t.unit, t.unit, 1, 0, false};
    for (const bool first = t.first; sums < stop; codes += row, sums += width) {
        __builtin_prefetch(codes + kAhead * row);
        __builtin_prefetch(codes + kAhead * row + bytes - 1);
        flush_all<vectors>(gather<vectors>(table, width, table_rows * width, codes, bytes), f, 0, sums, first);
    }
}

template <class T, int64_t table_rows>
__attribute__((noinline)) static void plain_rows_of(const Call& c, const Block& b, const Tile& t, int64_t from,
                                                    int64_t to, int vectors) {
    if (vectors == 1) return plain_rows<T, table_rows, 1>(c, b, t, from, to);
    if (vectors == 2) return plain_rows<T, table_rows, 2>(c, b, t, from, to);
    plain_rows<T, table_rows, 4>(c, b, t, from, to);
}

// In general: one row at some vectors of columns, over all runs of the block.
template <int vectors, class T>
INLINE void add_runs(const Call& c, const Block& b, const Tile& t, const T* const* tables, int64_t o, int64_t q,
                     const int64_t bytes) {
    const int64_t width = t.table_width, stride = c.table_rows() * width;
    const bool scaled = c.scale_groups > 1;
    const uint8_t* codes = c.codes + o * c.row_bytes;
    float* sums = t.sums + (o - t.first_row) * t.width;
    bool first = t.first;
    Four<T> found = {};
    for (int64_t r = 0; r < b.runs; ++r) {
        const T* table = tables[r] + q;
        const uint8_t* own = codes + b.run[r].codes;
        for (int64_t i = 0; i < bytes; ++i, table += stride) add_row<vectors>(table + own[i] * width, &found);
        if (!scaled && r + 1 < b.runs) continue;
        const int64_t n = o * c.scale_groups + b.run[r].scales;
        const Factors f = {t.unit, scaled ? t.aux_block + r * t.width : t.unit, scaled ? c.scale[n] : 1,
                           scaled ? c.aux_scale[n] : 0, scaled};
        flush_all<vectors>(found, f, q, sums, first);
        first = false;
        found = Four<T>{};
    }
}

template <class T>
INLINE void general_rows(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to, const int64_t bytes) {
    const T* tables[kTaps];
    for (int64_t r = 0; r < b.runs; ++r) tables[r] = static_cast<const T*>(t.table) + t.offsets[b.run[r].tap];
    constexpr int64_t lanes = kLanesOf<T>;
    for (int64_t o = from; o < to; ++o) {
        for (int64_t r = 0; r < b.runs; ++r)
            __builtin_prefetch(c.codes + (o + 2) * c.row_bytes + b.run[r].codes);
        for (int64_t q = 0, left = t.width / lanes; left > 0;) {
            const int vectors = left > 5 || left == 4 ? 4 : left < 3 ? static_cast<int>(left) : 3;
            if (vectors == 4) add_runs<4>(c, b, t, tables, o, q, bytes);
            if (vectors == 3) add_runs<3>(c, b, t, tables, o, q, bytes);
            if (vectors == 2) add_runs<2>(c, b, t, tables, o, q, bytes);
            if (vectors == 1) add_runs<1>(c, b, t, tables, o, q, bytes);
            left -= vectors;
            q += vectors * lanes;
        }
    }
}

template <class T>
static void gather_rows_of(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to) {
    const int64_t vectors = t.width / kLanesOf<T>, bytes = c.bytes(b);
    if (b.runs == 1 && c.scale_groups == 1 && t.table_width == t.width && (vectors < 3 || vectors == 4)) {
        if (c.table_rows() == 64) return plain_rows_of<T, 64>(c, b, t, from, to, static_cast<int>(vectors));
        if (c.table_rows() == 256) return plain_rows_of<T, 256>(c, b, t, from, to, static_cast<int>(vectors));
    }
    if (bytes == 1) return general_rows<T>(c, b, t, from, to, 1);
    if (bytes == 2) return general_rows<T>(c, b, t, from, to, 2);
    if (bytes == 4) return general_rows<T>(c, b, t, from, to, 4);
    general_rows<T>(c, b, t, from, to, bytes);
}

static void gather_rows(const Call& c, const Block& b, const Tile& t, int64_t from, int64_t to) {
    return c.exact ? gather_rows_of<float>(c, b, t, from, to) : gather_rows_of<int16_t>(c, b, t, from, to);
}

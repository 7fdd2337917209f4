// Rows of codes to rows of integers or floats: part of level.h.

// One vector of codes: ``fused`` of each byte, the first in the lowest bits.
INLINE Bytes spread(const uint8_t* from, int64_t bits, int64_t fused, Bytes mask) {
    if (fused == 1) return load(from) & mask;
    if (fused == 2) {
        const UnsignedShorts wide = __builtin_convertvector(load_half(from), UnsignedShorts);
        return (Bytes)(wide | (wide << (8 - bits))) & mask;
    }
    const Words wide = load_widened(from);
    return (Bytes)(wide | (wide << 6) | (wide << 12) | (wide << 18)) & mask;
}

// ``count`` scalar codes, or what ``levels`` (null, or 16 bytes) has for them, times ``step`` (1 or 2) less ``center``; nothing beyond them
// is read or written.
INLINE void expand(const uint8_t* from, int64_t count, int64_t bits, const int64_t fused, const uint8_t* levels, int64_t step,
                   int64_t center, int8_t* to) {
    const int64_t mask = (1 << bits) - 1;
    if (fused < 8) {
        const Bytes masks = splat_byte(static_cast<uint8_t>(mask)), centers = splat_byte(static_cast<uint8_t>(center));
        const Bytes again = splat_byte(step == 2 ? 255 : 0), table = levels ? repeat_sixteen(levels) : Bytes{};
        for (; count >= kBytes; count -= kBytes, from += kBytes / fused, to += kBytes) {
            Bytes codes = spread(from, bits, fused, masks);
            if (levels) codes = look_up(table, codes);
            store(to, codes + (codes & again) - centers);
        }
        if (count > 0) {
            uint8_t last[kBytes];
            store(reinterpret_cast<int8_t*>(last), load_some(from, (count + fused - 1) / fused));
            Bytes codes = spread(last, bits, fused, masks);
            if (levels) codes = look_up(table, codes);
            return store_some(to, codes + (codes & again) - centers, count);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t code = (from[i / fused] >> (i % fused * bits)) & mask;
        to[i] = static_cast<int8_t>((levels ? levels[code] : code) * step - center);
    }
}

// Row ``row`` of scalar codes.
INLINE void expand_row(const Weight& w, int64_t row, const uint8_t* levels, int64_t step, int64_t center, int8_t* to) {
    for (const Segment* s = w.stretches; s < w.stretches + w.stretch_count; ++s) {
        const int64_t count = s->count;
        const uint8_t* from = w.codes + row * w.row_bytes + s->at;
        int8_t* here = to + s->tap * w.cin + s->start;
        if (w.fused == 1)
            expand(from, count, w.bits, 1, levels, step, center, here);
        else if (w.fused == 2)
            expand(from, count, w.bits, 2, levels, step, center, here);
        else if (w.fused == 4)
            expand(from, count, w.bits, 4, levels, step, center, here);
        else
            expand(from, count, w.bits, 8, levels, step, center, here);
    }
}

INLINE float scale_at(const Weight& w, int64_t row, int64_t n) { return w.scale[row * w.scales + (w.scales > 1 ? n : 0)]; }
INLINE float offset_at(const Weight& w, int64_t row, int64_t n) {
    return w.offset ? w.offset[row * w.offsets + (w.offsets > 1 ? n : 0)] : 0;
}

// What is added to a weight besides its integer.
INLINE double shifted_at(const Weight& w, int64_t row, int64_t n) {
    return w.integers.centred ? 0 : offset_at(w, row, n) + double(scale_at(w, row, n)) * w.integers.middle;
}

// Row ``row`` as the integers of its codes.
INLINE void expand_integers(const Weight& w, int64_t row, int8_t* to) {
    const Integers& n = w.integers;
    if (n.levels)
        expand_row(w, row, n.levels, n.step, n.center, to);
    else
        expand_row(w, row, nullptr, n.step, n.center, to);
}

INLINE int64_t sum_of(const int8_t* x, int64_t n) {
    int64_t i = 0;
#if AQUABIT_LEVEL >= 3
    Ints sums = {};
    for (; i + kBytes <= n; i += kBytes) sums = dot(sums, splat_int(0x01010101), load_ints(x + i), false);
#if AQUABIT_LEVEL == 4
    if (i < n) sums = dot(sums, splat_int(0x01010101), (Ints)_mm512_maskz_loadu_epi8((uint64_t(1) << (n - i)) - 1, x + i), false);
    return total_of(sums);
#endif
    int64_t total = total_of(sums);
#else
    int64_t total = 0;
#endif
    for (; i < n; ++i) total += x[i];
    return total;
}

// Sums of ``runs`` runs of ``inputs`` integers each, a multiple of 4 and a power of two; ``sums`` has room for those of each 4.
INLINE void sum_runs(const int8_t* x, int64_t runs, int64_t inputs, int32_t* sums) {
    int64_t count = runs * (inputs / 4), i = 0;
#if AQUABIT_LEVEL >= 3
    for (; i + kLanes <= count; i += kLanes) store_ints(sums + i, dot(Ints{}, splat_int(0x01010101), load_ints(x + 4 * i), false));
#endif
    for (; i < count; ++i) sums[i] = x[4 * i] + x[4 * i + 1] + x[4 * i + 2] + x[4 * i + 3];
    for (; count > runs; count /= 2) {
        i = 0;
        const Ints even = 2 * lane_numbers(), odd = even + 1;
        for (; i + kLanes <= count / 2; i += kLanes) {
            const Ints low = load_ints(sums + 2 * i), high = load_ints(sums + 2 * i + kLanes);
            store_ints(sums + i, shuffled(low, high, even) + shuffled(low, high, odd));
        }
        for (; i < count / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
    }
}

// What the products of ``runs`` runs start from, of the sums of their integers: kStart.
INLINE void start_runs(const int32_t* sums, int64_t runs, int32_t middle, bool apart, float* starts) {
    for (int64_t i = 0; i < runs; i += kLanes) {
        const Ints sum = (Ints)load_some(reinterpret_cast<const float*>(sums + i), runs - i);
        const Ints high = (64 - sum) >> 7, low = -sum - (high << 7);
        const Ints start = apart ? (high << 16) | (low & 0xffff) : sum * -middle;
        if (runs - i >= kLanes)
            store_ints(starts + i, start);
        else
            __builtin_memcpy(starts + i, &start, (runs - i) * sizeof(float));
    }
}

// Row ``row`` of codes as integers into its slot, as bytes or (``wide``) 16 bits. ``sums`` has room for a quarter of the row, or for
// the runs.
static void fill_codes(const Weight& w, const Plan& plan, const Activations& a, bool wide, int64_t row, int8_t* room, int32_t* sums,
                       uint8_t* slot, float* known, float* total, float* whole, int64_t stride) {
    const bool straight = plan.straight && !wide;
    if (straight) room = reinterpret_cast<int8_t*>(slot);
    expand_integers(w, row, room);
    if (straight && plan.even) {
        sum_runs(room, plan.run_count, plan.even, sums);
    } else {
        if (!straight) __builtin_memset(slot, 0, plan.slot_bytes);
        for (int64_t i = 0; i < plan.run_count; ++i) {
            int64_t sum = 0;
            for (const Piece* p = plan.pieces + plan.runs[i].first; p < plan.pieces + plan.runs[i].last; ++p) {
                const int8_t* from = room + p->from;
                if (wide) {
                    int16_t* to = reinterpret_cast<int16_t*>(slot + p->slot) + p->lead;
                    for (int64_t k = 0; k < p->count; ++k) to[k] = from[k];
                } else if (!straight) {
                    __builtin_memcpy(slot + p->slot + p->lead, from, p->count);
                }
                sum += sum_of(from, p->count);
            }
            sums[i] = static_cast<int32_t>(sum);
        }
    }
    float *factor = known + kFactor * plan.run_count, *offset = known + kOffset * plan.run_count;
    for (int64_t i = 0; i < plan.run_count; ++i) factor[i] = scale_at(w, row, plan.runs[i].scales);
    if (!w.integers.centred)
        for (int64_t i = 0; i < plan.run_count; ++i) offset[i] = offset_at(w, row, plan.runs[i].scales);
    for (int64_t r = 0; r < plan.range_count; ++r) {
        const Range& range = plan.ranges[r];
        start_runs(sums + range.first, range.last - range.first, static_cast<int32_t>(a.middle[range.number]), a.apart,
                   known + kStart * plan.run_count + range.first);
        double own = 0, all = 0;
        if (!w.integers.centred)
            for (int64_t i = range.first; i < range.last; ++i) {
                const double shifted = offset[i] + double(factor[i]) * w.integers.middle;
                offset[i] = static_cast<float>(shifted);
                all += shifted * plan.runs[i].inputs;
            }
#pragma omp simd reduction(+ : own)
        for (int64_t i = range.first; i < range.last; ++i) {
            factor[i] *= w.integers.unit;
            own += double(factor[i]) * sums[i];
        }
        total[r * stride] = static_cast<float>(own + all);
        whole[r * stride] = static_cast<float>(own);
    }
}

// ---- Rows of floats

INLINE void look_up_codes(const float* table, const uint8_t* codes, int64_t count, int64_t bits, float* to) {
    int64_t i = 0;
#if AQUABIT_LEVEL == 4
    if (bits <= 6) {  // tables that four registers hold; gathers cost more than loads one by one
        const int64_t size = int64_t(1) << bits;
        Floats part[4];
        for (int64_t v = 0; v < 4; ++v) {
            const __mmask16 mask = 16 * v + 16 <= size ? 0xffff : v ? 0 : (1 << size) - 1;
            part[v] = (Floats)_mm512_maskz_loadu_ps(mask, table + (mask ? 16 * v : 0));
        }
        for (; i + 16 <= count; i += 16) {
            const __m512i index = (__m512i)load_widened(codes + i);
            __m512 found = _mm512_permutex2var_ps((__m512)part[0], index, (__m512)part[1]);
            if (bits == 6) {
                const __m512 other = _mm512_permutex2var_ps((__m512)part[2], index, (__m512)part[3]);
                found = _mm512_mask_mov_ps(found, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), other);
            }
            _mm512_storeu_ps(to + i, found);
        }
    }
#endif
    for (; i < count; ++i) to[i] = table[codes[i]];
}

// What codes of float8 e4m3fn stand for, those of no number 0: their bits, moved to where float32 has them.
INLINE Floats floats8(Ints codes) {
    const Ints size = codes & 127, bits = (size << 20) + (120 << 23);  // 2^(e - 7) (1 + m / 8), and so for e = 0
    const Floats small = ((Floats)bits - 0x1p-7f) * 2.0f;               // which is m / 8 2^-6
    const Ints below = size < 8, none = size == 127;
    const Ints found = ((below & (Ints)small) | (~below & bits)) & ~none;
    return (Floats)(found | ((codes & 128) << 24));
}

// Adds up codewords of one segment's groups, [groups, g]; sizes that are constants where it is inlined make it fast. Codes that are
// out of range are cut, and never read beyond the tables.
INLINE void add_codewords_of(const float* table, const uint8_t* from, int64_t groups, const int64_t g, const int64_t books,
                             const bool nibbles, int64_t codewords, float* to) {
    const uint32_t mask = static_cast<uint32_t>(codewords - 1);
    const int64_t size = codewords * g;
    for (int64_t j = 0; j < groups; ++j, to += g) {
        for (int64_t m = 0; m < books; ++m) {
            const int64_t i = j * books + m;
            const uint32_t code = (nibbles ? from[i / 2] >> (i % 2 * 4) & 15 : from[i]) & mask;
            const float* next = table + m * size + code * g;
            for (int64_t k = 0; k < g; ++k) to[k] = m ? to[k] + next[k] : next[k];
        }
    }
}

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

// The same for groups of 8 times ``vectors``.
INLINE void add_eights(const float* table, const uint8_t* from, int64_t groups, const int vectors, const int64_t books, const bool nibbles,
                       int64_t codewords, float* to) {
    const uint32_t mask = static_cast<uint32_t>(codewords - 1);
    const int64_t g = 8 * vectors, size = codewords * g;
    for (int64_t j = 0; j < groups; ++j, to += g) {
        Eight sum[2];
#pragma GCC unroll 8
        for (int64_t m = 0; m < books; ++m) {
            const int64_t i = j * books + m;
            const uint32_t code = (nibbles ? from[i / 2] >> (i % 2 * 4) & 15 : from[i]) & mask;
            const float* next = table + m * size + code * g;
            for (int v = 0; v < vectors; ++v) {
                const Eight part = *reinterpret_cast<const Eight*>(next + 8 * v);
                sum[v] = m ? sum[v] + part : part;
            }
        }
        for (int v = 0; v < vectors; ++v) *reinterpret_cast<Eight*>(to + 8 * v) = sum[v];
    }
}

INLINE void add_eights_of(const Weight& w, const float* table, const uint8_t* from, int64_t groups, const int vectors,
                          const int64_t books, float* to) {
    return w.bits <= 4 ? add_eights(table, from, groups, vectors, books, true, w.codewords, to)
                       : add_eights(table, from, groups, vectors, books, false, w.codewords, to);
}

// Numbers of codebooks that are constants where add_eights is inlined make it fast.
INLINE void add_eights_of(const Weight& w, const float* table, const uint8_t* from, int64_t groups, const int vectors,
                          float* to) {
    if (w.books == 1) return add_eights_of(w, table, from, groups, vectors, 1, to);
    if (w.books == 2) return add_eights_of(w, table, from, groups, vectors, 2, to);
    if (w.books == 3) return add_eights_of(w, table, from, groups, vectors, 3, to);
    if (w.books == 4) return add_eights_of(w, table, from, groups, vectors, 4, to);
    add_eights(table, from, groups, vectors, w.books, w.bits <= 4, w.codewords, to);
}

static void add_codewords(const Weight& w, const float* table, const uint8_t* from, int64_t groups, float* to) {
    const bool nibbles = w.bits <= 4;
    if (w.group == 8)
        add_eights_of(w, table, from, groups, 1, to);
    else if (w.group == 16)
        add_eights_of(w, table, from, groups, 2, to);
    else if (w.group == 4)
        add_codewords_of(table, from, groups, 4, w.books, nibbles, w.codewords, to);
    else
        add_codewords_of(table, from, groups, w.group, w.books, nibbles, w.codewords, to);
}

// Kernel slices of one channel each, to [area, cin].
INLINE void add_slices(const Weight& w, const float* table, const uint8_t* from, float* to) {
    const uint32_t mask = static_cast<uint32_t>(w.codewords - 1);
    for (int64_t c = 0; c < w.cin; ++c)
        for (int64_t m = 0; m < w.books; ++m) {
            const int64_t i = c * w.books + m;
            const uint32_t code = (w.bits <= 4 ? from[i / 2] >> (i % 2 * 4) & 15 : from[i]) & mask;
            const float* next = table + (m * w.codewords + code) * w.group;
            for (int64_t k = 0; k < w.area; ++k) to[k * w.cin + c] = m ? to[k * w.cin + c] + next[k] : next[k];
        }
}

// Row ``row`` of the weight, float32, [area, cin]; the codes of scalar formats are kept behind its end while they are looked up.
static void decode_row(const Weight& w, int64_t row, float* room) {
    const float* table = w.tables ? w.tables + (w.table_sets > 1 ? row : 0) * w.books * w.codewords * w.group : nullptr;
    const bool scalar = w.group == 1 && w.books == 1 && !w.kernel_order;
    uint8_t* codes = reinterpret_cast<uint8_t*>(room + w.length());
    if (scalar) expand_row(w, row, nullptr, 1, 0, reinterpret_cast<int8_t*>(codes));
    for (const Segment* s = w.segments; s < w.segments + w.segment_count; ++s) {
        const int64_t at = w.kernel_order ? 0 : s->tap * w.cin + s->start, count = w.kernel_order ? w.length() : s->count;
        float* here = room + at;
        if (w.kernel_order)
            add_slices(w, table, w.codes + row * w.row_bytes + s->at, here);
        else if (!scalar)
            add_codewords(w, table, w.codes + row * w.row_bytes + s->at, count / w.group, here);
        else if (table && !w.floats8)
            look_up_codes(table, codes + at, count, w.bits, here);
        const Floats scale = splat(scale_at(w, row, s->scales)), offset = splat(offset_at(w, row, s->scales));
        int64_t i = 0;
        if (scalar && !table) {
            for (; i + kLanes <= count; i += kLanes) store(here + i, to_floats((Ints)load_widened(codes + at + i)) * scale + offset);
            for (; i < count; ++i) here[i] = codes[at + i] * scale[0] + offset[0];
        } else if (w.floats8) {
            for (; i + kLanes <= count; i += kLanes) store(here + i, floats8((Ints)load_widened(codes + at + i)) * scale + offset);
            for (; i < count; ++i) here[i] = table[codes[at + i]] * scale[0] + offset[0];
        }
        for (; i + kLanes <= count; i += kLanes) store(here + i, load(here + i) * scale + offset);
        for (; i < count; ++i) here[i] = here[i] * scale[0] + offset[0];
    }
}

// Sum of the squares of a run's weights.
INLINE float squares_of(const Plan& plan, const Run& run, const float* row) {
    Floats sum = {}, other = {};
    for (const Piece* p = plan.pieces + run.first; p < plan.pieces + run.last; ++p) {
        const float* from = row + p->from;
        int64_t i = 0;
        for (; i + 2 * kLanes <= p->count; i += 2 * kLanes) {
            const Floats x = load(from + i), y = load(from + i + kLanes);
            sum += x * x;
            other += y * y;
        }
        for (; i < p->count; i += kLanes) {
            const Floats x = load_some(from + i, p->count - i);
            sum += x * x;
        }
    }
    return total_of(sum + other);
}

INLINE bool zeros(const Plan& plan, const Run& run, const float* row) {
    for (const Piece* p = plan.pieces + run.first; p < plan.pieces + run.last; ++p)
        for (int64_t i = 0; i < p->count; ++i)
            if (row[p->from + i] != 0) return false;
    return true;
}

// What rounding a run's weights adds up to, in units of its scale.
struct Rounded {
    Floats error;
    Ints sum;
};

// ``count`` weights rounded to 16 bits.
INLINE void round_to(const float* from, int64_t count, float inverse, int16_t* to, Rounded* rounded) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats x = load_some(from + i, count - i) * inverse;
        const Ints q = nearest(x);
        const Floats lost = x - to_floats(q);
        rounded->error += lost * lost;
        rounded->sum += q;
        if (count - i >= kLanes)
            store_narrowed(to + i, q);
        else
            for (int64_t lane = 0; lane < count - i; ++lane) to[i + lane] = static_cast<int16_t>(q[lane]);
    }
}

// Row ``row`` of any weight as 16-bit integers, each run at the scale at which it cannot overflow with activations of up to ``most``: the
// sum of n weights' sizes is at most sqrt(n) times the root of their squares, and none is larger than that root.
static void fill_values(const Weight& w, const Plan& plan, int64_t most, int64_t row, float* room, uint8_t* slot, float* known,
                        float* total, int64_t stride, Errors* errors) {
    decode_row(w, row, room);
    __builtin_memset(slot, 0, plan.slot_bytes);
    for (int64_t i = 0; i < plan.run_count; ++i) {
        const Run& run = plan.runs[i];
        const float inputs = static_cast<float>(run.inputs), left = 2147480000.0f / most - inputs;  // what rounding may add
        const float by_sum = __builtin_sqrtf(inputs) / left, by = by_sum > 1 / 32766.0f ? by_sum : 1 / 32766.0f;
        const float squares = squares_of(plan, run, room);
        known[kFactor * plan.run_count + i] = __builtin_sqrtf(squares) * (1.0001f * by);
        errors->all += squares;
    }
    Floats error = {};
    for (int64_t r = 0; r < plan.range_count; ++r) {
        Floats all = {};
        for (int64_t i = plan.ranges[r].first; i < plan.ranges[r].last; ++i) {
            const Run& run = plan.runs[i];
            const float scale = known[kFactor * plan.run_count + i];
            if (!(scale > 1e-18f && scale < 1e18f)) {  // their squares are no numbers: zeros, or not for integers
                if (!zeros(plan, run, room)) errors->error = __builtin_inf();
                continue;
            }
            Rounded rounded = {};
            for (const Piece* p = plan.pieces + run.first; p < plan.pieces + run.last; ++p)
                round_to(room + p->from, p->count, 1 / scale, reinterpret_cast<int16_t*>(slot + p->slot) + p->lead, &rounded);
            error += rounded.error * (scale * scale);
            all += to_floats(rounded.sum) * scale;
        }
        total[r * stride] = total_of(all);
    }
    errors->error += total_of(error);
}

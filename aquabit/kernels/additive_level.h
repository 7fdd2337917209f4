// The additive quantizer's code search for one instruction set; included by additive.cpp once per level, inside a namespace and under a
// target pragma of its own, with kLanes (floats of a vector) and AQUABIT_LEVEL (4: AVX-512, 3: AVX2, 2: SSE2, 0: others). No library
// code and no templates in here: what the linker shares between levels must not be compiled for one of them.
//
// Minimised over the codes k_1..k_M of a group: c metric c^T - 2 c pull^T with c the sum of its codewords. Expanded, that is
//     sum_m own_m[k_m] - 2 c_m . pull   +   sum_{j<m} 2 c_j metric c_m^T :
// scores that depend on the row, and pairs that do not and are computed once for all rows. Every vector of codewords is padded to
// whole vectors with own = infinity, and what is infinite is never picked.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
INLINE void store(float* x, Floats v) { *reinterpret_cast<Unaligned*>(x) = v; }
INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

INLINE Ints lane_numbers() {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes;
}

// Bit i: a[i] <= b[i].
INLINE uint32_t at_most(Floats a, Floats b) {
#if AQUABIT_LEVEL == 4
    return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
#elif AQUABIT_LEVEL == 3
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ));
#elif AQUABIT_LEVEL == 2
    return _mm_movemask_ps(_mm_cmple_ps(a, b));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] <= b[i]) << i;
    return bits;
#endif
}

INLINE float least(Floats v) {
#if AQUABIT_LEVEL == 4
    return _mm512_reduce_min_ps(v);
#else
    float low = v[0];
    for (int i = 1; i < kLanes; ++i) low = v[i] < low ? v[i] : low;
    return low;
#endif
}

INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Codewords of one set of tables [M, K, size], padded and transposed.
static void arrange(const Block& b, const float* tables, float* codewords, float* by_size) {
    const int64_t k = b.codewords, wide = padded(k), g = b.size, tall = padded(g), stride = b.codebooks * wide;
    for (int64_t m = 0; m < b.codebooks; ++m)
        for (int64_t c = 0; c < k; ++c)
            for (int64_t i = 0; i < g; ++i) {
                const float value = tables[(m * k + c) * g + i];
                codewords[(m * k + c) * tall + i] = value;
                by_size[i * stride + m * wide + c] = value;
            }
}

// Columns [from, to) of images and own, in vectors.
static void project(const Block& b, const float* metric, const float* by_size, float* images, float* own, int64_t from, int64_t to) {
    const int64_t wide = padded(b.codewords), g = b.size, stride = b.codebooks * wide;
    for (int64_t v = from; v < to; ++v) {
        const int64_t at = v * kLanes;
        Floats sum = splat(0);
        for (int64_t i = 0; i < g; ++i) {
            Floats image = splat(0);
            for (int64_t j = 0; j < g; ++j) image += metric[j * g + i] * load(by_size + j * stride + at);
            store(images + i * stride + at, image);
            sum += image * load(by_size + i * stride + at);
        }
        for (int64_t lane = 0; lane < kLanes; ++lane)
            if ((at + lane) % wide >= b.codewords) sum[lane] = kInfinity;
        store(own + at, sum);
    }
}

// Rows [from, to) of the pairs: row (m (m - 1) / 2 + j) K + k is codeword k of codebook j with all of codebook m.
static void pair_up(const Block& b, const Group& group, float* pairs, int64_t from, int64_t to) {
    const int64_t k = b.codewords, wide = padded(k), g = b.size, tall = padded(g), stride = b.codebooks * wide;
    for (int64_t row = from; row < to; ++row) {
        int64_t j = row / k, m = 1;
        for (; j >= m; ++m) j -= m;
        const float* codeword = group.codewords + (j * k + row % k) * tall;
        const float* images = group.images + m * wide;
        for (int64_t at = 0; at < wide; at += kLanes) {
            Floats sum = splat(0);
            for (int64_t i = 0; i < g; ++i) sum += (2 * codeword[i]) * load(images + i * stride + at);
            store(pairs + row * wide + at, sum);
        }
    }
}

// What scores of codebook m are made of for one partial sum: base + rows[0] + ... + rows[count - 1].
struct Terms {
    const float* base;
    const float* rows[kCodebooks];
    int count;
};

INLINE Floats sum_at(const Terms& terms, int count, int64_t at) {
    Floats sum = load(terms.base + at);
    for (int i = 0; i < count; ++i) sum += load(terms.rows[i] + at);
    return sum;
}

INLINE int64_t lowest_of(const Terms& terms, int count, int64_t wide, float* value) {
    Floats low = splat(kInfinity);
    Ints where = {}, now = lane_numbers();
    for (int64_t at = 0; at < wide; at += kLanes, now += kLanes) {
        const Floats score = sum_at(terms, count, at);
        const Ints below = score < low;
        low = below ? score : low;
        where = below ? now : where;
    }
    *value = least(low);
    int32_t first = where[0];
    uint32_t bits = at_most(low, splat(*value));
    if (!bits) return 0;
    for (first = where[__builtin_ctz(bits)]; bits; bits &= bits - 1) {
        const int32_t index = where[__builtin_ctz(bits)];
        first = index < first ? index : first;
    }
    return first;
}

// The code with the lowest score, the first of equals.
static int64_t lowest(const Terms& terms, int64_t wide, float* value) {
    switch (terms.count) {
        case 0: return lowest_of(terms, 0, wide, value);
        case 1: return lowest_of(terms, 1, wide, value);
        case 2: return lowest_of(terms, 2, wide, value);
        case 3: return lowest_of(terms, 3, wide, value);
        default: return lowest_of(terms, terms.count, wide, value);
    }
}

INLINE Floats lowest_values_of(const Terms& terms, int count, int64_t wide) {
    Floats low = splat(kInfinity);
    for (int64_t at = 0; at < wide; at += kLanes) low = smaller(sum_at(terms, count, at), low);
    return low;
}

static Floats lowest_values(const Terms& terms, int64_t wide) {
    switch (terms.count) {
        case 1: return lowest_values_of(terms, 1, wide);
        case 2: return lowest_values_of(terms, 2, wide);
        case 3: return lowest_values_of(terms, 3, wide);
        default: return lowest_values_of(terms, terms.count, wide);
    }
}

INLINE void write_scores_of(const Terms& terms, int count, float value, int64_t wide, float* scores, Floats* low, int64_t lows, int64_t* turn) {
    int64_t next = *turn;
    for (int64_t at = 0; at < wide; at += kLanes) {
        const Floats score = sum_at(terms, count, at) + value;
        store(scores + at, score);
        low[next] = smaller(score, low[next]);
        next = next + 1 == lows ? 0 : next + 1;
    }
    *turn = next;
}

// Scores of all codes, and the lowest of each lane in ``lows`` vectors taken in turns.
static void write_scores(const Terms& terms, float value, int64_t wide, float* scores, Floats* low, int64_t lows, int64_t* turn) {
    switch (terms.count) {
        case 0: return write_scores_of(terms, 0, value, wide, scores, low, lows, turn);
        case 1: return write_scores_of(terms, 1, value, wide, scores, low, lows, turn);
        case 2: return write_scores_of(terms, 2, value, wide, scores, low, lows, turn);
        case 3: return write_scores_of(terms, 3, value, wide, scores, low, lows, turn);
        default: return write_scores_of(terms, terms.count, value, wide, scores, low, lows, turn);
    }
}

// A bound that at least ``keep`` of all scores keep to: the keep-th lowest of the lanes' lowest, each of which is a score.
INLINE float bound(const Floats* low, int64_t lows, int64_t keep) {
    Floats found = splat(kLargest);
    const float* lanes = reinterpret_cast<const float*>(low);
    for (int64_t v = 0; v < lows; ++v) {
        Ints not_above = {};
        for (int64_t i = 0; i < lows * kLanes; ++i) not_above -= splat(lanes[i]) <= low[v];
        const Floats enough = not_above >= static_cast<int32_t>(keep) ? low[v] : found;
        found = smaller(enough, found);
    }
    return least(found);
}

// Values that keep to the bound, with their index, in order; how many.
INLINE int64_t collect(const float* scores, int64_t n, float limit, float* values, int32_t* index) {
    const Floats limits = splat(limit);
    int64_t count = 0;
#if AQUABIT_LEVEL == 4
    Ints now = lane_numbers();
#endif
    for (int64_t at = 0; at < n; at += kLanes) {
        const Floats score = load(scores + at);
        uint32_t bits = at_most(score, limits);
#if AQUABIT_LEVEL == 4
        store(values + count, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), score));
        *reinterpret_cast<UnalignedInts*>(index + count) =
            reinterpret_cast<Ints>(_mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), reinterpret_cast<__m512i>(now)));
        count += __builtin_popcount(bits);
        now += kLanes;
#else
        for (; bits; bits &= bits - 1) {
            const int64_t i = at + __builtin_ctz(bits);
            values[count] = scores[i];
            index[count++] = static_cast<int32_t>(i);
        }
#endif
    }
    return count;
}

// The ``keep`` lowest of ``count`` values in ascending order, the first of equals first: their places in order[0..keep).
INLINE void rank_all(float* values, int64_t count, int64_t keep, int32_t* ranks, int32_t* order) {
    for (int64_t i = count; i < padded(count); ++i) values[i] = kInfinity;
    for (int64_t i = 0; i < keep; ++i) order[i] = -1;
    for (int64_t at = 0; at < count; at += kLanes) {
        const Floats mine = load(values + at);
        Ints below = {};
        for (int64_t i = 0; i < count; ++i) below -= splat(values[i]) < mine;
        *reinterpret_cast<UnalignedInts*>(ranks + at) = below;
    }
    for (int64_t i = 0; i < count; ++i) {
        int64_t rank = ranks[i];
        while (rank < keep && order[rank] >= 0) ++rank;
        if (rank < keep) order[rank] = static_cast<int32_t>(i);
    }
}

// The same by insertion, for many values (equal ones, most of all).
INLINE void insert_all(const float* values, int64_t count, int64_t keep, int32_t* order) {
    int64_t held = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (held == keep && !(values[i] < values[order[keep - 1]])) continue;
        int64_t place = held < keep ? held++ : keep - 1;
        for (; place > 0 && values[i] < values[order[place - 1]]; --place) order[place] = order[place - 1];
        order[place] = static_cast<int32_t>(i);
    }
}

// Partial sums of the beam: their value, codes, and (without pairs) what is left of the pull.
struct Beam {
    float* value;    // [beam]
    int32_t* codes;  // [beam, M]
    float* left;     // [beam, size padded]
};

struct Scratch {
    float* scores;    // [beam * K padded]
    float* values;    // [beam * K padded + a vector]
    int32_t* index;   // the same
    int32_t* ranks;   // the same
    Floats* low;      // [lows]
    int32_t* order;   // [beam]
    Beam beam, next;  // taken in turns
    float* later;     // [M, size padded]
    float* base;      // [K padded]
    float* tile;      // [kTile, M * K padded]: scores of the rows of a tile before any sum
    float* pull;      // [kTile, size padded]
    float* moved;     // the same
};

INLINE int64_t lows_of(const Block& b) { return (2 * b.beam + kLanes - 1) / kLanes; }

// Scores of codebook m for what is left of the pull: own - 2 c . left, of all codes.
INLINE void direct_scores(const Block& b, const Group& group, int64_t m, const float* left, float* scores) {
    const int64_t wide = padded(b.codewords), stride = b.codebooks * wide;
    for (int64_t at = 0; at < wide; at += kLanes) {
        Floats sum = splat(0);
        for (int64_t i = 0; i < b.size; ++i) sum += left[i] * load(group.by_size + i * stride + m * wide + at);
        store(scores + at, load(group.own + m * wide + at) - 2 * sum);
    }
}

INLINE const float* pair_row(const Block& b, const Group& group, int64_t j, int64_t code, int64_t m) {
    return group.pairs + ((m * (m - 1) / 2 + j) * b.codewords + code) * padded(b.codewords);
}

// left - c metric for codeword ``code`` of codebook m.
INLINE void take(const Block& b, const Group& group, int64_t m, int64_t code, const float* left, float* out) {
    const int64_t wide = padded(b.codewords), stride = b.codebooks * wide;
    for (int64_t i = 0; i < b.size; ++i) out[i] = left[i] - group.images[i * stride + m * wide + code];
}

// What scores of codebook m are made of for a partial sum with these codes (with pairs), or for what it leaves of the pull (without).
INLINE void set_terms(const Block& b, const Group& group, int64_t m, const int32_t* codes, const float* left, const float* scores, float* room,
                      Terms* terms) {
    terms->base = scores + m * padded(b.codewords);
    terms->count = 0;
    if (m > 0 && group.pairs) {
        for (int64_t j = 0; j < m; ++j) terms->rows[j] = pair_row(b, group, j, codes[j], m);
        terms->count = static_cast<int>(m);
    } else if (m > 0) {
        direct_scores(b, group, m, left, room);
        terms->base = room;
    }
}

// One codeword after another replaced by the best given the others; from nothing where ``fresh``. The cost of the outcome.
static float descend(const Block& b, const Group& group, const float* scores, const float* pull, bool fresh, const Scratch& s, int32_t* codes) {
    const int64_t wide = padded(b.codewords), g = b.size, tall = padded(g), stride = b.codebooks * wide;
    float* left = s.next.left;
    if (!fresh && b.codebooks > 1) {  // later[m]: the sum of the codewords after m
        for (int64_t i = 0; i < tall; ++i) s.later[(b.codebooks - 1) * tall + i] = 0;
        for (int64_t m = b.codebooks - 1; m > 0; --m) {
            const float* codeword = group.codewords + (m * b.codewords + codes[m]) * tall;
            for (int64_t i = 0; i < tall; i += kLanes)
                store(s.later + (m - 1) * tall + i, load(s.later + m * tall + i) + load(codeword + i));
        }
    }
    for (int64_t i = 0; i < g; ++i) left[i] = pull[i];
    float value = 0;
    for (int64_t m = 0; m < b.codebooks; ++m) {
        Terms terms;
        set_terms(b, group, m, codes, left, scores, s.scores, &terms);
        if (!fresh && m + 1 < b.codebooks) {
            const float* later = s.later + m * tall;
            for (int64_t at = 0; at < wide; at += kLanes) {
                Floats sum = splat(0);
                for (int64_t i = 0; i < g; ++i) sum += later[i] * load(group.images + i * stride + m * wide + at);
                store(s.base + at, load(terms.base + at) + 2 * sum);
            }
            terms.base = s.base;
        }
        codes[m] = static_cast<int32_t>(lowest(terms, wide, &value));
        if (!group.pairs && m + 1 < b.codebooks) take(b, group, m, codes[m], left, left);
    }
    return value;
}

// c metric c^T - 2 c pull^T.
INLINE float cost_of(const Block& b, const Group& group, const float* pull, const float* total) {
    float cost = 0;
    const int64_t tall = padded(b.size);
    for (int64_t i = 0; i < b.size; ++i) {
        float image = 0;
        for (int64_t j = 0; j < b.size; ++j) image += total[j] * group.metric[j * tall + i];
        cost += (image - 2 * pull[i]) * total[i];
    }
    return cost;
}

// The best ``beam`` sums over the first codebooks grown codebook by codebook; the codes of the best, if any is finite, in s.beam.codes.
static bool grow(const Block& b, const Group& group, const float* scores, const float* pull, Scratch& s, float* value) {
    const int64_t wide = padded(b.codewords), g = b.size, tall = padded(g), lows = lows_of(b), books = b.codebooks;
    int64_t width = 1;
    s.beam.value[0] = 0;
    for (int64_t i = 0; i < g; ++i) s.beam.left[i] = pull[i];
    Terms terms;
    for (int64_t m = 0; m + 1 < books; ++m) {
        for (int64_t v = 0; v < lows; ++v) s.low[v] = splat(kInfinity);
        int64_t turn = 0;
        for (int64_t e = 0; e < width; ++e) {
            set_terms(b, group, m, s.beam.codes + e * books, s.beam.left + e * tall, scores, s.base, &terms);
            write_scores(terms, s.beam.value[e], wide, s.scores + e * wide, s.low, lows, &turn);
        }
        const int64_t keep = b.beam < width * b.codewords ? b.beam : width * b.codewords;
        const int64_t count = collect(s.scores, width * wide, bound(s.low, lows, keep), s.values, s.index);
        const int64_t kept = keep < count ? keep : count;
        if (!kept) return false;
        if (count <= kRanked)
            rank_all(s.values, count, kept, s.ranks, s.order);
        else
            insert_all(s.values, count, kept, s.order);
        for (int64_t e = 0; e < kept; ++e) {
            const int64_t place = s.order[e], parent = s.index[place] / wide, code = s.index[place] % wide;
            s.next.value[e] = s.values[place];
            for (int64_t j = 0; j < m; ++j) s.next.codes[e * books + j] = s.beam.codes[parent * books + j];
            s.next.codes[e * books + m] = static_cast<int32_t>(code);
            if (!group.pairs) take(b, group, m, code, s.beam.left + parent * tall, s.next.left + e * tall);
        }
        const Beam other = s.beam;
        s.beam = s.next;
        s.next = other;
        width = kept;
    }
    float best = kInfinity;
    int64_t parent = -1;
    const int64_t m = books - 1;
    for (int64_t e = 0; e < width; ++e) {
        set_terms(b, group, m, s.beam.codes + e * books, s.beam.left + e * tall, scores, s.base, &terms);
        const float low = least(lowest_values(terms, wide)) + s.beam.value[e];
        if (low < best) {
            best = low;
            parent = e;
        }
    }
    if (parent < 0) return false;
    set_terms(b, group, m, s.beam.codes + parent * books, s.beam.left + parent * tall, scores, s.base, &terms);
    for (int64_t j = 0; j < m; ++j) s.beam.codes[j] = s.beam.codes[parent * books + j];
    s.beam.codes[m] = static_cast<int32_t>(lowest(terms, wide, value));
    *value = best;
    return true;
}

INLINE float pair_cost(const Block& b, const Group& group, const float* scores, const int32_t* codes) {
    const int64_t wide = padded(b.codewords);
    float cost = 0;
    for (int64_t m = 0; m < b.codebooks; ++m) {
        cost += scores[m * wide + codes[m]];
        for (int64_t j = 0; j < m; ++j) cost += pair_row(b, group, j, codes[j], m)[codes[m]];
    }
    return cost;
}

INLINE void add_codewords(const Block& b, const Group& group, const int32_t* codes, float* total) {
    const int64_t tall = padded(b.size);
    for (int64_t i = 0; i < tall; i += kLanes) {
        Floats sum = load(group.codewords + codes[0] * tall + i);
        for (int64_t m = 1; m < b.codebooks; ++m) sum += load(group.codewords + (m * b.codewords + codes[m]) * tall + i);
        store(total + i, sum);
    }
}

// Codes of one row's group, in place; their sum.
static void choose(const Block& b, const Group& group, const float* scores, const float* pull, bool fresh, Scratch& s, int32_t* codes,
                   float* total) {
    float grown = 0;
    descend(b, group, scores, pull, fresh, s, codes);
    add_codewords(b, group, codes, total);
    if (b.beam < 2 || b.codebooks < 2 || !grow(b, group, scores, pull, s, &grown)) return;
    const int32_t* other = s.beam.codes;
    if (group.pairs) {
        if (!(pair_cost(b, group, scores, other) < pair_cost(b, group, scores, codes))) return;
        add_codewords(b, group, other, total);
    } else {
        float* sum = s.next.left;
        add_codewords(b, group, other, sum);
        if (!(cost_of(b, group, pull, sum) < cost_of(b, group, pull, total))) return;
        for (int64_t i = 0; i < padded(b.size); ++i) total[i] = sum[i];
    }
    for (int64_t m = 0; m < b.codebooks; ++m) codes[m] = other[m];
}

// Scores of a tile's rows for all codes of all codebooks: own - 2 c . pull.
INLINE void score_tile(const Block& b, const Group& group, const float* pull, float* out) {
    const int64_t stride = b.codebooks * padded(b.codewords), tall = padded(b.size);
    for (int64_t at = 0; at < stride; at += kLanes) {
        Floats sum[kTile];
        for (int r = 0; r < kTile; ++r) sum[r] = splat(0);
        for (int64_t i = 0; i < b.size; ++i) {
            const Floats column = load(group.by_size + i * stride + at);
            for (int r = 0; r < kTile; ++r) sum[r] += pull[r * tall + i] * column;
        }
        const Floats own = load(group.own + at);
        for (int r = 0; r < kTile; ++r) store(out + r * stride + at, own - 2 * sum[r]);
    }
}

// rows[from..) -= moved @ coupling[group's rows, from..), for a tile of rows.
INLINE void spread(const float* moved, int64_t tall, const float* coupling, int64_t g, int64_t from, int64_t width, float* const* rows) {
    int64_t at = from;
    for (; at + kLanes <= width; at += kLanes) {
        Floats sum[kTile];
        for (int r = 0; r < kTile; ++r) sum[r] = splat(0);
        for (int64_t i = 0; i < g; ++i) {
            const Floats line = load(coupling + i * width + at);
            for (int r = 0; r < kTile; ++r) sum[r] += moved[r * tall + i] * line;
        }
        for (int r = 0; r < kTile; ++r)
            if (rows[r]) store(rows[r] + at, load(rows[r] + at) - sum[r]);
    }
    for (; at < width; ++at)
        for (int r = 0; r < kTile; ++r) {
            float sum = 0;
            for (int64_t i = 0; i < g; ++i) sum += moved[r * tall + i] * coupling[i * width + at];
            if (rows[r]) rows[r][at] -= sum;
        }
}

INLINE float divisor(float scale) { return __builtin_fabsf(scale) > kSmall ? scale : 1.0f; }

INLINE float* part_of(float** room, int64_t count) {
    float* here = *room;
    *room += count;
    return here;
}

// Floats of scratch that search_rows needs.
static int64_t scratch_floats(const Block& b) {
    const int64_t wide = padded(b.codewords), tall = padded(b.size), books = b.codebooks;
    return lows_of(b) * kLanes + b.beam * wide + 3 * (b.beam * wide + kLanes) + padded(b.beam) * 3 + 2 * padded(b.beam * books) + 2 * (b.beam + 1) * tall +
           books * tall + wide + kTile * books * wide + 3 * kTile * tall + padded(books);
}

// Rows [from, to) of block z: codes of its n-th group, and what follows for the groups after it.
static void search_rows(const Block& b, const Group& group, int64_t z, int64_t n, int64_t from, int64_t to, float* room) {
    const int64_t wide = padded(b.codewords), g = b.size, tall = padded(g), books = b.codebooks, width = b.groups * g;
    Scratch s;
    s.low = reinterpret_cast<Floats*>(part_of(&room, lows_of(b) * kLanes));
    s.scores = part_of(&room, b.beam * wide);
    s.values = part_of(&room, b.beam * wide + kLanes);
    s.index = reinterpret_cast<int32_t*>(part_of(&room, b.beam * wide + kLanes));
    s.ranks = reinterpret_cast<int32_t*>(part_of(&room, b.beam * wide + kLanes));
    s.order = reinterpret_cast<int32_t*>(part_of(&room, padded(b.beam)));
    for (Beam* beam : {&s.beam, &s.next}) {
        beam->value = part_of(&room, padded(b.beam));
        beam->codes = reinterpret_cast<int32_t*>(part_of(&room, padded(b.beam * books)));
        beam->left = part_of(&room, (b.beam + 1) * tall);
    }
    s.later = part_of(&room, books * tall);
    s.base = part_of(&room, wide);
    s.tile = part_of(&room, kTile * books * wide);
    s.pull = part_of(&room, kTile * tall);
    s.moved = part_of(&room, kTile * tall);
    float* total = part_of(&room, kTile * tall);
    int32_t* codes = reinterpret_cast<int32_t*>(part_of(&room, padded(books)));
    const bool fresh = !b.before;
    for (int64_t first = from; first < to; first += kTile) {
        float* rows[kTile];
        for (int r = 0; r < kTile; ++r) {  // a tile always counts the same rows, those beyond the last as nothing
            float* pull = s.pull + r * tall;
            for (int64_t i = 0; i < tall; ++i) pull[i] = s.moved[r * tall + i] = 0;
            rows[r] = first + r < to ? b.target + (z * b.rows + first + r) * width : nullptr;
            if (!rows[r]) continue;
            const float by = divisor(b.scale[z * b.rows + first + r]);
            const float* target = rows[r] + n * g;
            const float* start = fresh ? target : b.before + (z * b.rows + first + r) * width + n * g;
            for (int64_t i = 0; i < tall; i += kLanes) {
                Floats sum = splat(0);
                for (int64_t j = 0; j < g; ++j) sum += (start[j] / by) * load(group.metric + j * tall + i);
                store(pull + i, sum);
            }
            if (!fresh)
                for (int64_t i = 0; i < g; ++i) pull[i] += target[i] / by;
        }
        score_tile(b, group, s.pull, s.tile);
        for (int r = 0; r < kTile && rows[r]; ++r) {
            const int64_t row = z * b.rows + first + r;
            int64_t* kept = b.codes + (row * b.groups + n) * books;
            for (int64_t m = 0; m < books; ++m) codes[m] = static_cast<int32_t>(kept[m]);
            choose(b, group, s.tile + r * books * wide, s.pull + r * tall, fresh, s, codes, total);
            for (int64_t m = 0; m < books; ++m) kept[m] = codes[m];
            const float scale = b.scale[row];
            const float* start = fresh ? rows[r] + n * g : b.before + row * width + n * g;
            float* moved = s.moved + r * tall;
            for (int64_t i = 0; i < g; ++i) moved[i] = fresh ? start[i] - total[i] * scale : total[i] * scale - start[i];
            if (group.inverse) {
                for (int64_t i = 0; i < g; ++i) total[i] = moved[i];
                for (int64_t i = 0; i < tall; i += kLanes) {
                    Floats sum = splat(0);
                    for (int64_t j = 0; j < g; ++j) sum += total[j] * load(group.inverse + j * tall + i);
                    store(moved + i, sum);
                }
            }
            for (int64_t i = 0; i < g; ++i) b.moved[row * width + n * g + i] = moved[i];
        }
        if (b.coupling && n + 1 < b.groups)
            spread(s.moved, tall, b.coupling + (z * width + n * g) * width, g, (n + 1) * g, width, rows);
    }
}

constexpr Level kLevel = {kLanes, arrange, project, pair_up, scratch_floats, search_rows};

#undef INLINE

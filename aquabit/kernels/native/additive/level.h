// The additive quantizer's code search for one instruction set (foreach_level.h).
//
// Minimised over the codes k_1..k_M of a group: c metric c^T - 2 c pull^T with c the sum of its codewords. Expanded, that is
//     sum_m own_m[k_m] - 2 c_m . pull   +   sum_{j<m} 2 c_j metric c_m^T :
// scores that depend on the row, and pairs that do not and are computed once for all rows. Every vector of codewords is padded to
// whole vectors with own = infinity, and what is infinite is never picked.

#include "lowest.h"
#include "shared.h"

// Partial sums of the beam: their value, codes, and (without pairs) what is left of the pull.
struct Beam {
    float* value;    // [beam]
    int32_t* codes;  // [beam, M]
    float* left;     // [beam, size padded]
};

// A row whose group is searched, and what the search works with. The rows of a tile go through each step together: the steps of one
// wait for the last, those of different rows do not.
struct Row {
    float* pull;       // [size padded]
    float* scores;     // [M * K padded]: own - 2 c . pull of all codewords
    int32_t* codes;    // [M], before and after
    float* total;      // [size padded]: sum of their codewords
    float* moved;      // [size padded]
    float* target;     // this row of Block::target; null: there is no such row
    int64_t width;     // of the beam; 0: nothing finite was found
    Beam beam, next;   // taken in turns
    Floats* low;       // [lows]
    float* sums;       // [beam * K padded]
    float* values;     // [beam * K padded + a vector]: candidates, in order
    int32_t* index;    // the same
    int64_t count;     // of candidates
    int32_t* order;    // [ranked]
    float* later;      // [M, size padded]
    float* base;       // [K padded]
};

// Candidates that are ranked by counting; more (equal ones) are inserted one by one.
INLINE int64_t ranked(const Block& b) { return 2 * b.beam + 2 * kLanes; }

INLINE int64_t lows_of(const Block& b) { return (2 * b.beam + kLanes - 1) / kLanes; }

// Scores of codebook m for what is left of the pull: own - 2 c . left, of all codes.
INLINE void direct_scores(const Block& b, const Group& group, int64_t m, const float* left, float* scores) {
    const int64_t wide = whole_vectors(b.codewords), stride = b.codebooks * wide;
    for (int64_t at = 0; at < wide; at += kLanes) {
        Floats sum = splat(0);
        for (int64_t i = 0; i < b.size; ++i) sum += left[i] * load(group.by_size + i * stride + m * wide + at);
        store(scores + at, load(group.own + m * wide + at) - 2 * sum);
    }
}

INLINE const float* pair_row(const Block& b, const Group& group, int64_t j, int64_t code, int64_t m) {
    return group.pairs + ((m * (m - 1) / 2 + j) * b.codewords + code) * whole_vectors(b.codewords);
}

// left - c metric for codeword ``code`` of codebook m.
INLINE void take(const Block& b, const Group& group, int64_t m, int64_t code, const float* left, float* out) {
    const int64_t wide = whole_vectors(b.codewords), stride = b.codebooks * wide;
    for (int64_t i = 0; i < b.size; ++i) out[i] = left[i] - group.images[i * stride + m * wide + code];
}

// What scores of codebook m are made of for a partial sum with these codes (with pairs), or for what it leaves of the pull (without).
INLINE void set_terms(const Block& b, const Group& group, int64_t m, const int32_t* codes, const float* left, const float* scores,
                      float* room, Terms* terms) {
    terms->base = scores + m * whole_vectors(b.codewords);
    terms->count = 0;
    if (m > 0 && group.pairs) {
        const int64_t wide = whole_vectors(b.codewords), stride = b.codewords * wide;
        const float* pairs = group.pairs + m * (m - 1) / 2 * stride;
        for (int64_t j = 0; j < m; ++j, pairs += stride) terms->rows[j] = pairs + codes[j] * wide;
        terms->count = static_cast<int>(m);
    } else if (m > 0) {
        direct_scores(b, group, m, left, room);
        terms->base = room;
    }
}

// Each codeword replaced by the best given the others, one after another; from nothing where ``fresh``.
static void descend(const Block& b, const Group& group, bool fresh, Row* rows, int count) {
    const int64_t wide = whole_vectors(b.codewords), g = b.size, tall = whole_vectors(g), books = b.codebooks, stride = books * wide;
    for (Row* row = rows; row < rows + count; ++row) {
        for (int64_t i = 0; i < g; ++i) row->next.left[i] = row->pull[i];
        if (fresh) continue;
        for (int64_t i = 0; i < tall; ++i) row->later[(books - 1) * tall + i] = 0;  // later[m]: the sum of the codewords after m
        for (int64_t m = books - 1; m > 0; --m) {
            const float* codeword = group.codewords + (m * b.codewords + row->codes[m]) * tall;
            for (int64_t i = 0; i < tall; i += kLanes)
                store(row->later + (m - 1) * tall + i, load(row->later + m * tall + i) + load(codeword + i));
        }
    }
    for (int64_t m = 0; m < books; ++m)
        for (Row* row = rows; row < rows + count; ++row) {
            Terms terms;
            set_terms(b, group, m, row->codes, row->next.left, row->scores, row->sums, &terms);
            if (!fresh && m + 1 < books) {
                const float* later = row->later + m * tall;
                for (int64_t at = 0; at < wide; at += kLanes) {
                    Floats sum = splat(0);
                    for (int64_t i = 0; i < g; ++i) sum += later[i] * load(group.images + i * stride + m * wide + at);
                    store(row->base + at, load(terms.base + at) + 2 * sum);
                }
                terms.base = row->base;
            }
            row->codes[m] = static_cast<int32_t>(lowest(terms, wide));
            if (!group.pairs && m + 1 < books) take(b, group, m, row->codes[m], row->next.left, row->next.left);
        }
}

// Candidates for the best sums over codebooks up to m: those at or below a bound that at least ``beam`` keep to.
INLINE void find_candidates(const Block& b, const Group& group, int64_t m, int shift, Row* row) {
    const int64_t wide = whole_vectors(b.codewords), tall = whole_vectors(b.size), lows = lows_of(b);
    for (int64_t v = 0; v < lows; ++v) row->low[v] = splat(kInfinity);
    const int64_t keep = smaller_of(b.beam, row->width * b.codewords);
    int64_t turn = 0;
    for (int64_t e = 0; e < row->width; ++e) {
        Terms terms;
        set_terms(b, group, m, row->beam.codes + e * b.codebooks, row->beam.left + e * tall, row->scores, row->base, &terms);
        write_sums(terms, row->beam.value[e], wide, row->sums + e * wide, row->low, lows, &turn);
    }
    Bounds bounds = {0, kLargest};
    if (row->width * wide > kLanes) bounds = bounds_of(row->low, lows, keep);
    row->count = collect(row->sums, row->width, wide, shift, bounds.high, row->values, row->index);
    if (row->count <= keep + keep / 2 || row->width * wide <= kLanes) return;
    store(row->values + row->count, splat(kInfinity));
    bisect(row->values, row->count, keep, bounds, &bounds.high);
    row->count = narrow(row->count, bounds.high, row->values, row->index);
}

// The best of the candidates become the beam.
INLINE void keep_best(const Block& b, const Group& group, int64_t m, int shift, Row* row) {
    const int64_t tall = whole_vectors(b.size), books = b.codebooks, kept = smaller_of(b.beam, smaller_of(row->width * b.codewords, row->count));
    if (row->count > ranked(b) || !rank_all(row->values, row->count, kept, row->order))
        insert_all(row->values, row->count, kept, row->order);
    for (int64_t e = 0; e < kept; ++e) {
        const int32_t place = row->order[e], parent = row->index[place] >> shift, code = row->index[place] & ((1 << shift) - 1);
        row->next.value[e] = row->values[place];
        for (int64_t j = 0; j < m; ++j) row->next.codes[e * books + j] = row->beam.codes[parent * books + j];
        row->next.codes[e * books + m] = code;
        if (!group.pairs) take(b, group, m, code, row->beam.left + parent * tall, row->next.left + e * tall);
    }
    const Beam other = row->beam;
    row->beam = row->next;
    row->next = other;
    row->width = kept;
}

// The best sum over all codebooks from one of the beam; its codes are the beam's first.
INLINE void finish(const Block& b, const Group& group, Row* row) {
    const int64_t wide = whole_vectors(b.codewords), tall = whole_vectors(b.size), books = b.codebooks, m = books - 1;
    const Beam& beam = row->beam;
    Lowest found = {splat(kInfinity), {}};
    Terms terms;
    for (int64_t e = 0; e < row->width; ++e) {
        set_terms(b, group, m, beam.codes + e * books, beam.left + e * tall, row->scores, row->base, &terms);
        update_lowest(terms, beam.value[e], wide, static_cast<int32_t>(e), &found);
    }
    const int64_t parent = first_of_lowest(found.value, found.entry);
    row->width = parent >= 0;
    if (parent < 0) return;
    set_terms(b, group, m, beam.codes + parent * books, beam.left + parent * tall, row->scores, row->base, &terms);
    for (int64_t j = 0; j < m; ++j) beam.codes[j] = beam.codes[parent * books + j];
    beam.codes[m] = static_cast<int32_t>(lowest(terms, wide));
}

// The ``beam`` best sums of codewords grown codebook by codebook from nothing; the codes of the best are the beam's first.
static void grow(const Block& b, const Group& group, Row* rows, int count) {
    const int shift = 64 - __builtin_clzll(static_cast<uint64_t>(whole_vectors(b.codewords) - 1) | 1);
    for (Row* row = rows; row < rows + count; ++row) {
        row->width = 1;
        row->beam.value[0] = 0;
        for (int64_t i = 0; i < b.size; ++i) row->beam.left[i] = row->pull[i];
    }
    for (int64_t m = 0; m + 1 < b.codebooks; ++m) {
        for (Row* row = rows; row < rows + count; ++row) find_candidates(b, group, m, shift, row);
        for (Row* row = rows; row < rows + count; ++row) keep_best(b, group, m, shift, row);
    }
    for (Row* row = rows; row < rows + count; ++row) finish(b, group, row);
}

// c metric c^T - 2 c pull^T.
INLINE float cost_of(const Block& b, const Group& group, const float* pull, const float* total) {
    float cost = 0;
    const int64_t tall = whole_vectors(b.size);
    for (int64_t i = 0; i < b.size; ++i) {
        float image = 0;
        for (int64_t j = 0; j < b.size; ++j) image += total[j] * group.metric[j * tall + i];
        cost += (image - 2 * pull[i]) * total[i];
    }
    return cost;
}

INLINE float pair_cost(const Block& b, const Group& group, const float* scores, const int32_t* codes) {
    const int64_t wide = whole_vectors(b.codewords);
    float cost = 0;
    for (int64_t m = 0; m < b.codebooks; ++m) {
        cost += scores[m * wide + codes[m]];
        for (int64_t j = 0; j < m; ++j) cost += pair_row(b, group, j, codes[j], m)[codes[m]];
    }
    return cost;
}

INLINE void add_codewords(const Block& b, const Group& group, const int32_t* codes, float* total) {
    const int64_t tall = whole_vectors(b.size);
    for (int64_t i = 0; i < tall; i += kLanes) {
        Floats sum = load(group.codewords + codes[0] * tall + i);
        for (int64_t m = 1; m < b.codebooks; ++m) sum += load(group.codewords + (m * b.codewords + codes[m]) * tall + i);
        store(total + i, sum);
    }
}

// Codes of the rows' groups, in place, and their sums.
static void choose(const Block& b, const Group& group, bool fresh, Row* rows, int count) {
    descend(b, group, fresh, rows, count);
    for (Row* row = rows; row < rows + count; ++row) add_codewords(b, group, row->codes, row->total);
    if (b.beam < 2 || b.codebooks < 2) return;
    grow(b, group, rows, count);
    for (Row* row = rows; row < rows + count; ++row) {
        if (!row->width) continue;
        const int32_t* other = row->beam.codes;
        float* sum = row->next.left;
        add_codewords(b, group, other, sum);
        const bool better = group.pairs ? pair_cost(b, group, row->scores, other) < pair_cost(b, group, row->scores, row->codes)
                                        : cost_of(b, group, row->pull, sum) < cost_of(b, group, row->pull, row->total);
        if (!better) continue;
        for (int64_t i = 0; i < whole_vectors(b.size); ++i) row->total[i] = sum[i];
        for (int64_t m = 0; m < b.codebooks; ++m) row->codes[m] = other[m];
    }
}

// Scores of a tile's rows for all codes of all codebooks: own - 2 c . pull.
INLINE void score_tile(const Block& b, const Group& group, const Row* rows) {
    const int64_t stride = b.codebooks * whole_vectors(b.codewords);
    for (int64_t at = 0; at < stride; at += kLanes) {
        Floats sum[kTile];
        for (int r = 0; r < kTile; ++r) sum[r] = splat(0);
        for (int64_t i = 0; i < b.size; ++i) {
            const Floats column = load(group.by_size + i * stride + at);
            for (int r = 0; r < kTile; ++r) sum[r] += rows[r].pull[i] * column;
        }
        const Floats own = load(group.own + at);
        for (int r = 0; r < kTile; ++r) store(rows[r].scores + at, own - 2 * sum[r]);
    }
}

// What a tile's moves mean for the inputs from ``from`` on: target -= moved @ coupling.
INLINE void spread(const Row* rows, const float* coupling, int64_t g, int64_t from, int64_t width) {
    int64_t at = from;
    for (; at + kLanes <= width; at += kLanes) {
        Floats sum[kTile];
        for (int r = 0; r < kTile; ++r) sum[r] = splat(0);
        for (int64_t i = 0; i < g; ++i) {
            const Floats line = load(coupling + i * width + at);
            for (int r = 0; r < kTile; ++r) sum[r] += rows[r].moved[i] * line;
        }
        for (int r = 0; r < kTile; ++r)
            if (rows[r].target) store(rows[r].target + at, load(rows[r].target + at) - sum[r]);
    }
    for (; at < width; ++at)
        for (int r = 0; r < kTile && rows[r].target; ++r) {
            float sum = 0;
            for (int64_t i = 0; i < g; ++i) sum += rows[r].moved[i] * coupling[i * width + at];
            rows[r].target[at] -= sum;
        }
}

// The next ``count`` floats or integers, in whole cache lines.
INLINE float* part_of(uintptr_t* room, int64_t count) {
    const uintptr_t here = *room;
    *room += (count + 15) / 16 * 64;
    return reinterpret_cast<float*>(here);
}

INLINE int32_t* integers_of(uintptr_t* room, int64_t count) { return reinterpret_cast<int32_t*>(part_of(room, count)); }

INLINE void lay_out(const Block& b, Row* row, uintptr_t* room) {
    const int64_t wide = whole_vectors(b.codewords), tall = whole_vectors(b.size), books = b.codebooks;
    row->low = reinterpret_cast<Floats*>(part_of(room, lows_of(b) * kLanes));
    row->pull = part_of(room, tall);
    row->total = part_of(room, tall);
    row->moved = part_of(room, tall);
    row->scores = part_of(room, books * wide);
    row->codes = integers_of(room, books);
    row->sums = part_of(room, b.beam * wide);
    row->values = part_of(room, b.beam * wide + kLanes);
    row->index = integers_of(room, b.beam * wide + kLanes);
    row->order = integers_of(room, ranked(b));
    row->later = part_of(room, books * tall);
    row->base = part_of(room, wide);
    for (Beam* beam : {&row->beam, &row->next}) {
        beam->value = part_of(room, b.beam);
        beam->codes = integers_of(room, b.beam * books);
        beam->left = part_of(room, b.beam * tall);
    }
}

// Floats of scratch that search_rows needs.
static int64_t scratch_floats(const Block& b) {
    uintptr_t room = 0;
    Row row;
    for (int r = 0; r < kTile; ++r) lay_out(b, &row, &room);
    return static_cast<int64_t>(room / sizeof(float));
}

INLINE float divisor(float scale) { return __builtin_fabsf(scale) > kSmall ? scale : 1.0f; }

// Where a row's group starts from: feedback from the weights as they are by now, sweep from what is decoded.
INLINE const float* start_of(const Block& b, const Row* row, int64_t number, int64_t n) {
    const int64_t width = b.groups * b.size;
    return (b.before ? b.before + number * width : row->target) + n * b.size;
}

// Row ``number`` of all: its pull and its codes.
INLINE void fetch(const Block& b, const Group& group, int64_t number, int64_t n, Row* row) {
    const int64_t g = b.size, tall = whole_vectors(g);
    const float by = 1 / divisor(b.scale[number]);
    const float* start = start_of(b, row, number, n);
    for (int64_t i = 0; i < tall; i += kLanes) {
        Floats sum = splat(0);
        for (int64_t j = 0; j < g; ++j) sum += start[j] * load(group.metric + j * tall + i);
        store(row->pull + i, sum * by);
    }
    if (b.before)
        for (int64_t i = 0; i < g; ++i) row->pull[i] += row->target[n * g + i] * by;
    const int64_t* codes = b.codes + (number * b.groups + n) * b.codebooks;
    for (int64_t m = 0; m < b.codebooks; ++m) row->codes[m] = static_cast<int32_t>(codes[m]);
}

// What moving a group by ``moved`` does to the loss: moved metric moved^T - 2 moved . gradient.
INLINE float gain_of(const Block& b, const Group& group, const float* moved, const float* gradient) {
    float gain = 0;
    const int64_t tall = whole_vectors(b.size);
    for (int64_t i = 0; i < tall; i += kLanes) {
        Floats image = splat(0);
        for (int64_t j = 0; j < b.size; ++j) image += moved[j] * load(group.metric + j * tall + i);
        for (int64_t k = i; k < smaller_of(i + kLanes, b.size); ++k) gain += moved[k] * (image[k - i] - 2 * gradient[k]);
    }
    return gain;
}

// Its codes, and what they move: feedback's error (w - q) inverse, or a sweep's change.
INLINE void put(const Block& b, const Group& group, int64_t number, int64_t n, Row* row) {
    const int64_t g = b.size, tall = whole_vectors(g);
    int64_t* codes = b.codes + (number * b.groups + n) * b.codebooks;
    for (int64_t m = 0; m < b.codebooks; ++m) codes[m] = row->codes[m];
    const float scale = b.scale[number];
    const float* start = start_of(b, row, number, n);
    float* change = group.inverse ? row->total : row->moved;
    for (int64_t i = 0; i < g; ++i) change[i] = b.before ? row->total[i] * scale - start[i] : start[i] - row->total[i] * scale;
    for (int64_t i = 0; group.inverse && i < tall; i += kLanes) {
        Floats sum = splat(0);
        for (int64_t j = 0; j < g; ++j) sum += change[j] * load(group.inverse + j * tall + i);
        store(row->moved + i, sum);
    }
    for (int64_t i = 0; i < g; ++i) b.moved[number * b.groups * g + n * g + i] = row->moved[i];
    if (b.gain) b.gain[number] += gain_of(b, group, row->moved, row->target + n * g);
}

// Rows [from, to) of block z: codes of its n-th group, and what follows for the groups after it.
static void search_rows(const Block& b, const Group& group, int64_t z, int64_t n, int64_t from, int64_t to, float* room) {
    const int64_t g = b.size, width = b.groups * g;
    Row rows[kTile];
    uintptr_t next = reinterpret_cast<uintptr_t>(room);
    for (Row& row : rows) lay_out(b, &row, &next);
    for (int64_t first = from; first < to; first += kTile) {
        const int count = static_cast<int>(smaller_of(kTile, to - first));
        const int64_t number = z * b.rows + first;
        for (int r = 0; r < kTile; ++r) {  // a tile always counts the same rows, those beyond the last as nothing
            rows[r].target = r < count ? b.target + (number + r) * width : nullptr;
            for (int64_t i = 0; i < whole_vectors(g); ++i) rows[r].pull[i] = rows[r].moved[i] = 0;
        }
        for (int r = 0; r < count; ++r) fetch(b, group, number + r, n, rows + r);
        score_tile(b, group, rows);
        choose(b, group, !b.before, rows, count);
        for (int r = 0; r < count; ++r) put(b, group, number + r, n, rows + r);
        if (b.coupling && n + 1 < b.groups) spread(rows, b.coupling + (z * width + n * g) * width, g, (n + 1) * g, width);
    }
}

constexpr Level kLevel = {kLanes, arrange, project, pair_up, scratch_floats, search_rows};

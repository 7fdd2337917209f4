// The scalar quantizers' code search for one instruction set (foreach_level.h).

INLINE void store_some(float* to, Floats x, int64_t left) {
    if (left >= kLanes) return store(to, x);
    for (int64_t i = 0; i < left; ++i) to[i] = x[i];
}

INLINE int64_t table_of(const Levels& levels, int64_t z) { return levels.tables > 1 ? z * levels.count * levels.stride : 0; }

// ---- Error feedback: a tile of rows, one lane each, column by column

constexpr int kVectors = 8;  // of rows that share what is loaded; as many sums as hide an addition's latency
constexpr int kRows = kVectors * kLanes;

// Nearest of evenly spaced levels: its code, and the level.
INLINE Floats nearest_even(Floats x, Floats scale, Floats offset, float steps, Floats* code) {
    const Floats none = splat(0), size = scale < none ? -scale : scale, inverse = size > splat(kSmall) ? 1 / scale : none;
    const Floats at = (x - offset) * inverse, low = at > none ? at : none;
    *code = to_floats(nearest(smaller(low, splat(steps))));
    return offset + scale * *code;
}

// Nearest of a tile's tables: ``bounds`` [count - 1, kRows], ``values`` [count, kRows].
INLINE Floats nearest_of(Floats x, const float* bounds, const float* values, int64_t count, Floats* code) {
    Floats found = load(values), number = splat(0);
    for (int64_t k = 1; k < count; ++k) {
        const auto above = load(bounds + (k - 1) * kRows) < x;
        found = above ? load(values + k * kRows) : found;
        number = above ? splat(static_cast<float>(k)) : number;
    }
    *code = number;
    return found;
}

static int64_t feed_room(const Feed& f) { return kRows * (f.stop - f.start + 2 * f.levels.count); }

// Rows of block z from ``first`` on, at most kRows: the columns [start, stop).
static void feed_rows(const Feed& f, int64_t z, int64_t first, float* room) {
    const Levels& levels = f.levels;
    const int64_t width = f.width, rows = f.rows, left = smaller_of(kRows, rows - first);
    float *changes = room, *values = changes + (f.stop - f.start) * kRows, *bounds = values + levels.count * kRows;
    if (levels.values) {
        const float* table = levels.values + table_of(levels, z);
        for (int64_t k = 0; k < levels.count; ++k)
            for (int64_t r = 0; r < kRows; ++r)
                values[k * kRows + r] = table[k * levels.stride + (levels.stride > 1 ? first + smaller_of(r, left - 1) : 0)];
        for (int64_t i = 0; i < (levels.count - 1) * kRows; ++i) bounds[i] = (values[i] + values[i + kRows]) / 2;
    }
    Floats loss[kVectors];
    for (int v = 0; v < kVectors; ++v) loss[v] = splat(0);
    for (int64_t j = f.start; j < f.stop; ++j) {
        const int64_t column = (z * width + j) * rows + first, before = j - f.start;
        const float* gain = f.gain + (z * width + j) * width + f.start;
        Floats wanted[kVectors];
        for (int v = 0; v < kVectors; ++v) wanted[v] = load_some(f.target + column + v * kLanes, left - v * kLanes);
        for (int64_t k = 0; k < before; ++k)
            for (int v = 0; v < kVectors; ++v) wanted[v] += gain[k] * load(changes + k * kRows + v * kLanes);
        const int64_t scales = levels.values ? 0 : (z * levels.parts + levels.part[z * width + j]) * rows + first;
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = v * kLanes, here = left - at;
            Floats code, level;
            if (levels.values)
                level = nearest_of(wanted[v], bounds + at, values + at, levels.count, &code);
            else
                level = nearest_even(wanted[v], load_some(levels.scale + scales + at, here), load_some(levels.offset + scales + at, here),
                                     static_cast<float>(levels.count - 1), &code);
            const Floats change = load_some(f.weight + column + at, here) - level, missed = wanted[v] - level;
            loss[v] += f.mass[z * width + j] * missed * missed;
            store(changes + before * kRows + at, change);
            store_some(f.change + column + at, change, here);
            const Ints codes = nearest(code);
            for (int64_t i = 0; i < smaller_of(here, kLanes); ++i) f.codes[column + at + i] = static_cast<uint8_t>(codes[i]);
        }
    }
    for (int64_t r = 0; r < left; ++r) f.loss[z * rows + first + r] += loss[r / kLanes][r % kLanes];
}

// ---- Coordinate descent: a few rows, lanes along their columns, so that only what changes costs a row of H

constexpr int kFew = 16;          // rows that share a row of H
constexpr int64_t kSpan = 64;     // columns that hear of each other's changes at once; the rest follows

// Rows as they are searched. Every array [kFew, whole vectors of the width].
struct Few {
    float *product, *down, *up;  // H dW^T; how far a weight may want to go before another level is nearer
    float* changes;              // [kFew, kSpan]
    uint8_t* codes;
    double loss[kFew];
    bool active[kFew];
    int64_t count;
};

INLINE float level_of(const Levels& levels, int64_t scales, int64_t table, int64_t code) {
    return levels.values ? levels.values[table + code * levels.stride] : levels.offset[scales] + levels.scale[scales] * static_cast<float>(code);
}

// How far the level of a code is from those where its neighbours are nearer; infinite where it has none.
INLINE void set_bounds(const Levels& levels, int64_t scales, int64_t table, int64_t code, float* down, float* up) {
    *down = -kInfinity, *up = kInfinity;
    const bool first = code == 0, last = code + 1 >= levels.count;
    if (levels.values) {
        const float own = levels.values[table + code * levels.stride];
        if (!first) *down = (levels.values[table + (code - 1) * levels.stride] - own) / 2;
        if (!last) *up = (levels.values[table + (code + 1) * levels.stride] - own) / 2;
        return;
    }
    const float scale = levels.scale[scales], half = __builtin_fabsf(scale) / 2;
    if (half <= kSmall / 2) return;
    if (!(scale > 0 ? first : last)) *down = -half;
    if (!(scale > 0 ? last : first)) *up = half;
}

INLINE int64_t nearest_code(const Levels& levels, int64_t scales, int64_t table, float x) {
    if (levels.values) {
        int64_t low = 0, high = levels.count - 1;
        while (low < high) {
            const int64_t middle = (low + high) / 2, at = table + middle * levels.stride;
            if ((levels.values[at] + levels.values[at + levels.stride]) / 2 < x)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
    const float at = (x - levels.offset[scales]) / levels.scale[scales], most = static_cast<float>(levels.count - 1);
    const float low = at > 0 ? at : 0;
    return static_cast<int64_t>(__builtin_rintf(low < most ? low : most));
}

// row[from:to) -= by * h[from:to).
INLINE void take_away(float* row, const float* h, float by, int64_t from, int64_t to) {
    int64_t k = from;
    for (; k + kLanes <= to; k += kLanes) store(row + k, load(row + k) - by * load(h + k));
    for (; k < to; ++k) row[k] -= by * h[k];
}

// Bit i: column at + i wants another level.
INLINE uint32_t unsettled(const float* product, const float* down, const float* up, const float* inverse, int64_t at) {
    const Floats step = load(product + at) * load(inverse + at);
    return at_most(step, load(down + at)) | (~at_most(step, load(up + at)) & static_cast<uint32_t>((uint64_t(1) << kLanes) - 1));
}

// Where a column's levels are for a row.
INLINE int64_t scales_of(const Descent& d, int64_t z, int64_t j, int64_t row) {
    return d.levels.values ? 0 : (z * d.levels.parts + d.levels.part[z * d.width + j]) * d.rows + row;
}

INLINE int64_t table_at(const Descent& d, int64_t z, int64_t row) {
    return d.levels.values ? table_of(d.levels, z) + (d.levels.stride > 1 ? row : 0) : 0;
}

static int64_t descend_room(const Descent& d) {
    const int64_t wide = whole_vectors(d.width);
    return kFew * (3 * wide + wide / 4 + 16 + kSpan) + wide;
}

// The columns [start, stop) of one row; the change of its loss.
INLINE double descend_span(const Descent& d, Few& few, const float* inverse, int64_t z, int64_t row, int64_t r, int64_t start, int64_t stop) {
    const int64_t wide = whole_vectors(d.width), table = table_at(d, z, row);
    float *product = few.product + r * wide, *down = few.down + r * wide, *up = few.up + r * wide;
    double gained = 0;
    for (int64_t at = start; at < stop; at += kLanes) {
        uint32_t left = unsettled(product, down, up, inverse, at);
        while (left) {
            const int lane = __builtin_ctz(left);
            left &= left - 1;
            const int64_t j = at + lane;
            if (j >= stop) break;
            const int64_t scales = scales_of(d, z, j, row);
            uint8_t* code = few.codes + r * wide + j;
            const float* h = d.hessian + (z * d.width + j) * d.width;
            const float old = level_of(d.levels, scales, table, *code);
            const int64_t best = nearest_code(d.levels, scales, table, old + product[j] * inverse[j]);
            const float change = level_of(d.levels, scales, table, best) - old, gain = change * (change * h[j] - 2 * product[j]);
            if (!(gain < 0)) continue;
            *code = static_cast<uint8_t>(best);
            set_bounds(d.levels, scales, table, best, down + j, up + j);
            take_away(product, h, change, start, stop);
            few.changes[r * kSpan + j - start] = change;
            gained += gain;
            left = unsettled(product, down, up, inverse, at) & ~static_cast<uint32_t>((uint64_t(2) << lane) - 1);
        }
    }
    return gained;
}

// All columns of the rows once; the rows' losses follow.
INLINE void descend_once(const Descent& d, Few& few, const float* inverse, int64_t z, int64_t first, double* gained) {
    const int64_t wide = whole_vectors(d.width);
    for (int64_t start = 0; start < d.width; start += kSpan) {
        const int64_t stop = smaller_of(start + kSpan, d.width);
        for (int64_t i = 0; i < kFew * kSpan; ++i) few.changes[i] = 0;
        double all = 0;
        for (int64_t r = 0; r < few.count; ++r) {
            if (!few.active[r]) continue;
            const double gain = descend_span(d, few, inverse, z, first + r, r, start, stop);
            gained[r] += gain;
            all += gain;
        }
        if (!(all < 0)) continue;
        for (int64_t j = start; j < stop; ++j)
            for (int64_t r = 0; r < few.count; ++r) {
                const float change = few.changes[r * kSpan + j - start], *h = d.hessian + (z * d.width + j) * d.width;
                if (change == 0) continue;
                take_away(few.product + r * wide, h, change, 0, start);
                take_away(few.product + r * wide, h, change, stop, d.width);
            }
    }
}

// Rows of block z from ``first`` on, at most kFew, until a sweep gains little.
static void descend_rows(const Descent& d, int64_t z, int64_t first, float* room) {
    const int64_t width = d.width, wide = whole_vectors(width);
    Few few;
    few.product = room, few.down = room + kFew * wide, few.up = room + 2 * kFew * wide, few.changes = room + 3 * kFew * wide;
    float* inverse = few.changes + kFew * kSpan;
    few.codes = reinterpret_cast<uint8_t*>(inverse + wide);
    few.count = smaller_of(kFew, d.rows - first);
    for (int64_t j = 0; j < wide; ++j) {
        const bool there = j < width;
        const int64_t column = (z * width + j) * d.rows + first;
        inverse[j] = there ? d.inverse[z * width + j] : 0;
        for (int64_t r = 0; r < few.count; ++r) {
            const int64_t at = r * wide + j;
            few.product[at] = there ? d.product[column + r] : 0;
            few.codes[at] = there ? d.codes[column + r] : 0;
            few.down[at] = -kInfinity, few.up[at] = kInfinity;
            if (there && inverse[j] > 0)
                set_bounds(d.levels, scales_of(d, z, j, first + r), table_at(d, z, first + r), few.codes[at], few.down + at, few.up + at);
        }
    }
    for (int64_t r = 0; r < few.count; ++r) few.active[r] = true, few.loss[r] = d.loss[z * d.rows + first + r];
    bool any = true;
    for (int64_t sweep = 0; any && sweep < d.sweeps; ++sweep) {
        double gained[kFew] = {};
        descend_once(d, few, inverse, z, first, gained);
        any = false;
        for (int64_t r = 0; r < few.count; ++r) {
            few.active[r] = few.active[r] && -gained[r] > static_cast<double>(d.least) * few.loss[r];
            few.loss[r] += gained[r];
            any = any || few.active[r];
        }
    }
    for (int64_t j = 0; j < width; ++j)
        for (int64_t r = 0; r < few.count; ++r) {
            d.product[(z * width + j) * d.rows + first + r] = few.product[r * wide + j];
            d.codes[(z * width + j) * d.rows + first + r] = few.codes[r * wide + j];
        }
    for (int64_t r = 0; r < few.count; ++r) d.loss[z * d.rows + first + r] = few.loss[r];
}

constexpr Level kLevel = {kRows, kFew, feed_room, descend_room, feed_rows, descend_rows};

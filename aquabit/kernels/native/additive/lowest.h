// What is lowest among many sums, for one instruction set: part of additive.cpp.

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

// Of the lanes with the lowest value the lowest number; -1 where no lane is below infinity.
INLINE int32_t first_of_lowest(Floats low, Ints numbers) {
    const float value = least(low);
    if (!(value <= kLargest)) return -1;
    uint32_t bits = at_most(low, splat(value));
    int32_t first = numbers[__builtin_ctz(bits)];
    for (bits &= bits - 1; bits; bits &= bits - 1) {
        const int32_t number = numbers[__builtin_ctz(bits)];
        first = number < first ? number : first;
    }
    return first;
}

INLINE int64_t lowest_of(const Terms& terms, int count, int64_t wide) {
    Floats low = splat(kInfinity);
    Ints where = {}, now = lane_numbers();
    for (int64_t at = 0; at < wide; at += kLanes, now += kLanes) {
        const Floats score = sum_at(terms, count, at);
        const Ints lower = score < low;
        low = lower ? score : low;
        where = lower ? now : where;
    }
    const int32_t first = first_of_lowest(low, where);
    return first < 0 ? 0 : first;
}

// The code with the lowest score, the first of equals.
static int64_t lowest(const Terms& terms, int64_t wide) {
    switch (terms.count) {
        case 0: return lowest_of(terms, 0, wide);
        case 1: return lowest_of(terms, 1, wide);
        case 2: return lowest_of(terms, 2, wide);
        case 3: return lowest_of(terms, 3, wide);
        default: return lowest_of(terms, terms.count, wide);
    }
}

// What the lanes' lowest scores are, and the partial sum they come from.
struct Lowest {
    Floats value;
    Ints entry;
};

INLINE void update_lowest_of(const Terms& terms, int count, float value, int64_t wide, int32_t entry, Lowest* found) {
    Floats low = splat(kInfinity);
    for (int64_t at = 0; at < wide; at += kLanes) low = smaller(sum_at(terms, count, at), low);
    low += value;
    const Ints lower = low < found->value;
    found->value = lower ? low : found->value;
    found->entry = lower ? entry + Ints{} : found->entry;
}

static void update_lowest(const Terms& terms, float value, int64_t wide, int32_t entry, Lowest* found) {
    switch (terms.count) {
        case 0: return update_lowest_of(terms, 0, value, wide, entry, found);
        case 1: return update_lowest_of(terms, 1, value, wide, entry, found);
        case 2: return update_lowest_of(terms, 2, value, wide, entry, found);
        case 3: return update_lowest_of(terms, 3, value, wide, entry, found);
        default: return update_lowest_of(terms, terms.count, value, wide, entry, found);
    }
}

INLINE void write_sums_of(const Terms& terms, int count, float value, int64_t wide, float* sums, Floats* low, int64_t lows, int64_t* turn) {
    int64_t next = *turn;
    for (int64_t at = 0; at < wide; at += kLanes) {
        const Floats score = sum_at(terms, count, at) + value;
        store(sums + at, score);
        low[next] = smaller(score, low[next]);
        next = next + 1 == lows ? 0 : next + 1;
    }
    *turn = next;
}

// Scores of all codes, and the lowest of each lane in ``lows`` vectors taken in turns.
static void write_sums(const Terms& terms, float value, int64_t wide, float* sums, Floats* low, int64_t lows, int64_t* turn) {
    switch (terms.count) {
        case 0: return write_sums_of(terms, 0, value, wide, sums, low, lows, turn);
        case 1: return write_sums_of(terms, 1, value, wide, sums, low, lows, turn);
        case 2: return write_sums_of(terms, 2, value, wide, sums, low, lows, turn);
        case 3: return write_sums_of(terms, 3, value, wide, sums, low, lows, turn);
        default: return write_sums_of(terms, terms.count, value, wide, sums, low, lows, turn);
    }
}

// How many of n values (whole vectors) are at most ``limit``.
INLINE int64_t count_at_most(const float* values, int64_t n, float limit) {
#if AQUABIT_LEVEL >= 3
    int64_t count = 0;
    for (int64_t at = 0; at < n; at += kLanes) count += __builtin_popcount(at_most(load(values + at), splat(limit)));
    return count;
#else
    Ints lanes = {};
    for (int64_t at = 0; at < n; at += kLanes) lanes -= load(values + at) <= limit;
    int64_t count = 0;
    for (int i = 0; i < kLanes; ++i) count += lanes[i];
    return count;
#endif
}

// ``high`` is what enough values keep to, ``low`` is not above any.
struct Bounds {
    float low, high;
};

// High brought down by bisection, until not more than an eighth too many of n values keep to it.
INLINE void bisect(const float* values, int64_t n, int64_t keep, Bounds bounds, float* high) {
    for (int i = 0; i < kBisections; ++i) {
        const float middle = bounds.low * 0.5f + bounds.high * 0.5f;
        const int64_t count = count_at_most(values, n, middle);
        bounds.low = count < keep ? middle : bounds.low;
        bounds.high = count < keep ? bounds.high : middle;
        if (count >= keep && count <= keep + keep / 8) break;
    }
    *high = bounds.high;
}

// Bounds for all values from the lanes' lowest, each of which is a value: high is what ``keep`` of these keep to, and more of all.
INLINE Bounds bounds_of(const Floats* low, int64_t lows, int64_t keep) {
    const float* lanes = reinterpret_cast<const float*>(low);
    if (lows == 1) {
        Ints not_above = {};
        for (int64_t i = 0; i < kLanes; ++i) not_above -= splat(lanes[i]) <= low[0];
        const Floats enough = not_above >= static_cast<int32_t>(keep) ? low[0] : splat(kLargest);
        return {least(low[0]), least(smaller(enough, splat(kLargest)))};
    }
    Floats lowest = low[0], highest = splat(-kLargest);
    for (int64_t v = 0; v < lows; ++v) {
        lowest = smaller(low[v], lowest);
        const Floats finite = low[v] <= kLargest ? low[v] : splat(-kLargest);
        highest = highest < finite ? finite : highest;
    }
    Bounds bounds = {least(lowest), -least(-highest)};
    if (count_at_most(lanes, lows * kLanes, bounds.high) < keep)
        bounds.high = kLargest;
    else
        bisect(lanes, lows * kLanes, keep, bounds, &bounds.high);
    return bounds;
}

// Values that keep to the bound, in order, each with the number of its partial sum times 2^shift plus its code; how many.
INLINE int64_t collect(const float* sums, int64_t width, int64_t wide, int shift, float limit, float* values, int32_t* index) {
    const Floats limits = splat(limit);
    int64_t count = 0;
    for (int64_t e = 0; e < width; ++e, sums += wide) {
        Ints now = lane_numbers() + static_cast<int32_t>(e << shift);
        for (int64_t at = 0; at < wide; at += kLanes, now += kLanes) {
            const Floats score = load(sums + at);
            uint32_t bits = at_most(score, limits);
#if AQUABIT_LEVEL == 4
            const __mmask16 mask = static_cast<__mmask16>(bits);
            store(values + count, _mm512_maskz_compress_ps(mask, score));
            store_ints(index + count, (Ints)_mm512_maskz_compress_epi32(mask, (__m512i)now));
            count += __builtin_popcount(bits);
#else
            for (; bits; bits &= bits - 1) {
                const int lane = __builtin_ctz(bits);
                values[count] = sums[at + lane];
                index[count++] = static_cast<int32_t>((e << shift) + at + lane);
            }
#endif
        }
    }
    return count;
}

// The same for what was collected, in place; values are padded to whole vectors with infinity.
INLINE int64_t narrow(int64_t n, float limit, float* values, int32_t* index) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float value = values[i];
        const int32_t number = index[i];
        values[count] = value;
        index[count] = number;
        count += value <= limit;
    }
    return count;
}

// Sorts values by counting how many are lower: places of the lowest first in order, as far as values differ.
// Whether the first ``keep`` places are there; they are not where some are equal.
INLINE bool rank_all(float* values, int64_t count, int64_t keep, int32_t* order) {
    store(values + count, splat(kInfinity));
    for (int64_t i = 0; i < keep; ++i) order[i] = -1;
#if AQUABIT_LEVEL >= 3
    if (count <= kLanes) {
        const Floats all = load(values);
        for (int64_t i = 0; i < count; ++i) order[__builtin_popcount(below(all, splat(values[i])))] = static_cast<int32_t>(i);
    } else {
        for (int64_t i = 0; i < count; ++i) {
            const Floats mine = splat(values[i]);
            int rank = 0;
            for (int64_t at = 0; at < count; at += kLanes) rank += __builtin_popcount(below(load(values + at), mine));
            order[rank] = static_cast<int32_t>(i);
        }
    }
#else
    for (int64_t at = 0; at < count; at += kLanes) {
        const Floats mine = load(values + at);
        Ints lower = {};
        for (int64_t i = 0; i < count; ++i) lower -= splat(values[i]) < mine;
        for (int64_t lane = 0; lane < kLanes && at + lane < count; ++lane) order[lower[lane]] = static_cast<int32_t>(at + lane);
    }
#endif
    int32_t all = 0;
    for (int64_t i = 0; i < keep; ++i) all |= order[i];
    return all >= 0;
}

// The ``keep`` lowest of the values in ascending order, the first of equals first, by insertion: for many values, and for equal ones.
INLINE void insert_all(const float* values, int64_t count, int64_t keep, int32_t* order) {
    int64_t held = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (held == keep && !(values[i] < values[order[keep - 1]])) continue;
        int64_t place = held < keep ? held++ : keep - 1;
        for (; place > 0 && values[i] < values[order[place - 1]]; --place) order[place] = order[place - 1];
        order[place] = static_cast<int32_t>(i);
    }
}

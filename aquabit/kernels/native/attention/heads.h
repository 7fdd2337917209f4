// One head: its keys and values packed, then block after block of its queries. Part of level.h.

// The grid of one query's probabilities: e goes to the integer nearest to e * steps - least, at most 255. ``unit`` / sum is
// what an integer stands for, and ``zero`` of those is the least.
struct Grid {
    float top, steps, least, zero, unit;
};

#ifdef AQUABIT_AMX
constexpr int64_t kProbabilityBytes = kBlock;  // of a row
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
constexpr int64_t kProbabilityBytes = kBlock * 4 / Weighted::per;
#endif

// Where the parts of a thread's room begin; ``bytes`` is what they take.
struct Head {
    int64_t key_vectors, keys, q_stride, value_vectors, value_blocks, vector_bytes, block_bytes, scores_stride, bytes = 0;
    bool pairs;                  // Q and K are multiplied as pairs of bfloat16
    int64_t quads, byte_stride;  // dwords of the bytes, or pairs, of a row of Q or K, and bytes from row to row
    float *k_step, *k_shift, *k_total, *q_step, *q_sum, *q_zero;
    float *q, *k, *key_rows, *v_scale, *v_total, *scores, *high, *low, *sum, *out, *mask;
    uint8_t *v, *probabilities, *q_bytes, *k_bytes, *key_bytes;
    Grid* grids;

    Head(const Attention& a, uint8_t* room) {
        key_vectors = (a.m + kLanes - 1) / kLanes, keys = key_vectors * kLanes, q_stride = whole_vectors(a.d);
        value_vectors = (a.e + kLanes - 1) / kLanes, value_blocks = (a.m + kBlock - 1) / kBlock;
        vector_bytes = kBlock / Weighted::per * kBytes, block_bytes = value_vectors * vector_bytes;
        scores_stride = keys + kLanes;  // rows of a power of two of bytes would share few sets of a cache
        pairs = kPairs && a.q.narrow && a.k.narrow;
        quads = pairs ? (a.d + 1) / 2 : (a.d + 3) / 4, byte_stride = 4 * whole_vectors(quads);
        const bool whole = a.whole || pairs, all_whole = a.all_whole || pairs;
        take(&q, all_whole ? 0 : a.block * q_stride * 4, room), take(&k, all_whole ? 0 : keys * a.d * 4, room);
        take(&key_rows, kLanes * q_stride * 4, room), take(&q_bytes, whole ? a.block * byte_stride : 0, room);
        take(&k_bytes, whole ? keys * quads * 4 : 0, room), take(&key_bytes, kLanes * byte_stride, room);
        for (float** each : {&k_step, &k_shift, &k_total}) take(each, whole ? keys * 4 : 0, room);
        for (float** each : {&q_step, &q_sum, &q_zero}) take(each, a.block * 4, room);
        take(&v, value_blocks * block_bytes, room), take(&v_scale, value_blocks * value_vectors * kBytes, room);
        take(&v_total, value_vectors * kBytes, room), take(&scores, a.block * scores_stride * 4, room);
        take(&high, a.block * kBytes, room), take(&low, a.block * kBytes, room), take(&sum, a.block * kBytes, room);
        take(&probabilities, a.block * kProbabilityBytes, room), take(&out, a.block * value_vectors * kBytes, room);
        take(&mask, keys * 4, room), take(&grids, a.block * sizeof(Grid), room);
    }

  private:
    template <class T>
    void take(T** part, int64_t size, uint8_t* room) {
        *part = reinterpret_cast<T*>(room + bytes);
        bytes += (size + 63) / 64 * 64;
    }
};

constexpr float kLog2E = 1.44269504f;  // scores are in units of log 2, so that exponentials are powers of two

#ifdef AQUABIT_VNNI
INLINE const float* wide_row(const Rows& rows, int64_t i) { return static_cast<const float*>(row_of(rows, i)); }

// The same of the bytes: with u and z of a query and a key, the sum of (u - z) (u' - z') is that of u (u' - 128), and (128 - z') times
// the sum of u, less z times the sum of u' - z'.
INLINE void pack_keys_whole(const Attention& a, const Rows& k, const Step* steps, const Head& h) {
    for (int64_t first = 0; first < a.m; first += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t at = smaller_of(first + lane, a.m - 1);
            const Step& s = steps[at];
            const int32_t sum = pack_bytes(wide_row(k, at), a.d, s, 128, h.key_bytes + lane * h.byte_stride), shift = 128 - s.zero;
            h.k_step[first + lane] = s.step, h.k_shift[first + lane] = s.step * shift;
            h.k_total[first + lane] = s.step * (sum + static_cast<int32_t>(a.d) * shift);
        }
        interleave(reinterpret_cast<const float*>(h.key_bytes), h.byte_stride / 4, h.quads,
                   reinterpret_cast<float*>(h.k_bytes + first * h.quads * 4));
    }
}

INLINE void pack_queries_whole(const Attention& a, const Rows& q, const Step* steps, int64_t first, int64_t count, int64_t rows, const Head& h) {
    for (int64_t i = 0; i < rows; ++i) {
        uint8_t* to = h.q_bytes + i * h.byte_stride;
        if (i >= count) {
            for (int64_t at = 0; at < h.byte_stride; ++at) to[at] = 0;
            h.q_step[i] = h.q_sum[i] = h.q_zero[i] = 0;
            continue;
        }
        const Step& s = steps[first + i];
        const int32_t sum = pack_bytes(wide_row(q, first + i), a.d, s, 0, to);
        for (int64_t at = whole_vectors(a.d); at < h.byte_stride; ++at) to[at] = 0;  // which tiles read
        h.q_step[i] = s.step * a.scale * kLog2E, h.q_sum[i] = h.q_step[i] * sum, h.q_zero[i] = -h.q_step[i] * s.zero;
    }
}
#endif

// Keys beyond the last one are copies of it, so that they change neither the least nor the largest score.
INLINE bool pack_keys(const Attention& a, const Rows& k, const Head& h) {
    Floats zeros = {};
    for (int64_t first = 0; first < a.m; first += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane)
            pack_row(row_of(k, smaller_of(first + lane, a.m - 1)), k.narrow, a.d, 1, h.key_rows + lane * h.q_stride, &zeros);
        interleave(h.key_rows, h.q_stride, a.d, h.k + first * a.d);
    }
    return total_of(zeros) == 0;
}

INLINE bool pack_values(const Attention& a, const Rows& v, const Head& h) {
    Floats zeros = {};
    for (int64_t i = 0; i < h.value_vectors; ++i) store(h.v_total + i * kLanes, Floats{});
    for (int64_t block = 0; block < h.value_blocks; ++block) {
        const int64_t first = block * kBlock, last = smaller_of(first + kBlock, a.m), steps = whole_vectors(last - first) / Weighted::per;
        for (int64_t i = 0; i < h.value_vectors; ++i)
            pack_columns(v, first, last, i * kLanes, a.e, steps, h.v + block * h.block_bytes + i * h.vector_bytes,
                         h.v_scale + (block * h.value_vectors + i) * kLanes, h.v_total + i * kLanes, &zeros);
    }
    return total_of(zeros) == 0;
}

// Queries from ``first`` on; ``rows`` - ``count`` rows of zeros follow them.
INLINE bool pack_queries(const Attention& a, const Rows& q, int64_t first, int64_t count, int64_t rows, const Head& h) {
    Floats zeros = {};
    for (int64_t i = 0; i < count; ++i)
        pack_row(row_of(q, first + i), q.narrow, a.d, a.scale * kLog2E, h.q + i * h.q_stride, &zeros);
    for (int64_t i = count * h.q_stride; i < rows * h.q_stride; i += kLanes) store(h.q + i, Floats{});
    return total_of(zeros) == 0;
}

#ifdef AQUABIT_AMX
// A row of bfloat16 as it is, with zeros up to whole vectors of dwords.
INLINE void pack_pairs(const void* row, int64_t d, int64_t bytes, uint8_t* to, Floats* zeros) {
    for (int64_t i = 0; i < d; i += kLanes) note(read(row, true, i, d), zeros);
    __builtin_memcpy(to, row, 2 * d);
    __builtin_memset(to + 2 * d, 0, bytes - 2 * d);
}

INLINE bool pack_keys_pairs(const Attention& a, const Rows& k, const Head& h) {
    Floats zeros = {};
    for (int64_t first = 0; first < a.m; first += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane)
            pack_pairs(row_of(k, smaller_of(first + lane, a.m - 1)), a.d, h.byte_stride, h.key_bytes + lane * h.byte_stride, &zeros);
        interleave(reinterpret_cast<const float*>(h.key_bytes), h.byte_stride / 4, h.quads,
                   reinterpret_cast<float*>(h.k_bytes + first * h.quads * 4));
    }
    return total_of(zeros) == 0;
}

INLINE bool pack_queries_pairs(const Attention& a, const Rows& q, int64_t first, int64_t count, int64_t rows, const Head& h) {
    Floats zeros = {};
    for (int64_t i = 0; i < count; ++i) pack_pairs(row_of(q, first + i), a.d, h.byte_stride, h.q_bytes + i * h.byte_stride, &zeros);
    __builtin_memset(h.q_bytes + count * h.byte_stride, 0, (rows - count) * h.byte_stride);
    return total_of(zeros) == 0;
}

// As make_scores.
template <bool pairs>
INLINE void make_tile_scores(const Attention& a, int64_t rows, const Head& h) {
    alignas(64) int32_t sums[kUnit * kMostTiles * kLanes];
    const float factor = a.scale * kLog2E;
    for (int64_t first = 0; first < h.key_vectors; first += kMostTiles) {
        const int64_t vectors = smaller_of(kMostTiles, h.key_vectors - first);
        for (int64_t row = 0; row < rows; row += kUnit) {
            Products<pairs>::multiply(h.q_bytes + row * h.byte_stride, h.byte_stride, h.k_bytes + first * kLanes * h.quads * 4,
                                      h.quads * kBytes, h.quads, vectors, sums);
            for (int64_t i = row; i < row + kUnit; ++i) {
                const float *step = h.k_step + first * kLanes, *shift = h.k_shift + first * kLanes, *total = h.k_total + first * kLanes;
                const int32_t* sum = sums + (i - row) * kMostTiles * kLanes;
                float* to = h.scores + i * h.scores_stride + first * kLanes;
                Floats high = load(h.high + i * kLanes), low = load(h.low + i * kLanes);
                for (int64_t at = 0; at < vectors * kLanes; at += kLanes) {
                    Floats s;
                    if constexpr (pairs)
                        s = (Floats)load_ints(sum + at) * factor;
                    else
                        s = to_floats(load_ints(sum + at)) * h.q_step[i] * load(step + at) + h.q_sum[i] * load(shift + at) +
                            h.q_zero[i] * load(total + at);
                    store(to + at, s);
                    high = larger(high, s), low = lesser(low, s);
                }
                store(h.high + i * kLanes, high), store(h.low + i * kLanes, low);
            }
        }
    }
}
#endif

// Scores of a block of queries and all keys, with the least and the largest of each lane.
INLINE void make_scores(const Attention& a, [[maybe_unused]] bool whole, int64_t rows, const Head& h) {
    for (int64_t i = 0; i < rows * kLanes; i += kLanes) {
        store(h.high + i, splat(-__builtin_inff()));
        store(h.low + i, splat(__builtin_inff()));
    }
    const auto put = [&](int64_t row, int64_t vector, Floats s) __attribute__((always_inline)) {
        const int64_t i = row * kLanes;
        store(h.scores + row * h.scores_stride + vector * kLanes, s);
        store(h.high + i, larger(load(h.high + i), s));
        store(h.low + i, lesser(load(h.low + i), s));
    };
#ifdef AQUABIT_AMX
    if (h.pairs) return make_tile_scores<true>(a, rows, h);
    if (whole) return make_tile_scores<false>(a, rows, h);
#elif defined(AQUABIT_VNNI)
    if (whole)
        return in_tiles(h.key_vectors, [&](auto vectors, int64_t first) __attribute__((always_inline)) {
            for (int64_t row = 0; row < rows; row += kRows)
                tile<Quarters, decltype(vectors)::value>(
                    h.q_bytes + row * h.byte_stride, h.byte_stride, h.k_bytes + first * kLanes * h.quads * 4, h.quads * kBytes, h.quads,
                    [&](int r, int v, Floats s) __attribute__((always_inline)) {
                        const int64_t i = row + r, key = (first + v) * kLanes;
                        put(i, first + v, s * h.q_step[i] * load(h.k_step + key) + h.q_sum[i] * load(h.k_shift + key) + h.q_zero[i] * load(h.k_total + key));
                    });
        });
#endif
    in_tiles(h.key_vectors, [&](auto vectors, int64_t first) __attribute__((always_inline)) {
        for (int64_t row = 0; row < rows; row += kRows)
            tile<Real, decltype(vectors)::value>(
                reinterpret_cast<const uint8_t*>(h.q + row * h.q_stride), h.q_stride * 4,
                reinterpret_cast<const uint8_t*>(h.k + first * kLanes * a.d), a.d * kBytes, a.d,
                [&](int r, int v, Floats s) __attribute__((always_inline)) { put(row + r, first + v, s); });
    });
}

// A row of the mask as what is added to scores; the last one is repeated as keys are.
template <class T, class Convert>
INLINE void read_mask(const Attention& a, int64_t at, int64_t keys, float* to, const Convert& convert) {
    const T* row = static_cast<const T*>(a.mask.data) + at;
    if (a.mask.column == 1)
        for (int64_t i = 0; i < a.m; ++i) to[i] = convert(row[i]) * kLog2E;
    else
        for (int64_t i = 0; i < a.m; ++i) to[i] = convert(row[i * a.mask.column]) * kLog2E;
    for (int64_t i = a.m; i < keys; ++i) to[i] = to[a.m - 1];
}

INLINE void mask_row(const Attention& a, int64_t head, int64_t query, const Head& h) {
    const int64_t at = offset_of(a, a.mask.strides, head) + query * a.mask.row;
    if (a.mask.kind == MaskKind::boolean)
        read_mask<uint8_t>(a, at, h.keys, h.mask, [](uint8_t seen) { return seen ? 0.0f : -__builtin_inff(); });
    else if (a.mask.kind == MaskKind::single)
        read_mask<float>(a, at, h.keys, h.mask, [](float x) { return x; });
    else
        read_mask<uint16_t>(a, at, h.keys, h.mask, [](uint16_t x) {
            const uint32_t bits = static_cast<uint32_t>(x) << 16;
            float wide;
            __builtin_memcpy(&wide, &bits, sizeof wide);
            return wide;
        });
}

// Adds the mask to row ``row`` of the block, which is query ``query``.
INLINE void add_mask(const Attention& a, int64_t head, int64_t query, int64_t row, const Head& h) {
    if (a.mask.row || row == 0) mask_row(a, head, query, h);
    float* scores = h.scores + row * h.scores_stride;
    Floats high = splat(-__builtin_inff()), low = -high;
    Ints none = {};
    for (int64_t i = 0; i < h.keys; i += kLanes) {
        const Floats s = load(scores + i) + load(h.mask + i);
        store(scores + i, s);
        none |= s != s;
        high = larger(high, s), low = lesser(low, s);
    }
    store(h.high + row * kLanes, none ? splat(__builtin_inff()) : high);
    store(h.low + row * kLanes, low);
}

INLINE Grid grid_of(float high, float low) {
    if (!(high - high == 0)) return {0, 0, 0, 0, __builtin_nanf("")};  // no key is seen, or a score is no number
    const float lowest = exp2_of(splat(low - high))[0], range = 1 - lowest;
    if (range <= 0) return {high, 0, 0, 1, 1};  // all are the same: nothing is rounded
    const float steps = 255 / range, least_steps = __builtin_rintf(lowest * steps);
    return {high, steps, least_steps, least_steps, range / 255};
}

// The probabilities of a row and ``vectors`` of keys from ``first`` on as integers, and their sums.
INLINE void round_row(const Attention& a, int64_t row, int64_t first, int64_t vectors, const Head& h) {
    const Grid g = h.grids[row];
    const float* scores = h.scores + row * h.scores_stride + first;
    uint8_t* to = h.probabilities + row * kProbabilityBytes;
    const Floats top = splat(g.top), steps = splat(g.steps), lowest = splat(g.least), most = splat(255);
    Floats sum = load(h.sum + row * kLanes), e = {};
    for (int64_t i = 0; i < vectors; ++i) {
        e = exp2_of(load(scores + i * kLanes) - top);
        sum += e;
        const Ints u = nearest(lesser(e * steps - lowest, most));
#ifdef AQUABIT_AMX
        *reinterpret_cast<UnalignedQuarterBytes*>(to + i * kLanes) = __builtin_convertvector(u, QuarterBytes);
#elif defined(AQUABIT_VNNI)
        store_narrowed(reinterpret_cast<int16_t*>(to) + i * kLanes, u);
#else
        store(reinterpret_cast<float*>(to) + i * kLanes, to_floats(u));
#endif
    }
    const int64_t copies = first + vectors * kLanes - a.m;  // of the last key, which count for nothing
    if (copies > 0) sum -= lane_numbers() < splat_int(static_cast<int32_t>(kLanes - copies)) ? Floats{} : e;
    store(h.sum + row * kLanes, sum);
}

// Adds the values of a block of keys, weighted, to the results.
INLINE void add_values(const Attention& a, int64_t rows, int64_t block, const Head& h) {
    const int64_t first = block * kBlock, vectors = smaller_of(kBlock / kLanes, h.key_vectors - first / kLanes);
    for (int64_t row = 0; row < rows; ++row) round_row(a, row, first, vectors, h);
#ifdef AQUABIT_AMX
    alignas(64) int32_t upper[kUnit * kLanes], lower[kUnit * kLanes];
    for (int64_t at = 0; at < h.value_vectors; ++at) {
        const Floats scale = load(h.v_scale + (block * h.value_vectors + at) * kLanes);
        for (int64_t row = 0; row < rows; row += kUnit) {
            multiply_values(h.probabilities + row * kProbabilityBytes, h.v + block * h.block_bytes + at * h.vector_bytes, vectors * kLanes, upper, lower);
            for (int64_t r = 0; r < kUnit; ++r) {
                float* out = h.out + ((row + r) * h.value_vectors + at) * kLanes;
                const Ints sum = (load_ints(upper + r * kLanes) << 8) + load_ints(lower + r * kLanes);
                store(out, load(out) + to_floats(sum) * scale);
            }
        }
    }
#else
    constexpr int64_t row_bytes = kProbabilityBytes;
    in_tiles(h.value_vectors, [&](auto count, int64_t at) __attribute__((always_inline)) {
        const float* scales = h.v_scale + (block * h.value_vectors + at) * kLanes;
        for (int64_t row = 0; row < rows; row += kRows)
            tile<Weighted, decltype(count)::value>(
                h.probabilities + row * row_bytes, row_bytes, h.v + block * h.block_bytes + at * h.vector_bytes, h.vector_bytes,
                vectors * kLanes / Weighted::per, [&](int r, int v, Floats sum) __attribute__((always_inline)) {
                    float* out = h.out + ((row + r) * h.value_vectors + at + v) * kLanes;
                    store(out, load(out) + sum * load(scales + v * kLanes));
                });
    });
#endif
}

INLINE void write_rows(const Attention& a, const Rows& y, int64_t first, int64_t count, const Head& h) {
    for (int64_t i = 0; i < count; ++i) {
        const Grid& g = h.grids[i];
        const float unit = g.unit / total_of(load(h.sum + i * kLanes));
        for (int64_t v = 0; v < h.value_vectors; ++v)
            write(row_of(y, first + i), y.narrow, v * kLanes, a.e,
                  (load(h.out + (i * h.value_vectors + v) * kLanes) + load(h.v_total + v * kLanes) * g.zero) * unit);
    }
}

// Blocks of queries [first, last) of a head; false where a value of Q, K or V is none to compute with (``note``), and what was
// written is of no use.
static bool run_blocks(const Attention& a, int64_t head, int64_t first, int64_t last, uint8_t* room) {
    const Head h(a, room);
    const Rows q = of_head(a, a.q, head), y = of_head(a, a.y, head);
    const int64_t sample = a.dimensions ? head / a.sizes[a.dimensions - 1] : 0;
    const bool whole = a.whole && a.whole[sample];  // in a level with AQUABIT_VNNI only
#ifdef AQUABIT_VNNI
    if (whole) pack_keys_whole(a, of_head(a, a.k, head), a.k_steps + sample * a.m, h);
#endif
    bool finite = true;
#ifdef AQUABIT_AMX
    if (h.pairs)
        finite = pack_keys_pairs(a, of_head(a, a.k, head), h);
    else
#endif
        if (!whole)
        finite = pack_keys(a, of_head(a, a.k, head), h);
    if (!finite || !pack_values(a, of_head(a, a.v, head), h)) return false;
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * a.block, count = smaller_of(a.block, a.n - start), rows = (count + kUnit - 1) / kUnit * kUnit;
#ifdef AQUABIT_VNNI
        if (whole) pack_queries_whole(a, q, a.q_steps + sample * a.n, start, count, rows, h);
#endif
#ifdef AQUABIT_AMX
        if (h.pairs)
            finite = pack_queries_pairs(a, q, start, count, rows, h);
        else
#endif
            if (!whole)
            finite = pack_queries(a, q, start, count, rows, h);
        if (!finite) return false;
        make_scores(a, whole, rows, h);
        if (a.mask.kind != MaskKind::none)
            for (int64_t i = 0; i < count; ++i) add_mask(a, head, start + i, i, h);
        for (int64_t i = 0; i < rows; ++i) {
            h.grids[i] = grid_of(largest(load(h.high + i * kLanes)), least(load(h.low + i * kLanes)));
            store(h.sum + i * kLanes, Floats{});
        }
        for (int64_t i = 0; i < rows * h.value_vectors; ++i) store(h.out + i * kLanes, Floats{});
        for (int64_t part = 0; part < h.value_blocks; ++part) add_values(a, rows, part, h);
        write_rows(a, y, start, count, h);
    }
    return true;
}

// Few tokens times rows of scalar codes that are not put in order first; part of level.h.
//
// A byte holds ``fused`` neighbouring codes. The tokens are laid out as the codes lie, once a call, so that a shift and a mask make of
// a vector of bytes (a strip) codes that meet a vector of inputs. Strips cover several groups of scales where these are short.

// Whether codes stand for single weights, and segments for the groups of scales, in order.
INLINE bool in_strips(const Weight& w) {
    if (w.group != 1 || w.books != 1 || w.kernel_order || w.area != 1 || (w.scales != w.segment_count && w.segment_count > 1)) return false;
    for (int64_t n = 0; n < w.segment_count; ++n)
        if (w.segments[n].scales != n) return false;
    return w.segment_count > 0;
}

// Whether there are products of bytes for the codes, or tables that registers hold.
static bool serves_strips(const Weight& w, bool bytes) {
    if (bytes) return AQUABIT_LEVEL >= 3 && w.integers.there && w.integers.bits <= kByteBits && in_strips(w);
    return in_strips(w) && (!w.tables || (AQUABIT_LEVEL == 4 && w.bits <= 6));
}

INLINE int64_t end_of(const Weight& w, int64_t segment) {
    return segment + 1 < w.segment_count ? w.segments[segment + 1].at : w.row_bytes;
}

// The strips of a row, lanes of ``unit`` bytes: no lane holds codes of two segments.
static void cut_strips(const Weight& w, int64_t unit, Strips* x) {
    int64_t at = 0;
    x->count = 0;
    for (int64_t s = 0; s < w.segment_count; ++x->count) {
        Strip* strip = x->strips + x->count;
        *strip = {at, 0, s};
        int32_t *segments = x->segments + x->count * kLanes, *inputs = x->inputs + x->count * kLanes;
        for (int64_t lane = 0; lane < kLanes; ++lane) segments[lane] = inputs[lane] = 0;
        while (s < w.segment_count && at - strip->from < unit * kLanes && (at - strip->from) % unit == 0) {
            const int64_t next = smaller_of(end_of(w, s), strip->from + unit * kLanes);
            for (int64_t lane = (at - strip->from) / unit; strip->from + lane * unit < next; ++lane) {
                const int64_t before = (strip->from + lane * unit - w.segments[s].at) * w.fused;
                segments[lane] = static_cast<int32_t>(s - strip->first);
                inputs[lane] = static_cast<int32_t>(smaller_of(unit * w.fused, w.segments[s].count - before));
            }
            at = next;
            if (at == end_of(w, s)) ++s;
        }
        strip->bytes = at - strip->from;
    }
}

// Inputs [cin] of a token from ``to`` on, as the codes of the strips lie; zeros where there are none.
template <class T>
INLINE void lay_inputs(const Weight& w, const Strips& x, int64_t width, const int64_t fused, const T* from, T* to) {
    const int64_t place = x.tokens * width;
    for (int64_t i = 0; i < x.count; ++i, to += fused * place) {
        const Strip& strip = x.strips[i];
        for (int64_t p = 0; p < fused; ++p) __builtin_memset(to + p * place, 0, width * sizeof(T));
        for (int64_t s = strip.first; s < w.segment_count && w.segments[s].at < strip.from + strip.bytes; ++s) {
            const Segment& segment = w.segments[s];
            const int64_t first = segment.at > strip.from ? segment.at : strip.from, before = (first - segment.at) * fused;
            const int64_t bytes = smaller_of(end_of(w, s), strip.from + strip.bytes) - first;
            const T* here = from + segment.start + before;
            for (int64_t p = 0; p < fused; ++p) {
                const int64_t n = smaller_of(bytes, (segment.count - before - p + fused - 1) / fused);
                for (int64_t k = 0; k < n; ++k) to[p * place + first - strip.from + k] = here[k * fused + p];
            }
        }
    }
}

template <class T>
INLINE void lay_inputs(const Weight& w, const Strips& x, int64_t width, const T* from, T* to) {
    if (w.fused == 1)
        lay_inputs(w, x, width, 1, from, to);
    else if (w.fused == 2)
        lay_inputs(w, x, width, 2, from, to);
    else if (w.fused == 4)
        lay_inputs(w, x, width, 4, from, to);
    else
        lay_inputs(w, x, width, 8, from, to);
}

// Token ``t`` [cin], quantized, among ``x``; ``room`` holds [cin]. False where integers do not stand for it alone.
static bool lay_bytes(const Weight& w, const float* token, int64_t bits, int64_t t, int8_t* room, const Strips& x) {
    Grid* grid = x.grids + t;
    if (!token_grid(token, w.cin, bits, false, grid) || grid->rest != 0) return false;
    quantize_bytes(token, w.cin, *grid, reinterpret_cast<uint8_t*>(room));
    for (int64_t s = 0; s < w.segment_count; ++s) {
        const Segment& segment = w.segments[s];
        int32_t sum = 0;
        for (int64_t i = segment.start; i < segment.start + segment.count; ++i) sum += static_cast<uint8_t>(room[i]);
        x.totals[t * x.stride + s] = static_cast<float>(sum - grid->zero * static_cast<int32_t>(segment.count));
    }
    for (int64_t i = 0; i < w.cin; ++i) room[i] = static_cast<int8_t>(room[i] ^ -128);  // less 128
    lay_inputs(w, x, kBytes, room, x.bytes + t * kBytes);
    if (w.integers.levels && t == 0) {
        Strips alone = x;
        alone.tokens = 1;
        __builtin_memset(room, 1, w.cin);
        lay_inputs(w, alone, kBytes, room, x.ones);
    }
    for (int64_t i = 0; w.segment_count > 1 && i < x.count; ++i) {
        Ints sum = load_ints(x.inputs + i * kLanes) * (128 - grid->zero);
        for (int64_t p = 0; p < w.fused; ++p)
            sum = dot(sum, splat_int(0x01010101), load_ints(x.bytes + ((i * w.fused + p) * x.tokens + t) * kBytes), false);
        store_ints(x.sums + (i * x.tokens + t) * kLanes, sum * static_cast<int32_t>(w.integers.center));
    }
    return true;
}

// Token ``t`` [cin] as it is.
static void lay_floats(const Weight& w, const float* token, int64_t t, const Strips& x) {
    for (int64_t s = 0; s < w.segment_count; ++s) {
        const float* here = token + w.segments[s].start;
        Floats sum = {};
        for (int64_t i = 0; i < w.segments[s].count; i += kLanes) sum += load_some(here + i, w.segments[s].count - i);
        x.totals[t * x.stride + s] = total_of(sum);
    }
    lay_inputs(w, x, kLanes, token, x.floats + t * kLanes);
}

// ---- Products of a row

INLINE Ints load_some_widened(const uint8_t* from, int64_t count) {
    if (count >= kLanes) return (Ints)load_widened(from);
#if AQUABIT_LEVEL == 4
    return (Ints)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << count) - 1), from));
#else
    uint8_t some[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i];
    return (Ints)load_widened(some);
#endif
}

INLINE Floats lanes_of(Floats x, Ints from) {
#if AQUABIT_LEVEL == 4
    return (Floats)_mm512_permutexvar_ps((__m512i)from, (__m512)x);
#else
    return shuffled(x, x, from);
#endif
}

// Scales of the groups that a strip's lanes are in.
INLINE Floats scales_of(const Weight& w, int64_t row, const Strips& x, int64_t strip) {
    const int64_t first = x.strips[strip].first;
    return lanes_of(load_some(w.scale + row * w.scales + first, w.scales - first), load_ints(x.segments + strip * kLanes));
}

// What offsets add, and codes that were taken about ``middle``: of each group its offset times the sum of its inputs.
INLINE Floats offsets_of(const Weight& w, int64_t row, const Strips& x, int64_t t, float middle) {
    Floats sum = {};
    for (int64_t s = 0; s < w.scales; s += kLanes) {
        Floats shifted = load_some(w.scale + row * w.scales + s, w.scales - s) * middle;
        if (w.offset) shifted += load_some(w.offset + row * w.scales + s, w.scales - s);
        sum += shifted * load(x.totals + t * x.stride + s);
    }
    return sum;
}

template <int kTokens, int kFused, bool kWhole, bool kLevels>
INLINE void dot_row(const Weight& w, int64_t row, const Strips& x, float* y, int64_t y_stride) {
    const uint8_t* codes = w.codes + row * w.row_bytes;
    const Bytes mask = splat_byte(static_cast<uint8_t>((1 << w.bits) - 1));
    const Bytes levels = kLevels ? repeat_sixteen(w.integers.levels) : Bytes{};
    const int step = static_cast<int>(w.integers.step);
    Ints products[kTokens] = {}, all = {};
    Floats results[kTokens] = {};
    for (int64_t i = 0; i < x.count; ++i) {
        const Bytes packed = load_some(codes + x.strips[i].from, x.strips[i].bytes);
        const int8_t* inputs = x.bytes + i * kFused * kTokens * kBytes;
        Bytes sums = {};
        if (!kWhole) {
            all = Ints{};
            for (int t = 0; t < kTokens; ++t) products[t] = Ints{};
        }
#pragma GCC unroll 8
        for (int p = 0; p < kFused; ++p) {
            const UnsignedShorts moved = p ? (UnsignedShorts)packed >> static_cast<uint16_t>(p * w.bits) : (UnsignedShorts)packed;
            const Bytes code = (Bytes)moved & mask, own = kLevels ? look_up(levels, code) : code;
            if (kLevels)  // two of them may not fit a byte
                all = dot(all, (Ints)own, load_ints(x.ones + (i * kFused + p) * kBytes), false);
            else
                sums += own;
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t)
                products[t] = dot(products[t], (Ints)own, load_ints(inputs + (p * kTokens + t) * kBytes), false);
        }
        if (!kLevels) all = dot(all, (Ints)sums, splat_int(0x01010101), false);
        if (kWhole) continue;
        const Floats scale = scales_of(w, row, x, i);
        for (int t = 0; t < kTokens; ++t) {
            const Ints own = products[t] + all * (128 - x.grids[t].zero);
            results[t] += to_floats((step == 2 ? own + own : own) - load_ints(x.sums + (i * kTokens + t) * kLanes)) * scale;
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        const float inputs = x.totals[t * x.stride];
        float sum;
        if (kWhole) {
            const int32_t own = total_of(products[t] + all * (128 - x.grids[t].zero)) * step;
            sum = scale_at(w, row, 0) * w.integers.unit * (own - static_cast<int32_t>(inputs) * static_cast<int32_t>(w.integers.center)) +
                  static_cast<float>(shifted_at(w, row, 0)) * inputs;
        } else {
            results[t] *= w.integers.unit;
            if (!w.integers.centred) results[t] += offsets_of(w, row, x, t, w.integers.middle);
            sum = total_of(results[t]);
        }
        y[t * y_stride] = (w.bias ? w.bias[row] : 0) + x.grids[t].scale * sum;
    }
}

template <int kTokens, int kFused, bool kLevels = false>
static void byte_rows(const Weight& w, int64_t first, int64_t last, const Strips& x, float* y, int64_t y_stride) {
    for (int64_t row = first; row < last; ++row)
        if (w.segment_count == 1)
            dot_row<kTokens, kFused, true, kLevels>(w, row, x, y + row, y_stride);
        else
            dot_row<kTokens, kFused, false, kLevels>(w, row, x, y + row, y_stride);
}

template <int kTokens>
INLINE void dot_bytes_of(const Weight& w, int64_t first, int64_t last, const Strips& x, float* y, int64_t y_stride) {
    if (w.integers.levels) return byte_rows<kTokens, 2, true>(w, first, last, x, y, y_stride);
    if (w.fused == 1) return byte_rows<kTokens, 1>(w, first, last, x, y, y_stride);
    if (w.fused == 2) return byte_rows<kTokens, 2>(w, first, last, x, y, y_stride);
    if (w.fused == 4) return byte_rows<kTokens, 4>(w, first, last, x, y, y_stride);
    byte_rows<kTokens, 8>(w, first, last, x, y, y_stride);
}

// Rows [first, last) times quantized tokens, to y [tokens, y_stride].
static void dot_bytes(const Weight& w, int64_t first, int64_t last, const Strips& x, float* y, int64_t y_stride) {
    if (x.tokens == 1) return dot_bytes_of<1>(w, first, last, x, y, y_stride);
    if (x.tokens == 2) return dot_bytes_of<2>(w, first, last, x, y, y_stride);
    if (x.tokens == 3) return dot_bytes_of<3>(w, first, last, x, y, y_stride);
    dot_bytes_of<4>(w, first, last, x, y, y_stride);
}

// A table of up to 64 values, or of the whole numbers about ``middle``.
struct Values {
    Floats part[4];
    float middle;
};

INLINE Values values_of(const Weight& w, int64_t row) {
    Values v = {{}, w.tables ? 0 : ((1 << w.bits) - 1) * 0.5f};
    const int64_t size = int64_t(1) << w.bits;
    for (int64_t n = 0; n < 4 && n * kLanes < size; ++n)
        v.part[n] = w.tables ? load_some(w.tables + (w.table_sets > 1 ? row * w.codewords : 0) + n * kLanes, size - n * kLanes)
                             : to_floats(lane_numbers() + static_cast<int32_t>(n * kLanes)) - v.middle;
    return v;
}

// How values of codes are found: looked up in one, two or four registers, or converted.
constexpr int kConverted = 0, kSixteen = 1, kThirtyTwo = 2, kSixtyFour = 4;

template <int kKind>
INLINE Floats value_at(const Values& v, Ints code) {
#if AQUABIT_LEVEL == 4
    if (kKind == kSixteen) return (Floats)_mm512_permutexvar_ps((__m512i)code, (__m512)v.part[0]);
    if (kKind != kConverted) {
        const __m512 low = _mm512_permutex2var_ps((__m512)v.part[0], (__m512i)code, (__m512)v.part[1]);
        if (kKind == kThirtyTwo) return (Floats)low;
        const __m512 high = _mm512_permutex2var_ps((__m512)v.part[2], (__m512i)code, (__m512)v.part[3]);
        return (Floats)_mm512_mask_mov_ps(low, _mm512_test_epi32_mask((__m512i)code, _mm512_set1_epi32(32)), high);
    }
#endif
    return to_floats(code) - v.middle;
}

template <int kTokens, int kFused, int kKind, bool kWhole>
INLINE void dot_row(const Weight& w, int64_t row, const Strips& x, const Values& values, float* y, int64_t y_stride) {
    const uint8_t* codes = w.codes + row * w.row_bytes;
    const int bits = static_cast<int>(w.bits);
    const Ints mask = splat_int((1 << bits) - 1);
    Floats results[kTokens] = {}, products[2][kTokens] = {};
    for (int64_t i = 0; i < x.count; ++i) {
        const Ints packed = load_some_widened(codes + x.strips[i].from, x.strips[i].bytes);
        const float* inputs = x.floats + i * kFused * kTokens * kLanes;
        if (!kWhole)
            for (int t = 0; t < kTokens; ++t) products[0][t] = products[1][t] = Floats{};
#pragma GCC unroll 8
        for (int p = 0; p < kFused; ++p) {
            const Floats value = value_at<kKind>(values, (p ? packed >> p * bits : packed) & mask);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) products[p % 2][t] += value * load(inputs + (p * kTokens + t) * kLanes);
        }
        if (kWhole) continue;
        const Floats scale = scales_of(w, row, x, i);
        for (int t = 0; t < kTokens; ++t) results[t] += (products[0][t] + products[1][t]) * scale;
    }
    for (int t = 0; t < kTokens; ++t) {
        if (kWhole) results[t] = (products[0][t] + products[1][t]) * w.scale[row * w.scales];
        if (w.offset || values.middle != 0) results[t] += offsets_of(w, row, x, t, values.middle);
        y[t * y_stride] = (w.bias ? w.bias[row] : 0) + total_of(results[t]);
    }
}

template <int kTokens, int kFused, int kKind>
static void dot_rows(const Weight& w, int64_t first, int64_t last, const Strips& x, float* y, int64_t y_stride) {
    Values values = values_of(w, first);
    for (int64_t row = first; row < last; ++row) {
        if (w.table_sets > 1) values = values_of(w, row);
        if (w.segment_count == 1)
            dot_row<kTokens, kFused, kKind, true>(w, row, x, values, y + row, y_stride);
        else
            dot_row<kTokens, kFused, kKind, false>(w, row, x, values, y + row, y_stride);
    }
}

template <int kTokens>
INLINE void dot_floats_of(const Weight& w, int64_t first, int64_t last, const Strips& x, float* y, int64_t y_stride) {
    constexpr int kFew = AQUABIT_LEVEL == 4 ? kSixteen : kConverted;  // codes of at most 4 bits
    if (w.fused == 2) return dot_rows<kTokens, 2, kFew>(w, first, last, x, y, y_stride);
    if (w.fused == 4) return dot_rows<kTokens, 4, kFew>(w, first, last, x, y, y_stride);
    if (w.fused == 8) return dot_rows<kTokens, 8, kFew>(w, first, last, x, y, y_stride);
#if AQUABIT_LEVEL == 4
    if (w.bits <= 4) return dot_rows<kTokens, 1, kSixteen>(w, first, last, x, y, y_stride);
    if (w.tables && w.bits == 5) return dot_rows<kTokens, 1, kThirtyTwo>(w, first, last, x, y, y_stride);
    if (w.tables) return dot_rows<kTokens, 1, kSixtyFour>(w, first, last, x, y, y_stride);
#endif
    dot_rows<kTokens, 1, kConverted>(w, first, last, x, y, y_stride);
}

// Rows [first, last) times tokens as floats, to y [tokens, y_stride].
static void dot_floats(const Weight& w, int64_t first, int64_t last, const Strips& x, float* y, int64_t y_stride) {
    if (x.tokens == 1) return dot_floats_of<1>(w, first, last, x, y, y_stride);
    if (x.tokens == 2) return dot_floats_of<2>(w, first, last, x, y, y_stride);
    if (x.tokens == 3) return dot_floats_of<3>(w, first, last, x, y, y_stride);
    dot_floats_of<4>(w, first, last, x, y, y_stride);
}

// Rows of codes to rows of integers or floats, for one instruction set (see decode_level.h, which comes before this).

constexpr int kBytes = 4 * kLanes;  // of a vector
typedef uint8_t Codes __attribute__((vector_size(kBytes)));
typedef uint8_t UnalignedCodes __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef uint8_t Half __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));
typedef uint8_t Quarter __attribute__((vector_size(kBytes / 4), aligned(1), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef float UnalignedEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

INLINE Codes splat_code(int64_t code) { return static_cast<uint8_t>(code) - Codes{}; }

// One vector of codes: ``fused`` of each byte, the first in the lowest bits.
INLINE Codes spread(const uint8_t* from, int64_t bits, int64_t fused, Codes mask) {
    if (fused == 1) return *reinterpret_cast<const UnalignedCodes*>(from) & mask;
    if (fused == 2) {
        const Shorts wide = __builtin_convertvector(*reinterpret_cast<const Half*>(from), Shorts);
        return (Codes)(wide | (wide << (8 - bits))) & mask;
    }
    const Words wide = __builtin_convertvector(*reinterpret_cast<const Quarter*>(from), Words);
    return (Codes)(wide | (wide << 6) | (wide << 12) | (wide << 18)) & mask;
}

// ``count`` scalar codes less ``center``; nothing beyond them is read or written.
INLINE void expand(const uint8_t* from, int64_t count, int64_t bits, int64_t fused, int64_t center, int8_t* to) {
    const int64_t mask = (1 << bits) - 1;
    if (fused < 8) {
        const Codes masks = splat_code(mask), centers = splat_code(center);
        for (; count >= kBytes; count -= kBytes, from += kBytes / fused, to += kBytes)
            *reinterpret_cast<UnalignedCodes*>(to) = spread(from, bits, fused, masks) - centers;
    }
    for (int64_t i = 0; i < count; ++i)
        to[i] = static_cast<int8_t>(((from[i / fused] >> (i % fused * bits)) & mask) - center);
}

INLINE void expand_row(const Weight& w, int64_t row, int64_t center, int8_t* to) {
    for (const Segment* s = w.segments; s < w.segments + w.segment_count; ++s) {
        const uint8_t* from = w.codes + row * w.row_bytes + s->at;
        int8_t* here = to + s->tap * w.cin + s->start;
        if (w.fused == 1)
            expand(from, s->count, w.bits, 1, center, here);
        else if (w.fused == 2)
            expand(from, s->count, w.bits, 2, center, here);
        else if (w.fused == 4)
            expand(from, s->count, w.bits, 4, center, here);
        else
            expand(from, s->count, w.bits, 8, center, here);
    }
}

INLINE float scale_at(const Weight& w, int64_t row, int64_t n) { return w.scale[row * w.scales + (w.scales > 1 ? n : 0)]; }
INLINE float offset_at(const Weight& w, int64_t row, int64_t n) {
    return w.offset ? w.offset[row * w.offsets + (w.offsets > 1 ? n : 0)] : 0;
}

INLINE int64_t sum_of(const int8_t* x, int64_t n) {
    int64_t total = 0;
    for (int64_t from = 0; from < n; from += 1 << 20) {
        int32_t part = 0;
        for (int64_t i = from; i < smaller_of(n, from + (1 << 20)); ++i) part += x[i];
        total += part;
    }
    return total;
}

// Row ``row`` of uniform codes into its slot, as bytes or (``wide``) 16 bits.
static void fill_codes(const Weight& w, const Plan& plan, bool wide, int64_t row, int8_t* room, uint8_t* slot, float* factor, float* offset,
                       float* total, int64_t stride) {
    const int64_t center = w.center();
    expand_row(w, row, center, room);
    __builtin_memset(slot, 0, plan.slot_bytes);
    for (int64_t r = 0; r < plan.range_count; ++r) {
        double all = 0;
        for (int64_t i = plan.ranges[r].first; i < plan.ranges[r].last; ++i) {
            const Run& run = plan.runs[i];
            const double scale = scale_at(w, row, run.scales), shifted = offset_at(w, row, run.scales) + scale * center;
            int64_t sum = 0;
            for (const Piece* p = plan.pieces + run.first; p < plan.pieces + run.last; ++p) {
                const int8_t* from = room + p->from;
                if (wide) {
                    int16_t* to = reinterpret_cast<int16_t*>(slot + p->slot) + p->lead;
                    for (int64_t k = 0; k < p->count; ++k) to[k] = from[k];
                } else {
                    __builtin_memcpy(slot + p->slot + p->lead, from, p->count);
                }
                sum += sum_of(from, p->count);
            }
            factor[i * stride] = static_cast<float>(scale);
            offset[i * stride] = static_cast<float>(shifted);
            all += scale * sum + shifted * run.inputs;
        }
        total[r * stride] = static_cast<float>(all);
    }
}

// ---- Rows of floats

INLINE void look_up_codes(const float* table, const uint8_t* codes, int64_t count, int64_t bits, float* to) {
    int64_t i = 0;
#if AQUABIT_LEVEL == 4
    const __m512 low = bits < 4 ? _mm512_maskz_loadu_ps((1 << (1 << bits)) - 1, table) : _mm512_loadu_ps(table);
    const __m512 high = bits == 5 ? _mm512_loadu_ps(table + 16) : low;
    for (; i + 16 <= count; i += 16) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        const __m512 found = bits <= 4   ? _mm512_permutexvar_ps(index, low)
                             : bits == 5 ? _mm512_permutex2var_ps(low, index, high)
                                         : _mm512_i32gather_ps(index, table, 4);
        _mm512_storeu_ps(to + i, found);
    }
#endif
    for (; i < count; ++i) to[i] = table[codes[i]];
}

// Lookup i of a row, as a code: one that is out of range is cut, and never read beyond the tables.
INLINE int64_t code_at(const Weight& w, const uint8_t* from, int64_t i, bool nibbles) {
    return (nibbles ? from[i / 2] >> (i % 2 * 4) & 15 : from[i]) & (w.codewords - 1);
}

// Sums of codewords of one segment's groups, [groups, g].
INLINE void add_codewords(const Weight& w, const float* table, const uint8_t* from, int64_t groups, bool nibbles, float* to) {
    const int64_t g = w.group, books = w.books, size = w.codewords * g;
    for (int64_t j = 0; j < groups; ++j, to += g) {
        const float* first = table + code_at(w, from, j * books, nibbles) * g;
        if (g == 8) {
            UnalignedEight sum = *reinterpret_cast<const UnalignedEight*>(first);
            for (int64_t m = 1; m < books; ++m)
                sum += *reinterpret_cast<const UnalignedEight*>(table + m * size + code_at(w, from, j * books + m, nibbles) * 8);
            *reinterpret_cast<UnalignedEight*>(to) = sum;
        } else if (g == 4) {
            UnalignedFour sum = *reinterpret_cast<const UnalignedFour*>(first);
            for (int64_t m = 1; m < books; ++m)
                sum += *reinterpret_cast<const UnalignedFour*>(table + m * size + code_at(w, from, j * books + m, nibbles) * 4);
            *reinterpret_cast<UnalignedFour*>(to) = sum;
        } else {
            for (int64_t i = 0; i < g; ++i) to[i] = first[i];
            for (int64_t m = 1; m < books; ++m) {
                const float* next = table + m * size + code_at(w, from, j * books + m, nibbles) * g;
                for (int64_t i = 0; i < g; ++i) to[i] += next[i];
            }
        }
    }
}

// Row ``row`` of the weight, float32, in its order; the codes of scalar formats are kept behind its end while they are looked up.
static void decode_row(const Weight& w, int64_t row, float* room) {
    const float* table = w.tables ? w.tables + (w.table_sets > 1 ? row : 0) * w.books * w.codewords * w.group : nullptr;
    const bool scalar = w.group == 1 && w.books == 1 && !w.kernel_order, nibbles = !scalar && w.bits <= 4;
    uint8_t* codes = reinterpret_cast<uint8_t*>(room + w.length());
    if (scalar) expand_row(w, row, 0, reinterpret_cast<int8_t*>(codes));
    for (const Segment* s = w.segments; s < w.segments + w.segment_count; ++s) {
        const int64_t at = w.kernel_order ? 0 : s->tap * w.cin + s->start, count = w.kernel_order ? w.length() : s->count;
        float* here = room + at;
        if (!scalar)
            add_codewords(w, table, w.codes + row * w.row_bytes + s->at, count / w.group, nibbles, here);
        else if (table)
            look_up_codes(table, codes + at, count, w.bits, here);
        else
            for (int64_t i = 0; i < count; ++i) here[i] = codes[at + i];
        const float scale = scale_at(w, row, s->scales), offset = offset_at(w, row, s->scales);
        if (w.offset)
            for (int64_t i = 0; i < count; ++i) here[i] = here[i] * scale + offset;
        else
            for (int64_t i = 0; i < count; ++i) here[i] *= scale;
    }
}

struct Size {
    float sum, most;
};

INLINE Size size_of(const float* x, int64_t n, int64_t stride) {
    float sum = 0, most = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most)
    for (int64_t i = 0; i < n; ++i) {
        const float size = __builtin_fabsf(x[i * stride]);
        sum += size;
        most = size > most ? size : most;
    }
    return {sum, most};
}

// Rounded to 16 bits; what that lost is added to the errors.
INLINE void round_to(const float* x, int64_t n, int64_t stride, float inverse, float scale, int16_t* to, float* sums) {
    float error = 0, all = 0, total = 0;
#pragma omp simd reduction(+ : error, all, total)
    for (int64_t i = 0; i < n; ++i) {
        const float value = x[i * stride];
        const int32_t q = static_cast<int32_t>(__builtin_rintf(value * inverse));
        const float lost = value * inverse - q;
        to[i] = static_cast<int16_t>(q);
        error += lost * lost;
        all += value * inverse * (value * inverse);
        total += q;
    }
    sums[0] += error, sums[1] += all, sums[2] += total;
}

// Row ``row`` of any weight as 16-bit integers of one scale, such that no run can overflow with activations of up to ``most``.
static void fill_values(const Weight& w, const Plan& plan, int64_t most, int64_t row, float* room, uint8_t* slot, float* factor, float* total,
                        int64_t stride, Errors* errors) {
    decode_row(w, row, room);
    __builtin_memset(slot, 0, plan.slot_bytes);
    float scale = 0;
    for (const Run* run = plan.runs; run < plan.runs + plan.run_count; ++run) {
        float sum = 0;
        for (const Piece* p = plan.pieces + run->first; p < plan.pieces + run->last; ++p) {
            const Size size = plan.stride == 1 ? size_of(room + p->from, p->count, 1) : size_of(room + p->from, p->count, plan.stride);
            sum += size.sum;
            if (size.most > scale * 32766) scale = size.most / 32766;
        }
        const float room_left = 2147483000.0f / most - run->inputs;  // rounding adds at most half of each
        if (sum * 1.0001f > scale * room_left) scale = sum * 1.0001f / room_left;
    }
    const bool usable = scale >= 1e-37f && scale <= 3e38f;  // else zeros, or not finite: then so is the result
    const float inverse = usable ? 1 / scale : 0;
    for (int64_t r = 0; r < plan.range_count; ++r) {
        double all = 0;
        for (int64_t i = plan.ranges[r].first; i < plan.ranges[r].last; ++i) {
            float sums[3] = {0, 0, 0};
            for (const Piece* p = plan.pieces + plan.runs[i].first; usable && p < plan.pieces + plan.runs[i].last; ++p) {
                int16_t* to = reinterpret_cast<int16_t*>(slot + p->slot) + p->lead;
                if (plan.stride == 1)
                    round_to(room + p->from, p->count, 1, inverse, scale, to, sums);
                else
                    round_to(room + p->from, p->count, plan.stride, inverse, scale, to, sums);
            }
            errors->error += double(sums[0]) * scale * scale;
            errors->all += double(sums[1]) * scale * scale;
            all += sums[2];
            factor[i * stride] = scale;
        }
        total[r * stride] = static_cast<float>(all * scale);
    }
    if (!usable && scale != 0) errors->error = errors->all = __builtin_inf();
}

// ---- Few tokens: a row is decoded and multiplied at once

// Dot products of a segment's integers [count] with those of ``tokens`` tokens, and with ones.
INLINE void dot_bytes(const int8_t* w, const uint8_t* x, int64_t stride, int64_t tokens, int64_t count, bool narrow, int32_t* sums) {
    int64_t done = 0;
    for (int64_t t = 0; t <= tokens; ++t) sums[t] = 0;
#if AQUABIT_LEVEL >= 3
    if (narrow) {
        Ints acc[kDotRows + 1] = {};
        const Ints ones = 0x01010101 - Ints{};
        for (; done + kBytes <= count; done += kBytes) {
            const Ints weight = load_ints(w + done);
            for (int64_t t = 0; t < tokens; ++t) acc[t] = dot(acc[t], load_ints(x + t * stride + done), weight, false);
            acc[tokens] = dot(acc[tokens], ones, weight, false);
        }
        for (int64_t t = 0; t <= tokens; ++t)
            for (int lane = 0; lane < kLanes; ++lane) sums[t] += acc[t][lane];
    }
#endif
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = done; i < count; ++i) sums[t] += x[t * stride + i] * w[i];
    for (int64_t i = done; i < count; ++i) sums[tokens] += w[i];
}

// Row ``row`` of uniform codes times quantized tokens [tokens, cin]; ``sums`` [segments, tokens] of their integers.
static void dot_codes(const Weight& w, int64_t row, const uint8_t* x, const Grid* grids, const int32_t* sums, int64_t tokens, int8_t* room,
                      float* y, int64_t y_stride) {
    const int64_t center = w.center();
    expand_row(w, row, center, room);
    float result[kDotRows] = {};
    double total = 0;
    for (int64_t n = 0; n < w.segment_count; ++n) {
        const Segment& s = w.segments[n];
        int32_t products[kDotRows + 1];
        dot_bytes(room + s.start, x + s.start, w.cin, tokens, s.count, AQUABIT_LEVEL == 4 || w.bits <= 7, products);
        const double scale = scale_at(w, row, s.scales), shifted = offset_at(w, row, s.scales) + scale * center;
        for (int64_t t = 0; t < tokens; ++t)
            result[t] += static_cast<float>(scale) * products[t] + static_cast<float>(shifted) * sums[n * tokens + t];
        total += scale * products[tokens] + shifted * s.count;
    }
    for (int64_t t = 0; t < tokens; ++t)
        y[t * y_stride] = (w.bias ? w.bias[row] : 0) + grids[t].scale * (result[t] + grids[t].base * static_cast<float>(total));
}

// Row ``row`` of any weight, decoded, times tokens [tokens, cin].
static void dot_values(const Weight& w, int64_t row, const float* x, int64_t tokens, float* room, float* y, int64_t y_stride) {
    decode_row(w, row, room);
    const int64_t n = w.length();
    for (int64_t t = 0; t < tokens; ++t) {
        const float* token = x + t * n;
        Floats acc[4] = {};
        int64_t i = 0;
        for (; i + 4 * kLanes <= n; i += 4 * kLanes)
            for (int v = 0; v < 4; ++v) acc[v] += load(token + i + v * kLanes) * load(room + i + v * kLanes);
        const Floats sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
        float total = 0, rest = 0;
        for (; i < n; ++i) rest += token[i] * room[i];
        for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
        y[t * y_stride] = total + rest + (w.bias ? w.bias[row] : 0);
    }
}

// The table kernel for one instruction set (foreach_level.h).
//
// Columns are tokens, or the pixels of padded planes in one long row. A table row holds the product of one codeword
// with a group of inputs for every column, so that a code of a weight costs one load and one add for a whole vector of
// columns.

// Tokens [count, stride] at channels [0, channels) to columns: out [channels, width]; columns past count are zero.
static void columns_of(const float* x, int64_t stride, int64_t count, int64_t channels, int64_t width, float* out) {
    for (int64_t t = 0; t < width; t += kLanes)
        for (int64_t c = 0; c < channels; c += kLanes) {
            if (t + kLanes <= count && c + kLanes <= channels) {
                Floats v[kLanes];
                for (int i = 0; i < kLanes; ++i) v[i] = load(x + (t + i) * stride + c);
                transpose(v);
                for (int i = 0; i < kLanes; ++i) store(out + (c + i) * width + t, v[i]);
            } else {
                for (int64_t i = c; i < c + kLanes && i < channels; ++i)
                    for (int64_t j = t; j < t + kLanes; ++j) out[i * width + j] = j < count ? x[j * stride + i] : 0.0f;
            }
        }
}

// Squared length of the inputs of each column: of all (added to total) and of the longest group (largest).
static void squares(const float* const* streams, int64_t span, int64_t width, float* total, float* largest) {
    for (int64_t q = 0; q < width; q += kLanes) {
        Floats sum = splat(0);
        for (int64_t i = 0; i < span; ++i) {
            const Floats x = load(streams[i] + q);
            sum += x * x;
        }
        store(total + q, load(total + q) + sum);
        const Floats most = load(largest + q);
        store(largest + q, sum > most || sum != sum ? sum : most);
    }
}

// aux += sum of weights times streams.
static void weigh(const float* const* streams, const float* weights, int64_t span, int64_t width, float* aux) {
    for (int64_t q = 0; q < width; q += kLanes) {
        Floats sum = load(aux + q);
        for (int64_t i = 0; i < span; ++i) sum += weights[i] * load(streams[i] + q);
        store(aux + q, sum);
    }
}

// Rows of codewords [count, span] times the streams, each column times inverse where rows are int16; rows are ``stride`` columns apart.
// A register block of four rows by two vectors.
template <bool exact>
INLINE void product_rows(const float* codewords, int64_t count, const float* const* streams, int64_t span,
                         const float* inverse, int64_t width, int64_t stride, void* rows) {
    for (int64_t q = 0; q < width; q += 2 * kLanes) {
        Floats x[2 * kSpan];
        const Floats a = exact ? splat(1) : load(inverse + q), b = exact ? splat(1) : load(inverse + q + kLanes);
        for (int64_t i = 0; i < span; ++i) {
            x[2 * i] = exact ? load(streams[i] + q) : load(streams[i] + q) * a;
            x[2 * i + 1] = exact ? load(streams[i] + q + kLanes) : load(streams[i] + q + kLanes) * b;
        }
        int64_t k = 0;
        for (; k + 4 <= count; k += 4) {
            const float* c = codewords + k * span;
            Floats sum[8];
            for (int r = 0; r < 4; ++r) {
                sum[2 * r] = c[r * span] * x[0];
                sum[2 * r + 1] = c[r * span] * x[1];
            }
            for (int64_t i = 1; i < span; ++i)
                for (int r = 0; r < 4; ++r) {
                    sum[2 * r] += c[r * span + i] * x[2 * i];
                    sum[2 * r + 1] += c[r * span + i] * x[2 * i + 1];
                }
            for (int r = 0; r < 4; ++r) {
                if (exact) {
                    float* row = static_cast<float*>(rows) + (k + r) * stride + q;
                    store(row, sum[2 * r]);
                    store(row + kLanes, sum[2 * r + 1]);
                } else {
                    store(static_cast<int16_t*>(rows) + (k + r) * stride + q, low_halves(nearest_short(sum[2 * r]), nearest_short(sum[2 * r + 1])));
                }
            }
        }
        for (; k < count; ++k) {
            Floats low = splat(0), high = splat(0);
            for (int64_t i = 0; i < span; ++i) {
                low += codewords[k * span + i] * x[2 * i];
                high += codewords[k * span + i] * x[2 * i + 1];
            }
            if (exact) {
                float* row = static_cast<float*>(rows) + k * stride + q;
                store(row, low);
                store(row + kLanes, high);
            } else {
                store(static_cast<int16_t*>(rows) + k * stride + q, low_halves(nearest_short(low), nearest_short(high)));
            }
        }
    }
}

static void product_rows_exact(const float* codewords, int64_t count, const float* const* streams, int64_t span,
                               const float*, int64_t width, int64_t stride, void* rows) {
    product_rows<true>(codewords, count, streams, span, nullptr, width, stride, rows);
}

static void product_rows_fast(const float* codewords, int64_t count, const float* const* streams, int64_t span,
                              const float* inverse, int64_t width, int64_t stride, void* rows) {
    if (span == 8) return product_rows<false>(codewords, count, streams, 8, inverse, width, stride, rows);
    if (span == 9) return product_rows<false>(codewords, count, streams, 9, inverse, width, stride, rows);
    product_rows<false>(codewords, count, streams, span, inverse, width, stride, rows);
}

#ifdef AQUABIT_VNNI
// The same with 16-bit dot products: words [count, pairs] of two int16 each, in units of which 65536 times the sums are 32 bits, whose upper
// half is the table's. Half as many multiply-adds as with floats; both roundings are far below the table's own.
static void product_rows_dots(const int32_t* words, int64_t count, const float* const* streams, int64_t span,
                              const float* inverse, float factor, int64_t width, int64_t stride, int16_t* rows) {
    const int64_t pairs = (span + 1) / 2;
    const __m512i half = _mm512_set1_epi32(1 << 15);
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15,
                                           13, 11, 9, 7, 5, 3, 1);
    for (int64_t q = 0; q < width; q += 2 * kLanes) {
        __m512i x[kSpan + 2];
        for (int64_t side = 0; side < 2; ++side) {
            const int64_t at = q + side * kLanes;
            const Floats unit = load(inverse + at) * factor;
            for (int64_t i = 0; i < pairs; ++i) {
                const Floats a = load(streams[2 * i] + at) * unit, b = 2 * i + 1 < span ? load(streams[2 * i + 1] + at) * unit : splat(0);
                const __m512i low = _mm512_cvtps_epi32(reinterpret_cast<__m512>(a)), high = _mm512_cvtps_epi32(reinterpret_cast<__m512>(b));
                x[2 * i + side] = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
            }
        }
        int64_t k = 0;
        for (; k + 4 <= count; k += 4) {
            const int32_t* w = words + k * pairs;
            __m512i a0 = half, a1 = half, b0 = half, b1 = half, c0 = half, c1 = half, d0 = half, d1 = half;
            for (int64_t i = 0; i < pairs; ++i) {
                const __m512i x0 = x[2 * i], x1 = x[2 * i + 1], wa = _mm512_set1_epi32(w[i]), wb = _mm512_set1_epi32(w[pairs + i]);
                const __m512i wc = _mm512_set1_epi32(w[2 * pairs + i]), wd = _mm512_set1_epi32(w[3 * pairs + i]);
                a0 = _mm512_dpwssd_epi32(a0, x0, wa), a1 = _mm512_dpwssd_epi32(a1, x1, wa);
                b0 = _mm512_dpwssd_epi32(b0, x0, wb), b1 = _mm512_dpwssd_epi32(b1, x1, wb);
                c0 = _mm512_dpwssd_epi32(c0, x0, wc), c1 = _mm512_dpwssd_epi32(c1, x1, wc);
                d0 = _mm512_dpwssd_epi32(d0, x0, wd), d1 = _mm512_dpwssd_epi32(d1, x1, wd);
            }
            int16_t* to = rows + k * stride + q;
            store(to, reinterpret_cast<Shorts>(_mm512_permutex2var_epi16(a0, upper, a1)));
            store(to + stride, reinterpret_cast<Shorts>(_mm512_permutex2var_epi16(b0, upper, b1)));
            store(to + 2 * stride, reinterpret_cast<Shorts>(_mm512_permutex2var_epi16(c0, upper, c1)));
            store(to + 3 * stride, reinterpret_cast<Shorts>(_mm512_permutex2var_epi16(d0, upper, d1)));
        }
        for (; k < count; ++k) {
            __m512i a = half, b = half;
            for (int64_t i = 0; i < pairs; ++i) {
                const __m512i w = _mm512_set1_epi32(words[k * pairs + i]);
                a = _mm512_dpwssd_epi32(a, x[2 * i], w), b = _mm512_dpwssd_epi32(b, x[2 * i + 1], w);
            }
            store(rows + k * stride + q, reinterpret_cast<Shorts>(_mm512_permutex2var_epi16(a, upper, b)));
        }
    }
}
#endif

// Two lookups in one: row high * lows + low is the sum of a row of each.
template <class T>
INLINE void sum_rows_of(const void* low, int64_t lows, const void* high, int64_t highs, int64_t width, void* rows) {
    for (int64_t q = 0; q < width; q += kLanesOf<T>)
        for (int64_t h = 0; h < highs; ++h) {
            const Vector<T> b = load(static_cast<const T*>(high) + h * width + q);
            const T* a = static_cast<const T*>(low) + q;
            T* to = static_cast<T*>(rows) + h * lows * width + q;
            for (int64_t l = 0; l < lows; ++l) store(to + l * width, plus(load(a + l * width), b));
        }
}

static void sum_rows(const void* low, int64_t lows, const void* high, int64_t highs, int64_t width, void* rows,
                     bool exact) {
    return exact ? sum_rows_of<float>(low, lows, high, highs, width, rows)
                 : sum_rows_of<int16_t>(low, lows, high, highs, width, rows);
}

#include "gather.h"

// y = scale * sums + aux_scale * aux + bias, in place (factors of rows: 1, 0 where the blocks have applied them).
static void finish(const Call& c, const Tile& t, int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o) {
        const bool done = c.scale_groups > 1;
        const float scale = done ? 1 : c.scale[o], offset = done ? 0 : c.aux_scale[o], bias = c.bias ? c.bias[o] : 0;
        float* sums = t.sums + (o - t.first_row) * t.width;
        for (int64_t q = 0; q < t.width; q += kLanes)
            store(sums + q, load(sums + q) * scale + (load(t.aux + q) * offset + bias));
    }
}

#include "../put_tokens.h"

// One token: a table of 256 products (or as many as there are codewords) for every byte of a row, [bytes, size], then scalar sums.
static void token_products(const float* by_input, int64_t padded, const float* x, int64_t inputs, float* products) {
    for (int64_t k = 0; k < padded; k += kLanes) {
        Floats sum = splat(0);
        for (int64_t i = 0; i < inputs; ++i) sum += x[i] * load(by_input + i * padded + k);
        store(products + k, sum);
    }
}

static void token_pairs(const float* low, int64_t lows, const float* high, int64_t highs, float* products) {
    for (int64_t h = 0; h < highs; ++h)
        for (int64_t l = 0; l < lows; ++l) products[h * lows + l] = low[l] + high[h];
}

static void token_rows(const uint8_t* codes, int64_t row_bytes, int64_t bytes, const float* products, int64_t size, int64_t from,
                       int64_t to, float* sums) {
    for (int64_t o = from; o < to; ++o) {
        const uint8_t* row = codes + o * row_bytes;
        for (int64_t ahead = 0; ahead < bytes; ahead += 64) __builtin_prefetch(row + kAhead * row_bytes + ahead);
        float a = 0, b = 0, c = 0, d = 0;
        int64_t i = 0;
        for (; i + 4 <= bytes; i += 4) {
            const float* at = products + i * size;
            a += at[row[i]];
            b += at[size + row[i + 1]];
            c += at[2 * size + row[i + 2]];
            d += at[3 * size + row[i + 3]];
        }
        for (; i < bytes; ++i) a += products[i * size + row[i]];
        sums[o] = (a + b) + (c + d);
    }
}

static const Level kLevel = {
    kLanes,  columns_of, squares,   weigh,          product_rows_fast, product_rows_exact, sum_rows, gather_rows,
    finish,  put_tokens,  token_products, token_pairs, token_rows,
#ifdef AQUABIT_VNNI
    product_rows_dots,
#else
    nullptr,
#endif
};

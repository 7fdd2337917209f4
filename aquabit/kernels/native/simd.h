// The vectors of one instruction set, kLanes dwords long, and what kernels do with them; foreach_level.h includes this
// in the namespace of each level. Sums of vectors, products and comparisons are written with the operators of the
// compilers' vector types; here is what these lack, or what the compilers make of it lane by lane.

constexpr int kBytes = 4 * kLanes;
typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef int16_t Shorts __attribute__((vector_size(kBytes)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(kBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef int16_t HalfShorts __attribute__((vector_size(kBytes / 2)));
typedef uint8_t HalfBytes __attribute__((vector_size(kBytes / 2)));

// The vector of a type of values, for templates.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef Floats Type;
};
template <>
struct VectorOf<int16_t> {
    typedef Shorts Type;
};
template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr int kLanesOf = kBytes / sizeof(T);

// ---- Memory, at any address

typedef float UnalignedFloats __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef int16_t UnalignedShorts __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef uint8_t UnalignedBytes __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef uint8_t UnalignedHalfBytes __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));

INLINE Floats load(const float* x) { return *reinterpret_cast<const UnalignedFloats*>(x); }
INLINE void store(float* x, Floats v) { *reinterpret_cast<UnalignedFloats*>(x) = v; }
INLINE Shorts load(const int16_t* x) { return *reinterpret_cast<const UnalignedShorts*>(x); }
INLINE void store(int16_t* x, Shorts v) { *reinterpret_cast<UnalignedShorts*>(x) = v; }
INLINE Bytes load(const uint8_t* x) { return *reinterpret_cast<const UnalignedBytes*>(x); }
INLINE HalfBytes load_half(const uint8_t* x) { return *reinterpret_cast<const UnalignedHalfBytes*>(x); }
INLINE void store(int8_t* x, Bytes v) { *reinterpret_cast<UnalignedBytes*>(x) = v; }
INLINE Ints load_ints(const void* x) { return *reinterpret_cast<const UnalignedInts*>(x); }
INLINE void store_ints(void* x, Ints v) { *reinterpret_cast<UnalignedInts*>(x) = v; }

// Past the caches, where a vector is a line of them and lies as one: memory that is not read first. Other threads see it after the end.
INLINE bool whole_lines([[maybe_unused]] const float* x) { return AQUABIT_LEVEL == 4 && reinterpret_cast<uintptr_t>(x) % 64 == 0; }
INLINE void store_past(float* x, Ints v) {
#if AQUABIT_LEVEL == 4
    _mm512_stream_si512(reinterpret_cast<__m512i*>(x), (__m512i)v);
#else
    store_ints(x, v);
#endif
}
INLINE void end_of_past() {
#if AQUABIT_LEVEL == 4
    _mm_sfence();
#endif
}

// bfloat16 as float32.
INLINE Floats load_narrow(const uint16_t* x) {
#if AQUABIT_LEVEL == 4
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16);
#elif AQUABIT_LEVEL == 3
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16);
#else
    Words wide;
    for (int lane = 0; lane < kLanes; ++lane) wide[lane] = uint32_t(x[lane]) << 16;
    return (Floats)wide;
#endif
}

// The first ``left`` values (none where it is below 1), and zeros.
INLINE Floats load_some(const float* x, int64_t left) {
    if (left >= kLanes) return load(x);
    if (left <= 0) return Floats{};
#if AQUABIT_LEVEL == 4
    return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), x);
#else
    Floats some = {};
    for (int64_t i = 0; i < left; ++i) some[i] = x[i];
    return some;
#endif
}

INLINE Bytes load_some(const uint8_t* x, int64_t left) {
    if (left >= kBytes) return load(x);
    if (left <= 0) return Bytes{};
#if AQUABIT_LEVEL == 4
    return (Bytes)_mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, x);
#else
    uint8_t some[kBytes] = {};
    for (int64_t i = 0; i < left; ++i) some[i] = x[i];
    return load(some);
#endif
}

// The first ``left`` values (below kBytes; none where it is below 1) to memory.
INLINE void store_some(int8_t* to, Bytes v, int64_t left) {
    if (left <= 0) return;
#if AQUABIT_LEVEL == 4
    _mm512_mask_storeu_epi8(to, (uint64_t(1) << left) - 1, (__m512i)v);
#else
    int8_t some[kBytes];
    store(some, v);
    for (int64_t i = 0; i < left; ++i) to[i] = some[i];
#endif
}

// Bytes as dwords.
INLINE Words load_widened(const uint8_t* x) {
#if AQUABIT_LEVEL == 4
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#elif AQUABIT_LEVEL == 3
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
#else
    Words wide;
    for (int lane = 0; lane < kLanes; ++lane) wide[lane] = x[lane];
    return wide;
#endif
}

// The lower 16 bits of kLanes integers that fit them.
INLINE void store_narrowed(int16_t* to, Ints x) {
#if AQUABIT_LEVEL == 4
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)x));
#elif AQUABIT_LEVEL == 3
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x, (__m256i)x), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(both));
#else
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<int16_t>(x[lane]);
#endif
}

// ---- One value in all lanes

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Ints splat_int(int32_t x) { return x - Ints{}; }
INLINE Bytes splat_byte(uint8_t x) { return x - Bytes{}; }

// The dword at an address: four inputs of 8 bits, or two of 16.
INLINE Ints broadcast(const uint8_t* at) {
    int32_t dword;
    __builtin_memcpy(&dword, at, sizeof dword);
    return splat_int(dword);
}

INLINE Ints lane_numbers() {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes;
}

// ---- Lane by lane

INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats plus(Floats a, Floats b) { return a + b; }
INLINE Shorts plus(Shorts a, Shorts b) {  // modulo 2^16: sums may leave 16 bits on the way
    return reinterpret_cast<Shorts>(reinterpret_cast<UnsignedShorts>(a) + reinterpret_cast<UnsignedShorts>(b));
}

#if AQUABIT_LEVEL == 3
// Products of unsigned x and signed w of 8 bits, those of neighbours added up: these cannot saturate, 2 * 255 * 64 < 2^15 for w of
// 7 bits. And sums of 16 bits, those of neighbours added up.
INLINE Shorts pairs(Ints x, Ints w) { return (Shorts)_mm256_maddubs_epi16((__m256i)x, (__m256i)w); }
INLINE Ints widened(Shorts sums) { return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#endif

// Bits of the signed values that ``dot`` takes as bytes.
#ifdef AQUABIT_VNNI
constexpr int kByteBits = 8;
#else
constexpr int kByteBits = 7;
#endif

// sum + the product of unsigned x and signed w of 8 bits (from AVX2 on), or (``wide``) of both signed of 16, added up by
// dwords. ``wide`` is a constant where this is called.
INLINE Ints dot(Ints sum, Ints x, Ints w, [[maybe_unused]] const bool wide) {
#if defined(AQUABIT_VNNI) && AQUABIT_LEVEL == 4
    return wide ? (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w)
                : (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(AQUABIT_VNNI)
    return wide ? (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w)
                : (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#elif AQUABIT_LEVEL == 3
    return sum + (wide ? (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)w) : widened(pairs(x, w)));
#elif AQUABIT_LEVEL == 2
    return sum + (Ints)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
    return sum + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
}

// Bit i: a[i] <= b[i]; and a[i] < b[i].
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
#if AQUABIT_LEVEL == 4
INLINE uint32_t below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
#elif AQUABIT_LEVEL == 3
INLINE uint32_t below(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
#endif

// ---- Conversions

INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// By intrinsics: a copy through memory would keep the sums of an inner loop there too.
INLINE void to_floats(Shorts x, Floats* low, Floats* high) {
#if AQUABIT_LEVEL == 4
    const __m512i v = reinterpret_cast<__m512i>(x);
    *low = reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(v))));
    *high = reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(v, 1))));
#elif AQUABIT_LEVEL == 3
    const __m256i v = reinterpret_cast<__m256i>(x);
    *low = reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v))));
    *high = reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1))));
#elif AQUABIT_LEVEL == 2
    const __m128i v = reinterpret_cast<__m128i>(x);
    *low = reinterpret_cast<Floats>(_mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(v, v), 16)));
    *high = reinterpret_cast<Floats>(_mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpackhi_epi16(v, v), 16)));
#else
    HalfShorts a, b;
    __builtin_memcpy(&a, &x, sizeof a);
    __builtin_memcpy(&b, reinterpret_cast<const char*>(&x) + sizeof a, sizeof b);
    *low = __builtin_convertvector(a, Floats);
    *high = __builtin_convertvector(b, Floats);
#endif
}

// To the nearest integers, of what fits 31 bits.
INLINE Ints nearest(Floats x) {
#if AQUABIT_LEVEL == 4
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#elif AQUABIT_LEVEL == 3
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#elif AQUABIT_LEVEL == 2
    return (Ints)_mm_cvtps_epi32((__m128)x);
#else
    Ints y;
    for (int lane = 0; lane < kLanes; ++lane) y[lane] = static_cast<int32_t>(__builtin_rintf(x[lane]));
    return y;
#endif
}

// To the nearest integers in the low half of each lane, of what fits 16 bits: adding 1.5 * 2^23 leaves them in the mantissa.
INLINE Ints nearest_short(Floats x) { return reinterpret_cast<Ints>(x + 12582912.0f); }

// The low halves of the lanes of both.
INLINE Shorts low_halves(Ints low, Ints high) {
#if AQUABIT_LEVEL == 4
    return reinterpret_cast<Shorts>(_mm512_permutex2var_epi16(
        reinterpret_cast<__m512i>(low),
        _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16,
                         14, 12, 10, 8, 6, 4, 2, 0),
        reinterpret_cast<__m512i>(high)));
#else
    const HalfShorts a = __builtin_convertvector(low, HalfShorts), b = __builtin_convertvector(high, HalfShorts);
    Shorts both;
    __builtin_memcpy(&both, &a, sizeof a);
    __builtin_memcpy(reinterpret_cast<char*>(&both) + sizeof a, &b, sizeof b);
    return both;
#endif
}

// The nearest bfloat16 (ties to even, any NaN to one), as torch does, in the low halves.
INLINE Ints to_narrow(Floats x) {
    const Words bits = (Words)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
    return x == x ? (Ints)rounded >> 16 : splat_int(0x7fc0);
}

// ---- Across lanes

INLINE float least(Floats v) {
#if AQUABIT_LEVEL == 4
    return _mm512_reduce_min_ps(v);
#else
    float low = v[0];
    for (int i = 1; i < kLanes; ++i) low = v[i] < low ? v[i] : low;
    return low;
#endif
}

INLINE float total_of(Floats x) {
#if AQUABIT_LEVEL == 4
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
    return total;
#endif
}

INLINE int32_t total_of(Ints x) {
#if AQUABIT_LEVEL == 4
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    uint32_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += static_cast<uint32_t>(x[lane]);
    return static_cast<int32_t>(total);
#endif
}

// Lane i: number from[i] of a and b, one after the other.
template <class V>
INLINE V shuffled(V a, V b, Ints from) {
#if defined(__clang__)
    V out;
    for (int i = 0; i < kLanes; ++i) out[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
    return out;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// 16 bytes in every 16 of a vector, and byte by byte those that ``codes`` below 16 choose.
INLINE Bytes repeat_sixteen(const uint8_t* x) {
    Bytes all;
    for (int i = 0; i < kBytes; i += 16) __builtin_memcpy(reinterpret_cast<char*>(&all) + i, x, 16);
    return all;
}

INLINE Bytes look_up(Bytes table, Bytes codes) {
#if AQUABIT_LEVEL == 4
    return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif AQUABIT_LEVEL == 3
    return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
#else
    Bytes found;
    for (int i = 0; i < kBytes; ++i) found[i] = table[codes[i]];
    return found;
#endif
}

// kLanes vectors of dwords, as a square, transposed.
template <class V>
INLINE void transpose(V* v) {
    V w[kLanes];
    Ints low, high;
    for (int i = 0; i < kLanes; ++i) {
        low[i] = i / 2 + (i % 2) * kLanes;
        high[i] = low[i] + kLanes / 2;
    }
    // Interleaving row i with row i + kLanes / 2, log2(kLanes) times.
    for (int step = 1; step < kLanes; step *= 2) {
        for (int i = 0; i < kLanes / 2; ++i) {
            w[2 * i] = shuffled(v[i], v[i + kLanes / 2], low);
            w[2 * i + 1] = shuffled(v[i], v[i + kLanes / 2], high);
        }
        for (int i = 0; i < kLanes; ++i) v[i] = w[i];
    }
}

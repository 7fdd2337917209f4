// What this machine can do, for the roofline of benchmarks/kernels.py: each function returns seconds per unit of work, on one core.
// Built by benchmarks/kernel_roofline.py with the compiler's own idea of the machine (-O3 -march=native); plain C interfaces for ctypes.

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define HAS_DOTS 1
#else
#define HAS_DOTS 0
#endif

typedef int16_t Shorts __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Space {
    char* at;
    explicit Space(int64_t bytes) : at(static_cast<char*>(std::aligned_alloc(4096, (bytes + 8191) / 4096 * 4096))) {
        for (int64_t i = 0; i < bytes; ++i) at[i] = static_cast<char>(i * 7);
    }
    ~Space() { std::free(at); }
};

// Rows of V vectors of 64 bytes, picked by bytes of code from tables of ``rows`` rows and added: the table kernel's inner loop.
template <int V>
__attribute__((noinline)) void gather(const char* tables, int64_t rows, const uint8_t* codes, int64_t lookups, int64_t out, Shorts* sums) {
    for (int64_t o = 0; o < out; ++o) {
        Shorts a[V] = {}, b[V] = {};
        const uint8_t* c = codes + o * lookups;
        const char* t = tables;
        const int64_t step = rows * V * 64;
        for (int64_t i = 0; i < lookups; i += 8) {
#pragma GCC unroll 8
            for (int u = 0; u < 8; ++u, t += step) {
                const Shorts* row = reinterpret_cast<const Shorts*>(t + c[i + u] * (V * 64));
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) (u % 2 ? b : a)[v] += row[v];
            }
        }
        for (int v = 0; v < V; ++v) sums[v] += a[v] + b[v];
    }
}

template <class Run>
double best(int repeats, double units, const Run& run) {
    double least = 1e9;
    for (int r = 0; r < repeats; ++r) {
        const double begun = now();
        run();
        const double took = now() - begun;
        if (took < least) least = took;
    }
    return least / units;
}

template <int V>
double lookup(int64_t rows, int64_t lookups, int repeats) {
    const int64_t out = 1152;
    Space tables(rows * lookups * V * 64), sums(V * 64);
    Space codes(out * lookups + 64);
    for (int64_t i = 0; i < out * lookups; ++i) codes.at[i] = static_cast<char>(std::rand() % rows);
    return best(repeats, static_cast<double>(out) * lookups * V, [&] {
        gather<V>(tables.at, rows, reinterpret_cast<const uint8_t*>(codes.at), lookups, out, reinterpret_cast<Shorts*>(sums.at));
    });
}

}  // namespace

extern "C" {

// Seconds of a load of 64 bytes from one of ``lookups`` (a multiple of 8) tables of ``rows`` rows of ``vectors`` (1, 2, 4) and its add.
double lookup_seconds(int64_t rows, int64_t lookups, int vectors, int repeats) {
    return vectors == 4 ? lookup<4>(rows, lookups, repeats) : vectors == 2 ? lookup<2>(rows, lookups, repeats) : lookup<1>(rows, lookups, repeats);
}

// Seconds of a multiply-add of one number, all lanes of all vectors busy: kind 0 float32, 1 bfloat16, 2 int16, 3 int8; 0 where there is none.
double multiply_add_seconds(int kind, int repeats) {
    const int chains = 16, rounds = 20000;
    const int lanes[] = {16, 32, 32, 64};
    const double units = static_cast<double>(chains) * rounds * lanes[kind];
    volatile int32_t keep = 0;
    if (kind == 0) {
        Floats a[chains] = {}, x = a[0] + 0.5f, y = a[0] + 0.25f;
        asm volatile("" : "+m"(x), "+m"(y), "+m"(a));  // chains that the compiler knew to be equal would become one
        const double found = best(repeats, units, [&] {
            for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
                for (int i = 0; i < chains; ++i) a[i] = a[i] * x + y;
            }
            for (int i = 0; i < chains; ++i) keep += static_cast<int32_t>(a[i][0]);
        });
        return found;
    }
#if HAS_DOTS
// Each product is held in its register: copies of all chains in every round would take as long as the products where there are two a cycle.
#define DOTS(KIND, TYPE, ZERO, OP)                                            \
    if (kind == KIND)                                                         \
        return best(repeats, units, [&] {                                     \
            TYPE a[chains];                                                   \
            __m512i x = _mm512_set1_epi32(0x01010101);                        \
            asm volatile("" : "+v"(x));                                       \
            for (int i = 0; i < chains; ++i) a[i] = ZERO();                   \
            for (int r = 0; r < rounds; ++r) {                                \
                _Pragma("GCC unroll 16") for (int i = 0; i < chains; ++i) {   \
                    a[i] = OP;                                                \
                    asm volatile("" : "+v"(a[i]));                            \
                }                                                             \
            }                                                                 \
            for (int i = 0; i < chains; ++i) asm volatile("" : : "v"(a[i]));  \
        });
    DOTS(1, __m512, _mm512_setzero_ps, _mm512_dpbf16_ps(a[i], reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(x)))
    DOTS(2, __m512i, _mm512_setzero_si512, _mm512_dpwssd_epi32(a[i], x, x))
    DOTS(3, __m512i, _mm512_setzero_si512, _mm512_dpbusd_epi32(a[i], x, x))
#undef DOTS
#endif
    return 0;
}

// Seconds of storing 64 bytes to a table of ``bytes`` that was just there.
double store_seconds(int64_t bytes, int repeats) {
    Space room(bytes);
    Shorts value = {};
    return best(repeats, bytes / 64.0 * 16, [&] {
        for (int r = 0; r < 16; ++r) {
            asm volatile("" : "+m"(value));
            for (int64_t i = 0; i < bytes / 64; ++i) reinterpret_cast<Shorts*>(room.at)[i] = value;
            asm volatile("" ::: "memory");
        }
    });
}

// Seconds of reading a byte of ``bytes`` in order.
double read_seconds(int64_t bytes, int repeats) {
    Space room(bytes);
    Ints sum = {};
    const double found = best(repeats, static_cast<double>(bytes), [&] {
        const Ints* at = reinterpret_cast<const Ints*>(room.at);
        Ints a = {}, b = {}, c = {}, d = {};
        for (int64_t i = 0; i + 4 <= bytes / 64; i += 4) a += at[i], b += at[i + 1], c += at[i + 2], d += at[i + 3];
        sum += a + b + c + d;
        asm volatile("" : "+m"(sum));
    });
    return found;
}

// Seconds of one float picked by a byte of code from tables of 256 and added, as for one token.
double scalar_lookup_seconds(int64_t lookups, int repeats) {
    const int64_t out = 256;
    Space tables(lookups * 1024), codes(out * lookups);
    float total = 0;
    for (int64_t i = 0; i < lookups * 256; ++i) reinterpret_cast<float*>(tables.at)[i] = 1;
    const double found = best(repeats, static_cast<double>(out) * lookups, [&] {
        for (int64_t o = 0; o < out; ++o) {
            float a = 0, b = 0, c = 0, d = 0;
            const float* t = reinterpret_cast<const float*>(tables.at);
            const uint8_t* row = reinterpret_cast<const uint8_t*>(codes.at) + o * lookups;
            for (int64_t i = 0; i + 4 <= lookups; i += 4, t += 1024) {
                a += t[row[i]], b += t[256 + row[i + 1]], c += t[512 + row[i + 2]], d += t[768 + row[i + 3]];
            }
            total += a + b + c + d;
        }
        asm volatile("" : "+m"(total));
    });
    return found;
}

}  // extern "C"

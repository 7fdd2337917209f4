// Codes of the additive quantizer, all rows of a block of groups in one call: group after group, and for each of them every row's search
// (a pass of coordinate descent, and a beam; see additive_level.h) and what its outcome means for the groups after it.
//
// The same source serves every instruction set; which one runs is chosen at run time. Rows are independent of each other, so how many
// threads share them changes nothing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace {

constexpr float kInfinity = __builtin_inff(), kLargest = FLT_MAX, kSmall = 1e-30f;
constexpr int kTile = 4;                     // rows that share what is loaded
constexpr int64_t kCodebooks = 64;           // at most
constexpr int64_t kRanked = 64;              // candidates that are ranked by counting; more are inserted one by one
constexpr int64_t kPairFloats = 4 << 20;     // products of pairs of codewords are kept up to 16 MiB
constexpr int64_t kParallel = 1 << 17;       // multiply-adds below which other threads are not woken

// One call. Rows are [blocks, rows, groups * size], C-contiguous.
struct Block {
    float* target;          // feedback: the weights, which later groups' are changed in; sweep: the gradient, likewise
    const float* before;    // sweep: the decoded weights; feedback: null, and codes are searched from nothing
    const float* metric;    // [blocks, groups, size, size]
    const float* inverse;   // feedback: [blocks, groups, size, size] that errors are multiplied by, or null
    const float* coupling;  // [blocks, groups * size, groups * size], or null where groups do not meet
    const float* scale;     // [blocks, rows]
    const float* tables;    // [tables, codebooks, codewords, size]
    int64_t* codes;         // [blocks, rows, groups, codebooks]
    float* moved;           // out: feedback's errors, the change of a sweep
    int64_t blocks, rows, groups, table_sets, codebooks, codewords, size, beam;
};

#if defined(__clang__)
#define PUSH_TARGET(options) _Pragma(options)
#endif

#if defined(__x86_64__)
#define AQUABIT_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace avx512 {
constexpr int kLanes = 16;
#define AQUABIT_LEVEL 4
#include "additive_level.h"
#undef AQUABIT_LEVEL
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kLanes = 8;
#define AQUABIT_LEVEL 3
#include "additive_level.h"
#undef AQUABIT_LEVEL
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace baseline {
constexpr int kLanes = 4;
#if defined(__x86_64__)
#define AQUABIT_LEVEL 2
#else
#define AQUABIT_LEVEL 0
#endif
#include "additive_level.h"
#undef AQUABIT_LEVEL
}  // namespace baseline

struct Free {
    void operator()(float* x) const { ::operator delete[](x, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Zeros, aligned to the longest vectors.
Buffer zeros(int64_t count) {
    float* x = static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64)));
    std::fill(x, x + count, 0.0f);
    return Buffer(x);
}

int64_t rounded_up(int64_t n) { return (n + 15) / 16 * 16; }

// fn(from, to, part) over [0, count) in contiguous parts.
template <class Function>
void in_parts(int64_t count, int threads, int64_t align, const Function& fn) {
    const int64_t units = (count + align - 1) / align, parts = std::min<int64_t>(threads, units);
    if (parts <= 1) return fn(int64_t(0), count, int64_t(0));
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part)
        fn(units * part / parts * align, std::min(count, units * (part + 1) / parts * align), part);
}

bool keeps_pairs(const Block& b, int64_t floats) {
    return b.codebooks > 1 && floats <= kPairFloats && b.rows * std::max<int64_t>(b.beam, 1) * 2 >= b.codebooks * b.codewords;
}

#define AQUABIT_RUN(LEVEL)                                                                                                              \
    namespace LEVEL {                                                                                                                   \
    void run_block(const Block& b, int64_t z, int threads, const float* codewords, const float* by_size) {                              \
        const int64_t wide = padded(b.codewords), tall = padded(b.size), g = b.size, all = b.codebooks * wide;                         \
        const int64_t pair_rows = b.codebooks * (b.codebooks - 1) / 2 * b.codewords;                                                    \
        const bool with_pairs = keeps_pairs(b, pair_rows * wide);                                                                       \
        const Buffer images = zeros(g * all), own = zeros(all), metric = zeros(g * tall), inverse = zeros(g * tall);                    \
        const Buffer pairs = zeros(with_pairs ? pair_rows * wide : 0);                                                                  \
        const int64_t room_size = rounded_up(scratch_floats(b));                                                                        \
        const Buffer room = zeros(room_size * threads);                                                                                 \
        const Group group{codewords, by_size, images.get(), own.get(), with_pairs ? pairs.get() : nullptr, metric.get(),                \
                          b.inverse ? inverse.get() : nullptr};                                                                         \
        for (int64_t n = 0; n < b.groups; ++n) {                                                                                        \
            const float* of_group = b.metric + (z * b.groups + n) * g * g;                                                              \
            const float* inverse_of_group = b.inverse ? b.inverse + (z * b.groups + n) * g * g : nullptr;                               \
            for (int64_t i = 0; i < g * g; ++i) {                                                                                       \
                metric[i / g * tall + i % g] = of_group[i];                                                                             \
                if (inverse_of_group) inverse[i / g * tall + i % g] = inverse_of_group[i];                                              \
            }                                                                                                                           \
            in_parts(all / kLanes, all * g * g > kParallel ? threads : 1, 1, [&](int64_t from, int64_t to, int64_t) {                   \
                project(b, of_group, by_size, images.get(), own.get(), from, to);                                                       \
            });                                                                                                                         \
            if (with_pairs)                                                                                                             \
                in_parts(pair_rows, pair_rows * wide * g > kParallel ? threads : 1, 1, [&](int64_t from, int64_t to, int64_t) {         \
                    pair_up(b, group, pairs.get(), from, to);                                                                           \
                });                                                                                                                     \
            in_parts(b.rows, b.rows * all * (g + b.beam) > kParallel ? threads : 1, kTile, [&](int64_t from, int64_t to, int64_t part) { \
                search_rows(b, group, z, n, from, to, room.get() + part * room_size);                                                   \
            });                                                                                                                         \
        }                                                                                                                               \
    }                                                                                                                                   \
    void run(const Block& b, int threads) {                                                                                             \
        const int64_t wide = padded(b.codewords), tall = padded(b.size), all = b.codebooks * wide;                                      \
        const int64_t one = rounded_up(b.codebooks * b.codewords * tall), other = rounded_up(b.size * all);                             \
        const Buffer tables = zeros(b.table_sets * (one + other));                                                                      \
        for (int64_t t = 0; t < b.table_sets; ++t) {                                                                                    \
            float* here = tables.get() + t * (one + other);                                                                             \
            arrange(b, b.tables + t * b.codebooks * b.codewords * b.size, here, here + one);                                            \
        }                                                                                                                               \
        const bool many = b.blocks >= 2 * threads;                                                                                      \
        in_parts(b.blocks, many ? threads : 1, 1, [&](int64_t from, int64_t to, int64_t) {                                              \
            for (int64_t z = from; z < to; ++z) {                                                                                       \
                const float* here = tables.get() + z / (b.blocks / b.table_sets) * (one + other);                                       \
                run_block(b, z, many ? 1 : threads, here, here + one);                                                                  \
            }                                                                                                                           \
        });                                                                                                                             \
    }                                                                                                                                   \
    }

#ifdef AQUABIT_X86
AQUABIT_RUN(avx512)
AQUABIT_RUN(avx2)
#endif
AQUABIT_RUN(baseline)

struct Level {
    const char* name;
    void (*run)(const Block&, int);
    bool usable;
};

// Best first.
const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found;
#ifdef AQUABIT_X86
        __builtin_cpu_init();
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (v4) found.push_back({"avx512", avx512::run, true});
        if (v3) found.push_back({"avx2", avx2::run, true});
#endif
        found.push_back({"baseline", baseline::run, true});
        return found;
    }();
    return all;
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.emplace_back(level.name);
    return names;
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

}  // namespace

void define_additive(nb::module_& m) {
    using namespace nb::literals;
    m.def("additive_levels", &level_names);
    m.def(
        "additive_search",
        [](uintptr_t target, uintptr_t before, uintptr_t metric, uintptr_t inverse, uintptr_t coupling, uintptr_t scale, uintptr_t tables,
           uintptr_t codes, uintptr_t moved, int64_t blocks, int64_t rows, int64_t groups, int64_t table_sets, int64_t codebooks,
           int64_t codewords, int64_t size, int64_t beam, int threads, int64_t level) {
            const Block block{reinterpret_cast<float*>(target), floats(before), floats(metric), floats(inverse), floats(coupling),
                              floats(scale), floats(tables), reinterpret_cast<int64_t*>(codes), reinterpret_cast<float*>(moved),
                              blocks, rows, groups, table_sets, codebooks, codewords, size, beam};
            levels().at(level).run(block, threads);
        },
        "target"_a, "before"_a, "metric"_a, "inverse"_a, "coupling"_a, "scale"_a, "tables"_a, "codes"_a, "moved"_a, "blocks"_a, "rows"_a,
        "groups"_a, "table_sets"_a, "codebooks"_a, "codewords"_a, "size"_a, "beam"_a, "threads"_a, "level"_a,
        nb::call_guard<nb::gil_scoped_release>());
}

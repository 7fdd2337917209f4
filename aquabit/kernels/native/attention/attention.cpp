// Attention whose probabilities are rounded to 8 bits per query: softmax(q k^T scale + mask), rounded, times v.
//
// Blocks of queries meet all keys of their head: their scores are held, those of no others. The same source serves every
// instruction set; which one runs is chosen at run time. A query's result is one sum in one order, whatever block and
// thread it falls to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "../memory.h"
#include "../processor.h"
#include "types.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kScoresBytes = 1 << 19;   // of a block, at most, which the second-level cache holds beside other things
constexpr int64_t kMostQueries = 64;        // of a block
constexpr int64_t kFewKeys = 64;            // for so few a grid is not looked for
constexpr int64_t kParallel = 1 << 20;      // fewer multiply-adds than this are done before other threads are awake

template <int number>
struct Constant {
    static constexpr int value = number;
};

#define AQUABIT_AVX512VNNI
#define AQUABIT_AVXVNNI
#define AQUABIT_AVX512
#define AQUABIT_EACH_LEVEL "attention/level.h"
#define AQUABIT_TILES "attention/level.h"
#include "../foreach_level.h"

using Numbers = std::vector<int64_t>;

// A tensor as Python gives it: its address, the strides of all dimensions, and what kind of values it has.
Rows rows_of(uintptr_t address, const Numbers& strides, size_t dimensions, bool narrow) {
    if (strides.size() != dimensions + 2 || strides.back() != 1) throw nb::value_error("attention needs a stride for each dimension, the last one 1");
    return {reinterpret_cast<void*>(address), strides.data(), strides[dimensions], narrow};
}

// Steps of the tokens of each sample of Q and K, and whether there are some for all of them.
struct Grids {
    std::vector<Step> q, k;
    std::vector<char> whole;
};

// Of ``count`` tokens of sample ``sample``, whose heads lie side by side.
bool read_steps(const Level& at, const Attention& a, const Rows& rows, StepKind kind, int64_t sample, int64_t count, int64_t threads,
                Step* steps) {
    const int64_t last = a.dimensions - 1, length = (a.dimensions ? a.sizes[last] : 1) * a.d;
    int64_t offset = 0;
    for (int64_t i = last - 1; i >= 0; sample /= a.sizes[i--]) offset += sample % a.sizes[i] * rows.strides[i];
    const float* const tokens = static_cast<const float*>(rows.data) + offset;
    if (!at.step_of(kind, tokens, length, steps)) return false;  // mostly the first one shows it
    std::atomic<bool> all{true};
    in_parts(count, count * length > kParallel / 4 ? threads : 1, 1, [&](int64_t from, int64_t to, int64_t) {
        for (int64_t t = from; t < to && all; ++t)
            if (!at.step_of(kind, tokens + t * rows.stride, length, steps + t)) all = false;
    });
    return all;
}

// Each sample for itself, so that none depends on others of its batch.
Grids find_grids(const Level& at, const Attention& a, int64_t samples, int64_t threads) {
    Grids g = {std::vector<Step>(samples * a.n), std::vector<Step>(samples * a.m), std::vector<char>(samples, 0)};
    const int64_t last = a.dimensions - 1;
    if (last >= 0 && a.sizes[last] > 1 && (a.q.strides[last] != a.d || a.k.strides[last] != a.d)) return g;
    for (int64_t s = 0; s < samples; ++s)
        for (const StepKind kind : {StepKind::eight, StepKind::six, StepKind::symmetric})
            if (read_steps(at, a, a.q, kind, s, a.n, threads, &g.q[s * a.n])) {
                g.whole[s] = read_steps(at, a, a.k, kind, s, a.m, threads, &g.k[s * a.m]);
                break;
            }
    return g;
}

// q [sizes.., n, d], k [sizes.., m, d], v [sizes.., m, e] to y [sizes.., n, e]; all bfloat16 or (not ``narrow``) float32. 0 where
// a value is not finite or beyond 1e30: y is not complete then; else 2 where all of Q and K were multiplied as integers, and 1.
int64_t attend(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t y, uintptr_t mask, const Numbers& q_strides, const Numbers& k_strides,
            const Numbers& v_strides, const Numbers& y_strides, const Numbers& mask_strides, int64_t mask_kind, const Numbers& sizes,
            const Numbers& lengths, float scale, bool narrow, int64_t threads, int64_t level) {
    const size_t d = sizes.size();
    if (lengths.size() != 4 || *std::min_element(lengths.begin(), lengths.end()) < 1) throw nb::value_error("attention needs n, m, d and e, each at least 1");
    if (mask_kind < 0 || mask_kind > 3 || (mask_kind && mask_strides.size() != d + 2)) throw nb::value_error("attention needs a mask's kind and its strides");
    const Level& at = level_at(level);
    int64_t heads = 1;
    for (const int64_t size : sizes) heads *= size;
    Attention a{rows_of(q, q_strides, d, narrow), rows_of(k, k_strides, d, narrow), rows_of(v, v_strides, d, narrow),
                rows_of(y, y_strides, d, narrow), {static_cast<MaskKind>(mask_kind), nullptr, nullptr, 0, 0},
                sizes.data(), static_cast<int64_t>(d), lengths[0], lengths[1], lengths[2], lengths[3], 0, scale, nullptr, nullptr, nullptr, false};
    if (mask_kind) a.mask = {a.mask.kind, reinterpret_cast<const void*>(mask), mask_strides.data(), mask_strides[d], mask_strides[d + 1]};
    threads = heads * a.n * a.m * (a.d + a.e) > kParallel ? threads : 1;
    // As many queries as the cache holds scores of, fewer where there is not a block for each thread.
    const int64_t held = std::clamp(kScoresBytes / (4 * a.m), at.rows, kMostQueries);
    a.block = rounded_up(std::min({held, a.n, ceil_divide(heads * a.n, threads)}), at.rows);
    Grids grids;
    if (at.step_of && !narrow && a.m >= kFewKeys) {
        grids = find_grids(at, a, d ? heads / sizes[d - 1] : 1, threads);
        const auto on_grid = std::count(grids.whole.begin(), grids.whole.end(), 1);
        a.q_steps = grids.q.data(), a.k_steps = grids.k.data(), a.whole = on_grid ? grids.whole.data() : nullptr;
        a.all_whole = on_grid == static_cast<int64_t>(grids.whole.size());
    }
    const int64_t room = at.room(a);
    std::atomic<bool> finite{true};
    in_parts(heads * a.blocks(), threads, 1, [&](int64_t from, int64_t to, int64_t) {
        const Buffer<unsigned char> own(room);
        if (!at.part(a, from, to, own.get())) finite = false;
    });
    return !finite ? 0 : a.all_whole ? 2 : 1;
}

}  // namespace

void define_attention(nb::module_& m) {
    using namespace nb::literals;
    m.def("attention_levels", &level_names);
    m.def("attention", &attend, "q"_a, "k"_a, "v"_a, "y"_a, "mask"_a, "q_strides"_a, "k_strides"_a, "v_strides"_a, "y_strides"_a,
          "mask_strides"_a, "mask_kind"_a, "sizes"_a, "lengths"_a, "scale"_a, "narrow"_a, "threads"_a, "level"_a,
          nb::call_guard<nb::gil_scoped_release>());
}

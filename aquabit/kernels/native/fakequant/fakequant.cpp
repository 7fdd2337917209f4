// Fused dynamic fake quantization of activations, float32 to float32, contiguous.
//
//   bits: scale = (max - min) / (2^bits - 1)     zero = rint(-min / scale)     y = clamp(rint(x / scale), -zero, 2^bits - 1 - zero) * scale
//   symmetric: scale = max|x| / 127              y = clamp(rint(x / scale), -127, 127) * scale
//   e4m3: scale = max|x| / 448                   y = e4m3fn(x / scale) * scale
//
// The same formulas as fake_quantize_reference, operation by operation (x / scale is x * (1 / scale) but for e4m3), so results are equal to
// the bit. Everything stays in floating point: no conversion to integers that a NaN or a huge value could make undefined.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../limits.h"
#include "../processor.h"
#include "../rounding.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kParallel = 32768;  // fewer elements than this are done before other threads are awake
constexpr int64_t kBlock = 16384;     // elements of one piece of a row that several threads share
constexpr int64_t kTile = 4096;       // elements of a tile of short rows, at most kTileRows of them
constexpr int64_t kTileRows = 16;

struct Grid {
    float scale, inverse, low, high;  // low and high in steps
};

// What is compiled for each instruction set: level.h.
struct Level {
    void (*find_limits)(const float* x, int64_t n, Limits*);
    void (*to_grid)(const float* x, float* y, int64_t n, const Grid*);
    void (*to_e4m3)(const float* x, float* y, int64_t n, const Grid*);
};

#define AQUABIT_AVX512
#define AQUABIT_EACH_LEVEL "fakequant/level.h"
#include "../foreach_level.h"

// How rows are quantized: to so many bits (or kSymmetric, kE4m3), with zero in their range or not.
struct Method {
    const Level& level;
    int act;
    bool zero_in_range;

    Grid grid(Limits range) const {
        if (act == kSymmetric || act == kE4m3) {
            const float most = act == kSymmetric ? kSymmetricMost : kE4m3Most, scale = std::max(-range.low, range.high) / most;
            return {scale, 1.0f / scale, -most, most};
        }
        if (zero_in_range) {
            range.low = std::min(range.low, 0.0f);
            range.high = std::max(range.high, 0.0f);
        }
        const float steps = static_cast<float>((1 << act) - 1);
        // Halves: the difference of two finite values must not overflow.
        const float scale = (range.high * 0.5f - range.low * 0.5f) / (steps * 0.5f), inverse = 1.0f / scale;
        const float zero = std::rint(-range.low * inverse);
        return {scale, inverse, -zero, steps - zero};
    }
    void round(const float* x, float* y, int64_t n, const Grid* grid) const {
        (act == kE4m3 ? level.to_e4m3 : level.to_grid)(x, y, n, grid);
    }
};

// Rows that have no grid: not finite -> NaN; constant, or with steps too small for a normal float -> unchanged.
bool no_grid(const Limits& range, const Grid& grid) { return !range.finite || !(grid.scale >= FLT_MIN); }

void fill_without_grid(const float* x, float* y, int64_t n, const Limits& range) {
    if (range.finite)
        std::copy(x, x + n, y);
    else
        std::fill(y, y + n, std::numeric_limits<float>::quiet_NaN());
}

// Segment i of the tensor: rows, or halves of rows where there is a split.
struct Segments {
    int64_t row_length, split;
    bool two() const { return split > 0 && split < row_length; }
    int64_t start(int64_t i) const { return two() ? (i / 2) * row_length + (i % 2) * split : i * row_length; }
    int64_t length(int64_t i) const { return two() ? (i % 2 ? row_length - split : split) : row_length; }
};

// A few short segments that stay in the first-level cache: each pass over all of them, so that the reduction and the two divisions
// of one overlap with those of the next (192 elements a row: 0.26 -> 0.16 ns an element).
void quantize_tile(const Method& m, const float* x, float* y, const Segments& segments, int64_t first, int64_t last) {
    Limits ranges[kTileRows];
    Grid grids[kTileRows];
    for (int64_t i = first; i < last; ++i) m.level.find_limits(x + segments.start(i), segments.length(i), &ranges[i - first]);
    for (int64_t i = first; i < last; ++i) grids[i - first] = m.grid(ranges[i - first]);
    for (int64_t i = first; i < last; ++i) {
        const int64_t start = segments.start(i), n = segments.length(i);
        if (no_grid(ranges[i - first], grids[i - first]))
            fill_without_grid(x + start, y + start, n, ranges[i - first]);
        else
            m.round(x + start, y + start, n, &grids[i - first]);
    }
}

// Few long rows and many threads: the threads share each row.
void quantize_segment_shared(const Method& m, const float* x, float* y, int64_t n, int threads) {
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    float low = std::numeric_limits<float>::infinity(), high = -low;
    bool finite = true;
#pragma omp parallel for num_threads(threads) reduction(min : low) reduction(max : high) reduction(&& : finite)
    for (int64_t block = 0; block < blocks; ++block) {
        Limits part;
        m.level.find_limits(x + block * kBlock, std::min(kBlock, n - block * kBlock), &part);
        low = std::min(low, part.low);
        high = std::max(high, part.high);
        finite = finite && part.finite;
    }
    const Limits range = {low, high, finite};
    const Grid grid = m.grid(range);
    if (no_grid(range, grid)) return fill_without_grid(x, y, n, range);
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block)
        m.round(x + block * kBlock, y + block * kBlock, std::min(kBlock, n - block * kBlock), &grid);
}

// Each row is one range, or two where 0 < split < row_length: [0, split) and [split, row_length).
void fake_quant_rows(uintptr_t src, uintptr_t dst, int64_t rows, int64_t row_length, int64_t split, int act, bool zero_in_range,
                     int threads, int64_t level) {
    const float* x = reinterpret_cast<const float*>(src);
    float* y = reinterpret_cast<float*>(dst);
    const Method m{level_at(level), act, zero_in_range};
    const Segments segments{row_length, split};
    const int64_t count = segments.two() ? 2 * rows : rows;
    if (count < threads && row_length > 2 * kBlock) {
        for (int64_t i = 0; i < count; ++i)
            quantize_segment_shared(m, x + segments.start(i), y + segments.start(i), segments.length(i), threads);
        return;
    }
    const int64_t tile = std::clamp<int64_t>(kTile / std::max<int64_t>(row_length, 1), 1, kTileRows), tiles = (count + tile - 1) / tile;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * row_length > kParallel)
    for (int64_t i = 0; i < tiles; ++i) quantize_tile(m, x, y, segments, i * tile, std::min((i + 1) * tile, count));
}

}  // namespace

void define_fake_quant(nb::module_& m) {
    using namespace nb::literals;
    m.def("fake_quant_levels", &level_names);
    m.def("fake_quant_rows", &fake_quant_rows, "src"_a, "dst"_a, "rows"_a, "row_length"_a, "split"_a, "act"_a, "zero_in_range"_a,
          "threads"_a, "level"_a = 0, nb::call_guard<nb::gil_scoped_release>());
}

// Fused dynamic asymmetric fake quantization of activations, float32 to float32, contiguous.
//
//   scale = (max - min) / (2^bits - 1)     zero = rint(-min / scale)     y = clamp(rint(x / scale), -zero, 2^bits - 1 - zero) * scale
//
// The same formula as fake_quantize_reference, operation by operation (x / scale is x * (1 / scale) in both), so results are equal to
// the bit. Everything stays in floating point: no conversion to integers that a NaN or a huge value could make undefined.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace nb = nanobind;

namespace {

// One build for AVX-512, AVX2 and plain x86-64, chosen when the module is loaded. The clones are leaf functions with raw pointers:
// a loop that OpenMP outlines would not be cloned, and inline library code could be shared between levels.
#ifdef AQUABIT_CLONES
#define ROW_KERNEL __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ROW_KERNEL __attribute__((noinline))
#endif

constexpr int64_t kParallel = 32768;  // fewer elements than this are done before other threads are awake
constexpr int64_t kBlock = 16384;     // elements of one piece of a row that several threads share
constexpr int64_t kTile = 4096;       // elements of a tile of short rows, at most kTileRows of them
constexpr int64_t kTileRows = 16;

struct Range {
    float low = std::numeric_limits<float>::infinity();
    float high = -std::numeric_limits<float>::infinity();
    int32_t magnitude = 0;  // largest |x| as the bits of a float: its order is that of the values, and a NaN is above infinity
};

struct Grid {
    float scale, inverse, low, high;  // low and high in steps
};

constexpr int32_t kInfinity = 0x7f800000;

bool finite(const Range& range) { return range.magnitude < kInfinity; }

ROW_KERNEL void find_range(const float* x, int64_t n, Range* range) {
    float low = range->low, high = range->high;
    int32_t magnitude = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(max : magnitude)
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        magnitude = bits > magnitude ? bits : magnitude;
    }
    *range = {low, high, magnitude};
}

ROW_KERNEL void to_grid(const float* x, float* y, int64_t n, const Grid* grid) {
    const float inverse = grid->inverse, scale = grid->scale, low = grid->low, high = grid->high;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        float steps = __builtin_rintf(x[i] * inverse);
        steps = steps > low ? steps : low;
        steps = steps < high ? steps : high;
        y[i] = steps * scale;
    }
}

Grid make_grid(Range range, float levels, bool zero_in_range) {
    if (zero_in_range) {
        range.low = std::min(range.low, 0.0f);
        range.high = std::max(range.high, 0.0f);
    }
    // Halves: the difference of two finite values must not overflow.
    const float scale = (range.high * 0.5f - range.low * 0.5f) / (levels * 0.5f), inverse = 1.0f / scale;
    const float zero = std::rint(-range.low * inverse);
    return {scale, inverse, -zero, levels - zero};
}

// Rows that have no grid: not finite -> NaN; constant, or with steps too small for a normal float -> unchanged.
bool no_grid(const Range& range, const Grid& grid) { return !finite(range) || !(grid.scale >= FLT_MIN); }

void fill_without_grid(const float* x, float* y, int64_t n, const Range& range) {
    if (finite(range))
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
void quantize_tile(const float* x, float* y, const Segments& segments, int64_t first, int64_t last, float levels, bool zero_in_range) {
    Range ranges[kTileRows];
    Grid grids[kTileRows];
    for (int64_t i = first; i < last; ++i) {
        ranges[i - first] = Range();
        find_range(x + segments.start(i), segments.length(i), &ranges[i - first]);
    }
    for (int64_t i = first; i < last; ++i) grids[i - first] = make_grid(ranges[i - first], levels, zero_in_range);
    for (int64_t i = first; i < last; ++i) {
        const int64_t start = segments.start(i), n = segments.length(i);
        if (no_grid(ranges[i - first], grids[i - first]))
            fill_without_grid(x + start, y + start, n, ranges[i - first]);
        else
            to_grid(x + start, y + start, n, &grids[i - first]);
    }
}

// Few long rows and many threads: the threads share each row.
void quantize_segment_shared(const float* x, float* y, int64_t n, float levels, bool zero_in_range, int threads) {
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    Range range;
    float low = range.low, high = range.high;
    int32_t magnitude = 0;
#pragma omp parallel for num_threads(threads) reduction(min : low) reduction(max : high, magnitude)
    for (int64_t block = 0; block < blocks; ++block) {
        Range part;
        find_range(x + block * kBlock, std::min(kBlock, n - block * kBlock), &part);
        low = std::min(low, part.low);
        high = std::max(high, part.high);
        magnitude = std::max(magnitude, part.magnitude);
    }
    range = {low, high, magnitude};
    const Grid grid = make_grid(range, levels, zero_in_range);
    if (no_grid(range, grid)) return fill_without_grid(x, y, n, range);
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block)
        to_grid(x + block * kBlock, y + block * kBlock, std::min(kBlock, n - block * kBlock), &grid);
}

// Each row is one range, or two where 0 < split < row_length: [0, split) and [split, row_length).
void fake_quant_rows(uintptr_t src, uintptr_t dst, int64_t rows, int64_t row_length, int64_t split, int bits, bool zero_in_range,
                     int threads) {
    const float* x = reinterpret_cast<const float*>(src);
    float* y = reinterpret_cast<float*>(dst);
    const float levels = static_cast<float>((1 << bits) - 1);
    const Segments segments{row_length, split};
    const int64_t count = segments.two() ? 2 * rows : rows;
    if (count < threads && row_length > 2 * kBlock) {
        for (int64_t i = 0; i < count; ++i)
            quantize_segment_shared(x + segments.start(i), y + segments.start(i), segments.length(i), levels, zero_in_range, threads);
        return;
    }
    const int64_t tile = std::clamp<int64_t>(kTile / std::max<int64_t>(row_length, 1), 1, kTileRows), tiles = (count + tile - 1) / tile;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * row_length > kParallel)
    for (int64_t i = 0; i < tiles; ++i)
        quantize_tile(x, y, segments, i * tile, std::min((i + 1) * tile, count), levels, zero_in_range);
}

}  // namespace

void define_fake_quant(nb::module_& m) {
    using namespace nb::literals;
    m.def("fake_quant_rows", &fake_quant_rows, "src"_a, "dst"_a, "rows"_a, "row_length"_a, "split"_a, "bits"_a, "zero_in_range"_a,
          "threads"_a, nb::call_guard<nb::gil_scoped_release>());
}

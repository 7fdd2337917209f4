// Codes of the output-aware scalar quantizers, for all rows at once: error feedback over a block of columns (GPTQ), and sweeps of
// coordinate descent, in which a weight that keeps its level costs a comparison and one that changes a row of H.
//
// Columns are [blocks, width, rows], each block with its own H. Rows are independent of each other, so how many threads share them
// changes nothing. The same source serves every instruction set; which one runs is chosen at run time.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../arrays.h"
#include "../memory.h"
#include "../processor.h"

namespace nb = nanobind;

namespace {

constexpr float kInfinity = __builtin_inff(), kSmall = 1e-12f;  // scales up to this are as good as none
constexpr int64_t kMostLevels = 256;                            // codes are bytes

// What codes stand for: offset + scale * code, or values[code].
struct Levels {
    const float *scale, *offset;  // [blocks, parts, rows]; null: there is a table
    const int64_t* part;          // [blocks, width]
    const float* values;          // [tables, count, stride], ascending; null: levels are evenly spaced
    int64_t parts, tables, count, stride;
};

// Error feedback for the columns [start, stop): each towards its target plus gain times the changes of those before it.
struct Feed {
    const float *weight, *target;  // [blocks, width, rows]
    const float* gain;             // [blocks, width, width]
    const float* mass;             // [blocks, width], what a column's miss weighs
    float* change;                 // out: weight - level, [blocks, width, rows]
    uint8_t* codes;                // out, the same
    double* loss;                  // [blocks, rows], added to
    Levels levels;
    int64_t blocks, width, rows, start, stop;
};

// Sweeps of coordinate descent over codes, in place, with H dW^T and the rows' losses.
struct Descent {
    const float *hessian, *inverse;  // [blocks, width, width], and of its diagonal, 0 where that is
    float* product;                  // [blocks, width, rows]
    uint8_t* codes;                  // the same
    double* loss;                    // [blocks, rows]
    Levels levels;
    int64_t blocks, width, rows, sweeps;
    float least;  // share of its loss that a row has to gain by a sweep to get another
};

// What is compiled for each instruction set: level.h.
struct Level {
    int64_t feed_tile, descend_tile;  // rows of one call
    int64_t (*feed_room)(const Feed&);
    int64_t (*descend_room)(const Descent&);
    void (*feed_rows)(const Feed&, int64_t z, int64_t first, float* room);
    void (*descend_rows)(const Descent&, int64_t z, int64_t first, float* room);
};

#define AQUABIT_AVX512
#define AQUABIT_EACH_LEVEL "scalar/level.h"
#include "../foreach_level.h"

// fn(block, first row, room) for every tile of rows.
template <class Function>
void in_tiles(int64_t blocks, int64_t rows, int64_t tile, int64_t threads, int64_t room, const Function& fn) {
    const int64_t tiles = ceil_divide(rows, tile);
    in_parts(blocks * tiles, threads, 1, [&](int64_t from, int64_t to, int64_t) {
        const Buffer<float> own(room);
        for (int64_t i = from; i < to; ++i) fn(i / tiles, i % tiles * tile, own.get());
    });
}

// The levels of a call, read by name from what Python calls them.
Levels levels_of(nb::handle levels, Arrays* arrays, int64_t blocks, int64_t width, int64_t rows) {
    if (nb::hasattr(levels, "values")) {
        const Shape shape = shape_of(levels, "values");
        const bool fits = shape.size() == 3 && (shape[0] == 1 || shape[0] == blocks) && (shape[2] == 1 || shape[2] == rows);
        if (!fits || shape[1] < 1 || shape[1] > kMostLevels)
            throw nb::value_error(("tables " + text_of(shape) + " do not fit " + std::to_string(blocks) + " blocks of " + std::to_string(rows) +
                                   " rows, or are not of 1 to " + std::to_string(kMostLevels) + " levels")
                                      .c_str());
        return {nullptr, nullptr, nullptr, arrays->take<float>(levels, "values", shape), 0, shape[0], shape[1], shape[2]};
    }
    const Shape shape = shape_of(levels, "scale");
    const int64_t steps = integer(levels, "steps"), parts = shape.size() == 3 ? shape[1] : 0;
    const Shape wanted = {blocks, parts, rows};
    Levels found{arrays->take<float>(levels, "scale", wanted), arrays->take<float>(levels, "offset", wanted),
                 arrays->take<int64_t>(levels, "part", {blocks, width}), nullptr, parts, 0, steps + 1, 0};
    const auto [least, most] = std::minmax_element(found.part, found.part + blocks * width);
    if (steps < 1 || steps >= kMostLevels || (blocks * width > 0 && (*least < 0 || *most >= parts)))
        throw nb::value_error((std::to_string(steps) + " steps are not 1 to 255, or a column's part is not one of " + std::to_string(parts)).c_str());
    return found;
}

Shape columns_of(nb::handle call, const char* name) {
    const Shape shape = shape_of(call, name);
    if (shape.size() != 3) throw nb::value_error((std::string(name) + " is " + text_of(shape) + ", not [blocks, columns, rows]").c_str());
    return shape;
}

Feed feed_of(nb::handle call, Arrays* arrays) {
    const Shape shape = columns_of(call, "weight");
    const int64_t z = shape[0], r = shape[1], p = shape[2], start = integer(call, "start"), stop = integer(call, "stop");
    if (start < 0 || start > stop || stop > r)
        throw nb::value_error(("columns " + std::to_string(start) + " to " + std::to_string(stop) + " are not among " + std::to_string(r)).c_str());
    return {arrays->take<float>(call, "weight", shape),
            arrays->take<float>(call, "target", shape),
            arrays->take<float>(call, "gain", {z, r, r}),
            arrays->take<float>(call, "mass", {z, r}),
            arrays->take<float>(call, "change", shape),
            arrays->take<uint8_t>(call, "codes", shape),
            arrays->take<double>(call, "loss", {z, p}),
            levels_of(call.attr("levels"), arrays, z, r, p),
            z, r, p, start, stop};
}

Descent descent_of(nb::handle call, Arrays* arrays) {
    const Shape shape = columns_of(call, "product");
    const int64_t z = shape[0], r = shape[1], p = shape[2];
    Descent d{arrays->take<float>(call, "hessian", {z, r, r}),
              arrays->take<float>(call, "inverse", {z, r}),
              arrays->take<float>(call, "product", shape),
              arrays->take<uint8_t>(call, "codes", shape),
              arrays->take<double>(call, "loss", {z, p}),
              levels_of(call.attr("levels"), arrays, z, r, p),
              z, r, p, integer(call, "sweeps"), nb::cast<float>(call.attr("least"))};
    const int64_t count = z * r * p;
    if (count > 0 && *std::max_element(d.codes, d.codes + count) >= d.levels.count)
        throw nb::value_error(("a code is not below " + std::to_string(d.levels.count)).c_str());
    return d;
}

}  // namespace

void define_scalar(nb::module_& m) {
    using namespace nb::literals;
    m.def("scalar_levels", &level_names);
    m.def(
        "scalar_feed",
        [](nb::handle call, int threads, int64_t level) {
            Arrays arrays;
            const Feed f = feed_of(call, &arrays);
            const Level& at = level_at(level);
            const nb::gil_scoped_release released;
            in_tiles(f.blocks, f.rows, at.feed_tile, threads, at.feed_room(f),
                     [&](int64_t z, int64_t first, float* room) { at.feed_rows(f, z, first, room); });
        },
        "call"_a, "threads"_a, "level"_a);
    m.def(
        "scalar_descend",
        [](nb::handle call, int threads, int64_t level) {
            Arrays arrays;
            const Descent d = descent_of(call, &arrays);
            const Level& at = level_at(level);
            const nb::gil_scoped_release released;
            in_tiles(d.blocks, d.rows, at.descend_tile, threads, at.descend_room(d),
                     [&](int64_t z, int64_t first, float* room) { at.descend_rows(d, z, first, room); });
        },
        "call"_a, "threads"_a, "level"_a);
}

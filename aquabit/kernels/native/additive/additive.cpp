// Codes of the additive quantizer, all rows of a block of groups in one call: group after group, and for each of them every row's search
// (a pass of coordinate descent, and a beam; see level.h) and what its outcome means for the groups after it.
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

#include "../arrays.h"
#include "../memory.h"
#include "../processor.h"

namespace nb = nanobind;

namespace {

constexpr float kInfinity = __builtin_inff(), kLargest = FLT_MAX, kSmall = 1e-30f;
constexpr int kTile = 4;                  // rows that share what is loaded
constexpr int64_t kCodebooks = 64;        // at most
constexpr int64_t kMostSums = 1 << 28;    // product of beam and codewords that is still counted in 32 bits
constexpr int kBisections = 20;           // more would only tell apart what is as good as equal
constexpr int64_t kPairFloats = 4 << 20;  // products of pairs of codewords are kept up to 16 MiB
constexpr int64_t kBatchFloats = 8 << 20;  // of pairs and images that threads prepare together
constexpr int64_t kParallel = 1 << 17;    // multiply-adds below which other threads are not woken

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
    double* gain;           // sweep: [blocks, rows], what the loss changes by is added; else null
    int64_t blocks, rows, groups, table_sets, codebooks, codewords, size, beam;
};

// Of one metric and one set of tables; all of it shared by the rows.
struct Group {
    const float* codewords;  // [M * K, size padded]
    const float* by_size;    // [size, M * K padded]: the same transposed
    const float* images;     // [size, M * K padded]: codewords times the metric
    const float* own;        // [M * K padded]: c metric c^T; infinite where there is no codeword
    const float* pairs;      // 2 c_j metric c_m^T at [m (m - 1) / 2 + j][k_j][k_m padded], or null: then products are made row by row
    const float* metric;     // [size, size padded]
    const float* inverse;    // the same, or null
};

// What is compiled for each instruction set: shared.h, level.h.
struct Level {
    int64_t lanes;  // floats of a vector
    void (*arrange)(const Block&, const float* tables, float* codewords, float* by_size);
    void (*project)(const Block&, const float* metric, const float* by_size, float* images, float* own);
    void (*pair_up)(const Block&, const Group&, float* pairs);
    int64_t (*scratch_floats)(const Block&);
    void (*search_rows)(const Block&, const Group&, int64_t z, int64_t n, int64_t from, int64_t to, float* room);
};

#define AQUABIT_AVX512
#define AQUABIT_EACH_LEVEL "additive/level.h"
#include "../foreach_level.h"

bool keeps_pairs(const Block& b, int64_t floats) {
    return b.codebooks > 1 && floats <= kPairFloats && b.rows * std::max<int64_t>(b.beam, 1) * 2 >= b.codebooks * b.codewords;
}

// Lengths in floats, padded for a level's vectors, and how many groups are prepared together.
struct Sizes {
    int64_t wide, tall, all;  // codewords of one codebook, a group, codewords of all codebooks
    int64_t pair_rows, pairs, batch;

    Sizes(const Level& level, const Block& b, int threads)
        : wide(rounded_up(b.codewords, level.lanes)),
          tall(rounded_up(b.size, level.lanes)),
          all(b.codebooks * wide),
          pair_rows(b.codebooks * (b.codebooks - 1) / 2 * b.codewords),
          pairs(keeps_pairs(b, pair_rows * wide) ? pair_rows * wide : 0),
          batch(1) {  // one thread finds the pairs of one group in its cache; several meet less often
        if (threads > 1) batch = std::clamp<int64_t>(kBatchFloats / (pairs + b.size * all), 1, b.groups);
    }
};

// What rows share while a batch of groups is searched, and room for the search of as many parts of the rows as there are threads.
struct Workspace {
    Buffer<float> images, own, metric, inverse, pairs, room;
    int64_t room_size;

    Workspace(const Level& level, const Block& b, const Sizes& sizes, int threads)
        : images(zeros(sizes.batch * b.size * sizes.all)),
          own(zeros(sizes.batch * sizes.all)),
          metric(zeros(sizes.batch * b.size * sizes.tall)),
          inverse(zeros(sizes.batch * b.size * sizes.tall)),
          pairs(zeros(sizes.batch * sizes.pairs)),
          room(zeros(level.scratch_floats(b) * threads)),
          room_size(level.scratch_floats(b)) {}
};

// The search of one block of rows.
struct Job {
    const Level& level;
    const Block& block;
    const Sizes& sizes;
    const float *codewords, *by_size;
    Workspace& work;

    Group group(int64_t slot) const {
        const int64_t square = slot * block.size * sizes.tall;
        return {codewords,
                by_size,
                work.images.get() + slot * block.size * sizes.all,
                work.own.get() + slot * sizes.all,
                sizes.pairs ? work.pairs.get() + slot * sizes.pairs : nullptr,
                work.metric.get() + square,
                block.inverse ? work.inverse.get() + square : nullptr};
    }

    // What the rows share in group n of block z.
    void prepare(int64_t z, int64_t n, int64_t slot) const {
        const int64_t g = block.size, at = (z * block.groups + n) * g * g, square = slot * g * sizes.tall;
        for (int64_t i = 0; i < g * g; ++i) {
            work.metric[square + i / g * sizes.tall + i % g] = block.metric[at + i];
            if (block.inverse) work.inverse[square + i / g * sizes.tall + i % g] = block.inverse[at + i];
        }
        level.project(block, block.metric + at, by_size, work.images.get() + slot * g * sizes.all, work.own.get() + slot * sizes.all);
        if (sizes.pairs) level.pair_up(block, group(slot), work.pairs.get() + slot * sizes.pairs);
    }

    // Block z, batch after batch: what the rows share, then the rows.
    void run(int64_t z, int threads) const {
        const Block& b = block;
        const int64_t for_pairs = sizes.pairs * b.size, for_rows = b.rows * sizes.all * (b.size + b.beam);
        const auto threads_for = [&](int64_t operations) { return operations > kParallel ? threads : 1; };
        for (int64_t start = 0; start < b.groups; start += sizes.batch) {
            const int64_t count = std::min(sizes.batch, b.groups - start);
            in_parts(count, threads_for(count * (for_pairs + sizes.all * b.size * b.size)), 1, [&](int64_t from, int64_t to, int64_t) {
                for (int64_t slot = from; slot < to; ++slot) prepare(z, start + slot, slot);
            });
            in_parts(b.rows, threads_for(count * for_rows), kTile, [&](int64_t from, int64_t to, int64_t part) {
                for (int64_t slot = 0; slot < count; ++slot)
                    level.search_rows(b, group(slot), z, start + slot, from, to, work.room.get() + part * work.room_size);
            });
        }
    }
};

void run(const Level& level, const Block& b, int threads) {
    const bool many = b.blocks >= 2 * threads;  // each thread its own blocks
    const int workers = many ? threads : 1, team = many ? 1 : threads;
    const Sizes sizes(level, b, team);
    const int64_t by_size = rounded_up(b.codebooks * b.codewords * sizes.tall, 16), stride = by_size + rounded_up(b.size * sizes.all, 16);
    const Buffer<float> tables = zeros(b.table_sets * stride);
    for (int64_t t = 0; t < b.table_sets; ++t) {
        float* here = tables.get() + t * stride;
        level.arrange(b, b.tables + t * b.codebooks * b.codewords * b.size, here, here + by_size);
    }
    std::vector<Workspace> work;
    for (int i = 0; i < workers; ++i) work.emplace_back(level, b, sizes, team);
    in_parts(b.blocks, workers, 1, [&](int64_t from, int64_t to, int64_t part) {
        for (int64_t z = from; z < to; ++z) {
            const float* here = tables.get() + z / (b.blocks / b.table_sets) * stride;
            Job{level, b, sizes, here, here + by_size, work[part]}.run(z, team);
        }
    });
}

// The call that Python describes (_Call in additive_search.py): rows and tables say how much there is of everything.
Block block_of(nb::handle call, Arrays* arrays) {
    const Shape rows = shape_of(call, "target"), tables = shape_of(call, "tables");
    const int64_t beam = integer(call, "beam"), width = rows.size() == 3 ? rows[2] : 0;
    const bool sized = rows.size() == 3 && tables.size() == 4 && *std::min_element(tables.begin(), tables.end()) > 0;
    if (!sized || width % tables[3] || rows[0] % tables[0] || tables[1] > kCodebooks || beam < 1 || beam > kMostSums / tables[2])
        throw nb::value_error(("rows " + text_of(rows) + " do not fit tables " + text_of(tables) + ", or beam=" + std::to_string(beam) +
                               " is not from 1 to " + std::to_string(sized ? kMostSums / tables[2] : 0))
                                  .c_str());
    const int64_t z = rows[0], o = rows[1], n = width / tables[3], m = tables[1], g = tables[3];
    Block b{arrays->take<float>(call, "target", rows),
            arrays->take<float>(call, "decoded", rows),
            arrays->take<float>(call, "metric", {z, n, g, g}),
            arrays->take<float>(call, "inverse", {z, n, g, g}),
            arrays->take<float>(call, "coupling", {z, width, width}),
            arrays->take<float>(call, "scale", {z, o}),
            arrays->take<float>(call, "tables", tables),
            arrays->take<int64_t>(call, "codes", {z, o, n, m}),
            arrays->take<float>(call, "moved", rows),
            arrays->take<double>(call, "gain", {z, o}),
            z, o, n, tables[0], m, tables[2], g, beam};
    const int64_t count = z * o * n * m;
    const auto [least, most] = std::minmax_element(b.codes, b.codes + count);
    if (count && (*least < 0 || *most >= b.codewords))
        throw nb::value_error(("codes from " + std::to_string(*least) + " to " + std::to_string(*most) + " do not fit " +
                               std::to_string(b.codewords) + " codewords")
                                  .c_str());
    if (!b.before) b.gain = nullptr;
    if (b.codebooks == 1) b.beam = 1;  // it makes no difference, but takes room
    return b;
}

}  // namespace

void define_additive(nb::module_& m) {
    using namespace nb::literals;
    m.def("additive_levels", &level_names);
    m.def(
        "additive_search",
        [](nb::handle call, int threads, int64_t level) {
            Arrays arrays;
            const Block block = block_of(call, &arrays);
            const nb::gil_scoped_release released;
            if (block.blocks * block.rows * block.groups) run(level_at(level), block, threads);
        },
        "call"_a, "threads"_a, "level"_a);
}

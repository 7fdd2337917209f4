// The tile-decode backend: rows of an arranged weight are decoded, a few at a time, to integers of 8 or 16 bits and multiplied with
// quantized activations by the integer dot products of the processor; or decoded to floats for a dense library.
//
// The same source serves every instruction set; which one runs is chosen at run time. Every result is one sum in one order, however many
// threads share the rows.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../memory.h"
#include "../processor.h"
#include "plan.h"
#include "types.h"

namespace nb = nanobind;

namespace {

#define AQUABIT_AVX512VNNI
#define AQUABIT_EACH_LEVEL "decode/level.h"
#include "../foreach_level.h"

constexpr int64_t kParallel = 1 << 18;  // multiply-adds below which other threads are not woken

// How a call multiplies.
struct Method {
    const Level* level;
    bool codes;     // uniform codes as they are; else decoded values rounded to 16 bits
    bool wide;      // 16 bits
    bool by_scale;  // runs end where a group of scales does
    int64_t most;   // of the activations' integers
    int64_t limit;  // inputs of a run
    int64_t bits;   // of activations
    int64_t threads;

    int64_t per() const { return wide ? 2 : 4; }
};

Method method_of(const Weight& w, int64_t level, int64_t bits, int64_t threads) {
    const Level* l = &level_at(level);
    const bool codes = bits <= 8 && !w.tables, wide = !codes || !l->bytes || w.bits > l->byte_bits;
    const int64_t limit = codes ? kLongestRun : bits <= 8 ? kByteRun : kWideRun;
    const bool by_scale = codes || w.length() / std::max(w.scales, w.offsets) >= kOwnRun;
    return {l, codes, wide, by_scale, bits <= 8 ? 256 : kActivation, limit, bits, threads};
}

// A thread's room for decoded rows and results.
struct Scratch {
    Buffer<uint8_t> slots, room;
    Buffer<float> factor, offset, total, bias, y;
    Buffer<int32_t> shift;
    Errors errors = {0, 0};
};

// What is multiplied with one group's rows: [first_row, first_row + rows) of the weight.
struct Product {
    const Method& method;
    const Weight& weight;
    const Planned& planned;
    Activations activations;
    int64_t vectors, first_row, rows;

    int64_t row_bytes() const { return rounded_up(planned.plan.slot_bytes, 64) + 64; }
    int64_t room_bytes() const { return weight.length() * (method.codes ? 1 : 5) + 64; }

    // Rows of a tile: all threads' scratch within 1/16 of the dense weight in bfloat16, but at least one block of rows each.
    int64_t tile_rows() const {
        const int64_t block = method.level->rows, budget = weight.out * weight.length() / 8 / method.threads - room_bytes();
        const int64_t share = rounded_up((rows + method.threads - 1) / method.threads, block);
        return std::clamp(budget / row_bytes() / block * block, block, std::max(block, std::min(share, kMostTile / block * block)));
    }

    Scratch scratch(int64_t tile) const {
        const Plan& p = planned.plan;
        return {Buffer<uint8_t>(tile * row_bytes()), Buffer<uint8_t>(room_bytes()),      Buffer<float>(tile * p.run_count),
                Buffer<float>(tile * p.run_count),   Buffer<float>(tile * p.range_count), Buffer<float>(tile),
                Buffer<float>(tile * kMostVectors * method.level->lanes), Buffer<int32_t>(tile * p.run_count)};
    }

    int64_t scratch_bytes(int64_t tile) const { return tile * row_bytes() + room_bytes(); }

    // Rows [from, from + count) of the group, decoded; the rows that fill up the tile are zero.
    Tile fill(int64_t from, int64_t count, Scratch* s) const {
        const int64_t padded = rounded_up(count, method.level->rows);
        for (int64_t r = 0; r < padded; ++r) {
            const int64_t row = first_row + from + r;
            uint8_t* slot = s->slots.get() + r * row_bytes();
            s->bias[r] = r < count && weight.bias ? weight.bias[row] : 0;
            if (r >= count) {
                std::memset(slot, 0, row_bytes());
                for (int64_t i = 0; i < planned.plan.run_count; ++i)
                    s->factor[i * padded + r] = s->offset[i * padded + r] = 0, s->shift[i * padded + r] = 0;
                for (int64_t i = 0; i < planned.plan.range_count; ++i) s->total[i * padded + r] = 0;
            } else if (method.codes) {
                method.level->fill_codes(weight, planned.plan, method.wide, row, reinterpret_cast<int8_t*>(s->room.get()), slot,
                                         s->factor.get() + r, s->offset.get() + r, s->shift.get() + r, s->total.get() + r, padded);
            } else {
                method.level->fill_values(weight, planned.plan, method.most, row, reinterpret_cast<float*>(s->room.get()), slot,
                                          s->factor.get() + r, s->total.get() + r, padded, &s->errors);
            }
        }
        return {s->slots.get(), row_bytes(), padded, s->factor.get(), method.codes ? s->offset.get() : nullptr, s->total.get(),
                s->bias.get(),  s->shift.get()};
    }

    // Sums of the activations' integers of each run, which offsets need.
    void sum(int64_t threads) const {
        const Plan& p = planned.plan;
        const Buffer<uint8_t> ones(p.slot_bytes);
        std::memset(ones.get(), 0, p.slot_bytes);
        for (const Piece& piece : planned.pieces)
            for (int64_t k = piece.lead; k < piece.lead + piece.count; ++k) ones[piece.slot + k * (method.wide ? 2 : 1)] = 1;
        const int64_t size = method.level->vectors, blocks = (vectors + size - 1) / size;
        in_parts(blocks, threads, 1, [&](int64_t from, int64_t to, int64_t) {
            for (int64_t b = from; b < to; ++b)
                method.level->sum(p, activations, ones.get(), method.wide, b * size, std::min(size, vectors - b * size));
        });
    }

    // All of it; sink(results, stride, row, rows, vector, vectors) takes what is done. Returns scratch bytes of all threads.
    template <class Sink>
    int64_t run(Errors* errors, const Sink& sink) const {
        const int64_t threads = rows * vectors * method.level->lanes * weight.length() > kParallel ? method.threads : 1;
        if (method.codes) sum(threads);
        const int64_t tile = tile_rows(), tiles = (rows + tile - 1) / tile, size = method.level->vectors;
        const int64_t blocks = (vectors + size - 1) / size, chunks = std::min(blocks, tiles < threads ? threads : 1), jobs = tiles * chunks;
        std::vector<Scratch> scratch;
        for (int64_t i = 0; i < std::min(threads, jobs); ++i) scratch.push_back(this->scratch(tile));
        const int64_t stride = kMostVectors * method.level->lanes;
        in_parts(jobs, threads, 1, [&](int64_t from, int64_t to, int64_t part) {
            Scratch& s = scratch[part];
            for (int64_t job = from; job < to; ++job) {
                const int64_t row = job / chunks * tile, count = std::min(tile, rows - row), chunk = job % chunks;
                const Tile decoded = fill(row, count, &s);
                for (int64_t b = blocks * chunk / chunks; b < blocks * (chunk + 1) / chunks; ++b) {
                    const int64_t n = std::min(size, vectors - b * size);
                    method.level->multiply(planned.plan, decoded, activations, method.wide, b * size, n, s.y.get());
                    sink(s.y.get(), stride, first_row + row, count, b * size, n);
                }
            }
        });
        for (const Scratch& s : scratch) errors->error += s.errors.error, errors->all += s.errors.all;
        return scratch_bytes(tile) * static_cast<int64_t>(scratch.size());
    }
};

double ratio_of(const Errors& e) { return e.error > 0 ? std::sqrt(e.error / e.all) : 0; }

// Whether it was done (0: no integers stand for the activations), relative errors of activations and of weights, bytes of scratch.
using Outcome = std::tuple<int64_t, double, double, int64_t>;

#include "drivers.h"

}  // namespace

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// codes, tables, scale, offset, bias, segments; then segment_count .. offsets as Weight has them.
Weight weight_of(const std::vector<int64_t>& f) {
    const auto floats = [&](int i) { return pointer<const float>(f.at(i)); };
    const Weight w = {pointer<const uint8_t>(f.at(0)), floats(1), floats(2), floats(3), floats(4), pointer<const Segment>(f.at(5)),
            f.at(6), f.at(7), f.at(8), f.at(9), f.at(10), f.at(11), f.at(12), f.at(13), f.at(14), f.at(15), f.at(16), f.at(17), f.at(18),
            f.at(19)};
    const int64_t width = w.bits * w.fused <= 4 ? 4 : 8, span = w.kernel_order ? 1 : w.group * w.fused;
    for (const Segment* s = w.segments; s < w.segments + w.segment_count; ++s) {
        const int64_t bytes = ((s->count + span - 1) / span * w.books * width + 7) / 8;
        const bool inputs = s->tap >= 0 && s->tap < w.area && s->start >= 0 && s->count > 0 && s->start + s->count <= w.cin;
        const bool whole = w.kernel_order ? w.segment_count == 1 && s->count == w.cin : s->count % w.group == 0;
        const bool scaled = s->scales >= 0 && (w.scales == 1 || s->scales < w.scales) && (w.offsets <= 1 || s->scales < w.offsets);
        const bool inside = inputs && whole && scaled && s->at >= 0 && s->at + bytes <= w.row_bytes;
        if (!inside) throw std::invalid_argument("a segment of the arranged weight lies outside its row of codes, inputs or scales");
    }
    return w;
}

Convolution convolution_of(const std::vector<int64_t>& f) {
    return {f.at(0), f.at(1), f.at(2), f.at(3), f.at(4), f.at(5), f.at(6), f.at(7), f.at(8), f.at(9), f.at(10), f.at(11), f.at(12),
            f.at(13), f.at(14), f.at(15)};
}

}  // namespace

void define_decode(nb::module_& m) {
    using namespace nb::literals;
    m.def("decode_levels", &level_names);
    m.def(
        "decode_linear",
        [](const std::vector<int64_t>& weight, uintptr_t x, uintptr_t y, int64_t tokens, int64_t bits, bool few, int64_t threads,
           int64_t level) {
            const Weight w = weight_of(weight);
            const Method method = method_of(w, level, bits, threads);
            return (few ? few_tokens : linear_product)(method, w, pointer<const float>(x), pointer<float>(y), tokens);
        },
        "weight"_a, "x"_a, "y"_a, "tokens"_a, "bits"_a, "few"_a, "threads"_a, "level"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "decode_conv2d",
        [](const std::vector<int64_t>& weight, const std::vector<int64_t>& convolution, uintptr_t x, uintptr_t y, int64_t bits,
           int64_t threads, int64_t level) {
            const Weight w = weight_of(weight);
            const Method method = method_of(w, level, bits, threads);
            return conv_product(method, w, convolution_of(convolution), pointer<const float>(x), pointer<float>(y));
        },
        "weight"_a, "convolution"_a, "x"_a, "y"_a, "bits"_a, "threads"_a, "level"_a, nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "decode_rows",
        [](const std::vector<int64_t>& weight, int64_t first, int64_t last, uintptr_t out, int64_t threads, int64_t level) {
            decoded_rows(level_at(level), weight_of(weight), first, last, threads, pointer<float>(out));
        },
        "weight"_a, "first"_a, "last"_a, "out"_a, "threads"_a, "level"_a, nb::call_guard<nb::gil_scoped_release>());
}

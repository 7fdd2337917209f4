// codebook_linear and codebook_conv2d by tables: y = W x where each group of a row of W is a sum of codewords, so that the product of every
// codeword with every group of inputs, computed once for a block of columns, serves all rows (SCIENCE, section 5).
//
// A task is a tile of columns and a range of rows. Block of groups after block of groups, it fills a table that fits the second-level
// cache and adds up the table rows that the codes name. With int16 tables the values of a column are in units of a scale of the column and
// block, chosen so that the sum over the block cannot leave 16 bits (Cauchy-Schwarz with the longest row of weights); partial sums may wrap.
//
// A convolution runs on padded planes, one per input channel and phase of the stride, all images in one long row: a tap is an offset in it.
// Groups across channels: one table serves all taps. Groups that are kernel slices: the table is the channel convolved with the codewords.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace {

#define INLINE static inline __attribute__((always_inline))

constexpr int64_t kSpan = 64;       // inputs of a lookup, at most
constexpr int64_t kTaps = 64;       // of a kernel, on the fast path
constexpr int64_t kTapTile = 320;   // columns of a tile whose taps share tables
constexpr int64_t kTile = 32;       // columns of any other tile
constexpr int64_t kTokens = 1;      // up to so many tokens are looked up one by one
constexpr int64_t kAhead = 16;      // rows whose codes are fetched before their turn
constexpr int64_t kShorts = 32767;

struct Run {
    int64_t tap, codes, scales;  // codes: byte offset in a row; scales: index of the scale group
};

struct Block {
    int64_t first, groups, runs;  // first input channel; groups of every run
    const Run* run;
    float norm;  // length of the longest row of weights in this block, without scales
};

struct Call {
    const uint8_t* codes;  // [out, row_bytes]
    const float* scale;    // [out, scale_groups]
    const float* aux_scale;
    const float* aux_weights;  // [span]
    const float* bias;         // [out] or null
    const float* codewords;    // [codebooks, codewords, span]; fused: the half tables [half, span / 2], for both halves
    int64_t out, inputs, row_bytes, width, codebooks, codeword_count, span, channels, scale_groups, half;
    const int32_t* words;  // the codewords as pairs of int16 [codebooks, codewords, (span + 1) / 2], or null
    float word_unit;       // a codeword over this is its integers
    float longest;         // of all codewords
    bool exact, kernel_order;
    int64_t table_rows() const { return width == 4 ? 256 : codeword_count; }  // that a byte of codes tells apart
    int64_t bytes(const Block& b) const { return width == 4 ? (b.groups * codebooks + 1) / 2 : b.groups * codebooks; }
};

struct Tile {
    void* table;
    const int64_t* offsets;  // of taps in a table row
    const float* unit;       // [width]
    float* aux;              // [width]
    float* aux_block;        // [runs, width]
    float* sums;             // [rows, width]
    int64_t table_width, width, first_row;
    bool first;
};

struct Level {
    int64_t lanes;
    void (*columns_of)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
    void (*squares)(const float* const*, int64_t, int64_t, float*, float*);
    void (*weigh)(const float* const*, const float*, int64_t, int64_t, float*);
    void (*product_rows_fast)(const float*, int64_t, const float* const*, int64_t, const float*, int64_t, int64_t, void*);
    void (*product_rows_exact)(const float*, int64_t, const float* const*, int64_t, const float*, int64_t, int64_t, void*);
    void (*sum_rows)(const void*, int64_t, const void*, int64_t, int64_t, void*, bool);
    void (*gather_rows)(const Call&, const Block&, const Tile&, int64_t, int64_t);
    void (*finish)(const Call&, const Tile&, int64_t, int64_t);
    void (*tokens_of)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
    void (*token_products)(const float*, int64_t, const float*, int64_t, float*);
    void (*token_pairs)(const float*, int64_t, const float*, int64_t, float*);
    void (*token_rows)(const uint8_t*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, float*);
    void (*product_rows_dots)(const int32_t*, int64_t, const float* const*, int64_t, const float*, float, int64_t, int64_t, int16_t*);  // or null
};

#if defined(__x86_64__)
#define AQUABIT_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,popcnt,prefer-vector-width=512")
#endif
namespace lut_avx512 {
constexpr int kLanes = 16;
#define AQUABIT_LEVEL 4
#include "lut_level.h"
#undef AQUABIT_LEVEL
}  // namespace lut_avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,popcnt")
#endif
namespace lut_avx2 {
constexpr int kLanes = 8;
#define AQUABIT_LEVEL 3
#include "lut_level.h"
#undef AQUABIT_LEVEL
}  // namespace lut_avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace lut_baseline {
constexpr int kLanes = 4;
#if defined(__x86_64__)
#define AQUABIT_LEVEL 2
#else
#define AQUABIT_LEVEL 0
#endif
#include "lut_level.h"
#undef AQUABIT_LEVEL
}  // namespace lut_baseline

struct Free {
    void operator()(void* x) const { ::operator delete[](x, std::align_val_t(64)); }
};

template <class T>
struct Buffer {
    std::unique_ptr<T[], Free> held;
    explicit Buffer(int64_t count) : held(static_cast<T*>(::operator new[](std::max<int64_t>(count, 1) * sizeof(T) + 64, std::align_val_t(64)))) {}
    T* get() const { return held.get(); }
};

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns: where the inputs of a tile lie and what of the outputs it makes.
struct Planes {
    const float* x;  // tokens [count, inputs], or planes [inputs, pitch]
    bool tokens;
    int64_t columns, pitch;
    std::vector<int64_t> taps;    // offset of each tap in a plane
    std::vector<int64_t> starts;  // of ranges of a plane that tables cover, before the tile's first column is added
    std::vector<int64_t> widths;  // of the same
    std::vector<int64_t> offsets; // of each tap in a table row
    int64_t width, table_width;   // columns of a tile, of a table row
};

// What a thread works in.
struct Room {
    Buffer<char> table;
    Buffer<float> halves, columns, total, largest, inverse, unit, aux_table, aux, aux_block, sums, zeros;

    Room(const Call& c, const Planes& p, int64_t rows, int64_t bytes, int64_t groups, int64_t runs)
        : table(bytes * c.table_rows() * p.table_width * (c.exact ? 4 : 2)),
          halves(2 * std::max<int64_t>(c.half, 16) * p.table_width),
          columns(p.tokens ? groups * c.channels * p.width : 0),
          total(p.table_width), largest(p.table_width), inverse(p.table_width), unit(p.width), aux_table(p.table_width), aux(p.width),
          aux_block(c.scale_groups > 1 ? runs * p.width : 0),
          sums(rows * p.width),
          zeros(p.table_width) {
        std::fill(zeros.get(), zeros.get() + p.table_width, 0.0f);
    }
};

class Task {
  public:
    Task(const Level& level, const Call& call, const Planes& planes, Room& room) : level_(level), c_(call), p_(planes), r_(room) {}

    // Sums of rows [from, to) for the tile at column q0, finished, in room.sums.
    void run(const std::vector<Block>& blocks, int64_t q0, int64_t from, int64_t to) {
        Tile tile{r_.table.get(), p_.offsets.data(), r_.unit.get(), r_.aux.get(), r_.aux_block.get(), r_.sums.get(),
                  p_.table_width, p_.width, from, true};
        std::fill(r_.aux.get(), r_.aux.get() + p_.width, 0.0f);
        for (const Block& b : blocks) {
            if (p_.tokens) fetch(b, q0);
            measure(b, q0);
            fill(b, q0);
            level_.gather_rows(c_, b, tile, from, to);
            tile.first = false;
        }
        level_.finish(c_, tile, from, to);
    }

  private:
    int64_t channels_of(const Block& b) const { return std::min(b.groups * c_.channels, c_.inputs - b.first); }

    void fetch(const Block& b, int64_t q0) {
        const int64_t count = std::min(p_.width, p_.columns - q0);
        level_.columns_of(p_.x + q0 * c_.inputs + b.first, c_.inputs, count, channels_of(b), p_.width, r_.columns.get());
    }

    // The inputs of one group at one range of columns: pointers to span rows of columns.
    void streams(const Block& b, int64_t group, size_t range, int64_t q0, const float** to) const {
        const float* base = p_.tokens ? r_.columns.get() : p_.x + b.first * p_.pitch + q0 + (c_.kernel_order ? 0 : p_.starts[range]);
        const int64_t pitch = p_.tokens ? p_.width : p_.pitch, held = channels_of(b);
        for (int64_t i = 0; i < c_.span; ++i) {
            const int64_t channel = group * c_.channels + (c_.kernel_order ? 0 : i);
            to[i] = channel < held ? base + channel * pitch + (c_.kernel_order ? p_.taps[i] : 0) : r_.zeros.get();
        }
    }

    template <class Function>
    void each(const Block& b, int64_t q0, const Function& fn) const {
        const float* from[kSpan];
        for (int64_t g = 0; g < b.groups; ++g)
            for (size_t range = 0, at = 0; range < p_.widths.size(); at += p_.widths[range++]) {
                streams(b, g, range, q0, from);
                fn(g, from, static_cast<int64_t>(at), p_.widths[range]);
            }
    }

    // aux of the block, and the units of its columns.
    void measure(const Block& b, int64_t q0) {
        float *total = r_.total.get(), *largest = r_.largest.get(), *aux = r_.aux_table.get();
        std::fill(total, total + p_.table_width, 0.0f);
        std::fill(largest, largest + p_.table_width, 0.0f);
        std::fill(aux, aux + p_.table_width, 0.0f);
        each(b, q0, [&](int64_t, const float* const* from, int64_t at, int64_t width) {
            level_.weigh(from, c_.aux_weights, c_.span, width, aux + at);
            if (!c_.exact) level_.squares(from, c_.span, width, total + at, largest + at);
        });
        for (int64_t r = 0; r < b.runs; ++r) {
            const float* from = aux + p_.offsets[b.run[r].tap];
            float* to = c_.scale_groups > 1 ? r_.aux_block.get() + r * p_.width : r_.aux.get();
            if (c_.scale_groups > 1)
                std::copy(from, from + p_.width, to);
            else
                for (int64_t q = 0; q < p_.width; ++q) to[q] += from[q];
        }
        if (!c_.exact) choose_units(b);
    }

    // The bound of a column's sum over this block, in float: |x| times the longest row, or the largest single product. Where taps share a
    // table its columns serve many outputs, so that one unit serves the tile.
    void choose_units(const Block& b) {
        const float *total = r_.total.get(), *largest = r_.largest.get();
        const float room = static_cast<float>(kShorts - 1 - b.groups * c_.codebooks * b.runs);
        // With 16-bit dot products the inputs themselves, times 65536 word_unit over the unit, have to fit as well.
        const float most = c_.words && level_.product_rows_dots ? std::max(c_.longest, 2 * room * c_.word_unit) : c_.longest;
        if (b.runs == 1) {
            for (int64_t q = 0; q < p_.width; ++q) set_unit(q, std::sqrt(total[q]) * b.norm, std::sqrt(largest[q]) * most, room);
            return;
        }
        float sum = 0, single = 0;
        for (int64_t q = 0; q < p_.width; ++q) {
            float here = 0;
            for (int64_t r = 0; r < b.runs; ++r) here += total[p_.offsets[b.run[r].tap] + q];
            if (!(here <= sum)) sum = here;
        }
        for (int64_t q = 0; q < p_.table_width; ++q)
            if (!(largest[q] <= single)) single = largest[q];
        set_unit(0, std::sqrt(sum) * b.norm, std::sqrt(single) * most, room);
        std::fill(r_.unit.get(), r_.unit.get() + p_.width, r_.unit.get()[0]);
        std::fill(r_.inverse.get(), r_.inverse.get() + p_.table_width, r_.inverse.get()[0]);
    }

    void set_unit(int64_t q, float sum, float single, float room) {
        const float bound = sum > single ? sum : single;
        const bool finite = sum - sum == 0 && single - single == 0;
        r_.unit.get()[q] = finite ? bound / room : __builtin_nanf("");
        r_.inverse.get()[q] = finite && bound > 1e-33f ? room / bound : 0;
    }

    // Rows of one lookup (or of half a lookup of fused codes, which starts at input ``skip`` of the group) into ``to``.
    void products(const Block& b, int64_t group, const float* words, int64_t count, int64_t skip, int64_t span, int64_t q0, char* to) {
        const auto product = c_.exact ? level_.product_rows_exact : level_.product_rows_fast;
        const float* from[kSpan];
        for (size_t range = 0, at = 0; range < p_.widths.size(); at += p_.widths[range++]) {
            streams(b, group, range, q0, from);
            product(words, count, from + skip, span, r_.inverse.get() + at, p_.widths[range], p_.table_width, to + at * (c_.exact ? 4 : 2));
        }
    }

    void lookup(const Block& b, int64_t index, int64_t q0, char* to) {
        if (c_.words && level_.product_rows_dots && !c_.exact) {
            const int32_t* pairs = c_.words + index % c_.codebooks * c_.codeword_count * ((c_.span + 1) / 2);
            const float* from[kSpan];
            for (size_t range = 0, at = 0; range < p_.widths.size(); at += p_.widths[range++]) {
                streams(b, index / c_.codebooks, range, q0, from);
                level_.product_rows_dots(pairs, c_.codeword_count, from, c_.span, r_.inverse.get() + at, 65536 * c_.word_unit,
                                         p_.widths[range], p_.table_width, reinterpret_cast<int16_t*>(to) + at);
            }
            return;
        }
        const float* words = c_.codewords + index % c_.codebooks * c_.codeword_count * c_.span;
        products(b, index / c_.codebooks, words, c_.codeword_count, 0, c_.span, q0, to);
    }

    void fill(const Block& b, int64_t q0) {
        const int64_t row = p_.table_width * (c_.exact ? 4 : 2), lookups = b.groups * c_.codebooks, part = c_.half ? c_.half : 16;
        char *to = r_.table.get(), *low = reinterpret_cast<char*>(r_.halves.get()), *high = low + part * row;
        for (int64_t i = 0; i < c_.bytes(b); ++i, to += c_.table_rows() * row) {
            if (c_.width == 8 && !c_.half) {
                lookup(b, i, q0, to);
                continue;
            }
            if (c_.half) {
                products(b, i, c_.codewords, part, 0, c_.span / 2, q0, low);
                products(b, i, c_.codewords, part, c_.span / 2, c_.span / 2, q0, high);
            } else {
                lookup(b, 2 * i, q0, low);
                if (2 * i + 1 < lookups)
                    lookup(b, 2 * i + 1, q0, high);
                else
                    std::fill(high, high + part * row, 0);
            }
            level_.sum_rows(low, part, high, part, p_.table_width, to, c_.exact);
        }
    }

    const Level& level_;
    const Call& c_;
    const Planes& p_;
    Room& r_;
};

struct Choice {
    const char* name;
    const Level* level;
};

// What this processor can run, best first.
const std::vector<Choice>& levels() {
    static const std::vector<Choice> all = [] {
        std::vector<Choice> found;
#ifdef AQUABIT_X86
        __builtin_cpu_init();
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("popcnt");
        const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (v4 && __builtin_cpu_supports("avx512vnni")) found.push_back({"avx512vnni", &lut_avx512::kDotsLevel});
        if (v4) found.push_back({"avx512", &lut_avx512::kLevel});
        if (v3) found.push_back({"avx2", &lut_avx2::kLevel});
#endif
        found.push_back({"baseline", &lut_baseline::kLevel});
        return found;
    }();
    return all;
}

// store(task's room, q0, from, to) for every tile and range of rows.
template <class Store>
void run_tiles(const Level& level, const Call& c, const Planes& p, const std::vector<Block>& blocks, int threads, const Store& keep) {
    const int64_t tiles = ceil_divide(p.columns, p.width);
    const int64_t chunks = std::clamp<int64_t>(ceil_divide(threads, tiles), 1, ceil_divide(c.out, 64)), rows = up(ceil_divide(c.out, chunks), 16);
    const int64_t parts = ceil_divide(c.out, rows), tasks = tiles * parts;
    int64_t bytes = 1, groups = 1, runs = 1;
    for (const Block& b : blocks) {
        bytes = std::max(bytes, c.bytes(b));
        groups = std::max(groups, b.groups);
        runs = std::max(runs, b.runs);
    }
    const int team = static_cast<int>(std::min<int64_t>(threads, tasks));
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Room room(c, p, std::min(rows, c.out), bytes, groups, runs);
        Task task(level, c, p, room);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; ++i) {
            const int64_t q0 = i / parts * p.width, from = i % parts * rows, to = std::min(c.out, from + rows);
            task.run(blocks, q0, from, to);
            keep(room.sums.get(), q0, from, to);
        }
    }
}

// The products of one token with all codewords, for the bytes of one run of a block: [bytes, size].
class Token {
  public:
    Token(const Level& level, const Call& c, const float* by_input, int64_t padded)
        : level_(level), c_(c), by_input_(by_input), padded_(padded), size_(c.width == 8 ? c.codeword_count : 256), low_(padded + 16), high_(padded + 16) {}

    int64_t size() const { return size_; }

    void fill(const Block& b, const float* x, float* products) {
        const int64_t lookups = b.groups * c_.codebooks;
        if (c_.width == 8) {
            for (int64_t l = 0; l < lookups; ++l) one(b, x, l, products + l * size_);
            return;
        }
        for (int64_t l = 0; l < lookups; l += 2) {
            one(b, x, l, low_.get());
            if (l + 1 < lookups)
                one(b, x, l + 1, high_.get());
            else
                std::fill(high_.get(), high_.get() + 16, 0.0f);
            if (c_.codeword_count < 16) {
                std::fill(low_.get() + c_.codeword_count, low_.get() + 16, 0.0f);
                std::fill(high_.get() + c_.codeword_count, high_.get() + 16, 0.0f);
            }
            level_.token_pairs(low_.get(), 16, high_.get(), 16, products + l / 2 * size_);
        }
    }

  private:
    void one(const Block& b, const float* x, int64_t lookup, float* to) {
        const int64_t group = lookup / c_.codebooks, first = b.first + group * c_.channels, inputs = std::min(c_.span, c_.inputs - first);
        Buffer<float> padded_inputs(kSpan);
        float* own = padded_inputs.get();
        std::fill(own, own + kSpan, 0.0f);
        std::copy(x + first, x + first + inputs, own);
        if (!c_.half) {
            level_.token_products(by_input_ + lookup % c_.codebooks * c_.span * padded_, padded_, own, c_.span, scratch(to));
            if (to != scratch(to)) std::copy(scratch(to), scratch(to) + c_.codeword_count, to);
            return;
        }
        Buffer<float> halves(2 * padded_);
        level_.token_products(by_input_, padded_, own, c_.span / 2, halves.get());
        level_.token_products(by_input_, padded_, own + c_.span / 2, c_.span / 2, halves.get() + padded_);
        level_.token_pairs(halves.get(), c_.half, halves.get() + padded_, c_.half, to);
    }

    // token_products writes whole vectors: small tables go through a padded place.
    float* scratch(float* to) {
        if (c_.codeword_count == padded_) return to;
        if (!spare_) spare_ = std::make_unique<Buffer<float>>(padded_ + 16);
        return spare_->get();
    }

    const Level& level_;
    const Call& c_;
    const float* by_input_;
    int64_t padded_, size_;
    Buffer<float> low_, high_;
    std::unique_ptr<Buffer<float>> spare_;
};

// One token at a time: rows are shared between threads.
void run_token(const Level& level, const Call& c, const std::vector<Block>& blocks, const float* by_input, int64_t padded, const float* x,
               float* y, int threads) {
    std::fill(y, y + c.out, 0.0f);
    Token token(level, c, by_input, padded);
    int64_t most = 1;
    for (const Block& b : blocks) most = std::max(most, b.groups * c.codebooks);
    Buffer<float> products(most * token.size() + 64), sums(c.out);
    double aux_total = 0;
    for (const Block& b : blocks) {
        token.fill(b, x, products.get());
        float aux = 0;
        const int64_t inputs = std::min(b.groups * c.channels, c.inputs - b.first);
        for (int64_t i = 0; i < inputs; ++i) aux += c.aux_weights[i % c.span] * x[b.first + i];
        aux_total += aux;
        const int64_t bytes = ceil_divide(b.groups * c.codebooks * c.width, 8), scales = b.run->scales, n = c.scale_groups;
        const int64_t part = up(ceil_divide(c.out, threads), 64);
#pragma omp parallel for num_threads(threads) if (threads > 1 && c.out * bytes > 65536)
        for (int64_t from = 0; from < c.out; from += part) {
            const int64_t to = std::min(c.out, from + part);
            level.token_rows(c.codes + b.run->codes, c.row_bytes, bytes, products.get(), token.size(), from, to, sums.get());
            for (int64_t o = from; o < to; ++o)
                y[o] += n > 1 ? c.scale[o * n + scales] * sums.get()[o] + c.aux_scale[o * n + scales] * aux : sums.get()[o];
        }
    }
    for (int64_t o = 0; o < c.out; ++o) {
        if (c.scale_groups == 1) y[o] = y[o] * c.scale[o] + c.aux_scale[o] * static_cast<float>(aux_total);
        if (c.bias) y[o] += c.bias[o];
    }
}

void lut_linear(const Level& level, const Call& c, const std::vector<Block>& blocks, const float* by_input, int64_t padded, const float* x,
                float* y, int64_t tokens, int threads) {
    if (tokens <= kTokens) {
        for (int64_t t = 0; t < tokens; ++t) run_token(level, c, blocks, by_input, padded, x + t * c.inputs, y + t * c.out, threads);
        return;
    }
    const int64_t width = std::max<int64_t>(c.exact ? kTile / 2 : kTile, 2 * level.lanes);
    const Planes planes{x, true, tokens, 0, {0}, {0}, {width}, {0}, width, width};
    run_tiles(level, c, planes, blocks, threads, [&](const float* sums, int64_t q0, int64_t from, int64_t to) {
        level.tokens_of(sums, to - from, width, std::min(width, tokens - q0), c.out, y + q0 * c.out + from);
    });
}

struct Image {
    int64_t samples, height, width, stride[2], padding[2], dilation[2], kernel[2], out_height, out_width;
};

// The padded planes of an image: phases [inputs, phases, samples, rows, pitch].
struct Layout {
    int64_t rows, pitch, phase, phases;

    Layout(const Image& m, int64_t slack) {
        const int64_t reach[2] = {(m.kernel[0] - 1) * m.dilation[0], (m.kernel[1] - 1) * m.dilation[1]};
        rows = m.out_height + reach[0] / m.stride[0];
        pitch = m.out_width + reach[1] / m.stride[1];
        phases = m.stride[0] * m.stride[1];
        phase = up(m.samples * rows * pitch + slack, 16);
    }
};

// Only what some tap reads is copied; the rest is zero.
void to_planes(const Image& m, const Layout& l, const float* x, int64_t inputs, float* planes, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && inputs * l.phase > 32768)
    for (int64_t c = 0; c < inputs; ++c) {
        float* plane = planes + c * l.phases * l.phase;
        std::fill(plane, plane + l.phases * l.phase, 0.0f);
        for (int64_t n = 0; n < m.samples; ++n)
            for (int64_t y = 0; y < m.height; ++y) {
                const int64_t py = y + m.padding[0], row = py / m.stride[0];
                if (row >= l.rows) continue;
                const float* from = x + ((n * inputs + c) * m.height + y) * m.width;
                float* to = plane + py % m.stride[0] * m.stride[1] * l.phase + (n * l.rows + row) * l.pitch;
                if (m.stride[1] == 1) {
                    const int64_t count = std::min(m.width, l.pitch - m.padding[1]);
                    if (count > 0) std::memcpy(to + m.padding[1], from, count * sizeof(float));
                    continue;
                }
                for (int64_t i = 0; i < m.width; ++i) {
                    const int64_t px = i + m.padding[1], column = px / m.stride[1];
                    if (column < l.pitch) to[px % m.stride[1] * l.phase + column] = from[i];
                }
            }
    }
}

Planes planes_of(const Level& level, const Call& c, const Image& m, int64_t threads, std::vector<int64_t>* phase_of_tap) {
    Planes p{};
    const int64_t unit = 2 * level.lanes, reach0 = (m.kernel[0] - 1) * m.dilation[0], reach1 = (m.kernel[1] - 1) * m.dilation[1];
    const int64_t rows = m.out_height + reach0 / m.stride[0], pitch = m.out_width + reach1 / m.stride[1];
    p.columns = ((m.samples - 1) * rows + m.out_height - 1) * pitch + m.out_width;
    const bool shared = !c.kernel_order && m.kernel[0] * m.kernel[1] > 1;
    if (shared) {
        int64_t tiles = ceil_divide(p.columns, kTapTile);
        if (tiles % threads && p.columns / up(tiles, threads) >= 128) tiles = up(tiles, threads);
        p.width = up(ceil_divide(p.columns, tiles), unit);
    } else {
        p.width = std::max<int64_t>(c.exact ? kTile / 2 : kTile, unit);
    }
    for (int64_t y = 0; y < m.kernel[0]; ++y)
        for (int64_t x = 0; x < m.kernel[1]; ++x) {
            const int64_t py = y * m.dilation[0], px = x * m.dilation[1];
            phase_of_tap->push_back(py % m.stride[0] * m.stride[1] + px % m.stride[1]);
            p.taps.push_back(py / m.stride[0] * pitch + px / m.stride[1]);
        }
    return p;
}

// Ranges of a plane that a tile's tables cover, one per phase that has a tap; taps become offsets in a plane of all phases.
void cover(const Level& level, const Call& c, const Layout& l, const std::vector<int64_t>& phase_of_tap, Planes* p) {
    if (c.kernel_order) {
        p->starts = {0};
        p->widths = {p->width};
        p->offsets = {0};
        p->table_width = p->width;
    } else {
        p->offsets.assign(p->taps.size(), 0);
        for (int64_t phase = 0; phase < l.phases; ++phase) {
            int64_t low = INT64_MAX, high = -1;
            for (size_t t = 0; t < p->taps.size(); ++t)
                if (phase_of_tap[t] == phase) low = std::min(low, p->taps[t]), high = std::max(high, p->taps[t]);
            if (high < 0) continue;
            for (size_t t = 0; t < p->taps.size(); ++t)
                if (phase_of_tap[t] == phase) p->offsets[t] = p->table_width + p->taps[t] - low;
            p->starts.push_back(phase * l.phase + low);
            p->widths.push_back(up(p->width + high - low, 2 * level.lanes));
            p->table_width += p->widths.back();
        }
    }
    for (size_t t = 0; t < p->taps.size(); ++t) p->taps[t] += phase_of_tap[t] * l.phase;
}

void lut_conv2d(const Level& level, const Call& c, const std::vector<Block>& blocks, const Image& m, const float* x, float* y, int threads) {
    std::vector<int64_t> phase_of_tap;
    Planes p = planes_of(level, c, m, threads, &phase_of_tap);
    const int64_t reach = *std::max_element(p.taps.begin(), p.taps.end());
    const Layout layout(m, p.width + reach + 4 * level.lanes);
    const Buffer<float> planes(c.inputs * layout.phases * layout.phase);
    to_planes(m, layout, x, c.inputs, planes.get(), threads);
    p.x = planes.get();
    p.pitch = layout.phases * layout.phase;
    cover(level, c, layout, phase_of_tap, &p);
    run_tiles(level, c, p, blocks, threads, [&](const float* sums, int64_t q0, int64_t from, int64_t to) {
        const int64_t last = std::min(q0 + p.width, p.columns);
        for (int64_t line = q0 / layout.pitch; line * layout.pitch < last; ++line) {
            const int64_t sample = line / layout.rows, row = line % layout.rows;
            const int64_t begin = std::max(line * layout.pitch, q0), end = std::min(line * layout.pitch + m.out_width, last);
            if (row >= m.out_height || begin >= end) continue;
            const int64_t column = begin - line * layout.pitch;
            for (int64_t o = from; o < to; ++o)
                std::memcpy(y + ((sample * c.out + o) * m.out_height + row) * m.out_width + column, sums + (o - from) * p.width + begin - q0,
                            (end - begin) * sizeof(float));
        }
    });
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

std::vector<Block> blocks_of(const int64_t* blocks, int64_t count, const Run* runs, const float* norms) {
    std::vector<Block> found;
    for (int64_t i = 0; i < count; ++i, blocks += 3) {
        found.push_back({blocks[0], blocks[1], blocks[2], runs, norms ? norms[i] : 0});
        runs += blocks[2];
    }
    return found;
}

// Squared length of every row's longest... of the longest row in each block, without scales: what int16 sums are bounded by.
void lut_norms(const Call& c, const std::vector<Block>& blocks, float* norms) {
    std::vector<float> weights(c.span);
    for (size_t i = 0; i < blocks.size(); ++i) {
        double longest = 0;
        for (int64_t o = 0; o < c.out; ++o) {
            double sum = 0;
            for (int64_t r = 0; r < blocks[i].runs; ++r) {
                const uint8_t* codes = c.codes + o * c.row_bytes + blocks[i].run[r].codes;
                for (int64_t g = 0; g < blocks[i].groups; ++g) {
                    std::fill(weights.begin(), weights.end(), 0.0f);
                    for (int64_t m = 0; m < c.codebooks; ++m) {
                        const int64_t l = g * c.codebooks + m, code = c.width == 8 ? codes[l] : codes[l / 2] >> (l % 2 * 4) & 15;
                        const float* word = c.codewords + (c.half ? 0 : (m * c.codeword_count + code) * c.span);
                        for (int64_t k = 0; k < c.span; ++k)
                            weights[k] += !c.half ? word[k]
                                          : k < c.span / 2 ? word[code % c.half * (c.span / 2) + k]
                                                           : word[code / c.half * (c.span / 2) + k - c.span / 2];
                    }
                    for (float w : weights) sum += static_cast<double>(w) * w;
                }
            }
            longest = std::max(longest, sum);
        }
        norms[i] = static_cast<float>(std::sqrt(longest) * 1.000001);
    }
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Choice& choice : levels()) names.emplace_back(choice.name);
    return names;
}

// The order of these fields is that of _NUMBERS and _TENSORS in lut.py.
Call call_of(const std::vector<int64_t>& n, const std::vector<uintptr_t>& a, double longest, double word_unit) {
    return {reinterpret_cast<const uint8_t*>(a[0]), floats(a[1]), floats(a[2]), floats(a[3]), floats(a[4]), floats(a[5]),
            n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9],
            reinterpret_cast<const int32_t*>(a[6]), static_cast<float>(word_unit), static_cast<float>(longest), n[10] != 0, n[11] != 0};
}

}  // namespace

void define_lut(nb::module_& m) {
    using namespace nb::literals;
    m.def("lut_levels", &level_names);
    m.def("lut_norms", [](const std::vector<int64_t>& n, const std::vector<uintptr_t>& a, uintptr_t blocks, int64_t count, uintptr_t runs,
                          uintptr_t norms) {
        const nb::gil_scoped_release released;
        const Call call = call_of(n, a, 0, 1);
        lut_norms(call, blocks_of(reinterpret_cast<const int64_t*>(blocks), count, reinterpret_cast<const Run*>(runs), nullptr),
                  reinterpret_cast<float*>(norms));
    });
    m.def("lut_linear", [](const std::vector<int64_t>& n, const std::vector<uintptr_t>& a, double longest, double word_unit, uintptr_t blocks, int64_t count,
                           uintptr_t runs, uintptr_t norms, uintptr_t by_input, int64_t padded, uintptr_t x, uintptr_t y, int64_t tokens,
                           int threads, int64_t level) {
        const nb::gil_scoped_release released;
        const Call call = call_of(n, a, longest, word_unit);
        lut_linear(*levels().at(level).level, call,
                   blocks_of(reinterpret_cast<const int64_t*>(blocks), count, reinterpret_cast<const Run*>(runs), floats(norms)),
                   floats(by_input), padded, floats(x), reinterpret_cast<float*>(y), tokens, threads);
    });
    m.def("lut_conv2d", [](const std::vector<int64_t>& n, const std::vector<uintptr_t>& a, double longest, double word_unit, uintptr_t blocks, int64_t count,
                           uintptr_t runs, uintptr_t norms, const std::vector<int64_t>& s, uintptr_t x, uintptr_t y, int threads,
                           int64_t level) {
        const nb::gil_scoped_release released;
        const Call call = call_of(n, a, longest, word_unit);
        const Image image{s[0], s[1], s[2], {s[3], s[4]}, {s[5], s[6]}, {s[7], s[8]}, {s[9], s[10]}, s[11], s[12]};
        lut_conv2d(*levels().at(level).level, call,
                   blocks_of(reinterpret_cast<const int64_t*>(blocks), count, reinterpret_cast<const Run*>(runs), floats(norms)), image,
                   floats(x), reinterpret_cast<float*>(y), threads);
    });
}

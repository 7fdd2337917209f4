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

#include "../memory.h"
#include "../processor.h"

namespace nb = nanobind;

namespace {

#include "types.h"

#define AQUABIT_AVX512VNNI
#define AQUABIT_AVX512
#define AQUABIT_EACH_LEVEL "lut/level.h"
#include "../foreach_level.h"

#include "task.h"
#include "token.h"
#include "image.h"

// Length of the longest row of weights in each block, without scales: what bounds its sums.
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

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

std::vector<Block> blocks_of(const int64_t* blocks, int64_t count, const Run* runs, const float* norms) {
    std::vector<Block> found;
    for (int64_t i = 0; i < count; ++i, blocks += 4) {
        found.push_back({blocks[0], blocks[1], blocks[2], blocks[3], runs, norms ? norms[i] : 0});
        runs += blocks[3];
    }
    return found;
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
        lut_linear(level_at(level), call,
                   blocks_of(reinterpret_cast<const int64_t*>(blocks), count, reinterpret_cast<const Run*>(runs), floats(norms)),
                   floats(by_input), padded, floats(x), reinterpret_cast<float*>(y), tokens, threads);
    });
    m.def("lut_conv2d", [](const std::vector<int64_t>& n, const std::vector<uintptr_t>& a, double longest, double word_unit, uintptr_t blocks, int64_t count,
                           uintptr_t runs, uintptr_t norms, const std::vector<int64_t>& s, uintptr_t x, uintptr_t y, int threads,
                           int64_t level) {
        const nb::gil_scoped_release released;
        const Call call = call_of(n, a, longest, word_unit);
        const Image image{s[0], s[1], s[2], {s[3], s[4]}, {s[5], s[6]}, {s[7], s[8]}, {s[9], s[10]}, s[11], s[12]};
        lut_conv2d(level_at(level), call,
                   blocks_of(reinterpret_cast<const int64_t*>(blocks), count, reinterpret_cast<const Run*>(runs), floats(norms)), image,
                   floats(x), reinterpret_cast<float*>(y), threads);
    });
}

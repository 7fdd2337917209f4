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
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../arranged.h"
#include "../geometry.h"
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

// Length of the longest row of weights in a block, without scales: what bounds its sums.
float norm_of(const Call& c, const Block& block) {
    std::vector<float> weights(c.span);
    double longest = 0;
    for (int64_t o = 0; o < c.out; ++o) {
        double sum = 0;
        for (int64_t r = 0; r < block.runs; ++r) {
            const uint8_t* codes = c.codes + o * c.row_bytes + block.run[r].codes;
            for (int64_t g = 0; g < block.groups; ++g) {
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
    return static_cast<float>(std::sqrt(longest) * 1.000001);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A weight with what the kernel makes of it (_Plan in lut_plan.py): all that a call needs besides its inputs, checked here.
class LutWeight {
  public:
    LutWeight(nb::handle weight, nb::handle plan) : weight_(weight), shape_(nb::cast<Shape>(weight.attr("shape"))) {
        const Arranged& w = weight_;
        if (w.span() > kSpan || w.area > kTaps)
            throw nb::value_error("the table kernel takes groups of at most 64 inputs, and kernels of at most 64 taps");
        const int64_t count = int64_t(1) << w.bits * w.fused, half = w.fused > 1 ? int64_t(1) << w.bits * w.fused / 2 : 0;
        const int64_t tables = half ? 1 : w.books, rows = half ? half : count, span = half ? w.span() / 2 : w.span();
        padded_ = rounded_up(rows, 16);
        call_.codes = w.codes, call_.scale = w.scale, call_.bias = nullptr;
        call_.aux_scale = arrays_.take<float>(plan, "aux_scale", {w.out, w.scales});
        call_.aux_weights = arrays_.take<float>(plan, "aux_weights", {w.span()});
        call_.codewords = arrays_.take<float>(plan, "codewords", {tables, rows, span});
        call_.words = reinterpret_cast<const int32_t*>(arrays_.take<int16_t>(plan, "words", {w.books, count, rounded_up(w.span(), 2)}));
        call_.out = w.out, call_.inputs = w.cin, call_.row_bytes = w.row_bytes, call_.width = w.width(), call_.codebooks = w.books;
        call_.codeword_count = count, call_.span = w.span(), call_.channels = w.channels(), call_.scale_groups = w.scales, call_.half = half;
        call_.word_unit = static_cast<float>(nb::cast<double>(plan.attr("word_unit")));
        call_.longest = static_cast<float>(nb::cast<double>(plan.attr("longest")));
        call_.exact = false, call_.kernel_order = w.kernel_order && w.area > 1;
        by_input_ = arrays_.take<float>(plan, "by_input", {tables, span, padded_});
        if (!call_.aux_scale || !call_.aux_weights || !call_.codewords || !by_input_) throw nb::value_error("the plan lacks a table");
        read_blocks(plan);
        check_codes(count);
        const nb::gil_scoped_release released;
        for (Block& block : blocks_) block.norm = norm_of(call_, block);
    }
    LutWeight(const LutWeight&) = delete;

    // x [tokens, in] to y [tokens, out]; ``bias`` [out], or 0.
    void linear(uintptr_t x, uintptr_t y, uintptr_t bias, int64_t tokens, bool exact, int threads, int64_t level) const {
        if (shape_.size() != 2) throw std::invalid_argument("a weight " + text_of(shape_) + " is no matrix");
        const Call call = this->call(bias, exact, 0, call_.out);
        lut_linear(level_at(level), call, blocks_, by_input_, padded_, pointer<const float>(x), pointer<float>(y), tokens, threads);
    }

    // x of ``sizes`` to y [samples, out, ..] as ``geometry`` says, of each group by its own rows.
    void conv2d(uintptr_t x, uintptr_t y, uintptr_t bias, const Sizes& sizes, const GeometryNumbers& geometry, bool exact, int threads,
                int64_t level) const {
        const Geometry g(geometry, sizes, shape_);
        const Image image{sizes[0], sizes[1], sizes[2], sizes[3], {g.stride[0], g.stride[1]}, {g.padding[0], g.padding[1]},
                          {g.dilation[0], g.dilation[1]}, {shape_[2], shape_[3]}, call_.out, g.output[0], g.output[1]};
        const int64_t rows = call_.out / g.groups;
        for (int64_t group = 0; group < g.groups; ++group) {
            const Call call = this->call(bias, exact, group * rows, rows);
            lut_conv2d(level_at(level), call, blocks_, image, pointer<const float>(x) + group * call.inputs * image.height * image.width,
                       pointer<float>(y) + group * rows * image.out_height * image.out_width, threads);
        }
    }

  private:
    Call call(uintptr_t bias, bool exact, int64_t first, int64_t rows) const {
        Call own = call_;
        own.codes += first * own.row_bytes, own.scale += first * own.scale_groups, own.aux_scale += first * own.scale_groups;
        own.bias = bias ? pointer<const float>(bias) + first : nullptr;
        own.out = rows, own.exact = exact;
        return own;
    }

    void read_blocks(nb::handle plan) {
        const int64_t count = shape_of(plan, "blocks").at(0), all = shape_of(plan, "runs").at(0);
        const int64_t* block = arrays_.take<int64_t>(plan, "blocks", {count, 4});
        const Run* run = reinterpret_cast<const Run*>(arrays_.take<int64_t>(plan, "runs", {all, 3}));
        const Run* const end = run + all;
        for (int64_t i = 0; i < count; ++i, block += 4) {
            const Block b{block[0], block[1], block[2], block[3], run, 0};
            const bool inputs = b.first >= 0 && b.inputs > 0 && b.groups > 0 && b.inputs <= call_.inputs - b.first &&
                                b.groups == ceil_divide(b.inputs, call_.channels);
            bool inside = inputs && b.runs > 0 && b.runs <= end - run;
            for (int64_t r = 0; inside && r < b.runs; ++r, ++run)
                inside = run->tap >= 0 && run->tap < (call_.kernel_order ? 1 : weight_.area) && run->codes >= 0 &&
                         run->codes + call_.bytes(b) <= call_.row_bytes && run->scales >= 0 && run->scales < call_.scale_groups;
            if (!inside) throw nb::value_error("a block of the plan lies outside the weight's inputs, codes or scales");
            blocks_.push_back(b);
        }
        if (run != end) throw nb::value_error("the plan has more runs than its blocks");
    }

    // A code is followed to its row of the table: there has to be one.
    void check_codes(int64_t count) const {
        if (call_.width == 4 || count == 256) return;  // tables of bytes, and of pairs of half bytes, have 256 rows
        const int64_t most = *std::max_element(call_.codes, call_.codes + call_.out * call_.row_bytes);
        if (most >= count)
            throw nb::value_error(("codes reach " + std::to_string(most) + ", but a lookup has " + std::to_string(count) + " values").c_str());
    }

    Arranged weight_;
    Shape shape_;
    Arrays arrays_;
    Call call_;
    std::vector<Block> blocks_;
    const float* by_input_;
    int64_t padded_;
};

}  // namespace

void define_lut(nb::module_& m) {
    using namespace nb::literals;
    m.def("lut_levels", &level_names);
    nb::class_<LutWeight>(m, "LutWeight")
        .def(nb::init<nb::handle, nb::handle>(), "weight"_a, "plan"_a)
        .def("linear", &LutWeight::linear, "x"_a, "y"_a, "bias"_a, "tokens"_a, "exact"_a, "threads"_a, "level"_a,
             nb::call_guard<nb::gil_scoped_release>())
        .def("conv2d", &LutWeight::conv2d, "x"_a, "y"_a, "bias"_a, "sizes"_a, "geometry"_a, "exact"_a, "threads"_a, "level"_a,
             nb::call_guard<nb::gil_scoped_release>());
}

// The tile-decode backend: rows of an arranged weight are decoded, a few at a time, to integers of 8 or 16 bits and multiplied with
// quantized activations by the integer dot products of the processor; or decoded to floats for a dense library.
//
// The same source serves every instruction set; which one runs is chosen at run time. Every result is one sum in one order, however many
// threads share the rows.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
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

#include "../arranged.h"
#include "../geometry.h"
#include "../memory.h"
#include "../processor.h"
#include "integers.h"
#include "plan.h"
#include "types.h"

namespace nb = nanobind;

namespace {

#define AQUABIT_AVX512VNNI
#define AQUABIT_AVXVNNI
#define AQUABIT_TILES "decode/tiles.h"
#define AQUABIT_EACH_LEVEL "decode/level.h"
#include "../foreach_level.h"

#include "product.h"
#include "tokens.h"
#include "images.h"

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A weight as the kernels read it, checked here.
class DecodeWeight {
  public:
    explicit DecodeWeight(nb::handle weight) : arranged_(weight), shape_(nb::cast<Shape>(weight.attr("shape"))) {
        const Arranged& a = arranged_;
        const int64_t codewords = int64_t(1) << a.bits;
        const bool none = nb::object(weight.attr("tables")).is_none();
        const int64_t sets = none ? 0 : shape_of(weight, "tables").at(0) == a.out ? a.out : 1;
        if (none && !a.scalar()) throw nb::value_error("a weight without codebooks has one code for each of its values");
        const float* tables = arrays_.take<float>(weight, "tables", {sets, a.books, codewords, a.group});
        const float* offset = arrays_.take<float>(weight, "offset", {a.out, a.scales});
        stretches_ = stretches_of(a.segments, a.fused, a.cin);
        weight_ = {a.codes, tables, a.scale, offset, nullptr, a.segments.data(), stretches_.data(), static_cast<int64_t>(a.segments.size()),
                   static_cast<int64_t>(stretches_.size()), a.row_bytes, a.out, a.cin, a.area, a.bits, a.books, a.group, a.fused, a.kernel_order, sets, codewords, a.scales,
                   offset ? a.scales : 0, {}, false};
        weight_.integers = integers_of(weight_, levels_);
        weight_.floats8 = are_floats8(weight_);
    }
    DecodeWeight(const DecodeWeight&) = delete;

    // x [tokens, in], rounded as ``act`` says (bits, or kSymmetric; 16: off), to y [tokens, out]; ``bias`` [out], or 0. ``narrow``: all three are bfloat16.
    // ``function`` (0: none) is applied to x before; if it is gated, x is [tokens, 2 in].
    Outcome linear(uintptr_t x, uintptr_t y, uintptr_t bias, int64_t tokens, int64_t act, bool few, int64_t threads, int64_t level,
                   bool narrow, int64_t function) const {
        if (shape_.size() != 2) throw std::invalid_argument("a weight " + text_of(shape_) + " is no matrix");
        if (few && tokens > kFew) throw std::invalid_argument(std::to_string(tokens) + " tokens are not few");
        if (function && ((function & ~kGated) < kGelu || (function & ~kGated) > kQuickGelu))
            throw std::invalid_argument(std::to_string(function) + " is no function");
        const Buffer<float> wide(narrow && bias ? weight_.out : 0);
        const Weight w = with(bias, narrow, level, wide.get());
        const Method method = method_of(w, level, act, threads);
        return (few ? few_tokens : linear_product)(method, w, {pointer<void>(x), w.cin, narrow, false, function}, {pointer<void>(y), w.out, narrow}, tokens);
    }

    // x of ``sizes`` to y [samples, out, ..] as ``geometry`` says; channels from ``split`` on (0: none) have ranges of their own.
    // ``narrow``: x, y and bias are bfloat16.
    Outcome conv2d(uintptr_t x, uintptr_t y, uintptr_t bias, const Sizes& sizes, const GeometryNumbers& geometry, int64_t split, int64_t act,
                   int64_t threads, int64_t level, bool narrow) const {
        const Geometry g(geometry, sizes, shape_);
        if (split < 0 || split >= sizes[1]) throw std::invalid_argument("no channels on one side of " + std::to_string(split));
        const Buffer<float> wide(narrow && bias ? weight_.out : 0);
        const Weight w = with(bias, narrow, level, wide.get());
        const Convolution c = {sizes[0], sizes[1], sizes[2], sizes[3], g.output[0], g.output[1], g.groups, shape_[2], shape_[3],
                               g.stride[0], g.stride[1], g.padding[0], g.padding[1], g.dilation[0], g.dilation[1], split};
        return conv_product(method_of(w, level, act, threads), w, c, {pointer<void>(x), narrow}, {pointer<void>(y), narrow});
    }

    // Rows [first, last), decoded, to y.
    void rows(int64_t first, int64_t last, uintptr_t y, int64_t threads, int64_t level) const {
        if (first < 0 || last > weight_.out) throw std::invalid_argument("rows beyond the weight's");
        decoded_rows(level_at(level), weight_, first, last, threads, pointer<float>(y));
    }

    // Whether codes are multiplied as integers with activations that are.
    bool integers() const { return weight_.integers.there; }

  private:
    // With a bias, of bfloat16 (``narrow``; as float32 in ``room`` then) or of float32, or none (0).
    Weight with(uintptr_t bias, bool narrow, int64_t level, float* room) const {
        Weight own = weight_;
        own.bias = pointer<const float>(bias);
        if (bias && narrow) {
            level_at(level).widen(pointer<const uint16_t>(bias), own.out, room);
            own.bias = room;
        }
        return own;
    }

    Arranged arranged_;
    Shape shape_;
    Arrays arrays_;
    std::vector<Segment> stretches_;
    uint8_t levels_[16];
    Weight weight_;
};

}  // namespace

void define_decode(nb::module_& m) {
    using namespace nb::literals;
    m.def("decode_levels", &level_names);
    nb::class_<DecodeWeight>(m, "DecodeWeight")
        .def(nb::init<nb::handle>(), "weight"_a)
        .def("linear", &DecodeWeight::linear, "x"_a, "y"_a, "bias"_a, "tokens"_a, "act"_a, "few"_a, "threads"_a, "level"_a,
             "narrow"_a = false, "function"_a = 0, nb::call_guard<nb::gil_scoped_release>())
        .def("conv2d", &DecodeWeight::conv2d, "x"_a, "y"_a, "bias"_a, "sizes"_a, "geometry"_a, "split"_a, "act"_a, "threads"_a, "level"_a,
             "narrow"_a = false, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("integers", &DecodeWeight::integers)
        .def("rows", &DecodeWeight::rows, "first"_a, "last"_a, "y"_a, "threads"_a, "level"_a, nb::call_guard<nb::gil_scoped_release>());
}

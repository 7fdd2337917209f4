// An arranged weight (arranged.py) as all kernels need it, read from Python and checked once. For the baseline only: never included in a
// level.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "arrays.h"
#include "memory.h"
#include "segment.h"

class Arranged {
  public:
    int64_t out, cin, area, bits, books, group, fused, scales, row_bytes = 0;
    bool kernel_order;
    const uint8_t* codes;  // [out, row_bytes]
    const float* scale;    // [out, scales]
    std::vector<Segment> segments;
    Arrays arrays;

    explicit Arranged(nanobind::handle weight)
        : bits(integer(weight, "bits")),
          books(integer(weight, "codebooks")),
          group(integer(weight, "group")),
          fused(integer(weight, "fused")),
          kernel_order(nanobind::cast<std::string>(weight.attr("order")) == "kernel") {
        const Shape shape = nanobind::cast<Shape>(weight.attr("shape"));
        if ((shape.size() != 2 && shape.size() != 4) || *std::min_element(shape.begin(), shape.end()) < 1)
            throw nanobind::value_error(("a weight has 2 or 4 dimensions, not " + text_of(shape)).c_str());
        out = shape[0], cin = shape[1], area = shape.size() == 4 ? shape[2] * shape[3] : 1;
        if (!possible())
            throw nanobind::value_error(("a weight " + text_of(shape) + " cannot have " + std::to_string(bits) + " bits, " +
                                         std::to_string(books) + " codebooks, groups of " + std::to_string(group) + " and " +
                                         std::to_string(fused) + " codes a lookup")
                                            .c_str());
        const Shape sizes = shape_of(weight, "scale");
        scales = sizes.empty() ? 0 : sizes.back();
        if (scales < 1) throw nanobind::value_error("scale needs a group of inputs or more");
        scale = arrays.take<float>(weight, "scale", {out, scales});
        for (nanobind::handle segment : weight.attr("segments")) add(nanobind::cast<Shape>(segment));
        codes = arrays.take<uint8_t>(weight, "codes", {out, row_bytes});
    }
    Arranged(const Arranged&) = delete;

    int64_t width() const { return bits * fused <= 4 ? 4 : 8; }                 // bits of a lookup
    int64_t span() const { return group * fused; }                              // inputs of a lookup
    int64_t channels() const { return kernel_order ? 1 : span(); }              // input channels of a lookup
    bool scalar() const { return group == 1 && books == 1 && !kernel_order; }   // codes stand for single weights

  private:
    bool possible() const {
        const bool one_byte = bits >= 1 && books >= 1 && group >= 1 && bits <= 8 && fused >= 1 && bits * fused <= 8;
        return one_byte && (fused == 1 || ((fused == 2 || fused == 4 || fused == 8) && scalar())) && (!kernel_order || group == area);
    }

    void add(const Shape& numbers) {
        if (numbers.size() != 4) throw nanobind::value_error("a segment has 4 numbers");
        const Segment s = {numbers[0], numbers[1], numbers[2], numbers[3], row_bytes};
        const bool inputs = s.tap >= 0 && s.tap < area && s.start >= 0 && s.count > 0 && s.start + s.count <= cin;
        const bool whole = kernel_order ? segments.empty() && s.tap == 0 && s.count == cin : s.count % group == 0;
        const bool scaled = s.scales >= 0 && (scales == 1 || s.scales < scales);
        if (!inputs || !whole || !scaled)
            throw nanobind::value_error("a segment of the arranged weight lies outside its inputs or scales");
        row_bytes += ceil_divide(ceil_divide(s.count, channels()) * books * width(), 8);
        segments.push_back(s);
    }
};

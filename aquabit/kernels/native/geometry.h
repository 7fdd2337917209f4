// How a Conv2d's kernel moves over an image (geometry.py). For the baseline only: never included in a level.
#pragma once
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"

using Sizes = std::array<int64_t, 4>;            // of an image: samples, channels, height, width
using GeometryNumbers = std::array<int64_t, 7>;  // stride, padding and dilation, each down and across; groups

struct Geometry {
    int64_t stride[2], padding[2], dilation[2], groups;
    int64_t output[2];  // height and width of the result

    // Raises ValueError where a weight of ``shape`` and an image of ``sizes`` do not go together in this way.
    Geometry(const GeometryNumbers& n, const Sizes& sizes, const Shape& shape)
        : stride{n[0], n[1]}, padding{n[2], n[3]}, dilation{n[4], n[5]}, groups(n[6]) {
        bool fits = shape.size() == 4 && groups >= 1 && shape[0] % groups == 0 && sizes[1] == shape[1] * groups;
        for (int side = 0; fits && side < 2; ++side) {
            fits = stride[side] >= 1 && padding[side] >= 0 && dilation[side] >= 1;
            const int64_t room = sizes[2 + side] + 2 * padding[side] - dilation[side] * (shape[2 + side] - 1) - 1;
            fits = fits && room >= 0;
            if (fits) output[side] = room / stride[side] + 1;
        }
        if (!fits)
            throw std::invalid_argument("an image " + text_of({sizes.begin(), sizes.end()}) + " and a weight " + text_of(shape) +
                                        " do not go together with stride, padding, dilation and groups " + text_of({n.begin(), n.end()}));
    }
};

// The range of a row of values: plain values, no library code.
#pragma once

// ``finite``: whether all values are; low and high are of those that are no NaN.
struct Limits {
    float low, high;
    bool finite;
};

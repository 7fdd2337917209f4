// A part of a row of an arranged weight (arranged.py): plain values, no library code.
#pragma once
#include <cstdint>

// Inputs [start, start + count) at one tap of the kernel, under one group of scales; codes from byte ``at`` of a row.
struct Segment {
    int64_t tap, start, count, scales, at;
};

// How activations are rounded besides to so many bits between the smallest and the largest: the codes of activation_bits.py.
#pragma once

constexpr int kSymmetric = 17;         // integers from -127 to 127 under one scale
constexpr int kE4m3 = 18;              // float8 e4m3fn under one scale
constexpr float kSymmetricMost = 127;  // the largest of them
constexpr float kE4m3Most = 448;

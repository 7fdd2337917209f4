// Codes of a weight as integers of 8 bits. For the baseline only: never included in a level.
#pragma once
#include <algorithm>
#include <cmath>

#include "types.h"

// Whether every offset is that of codes less 2^(bits - 1): codes with a sign, which need none.
inline bool with_sign(const Weight& w) {
    const float half = static_cast<float>(int64_t(1) << (w.bits - 1));
    const int64_t count = w.offset ? w.out * w.scales : 0;
    return count && std::equal(w.offset, w.offset + count, w.scale, [&](float offset, float scale) { return offset == -half * scale; });
}

// Uniform codes about their middle; those of 7 and 8 bits have no room for the exact one.
inline Integers uniform(const Weight& w) {
    const int64_t middle = int64_t(1) << (w.bits - 1), twice = 2 * middle - 1;
    if (with_sign(w)) return {nullptr, w.bits, 1, middle, 1, 0, true, true};
    if (w.bits <= 6) return {nullptr, w.bits, 2, twice, 0.5f, twice * 0.5f, true, false};
    return {nullptr, w.bits, 1, middle, 1, static_cast<float>(middle), true, false};
}

// The values of a table, [codewords], as whole numbers of a power of two, where they are such of 8 bits; ``levels`` [16] is filled.
inline Integers whole_numbers(const Weight& w, uint8_t* levels) {
    const float* end = w.tables + w.codewords;
    for (float unit = 1; unit > 1e-6f; unit *= 0.5f) {
        const bool whole = std::all_of(w.tables, end, [&](float value) { return std::rint(value / unit) == value / unit; });
        if (!whole) continue;
        const float low = std::min(0.0f, *std::min_element(w.tables, end) / unit), high = *std::max_element(w.tables, end) / unit;
        if (low < -128 || high > 127) break;
        const int64_t center = static_cast<int64_t>(-low), most = std::max(center, static_cast<int64_t>(high));
        int64_t bits = 1;
        while (int64_t(1) << (bits - 1) < most) ++bits;
        for (int64_t i = 0; i < 16; ++i) levels[i] = i < w.codewords ? static_cast<uint8_t>(w.tables[i] / unit - low) : 0;
        return {levels, bits, 1, center, unit, 0, true, !w.offset};
    }
    return {};
}

// Of single codes that stand for themselves, or of 3 or 4 bits for entries of a table that all outputs share.
inline Integers integers_of(const Weight& w, uint8_t* levels) {
    if (!w.tables) return uniform(w);
    const bool short_codes = w.group == 1 && w.books == 1 && !w.kernel_order && w.table_sets == 1 && w.fused == 2;
    return short_codes ? whole_numbers(w, levels) : Integers{};
}

// Whether single codes are those of float8 e4m3fn, by their table: values whose bits say what they are need no look-up.
inline bool are_floats8(const Weight& w) {
    if (!w.tables || w.bits != 8 || w.group != 1 || w.books != 1 || w.kernel_order || w.table_sets != 1) return false;
    for (int64_t code = 0; code < 256; ++code) {
        const int exponent = code >> 3 & 15, fraction = code & 7;
        const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(1.0f * fraction, -9);
        const float value = (code & 127) == 127 ? 0 : code < 128 ? size : -size;  // codes of no number are kept as zeros
        if (w.tables[code] != value) return false;
    }
    return true;
}

// What the tile-decode backend passes between its drivers and its levels: plain values, no library code.
#pragma once
#include <cstdint>

#include "../limits.h"
#include "../rounding.h"
#include "../segment.h"

constexpr int kMostLanes = 16, kMostVectors = 2;
constexpr int64_t kMostTile = 48;      // rows of weights that a thread decodes at once
constexpr int64_t kSmallTile = 16384;  // bytes of decoded weights that a thread may hold of any layer: half of a first-level cache
constexpr int64_t kDotRows = 4;        // so many tokens are multiplied row by row at once
constexpr int64_t kFew = 8;            // at most so many in all
constexpr int kActivation = 16383;     // of activations that are not quantized: 15 bits
constexpr int64_t kWideRun = 128;      // inputs between flushes then; 2^31 / 16383 / 128 leaves the mean weight 10 bits
constexpr double kMostLost = 4e-4;     // relative error of activations that are rounded to them
constexpr int64_t kByteRun = 512;      // inputs between flushes where activations have at most 8 bits and weights up to 16
constexpr int64_t kOwnRun = 64;        // groups of scales of so many inputs or more get integers of their own size
constexpr int64_t kShortRun = 128;       // inputs of a run up to which a product more is felt
constexpr int64_t kFarthestZero = 64;   // steps from the zero points' middle up to which float32 takes off the rest: it adds an error of
                                        // at most 1e-5, where codes all have one sign and all but 2 of 320 inputs are zero
constexpr int64_t kTileSteps = 16;      // of a product of tiles
// Functions of inputs, which a layer applies as it reads them: of each value, or of what follows the values times these (kGated).
constexpr int64_t kGelu = 1, kGeluTanh = 2, kSilu = 3, kQuickGelu = 4, kGated = 8;
constexpr int64_t kLongestRun = 16384;  // of 8 bits times 8 bits: their sums fit 128 times 16 bits

// Codes as whole numbers: a code, or what ``levels`` has for it (16 of them; null: itself), times ``step`` less ``center`` is an integer
// of 8 bits about zero: what cancels later need not be summed. A weight is that times ``unit`` times its scale, and an offset, which is
// zero everywhere where ``centred``.
struct Integers {
    const uint8_t* levels;
    int64_t bits, step, center;  // bits: of the levels
    float unit, middle;          // what ``center`` stands for, in scales: a weight is (unit * integer + middle) * scale + offset
    bool there, centred;

    int64_t most() const { return step == 2 ? center : int64_t(1) << (bits - 1); }  // the farthest from zero
};

// An arranged weight, with the bias of a call. Rows are decoded to [area, cin].
struct Weight {
    const uint8_t* codes;
    const float *tables, *scale, *offset, *bias;  // tables, offset and bias may be null
    const Segment *segments, *stretches;          // stretches: segments that follow each other in the codes and in the row are one
    int64_t segment_count, stretch_count, row_bytes, out, cin, area, bits, books, group, fused, kernel_order, table_sets, codewords, scales,
        offsets;
    Integers integers;
    bool floats8;  // codes are those of float8 e4m3fn


    int64_t length() const { return cin * area; }
};

// Weights at one tap that are multiplied in one go: ``steps`` dwords (4 inputs of 8 bits, 2 of 16) of a row, aligned to whole steps of
// the activations; what lies before ``lead`` and after ``count`` is zero.
struct Piece {
    int64_t offset;  // bytes from where a vector of positions starts to its first step
    int64_t steps;
    int64_t slot;  // bytes from the start of the row
    int64_t lead, from, count;  // inputs; ``from`` in the decoded row
};

// Pieces that are accumulated in integers, under one scale.
struct Run {
    int64_t first, last, scales, inputs;
};

// Runs whose activations share a scale and a zero point.
struct Range {
    int64_t first, last, number;
};

struct Plan {
    const Piece* pieces;
    const Run* runs;
    const Range* ranges;
    int64_t run_count, range_count, slot_bytes;
    bool straight;  // 8 bits of a row lie in its slot as they are decoded
    int64_t even;   // inputs of each run, one piece, where they are the same power of two from 4 on; else 0
    int64_t held;   // steps of 8 bits whose products fit 16 bits together, two in each lane and step, whatever the activations
};

// Integers that stand for activations: q = clamp(rint(x * inverse), low, high) - base, x ~ (q - zero + rest) * scale. A zero point that is
// one of the integers is taken off in integers (``zero``): what it adds to a sum is often far larger than the sum. Else it is ``rest``.
struct Grid {
    float inverse, low, high, base, scale, rest;
    int32_t zero;
};

// Quantized activations, as [step][position] dwords from each vector's start on.
struct Activations {
    const uint8_t* values;
    const int64_t* starts;  // [vectors]: bytes
    int64_t step_bytes, positions;
    const float *scale, *rest;  // [ranges, positions]
    const int32_t* zero;        // [ranges, positions]: pairs of 16 bits (zero, 128 zero), or null
    const float* left;          // [ranges, positions]: middle less zero
    float* sums;                // [runs, positions] of integers less zero
    int64_t middle[2];          // of the zero points, by range
    bool apart;                 // zero points lie farther from it than kFarthestZero: each is taken off in integers
};

// What is known of a run of a row: the scale of its integers, what is added for each input, and the sum of the integers, which zero
// points are multiplied with: times the middle zero point, negative; or, of zero points apart, negative as pairs of 16 bits (low, high / 128).
enum Known { kFactor, kOffset, kStart, kKnown };

// Decoded rows.
struct Tile {
    const uint8_t* slots;
    int64_t row_bytes, rows;  // rows: padded to whole blocks; the stride of ``total`` and ``whole``
    const float* known;       // [rows, kKnown, runs]; kStart: int32
    const float *total;       // [ranges, rows]: what a one in each input gives
    const float *whole;       // [ranges, rows]: the same without offsets
    const float *bias;        // [rows]
    bool offsets;             // whether there are any
};

// A vector of a row's codes: ``bytes`` from byte ``from`` on, the first of them in segment ``first``.
struct Strip {
    int64_t from, bytes, first;
};

// Few tokens, laid out as the codes of a row lie (strips.h): a vector for each strip, place of a code in its byte, and token.
struct Strips {
    int64_t tokens, count, stride;
    Strip* strips;
    int32_t *segments, *inputs;  // [strips, lanes]: each lane's segment, less the strip's first, and how many inputs it meets
    Grid* grids;                 // [tokens]
    int8_t* bytes;               // their integers, less 128
    int8_t* ones;                // a one for each input, laid out as a token's; of codes with levels only, where no code is a zero
    float* floats;               // or they as they are
    int32_t* sums;               // [strips, tokens, lanes] of the integers less zero, times the codes' center; of several segments only
    float* totals;               // [tokens, stride]: of each segment the sum of its inputs, of integers less zero; zeros at the end
};

// Results at positions [position, position + count), of one vector, go to ``to`` on in a channel of the first sample.
struct Span {
    int64_t position, count, to;
};

// Squares of errors and of what they are errors of.
struct Errors {
    double error, all;
};

struct Level {
    int64_t lanes, rows, vectors;
    bool bytes;  // whether there are products of 8 bits (for codes of up to ``byte_bits`` bits)
    int64_t byte_bits;
    void (*multiply)(const Plan&, const Tile&, int64_t row, int64_t rows, const Activations&, bool wide, int64_t vector, int64_t vectors,
                     float* y);
    void (*sum)(const Plan&, const Activations&, const uint8_t* ones, bool wide, int64_t vector, int64_t vectors);
    void (*fill_codes)(const Weight&, const Plan&, const Activations&, bool wide, int64_t row, int8_t* room, int32_t* sums, uint8_t* slot,
                       float* known, float* total, float* whole, int64_t stride);
    void (*fill_values)(const Weight&, const Plan&, int64_t most, int64_t row, float* room, uint8_t* slot, float* known, float* total,
                        int64_t stride, Errors*);
    void (*decode_row)(const Weight&, int64_t row, float* room);
    bool (*token_grid)(const float* x, int64_t n, int64_t bits, bool wide, Grid*);
    bool (*sample_grid)(const void* x, bool narrow, int64_t n, int64_t bits, bool wide, Grid*);
    void (*pack_tokens)(const float* x, int64_t count, int64_t length, const Grid*, bool wide, uint8_t* out, int64_t step_bytes, Errors*);
    void (*quantize_token)(const float* x, int64_t n, const Grid*, uint8_t* out);
    void (*pack_line)(const void* const* lines, bool narrow, int64_t channels, int64_t count, const Grid* const*, bool wide, int32_t* out,
                      Errors*);
    void (*put_tokens)(const float* tile, int64_t stride, int64_t rows, int64_t tokens, float* y, int64_t y_stride, bool past);
    void (*put_pixels)(const float* tile, int64_t stride, int64_t rows, const Span* first, const Span* end, int64_t position, void* y,
                       bool narrow, int64_t area);
    bool (*serves_strips)(const Weight&, bool bytes);
    void (*cut_strips)(const Weight&, int64_t unit, Strips*);
    bool (*lay_bytes)(const Weight&, const float* token, int64_t bits, int64_t t, int8_t* room, const Strips&);
    void (*lay_floats)(const Weight&, const float* token, int64_t t, const Strips&);
    void (*dot_bytes)(const Weight&, int64_t first, int64_t last, const Strips&, float* y, int64_t y_stride);
    void (*dot_floats)(const Weight&, int64_t first, int64_t last, const Strips&, float* y, int64_t y_stride);
    void (*widen)(const uint16_t* from, int64_t n, float* to);
    void (*narrow)(const float* from, int64_t n, uint16_t* to);
    void (*dot_codes)(const Weight&, int64_t row, const uint8_t* x, const Grid*, const int32_t* sums, int64_t tokens, int8_t* room,
                      float* y, int64_t y_stride);
    void (*dot_values)(const Weight&, int64_t row, const float* x, int64_t tokens, float* room, float* y, int64_t y_stride);
    void (*activate)(const void* row, bool narrow, int64_t n, int64_t function, float* to);
    // Of tiles (AMX): a thread's state before and after products (else null), steps that pieces are padded to, and what serves other products.
    void (*enter)() = nullptr;
    void (*leave)() = nullptr;
    int64_t steps = 1;
    const Level* without = nullptr;
};

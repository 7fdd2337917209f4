// What is shared by the levels of the attention kernel and its driver: plain values, no library code.
#pragma once

// Rows of a tensor [.., rows, columns] by address and strides in elements; columns lie one after another.
struct Rows {
    void* data;
    const int64_t* strides;  // of the leading dimensions
    int64_t stride;          // from row to row
    bool narrow;             // bfloat16, else float32
};

enum class MaskKind : int64_t { none, boolean, single, narrow };  // bool (false: not seen), float32, bfloat16 (added)

struct Mask {
    MaskKind kind;
    const void* data;
    const int64_t* strides;  // of the leading dimensions
    int64_t row, column;     // strides; 0 where it is broadcast
};

// What an integer of a token's values stands for, and the integer 0..255 that is zero.
struct Step {
    float step;
    int32_t zero;
};

// How the steps of a token's values follow from their range: of 8 and of 6 bits, and symmetric (fake_quant.py).
enum class StepKind { eight, six, symmetric };

struct Attention {
    Rows q, k, v, y;  // [.., n, d], [.., m, d], [.., m, e] -> [.., n, e]
    Mask mask;
    const int64_t* sizes;  // of the leading dimensions
    int64_t dimensions, n, m, d, e;
    int64_t block;  // queries that are taken together
    float scale;
    const Step *q_steps, *k_steps;  // [samples, n] and [samples, m], samples being the dimensions before that of heads
    const char* whole;              // [samples]: whether all values of Q and K are on such grids; null where no sample's are
    bool all_whole;

    int64_t blocks() const { return (n + block - 1) / block; }  // of a head
};

// What is compiled for each instruction set: level.h. A part takes the blocks [first, last) of all heads, one head after
// another; it returns false where a value of Q, K or V is not finite or beyond 1e30, and the result is of no use then.
struct Level {
    int64_t rows;  // queries of a tile, which blocks are multiples of
    int64_t (*room)(const Attention&);
    bool (*part)(const Attention&, int64_t first, int64_t last, unsigned char* room);
    // The step of a token of ``length`` values; false where some value is on no such grid. Null where integers are no faster.
    bool (*step_of)(StepKind kind, const float* token, int64_t length, Step* found);
};

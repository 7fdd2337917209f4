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

struct Attention {
    Rows q, k, v, y;  // [.., n, d], [.., m, d], [.., m, e] -> [.., n, e]
    Mask mask;
    const int64_t* sizes;  // of the leading dimensions
    int64_t dimensions, n, m, d, e;
    int64_t block;  // queries that are taken together
    float scale;

    int64_t blocks() const { return (n + block - 1) / block; }  // of a head
};

// What is compiled for each instruction set: level.h. A part takes the blocks [first, last) of all heads, one head after
// another; it returns false where a value of Q, K or V is not finite or beyond 1e30, and the result is of no use then.
struct Level {
    int64_t rows;  // queries of a tile, which blocks are multiples of
    int64_t (*room)(const Attention&);
    bool (*part)(const Attention&, int64_t first, int64_t last, unsigned char* room);
};

// What the parts of the table kernel tell each other: part of lut.cpp.

constexpr int64_t kSpan = 64;       // inputs of a lookup, at most
constexpr int64_t kTaps = 64;       // of a kernel, at most
constexpr int64_t kTapTile = 320;   // columns of a tile whose taps share tables
constexpr int64_t kTile = 32;       // columns of any other tile
constexpr int64_t kTokens = 1;      // up to so many tokens are looked up one by one
constexpr int64_t kAhead = 16;      // rows whose codes are fetched before their turn
constexpr int64_t kParallel = 2 << 20;  // bytes of codes times columns below which other threads are not woken: 40 us
constexpr int64_t kRows = 64;         // of which it is asked together whether int16 was enough
constexpr double kMostLost = 8.5e-4;  // relative error, in the norm, as expected: what it comes to may be a little more than that
constexpr int64_t kShorts = 32767;

struct Run {
    int64_t tap, codes, scales;  // codes: byte offset in a row; scales: index of the scale group
};

struct Block {
    int64_t first, inputs, groups, runs;  // input channels, which the last group may reach beyond; groups of every run
    const Run* run;
    float norm;  // length of the longest row of weights in this block, without scales
};

struct Call {
    const uint8_t* codes;  // [out, row_bytes]
    const float* scale;    // [out, scale_groups]
    const float* aux_scale;
    const float* aux_weights;  // [span]
    const float* bias;         // [out] or null
    const float* codewords;    // [codebooks, codewords, span]; fused: the half tables [half, span / 2], for both halves
    int64_t out, inputs, row_bytes, width, codebooks, codeword_count, span, channels, scale_groups, half;
    const int32_t* words;  // the codewords as pairs of int16 [codebooks, codewords, (span + 1) / 2], or null
    float word_unit;       // a codeword over this is its integers
    float longest;         // of all codewords
    bool exact, kernel_order;
    int64_t table_rows() const { return width == 4 ? 256 : codeword_count; }  // that a byte of codes tells apart
    int64_t bytes(const Block& b) const { return width == 4 ? (b.groups * codebooks + 1) / 2 : b.groups * codebooks; }
};

struct Tile {
    void* table;
    const int64_t* offsets;  // of taps in a table row
    const float* unit;       // [width]
    float* aux;              // [width]
    float* aux_block;        // [runs, width]
    float* sums;             // [rows, width]
    int64_t table_width, width, first_row;
    bool first;
};

struct Level {
    int64_t lanes;
    void (*columns_of)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
    void (*squares)(const float* const*, int64_t, int64_t, float*, float*);
    void (*weigh)(const float* const*, const float*, int64_t, int64_t, float*);
    void (*product_rows_fast)(const float*, int64_t, const float* const*, int64_t, const float*, int64_t, int64_t, void*);
    void (*product_rows_exact)(const float*, int64_t, const float* const*, int64_t, const float*, int64_t, int64_t, void*);
    void (*sum_rows)(const void*, int64_t, const void*, int64_t, int64_t, void*, bool);
    void (*gather_rows)(const Call&, const Block&, const Tile&, int64_t, int64_t);
    void (*finish)(const Call&, const Tile&, int64_t, int64_t);
    void (*put_tokens)(const float*, int64_t, int64_t, int64_t, float*, int64_t, bool);
    void (*token_products)(const float*, int64_t, const float*, int64_t, float*);
    void (*token_pairs)(const float*, int64_t, const float*, int64_t, float*);
    void (*token_rows)(const uint8_t*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, float*);
    void (*product_rows_dots)(const int32_t*, int64_t, const float* const*, int64_t, const float*, float, int64_t, int64_t, int16_t*);  // or null
};

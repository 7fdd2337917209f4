// Products by tiles (AMX) of 16 rows, 16 columns and 64 values of 8 bits, for bytes the same sums as without them: part of level.h.
//
// Scores are those of bytes as they are, or of pairs of bfloat16, whose sums are float32. Values of 16 bits are 256 times their upper byte,
// signed, and their lower one, unsigned: of each vector of columns and each 64 keys of a block two tiles, the upper bytes first.
constexpr int64_t kTileKeys = 64, kTileBytes = 16 * kBytes;
constexpr int kMostTiles = 4;  // of columns at once

INLINE int64_t whole_tiles(int64_t keys) { return (keys + kTileKeys - 1) / kTileKeys * kTileKeys; }

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const TileShapes kShapes;

// Sums of 16 rows times a vector of columns, by bytes (unsigned times signed) or by pairs of bfloat16.
template <bool pairs>
struct Products {
#define AQUABIT_PRODUCT(sum, columns) \
    do { \
        if constexpr (pairs) \
            _tile_dpbf16ps(sum, 4, columns); \
        else \
            _tile_dpbusd(sum, 4, columns); \
    } while (false)

    // Times ``vectors`` vectors of columns, ``vector_bytes`` apart, of ``dwords`` each; sums [16, kMostTiles * kLanes], int32 or float32.
    INLINE void multiply(const uint8_t* rows, int64_t row_bytes, const uint8_t* columns, int64_t vector_bytes, int64_t dwords, int64_t vectors,
                         int32_t* sums) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t at = 0; at < dwords; at += 16, rows += kBytes, columns += kTileBytes) {
            _tile_loadd(4, rows, row_bytes);
            _tile_loadd(5, columns, kBytes);
            AQUABIT_PRODUCT(0, 5);
            if (vectors > 1) {
                _tile_loadd(6, columns + vector_bytes, kBytes);
                AQUABIT_PRODUCT(1, 6);
            }
            if (vectors > 2) {
                _tile_loadd(7, columns + 2 * vector_bytes, kBytes);
                AQUABIT_PRODUCT(2, 7);
            }
            if (vectors > 3) {
                _tile_loadd(5, columns + 3 * vector_bytes, kBytes);
                AQUABIT_PRODUCT(3, 5);
            }
        }
        constexpr int64_t stride = 4 * kMostTiles * kLanes;
        _tile_stored(0, sums, stride);
        if (vectors > 1) _tile_stored(1, sums + kLanes, stride);
        if (vectors > 2) _tile_stored(2, sums + 2 * kLanes, stride);
        if (vectors > 3) _tile_stored(3, sums + 3 * kLanes, stride);
        asm volatile("" ::: "memory");
    }
#undef AQUABIT_PRODUCT
};

// 16 rows of probabilities times one vector of columns of values, of ``keys``; upper and lower sums [16, kLanes].
INLINE void multiply_values(const uint8_t* rows, const uint8_t* columns, int64_t keys, int32_t* upper, int32_t* lower) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t at = 0; at < keys; at += kTileKeys, columns += 2 * kTileBytes) {
        _tile_loadd(4, rows + at, kBlock);
        _tile_loadd(5, columns, kBytes);
        _tile_dpbusd(0, 4, 5);
        _tile_loadd(6, columns + kTileBytes, kBytes);
        _tile_dpbuud(1, 4, 6);
    }
    _tile_stored(0, upper, kBytes);
    _tile_stored(1, lower, kBytes);
    asm volatile("" ::: "memory");
}

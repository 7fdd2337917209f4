// Attention with rounded probabilities for one instruction set (foreach_level.h).
//
// A query's probabilities e / sum, e = 2^(s - max s), go to the grid of 256 points from their least to their largest
// (fake_quantize, per token). Its step is (1 - min e) / 255 / sum, so it is known before the sum is: with the scores of a
// block of queries and all keys at hand, one more pass makes e, its integer 0..255 above the least, and the product with V.
//
// Scores are float32, of integers where Q and K are on grids of 8 or 6 bits for each token (as layers round them) and AQUABIT_VNNI has
// their products: these are exact. Otherwise a relative error of 1e-4 of theirs, which integers of 16 bits have, would move 0.3 % of the
// probabilities to the next point, and that changes results by 1.5e-3 of their norm; float32 leaves 1e-4. Tiles multiply Q and K that
// are bfloat16 as they are, which is exact but for the order of float32 sums. The other product
// is one of integers where AQUABIT_VNNI has them: columns of V at 16 bits in each block of kBlock keys, which changes results
// by 4e-5 (255 * 32767 * kBlock < 2^31).

#include "../values.h"
#include "pieces.h"
#ifdef AQUABIT_AMX
#include "amx.h"
#endif
#include "pack.h"
#include "tile.h"
#include "whole.h"
#include "heads.h"

#ifdef AQUABIT_VNNI
constexpr auto kStepOf = step_of;
#else
constexpr decltype(Level::step_of) kStepOf = nullptr;
#endif

static int64_t room_for(const Attention& a) { return Head(a, nullptr).bytes; }

static bool part(const Attention& a, int64_t first, int64_t last, uint8_t* room) {
    const int64_t blocks = a.blocks();
    bool finite = true;
#ifdef AQUABIT_AMX
    _tile_loadconfig(&kShapes);
#endif
    for (int64_t at = first; at < last && finite;) {
        const int64_t head = at / blocks, end = smaller_of((head + 1) * blocks, last);
        finite = run_blocks(a, head, at - head * blocks, end - head * blocks, room);
        at = end;
    }
#ifdef AQUABIT_AMX
    _tile_release();
#endif
    return finite;
}

constexpr Level kLevel = {kUnit, room_for, part, kStepOf};

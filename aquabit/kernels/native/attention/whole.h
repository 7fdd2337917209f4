// Q and K as integers of 8 bits, where each token's values are on a grid of its own: part of level.h.

#ifdef AQUABIT_VNNI
typedef uint8_t QuarterBytes __attribute__((vector_size(kLanes)));
typedef uint8_t UnalignedQuarterBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

constexpr float kOff = 0.005f;       // of an integer: what values on a grid may be beside its points, by the rounding of float32
constexpr int32_t kFarZero = 1024;   // beyond it sums would lose digits

// One more vector of a row, the last one again where it is cut off.
INLINE Floats next_of(const float* x, int64_t i, int64_t count) { return load(x + smaller_of(i, count - kLanes)); }

static bool step_of(StepKind kind, const float* x, int64_t count, Step* found) {
    if (count < kLanes) return false;
    Floats low = load(x), high = low;
    for (int64_t i = kLanes; i < count; i += kLanes) {
        const Floats v = next_of(x, i, count);
        low = lesser(low, v), high = larger(high, v);
    }
    const float least_of_all = least(low), most = largest(high), size = most > -least_of_all ? most : -least_of_all;
    float step = kind == StepKind::symmetric ? size / 127 : (most - least_of_all) / (kind == StepKind::eight ? 255 : 63);
    if (most == least_of_all) step = size;  // left as they are
    if (size == 0) step = 1;
    if (!(step > 1e-30f && size < 1e30f)) return false;
    const float inverse = 1 / step, zero = kind == StepKind::symmetric ? 128 : -__builtin_rintf(least_of_all * inverse);
    if (!(zero <= kFarZero && zero >= -kFarZero)) return false;
    Ints fits = splat_int(-1);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats at = next_of(x, i, count) * inverse, beside = at - to_floats(nearest(at));
        fits &= larger(beside, -beside) <= kOff;  // NaN does not
    }
    *found = {step, static_cast<int32_t>(zero)};
    return total_of(fits) == -kLanes;
}

// The integers of a row less ``middle`` as bytes, zeros beyond its end up to a whole vector; returns their sum.
INLINE int32_t pack_bytes(const float* row, int64_t count, const Step& s, int32_t middle, uint8_t* to) {
    const float inverse = 1 / s.step;
    Ints sum = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        Ints u = nearest(read(row, false, i, count) * inverse) + (s.zero - middle);
        if (i + kLanes > count) u = lane_numbers() < splat_int(static_cast<int32_t>(count - i)) ? u : Ints{};
        sum += u;
        *reinterpret_cast<UnalignedQuarterBytes*>(to + i) = __builtin_convertvector(u, QuarterBytes);
    }
    return total_of(sum);
}

struct Quarters {  // 8 bits: unsigned rows times signed columns
    typedef Ints Sums;
    INLINE Ints multiplied(Ints sum, Ints x, Ints w) { return dot(sum, x, w, false); }
    INLINE Floats value(Ints sum) { return to_floats(sum); }
};
#endif

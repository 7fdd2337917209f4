// Activation functions of rows, which layers read: part of level.h.

// x times what of a normal or a logistic distribution lies below it.
INLINE Floats curved(Floats x, const int64_t curve) {
    const Floats size = larger(x, -x);
    if (curve == kGelu) {  // 1 - erf by a polynomial, to 1.5e-7 (Abramowitz and Stegun, 7.1.26)
        const Floats t = 1.0f / (1.0f + size * 0.23164187f);  // .3275911 / sqrt(2)
        Floats tail = t * 1.061405429f - 1.453152027f;
        tail = tail * t + 1.421413741f;
        tail = tail * t - 0.284496736f;
        tail = (tail * t + 0.254829592f) * t * exp2_of(x * x * -0.72134752f);  // e^(-x^2 / 2)
        return larger(x, Floats{}) - size * tail * 0.5f;
    }
    Floats scaled = size * (curve == kQuickGelu ? 1.702f : 1.0f);
    if (curve == kGeluTanh) scaled = size * (x * x * 0.044715f + 1.0f) * 1.5957691f;  // 2 sqrt(2 / pi)
    const Floats e = exp2_of(scaled * -1.44269504f);
    return (larger(x, Floats{}) - larger(-x, Floats{}) * e) / (1.0f + e);
}

INLINE void curve_row(const void* row, bool narrow, int64_t n, const int64_t curve, const bool gated, float* to) {
    for (int64_t i = 0; i < n; i += kLanes) {
        if (gated)
            store(to + i, read(row, narrow, i, n) * curved(read(row, narrow, n + i, 2 * n), curve));
        else
            store(to + i, curved(read(row, narrow, i, n), curve));
    }
}

// What a layer reads of a row that ``function`` is applied to: n values, and what follows them up to a whole vector.
static void activate(const void* row, bool narrow, int64_t n, int64_t function, float* to) {
    const bool gated = function & kGated;
    const int64_t curve = function & ~kGated;
    if (curve == kGelu)
        curve_row(row, narrow, n, kGelu, gated, to);
    else if (curve == kGeluTanh)
        curve_row(row, narrow, n, kGeluTanh, gated, to);
    else
        curve_row(row, narrow, n, curve == kSilu ? kSilu : kQuickGelu, gated, to);
}

// What the rows of a block share while one group is searched, for one instruction set: part of additive.cpp.

// Codewords of one set of tables [M, K, size], padded and transposed.
static void arrange(const Block& b, const float* tables, float* codewords, float* by_size) {
    const int64_t k = b.codewords, wide = whole_vectors(k), g = b.size, tall = whole_vectors(g), stride = b.codebooks * wide;
    for (int64_t m = 0; m < b.codebooks; ++m)
        for (int64_t c = 0; c < k; ++c)
            for (int64_t i = 0; i < g; ++i) {
                const float value = tables[(m * k + c) * g + i];
                codewords[(m * k + c) * tall + i] = value;
                by_size[i * stride + m * wide + c] = value;
            }
}

// Codewords times the metric, and times themselves.
static void project(const Block& b, const float* metric, const float* by_size, float* images, float* own) {
    const int64_t wide = whole_vectors(b.codewords), g = b.size, stride = b.codebooks * wide;
    for (int64_t at = 0; at < stride; at += kLanes) {
        Floats sum = splat(0);
        for (int64_t i = 0; i < g; ++i) {
            Floats image = splat(0);
            for (int64_t j = 0; j < g; ++j) image += metric[j * g + i] * load(by_size + j * stride + at);
            store(images + i * stride + at, image);
            sum += image * load(by_size + i * stride + at);
        }
        for (int64_t lane = 0; lane < kLanes; ++lane)
            if ((at + lane) % wide >= b.codewords) sum[lane] = kInfinity;
        store(own + at, sum);
    }
}

// A codeword with ``count`` vectors of another codebook's: several share its values, and their sums do not wait for each other. One at a
// time, a call with 96 rows and 2 codebooks of 256 codewords took 7 or 23 % longer, by where the loop happened to lie in memory.
INLINE void pair_vectors(const float* codeword, const float* images, int64_t size, int64_t stride, const int count, float* pairs) {
    Floats sums[4] = {};
    for (int64_t i = 0; i < size; ++i) {
        const float twice = 2 * codeword[i];
        for (int v = 0; v < count; ++v) sums[v] += twice * load(images + i * stride + v * kLanes);
    }
    for (int v = 0; v < count; ++v) store(pairs + v * kLanes, sums[v]);
}

// Pairs of codewords: row (m (m - 1) / 2 + j) K + k is codeword k of codebook j with all of codebook m.
static void pair_up(const Block& b, const Group& group, float* pairs) {
    const int64_t k = b.codewords, wide = whole_vectors(k), g = b.size, tall = whole_vectors(g), stride = b.codebooks * wide;
    for (int64_t m = 1; m < b.codebooks; ++m)
        for (int64_t row = 0; row < m * k; ++row, pairs += wide) {
            const float* codeword = group.codewords + row * tall;
            const float* images = group.images + m * wide;
            int64_t at = 0;
            for (; at + 4 * kLanes <= wide; at += 4 * kLanes) pair_vectors(codeword, images + at, g, stride, 4, pairs + at);
            for (; at < wide; at += kLanes) pair_vectors(codeword, images + at, g, stride, 1, pairs + at);
        }
}

// What the rows of a block share while one group is searched (see additive_level.h, which comes after this).

// Codewords of one set of tables [M, K, size], padded and transposed.
static void arrange(const Block& b, const float* tables, float* codewords, float* by_size) {
    const int64_t k = b.codewords, wide = padded(k), g = b.size, tall = padded(g), stride = b.codebooks * wide;
    for (int64_t m = 0; m < b.codebooks; ++m)
        for (int64_t c = 0; c < k; ++c)
            for (int64_t i = 0; i < g; ++i) {
                const float value = tables[(m * k + c) * g + i];
                codewords[(m * k + c) * tall + i] = value;
                by_size[i * stride + m * wide + c] = value;
            }
}

// Columns [from, to) of images and own, in vectors.
static void project(const Block& b, const float* metric, const float* by_size, float* images, float* own, int64_t from, int64_t to) {
    const int64_t wide = padded(b.codewords), g = b.size, stride = b.codebooks * wide;
    for (int64_t v = from; v < to; ++v) {
        const int64_t at = v * kLanes;
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

// Rows [from, to) of the pairs: row (m (m - 1) / 2 + j) K + k is codeword k of codebook j with all of codebook m.
static void pair_up(const Block& b, const Group& group, float* pairs, int64_t from, int64_t to) {
    const int64_t k = b.codewords, wide = padded(k), g = b.size, tall = padded(g), stride = b.codebooks * wide;
    for (int64_t row = from; row < to; ++row) {
        int64_t j = row / k, m = 1;
        for (; j >= m; ++m) j -= m;
        const float* codeword = group.codewords + (j * k + row % k) * tall;
        const float* images = group.images + m * wide;
        for (int64_t at = 0; at < wide; at += kLanes) {
            Floats sum = splat(0);
            for (int64_t i = 0; i < g; ++i) sum += (2 * codeword[i]) * load(images + i * stride + at);
            store(pairs + row * wide + at, sum);
        }
    }
}

// One token: tables of scalars, and a scalar sum per row; and tokens in general. Part of lut.cpp.

// The products of one token with all codewords, for the bytes of one run of a block: [bytes, size].
class Token {
  public:
    Token(const Level& level, const Call& c, const float* by_input, int64_t padded)
        : level_(level), c_(c), by_input_(by_input), padded_(padded), size_(c.width == 8 ? c.codeword_count : 256), low_(padded + 16), high_(padded + 16) {}

    int64_t size() const { return size_; }

    void fill(const Block& b, const float* x, float* products) {
        const int64_t lookups = b.groups * c_.codebooks;
        if (c_.width == 8) {
            for (int64_t l = 0; l < lookups; ++l) one(b, x, l, products + l * size_);
            return;
        }
        for (int64_t l = 0; l < lookups; l += 2) {
            one(b, x, l, low_.get());
            if (l + 1 < lookups)
                one(b, x, l + 1, high_.get());
            else
                std::fill(high_.get(), high_.get() + 16, 0.0f);
            if (c_.codeword_count < 16) {
                std::fill(low_.get() + c_.codeword_count, low_.get() + 16, 0.0f);
                std::fill(high_.get() + c_.codeword_count, high_.get() + 16, 0.0f);
            }
            level_.token_pairs(low_.get(), 16, high_.get(), 16, products + l / 2 * size_);
        }
    }

  private:
    void one(const Block& b, const float* x, int64_t lookup, float* to) {
        const int64_t group = lookup / c_.codebooks, first = b.first + group * c_.channels, inputs = std::min(c_.span, b.first + b.inputs - first);
        Buffer<float> padded_inputs(kSpan);
        float* own = padded_inputs.get();
        std::fill(own, own + kSpan, 0.0f);
        std::copy(x + first, x + first + inputs, own);
        if (!c_.half) {
            level_.token_products(by_input_ + lookup % c_.codebooks * c_.span * padded_, padded_, own, c_.span, scratch(to));
            if (to != scratch(to)) std::copy(scratch(to), scratch(to) + c_.codeword_count, to);
            return;
        }
        Buffer<float> halves(2 * padded_);
        level_.token_products(by_input_, padded_, own, c_.span / 2, halves.get());
        level_.token_products(by_input_, padded_, own + c_.span / 2, c_.span / 2, halves.get() + padded_);
        level_.token_pairs(halves.get(), c_.half, halves.get() + padded_, c_.half, to);
    }

    // token_products writes whole vectors: small tables go through a padded place.
    float* scratch(float* to) {
        if (c_.codeword_count == padded_) return to;
        if (!spare_) spare_ = std::make_unique<Buffer<float>>(padded_ + 16);
        return spare_->get();
    }

    const Level& level_;
    const Call& c_;
    const float* by_input_;
    int64_t padded_, size_;
    Buffer<float> low_, high_;
    std::unique_ptr<Buffer<float>> spare_;
};

// One token at a time: rows are shared between threads.
void run_token(const Level& level, const Call& c, const std::vector<Block>& blocks, const float* by_input, int64_t padded, const float* x,
               float* y, int threads) {
    std::fill(y, y + c.out, 0.0f);
    Token token(level, c, by_input, padded);
    int64_t most = 1;
    for (const Block& b : blocks) most = std::max(most, b.groups * c.codebooks);
    Buffer<float> products(most * token.size() + 64), sums(c.out);
    double aux_total = 0;
    for (const Block& b : blocks) {
        token.fill(b, x, products.get());
        float aux = 0;
        for (int64_t i = 0; i < b.inputs; ++i) aux += c.aux_weights[i % c.span] * x[b.first + i];
        aux_total += aux;
        const int64_t bytes = ceil_divide(b.groups * c.codebooks * c.width, 8), scales = b.run->scales, n = c.scale_groups;
        const int64_t part = rounded_up(ceil_divide(c.out, threads), 64);
#pragma omp parallel for num_threads(threads) if (threads > 1 && c.out * bytes > 65536)
        for (int64_t from = 0; from < c.out; from += part) {
            const int64_t to = std::min(c.out, from + part);
            level.token_rows(c.codes + b.run->codes, c.row_bytes, bytes, products.get(), token.size(), from, to, sums.get());
            for (int64_t o = from; o < to; ++o)
                y[o] += n > 1 ? c.scale[o * n + scales] * sums.get()[o] + c.aux_scale[o * n + scales] * aux : sums.get()[o];
        }
    }
    for (int64_t o = 0; o < c.out; ++o) {
        if (c.scale_groups == 1) y[o] = y[o] * c.scale[o] + c.aux_scale[o] * static_cast<float>(aux_total);
        if (c.bias) y[o] += c.bias[o];
    }
}

void lut_linear(const Level& level, const Call& c, const std::vector<Block>& blocks, const float* by_input, int64_t padded, const float* x,
                float* y, int64_t tokens, int threads) {
    if (tokens <= kTokens) {
        for (int64_t t = 0; t < tokens; ++t) run_token(level, c, blocks, by_input, padded, x + t * c.inputs, y + t * c.out, threads);
        return;
    }
    const int64_t width = std::max<int64_t>(c.exact ? kTile / 2 : kTile, 2 * level.lanes);
    const Planes planes{x, true, tokens, 0, {0}, {0}, {width}, {0}, width, width};
    run_tiles(level, c, planes, blocks, threads, [&](const float* sums, int64_t q0, int64_t from, int64_t to) {
        level.put_tokens(sums, width, to - from, std::min(width, tokens - q0), y + q0 * c.out + from, c.out, tokens * c.out >= kPast);
    });
}

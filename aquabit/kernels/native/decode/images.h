// Products with images. Part of decode.cpp.

// Values of images, float32 or (``narrow``) bfloat16.
struct Pixels {
    void* values;
    bool narrow;

    void* at(int64_t i) const { return static_cast<char*>(values) + i * (narrow ? 2 : 4); }
};

// The quantized images of a convolution, and the grids of their samples' ranges.
struct Images {
    Buffer<uint8_t> values;
    std::vector<Grid> grids;  // [ranges, samples]
    Errors errors;
    bool usable;
};

// Lines of an image that are quantized in one go: a vector is longer than those of small images.
int64_t lines_at_once(const Convolution& c) { return std::clamp<int64_t>(1024 / c.width, 1, c.height); }

// ``count`` (none where that is negative) dwords; a call of memcpy for each short line takes longer than its product.
void copy_some(int32_t* to, const int32_t* from, int64_t count) {
    if (count > 16) {
        std::memcpy(to, from, count * 4);
        return;
    }
    int64_t at = 0;
    for (; at + 4 <= count; at += 4) std::memcpy(to + at, from + at, 16);
    for (; at < count; ++at) to[at] = from[at];
}

template <int kStride>
void copy_every(int32_t* to, const int32_t* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[kStride * i];
}

// One step (up to 4 or 2 channels of a group, from pixel ``channel`` on) of one sample: padding, then the lines.
void pack_step(const Method& m, const Convolution& c, const Layout& l, const Pixels& x, int64_t channel, const Grid* const* grids,
               int64_t channels, int32_t* out, int32_t* packed, Errors* errors) {
    const auto pack = [&](int64_t pixel, int64_t count, int32_t* to) {
        const void* lines[4];
        for (int64_t k = 0; k < channels; ++k) lines[k] = x.at(channel + k * c.height * c.width + pixel);
        m.level->pack_line(lines, x.narrow, channels, count, grids, m.wide, to, errors);
    };
    int32_t padding = 0;
    for (int64_t k = 0; k < channels; ++k) {
        const int64_t zero = std::clamp<int64_t>(static_cast<int64_t>(-grids[k]->base), 0, m.wide ? 32767 : 255);
        padding |= static_cast<int32_t>(static_cast<uint32_t>(zero) << (m.wide ? 16 * k : 8 * k));
    }
    if (c.whole() && l.phase_count == 1) {  // lines follow each other as they do in the image
        for (int64_t first = 0; first < l.plane; first += l.together, out += l.run_bytes / 4) {
            const int64_t count = std::min(l.together, l.plane - first);
            pack(first, count, out);
            std::fill(out + count, out + l.step_bytes / 4, padding);
        }
        return;
    }
    std::fill(out, out + l.step_bytes / 4, padding);
    const int64_t chunk = lines_at_once(c);
    for (int64_t first = 0; first < c.height; first += chunk) {
        const int64_t end = std::min(c.height, first + chunk);
        const auto row_of = [&](int64_t y) { return (y + c.top) / c.stride_y; };
        const auto phases_of = [&](int64_t y) { return &l.phases[(y + c.top) % c.stride_y * l.offsets]; };
        const auto unread = [&](int64_t y) {
            return row_of(y) >= l.rows || std::all_of(phases_of(y), phases_of(y) + l.offsets, [](int64_t phase) { return phase < 0; });
        };
        if (end - first == 1 && unread(first)) continue;
        pack(first * c.width, (end - first) * c.width, packed);
        const int32_t* line = packed;
        for (int64_t y = first; y < end; ++y, line += c.width) {
            if (unread(y)) continue;
            const int64_t* phases = phases_of(y);
            for (int64_t i = 0; i < l.offsets; ++i) {  // pixels of padded columns i, i + stride_x, ..
                if (phases[i] < 0) continue;
                int64_t column = std::max<int64_t>(0, ceil_divide(c.left - i, c.stride_x)), from = column * c.stride_x + i - c.left;
                int32_t* to = out + phases[i] * l.plane + row_of(y) * l.columns;
                if (c.stride_x == 1)
                    copy_some(to + column, line + from, std::min(c.width - from, l.columns - column));
                else if (c.stride_x == 2)
                    copy_every<2>(to + column, line + from, std::min(ceil_divide(c.width - from, 2), l.columns - column));
                else
                    for (; from < c.width && column < l.columns; from += c.stride_x) to[column++] = line[from];
            }
        }
    }
}

Images pack_images(const Method& m, const Convolution& c, const Layout& l, const Pixels& x) {
    const int64_t ranges = c.split ? 2 : 1, area = c.height * c.width, per = m.per(), inputs = c.channels / c.groups;
    const int64_t tail = 4 * m.level->lanes * (m.level->vectors + 1), threads = c.samples * c.channels * area > 32768 ? m.threads : 1;
    Images all = {Buffer<uint8_t>(c.samples * l.sample_bytes + tail + m.beyond(l.step_bytes)), std::vector<Grid>(ranges * c.samples), {0, 0}, true};
    std::memset(all.values.get() + c.samples * l.sample_bytes, 0, tail);
    std::vector<char> usable(ranges * c.samples, 1);
    in_parts(ranges * c.samples, threads, 1, [&](int64_t from, int64_t to, int64_t) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t first = i / c.samples ? c.split : 0, last = c.split && i < c.samples ? c.split : c.channels;
            const void* here = x.at((i % c.samples * c.channels + first) * area);
            usable[i] = m.level->sample_grid(here, x.narrow, (last - first) * area, m.bits, m.wide, &all.grids[i]);
        }
    });
    all.usable = std::all_of(usable.begin(), usable.end(), [](char u) { return u; });
    if (!all.usable) return all;
    const int64_t jobs = c.samples * c.groups * l.group_steps;
    std::vector<Errors> errors(jobs, Errors{0, 0});
    in_parts(jobs, threads, 1, [&](int64_t from, int64_t to, int64_t) {
        std::vector<int32_t> line(lines_at_once(c) * c.width);
        for (int64_t job = from; job < to; ++job) {
            const int64_t n = job / (c.groups * l.group_steps), group = job / l.group_steps % c.groups, step = job % l.group_steps;
            const int64_t channel = group * inputs + step * per, count = std::min(per, inputs - step * per);
            const Grid* grids[4];
            for (int64_t k = 0; k < count; ++k) grids[k] = &all.grids[(c.split && channel + k >= c.split ? c.samples : 0) + n];
            uint8_t* out = all.values.get() + n * l.sample_bytes + group * l.group_bytes + step * l.step_bytes;
            pack_step(m, c, l, x, (n * c.channels + channel) * area, grids, count, reinterpret_cast<int32_t*>(out), line.data(),
                      m.bits < 16 ? nullptr : &errors[job]);
        }
    });
    for (const Errors& e : errors) all.errors.error += e.error, all.errors.all += e.all;
    return all;
}

// x [samples, channels, height, width] to y [samples, out, out_height, out_width].
Outcome conv_product(const Method& m, const Weight& w, const Convolution& c, const Pixels& x, const Pixels& y) {
    const Layout l = lay_out(c, w.out, m.per(), m.level->lanes, m.level->vectors);
    const Images images = pack_images(m, c, l, x);
    Errors rounded = {0, 0};
    if (!images.usable || ratio_of(images.errors) > kMostLost) return {0, ratio_of(images.errors), 0, 0};
    const int64_t vectors = static_cast<int64_t>(l.starts.size()), lanes = m.level->lanes, positions = vectors * lanes;
    const int64_t ranges = c.split ? 2 : 1, area = c.out_height * c.out_width, rows = w.out / c.groups;
    const Positions own(ranges, positions,
                        [&](int64_t range, int64_t i) { return &images.grids[range * c.samples + l.sample[i / lanes]]; });
    int64_t bytes = 0;
    for (int64_t group = 0; group < c.groups; ++group) {
        Planned planned;
        const int64_t split = c.split ? std::clamp<int64_t>(c.split - group * w.cin, 0, w.cin) : w.cin;
        make_plan(w, {l.taps, l.step_bytes, group * l.group_bytes / l.step_bytes, split}, m.per(), m.limit, m.by_scale, m.level->steps, &planned);
        const Buffer<float> sums(m.codes ? planned.plan.run_count * positions : 0);
        const Activations a = own.activations(images.values.get(), l.starts.data(), l.step_bytes, sums.get(), planned.plan, w.length());
        const Product product = {m, w, planned, a, vectors, group * rows, rows};
        const auto sink = [&](const float* tile, int64_t stride, int64_t row, int64_t count, int64_t vector, int64_t n) {
            const Span *first = l.spans.data() + l.first_span[vector], *end = l.spans.data() + l.first_span[vector + n];
            m.level->put_pixels(tile, stride, count, first, end, vector * lanes, y.at(row * area), y.narrow, area);
        };
        // By blocks of rows, whose results find their way to memory while the next block is multiplied.
        bytes = std::max(bytes, product.run(&rounded, m.level->rows, sink));
    }
    return {1, ratio_of(images.errors), ratio_of(rounded), bytes};
}

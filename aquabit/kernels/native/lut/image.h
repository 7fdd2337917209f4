// Convolutions as columns of padded planes. Part of lut.cpp.

// ``channels`` and ``outputs`` are of all groups of a convolution.
struct Image {
    int64_t samples, channels, height, width, stride[2], padding[2], dilation[2], kernel[2], outputs, out_height, out_width;
};

// The padded planes of an image: phases [inputs, phases, samples, rows, pitch].
struct Layout {
    int64_t rows, pitch, phase, phases;

    Layout(const Image& m, int64_t slack) {
        const int64_t reach[2] = {(m.kernel[0] - 1) * m.dilation[0], (m.kernel[1] - 1) * m.dilation[1]};
        rows = m.out_height + reach[0] / m.stride[0];
        pitch = m.out_width + reach[1] / m.stride[1];
        phases = m.stride[0] * m.stride[1];
        phase = rounded_up(m.samples * rows * pitch + slack, 16);
    }
};

// Only what some tap reads is copied; the rest is zero.
void to_planes(const Image& m, const Layout& l, const float* x, int64_t inputs, float* planes, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && inputs * l.phase > 32768)
    for (int64_t c = 0; c < inputs; ++c) {
        float* plane = planes + c * l.phases * l.phase;
        std::fill(plane, plane + l.phases * l.phase, 0.0f);
        for (int64_t n = 0; n < m.samples; ++n)
            for (int64_t y = 0; y < m.height; ++y) {
                const int64_t py = y + m.padding[0], row = py / m.stride[0];
                if (row >= l.rows) continue;
                const float* from = x + ((n * m.channels + c) * m.height + y) * m.width;
                float* to = plane + py % m.stride[0] * m.stride[1] * l.phase + (n * l.rows + row) * l.pitch;
                if (m.stride[1] == 1) {
                    const int64_t count = std::min(m.width, l.pitch - m.padding[1]);
                    if (count > 0) std::memcpy(to + m.padding[1], from, count * sizeof(float));
                    continue;
                }
                for (int64_t i = 0; i < m.width; ++i) {
                    const int64_t px = i + m.padding[1], column = px / m.stride[1];
                    if (column < l.pitch) to[px % m.stride[1] * l.phase + column] = from[i];
                }
            }
    }
}

Planes planes_of(const Level& level, const Call& c, const Image& m, std::vector<int64_t>* phase_of_tap) {
    Planes p{};
    const int64_t unit = 2 * level.lanes, reach0 = (m.kernel[0] - 1) * m.dilation[0], reach1 = (m.kernel[1] - 1) * m.dilation[1];
    const int64_t rows = m.out_height + reach0 / m.stride[0], pitch = m.out_width + reach1 / m.stride[1];
    p.columns = ((m.samples - 1) * rows + m.out_height - 1) * pitch + m.out_width;
    const bool shared = !c.kernel_order && m.kernel[0] * m.kernel[1] > 1;
    if (shared) {
        int64_t tiles = ceil_divide(p.columns, kTapTile);
        // An even number suits two threads; by the number of threads, units, and so results, would depend on it.
        if (tiles % 2 && p.columns / (tiles + 1) >= 128) ++tiles;
        p.width = rounded_up(ceil_divide(p.columns, tiles), unit);
    } else {
        p.width = std::max<int64_t>(c.exact ? kTile / 2 : kTile, unit);
    }
    for (int64_t y = 0; y < m.kernel[0]; ++y)
        for (int64_t x = 0; x < m.kernel[1]; ++x) {
            const int64_t py = y * m.dilation[0], px = x * m.dilation[1];
            phase_of_tap->push_back(py % m.stride[0] * m.stride[1] + px % m.stride[1]);
            p.taps.push_back(py / m.stride[0] * pitch + px / m.stride[1]);
        }
    return p;
}

// Ranges of a plane that a tile's tables cover, one per phase that has a tap; taps become offsets in a plane of all phases.
void cover(const Level& level, const Call& c, const Layout& l, const std::vector<int64_t>& phase_of_tap, Planes* p) {
    if (c.kernel_order) {
        p->starts = {0};
        p->widths = {p->width};
        p->offsets = {0};
        p->table_width = p->width;
    } else {
        p->offsets.assign(p->taps.size(), 0);
        for (int64_t phase = 0; phase < l.phases; ++phase) {
            int64_t low = INT64_MAX, high = -1;
            for (size_t t = 0; t < p->taps.size(); ++t)
                if (phase_of_tap[t] == phase) low = std::min(low, p->taps[t]), high = std::max(high, p->taps[t]);
            if (high < 0) continue;
            for (size_t t = 0; t < p->taps.size(); ++t)
                if (phase_of_tap[t] == phase) p->offsets[t] = p->table_width + p->taps[t] - low;
            p->starts.push_back(phase * l.phase + low);
            p->widths.push_back(rounded_up(p->width + high - low, 2 * level.lanes));
            p->table_width += p->widths.back();
        }
    }
    for (size_t t = 0; t < p->taps.size(); ++t) p->taps[t] += phase_of_tap[t] * l.phase;
}

void lut_conv2d(const Level& level, const Call& c, const std::vector<Block>& blocks, const Image& m, const float* x, float* y, int threads) {
    std::vector<int64_t> phase_of_tap;
    Planes p = planes_of(level, c, m, &phase_of_tap);
    const int64_t reach = *std::max_element(p.taps.begin(), p.taps.end());
    const Layout layout(m, p.width + reach + 4 * level.lanes);
    const Buffer<float> planes(c.inputs * layout.phases * layout.phase);
    to_planes(m, layout, x, c.inputs, planes.get(), threads);
    p.x = planes.get();
    p.pitch = layout.phases * layout.phase;
    cover(level, c, layout, phase_of_tap, &p);
    run_tiles(level, c, p, blocks, threads, [&](const float* sums, int64_t q0, int64_t from, int64_t to) {
        const int64_t last = std::min(q0 + p.width, p.columns);
        for (int64_t line = q0 / layout.pitch; line * layout.pitch < last; ++line) {
            const int64_t sample = line / layout.rows, row = line % layout.rows;
            const int64_t begin = std::max(line * layout.pitch, q0), end = std::min(line * layout.pitch + m.out_width, last);
            if (row >= m.out_height || begin >= end) continue;
            const int64_t column = begin - line * layout.pitch;
            for (int64_t o = from; o < to; ++o)
                std::memcpy(y + ((sample * m.outputs + o) * m.out_height + row) * m.out_width + column, sums + (o - from) * p.width + begin - q0,
                            (end - begin) * sizeof(float));
        }
    });
}

// How rows of a weight meet the activations: pieces, runs and ranges of a plan, and where a convolution's activations lie (decode.cpp).
#pragma once
#include <algorithm>
#include <vector>

#include "../memory.h"
#include "types.h"

// A plan and what it points to.
struct Planned {
    std::vector<Piece> pieces;
    std::vector<Run> runs;
    std::vector<Range> ranges;
    Plan plan;
};

// Which activations a plan multiplies.
struct Place {
    std::vector<int64_t> taps;  // bytes
    int64_t step_bytes, first_step;
    int64_t split;  // inputs of the first range; the others are of the second
};

inline std::vector<Segment> plan_segments(const Weight& w) {
    if (!w.kernel_order) return {w.segments, w.segments + w.segment_count};
    std::vector<Segment> all;
    for (int64_t tap = 0; tap < w.area; ++tap) all.push_back({tap, 0, w.cin, 0, 0});
    return all;
}

// Segments of single codes that follow each other in the codes and in the row, as one.
inline std::vector<Segment> stretches_of(const std::vector<Segment>& segments, int64_t fused, int64_t cin) {
    std::vector<Segment> all;
    for (const Segment& s : segments) {
        Segment* last = all.empty() ? nullptr : &all.back();
        if (last && last->count % fused == 0 && s.at == last->at + last->count / fused &&
            s.tap * cin + s.start == last->tap * cin + last->start + last->count)
            last->count += s.count;
        else
            all.push_back(s);
    }
    return all;
}

// Runs of at most ``limit`` inputs, under one scale where ``by_scale``; steps of ``per`` inputs; slots of whole ``unit`` steps.
inline void make_plan(const Weight& w, const Place& place, int64_t per, int64_t limit, bool by_scale, int64_t unit,
                      Planned* out) {
    int64_t slot = 0;
    const std::vector<Segment> segments = plan_segments(w);
    for (int64_t number = 0; number < 2; ++number) {
        const int64_t low = number ? place.split : 0, high = number ? w.cin : place.split;
        const int64_t first_run = static_cast<int64_t>(out->runs.size());
        for (const Segment& s : segments) {
            const int64_t end = std::min(s.start + s.count, high);
            for (int64_t at = std::max(s.start, low); at < end;) {
                const int64_t next = std::min(end, at / per * per + limit), count = next - at, scales = by_scale ? s.scales : 0;
                const bool fresh = static_cast<int64_t>(out->runs.size()) == first_run || out->runs.back().scales != scales ||
                                   out->runs.back().inputs + count > limit;
                const int64_t here = static_cast<int64_t>(out->pieces.size());
                if (fresh) out->runs.push_back({here, here, scales, 0});
                const int64_t lead = at % per, steps = (lead + count + per - 1) / per;
                out->pieces.push_back(
                    {place.taps[s.tap] + (place.first_step + at / per) * place.step_bytes, steps, slot, lead, s.tap * w.cin + at, count});
                out->runs.back().last = here + 1;
                out->runs.back().inputs += count;
                slot += 4 * rounded_up(steps, unit);
                at = next;
            }
        }
        const int64_t last_run = static_cast<int64_t>(out->runs.size());
        if (last_run > first_run) out->ranges.push_back({first_run, last_run, number});
    }
    const bool straight = per == 4 && std::all_of(out->pieces.begin(), out->pieces.end(), [&](const Piece& p) {
        return p.lead == 0 && p.slot == p.from && p.count % (4 * unit) == 0;
    });
    const int64_t runs = static_cast<int64_t>(out->runs.size()), inputs = runs ? out->runs[0].inputs : 0;
    const bool even = straight && inputs % 4 == 0 && (inputs & (inputs - 1)) == 0 && out->pieces.size() == out->runs.size() &&
                      std::all_of(out->runs.begin(), out->runs.end(), [&](const Run& run) { return run.inputs == inputs; });
    const int64_t held = w.integers.there ? std::max<int64_t>(1, 32767 / (2 * 255 * w.integers.most())) : 1;
    out->plan = {out->pieces.data(), out->runs.data(), out->ranges.data(), runs, static_cast<int64_t>(out->ranges.size()), slot, straight,
                 even ? inputs : 0, held};
}

// A convolution; ``split`` 0: one range of activations.
struct Convolution {
    int64_t samples, channels, height, width, out_height, out_width, groups, kernel_height, kernel_width, stride_y, stride_x, top, left,
        dilation_y, dilation_x, split;

    // Whether the pixels that a tap meets are those of the image, all of them in their order.
    bool whole() const {
        return stride_y == 1 && stride_x == 1 && top == 0 && left == 0 && out_width + (kernel_width - 1) * dilation_x == width &&
               out_height + (kernel_height - 1) * dilation_y == height;
    }
};

// Where the activations of a convolution lie: for each sample, group and step one plane for each phase, rows of padded lines, so that
// neighbouring outputs read neighbouring dwords at every tap. A phase is what taps read that lie a stride apart: of neighbouring outputs
// always the next pixel. ``apart``: taps of another column of the kernel have a phase of their own, and planes are as wide as the results;
// no lane is spent on what lies between two lines then. Positions lie ``together`` in runs, all of them, or those of one block of vectors
// where there is one tap: a block's steps follow each other.
struct Layout {
    int64_t offsets;              // of columns that phases begin at, in pixels: [0, offsets)
    std::vector<int64_t> phases;  // [stride_y, offsets]: its number, or -1 where no tap reads it
    int64_t phase_count, rows, columns, plane, together, run_bytes, step_bytes, group_steps, group_bytes, sample_bytes;
    std::vector<int64_t> taps;
    std::vector<int64_t> starts, sample;  // of each vector
    std::vector<Span> spans;
    std::vector<int64_t> first_span;  // [vectors + 1]
};

// Vectors of a sample: of its whole plane, or (``by_line``) of each of its lines.
struct Vectors {
    int64_t count;
    bool by_line;
};

inline Vectors vectors_of(const Convolution& c, int64_t columns, int64_t lanes) {
    const int64_t whole = ceil_divide((c.out_height - 1) * columns + c.out_width, lanes), lines = c.out_height * ceil_divide(c.out_width, lanes);
    return {std::min(whole, lines), lines <= whole};
}

inline void lay_taps(const Convolution& c, bool apart, Layout* l) {
    const int64_t reach = (c.kernel_width - 1) * c.dilation_x;
    l->offsets = apart ? reach + 1 : c.stride_x;
    l->rows = c.out_height + (c.kernel_height - 1) * c.dilation_y / c.stride_y;
    l->columns = c.out_width + (apart ? 0 : reach / c.stride_x);
    l->plane = l->rows * l->columns;
    l->phases.assign(c.stride_y * l->offsets, -1);
    l->phase_count = 0;
    for (int64_t i = 0; i < c.kernel_height; ++i)
        for (int64_t j = 0; j < c.kernel_width; ++j) {
            const int64_t y = i * c.dilation_y, x = j * c.dilation_x;
            int64_t& phase = l->phases[y % c.stride_y * l->offsets + x % l->offsets];
            if (phase < 0) phase = l->phase_count++;
            l->taps.push_back(4 * (phase * l->plane + y / c.stride_y * l->columns + x / l->offsets));
        }
}

// Where vectors of ``lanes`` positions start, in dwords of a plane, and where their results go.
inline void lay_vectors(const Convolution& c, int64_t outputs, int64_t lanes, Layout* l) {
    const auto [count, fits_lines] = vectors_of(c, l->columns, lanes);
    const bool by_line = fits_lines && !l->run_bytes;  // a vector lies in one block, and that of a line might begin inside one
    const int64_t in_line = ceil_divide(c.out_width, lanes);
    l->first_span.push_back(0);
    for (int64_t n = 0; n < c.samples; ++n)
        for (int64_t v = 0; v < count; ++v) {
            const int64_t start = by_line ? v / in_line * l->columns + v % in_line * lanes : v * lanes;
            const int64_t end = by_line ? std::min(start + lanes, v / in_line * l->columns + c.out_width) : start + lanes;
            const int64_t position = static_cast<int64_t>(l->starts.size()) * lanes;
            l->starts.push_back(n * l->sample_bytes + start / l->together * l->run_bytes + 4 * (start % l->together));
            l->sample.push_back(n);
            for (int64_t at = start; at < end;) {
                const int64_t y = at / l->columns, x = at % l->columns, next = std::min(end, (y + 1) * l->columns);
                const int64_t size = std::min(next - at, c.out_width - x);
                if (y < c.out_height && size > 0)
                    l->spans.push_back({position + at - start, size, (n * outputs * c.out_height + y) * c.out_width + x});
                at = next;
            }
            l->first_span.push_back(static_cast<int64_t>(l->spans.size()));
        }
}

// Of ``outputs`` channels, steps of ``per`` inputs, and blocks of ``vectors``.
inline Layout lay_out(const Convolution& c, int64_t outputs, int64_t per, int64_t lanes, int64_t vectors) {
    Layout l;
    const int64_t padded = c.out_width + (c.kernel_width - 1) * c.dilation_x / c.stride_x;
    // Planes for each column are more to fill: worth it from an eighth fewer vectors on.
    const bool apart = 8 * vectors_of(c, c.out_width, lanes).count <= 7 * vectors_of(c, padded, lanes).count;
    lay_taps(c, apart, &l);
    l.group_steps = ceil_divide(c.channels / c.groups, per);
    const bool in_blocks = c.kernel_height * c.kernel_width == 1 && c.whole();
    if (in_blocks) {
        l.together = lanes * vectors;
        l.step_bytes = 4 * l.together;
        l.run_bytes = l.group_steps * l.step_bytes;
        l.group_bytes = ceil_divide(l.plane, l.together) * l.run_bytes;
    } else {
        l.together = l.phase_count * l.plane;
        l.run_bytes = 0;
        l.step_bytes = rounded_up(4 * l.together, 64);
        if (l.step_bytes % 128 == 0) l.step_bytes += 64;  // an odd number of cache lines: steps do not compete for the same ones
        l.group_bytes = l.group_steps * l.step_bytes;
    }
    l.sample_bytes = c.groups * l.group_bytes;
    lay_vectors(c, outputs, lanes, &l);
    return l;
}

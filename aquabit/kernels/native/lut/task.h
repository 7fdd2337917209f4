// A tile of columns for a range of rows: block after block, a table is filled and the rows that the codes name are added up. Part of lut.cpp.

// Columns: where the inputs of a tile lie and what of the outputs it makes.
struct Planes {
    const float* x;  // tokens [count, inputs], or planes [inputs, pitch]
    bool tokens;
    int64_t columns, pitch;
    std::vector<int64_t> taps;    // offset of each tap in a plane
    std::vector<int64_t> starts;  // of ranges of a plane that tables cover, before the tile's first column is added
    std::vector<int64_t> widths;  // of the same
    std::vector<int64_t> offsets; // of each tap in a table row
    int64_t width, table_width;   // columns of a tile, of a table row
};

// What a thread works in.
struct Room {
    Buffer<char> table;
    Buffer<float> halves, columns, total, largest, inverse, unit, aux_table, aux, aux_block, sums, zeros;

    Room(const Call& c, const Planes& p, int64_t rows, int64_t bytes, int64_t groups, int64_t runs)
        : table(bytes * c.table_rows() * p.table_width * (c.exact ? 4 : 2)),
          halves(2 * std::max<int64_t>(c.half, 16) * p.table_width),
          columns(p.tokens ? groups * c.channels * p.width : 0),
          total(p.table_width), largest(p.table_width), inverse(p.table_width), unit(p.width), aux_table(p.table_width), aux(p.width),
          aux_block(c.scale_groups > 1 ? runs * p.width : 0),
          sums(rows * p.width),
          zeros(p.table_width) {
        std::fill(zeros.get(), zeros.get() + p.table_width, 0.0f);
    }
};

class Task {
  public:
    Task(const Level& level, const Call& call, const Planes& planes, Room& room) : level_(level), c_(call), p_(planes), r_(room) {}

    // Sums of rows [from, to) for the tile at column q0, finished, in room.sums.
    void run(const std::vector<Block>& blocks, int64_t q0, int64_t from, int64_t to) {
        Tile tile{r_.table.get(), p_.offsets.data(), r_.unit.get(), r_.aux.get(), r_.aux_block.get(), r_.sums.get(),
                  p_.table_width, p_.width, from, true};
        std::fill(r_.aux.get(), r_.aux.get() + p_.width, 0.0f);
        noise_ = 0;
        coarse_.clear();
        for (const Block& b : blocks) {
            if (p_.tokens) fetch(b, q0);
            measure(b, q0);
            fill(b, q0);
            level_.gather_rows(c_, b, tile, from, to);
            tile.first = false;
        }
        if (noise_ > 0) find_coarse(tile, from, to);
        level_.finish(c_, tile, from, to);
    }

    // Runs of rows, by kRows, that the last tile's rounding has cost more than kMostLost of: one unit serves a tile whose taps share tables,
    // and a few large pixels take the precision of the others.
    const std::vector<std::pair<int64_t, int64_t>>& coarse() const { return coarse_; }

  private:
    // The expected square of the rounding errors against that of the results, without bias, which finish() has not yet added.
    void find_coarse(const Tile& tile, int64_t from, int64_t to) {
        for (int64_t begin = from; begin < to; begin += kRows) {
            const int64_t end = std::min(to, begin + kRows);
            double lost = 0, power = 0;
            for (int64_t o = begin; o < end; ++o) {
                const bool done = c_.scale_groups > 1;
                const float row = c_.scale[o * c_.scale_groups], scale = done ? 1 : row, offset = done ? 0 : c_.aux_scale[o];
                const float* sums = tile.sums + (o - tile.first_row) * tile.width;
                float square = 0;
                for (int64_t q = 0; q < tile.width; ++q) {
                    const float y = sums[q] * scale + offset * tile.aux[q];
                    square += y * y;
                }
                power += square;
                lost += noise_ * row * row * static_cast<double>(tile.width);
            }
            if (!(lost > kMostLost * kMostLost * power)) continue;
            if (!coarse_.empty() && coarse_.back().second == begin)
                coarse_.back().second = end;
            else
                coarse_.emplace_back(begin, end);
        }
    }

    void fetch(const Block& b, int64_t q0) {
        const int64_t count = std::min(p_.width, p_.columns - q0);
        level_.columns_of(p_.x + q0 * c_.inputs + b.first, c_.inputs, count, b.inputs, p_.width, r_.columns.get());
    }

    // The inputs of one group at one range of columns: pointers to span rows of columns.
    void streams(const Block& b, int64_t group, size_t range, int64_t q0, const float** to) const {
        const float* base = p_.tokens ? r_.columns.get() : p_.x + b.first * p_.pitch + q0 + (c_.kernel_order ? 0 : p_.starts[range]);
        const int64_t pitch = p_.tokens ? p_.width : p_.pitch, held = b.inputs;
        for (int64_t i = 0; i < c_.span; ++i) {
            const int64_t channel = group * c_.channels + (c_.kernel_order ? 0 : i);
            to[i] = channel < held ? base + channel * pitch + (c_.kernel_order ? p_.taps[i] : 0) : r_.zeros.get();
        }
    }

    template <class Function>
    void each(const Block& b, int64_t q0, const Function& fn) const {
        const float* from[kSpan];
        for (int64_t g = 0; g < b.groups; ++g)
            for (size_t range = 0, at = 0; range < p_.widths.size(); at += p_.widths[range++]) {
                streams(b, g, range, q0, from);
                fn(g, from, static_cast<int64_t>(at), p_.widths[range]);
            }
    }

    // aux of the block, and the units of its columns.
    void measure(const Block& b, int64_t q0) {
        float *total = r_.total.get(), *largest = r_.largest.get(), *aux = r_.aux_table.get();
        std::fill(total, total + p_.table_width, 0.0f);
        std::fill(largest, largest + p_.table_width, 0.0f);
        std::fill(aux, aux + p_.table_width, 0.0f);
        each(b, q0, [&](int64_t, const float* const* from, int64_t at, int64_t width) {
            level_.weigh(from, c_.aux_weights, c_.span, width, aux + at);
            if (!c_.exact) level_.squares(from, c_.span, width, total + at, largest + at);
        });
        for (int64_t r = 0; r < b.runs; ++r) {
            const float* from = aux + p_.offsets[b.run[r].tap];
            float* to = c_.scale_groups > 1 ? r_.aux_block.get() + r * p_.width : r_.aux.get();
            if (c_.scale_groups > 1)
                std::copy(from, from + p_.width, to);
            else
                for (int64_t q = 0; q < p_.width; ++q) to[q] += from[q];
        }
        if (c_.exact) return;
        const auto fits = [](float square) { return square >= 1e-30f && square < 1e36f; };
        choose_units(b, total, largest, [](int64_t) { return true; });
        if (squares_hold(b, q0)) return;
        std::vector<double> totals(p_.table_width), most(p_.table_width);
        each(b, q0, [&](int64_t, const float* const* from, int64_t at, int64_t width) {
            for (int64_t q = 0; q < width; ++q) {
                double sum = 0;
                for (int64_t i = 0; i < c_.span; ++i) sum += static_cast<double>(from[i][q]) * from[i][q];
                totals[at + q] += sum;
                most[at + q] = std::max(most[at + q], sum);
            }
        });
        choose_units(b, totals.data(), most.data(), [&](int64_t q) { return b.runs > 1 || !fits(total[q]); });
    }

    // Whether float32 holds the squares of these inputs: neither of 1e30 nor of 1e-30. A column of zeros is told from one of tiny inputs by
    // its aux. Columns whose squares it holds keep their units, so that a token does not depend on the others.
    bool squares_hold(const Block& b, int64_t q0) const {
        const float *total = r_.total.get(), *aux = r_.aux_table.get();
        const int64_t columns = p_.tokens ? std::min(p_.width, p_.columns - q0) : p_.table_width;
        float longest = 0;
        for (int64_t q = 0; q < columns; ++q) {
            if (b.runs == 1 && total[q] < 1e-30f && aux[q] != 0) return false;
            if (total[q] > longest || total[q] != total[q]) longest = total[q];
        }
        return longest < 1e36f && (b.runs == 1 || longest > 1e-30f || std::all_of(aux, aux + columns, [](float x) { return x == 0; }));
    }

    // The bound of a column's sum over this block, in float: |x| times the longest row, or the largest single product. Where taps share a
    // table its columns serve many outputs, so that one unit serves the tile.
    template <class Square, class Chosen>
    void choose_units(const Block& b, const Square* total, const Square* largest, const Chosen& chosen) {
        const float room = static_cast<float>(kShorts - 1 - b.groups * c_.codebooks * b.runs);
        // With 16-bit dot products the inputs themselves, times 65536 word_unit over the unit, have to stay below 32768 as well: a little
        // more than twice word_unit, for a group with a single input that is not zero.
        const float most = c_.words && level_.product_rows_dots ? std::max(c_.longest, 2.001f * room * c_.word_unit) : c_.longest;
        if (b.runs == 1) {
            for (int64_t q = 0; q < p_.width; ++q)
                if (chosen(q)) set_unit(q, std::sqrt(total[q]) * b.norm, std::sqrt(largest[q]) * most, room);
            return;
        }
        Square sum = 0, single = 0;
        for (int64_t q = 0; q < p_.width; ++q) {
            Square here = 0;
            for (int64_t r = 0; r < b.runs; ++r) here += total[p_.offsets[b.run[r].tap] + q];
            if (here > sum || here != here) sum = here;  // NaN stays
        }
        for (int64_t q = 0; q < p_.table_width; ++q)
            if (largest[q] > single || largest[q] != largest[q]) single = largest[q];
        set_unit(0, std::sqrt(sum) * b.norm, std::sqrt(single) * most, room);
        const double unit = r_.unit.get()[0];
        if (unit == unit) noise_ += static_cast<double>(b.groups * c_.codebooks * b.runs * (c_.half ? 2 : 1)) * unit * unit / 12;
        std::fill(r_.unit.get(), r_.unit.get() + p_.width, r_.unit.get()[0]);
        std::fill(r_.inverse.get(), r_.inverse.get() + p_.table_width, r_.inverse.get()[0]);
    }

    void set_unit(int64_t q, float sum, float single, float room) {
        const float bound = sum > single ? sum : single;
        const bool finite = sum - sum == 0 && single - single == 0;
        r_.unit.get()[q] = finite ? bound / room : __builtin_nanf("");
        r_.inverse.get()[q] = finite && bound > 1e-33f ? room / bound : 0;
    }

    // Rows of one lookup (or of half a lookup of fused codes, which starts at input ``skip`` of the group) into ``to``.
    void products(const Block& b, int64_t group, const float* words, int64_t count, int64_t skip, int64_t span, int64_t q0, char* to) {
        const auto product = c_.exact ? level_.product_rows_exact : level_.product_rows_fast;
        const float* from[kSpan];
        for (size_t range = 0, at = 0; range < p_.widths.size(); at += p_.widths[range++]) {
            streams(b, group, range, q0, from);
            product(words, count, from + skip, span, r_.inverse.get() + at, p_.widths[range], p_.table_width, to + at * (c_.exact ? 4 : 2));
        }
    }

    void lookup(const Block& b, int64_t index, int64_t q0, char* to) {
        if (c_.words && level_.product_rows_dots && !c_.exact) {
            const int32_t* pairs = c_.words + index % c_.codebooks * c_.codeword_count * ((c_.span + 1) / 2);
            const float* from[kSpan];
            for (size_t range = 0, at = 0; range < p_.widths.size(); at += p_.widths[range++]) {
                streams(b, index / c_.codebooks, range, q0, from);
                level_.product_rows_dots(pairs, c_.codeword_count, from, c_.span, r_.inverse.get() + at, 65536 * c_.word_unit,
                                         p_.widths[range], p_.table_width, reinterpret_cast<int16_t*>(to) + at);
            }
            return;
        }
        const float* words = c_.codewords + index % c_.codebooks * c_.codeword_count * c_.span;
        products(b, index / c_.codebooks, words, c_.codeword_count, 0, c_.span, q0, to);
    }

    void fill(const Block& b, int64_t q0) {
        const int64_t row = p_.table_width * (c_.exact ? 4 : 2), lookups = b.groups * c_.codebooks, part = c_.half ? c_.half : 16;
        char *to = r_.table.get(), *low = reinterpret_cast<char*>(r_.halves.get()), *high = low + part * row;
        for (int64_t i = 0; i < c_.bytes(b); ++i, to += c_.table_rows() * row) {
            if (c_.width == 8 && !c_.half) {
                lookup(b, i, q0, to);
                continue;
            }
            if (c_.half) {
                products(b, i, c_.codewords, part, 0, c_.span / 2, q0, low);
                products(b, i, c_.codewords, part, c_.span / 2, c_.span / 2, q0, high);
            } else {
                lookup(b, 2 * i, q0, low);
                if (2 * i + 1 < lookups)
                    lookup(b, 2 * i + 1, q0, high);
                else
                    std::fill(high, high + part * row, 0);
            }
            level_.sum_rows(low, part, high, part, p_.table_width, to, c_.exact);
        }
    }

    const Level& level_;
    const Call& c_;
    const Planes& p_;
    Room& r_;
    double noise_ = 0;  // expected square of the rounding errors of a sum, without scales of rows
    std::vector<std::pair<int64_t, int64_t>> coarse_;
};

struct Part {
    int64_t tile, from, to;  // rows [from, to) of a tile
};

// Every tile as it is, but for those that do not go around among the threads: they share each of them by rows, and each makes its tables.
std::vector<Part> parts_of(int64_t tiles, int64_t out, int64_t threads) {
    std::vector<Part> parts;
    const int64_t left = tiles % threads;
    const int64_t shares = left ? std::clamp<int64_t>(threads / left, 1, ceil_divide(out, kRows)) : 1, rows = rounded_up(ceil_divide(out, shares), kRows);
    for (int64_t tile = 0; tile < tiles - left; ++tile) parts.push_back({tile, 0, out});
    for (int64_t tile = tiles - left; tile < tiles; ++tile)
        for (int64_t from = 0; from < out; from += rows) parts.push_back({tile, from, std::min(out, from + rows)});
    return parts;
}

// store(task's room, q0, from, to) for every tile and range of rows.
template <class Store>
void run_tiles(const Level& level, const Call& c, const Planes& p, const std::vector<Block>& blocks, int threads, const Store& keep) {
    if (c.out * c.row_bytes * p.columns < kParallel) threads = 1;
    const std::vector<Part> parts = parts_of(ceil_divide(p.columns, p.width), c.out, threads);
    int64_t bytes = 1, groups = 1, runs = 1;
    for (const Block& b : blocks) {
        bytes = std::max(bytes, c.bytes(b));
        groups = std::max(groups, b.groups);
        runs = std::max(runs, b.runs);
    }
    const int64_t count = static_cast<int64_t>(parts.size());
    int64_t rows = 1;
    for (const Part& part : parts) rows = std::max(rows, part.to - part.from);
    [[maybe_unused]] const int team = static_cast<int>(std::min<int64_t>(threads, count));
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Room room(c, p, rows, bytes, groups, runs);
        Task task(level, c, p, room);
        Call exact = c;
        exact.exact = true;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t q0 = parts[i].tile * p.width, from = parts[i].from, to = parts[i].to;
            task.run(blocks, q0, from, to);
            keep(room.sums.get(), q0, from, to);
            for (const auto& [begin, end] : task.coarse()) {
                Room wide(exact, p, end - begin, bytes, groups, runs);
                Task(level, exact, p, wide).run(blocks, q0, begin, end);
                keep(wide.sums.get(), q0, begin, end);
            }
        }
    }
}

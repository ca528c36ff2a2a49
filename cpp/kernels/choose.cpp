// Which layout a matrix gets: the cheapest by the cycles that fetching and decoding it take, which partly overlap.
#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "packed.h"

namespace paring::kernels {
namespace {

// What one core gets from memory when all cores read: 18 of 37 GB/s at 3.7 GHz on Zen 5, 14 of 28 at 3.1 GHz on Zen 3,
// 11 of 22 at 2.5 GHz on Cascade Lake. The choice only depends on it near the break-even sparsities.
constexpr double kBytesPerCycle = 5.0;

// What of a matrix is kept, per 64 weights, and how evenly.
struct Density {
    double weights;      // kept weights
    double blocks;       // 1x4 blocks with anything kept
    double windows;      // weights that i8_n16 stores
    double masked;       // 16x16 tiles that i8_n16 stores masks of
    double pairs;        // weights kept of row 2i or 2i + 1, both counted
    double columns;      // weights of columns with anything kept of 16 rows
    double lists;        // vectors of 8 rows x 4 weights that i8_lists stores
    double lists4;       // and i8_lists4
    double groups;       // of columns, which i8_columns and i4_columns fill up with 1.5 or 3.5 columns on average
    uint32_t of4, of16;  // most weights kept of 4 and of 16 consecutive ones
};

// 1x4 blocks with anything kept in the fullest of rows [row, row + 8), in 32 columns at byte i of the mask.
size_t fullest_blocks(const MatrixSource& s, size_t row, size_t i) {
    const size_t width = (static_cast<size_t>(s.k) + 7) / 8;
    size_t most = 0;
    for (size_t r = row; r < row + 8 && r < static_cast<size_t>(s.n); ++r) {
        size_t blocks = 0;
        for (size_t b = i; b < i + 4 && b < width; ++b) {
            const uint8_t mask = s.mask[r * width + b];
            blocks += (mask & 15) != 0;
            blocks += mask >> 4 != 0;
        }
        most = std::max(most, blocks);
    }
    return most;
}

Density density(const MatrixSource& s) {
    const size_t row = (static_cast<size_t>(s.k) + 7) / 8;
    const auto bits = [&](size_t r, size_t i) { return uint32_t{i < row ? s.mask[r * row + i] : uint8_t{0}}; };
    size_t weights = 0, blocks = 0, windows = 0, masked = 0, pairs = 0, columns = 0, lists = 0, lists4 = 0;
    Density d{};
    for (size_t p = 0; p < static_cast<size_t>(s.n); p += kPanelRows)
        for (size_t i = 0; i < row; i += 2) {
            if (i % 4 == 0) lists4 += fullest_blocks(s, p, i) + fullest_blocks(s, p + 8, i);
            uint32_t above = 0, any = 0, fullest[2] = {};
            for (size_t r = p; r < p + kPanelRows && r < static_cast<size_t>(s.n); ++r) {
                const uint32_t mask = bits(r, i) | bits(r, i + 1) << 8;
                for (uint32_t left = mask; left != 0; left >>= 4) {
                    const uint32_t kept = count_bits(left & 15);
                    blocks += kept != 0;
                    d.of4 = std::max(d.of4, kept);
                }
                const uint32_t kept = count_bits(mask);
                weights += kept;
                // An even row counts when its odd one comes; the last row may have none.
                if ((r - p) % 2 == 1 || r + 1 == static_cast<size_t>(s.n))
                    pairs += 2 * size_t{count_bits(mask | above)};
                above = (r - p) % 2 == 0 ? mask : 0;
                any |= mask;
                uint32_t& half = fullest[(r - p) / 8];
                half = std::max(half, kept);
            }
            const uint32_t most = std::max(fullest[0], fullest[1]);
            const size_t count = round_up(most, 4);
            lists += (round_up(fullest[0], 4) + round_up(fullest[1], 4)) / 4;
            windows += 16 * count;
            masked += count % 16 != 0;
            columns += 16 * size_t{count_bits(any)};
            d.of16 = std::max(d.of16, most);
        }
    const double units = static_cast<double>(s.n) * s.k / 64;
    d.weights = static_cast<double>(weights) / units;
    d.blocks = static_cast<double>(blocks) / units;
    d.windows = static_cast<double>(windows) / units;
    d.masked = static_cast<double>(masked) / units;
    d.pairs = static_cast<double>(pairs) / units;
    d.columns = static_cast<double>(columns) / units;
    d.lists = static_cast<double>(lists) / units;
    d.lists4 = static_cast<double>(lists4) / units;
    const int32_t group = s.group == 0 && s.mode == InputMode::int16 ? 64 : s.group;
    d.groups = group == 0 ? 0 : 64.0 / group;
    return d;
}

// Whether a layout can hold the matrix at all.
bool fits(Layout layout, const Density& d) {
    if (layout == Layout::i8_2of4 || layout == Layout::i4_2of4) return d.of4 <= 2;
    if (layout == Layout::i8_4of16 || layout == Layout::i4_4of16) return d.of16 <= 4;
    return true;
}

double bytes_of(Layout layout, const Density& d) {
    switch (layout) {
        case Layout::f32_dense: return 256;
        case Layout::f16_dense: return 128;
        case Layout::f32_bitmask: return 8 + 4 * d.weights;
        case Layout::i8_dense: return 64;
        case Layout::i4_dense: return 32;
        case Layout::i8_bitmask: return 8 + d.weights;
        case Layout::i4_bitmask: return 8.25 + d.weights / 2;
        case Layout::i8_block4: return 2 + 4 * d.blocks;
        case Layout::i4_block4:
        case Layout::i4_words: return 2 + 2 * d.blocks;
        case Layout::i8_2of4: return 40;
        case Layout::i4_2of4: return 24;
        case Layout::i8_4of16: return 24;
        case Layout::i4_4of16: return 16;
        case Layout::i8_n16: return 0.25 + 32 * d.masked + d.windows;
        case Layout::i4_n16: return 0.25 + 32 * d.masked + d.windows / 2;
        case Layout::i8_pairs: return 4 + d.pairs;
        case Layout::i4_pairs: return 4 + d.pairs / 2;
        case Layout::i8_columns: return 0.75 + d.columns + 1.5 * d.groups;
        case Layout::i4_columns: return 0.75 + (d.columns + 3.5 * d.groups) / 2;
        case Layout::i8_lists: return 0.25 * d.groups + 49 * d.lists;
        case Layout::i4_lists: return 0.25 * d.groups + 33 * d.lists;
        case Layout::i8_lists4: return 0.25 * d.groups + 37 * d.lists4;
        case Layout::i4_lists4: return 0.25 * d.groups + 21 * d.lists4;
        case Layout::count: break;
    }
    return 0;
}

Layout cheapest(const KernelRow& row, const Density& d, std::initializer_list<Layout> layouts) {
    Layout best = Layout::count;
    double best_cost = 0;
    for (const Layout layout : layouts) {
        if (row.run[static_cast<size_t>(layout)] == nullptr || !fits(layout, d)) continue;
        const double bytes = bytes_of(layout, d);
        const bool lists = layout == Layout::i8_lists || layout == Layout::i4_lists;
        const bool lists4 = layout == Layout::i8_lists4 || layout == Layout::i4_lists4;
        const double times = lists ? d.lists : lists4 ? d.lists4 : 1;
        const double decoding = double{row.cycles[static_cast<size_t>(layout)]} * times;
        const double fetching = (bytes + 2 * d.groups) / kBytesPerCycle;  // with the scales of groups, in float16
        // Each hides most of the other: kernels in memory on Zen 4, of all layouts, take within a tenth of this.
        const double cost = std::cbrt(fetching * fetching * fetching + decoding * decoding * decoding);
        if (best != Layout::count && cost >= best_cost) continue;
        best = layout;
        best_cost = cost;
    }
    return best;
}

}  // namespace

Layout choose_layout(const KernelRow& row, const MatrixSource& s) {
    if (s.dtype == DType::f16) return Layout::f16_dense;
    if (s.storage == Storage::dense)
        return s.dtype == DType::f32 ? Layout::f32_dense : s.dtype == DType::i8 ? Layout::i8_dense : Layout::i4_dense;
    const Density d = density(s);
    if (s.dtype == DType::f32) return cheapest(row, d, {Layout::f32_dense, Layout::f32_bitmask});
    if (s.dtype == DType::i8)
        return cheapest(row, d, {Layout::i8_dense, Layout::i8_4of16, Layout::i8_2of4, Layout::i8_n16,
                                 Layout::i8_columns, Layout::i8_pairs, Layout::i8_bitmask, Layout::i8_block4,
                                 Layout::i8_lists, Layout::i8_lists4});
    return cheapest(row, d, {Layout::i4_dense, Layout::i4_4of16, Layout::i4_2of4, Layout::i4_n16,
                             Layout::i4_columns, Layout::i4_pairs, Layout::i4_bitmask, Layout::i4_block4,
                             Layout::i4_words, Layout::i4_lists, Layout::i4_lists4});
}

}  // namespace paring::kernels

// Which layout a matrix gets: the cheapest by max(bytes to fetch, cycles to decode).
#include <algorithm>
#include <initializer_list>

#include "packed.h"

namespace paring::kernels {
namespace {

// What one core gets from memory when all cores read: 18 of 37 GB/s at 3.7 GHz on the Zen 5 the cycles were measured
// on, 11 of 22 at 2.5 GHz on Cascade Lake. The choice only depends on it near the break-even sparsities.
constexpr double kBytesPerCycle = 5.0;

// Kept weights and 1x4 blocks with anything kept, both per 64 weights.
struct Density {
    double weights, blocks;
};

Density density(const MatrixSource& s) {
    const size_t row = (static_cast<size_t>(s.k) + 7) / 8;
    size_t weights = 0, blocks = 0;
    for (size_t i = 0; i < static_cast<size_t>(s.n) * row; ++i) {
        weights += static_cast<size_t>(__builtin_popcount(s.mask[i]));
        blocks += static_cast<size_t>(((s.mask[i] & 15) != 0) + (s.mask[i] >> 4 != 0));
    }
    const double units = static_cast<double>(s.n) * s.k / 64;
    return {static_cast<double>(weights) / units, static_cast<double>(blocks) / units};
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
        case Layout::i4_block4: return 2 + 2 * d.blocks;
        case Layout::count: break;
    }
    return 0;
}

Layout cheapest(const KernelRow& row, const Density& d, std::initializer_list<Layout> layouts) {
    Layout best = Layout::count;
    double best_cost = 0;
    for (const Layout layout : layouts) {
        if (row.run[static_cast<size_t>(layout)] == nullptr) continue;
        const double bytes = bytes_of(layout, d);
        // Bytes count a little even where cycles bind: they crowd the caches and slow the other threads.
        const double cycles = double{row.cycles[static_cast<size_t>(layout)]};
        const double cost = std::max(bytes / kBytesPerCycle, cycles) + bytes / 20;
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
    if (s.dtype == DType::i8) return cheapest(row, d, {Layout::i8_dense, Layout::i8_bitmask, Layout::i8_block4});
    return cheapest(row, d, {Layout::i4_dense, Layout::i4_bitmask, Layout::i4_block4});
}

}  // namespace paring::kernels

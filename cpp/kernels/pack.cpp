// Portable matrix -> packed panels (the layouts are described in kernels.h).
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "memory.h"
#include "tile.h"

namespace paring::kernels {
namespace {

void append_header(std::vector<uint8_t>& out, const PackedMatrix& w, const MatrixSource& s, const Tile<int8_t>& tile,
                   int32_t row, int32_t rows) {
    const auto* from = reinterpret_cast<const char*>(s.scales);
    std::vector<float> scale(static_cast<size_t>(w.scale_groups) * 16, 0.0F);
    for (int32_t r = 0; r < rows; ++r)
        for (int32_t g = 0; g < w.scale_groups; ++g)
            // The source may stand at any address.
            std::memcpy(&scale[g * 16 + r], from + 4 * (static_cast<size_t>(row + r) * w.scale_groups + g), 4);
    if (w.half_scales) {
        std::vector<uint16_t> halves(scale.size());
        for (size_t i = 0; i < scale.size(); ++i) exact_half(scale[i], halves[i]);
        append(out, halves.data(), halves.size() * 2);
        pad(out);
    } else {
        append(out, scale.data(), scale.size() * 4);
    }
    int32_t sums[16] = {};
    float weighted[16] = {};
    for (int32_t r = 0; r < 16; ++r) {
        const size_t span = w.group == 0 ? tile.columns : static_cast<size_t>(w.group);
        for (int32_t g = 0; g < w.groups; ++g) {
            int32_t sum = 0;
            const int8_t* value = &tile.value[r * tile.columns];
            for (size_t j = g * span; j < tile.columns && j < (g + 1) * span; ++j) sum += value[j];
            sums[r] += sum;
            weighted[r] = std::fmaf(static_cast<float>(sum), scale[w.scale_groups == 1 ? r : g * 16 + r], weighted[r]);
        }
    }
    append(out, w.group == 0 ? static_cast<const void*>(sums) : weighted, 64);
}

// The dtype a layout holds; a dense source may go into a bitmask layout and the other way round.
DType dtype_of(Layout layout) {
    switch (layout) {
        case Layout::f32_dense:
        case Layout::f32_bitmask: return DType::f32;
        case Layout::f16_dense: return DType::f16;
        case Layout::i8_dense:
        case Layout::i8_bitmask:
        case Layout::i8_block4:
        case Layout::i8_2of4:
        case Layout::i8_4of16:
        case Layout::i8_n16:
        case Layout::i8_pairs:
        case Layout::i8_columns:
        case Layout::i8_lists:
        case Layout::i8_lists4: return DType::i8;
        case Layout::i4_dense:
        case Layout::i4_bitmask:
        case Layout::i4_block4:
        case Layout::i4_2of4:
        case Layout::i4_4of16:
        case Layout::i4_n16:
        case Layout::i4_pairs:
        case Layout::i4_columns:
        case Layout::i4_words:
        case Layout::i4_lists:
        case Layout::i4_lists4: return DType::i4;
        case Layout::count: break;
    }
    throw std::invalid_argument("matrix: unknown layout");
}

bool all_exact_halves(const MatrixSource& s) {
    const auto* from = reinterpret_cast<const char*>(s.scales);
    for (size_t i = 0; i < s.scales_count; ++i) {
        float scale;
        uint16_t half;
        std::memcpy(&scale, from + 4 * i, 4);
        if (!exact_half(scale, half)) return false;
    }
    return true;
}

void describe(PackedMatrix& w, const MatrixSource& s, Layout layout) {
    w.layout = layout;
    w.n = s.n;
    w.k = s.k;
    w.panels = (s.n + kPanelRows - 1) / kPanelRows;
    // 15-bit inputs need groups (int32 sums, and an outlier must not cost its neighbours their precision).
    w.group = s.group == 0 && s.mode == InputMode::int16 ? 64 : s.group;
    w.groups = w.group == 0 ? 1 : (s.k + w.group - 1) / w.group;
    w.scale_groups = s.mode == InputMode::f32 ? 0 : s.group == 0 ? 1 : w.groups;
    w.half_scales = w.scale_groups > 1 && all_exact_halves(s);
    const size_t scales = static_cast<size_t>(w.scale_groups) * kPanelRows * (w.half_scales ? 2 : 4);
    w.header = w.scale_groups == 0 ? 0 : round_up(scales, kAlignment) + 64;
    w.input = {s.mode, w.group, s.input_scale, s.input_zero_point};
    w.offset = static_cast<uint64_t*>(allocate_shared((static_cast<size_t>(w.panels) + 1) * sizeof *w.offset));
}

template <class T, class Append>
std::vector<uint8_t> pack_panels(PackedMatrix& w, const MatrixSource& s, Append append_panel) {
    std::vector<uint8_t> out;
    RowReader reader(s);
    Tile<T> tile(s.k);
    for (int32_t p = 0; p < w.panels; ++p) {
        const int32_t rows = s.n - p * kPanelRows < kPanelRows ? s.n - p * kPanelRows : kPanelRows;
        w.offset[p] = out.size();
        w.nonzeros += tile.fill(reader, rows);
        append_panel(out, tile, p * kPanelRows, rows);
        pad(out);
    }
    w.offset[w.panels] = out.size();
    return out;
}

}  // namespace

PackedMatrix pack(const MatrixSource& s, Layout layout) {
    validate(s);
    if (dtype_of(layout) != s.dtype) throw std::invalid_argument("matrix: layout and dtype differ");
    PackedMatrix w;
    describe(w, s, layout);
    std::vector<uint8_t> out;
    if (s.mode == InputMode::f32)
        out = pack_panels<uint32_t>(w, s, [&](auto& to, const auto& tile, int32_t, int32_t) {
            append_floats(to, layout, tile, static_cast<size_t>(s.k));
        });
    else
        out = pack_panels<int8_t>(w, s, [&](auto& to, const auto& tile, int32_t row, int32_t rows) {
            append_header(to, w, s, tile, row, rows);
            append_integers(to, layout, tile, w.group);
        });
    w.bytes = out.size();
    w.data = static_cast<uint8_t*>(allocate_shared(out.size() + kOverread));
    std::memcpy(w.data, out.data(), out.size());
    std::memset(w.data + out.size(), 0, kOverread);
    return w;
}

}  // namespace paring::kernels

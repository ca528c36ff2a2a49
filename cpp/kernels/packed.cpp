// PackedMatrix: ownership, the choice of a layout, and the sizes that depend on it.
#include "packed.h"

#include <utility>

#include "memory.h"

namespace paring::kernels {

PackedMatrix::PackedMatrix()
    : layout(Layout::count), input{InputMode::f32, 0, 0, 0}, n(0), k(0), panels(0), group(0), groups(1),
      scale_groups(0), half_scales(false), header(0), nonzeros(0), bytes(0), data(nullptr), offset(nullptr) {}

PackedMatrix::~PackedMatrix() {
    free_shared(data, bytes + kOverread);
    free_shared(offset, (static_cast<size_t>(panels) + 1) * sizeof *offset);
}

PackedMatrix::PackedMatrix(PackedMatrix&& other) noexcept : PackedMatrix() { *this = std::move(other); }

PackedMatrix& PackedMatrix::operator=(PackedMatrix&& other) noexcept {
    std::swap(layout, other.layout);
    std::swap(input, other.input);
    std::swap(n, other.n);
    std::swap(k, other.k);
    std::swap(panels, other.panels);
    std::swap(group, other.group);
    std::swap(groups, other.groups);
    std::swap(scale_groups, other.scale_groups);
    std::swap(half_scales, other.half_scales);
    std::swap(header, other.header);
    std::swap(nonzeros, other.nonzeros);
    std::swap(bytes, other.bytes);
    std::swap(data, other.data);
    std::swap(offset, other.offset);
    return *this;
}

const char* layout_name(Layout layout) {
    switch (layout) {
        case Layout::f32_dense: return "f32_dense";
        case Layout::f16_dense: return "f16_dense";
        case Layout::f32_bitmask: return "f32_bitmask";
        case Layout::i8_dense: return "i8_dense";
        case Layout::i4_dense: return "i4_dense";
        case Layout::i8_bitmask: return "i8_bitmask";
        case Layout::i4_bitmask: return "i4_bitmask";
        case Layout::i8_block4: return "i8_block4";
        case Layout::i4_block4: return "i4_block4";
        case Layout::i8_2of4: return "i8_2of4";
        case Layout::i4_2of4: return "i4_2of4";
        case Layout::i8_4of16: return "i8_4of16";
        case Layout::i4_4of16: return "i4_4of16";
        case Layout::i8_n16: return "i8_n16";
        case Layout::i4_n16: return "i4_n16";
        case Layout::i8_pairs: return "i8_pairs";
        case Layout::i4_pairs: return "i4_pairs";
        case Layout::i8_columns: return "i8_columns";
        case Layout::i4_columns: return "i4_columns";
        case Layout::i4_words: return "i4_words";
        case Layout::i8_lists: return "i8_lists";
        case Layout::i4_lists: return "i4_lists";
        case Layout::i8_lists4: return "i8_lists4";
        case Layout::i4_lists4: return "i4_lists4";
        case Layout::count: break;
    }
    return "?";
}

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Two decoded panels, one byte per weight for integers, four for floats; or the gathered inputs of a few tokens.
size_t run_scratch_bytes(const PackedMatrix& w) {
    const size_t columns = round_up(static_cast<size_t>(w.k), kStep);
    const bool wide = w.layout == Layout::f32_dense || w.layout == Layout::f32_bitmask || w.layout == Layout::f16_dense;
    return 2 * columns * kPanelRows * (wide ? 4 : 1) + 1024 + kOverread;
}

int32_t split_panels(const PackedMatrix& w, int32_t part, int32_t parts) {
    if (part <= 0) return 0;
    if (part >= parts) return w.panels;
    const uint64_t target = w.offset[w.panels] / static_cast<uint64_t>(parts) * static_cast<uint64_t>(part);
    int32_t low = 0, high = w.panels;  // first panel that begins at or after the target
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (w.offset[middle] < target)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

}  // namespace paring::kernels

// Portable matrix -> packed panels (the layouts are described in kernels.h).
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace paring::kernels {
namespace {

// Hands out the rows of a source one after the other, as dense integers or float bits, with their masks.
class RowReader {
public:
    explicit RowReader(const MatrixSource& source)
        : s_(source), values_(static_cast<const uint8_t*>(source.values)) {}

    // Sets kept[j] and value[j] of the kept columns and leaves the others alone; returns how many there are.
    template <class T>
    size_t next(uint8_t* kept, T* value) {
        const size_t k = static_cast<size_t>(s_.k);
        size_t count = 0;
        if (s_.storage == Storage::dense) {
            std::memset(kept, 1, k);
            for (; count < k; ++count) value[count] = static_cast<T>(read(count));
        } else {
            const uint8_t* mask = s_.mask + row_ * ((k + 7) / 8);
            for (size_t j = 0; j < k; j += 8)
                for (unsigned bits = mask[j / 8]; bits != 0; bits &= bits - 1) {
                    const size_t column = j + static_cast<size_t>(__builtin_ctz(bits));
                    kept[column] = 1;
                    value[column] = static_cast<T>(read(count++));
                }
        }
        values_ += s_.dtype == DType::i4 ? (count + 1) / 2 : count * width();
        ++row_;
        return count;
    }

private:
    size_t width() const { return s_.dtype == DType::f32 ? 4 : s_.dtype == DType::f16 ? 2 : 1; }

    // f32 and f16 as their bits.
    int64_t read(size_t i) const {
        switch (s_.dtype) {
            case DType::f32: {
                uint32_t bits;
                std::memcpy(&bits, values_ + 4 * i, 4);
                return bits;
            }
            case DType::f16: {
                uint16_t bits;
                std::memcpy(&bits, values_ + 2 * i, 2);
                return bits;
            }
            case DType::i8: return static_cast<int8_t>(values_[i]);
            case DType::i4: break;
        }
        const int nibble = (values_[i / 2] >> (4 * (i % 2))) & 15;
        return nibble < 8 ? nibble : nibble - 16;
    }

    const MatrixSource& s_;
    const uint8_t* values_;
    size_t row_ = 0;
};

// 16 rows as [16][columns], columns padded to kStep; rows past n and columns past k are pruned zeros.
template <class T>
struct Tile {
    explicit Tile(int32_t k)
        : columns(round_up(static_cast<size_t>(k), kStep)), kept(columns * kPanelRows), value(columns * kPanelRows) {}

    size_t fill(RowReader& reader, int32_t rows) {
        std::memset(kept.data(), 0, kept.size());
        std::memset(value.data(), 0, value.size() * sizeof(T));
        size_t count = 0;
        for (int32_t r = 0; r < rows; ++r) count += reader.next(&kept[r * columns], &value[r * columns]);
        return count;
    }

    size_t columns;
    std::vector<uint8_t> kept;
    std::vector<T> value;
};

void append(std::vector<uint8_t>& out, const void* from, size_t bytes) {
    const auto* p = static_cast<const uint8_t*>(from);
    out.insert(out.end(), p, p + bytes);
}

void pad(std::vector<uint8_t>& out) { out.resize(round_up(out.size(), kAlignment)); }

void append_header(std::vector<uint8_t>& out, const PackedMatrix& w, const MatrixSource& s, const Tile<int8_t>& tile,
                   int32_t row, int32_t rows) {
    std::vector<float> scale(static_cast<size_t>(w.scale_groups) * 16, 0.0F);
    for (int32_t r = 0; r < rows; ++r)
        for (int32_t g = 0; g < w.scale_groups; ++g)
            std::memcpy(&scale[g * 16 + r],
                        reinterpret_cast<const char*>(s.scales) + 4 * (static_cast<size_t>(row + r) * w.scale_groups + g), 4);
    append(out, scale.data(), scale.size() * 4);
    int32_t sums[16] = {};
    float weighted[16] = {};
    for (int32_t r = 0; r < 16; ++r) {
        const size_t span = w.group == 0 ? tile.columns : static_cast<size_t>(w.group);
        for (int32_t g = 0; g < w.groups; ++g) {
            int32_t sum = 0;
            for (size_t j = g * span; j < tile.columns && j < (g + 1) * span; ++j) sum += tile.value[r * tile.columns + j];
            sums[r] += sum;
            weighted[r] = std::fmaf(static_cast<float>(sum), scale[w.scale_groups == 1 ? r : g * 16 + r], weighted[r]);
        }
    }
    append(out, w.group == 0 ? static_cast<const void*>(sums) : weighted, 64);
}

void append_i8_dense(std::vector<uint8_t>& out, const Tile<int8_t>& tile) {
    for (size_t j = 0; j < tile.columns; j += 4)
        for (size_t r = 0; r < 16; ++r)
            for (size_t i = 0; i < 4; ++i) out.push_back(static_cast<uint8_t>(tile.value[r * tile.columns + j + i] + 128));
}

void append_i4_dense(std::vector<uint8_t>& out, const Tile<int8_t>& tile) {
    for (size_t j = 0; j < tile.columns; j += 8)
        for (size_t r = 0; r < 16; ++r)
            for (size_t i = 0; i < 4; ++i) {
                const int8_t* at = &tile.value[r * tile.columns + j + i];
                out.push_back(static_cast<uint8_t>((at[0] + 8) | (at[4] + 8) << 4));
            }
}

// Bit 4 * row + column: which weights of the block at columns j .. j + 3 are kept.
uint64_t block_mask(const Tile<int8_t>& tile, size_t j) {
    uint64_t mask = 0;
    for (size_t r = 0; r < 16; ++r) {
        uint32_t kept;
        std::memcpy(&kept, &tile.kept[r * tile.columns + j], 4);
        mask |= uint64_t{kept * 0x01020408u >> 24 & 15} << (4 * r);  // four bytes of 0 or 1 -> four bits
    }
    return mask;
}

void append_bitmask(std::vector<uint8_t>& out, const Tile<int8_t>& tile, bool nibbles) {
    std::vector<uint8_t> values(tile.columns * 16);
    size_t used = 0;
    for (size_t j = 0; j < tile.columns; j += 4) {
        const uint64_t mask = block_mask(tile, j);
        append(out, &mask, 8);
        size_t count = 0;
        for (uint64_t left = mask; left != 0; left &= left - 1, ++count) {
            const size_t bit = static_cast<size_t>(__builtin_ctzll(left));
            const int value = tile.value[bit / 4 * tile.columns + j + bit % 4];
            if (nibbles)
                values[used + count / 2] |= static_cast<uint8_t>((value + 8) << (count % 2 * 4));
            else
                values[used + count] = static_cast<uint8_t>(value + 128);
        }
        used += nibbles ? (count + 1) / 2 : count;
    }
    pad(out);
    append(out, values.data(), used);
}

template <class T>
void append_float_dense(std::vector<uint8_t>& out, const Tile<uint32_t>& tile, size_t k) {
    for (size_t j = 0; j < k; ++j)
        for (size_t r = 0; r < 16; ++r) {
            const T bits = static_cast<T>(tile.value[r * tile.columns + j]);
            append(out, &bits, sizeof bits);
        }
}

void append_float_bitmask(std::vector<uint8_t>& out, const Tile<uint32_t>& tile, size_t k) {
    std::vector<uint8_t> values;
    for (size_t j = 0; j < k; ++j) {
        uint16_t mask = 0;
        for (size_t r = 0; r < 16; ++r) {
            if (!tile.kept[r * tile.columns + j]) continue;
            mask = static_cast<uint16_t>(mask | 1u << r);
            append(values, &tile.value[r * tile.columns + j], 4);
        }
        append(out, &mask, 2);
    }
    pad(out);
    append(out, values.data(), values.size());
}

void append_integers(std::vector<uint8_t>& out, Layout layout, const Tile<int8_t>& tile) {
    if (layout == Layout::i8_dense)
        append_i8_dense(out, tile);
    else if (layout == Layout::i4_dense)
        append_i4_dense(out, tile);
    else
        append_bitmask(out, tile, layout == Layout::i4_bitmask);
}

void append_floats(std::vector<uint8_t>& out, Layout layout, const Tile<uint32_t>& tile, size_t k) {
    if (layout == Layout::f32_dense)
        append_float_dense<uint32_t>(out, tile, k);
    else if (layout == Layout::f16_dense)
        append_float_dense<uint16_t>(out, tile, k);
    else
        append_float_bitmask(out, tile, k);
}

// The dtype a layout holds; a dense source may go into a bitmask layout and the other way round.
DType dtype_of(Layout layout) {
    switch (layout) {
        case Layout::f32_dense:
        case Layout::f32_bitmask: return DType::f32;
        case Layout::f16_dense: return DType::f16;
        case Layout::i8_dense:
        case Layout::i8_bitmask: return DType::i8;
        case Layout::i4_dense:
        case Layout::i4_bitmask: return DType::i4;
        case Layout::count: break;
    }
    throw std::invalid_argument("matrix: unknown layout");
}

void* allocate(size_t bytes) {
    constexpr size_t huge = size_t{2} << 20;
    const size_t unit = bytes >= 2 * huge ? huge : kAlignment;
    void* memory = std::aligned_alloc(unit, round_up(bytes, unit));
    if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == huge) madvise(memory, round_up(bytes, unit), MADV_HUGEPAGE);  // only a hint: 4-8 % faster reads
#endif
    return memory;
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
    w.input = {s.mode, w.group, s.input_scale, s.input_zero_point};
    w.offset = static_cast<uint64_t*>(allocate((static_cast<size_t>(w.panels) + 1) * 8));
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
            append_integers(to, layout, tile);
        });
    w.bytes = out.size();
    w.data = static_cast<uint8_t*>(allocate(out.size() + kOverread));
    std::memcpy(w.data, out.data(), out.size());
    std::memset(w.data + out.size(), 0, kOverread);
    return w;
}

}  // namespace paring::kernels

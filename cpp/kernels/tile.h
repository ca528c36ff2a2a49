// What the packing units share: reading a portable matrix row by row, and one panel's rows as a tile.
#pragma once

#include <cstring>
#include <vector>

#include "packed.h"

namespace paring::kernels {

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

inline void append(std::vector<uint8_t>& out, const void* from, size_t bytes) {
    const auto* p = static_cast<const uint8_t*>(from);
    out.insert(out.end(), p, p + bytes);
}

inline void pad(std::vector<uint8_t>& out) { out.resize(round_up(out.size(), kAlignment)); }

// A mask into a chunk's 64 bytes of them; a chunk begins wherever there is no room.
template <class Mask>
class Chunks {
public:
    explicit Chunks(std::vector<uint8_t>& out) : out_(out) {}
    void add(Mask mask) {
        if (used_ == 64) {
            masks_ = out_.size();
            out_.resize(out_.size() + 64);
            used_ = 0;
        }
        std::memcpy(&out_[masks_ + used_], &mask, sizeof mask);
        used_ += sizeof mask;
    }

private:
    std::vector<uint8_t>& out_;
    size_t masks_ = 0, used_ = 64;
};

// The bodies of panels, appended to `out` (see Layout in kernels.h).
void append_integers(std::vector<uint8_t>& out, Layout layout, const Tile<int8_t>& tile, int32_t group);
void append_pairs(std::vector<uint8_t>& out, const Tile<int8_t>& tile, bool nibbles);
void append_columns(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles);
void append_windows(std::vector<uint8_t>& out, Layout layout, const Tile<int8_t>& tile);
void append_lists(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles);
void append_lists4(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles);

// Columns of `count` weights of a row's window of `width` columns at j, ascending: all the kept ones, then as many
// others (which are zeros) as it takes. Throws where more are kept.
void choose_columns(const Tile<int8_t>& tile, size_t row, size_t j, size_t width, size_t count, uint8_t* columns);
// Kept weights of the fullest of rows [row, row + 8) in 16 columns at j, rounded up to a multiple of 4.
size_t window_count(const Tile<int8_t>& tile, size_t row, size_t j);
void append_floats(std::vector<uint8_t>& out, Layout layout, const Tile<uint32_t>& tile, size_t k);

}  // namespace paring::kernels

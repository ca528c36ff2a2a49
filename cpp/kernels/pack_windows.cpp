// The bodies of integer panels whose windows of 4 or 16 columns keep a fixed number of weights.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "tile.h"

namespace paring::kernels {
namespace {

// Bit i: whether the row keeps column j + i, of 4 or 16.
uint32_t kept_mask(const Tile<int8_t>& tile, size_t row, size_t j, size_t width) {
    const uint8_t* at = &tile.kept[row * tile.columns + j];
    uint64_t bytes[2] = {};
    std::memcpy(bytes, at, width);
    const auto bits = [](uint64_t eight) { return static_cast<uint32_t>(eight * 0x0102040810204080 >> 56); };
    return bits(bytes[0]) | bits(bytes[1]) << 8;
}

// Adds `count` weights as bytes, or as nibbles: the second half goes into the high ones.
void append_values(std::vector<uint8_t>& out, const int8_t* values, size_t count, bool nibbles) {
    for (size_t i = 0; i < (nibbles ? count / 2 : count); ++i)
        out.push_back(static_cast<uint8_t>(nibbles ? (values[i] + 8) | (values[i + count / 2] + 8) << 4
                                                   : values[i] + 128));
}

void append_2of4(std::vector<uint8_t>& out, const Tile<int8_t>& tile, bool nibbles) {
    for (size_t j = 0; j < tile.columns; j += 32) {
        const size_t vectors = tile.columns - j < 32 ? 2 : 4;
        uint8_t places[64] = {};
        int8_t values[4][64] = {};
        for (size_t v = 0; v < vectors; ++v)
            for (size_t i = 0; i < 32; ++i) {  // row i / 2, the half i % 2 of its 8 columns
                const size_t row = i / 2, from = j + 8 * v + i % 2 * 4;
                uint8_t columns[2];
                choose_columns(tile, row, from, 4, 2, columns);
                for (size_t s = 0; s < 2; ++s) {
                    places[2 * i + s] |= static_cast<uint8_t>(columns[s] << (2 * v));
                    values[v][2 * i + s] = tile.value[row * tile.columns + from + columns[s]];
                }
            }
        append(out, places, 64);
        for (size_t v = 0; v < vectors; v += 2) append_values(out, values[v], 128, nibbles);
    }
}

void append_4of16(std::vector<uint8_t>& out, const Tile<int8_t>& tile, bool nibbles) {
    for (size_t j = 0; j < tile.columns; j += 16) {
        uint8_t columns[64];
        int8_t values[64];
        for (size_t r = 0; r < 16; ++r) {
            choose_columns(tile, r, j, 16, 4, columns + 4 * r);
            for (size_t s = 4 * r; s < 4 * r + 4; ++s) values[s] = tile.value[r * tile.columns + j + columns[s]];
        }
        for (size_t i = 0; i < 32; ++i) out.push_back(static_cast<uint8_t>(columns[i] | columns[i + 32] << 4));
        append_values(out, values, 64, nibbles);
    }
}

void append_window(std::vector<uint8_t>& out, const Tile<int8_t>& tile, size_t j, size_t count, bool nibbles) {
    uint16_t masks[16] = {};
    int8_t values[16 * 16];
    for (size_t r = 0; r < 16; ++r) {
        uint8_t columns[16];
        choose_columns(tile, r, j, 16, count, columns);
        for (size_t s = 0; s < count; ++s) {
            masks[r] = static_cast<uint16_t>(masks[r] | 1u << columns[s]);
            values[r * count + s] = tile.value[r * tile.columns + j + columns[s]];
        }
    }
    if (count != 16) append(out, masks, 32);
    append_values(out, values, 16 * count, nibbles);
}

void append_n16(std::vector<uint8_t>& out, const Tile<int8_t>& tile, bool nibbles) {
    const size_t start = out.size(), windows = tile.columns / 16;
    out.resize(start + round_up(windows, 32));
    for (size_t i = 0; i < windows; ++i) {
        const size_t upper = window_count(tile, 0, 16 * i), lower = window_count(tile, 8, 16 * i);
        const size_t count = upper > lower ? upper : lower;
        out[start + i] = static_cast<uint8_t>(count);
        if (count != 0) append_window(out, tile, 16 * i, count, nibbles);
    }
}

}  // namespace

void choose_columns(const Tile<int8_t>& tile, size_t row, size_t j, size_t width, size_t count, uint8_t* columns) {
    uint32_t mask = kept_mask(tile, row, j, width);
    size_t kept = count_bits(mask);
    if (kept > count) throw std::invalid_argument("matrix: a window keeps more weights than its layout holds");
    for (; kept < count; ++kept) mask |= mask + 1;
    for (; mask != 0; mask &= mask - 1) *columns++ = static_cast<uint8_t>(__builtin_ctz(mask));
}

size_t window_count(const Tile<int8_t>& tile, size_t row, size_t j) {
    uint32_t most = 0;
    for (size_t r = row; r < row + 8; ++r) most = std::max(most, count_bits(kept_mask(tile, r, j, 16)));
    return round_up(most, 4);
}

void append_windows(std::vector<uint8_t>& out, Layout layout, const Tile<int8_t>& tile) {
    switch (layout) {
        case Layout::i8_2of4: return append_2of4(out, tile, false);
        case Layout::i4_2of4: return append_2of4(out, tile, true);
        case Layout::i8_4of16: return append_4of16(out, tile, false);
        case Layout::i4_4of16: return append_4of16(out, tile, true);
        case Layout::i8_n16: return append_n16(out, tile, false);
        case Layout::i4_n16: return append_n16(out, tile, true);
        default: throw std::invalid_argument("matrix: not an integer layout");
    }
}

}  // namespace paring::kernels

// The bodies of integer panels as lists of vectors (i8_lists and i4_lists, see kernels.h).
#include "tile.h"

namespace paring::kernels {
namespace {

struct Lists {
    const Tile<int8_t>& tile;
    bool nibbles;
    std::vector<uint16_t> counts;
    std::vector<uint8_t> steps, vectors;

    // The windows at column j of 8 rows, which keep no more than `count`.
    void add_window(size_t row, size_t j, size_t count, size_t step) {
        uint8_t chosen[8][16];
        for (size_t r = 0; r < 8; ++r) choose_columns(tile, row + r, j, 16, count, chosen[r]);
        for (size_t first = 0; first < count; first += 4, step = 0) {
            uint8_t columns[32];
            int8_t values[32];
            for (size_t i = 0; i < 32; ++i) {
                columns[i] = chosen[i / 4][first + i % 4];
                values[i] = tile.value[(row + i / 4) * tile.columns + j + columns[i]];
            }
            add(columns, values, static_cast<uint8_t>(step));
        }
    }
    void add(const uint8_t* columns, const int8_t* values, uint8_t step) {
        steps.push_back(step);
        uint8_t packed[48];
        for (size_t i = 0; i < 16; ++i) packed[i] = static_cast<uint8_t>(columns[i] | columns[i + 16] << 4);
        for (size_t i = 0; i < (nibbles ? 16 : 32); ++i)
            packed[16 + i] = static_cast<uint8_t>(nibbles ? (values[i] + 8) | (values[i + 16] + 8) << 4
                                                          : values[i % 16 * 2 + i / 16]);
        append(vectors, packed, nibbles ? 32 : 48);
    }
    void add_half(size_t row, size_t first, size_t last) {
        const size_t before = steps.size();
        size_t skipped = 0;
        for (size_t j = first; j < last; j += 16, ++skipped) {
            const size_t count = window_count(tile, row, j);
            if (count == 0) continue;
            for (; skipped > 255; skipped -= 255) {
                const uint8_t columns[32] = {};
                const int8_t zeros[32] = {};
                add(columns, zeros, 255);
            }
            add_window(row, j, count, skipped);
            skipped = 0;
        }
        counts.push_back(static_cast<uint16_t>(steps.size() - before));
    }
};

template <class T>
void append_padded(std::vector<uint8_t>& out, const std::vector<T>& values) {
    append(out, values.data(), values.size() * sizeof(T));
    out.resize(out.size() + round_up(values.size() * sizeof(T), 32) - values.size() * sizeof(T));
}

}  // namespace

void append_lists(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles) {
    Lists lists{tile, nibbles, {}, {}, {}};
    const size_t span = group == 0 ? tile.columns : static_cast<size_t>(group);
    for (size_t j = 0; j < tile.columns; j += span) {
        const size_t last = j + span < tile.columns ? j + span : tile.columns;
        lists.add_half(0, j, last);
        lists.add_half(8, j, last);
    }
    append_padded(out, lists.counts);
    append_padded(out, lists.steps);
    append(out, lists.vectors.data(), lists.vectors.size());
}

}  // namespace paring::kernels

// The bodies of integer panels as lists of vectors (i8_lists and i4_lists, see kernels.h).
#include "tile.h"

namespace paring::kernels {
namespace {

struct Lists {
    const Tile<int8_t>& tile;
    bool nibbles;
    std::vector<uint16_t> counts;
    std::vector<uint8_t> steps, vectors;

    // Weights [first, first + 4) of each of 8 rows' windows at column j, which keep no more than `count`.
    void add(size_t row, size_t j, size_t first, size_t count, uint8_t step) {
        uint8_t columns[32];
        int8_t values[32];
        for (size_t r = 0; r < 8; ++r) {
            uint8_t chosen[16];
            choose_columns(tile, row + r, j, 16, count, chosen);
            for (size_t i = 0; i < 4; ++i) {
                columns[4 * r + i] = chosen[first + i];
                values[4 * r + i] = tile.value[(row + r) * tile.columns + j + chosen[first + i]];
            }
        }
        add(columns, values, step);
    }
    void add(const uint8_t* columns, const int8_t* values, uint8_t step) {
        steps.push_back(step);
        for (size_t i = 0; i < 16; ++i) vectors.push_back(static_cast<uint8_t>(columns[i] | columns[i + 16] << 4));
        if (nibbles) return append_values(vectors, values, 32, true);
        for (size_t i = 0; i < 32; ++i) vectors.push_back(static_cast<uint8_t>(values[i % 16 * 2 + i / 16]));
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
            for (size_t i = 0; i < count; i += 4, skipped = 0) add(row, j, i, count, static_cast<uint8_t>(skipped));
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

// The bodies of integer panels as lists of vectors (i8_lists, i8_lists4 and theirs of int4, see kernels.h).
#include "tile.h"

namespace paring::kernels {
namespace {

// Vectors of 8 rows x 4 weights. A kind of window says how many columns it has, and has
// size_t count(tile, row, j): vectors that 8 rows need of the window at column j, and
// void add(lists, row, j, count, step): these vectors.
struct Lists {
    const Tile<int8_t>& tile;
    bool nibbles;
    std::vector<uint16_t> counts;
    std::vector<uint8_t> steps, vectors;

    void add(const void* places, size_t bytes, const int8_t* values, size_t step) {
        steps.push_back(static_cast<uint8_t>(step));
        append(vectors, places, bytes);
        for (size_t i = 0; i < (nibbles ? 16 : 32); ++i)
            vectors.push_back(static_cast<uint8_t>(nibbles ? (values[i] + 8) | (values[i + 16] + 8) << 4
                                                           : values[i % 16 * 2 + i / 16]));
    }
    template <class Window>
    void add_half(size_t row, size_t first, size_t last) {
        const size_t before = steps.size();
        size_t skipped = 0;
        for (size_t j = first; j < last; j += Window::kColumns, ++skipped) {
            const size_t count = Window::count(tile, row, j);
            if (count == 0) continue;
            for (; skipped > 255; skipped -= 255) {
                const uint8_t places[Window::kPlaces] = {};
                const int8_t zeros[32] = {};
                add(places, sizeof places, zeros, 255);
            }
            Window::add(*this, row, j, count, skipped);
            skipped = 0;
        }
        counts.push_back(static_cast<uint16_t>(steps.size() - before));
    }
};

// Any 4 of 16 columns.
struct Weights {
    static constexpr size_t kColumns = 16, kPlaces = 16;
    static size_t count(const Tile<int8_t>& tile, size_t row, size_t j) { return window_count(tile, row, j) / 4; }
    static void add(Lists& lists, size_t row, size_t j, size_t count, size_t step) {
        const Tile<int8_t>& tile = lists.tile;
        uint8_t chosen[8][16];
        for (size_t r = 0; r < 8; ++r) choose_columns(tile, row + r, j, 16, 4 * count, chosen[r]);
        for (size_t first = 0; first < 4 * count; first += 4, step = 0) {
            uint8_t columns[32], places[kPlaces];
            int8_t values[32];
            for (size_t i = 0; i < 32; ++i) {
                columns[i] = chosen[i / 4][first + i % 4];
                values[i] = tile.value[(row + i / 4) * tile.columns + j + columns[i]];
            }
            for (size_t i = 0; i < 16; ++i) places[i] = static_cast<uint8_t>(columns[i] | columns[i + 16] << 4);
            lists.add(places, sizeof places, values, step);
        }
    }
};

// One of 8 blocks of 4 columns; the last window may have 4.
struct Blocks {
    static constexpr size_t kColumns = 32, kPlaces = 4;
    static bool kept(const Tile<int8_t>& tile, size_t row, size_t j) {
        const uint8_t* at = &tile.kept[row * tile.columns + j];
        return (at[0] | at[1] | at[2] | at[3]) != 0;
    }
    static size_t width(const Tile<int8_t>& tile, size_t j) { return tile.columns - j < kColumns ? 4 : 8; }
    static size_t count(const Tile<int8_t>& tile, size_t row, size_t j) {
        size_t most = 0;
        for (size_t r = row; r < row + 8; ++r) {
            size_t blocks = 0;
            for (size_t b = 0; b < width(tile, j); ++b) blocks += kept(tile, r, j + 4 * b);
            most = blocks > most ? blocks : most;
        }
        return most;
    }
    static void add(Lists& lists, size_t row, size_t j, size_t count, size_t step) {
        const Tile<int8_t>& tile = lists.tile;
        size_t chosen[8][8];  // the kept blocks, then others, which are zeros
        for (size_t r = 0; r < 8; ++r) {
            size_t found = 0;
            for (const bool wanted : {true, false})
                for (size_t b = 0; b < width(tile, j); ++b)
                    if (kept(tile, row + r, j + 4 * b) == wanted) chosen[r][found++] = b;
        }
        for (size_t v = 0; v < count; ++v, step = 0) {
            uint8_t places[kPlaces] = {};
            int8_t values[32];
            for (size_t r = 0; r < 8; ++r) {
                places[r / 2] = static_cast<uint8_t>(places[r / 2] | chosen[r][v] << (r % 2 * 4));
                std::memcpy(values + 4 * r, &tile.value[(row + r) * tile.columns + j + 4 * chosen[r][v]], 4);
            }
            lists.add(places, sizeof places, values, step);
        }
    }
};

template <class T>
void append_padded(std::vector<uint8_t>& out, const std::vector<T>& values) {
    append(out, values.data(), values.size() * sizeof(T));
    out.resize(out.size() + round_up(values.size() * sizeof(T), 32) - values.size() * sizeof(T));
}

template <class Window>
void append_all(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles) {
    Lists lists{tile, nibbles, {}, {}, {}};
    const size_t span = group == 0 ? tile.columns : static_cast<size_t>(group);
    for (size_t j = 0; j < tile.columns; j += span) {
        const size_t last = j + span < tile.columns ? j + span : tile.columns;
        lists.add_half<Window>(0, j, last);
        lists.add_half<Window>(8, j, last);
    }
    append_padded(out, lists.counts);
    append_padded(out, lists.steps);
    append(out, lists.vectors.data(), lists.vectors.size());
}

}  // namespace

void append_lists(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles) {
    append_all<Weights>(out, tile, group, nibbles);
}

void append_lists4(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles) {
    append_all<Blocks>(out, tile, group, nibbles);
}

}  // namespace paring::kernels

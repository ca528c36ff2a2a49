// The bodies of integer panels.
#include "tile.h"

namespace paring::kernels {
namespace {

void append_i8_dense(std::vector<uint8_t>& out, const Tile<int8_t>& tile) {
    for (size_t j = 0; j < tile.columns; j += 4)
        for (size_t r = 0; r < 16; ++r)
            for (size_t i = 0; i < 4; ++i)
                out.push_back(static_cast<uint8_t>(tile.value[r * tile.columns + j + i] + 128));
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
    Chunks<uint64_t> chunks(out);
    for (size_t j = 0; j < tile.columns; j += 4) {
        const uint64_t mask = block_mask(tile, j);
        chunks.add(mask);
        uint8_t values[64] = {};
        size_t count = 0;
        for (uint64_t left = mask; left != 0; left &= left - 1, ++count) {
            const size_t bit = static_cast<size_t>(__builtin_ctzll(left));
            const int value = tile.value[bit / 4 * tile.columns + j + bit % 4];
            if (nibbles)
                values[count / 2] |= static_cast<uint8_t>((value + 8) << (count % 2 * 4));
            else
                values[count] = static_cast<uint8_t>(value + 128);
        }
        append(out, values, nibbles ? (count + 1) / 2 : count);
    }
}

void append_nibbles(std::vector<uint8_t>& out, const int8_t* w) {
    out.push_back(static_cast<uint8_t>((w[0] + 8) | (w[2] + 8) << 4));
    out.push_back(static_cast<uint8_t>((w[1] + 8) | (w[3] + 8) << 4));
}

// Bit r: whether row r keeps anything of its block at columns j .. j + 3. Then the whole block is stored, zeros too.
void append_block4(std::vector<uint8_t>& out, const Tile<int8_t>& tile, bool nibbles) {
    Chunks<uint16_t> chunks(out);
    for (size_t j = 0; j < tile.columns; j += 4) {
        const uint64_t kept = block_mask(tile, j);
        uint16_t mask = 0;
        for (size_t r = 0; r < 16; ++r)
            if ((kept >> (4 * r) & 15) != 0) mask = static_cast<uint16_t>(mask | 1u << r);
        chunks.add(mask);
        for (size_t r = 0; r < 16; ++r) {
            if ((mask >> r & 1) == 0) continue;
            const int8_t* w = &tile.value[r * tile.columns + j];
            if (nibbles)
                append_nibbles(out, w);
            else
                for (size_t i = 0; i < 4; ++i) out.push_back(static_cast<uint8_t>(w[i] + 128));
        }
    }
}

// The same of two blocks of a row, then of the next row.
void append_words(std::vector<uint8_t>& out, const Tile<int8_t>& tile) {
    Chunks<uint32_t> chunks(out);
    for (size_t j = 0; j < tile.columns; j += 8) {
        const uint64_t kept[2] = {block_mask(tile, j), block_mask(tile, j + 4)};
        uint32_t mask = 0;
        for (size_t i = 0; i < 32; ++i)
            if ((kept[i % 2] >> (i / 2 * 4) & 15) != 0) mask |= 1u << i;
        chunks.add(mask);
        for (size_t i = 0; i < 32; ++i)
            if (mask >> i & 1) append_nibbles(out, &tile.value[i / 2 * tile.columns + j + i % 2 * 4]);
    }
}

}  // namespace

void append_integers(std::vector<uint8_t>& out, Layout layout, const Tile<int8_t>& tile, int32_t group) {
    switch (layout) {
        case Layout::i8_dense: return append_i8_dense(out, tile);
        case Layout::i4_dense: return append_i4_dense(out, tile);
        case Layout::i8_bitmask: return append_bitmask(out, tile, false);
        case Layout::i4_bitmask: return append_bitmask(out, tile, true);
        case Layout::i8_block4: return append_block4(out, tile, false);
        case Layout::i4_block4: return append_block4(out, tile, true);
        case Layout::i4_words: return append_words(out, tile);
        case Layout::i8_pairs: return append_pairs(out, tile, false);
        case Layout::i4_pairs: return append_pairs(out, tile, true);
        case Layout::i8_columns: return append_columns(out, tile, group, false);
        case Layout::i4_columns: return append_columns(out, tile, group, true);
        case Layout::i8_lists: return append_lists(out, tile, group, false);
        case Layout::i4_lists: return append_lists(out, tile, group, true);
        case Layout::i8_lists4: return append_lists4(out, tile, group, false);
        case Layout::i4_lists4: return append_lists4(out, tile, group, true);
        default: return append_windows(out, layout, tile);
    }
}

}  // namespace paring::kernels

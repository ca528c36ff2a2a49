// The bodies of integer panels whose rows share masks.
#include "tile.h"

namespace paring::kernels {

void append_pairs(std::vector<uint8_t>& out, const Tile<int8_t>& tile, bool nibbles) {
    Chunks<uint64_t> chunks(out);
    for (size_t j = 0; j < tile.columns; j += 8) {
        uint64_t mask = 0;
        uint8_t even[64], odd[64];
        size_t count = 0;
        for (size_t i = 0; i < 64; ++i) {
            const size_t at = i / 8 * 2 * tile.columns + j + i % 8;
            if (!(tile.kept[at] | tile.kept[at + tile.columns])) continue;
            mask |= uint64_t{1} << i;
            even[count] = static_cast<uint8_t>(tile.value[at] + (nibbles ? 8 : 128));
            odd[count++] = static_cast<uint8_t>(tile.value[at + tile.columns] + (nibbles ? 8 : 128));
        }
        chunks.add(mask);
        if (nibbles)
            for (size_t i = 0; i < count; ++i) even[i] = static_cast<uint8_t>(even[i] | odd[i] << 4);
        append(out, even, count);
        if (!nibbles) append(out, odd, count);
    }
}

void append_columns(std::vector<uint8_t>& out, const Tile<int8_t>& tile, int32_t group, bool nibbles) {
    const size_t start = out.size(), span = group == 0 ? tile.columns : static_cast<size_t>(group);
    out.resize(start + round_up((tile.columns + 31) / 32 * 4, kAlignment));
    for (size_t first = 0; first < tile.columns; first += span) {
        std::vector<size_t> kept;
        for (size_t j = first; j < first + span && j < tile.columns; ++j) {
            uint8_t any = 0;
            for (size_t r = 0; r < 16; ++r) any |= tile.kept[r * tile.columns + j];
            if (!any) continue;
            kept.push_back(j);
            out[start + j / 8] |= static_cast<uint8_t>(1u << (j % 8));
        }
        const auto value = [&](size_t r, size_t i) {
            return i < kept.size() ? tile.value[r * tile.columns + kept[i]] : 0;
        };
        for (size_t j = 0; j < kept.size(); j += nibbles ? 8 : 4)
            for (size_t i = 0; i < 64; ++i) {
                const int low = value(i / 4, j + i % 4), high = nibbles ? value(i / 4, j + 4 + i % 4) : 0;
                out.push_back(static_cast<uint8_t>(nibbles ? (low + 8) | (high + 8) << 4 : low + 128));
            }
    }
}

}  // namespace paring::kernels

// Panels whose windows keep a fixed number of weights -> weights, plainly (see Layout in kernels.h).
#include <cstring>

#include "packed.h"

namespace paring::kernels {
namespace {

// Weight i of `count` stored as bytes, or as nibbles whose high ones are the second half.
int value_at(const uint8_t* values, size_t i, size_t count, bool nibbles) {
    if (!nibbles) return values[i] - 128;
    return i < count / 2 ? (values[i] & 15) - 8 : (values[i - count / 2] >> 4) - 8;
}

size_t value_bytes(size_t count, bool nibbles) { return nibbles ? count / 2 : count; }

void decode_2of4(const uint8_t* at, size_t columns, bool nibbles, int8_t* weights) {
    for (size_t j = 0; j < columns; j += 32) {
        const uint8_t* places = at;
        at += 64;
        for (size_t v = 0; v < (columns - j < 32 ? 2 : 4); ++v) {
            for (size_t i = 0; i < 64; ++i) {
                const size_t column = j + 8 * v + i % 4 / 2 * 4 + (places[i] >> (2 * v) & 3);
                const int value = value_at(at, nibbles ? v % 2 * 64 + i : i, 128, nibbles);
                weights[i / 4 * columns + column] = static_cast<int8_t>(value);
            }
            if (!nibbles || v % 2 == 1) at += 64;
        }
    }
}

void decode_4of16(const uint8_t* at, size_t columns, bool nibbles, int8_t* weights) {
    for (size_t j = 0; j < columns; j += 16) {
        for (size_t i = 0; i < 64; ++i) {
            const size_t column = at[i % 32] >> (i / 32 * 4) & 15;
            weights[i / 4 * columns + j + column] = static_cast<int8_t>(value_at(at + 32, i, 64, nibbles));
        }
        at += 32 + value_bytes(64, nibbles);
    }
}

void decode_n16(const uint8_t* at, size_t columns, bool nibbles, int8_t* weights) {
    const uint8_t* counts = at;
    at += round_up(columns / 16, 32);
    for (size_t j = 0; j < columns; j += 16) {
        const size_t count = counts[j / 16];
        uint16_t masks[16];
        std::memset(masks, count == 16 ? 255 : 0, sizeof masks);
        if (count % 16 != 0) {
            std::memcpy(masks, at, sizeof masks);
            at += sizeof masks;
        }
        size_t i = 0;
        for (size_t r = 0; r < 16; ++r)
            for (size_t bit = 0; bit < 16; ++bit)
                if (masks[r] >> bit & 1)
                    weights[r * columns + j + bit] = static_cast<int8_t>(value_at(at, i++, 16 * count, nibbles));
        at += value_bytes(16 * count, nibbles);
    }
}

}  // namespace

void decode_windows(Layout layout, const uint8_t* body, size_t columns, int8_t* weights) {
    std::memset(weights, 0, columns * kPanelRows);
    switch (layout) {
        case Layout::i8_2of4: return decode_2of4(body, columns, false, weights);
        case Layout::i4_2of4: return decode_2of4(body, columns, true, weights);
        case Layout::i8_4of16: return decode_4of16(body, columns, false, weights);
        case Layout::i4_4of16: return decode_4of16(body, columns, true, weights);
        case Layout::i8_n16: return decode_n16(body, columns, false, weights);
        case Layout::i4_n16: return decode_n16(body, columns, true, weights);
        default: return;  // no layout of windows
    }
}

}  // namespace paring::kernels

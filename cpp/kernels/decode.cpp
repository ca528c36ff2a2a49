// Packed panels -> weights, plainly: the reference multiplies what these return, and tests compare it with the source.
#include <cstring>

#include "packed.h"

namespace paring::kernels {
namespace {

void decode_i8_dense(const uint8_t* body, size_t columns, int8_t* weights) {
    for (size_t i = 0; i < columns * 16; ++i) {
        const size_t column = i / 64 * 4 + i % 4, row = i % 64 / 4;
        weights[row * columns + column] = static_cast<int8_t>(body[i] - 128);
    }
}

void decode_i4_dense(const uint8_t* body, size_t columns, int8_t* weights) {
    for (size_t i = 0; i < columns * 8; ++i) {
        const size_t column = i / 64 * 8 + i % 4, row = i % 64 / 4;
        weights[row * columns + column] = static_cast<int8_t>((body[i] & 15) - 8);
        weights[row * columns + column + 4] = static_cast<int8_t>((body[i] >> 4) - 8);
    }
}

void decode_bitmask(const uint8_t* body, size_t columns, bool nibbles, int8_t* weights) {
    const uint8_t* values = body + round_up(columns * 2, kAlignment);
    for (size_t j = 0; j < columns; j += 4) {
        uint64_t mask;
        std::memcpy(&mask, body + j * 2, 8);
        size_t count = 0;
        for (size_t bit = 0; bit < 64; ++bit) {
            int weight = 0;
            if (mask >> bit & 1) {
                weight = nibbles ? (values[count / 2] >> (count % 2 * 4) & 15) - 8 : values[count] - 128;
                ++count;
            }
            weights[bit / 4 * columns + j + bit % 4] = static_cast<int8_t>(weight);
        }
        values += nibbles ? (count + 1) / 2 : count;
    }
}

void decode_block4(const uint8_t* body, size_t columns, bool nibbles, int8_t* weights) {
    const uint8_t* values = body + round_up(columns / 2, kAlignment);
    for (size_t j = 0; j < columns; j += 4)
        for (size_t r = 0; r < 16; ++r) {
            int8_t* to = weights + r * columns + j;
            const bool kept = body[j / 2 + r / 8] >> (r % 8) & 1;
            for (size_t i = 0; i < 4; ++i) {
                const int weight = nibbles ? (values[i % 2] >> (i / 2 * 4) & 15) - 8 : values[i] - 128;
                to[i] = static_cast<int8_t>(kept ? weight : 0);
            }
            if (kept) values += nibbles ? 2 : 4;
        }
}

}  // namespace

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
        return sign ? -magnitude : magnitude;
    }
    // A NaN becomes quiet, as the instructions make it.
    const uint32_t quiet = exponent == 31 && mantissa != 0 ? 1u << 22 : 0;
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13 | quiet;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void decode_integers(const PackedMatrix& w, int32_t panel, int8_t* weights) {
    const uint8_t* body = w.data + w.offset[panel] + header_bytes(w);
    const size_t columns = round_up(static_cast<size_t>(w.k), kStep);
    switch (w.layout) {
        case Layout::i8_dense: return decode_i8_dense(body, columns, weights);
        case Layout::i4_dense: return decode_i4_dense(body, columns, weights);
        case Layout::i8_bitmask: return decode_bitmask(body, columns, false, weights);
        case Layout::i4_bitmask: return decode_bitmask(body, columns, true, weights);
        case Layout::i8_block4: return decode_block4(body, columns, false, weights);
        case Layout::i4_block4: return decode_block4(body, columns, true, weights);
        default: return;  // float layouts: decode_floats
    }
}

void decode_floats(const PackedMatrix& w, int32_t panel, float* weights) {
    const uint8_t* body = w.data + w.offset[panel];
    const size_t k = static_cast<size_t>(w.k);
    const uint8_t* kept = body + round_up(k * 2, kAlignment);
    for (size_t i = 0; i < k * 16; ++i) {
        const size_t column = i / 16, row = i % 16;
        float weight = 0;
        if (w.layout == Layout::f32_dense) {
            std::memcpy(&weight, body + i * 4, 4);
        } else if (w.layout == Layout::f16_dense) {
            uint16_t half;
            std::memcpy(&half, body + i * 2, 2);
            weight = half_to_float(half);
        } else if (body[column * 2 + row / 8] >> (row % 8) & 1) {
            std::memcpy(&weight, kept, 4);
            kept += 4;
        }
        weights[row * k + column] = weight;
    }
}

}  // namespace paring::kernels

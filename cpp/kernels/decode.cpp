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

// Reads masks from the head of each chunk, and hands out where its values go on.
template <class Mask>
struct ChunkReader {
    const uint8_t* at;  // the values not read yet
    const uint8_t* masks = nullptr;
    size_t used = 64;
    Mask next() {
        if (used == 64) {
            masks = at;
            at += 64;
            used = 0;
        }
        Mask mask;
        std::memcpy(&mask, masks + used, sizeof mask);
        used += sizeof mask;
        return mask;
    }
};

void decode_bitmask(const uint8_t* body, size_t columns, bool nibbles, int8_t* weights) {
    ChunkReader<uint64_t> chunks{body};
    for (size_t j = 0; j < columns; j += 4) {
        const uint64_t mask = chunks.next();
        size_t count = 0;
        for (size_t bit = 0; bit < 64; ++bit) {
            int weight = 0;
            if (mask >> bit & 1) {
                weight = nibbles ? (chunks.at[count / 2] >> (count % 2 * 4) & 15) - 8 : chunks.at[count] - 128;
                ++count;
            }
            weights[bit / 4 * columns + j + bit % 4] = static_cast<int8_t>(weight);
        }
        chunks.at += nibbles ? (count + 1) / 2 : count;
    }
}

void decode_block4(const uint8_t* body, size_t columns, bool nibbles, int8_t* weights) {
    ChunkReader<uint16_t> chunks{body};
    for (size_t j = 0; j < columns; j += 4) {
        const uint16_t mask = chunks.next();
        for (size_t r = 0; r < 16; ++r) {
            int8_t* to = weights + r * columns + j;
            const bool kept = mask >> r & 1;
            for (size_t i = 0; i < 4; ++i) {
                const int weight = nibbles ? (chunks.at[i % 2] >> (i / 2 * 4) & 15) - 8 : chunks.at[i] - 128;
                to[i] = static_cast<int8_t>(kept ? weight : 0);
            }
            if (kept) chunks.at += nibbles ? 2 : 4;
        }
    }
}

void decode_words(const uint8_t* body, size_t columns, int8_t* weights) {
    ChunkReader<uint32_t> chunks{body};
    for (size_t j = 0; j < columns; j += 8) {
        const uint32_t mask = chunks.next();
        for (size_t block = 0; block < 32; ++block) {
            int8_t* to = weights + block / 2 * columns + j + block % 2 * 4;
            const bool kept = mask >> block & 1;
            for (size_t i = 0; i < 4; ++i)
                to[i] = static_cast<int8_t>(kept ? (chunks.at[i % 2] >> (i / 2 * 4) & 15) - 8 : 0);
            if (kept) chunks.at += 2;
        }
    }
}

void decode_pairs(const uint8_t* body, size_t columns, bool nibbles, int8_t* weights) {
    ChunkReader<uint64_t> chunks{body};
    for (size_t j = 0; j < columns; j += 8) {
        const uint64_t mask = chunks.next();
        const auto kept = static_cast<size_t>(__builtin_popcountll(mask));
        size_t count = 0;
        for (size_t i = 0; i < 64; ++i) {
            int even = 0, odd = 0;
            if (mask >> i & 1) {
                even = nibbles ? (chunks.at[count] & 15) - 8 : chunks.at[count] - 128;
                odd = nibbles ? (chunks.at[count] >> 4) - 8 : chunks.at[kept + count] - 128;
                ++count;
            }
            int8_t* to = weights + i / 8 * 2 * columns + j + i % 8;
            to[0] = static_cast<int8_t>(even);
            to[columns] = static_cast<int8_t>(odd);
        }
        chunks.at += nibbles ? kept : 2 * kept;
    }
}

void decode_columns(const uint8_t* masks, size_t columns, int32_t group, bool nibbles, int8_t* weights) {
    const uint8_t* blocks = masks + round_up((columns + 31) / 32 * 4, kAlignment);
    const size_t span = group == 0 ? columns : static_cast<size_t>(group), step = nibbles ? 8 : 4;
    std::memset(weights, 0, columns * 16);
    for (size_t first = 0; first < columns; first += span) {
        size_t count = 0;
        for (size_t j = first; j < first + span && j < columns; ++j) {
            if (!(masks[j / 8] >> (j % 8) & 1)) continue;
            for (size_t r = 0; r < 16; ++r) {
                const uint8_t byte = blocks[count / step * 64 + 4 * r + count % 4];
                const int nibble = count % step < 4 ? byte & 15 : byte >> 4;
                weights[r * columns + j] = static_cast<int8_t>(nibbles ? nibble - 8 : byte - 128);
            }
            ++count;
        }
        blocks += (count + step - 1) / step * 64;
    }
}

// `blocks`: of 1x4.
void decode_lists(const uint8_t* counts, size_t columns, int32_t group, bool blocks, bool nibbles, int8_t* weights) {
    const size_t span = group == 0 ? columns : static_cast<size_t>(group), halves = 2 * ((columns + span - 1) / span);
    const auto count = [&](size_t half) { return size_t{counts[2 * half]} | size_t{counts[2 * half + 1]} << 8; };
    size_t vectors = 0;
    for (size_t half = 0; half < halves; ++half) vectors += count(half);
    const uint8_t* steps = counts + round_up(2 * halves, 32);
    const uint8_t* at = steps + round_up(vectors, 32);
    std::memset(weights, 0, columns * 16);
    for (size_t half = 0; half < halves; ++half) {
        size_t j = half / 2 * span;
        for (size_t v = 0; v < count(half); ++v) {
            j += size_t{blocks ? 32U : 16U} * *steps++;
            for (size_t i = 0; i < 32; ++i) {
                const size_t block = at[i / 8] >> (i / 4 % 2 * 4) & 15, place = at[i % 16] >> (i / 16 * 4) & 15;
                const size_t column = j + (blocks ? 4 * block + i % 4 : place), row = half % 2 * 8 + i / 4;
                const uint8_t* value = at + (blocks ? 4 : 16);
                const int weight = nibbles ? (value[i % 16] >> (i / 16 * 4) & 15) - 8
                                           : static_cast<int8_t>(value[i / 2 + i % 2 * 16]);
                // An empty vector's zeros meet columns that others may have filled.
                if (weight != 0) weights[row * columns + column] = static_cast<int8_t>(weight);
            }
            at += (blocks ? 4 : 16) + (nibbles ? 16 : 32);
        }
    }
}

void decode_f32_bitmask(const uint8_t* body, size_t k, float* weights) {
    ChunkReader<uint16_t> chunks{body};
    for (size_t j = 0; j < k; ++j) {
        const uint16_t mask = chunks.next();
        for (size_t r = 0; r < 16; ++r) {
            weights[r * k + j] = 0;
            if (!(mask >> r & 1)) continue;
            std::memcpy(&weights[r * k + j], chunks.at, 4);
            chunks.at += 4;
        }
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

bool exact_half(float value, uint16_t& half) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return false;  // 65536
    const uint32_t below = magnitude >= 0x38800000  // the smallest normal half, 2^-14
                               ? (magnitude - 0x38000000) >> 13
                               : static_cast<uint32_t>((bits >> 31 ? -value : value) * 0x1p24F);
    half = static_cast<uint16_t>((bits >> 31) << 15 | below);
    const float back = half_to_float(half);
    return std::memcmp(&back, &value, 4) == 0;
}

void decode_integers(const PackedMatrix& w, int32_t panel, int8_t* weights) {
    const uint8_t* body = w.data + w.offset[panel] + w.header;
    const size_t columns = round_up(static_cast<size_t>(w.k), kStep);
    switch (w.layout) {
        case Layout::i8_dense: return decode_i8_dense(body, columns, weights);
        case Layout::i4_dense: return decode_i4_dense(body, columns, weights);
        case Layout::i8_bitmask: return decode_bitmask(body, columns, false, weights);
        case Layout::i4_bitmask: return decode_bitmask(body, columns, true, weights);
        case Layout::i8_block4: return decode_block4(body, columns, false, weights);
        case Layout::i4_block4: return decode_block4(body, columns, true, weights);
        case Layout::i4_words: return decode_words(body, columns, weights);
        case Layout::i8_pairs: return decode_pairs(body, columns, false, weights);
        case Layout::i4_pairs: return decode_pairs(body, columns, true, weights);
        case Layout::i8_columns: return decode_columns(body, columns, w.group, false, weights);
        case Layout::i4_columns: return decode_columns(body, columns, w.group, true, weights);
        case Layout::i8_lists: return decode_lists(body, columns, w.group, false, false, weights);
        case Layout::i4_lists: return decode_lists(body, columns, w.group, false, true, weights);
        case Layout::i8_lists4: return decode_lists(body, columns, w.group, true, false, weights);
        case Layout::i4_lists4: return decode_lists(body, columns, w.group, true, true, weights);
        default: return decode_windows(w.layout, body, columns, weights);
    }
}

void decode_floats(const PackedMatrix& w, int32_t panel, float* weights) {
    const uint8_t* body = w.data + w.offset[panel];
    const size_t k = static_cast<size_t>(w.k);
    if (w.layout == Layout::f32_bitmask) return decode_f32_bitmask(body, k, weights);
    for (size_t i = 0; i < k * 16; ++i) {
        float& weight = weights[i % 16 * k + i / 16];
        if (w.layout == Layout::f32_dense) {
            std::memcpy(&weight, body + i * 4, 4);
        } else {
            uint16_t half;
            std::memcpy(&half, body + i * 2, 2);
            weight = half_to_float(half);
        }
    }
}

}  // namespace paring::kernels

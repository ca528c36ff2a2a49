// Bitmask and 1x4 block int8 and int4 with AVX2: pieces of 8 places through a shuffle table.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"

// 16 places from the kept bytes at `from` (values + bias); moves `from` past what it used. Pruned places are 0.
__m128i place(const uint8_t*& from, uint32_t mask, __m128i bias) {
    const uint32_t first = mask & 255, second = mask >> 8;
    const uint8_t* middle = from + _mm_popcnt_u32(first);
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(middle));
    const __m128i control_low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.low[first]));
    const __m128i control_high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.high[second]));
    from = middle + _mm_popcnt_u32(second);
    const __m128i values = _mm_sub_epi8(_mm_unpacklo_epi64(low, high), bias);
    return _mm_shuffle_epi8(values, _mm_unpacklo_epi64(control_low, control_high));
}

struct MaskedBytes {
    Chunks<uint64_t> chunks;
    MaskedBytes(const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m128i piece[4]) {
        const uint64_t mask = chunks.next();
        const __m128i bias = _mm_set1_epi8(static_cast<char>(128));
        for (int i = 0; i < 4; ++i) piece[i] = place(chunks.at, mask >> (16 * i) & 0xffff, bias);
    }
};

struct MaskedNibbles {
    Chunks<uint64_t> chunks;
    MaskedNibbles(const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m128i piece[4]) {
        const uint64_t mask = chunks.next();
        alignas(32) uint8_t nibbles[64 + 16];
        for (int i = 0; i < 4; ++i) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(chunks.at + 8 * i));
            const __m128i both = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
            _mm_store_si128(reinterpret_cast<__m128i*>(nibbles + 16 * i), _mm_and_si128(both, _mm_set1_epi8(15)));
        }
        const uint8_t* from = nibbles;
        for (int i = 0; i < 4; ++i) piece[i] = place(from, mask >> (16 * i) & 0xffff, _mm_set1_epi8(8));
        chunks.at += (_mm_popcnt_u64(mask) + 1) / 2;
    }
};

// 8 blocks of 4 bytes from the kept ones in `from`; pruned blocks are 0.
__m256i place_blocks(__m256i from, uint32_t kept) {
    const __m128i control = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.low[kept]));
    const __m256i index = _mm256_cvtepi8_epi32(control);  // negative where nothing is kept
    return _mm256_andnot_si256(_mm256_srai_epi32(index, 31), _mm256_permutevar8x32_epi32(from, index));
}

void split(__m256i half, __m128i* piece) {
    piece[0] = _mm256_castsi256_si128(half);
    piece[1] = _mm256_extracti128_si256(half, 1);
}

struct Blocks8 {
    Chunks<uint16_t> chunks;
    Blocks8(const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m128i piece[4]) {
        const uint32_t mask = chunks.next();
        for (int half = 0; half < 2; ++half) {
            const uint32_t kept = mask >> (8 * half) & 255;
            const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunks.at));
            const __m256i bias = _mm256_set1_epi8(static_cast<char>(128));
            split(place_blocks(_mm256_xor_si256(values, bias), kept), piece + 2 * half);
            chunks.at += 4 * _mm_popcnt_u32(kept);
        }
    }
};

struct Blocks4 {
    Chunks<uint16_t> chunks;
    Blocks4(const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m128i piece[4]) {
        const uint32_t mask = chunks.next();
        for (int half = 0; half < 2; ++half) {
            const uint32_t kept = mask >> (8 * half) & 255;
            const __m256i words = _mm256_cvtepu16_epi32(load(chunks.at));
            // Bytes 0, 1 hold columns 0, 1 low and 2, 3 high: bytes 2, 3 take the high nibbles.
            const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0x0f0f));
            const __m256i high = _mm256_and_si256(_mm256_slli_epi32(words, 12), _mm256_set1_epi32(0x0f0f0000));
            const __m256i values = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(8));
            split(place_blocks(values, kept), piece + 2 * half);
            chunks.at += 2 * _mm_popcnt_u32(kept);
        }
    }
};

}  // namespace

PARING_RUN(run_i8_bitmask_avx2) { run<MaskedBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_bitmask_avx2) { run<MaskedNibbles>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_block4_avx2) { run<Blocks8>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_block4_avx2) { run<Blocks4>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

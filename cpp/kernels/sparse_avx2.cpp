// Bitmask and 1x4 block int8 and int4 with AVX2: pieces of 8 places through a shuffle table.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "many_avx2.inc"
#include "place_avx2.inc"

struct MaskedBytes {
    Chunks<uint64_t> chunks;
    MaskedBytes(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m128i piece[4]) {
        const uint64_t mask = chunks.next();
        const __m128i bias = _mm_set1_epi8(static_cast<char>(128));
        for (int i = 0; i < 4; ++i) piece[i] = place(chunks.at, mask >> (16 * i) & 0xffff, bias);
    }
};

struct MaskedNibbles {
    Chunks<uint64_t> chunks;
    MaskedNibbles(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m128i piece[4]) {
        const uint64_t mask = chunks.next();
        alignas(32) uint8_t nibbles[64 + 16];
        for (int i = 0; i < 2; ++i) {  // wide stores: loads across two of them wait
            const __m256i bytes = _mm256_cvtepu8_epi16(load(chunks.at + 16 * i));
            const __m256i both = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
            const __m256i low = _mm256_and_si256(both, _mm256_set1_epi8(15));
            _mm256_store_si256(reinterpret_cast<__m256i*>(nibbles + 32 * i), low);
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
    Blocks8(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
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
    Blocks4(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
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

PARING_RUN(run_i8_bitmask_avx2) { run<false, MaskedBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_bitmask_avx2) { run<true, MaskedNibbles>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_block4_avx2) { run<false, Blocks8>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_block4_avx2) { run<true, Blocks4>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

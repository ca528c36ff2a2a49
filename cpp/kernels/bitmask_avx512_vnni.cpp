// Bitmask int8 and int4 with AVX-512 VNNI on CPUs without vpexpandb: 8-byte pieces through a shuffle table.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx512.inc"

// 16 places from the kept bytes at `from`; moves `from` past what it used. Garbage where nothing is kept.
inline __m128i place(const uint8_t*& from, uint32_t mask) {
    const uint32_t first = mask & 255, second = mask >> 8;
    const uint8_t* middle = from + _mm_popcnt_u32(first);
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(middle));
    const __m128i control_low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.low[first]));
    const __m128i control_high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.high[second]));
    from = middle + _mm_popcnt_u32(second);
    return _mm_shuffle_epi8(_mm_unpacklo_epi64(low, high), _mm_unpacklo_epi64(control_low, control_high));
}

inline __m512i place_block(const uint8_t* from, uint64_t mask, __m512i zero) {
    const __m128i a = place(from, mask & 0xffff), b = place(from, mask >> 16 & 0xffff);
    const __m128i c = place(from, mask >> 32 & 0xffff), d = place(from, mask >> 48);
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    return _mm512_mask_mov_epi8(zero, mask, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

struct MaskedBytes {
    Chunks<uint64_t> chunks;
    static constexpr int kBias = 128;
    MaskedBytes(const uint8_t* body, size_t header) : chunks(body, header) {}
    __m512i block() {
        const uint64_t mask = chunks.next();
        const __m512i w = place_block(chunks.at, mask, _mm512_set1_epi8(static_cast<char>(kBias)));
        chunks.at += _mm_popcnt_u64(mask);
        return w;
    }
    void next(__m512i& a, __m512i& b) {
        a = block();
        b = block();
    }
};

struct MaskedNibbles {
    Chunks<uint64_t> chunks;
    static constexpr int kBias = 8;
    MaskedNibbles(const uint8_t* body, size_t header) : chunks(body, header) {}
    __m512i block() {
        const uint64_t mask = chunks.next();
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunks.at)));
        const __m512i split = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
        alignas(64) uint8_t nibbles[64 + 16];
        _mm512_store_si512(nibbles, _mm512_and_si512(split, _mm512_set1_epi8(15)));
        chunks.at += (_mm_popcnt_u64(mask) + 1) / 2;
        return place_block(nibbles, mask, _mm512_set1_epi8(kBias));
    }
    void next(__m512i& a, __m512i& b) {
        a = block();
        b = block();
    }
};

}  // namespace

PARING_RUN(run_i8_bitmask_avx512_vnni) { run<MaskedBytes>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }
PARING_RUN(run_i4_bitmask_avx512_vnni) { run<MaskedNibbles>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }

}  // namespace paring::kernels

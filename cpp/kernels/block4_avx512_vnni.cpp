// 1x4 blocks of int8 and int4 with AVX-512 VNNI: vpexpandd puts whole blocks in place.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx512.inc"

struct Blocks8 {
    Chunks<uint16_t> chunks;
    static constexpr int kBias = 128;
    Blocks8(const uint8_t* body, size_t header) : chunks(body, header) {}
    __m512i block() {
        const __mmask16 mask = chunks.next();
        const __m512i zero = _mm512_set1_epi8(static_cast<char>(kBias));
        const __m512i w = _mm512_mask_expand_epi32(zero, mask, _mm512_loadu_si512(chunks.at));
        chunks.at += 4 * _mm_popcnt_u32(mask);
        return w;
    }
    void next(__m512i& a, __m512i& b) {
        a = block();
        b = block();
    }
};

struct Blocks4 {
    Chunks<uint16_t> chunks;
    static constexpr int kBias = 8;
    Blocks4(const uint8_t* body, size_t header) : chunks(body, header) {}
    __m512i block() {
        const __mmask16 mask = chunks.next();
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunks.at)));
        const __m512i placed = _mm512_mask_expand_epi32(_mm512_set1_epi32(0x8888), mask, words);
        chunks.at += 2 * _mm_popcnt_u32(mask);
        // Bytes 0, 1 hold columns 0, 1 low and 2, 3 high: bytes 2, 3 take the high nibbles.
        const __m512i upper = _mm512_set1_epi32(0x0f0f0000), high = _mm512_slli_epi32(placed, 12);
        const __m512i both = _mm512_ternarylogic_epi32(upper, high, placed, 0xca);
        return _mm512_and_si512(both, _mm512_set1_epi8(15));
    }
    void next(__m512i& a, __m512i& b) {
        a = block();
        b = block();
    }
};

}  // namespace

PARING_RUN(run_i8_block4_avx512_vnni) { run<Blocks8>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }
PARING_RUN(run_i4_block4_avx512_vnni) { run<Blocks4>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }

}  // namespace paring::kernels

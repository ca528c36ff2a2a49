// Bitmask int8 and int4 with AVX-512 VBMI2: one vpexpandb puts the kept weights of a block in place.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "dot_avx512.inc"
#include "integer_avx512.inc"

// Both read a whole register and expand it: expanding from memory is microcoded on AMD.
struct MaskedBytes {
    Chunks<uint64_t> chunks;
    static constexpr int kBias = 128;
    MaskedBytes(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
    __m512i block() {
        const uint64_t mask = chunks.next();
        const __m512i zero = _mm512_set1_epi8(static_cast<char>(kBias));
        const __m512i w = _mm512_mask_expand_epi8(zero, mask, _mm512_loadu_si512(chunks.at));
        chunks.at += _mm_popcnt_u64(mask);
        return w;
    }
    void next(__m512i& a, __m512i& b) { next_blocks(*this, a, b); }
};

struct MaskedNibbles {
    Chunks<uint64_t> chunks;
    static constexpr int kBias = 8;
    MaskedNibbles(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
    __m512i block() {
        const uint64_t mask = chunks.next();
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunks.at)));
        const __m512i split = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
        const __m512i nibbles = _mm512_and_si512(split, _mm512_set1_epi8(15));
        chunks.at += (_mm_popcnt_u64(mask) + 1) / 2;
        return _mm512_mask_expand_epi8(_mm512_set1_epi8(kBias), mask, nibbles);
    }
    void next(__m512i& a, __m512i& b) { next_blocks(*this, a, b); }
};

}  // namespace

PARING_RUN(run_i8_bitmask_avx512_vbmi2) { run<MaskedBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_bitmask_avx512_vbmi2) {
    run<MaskedNibbles>(w, x, y, ldy, begin, end, scratch);
}

}  // namespace paring::kernels

// Bitmask int8 and int4 with AVX-512 VBMI2: one vpexpandb puts the kept weights of a block in place.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "integer_avx512.inc"

inline uint64_t next_mask(const uint8_t*& masks) {
    uint64_t mask;
    __builtin_memcpy(&mask, masks, 8);
    masks += 8;
    return mask;
}

inline const uint8_t* values_of(const uint8_t* body, int32_t columns) {
    return body + (static_cast<size_t>(columns) * 2 + 63) / 64 * 64;
}

// Both read a whole register and expand it: expanding from memory is microcoded on AMD.
struct MaskedBytes {
    const uint8_t* masks;
    const uint8_t* at;
    static constexpr size_t kAhead = 1024;
    static constexpr int kBias = 128;
    MaskedBytes(const uint8_t* body, int32_t columns) : masks(body), at(values_of(body, columns)) {}
    __m512i block() {
        const uint64_t mask = next_mask(masks);
        const __m512i zero = _mm512_set1_epi8(static_cast<char>(kBias));
        const __m512i w = _mm512_mask_expand_epi8(zero, mask, _mm512_loadu_si512(at));
        at += _mm_popcnt_u64(mask);
        return w;
    }
    void next(__m512i& a, __m512i& b) {
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        a = block();
        b = block();
    }
};

struct MaskedNibbles {
    const uint8_t* masks;
    const uint8_t* at;
    static constexpr size_t kAhead = 1024;
    static constexpr int kBias = 8;
    MaskedNibbles(const uint8_t* body, int32_t columns) : masks(body), at(values_of(body, columns)) {}
    __m512i block() {
        const uint64_t mask = next_mask(masks);
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        const __m512i split = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
        const __m512i nibbles = _mm512_and_si512(split, _mm512_set1_epi8(15));
        at += (_mm_popcnt_u64(mask) + 1) / 2;
        return _mm512_mask_expand_epi8(_mm512_set1_epi8(kBias), mask, nibbles);
    }
    void next(__m512i& a, __m512i& b) {
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        a = block();
        b = block();
    }
};

}  // namespace

PARING_RUN(run_i8_bitmask_avx512_vbmi2) { run<MaskedBytes>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }
PARING_RUN(run_i4_bitmask_avx512_vbmi2) { run<MaskedNibbles>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }

}  // namespace paring::kernels

// Two 16-bit integers in each lane of a native vector: products of bytes, exact in 32 bits.
//
// Included by instruction-set units: everything is static and inlined, nothing is emitted weakly.
#pragma once

#include "ops/lanes.h"

namespace {

typedef int16_t Pairs __attribute__((vector_size(4 * kWidth)));

// 2 * kWidth bytes, widened.
PARING_INLINE Pairs load_pairs(const int8_t* x) {
#if defined(__AVX512F__)
    __m256i bytes;
    memcpy(&bytes, x, sizeof bytes);
    return (Pairs)_mm512_cvtepi8_epi16(bytes);
#elif defined(__AVX2__)
    return (Pairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)x));
#else
    typedef int8_t Bytes __attribute__((vector_size(2 * kWidth)));
    Bytes bytes;
    memcpy(&bytes, x, sizeof bytes);
    return __builtin_convertvector(bytes, Pairs);
#endif
}

// x[0] and x[1] in every lane.
PARING_INLINE Pairs spread_pair(const int16_t* x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
#if defined(__AVX512F__)
    return (Pairs)_mm512_set1_epi32(both);
#elif defined(__AVX2__)
    return (Pairs)_mm256_set1_epi32(both);
#else
    return (Pairs)NativeInts{both, both, both, both};
#endif
}

// sum + a[0] * b[0] + a[1] * b[1] of each lane.
PARING_INLINE NativeInts add_products(const NativeInts& sum, const Pairs& a, const Pairs& b) {
#if defined(__AVX512VNNI__)
    return (NativeInts)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return sum + (NativeInts)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (NativeInts)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const NativeInts x = (NativeInts)a, y = (NativeInts)b;
    return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

}  // namespace

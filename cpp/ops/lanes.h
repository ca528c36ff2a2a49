// Sixteen floats as one value, on the vector extensions of gcc and clang.
//
// Included by instruction-set units: everything is static and inlined, nothing is emitted weakly.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Vectors wider than the baseline's registers are returned by inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

#define PARING_INLINE static inline __attribute__((always_inline))

namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

PARING_INLINE Lanes splat(float value) { return Lanes{} + value; }

PARING_INLINE Lanes load(const float* x) {
    Lanes lanes;
    memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

PARING_INLINE void store(float* y, const Lanes& lanes) { memcpy(y, &lanes, sizeof lanes); }

// The first `count` lanes, the others 0. The loops are short tails.
PARING_INLINE Lanes load_part(const float* x, int64_t count) {
    float full[16] = {};
    for (int64_t i = 0; i < count; ++i) full[i] = x[i];
    return load(full);
}

PARING_INLINE void store_part(float* y, const Lanes& lanes, int64_t count) {
    float full[16];
    store(full, lanes);
    for (int64_t i = 0; i < count; ++i) y[i] = full[i];
}

PARING_INLINE Lanes from_halves(const uint16_t* x) {
#if defined(__AVX512F__)
    __m256i bits;
    memcpy(&bits, x, sizeof bits);
    return (Lanes)_mm512_maskz_cvtph_ps(0xffff, bits);
#elif defined(__F16C__)
    __m128i bits[2];
    memcpy(bits, x, sizeof bits);
    const __m256 wide[2] = {_mm256_cvtph_ps(bits[0]), _mm256_cvtph_ps(bits[1])};
    Lanes lanes;
    memcpy(&lanes, wide, sizeof lanes);
    return lanes;
#else
    // Exponent and fraction as the top of a float 2^112 times too small; subnormals come out right
    // because the multiplication normalizes them. An exponent of 31 (Inf, NaN) is put to 255.
    Halves bits;
    memcpy(&bits, x, sizeof bits);
    const Ints wide = __builtin_convertvector(bits, Ints);
    const Ints magnitude = (wide & 0x7fff) << 13;
    const Lanes scaled = (Lanes)magnitude * splat(0x1p112f);
    const Ints special = magnitude >= (0x7c00 << 13);
    const Ints sign = (wide & 0x8000) << 16;
    const Ints result = special ? (magnitude | 0x7f800000) : (Ints)scaled;
    return (Lanes)(result | sign);
#endif
}

PARING_INLINE Lanes from_bytes(const int8_t* x) {
#if defined(__AVX512F__)
    __m128i bytes;
    memcpy(&bytes, x, sizeof bytes);
    return (Lanes)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
    __m256 wide[2];
    for (int half = 0; half < 2; ++half) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i*)(x + 8 * half));
        wide[half] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    Lanes lanes;
    memcpy(&lanes, wide, sizeof lanes);
    return lanes;
#else
    Bytes bytes;
    memcpy(&bytes, x, sizeof bytes);
    return __builtin_convertvector(bytes, Lanes);
#endif
}

// Round to nearest even, like F16C; a finite value beyond the range becomes its end.
PARING_INLINE uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (bits == 0x7f800000) return (uint16_t)(sign | 0x7c00);  // Inf
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7bff);  // would round to 65536 or more
    if (bits < 0x38800000) {                                   // below 2^-14: subnormal
        float magnitude;
        memcpy(&magnitude, &bits, sizeof magnitude);
        // Adding 0.5 leaves multiples of 2^-24 in the fraction, rounded by the addition itself.
        const float shifted = magnitude + 0.5f;
        uint32_t fraction;
        memcpy(&fraction, &shifted, sizeof fraction);
        return (uint16_t)(sign | (fraction - 0x3f000000));
    }
    const uint32_t odd = (bits >> 13) & 1;
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + odd) >> 13));
}

// A fixed tree, so that every row of the table sums alike.
PARING_INLINE float sum(const Lanes& lanes) {
    float part[16];
    store(part, lanes);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

PARING_INLINE float largest(const Lanes& lanes) {
    float part[16];
    store(part, lanes);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = part[i] < part[i + width] ? part[i + width] : part[i];
    return part[0];
}

// e^x within 2 ulp (Cephes expf); 0 below -87.3, infinite above 88.
PARING_INLINE Lanes exponential(const Lanes& x) {
    const Lanes low = splat(-87.3f), high = splat(88.0f);
    const Lanes bounded = x > high ? high : (x < low ? low : x);
    const Lanes magic = splat(12582912.0f);  // 1.5 * 2^23: the addition rounds to an integer
    const Lanes n = (bounded * splat(1.44269504088896341f) + magic) - magic;
    const Lanes r = (bounded - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    Lanes p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    const Lanes result = p * (Lanes)power;
    return x < low ? splat(0.0f) : (x > high ? splat(__builtin_inff()) : result);
}

PARING_INLINE float exponential_of(float x) {
    float part[16];
    store(part, exponential(splat(x)));
    return part[0];
}

}  // namespace

// Sixteen floats as one value, in as many native vectors as the instruction set needs: a vector type wider than the
// registers would live in memory.
//
// Included by instruction-set units: everything is static and inlined, nothing is emitted weakly.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Vectors wider than the baseline's registers are returned by inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

#define PARING_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = 16 / kWidth;

typedef float Native __attribute__((vector_size(4 * kWidth)));
typedef int32_t NativeInts __attribute__((vector_size(4 * kWidth)));

struct Lanes {
    Native part[kParts];
};
struct Ints {
    NativeInts part[kParts];
};

// The same on every part, written out.
#define PARING_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

// Not a sum with zeros, which compilers must compute for the sake of -0.
PARING_INLINE Native spread(float value) {
#if defined(__AVX512F__)
    return (Native)_mm512_set1_ps(value);
#elif defined(__AVX2__) && defined(__F16C__)
    return (Native)_mm256_set1_ps(value);
#else
    return Native{value, value, value, value};
#endif
}

PARING_INLINE Lanes splat(float value) {
    Lanes lanes;
    PARING_EACH lanes.part[i] = spread(value);
    return lanes;
}

PARING_INLINE Native load_native(const float* x) {
    Native native;
    memcpy(&native, x, sizeof native);
    return native;
}

PARING_INLINE Lanes load(const float* x) {
    Lanes lanes;
    PARING_EACH lanes.part[i] = load_native(x + i * kWidth);
    return lanes;
}

PARING_INLINE void store(float* y, const Lanes& lanes) {
    PARING_EACH memcpy(y + i * kWidth, &lanes.part[i], sizeof(Native));
}

#define PARING_OPERATOR(symbol)                                               \
    PARING_INLINE Lanes operator symbol(const Lanes& a, const Lanes& b) {     \
        Lanes lanes;                                                          \
        PARING_EACH lanes.part[i] = a.part[i] symbol b.part[i];               \
        return lanes;                                                         \
    }                                                                         \
    PARING_INLINE Lanes operator symbol(const Lanes& a, float b) {            \
        Lanes lanes;                                                          \
        PARING_EACH lanes.part[i] = a.part[i] symbol b;                       \
        return lanes;                                                         \
    }
PARING_OPERATOR(+)
PARING_OPERATOR(-)
PARING_OPERATOR(*)
PARING_OPERATOR(/)
#undef PARING_OPERATOR

PARING_INLINE Lanes& operator+=(Lanes& a, const Lanes& b) { return a = a + b; }
PARING_INLINE Lanes& operator*=(Lanes& a, const Lanes& b) { return a = a * b; }

// sum + a * b, rounded once. The portable row calls the C library for it, lane by lane.
PARING_INLINE Native fused(const Native& sum, const Native& a, const Native& b) {
#if defined(__AVX512F__)
    return (Native)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (Native)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (Native)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    Native found;
    for (int i = 0; i < kWidth; ++i) found[i] = __builtin_fmaf(a[i], b[i], sum[i]);
    return found;
#endif
}

PARING_INLINE Lanes operator-(const Lanes& a) {
    Lanes lanes;
    PARING_EACH lanes.part[i] = -a.part[i];
    return lanes;
}

// value where it is greater, else `than`: a NaN in value is passed over.
PARING_INLINE Lanes greater(const Lanes& value, const Lanes& than) {
    Lanes lanes;
    PARING_EACH lanes.part[i] = value.part[i] > than.part[i] ? value.part[i] : than.part[i];
    return lanes;
}

PARING_INLINE Native bounded(const Native& x, float low, float high) {
    const Native least = spread(low), most = spread(high);
    return x > most ? most : (x < least ? least : x);
}

// Within [low, high]; NaN stays.
PARING_INLINE Lanes bounded(const Lanes& x, float low, float high) {
    Lanes lanes;
    PARING_EACH lanes.part[i] = bounded(x.part[i], low, high);
    return lanes;
}

// The larger of `most` and the magnitudes of x as bits: these order like the numbers, NaN above Inf.
PARING_INLINE Ints larger_bits(const Ints& most, const Lanes& x) {
    Ints ints;
    PARING_EACH {
        const NativeInts bits = (NativeInts)x.part[i] & 0x7fffffff;
        ints.part[i] = bits > most.part[i] ? bits : most.part[i];
    }
    return ints;
}

PARING_INLINE int32_t largest(const Ints& ints) {
    int32_t each[16], found = 0;
    PARING_EACH memcpy(each + i * kWidth, &ints.part[i], sizeof(NativeInts));
    for (const int32_t value : each) found = value > found ? value : found;
    return found;
}

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

PARING_INLINE Native from_halves_native(const uint16_t* x) {
#if defined(__AVX512F__)
    __m256i bits;
    memcpy(&bits, x, sizeof bits);
    return (Native)_mm512_maskz_cvtph_ps(0xffff, bits);
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i bits;
    memcpy(&bits, x, sizeof bits);
    return (Native)_mm256_cvtph_ps(bits);
#else
    // Exponent and fraction as the top of a float 2^112 times too small; subnormals come out right
    // because the multiplication normalizes them. An exponent of 31 (Inf, NaN) is put to 255.
    typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
    Halves bits;
    memcpy(&bits, x, sizeof bits);
    const NativeInts wide = __builtin_convertvector(bits, NativeInts);
    const NativeInts magnitude = (wide & 0x7fff) << 13;
    const Native scaled = (Native)magnitude * 0x1p112f;
    const NativeInts special = magnitude >= (0x7c00 << 13);
    const NativeInts sign = (wide & 0x8000) << 16;
    const NativeInts result = special ? (magnitude | 0x7f800000) : (NativeInts)scaled;
    return (Native)(result | sign);
#endif
}

PARING_INLINE Lanes from_halves(const uint16_t* x) {
    Lanes lanes;
    PARING_EACH lanes.part[i] = from_halves_native(x + i * kWidth);
    return lanes;
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

// The lanes joined by a fixed tree, so that every row of the table sums alike: lane i with lane i + 8, and so on.
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
template <class Join>
PARING_INLINE float joined(const Lanes& lanes, const Join& join) {
    Eight eight[2];
    memcpy(eight, &lanes, sizeof eight);
#if defined(__AVX512F__)  // else through memory
    eight[0] = (Eight)_mm512_maskz_extractf32x8_ps(0xff, (__m512)lanes.part[0], 0);
    eight[1] = (Eight)_mm512_maskz_extractf32x8_ps(0xff, (__m512)lanes.part[0], 1);
#endif
    const Eight half = join(eight[0], eight[1]);
    Four four[2];
    memcpy(four, &half, sizeof four);
#if defined(__AVX2__)
    four[0] = (Four)_mm256_castps256_ps128((__m256)half);
    four[1] = (Four)_mm256_extractf128_ps((__m256)half, 1);
#endif
    Four found = join(four[0], four[1]);
    found = join(found, Four{found[2], found[3], found[2], found[3]});
    found = join(found, Four{found[1], found[1], found[1], found[1]});
    return found[0];
}

PARING_INLINE float sum(const Lanes& lanes) {
    return joined(lanes, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a + b; });
}

PARING_INLINE float largest(const Lanes& lanes) {
    return joined(lanes, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a < b ? b : a; });
}

// e^x within 2 ulp (Cephes expf); 0 below -87.3. Above 88 infinite, or where that is not asked for anything.
template <bool above>
PARING_INLINE Native exponential_native(const Native& x) {
    const Native low = spread(-87.3f), high = spread(88.0f);
    const Native magic = spread(12582912.0f);  // 1.5 * 2^23: the addition rounds to an integer
    Native inside = x < low ? low : x;
    if (above) inside = inside > high ? high : inside;
    const Native shifted = fused(magic, inside, spread(1.44269504088896341f)), n = shifted - magic;
    const Native r = fused(fused(inside, n, spread(-0.693359375f)), n, spread(2.12194440e-4f));
    Native p = spread(1.9875691500e-4f);
    p = fused(spread(1.3981999507e-3f), p, r);
    p = fused(spread(8.3334519073e-3f), p, r);
    p = fused(spread(4.1665795894e-2f), p, r);
    p = fused(spread(1.6666665459e-1f), p, r);
    p = fused(spread(5.0000001201e-1f), p, r);
    p = fused(r, p, r * r) + 1.0f;
    const NativeInts power = ((NativeInts)shifted - (0x4b400000 - 127)) << 23;  // magic's bits are 0x4b400000
    const Native found = x < low ? Native{} : p * (Native)power;
    if (!above) return found;
    return x > high ? spread(__builtin_inff()) : found;
}

template <bool above>
PARING_INLINE Lanes exponential_lanes(const Lanes& x) {
    Lanes lanes;
    PARING_EACH lanes.part[i] = exponential_native<above>(x.part[i]);
    return lanes;
}

PARING_INLINE Lanes exponential(const Lanes& x) { return exponential_lanes<true>(x); }

// For x that is not above 0, as a softmax has it.
PARING_INLINE Lanes exponential_below(const Lanes& x) { return exponential_lanes<false>(x); }

PARING_INLINE float exponential_below(float x) { return exponential_native<false>(spread(x))[0]; }

}  // namespace

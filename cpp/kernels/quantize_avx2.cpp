// Quantization of the input with AVX2.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

constexpr int32_t kInfinity = 0x7f800000;

// Lanes 0 .. left - 1 set.
__m256i lanes(int32_t left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

float as_float(int32_t bits) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits))); }

// Bits of the largest |x|. Bits of magnitudes order like the numbers, with Inf and then NaN on top.
int32_t largest_bits(const float* x, int32_t count) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i best = _mm256_setzero_si256();
    for (int32_t j = 0; j < count; j += 8) {
        const __m256i bits = _mm256_maskload_epi32(reinterpret_cast<const int*>(x + j), lanes(count - j));
        best = _mm256_max_epi32(best, _mm256_and_si256(magnitude, bits));
    }
    alignas(32) int32_t each[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), best);
    int32_t bits = 0;
    for (int32_t value : each) bits = value > bits ? value : bits;
    return bits;
}

float choose_scale(const InputSpec& spec, const float* x, int32_t count) {
    const int32_t bits = largest_bits(x, count);
    if (bits >= kInfinity) return as_float(0x7fc00000);
    if (spec.mode == InputMode::int8_static) return spec.scale;
    return as_float(bits) / (spec.mode == InputMode::int16 ? 16256.0F : 127.5F);
}

// 8 int32 in the range of an int8 or int16, narrowed.
__m128i to_words(__m256i q) { return _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)); }

void store_bytes(int8_t* to, __m128i words) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}

// Sum of q over columns [first, last) of one token; last is rounded up to 8, what lies past it becomes 0.
int32_t quantize_span(const Activations& out, const float* x, size_t at, int32_t first, int32_t last, float scale) {
    const bool fine = out.spec.mode == InputMode::int16;
    const __m256 divisor = _mm256_set1_ps(scale);
    const __m256 limit = _mm256_set1_ps(fine ? 32000.0F : 512.0F), lower = _mm256_set1_ps(fine ? -32000.0F : -512.0F);
    const __m256i zero_point = _mm256_set1_epi32(out.spec.zero_point);
    const __m256i top = _mm256_set1_epi32(fine ? 32000 : 127), bottom = _mm256_set1_epi32(fine ? -32000 : -128);
    __m256i sum = _mm256_setzero_si256();
    for (int32_t j = first; j < last; j += 8) {
        const __m256i live = lanes(last - j);
        __m256i q = _mm256_setzero_si256();
        if (scale > 0) {
            const __m256 ratio = _mm256_div_ps(_mm256_maskload_ps(x + j, live), divisor);
            const __m256 inside = _mm256_max_ps(_mm256_min_ps(ratio, limit), lower);
            q = _mm256_add_epi32(_mm256_cvtps_epi32(inside), zero_point);
            q = _mm256_and_si256(live, _mm256_max_epi32(_mm256_min_epi32(q, top), bottom));
        }
        sum = _mm256_add_epi32(sum, q);
        const size_t to = at + static_cast<size_t>(j);
        _mm_store_si128(reinterpret_cast<__m128i*>(out.wide + to), to_words(q));
        __m256i high = q;
        if (fine) {
            high = _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(64)), 7);
            store_bytes(out.lo + to, to_words(_mm256_sub_epi32(q, _mm256_slli_epi32(high, 7))));
        }
        store_bytes(out.hi + to, to_words(high));
    }
    alignas(32) int32_t each[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), sum);
    int32_t total = 0;
    for (int32_t value : each) total += value;
    return total;
}

}  // namespace

void quantize_avx2(const Activations& out, int32_t begin, int32_t end) {
    const bool fine = out.spec.mode == InputMode::int16;
    const int32_t span = out.spec.group == 0 ? out.k : out.spec.group;
    for (int32_t t = begin; t < end; ++t) {
        const float* x = out.x + static_cast<size_t>(t) * out.ldx;
        const size_t at = static_cast<size_t>(t) * out.stride, side = static_cast<size_t>(t) * out.groups;
        float scale = fine ? 0 : choose_scale(out.spec, x, out.k);
        for (int32_t g = 0; g < out.groups; ++g) {
            const int32_t first = g * span, last = out.k - first < span ? out.k : first + span;
            if (fine) scale = choose_scale(out.spec, x + first, last - first);
            out.scale[side + g] = scale;
            out.sum[side + g] = quantize_span(out, x, at, first, last, scale);
        }
    }
}

}  // namespace paring::kernels

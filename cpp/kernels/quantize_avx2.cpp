// Quantization of the input with AVX2.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

// Lanes 0 .. left - 1 set.
__m256i lanes(int32_t left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

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

// 8 int32 in the range of an int8 or int16, narrowed.
__m128i to_words(__m256i q) { return _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)); }

void store_bytes(int8_t* to, __m128i words) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}

// Sum of q over columns [first, last) of one token; last is rounded up to 16, what lies past it becomes 0.
int32_t quantize_span(const Activations& out, size_t t, const float* x, int32_t first, int32_t last, float scale) {
    const bool fine = out.spec.mode == InputMode::int16;
    const __m256 divisor = _mm256_set1_ps(scale);
    const __m256 limit = _mm256_set1_ps(fine ? 16256.0F : 512.0F), lower = _mm256_set1_ps(fine ? -16256.0F : -512.0F);
    const __m256i zero_point = _mm256_set1_epi32(out.spec.zero_point);
    const __m256i top = _mm256_set1_epi32(fine ? 16256 : 127), bottom = _mm256_set1_epi32(fine ? -16256 : -128);
    __m256i sum = _mm256_setzero_si256();
    for (int32_t j = first; j < first + (last - first + 15) / 16 * 16; j += 8) {
        const __m256i live = lanes(last - j);
        __m256i q = _mm256_setzero_si256();
        if (scale > 0) {
            const __m256 ratio = _mm256_div_ps(_mm256_maskload_ps(x + j, live), divisor);
            const __m256 inside = _mm256_max_ps(_mm256_min_ps(ratio, limit), lower);
            q = _mm256_add_epi32(_mm256_cvtps_epi32(inside), zero_point);
            q = _mm256_and_si256(live, _mm256_max_epi32(_mm256_min_epi32(q, top), bottom));
        }
        sum = _mm256_add_epi32(sum, q);
        const size_t to = t * out.stride + static_cast<size_t>(j);
        _mm_store_si128(reinterpret_cast<__m128i*>(out.wide + t * out.wide_stride + j), to_words(q));
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

#include "quantize_tokens.inc"

}  // namespace

void quantize_avx2(const Activations& out, int32_t begin, int32_t end) { quantize_tokens(out, begin, end); }

}  // namespace paring::kernels

// Quantization of the input with AVX-512 (F, BW, DQ, VL).
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

// Lanes 0 .. left - 1 set.
__mmask16 lanes(int32_t left) { return static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1); }

int32_t largest_bits(const float* x, int32_t count) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i best = _mm512_setzero_si512();
    for (int32_t j = 0; j < count; j += 16)
        best = _mm512_max_epi32(best, _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(lanes(count - j), x + j)));
    return _mm512_reduce_max_epi32(best);
}

// Sum of q over columns [first, last) of one token; last is rounded up to 16, what lies past it becomes 0.
int32_t quantize_span(const Activations& out, size_t t, const float* x, int32_t first, int32_t last, float scale) {
    const bool fine = out.spec.mode == InputMode::int16;
    const __m512 divisor = _mm512_set1_ps(scale);
    const __m512 limit = _mm512_set1_ps(fine ? 16256.0F : 512.0F), lower = _mm512_set1_ps(fine ? -16256.0F : -512.0F);
    const __m512i zero_point = _mm512_set1_epi32(out.spec.zero_point);
    const __m512i top = _mm512_set1_epi32(fine ? 16256 : 127), bottom = _mm512_set1_epi32(fine ? -16256 : -128);
    int8_t *hi = out.hi + t * out.stride, *lo = out.lo + t * out.stride;
    __m512i sum = _mm512_setzero_si512();
    for (int32_t j = first; j < last; j += 16) {
        const __mmask16 live = lanes(last - j);
        __m512i q = _mm512_setzero_si512();
        if (scale > 0) {
            const __m512 ratio = _mm512_div_ps(_mm512_maskz_loadu_ps(live, x + j), divisor);
            const __m512 inside = _mm512_max_ps(_mm512_min_ps(ratio, limit), lower);
            q = _mm512_add_epi32(_mm512_cvtps_epi32(inside), zero_point);
            q = _mm512_maskz_max_epi32(live, _mm512_min_epi32(q, top), bottom);
        }
        sum = _mm512_add_epi32(sum, q);
        __m512i high = q;
        if (fine) {
            high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
            const __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 7));
            _mm_store_si128(reinterpret_cast<__m128i*>(lo + j), _mm512_cvtepi32_epi8(low));
        }
        _mm_store_si128(reinterpret_cast<__m128i*>(hi + j), _mm512_cvtepi32_epi8(high));
    }
    return _mm512_reduce_add_epi32(sum);
}

#include "quantize_tokens.inc"

}  // namespace

void quantize_avx512(const Activations& out, int32_t begin, int32_t end) { quantize_tokens(out, begin, end); }

}  // namespace paring::kernels

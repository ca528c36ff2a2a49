// Dense int8 and int4 with AVX2.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "many_avx2.inc"
#include "dense_avx2.inc"
#include "nibbles_avx2.inc"

// Bytes as they stand, w + 128, which unpacking with zeros makes int16: rows 0, 1, 4, 5 of 8 and rows 2, 3, 6, 7, as
// pairwise addition wants them. The bias goes with the sum of the inputs; int32 holds 255 * 128 times 65536 columns,
// and of 15-bit inputs a group.
template <int T>
void bytes_tile(const Place& at, size_t header) {
    const uint8_t* from = view(at.w, at.panel).body;
    const int16_t* q[T];
    const int32_t* input_sums[T];
    for (int t = 0; t < T; ++t) {
        q[t] = at.x.wide + static_cast<size_t>(at.first + t) * at.x.wide_stride;
        input_sums[t] = at.x.sum + static_cast<size_t>(at.first + t) * at.x.side;
    }
    const __m256i zero = _mm256_setzero_si256();
    tile<T>(at, [&](int32_t g, int32_t j, int32_t last, __m256i sums[T][2]) {
        __m256i acc[T][4];
        clear<T>(acc);
        for (; j < last; j += kStep, from += 4 * kStep * 4) {
#pragma GCC unroll 4
            for (int step = 0; step < 4; ++step) {
                prefetch(from + 64 * step + kAhead + header);
                __m256i input[T];
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t) {
                    long long four;
                    __builtin_memcpy(&four, q[t] + j + 4 * step, 8);
                    input[t] = _mm256_set1_epi64x(four);
                }
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const __m256i w = load32(from + 64 * step + 32 * half);
                    const __m256i outer = _mm256_unpacklo_epi8(w, zero), inner = _mm256_unpackhi_epi8(w, zero);
#pragma GCC unroll 2
                    for (int t = 0; t < T; ++t) {
                        __m256i* pairs = acc[t] + 2 * half;
                        pairs[0] = _mm256_add_epi32(pairs[0], _mm256_madd_epi16(outer, input[t]));
                        pairs[1] = _mm256_add_epi32(pairs[1], _mm256_madd_epi16(inner, input[t]));
                    }
                }
            }
        }
        for (int t = 0; t < T; ++t) {
            const __m256i bias = _mm256_set1_epi32(128 * input_sums[t][g]);
            for (int half = 0; half < 2; ++half)
                sums[t][half] = _mm256_sub_epi32(_mm256_hadd_epi32(acc[t][2 * half], acc[t][2 * half + 1]), bias);
        }
    });
}

}  // namespace

PARING_RUN(run_i8_dense_avx2) {
    for (int32_t p = begin; p < end; ++p) {
        const uint8_t* body = view(w, p).body;
        const Place at{w, x, p, 0, y, ldy};
        prefetch_start(body, w.header);
        if (x.m > kTokens)
            run_decoded(DenseBytes(w, body, w.header), at, scratch);
        else
            x.m == 2 ? bytes_tile<2>(at, w.header) : bytes_tile<1>(at, w.header);
    }
}
PARING_RUN(run_i4_dense_avx2) {
    for (int32_t p = begin; p < end; ++p) {
        const uint8_t* body = view(w, p).body;
        const Place at{w, x, p, 0, y, ldy};
        prefetch_start(body, w.header);
        if (x.m <= kTokens)
            nibbles_tokens(PackedNibbles(w, body, w.header), at);
        else
            run_decoded_nibbles(DenseNibbles(w, body, w.header), at, scratch);
    }
}

}  // namespace paring::kernels

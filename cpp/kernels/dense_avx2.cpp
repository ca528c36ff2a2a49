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
    const Activations& x = at.x;
    const PanelView v = view(at.w, at.panel);
    const uint8_t* from = v.body;
    const int16_t* q[T];
    for (int t = 0; t < T; ++t) q[t] = x.wide + static_cast<size_t>(at.first + t) * x.stride;
    const int32_t span = at.w.group == 0 ? x.padded : at.w.group;
    const __m256i zero = _mm256_setzero_si256();
    __m256 value[T][2];
    for (int t = 0; t < T; ++t) value[t][0] = value[t][1] = _mm256_setzero_ps();
    for (int32_t g = 0, j = 0; g < at.w.groups; ++g) {
        const int32_t last = x.padded - j < span ? x.padded : j + span;
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
                        __m256i* sums = acc[t] + 2 * half;
                        sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(outer, input[t]));
                        sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(inner, input[t]));
                    }
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
            const int32_t inputs = x.sum[static_cast<size_t>(at.first + t) * x.groups + static_cast<size_t>(g)];
            const __m256i bias = _mm256_set1_epi32(128 * inputs);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m256i rows = _mm256_sub_epi32(_mm256_hadd_epi32(acc[t][2 * half], acc[t][2 * half + 1]), bias);
                if (at.w.group == 0)
                    finish_channel(at, v, t, half, rows);
                else
                    value[t][half] = add_group(at, v, t, half, g, rows, value[t][half]);
            }
        }
    }
    if (at.w.group == 0) return;
    for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) finish_groups(at, v, t, half, value[t][half]);
}

}  // namespace

PARING_RUN(run_i8_dense_avx2) {
    if (x.m > kTokens) return run<false, DenseBytes>(w, x, y, ldy, begin, end, scratch);
    for (int32_t p = begin; p < end; ++p) {
        const size_t header = static_cast<size_t>(w.scale_groups) * 64 + 64;
        prefetch_start(view(w, p).body, header);
        const Place at{w, x, p, 0, y, ldy};
        x.m == 2 ? bytes_tile<2>(at, header) : bytes_tile<1>(at, header);
    }
}
PARING_RUN(run_i4_dense_avx2) {
    for (int32_t p = begin; p < end; ++p) {
        const size_t header = static_cast<size_t>(w.scale_groups) * 64 + 64;
        const uint8_t* body = view(w, p).body;
        const Place at{w, x, p, 0, y, ldy};
        prefetch_start(body, header);
        if (x.m <= kTokens)
            nibbles_tokens(PackedNibbles(w, body, header), at);
        else
            run_decoded_nibbles(DenseNibbles(w, body, header), at, scratch);
    }
}

}  // namespace paring::kernels

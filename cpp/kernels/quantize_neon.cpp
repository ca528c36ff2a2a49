// Quantization of the input with NEON.
#include <arm_neon.h>

#include "rows.h"

namespace paring::kernels {
namespace {

// x[0 .. left - 1], then zeros.
float32x4_t load_some(const float* x, int32_t left) {
    if (left >= 4) return vld1q_f32(x);
    float each[4] = {};
    for (int32_t i = 0; i < left; ++i) each[i] = x[i];
    return vld1q_f32(each);
}

int32_t largest_bits(const float* x, int32_t count) {
    int32x4_t best = vdupq_n_s32(0);
    for (int32_t j = 0; j < count; j += 4) {
        const int32x4_t bits = vreinterpretq_s32_f32(load_some(x + j, count - j));
        best = vmaxq_s32(best, vandq_s32(bits, vdupq_n_s32(0x7fffffff)));
    }
    return vmaxvq_s32(best);
}

// 4 int32 in the range of an int8.
void store_bytes(int8_t* to, int32x4_t q) {
    const int16x4_t words = vmovn_s32(q);
    vst1_lane_s32(reinterpret_cast<int32_t*>(to), vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
}

// Sum of q over columns [first, last) of one token; last is rounded up to 16, what lies past it becomes 0.
int32_t quantize_span(const Activations& out, size_t t, const float* x, int32_t first, int32_t last, float scale) {
    const bool fine = out.spec.mode == InputMode::int16;
    const float32x4_t divisor = vdupq_n_f32(scale), limit = vdupq_n_f32(fine ? 16256.0F : 512.0F);
    const int32x4_t zero_point = vdupq_n_s32(out.spec.zero_point), lane = {0, 1, 2, 3};
    const int32x4_t top = vdupq_n_s32(fine ? 16256 : 127), bottom = vdupq_n_s32(fine ? -16256 : -128);
    int32x4_t sum = vdupq_n_s32(0);
    for (int32_t j = first; j < first + (last - first + 15) / 16 * 16; j += 4) {
        int32x4_t q = vdupq_n_s32(0);
        if (scale > 0) {
            const float32x4_t ratio = vdivq_f32(load_some(x + j, last - j), divisor);
            const float32x4_t inside = vmaxq_f32(vminq_f32(ratio, limit), vnegq_f32(limit));
            q = vmaxq_s32(vminq_s32(vaddq_s32(vcvtnq_s32_f32(inside), zero_point), top), bottom);
            q = vandq_s32(q, vreinterpretq_s32_u32(vcltq_s32(lane, vdupq_n_s32(last - j))));
        }
        sum = vaddq_s32(sum, q);
        const size_t to = t * out.stride + static_cast<size_t>(j);
        int32x4_t high = q;
        if (fine) {
            high = vshrq_n_s32(vaddq_s32(q, vdupq_n_s32(64)), 7);
            store_bytes(out.lo + to, vsubq_s32(q, vshlq_n_s32(high, 7)));
        }
        store_bytes(out.hi + to, high);
    }
    return vaddvq_s32(sum);
}

#include "quantize_tokens.inc"

}  // namespace

void quantize_neon(const Activations& out, int32_t begin, int32_t end) { quantize_tokens(out, begin, end); }

}  // namespace paring::kernels

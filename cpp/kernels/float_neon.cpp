// Float weights with NEON: 16 rows in four registers, one column after the other.
#include <arm_neon.h>

#include "rows.h"

namespace paring::kernels {
namespace {

constexpr int kTokens = 4;  // tokens that share one reading of the weights
constexpr size_t kAhead = 1024;

struct Dense32 {
    const uint8_t* at;
    explicit Dense32(const uint8_t* body) : at(body) {}
    void next(float32x4_t column[4]) {
        __builtin_prefetch(at + kAhead);
        for (int i = 0; i < 4; ++i) column[i] = vld1q_f32(reinterpret_cast<const float*>(at) + 4 * i);
        at += 64;
    }
};

struct Dense16 {
    const uint8_t* at;
    explicit Dense16(const uint8_t* body) : at(body) {}
    void next(float32x4_t column[4]) {
        __builtin_prefetch(at + kAhead);
        for (int i = 0; i < 4; ++i) {
            const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(at) + 4 * i);
            column[i] = vcvt_f32_f16(vreinterpret_f16_u16(half));
        }
        at += 32;
    }
};

struct Masked32 {
    const uint8_t* at;  // the values not read yet
    const uint8_t* masks = nullptr;
    size_t used = 64;
    explicit Masked32(const uint8_t* body) : at(body) {}
    void next(float32x4_t column[4]) {
        if (used == 64) {
            masks = at;
            at += 64;
            used = 0;
        }
        uint16_t mask;
        __builtin_memcpy(&mask, masks + used, 2);
        used += 2;
        __builtin_prefetch(at + kAhead);
        float rows[16] = {};
        for (uint32_t left = mask; left != 0; left &= left - 1, at += 4)
            __builtin_memcpy(&rows[__builtin_ctz(left)], at, 4);
        for (int i = 0; i < 4; ++i) column[i] = vld1q_f32(rows + 4 * i);
    }
};

void store(float* y, int32_t left, const float32x4_t value[4]) {
    float rows[16];
    for (int i = 0; i < 4; ++i) vst1q_f32(rows + 4 * i, value[i]);
    for (int32_t r = 0; r < 16 && r < left; ++r) y[r] = rows[r];
}

template <class Weights, int T>
void tile(Weights weights, const PackedMatrix& w, const Activations& x, int32_t panel, int32_t first, float* y,
          size_t ldy) {
    float32x4_t value[T][4];
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < 4; ++i) value[t][i] = vdupq_n_f32(0);
    for (int32_t j = 0; j < w.k; ++j) {
        float32x4_t column[4];
        weights.next(column);
        for (int t = 0; t < T; ++t) {
            const float32x4_t input = vdupq_n_f32(x.x[static_cast<size_t>(first + t) * x.ldx + static_cast<size_t>(j)]);
            for (int i = 0; i < 4; ++i) value[t][i] = vfmaq_f32(value[t][i], input, column[i]);
        }
    }
    const int32_t row = panel * kPanelRows;
    for (int t = 0; t < T; ++t) store(y + static_cast<size_t>(first + t) * ldy + row, w.n - row, value[t]);
}

template <class Weights>
void run(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end) {
    for (int32_t p = begin; p < end; ++p) {
        const Weights weights(w.data + w.offset[p]);
        int32_t t = 0;
        for (; t + kTokens <= x.m; t += kTokens) tile<Weights, kTokens>(weights, w, x, p, t, y, ldy);
        for (; t < x.m; ++t) tile<Weights, 1>(weights, w, x, p, t, y, ldy);
    }
}

}  // namespace

PARING_RUN(run_f32_dense_neon) {
    (void)scratch;
    run<Dense32>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_f16_dense_neon) {
    (void)scratch;
    run<Dense16>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_f32_bitmask_neon) {
    (void)scratch;
    run<Masked32>(w, x, y, ldy, begin, end);
}

}  // namespace paring::kernels

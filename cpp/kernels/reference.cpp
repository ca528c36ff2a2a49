// The row every other row is compared with: plain loops over decoded panels, in the order kernels.h fixes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "packed.h"
#include "rows.h"

namespace paring::kernels {
namespace {

// Largest |x|; NaN if any is NaN, Inf if any is Inf.
float largest(const float* x, int32_t count) {
    float amax = 0;
    for (int32_t j = 0; j < count; ++j) {
        if (std::isnan(x[j])) return x[j];
        amax = std::max(amax, std::fabs(x[j]));
    }
    return amax;
}

// The scale of columns [first, last), NaN if one of them is Inf or NaN.
float choose_scale(const InputSpec& spec, const float* x, int32_t first, int32_t last) {
    const float amax = largest(x + first, last - first);
    if (!std::isfinite(amax)) return std::numeric_limits<float>::quiet_NaN();
    if (spec.mode == InputMode::int8_static) return spec.scale;
    return amax / (spec.mode == InputMode::int16 ? 16256.0F : 127.5F);
}

int32_t quantize_one(const InputSpec& spec, float x, float scale) {
    if (!(scale > 0)) return 0;
    // A scale below the normal numbers is rounded so far that the quotient may leave its range.
    if (spec.mode == InputMode::int16)
        return static_cast<int32_t>(std::clamp(std::nearbyint(x / scale), -16256.0F, 16256.0F));
    const float q = std::nearbyint(std::clamp(x / scale, -512.0F, 512.0F));
    return std::clamp(static_cast<int32_t>(q) + spec.zero_point, -128, 127);
}

int32_t dot(const int16_t* x, const int8_t* w, int32_t count) {
    int32_t sum = 0;
    for (int32_t j = 0; j < count; ++j) sum += x[j] * w[j];
    return sum;
}

float integer_output(const PackedMatrix& w, const Activations& x, int32_t panel, int32_t r, int32_t t,
                     const int8_t* row) {
    const uint8_t* data = w.data + w.offset[panel];
    const auto* scale = reinterpret_cast<const float*>(data);
    const auto* halves = reinterpret_cast<const uint16_t*>(data);
    const auto* footer = reinterpret_cast<const float*>(data + w.header - 64);
    const int16_t* q = x.wide + static_cast<size_t>(t) * x.wide_stride;
    const float* scale_x = x.scale + static_cast<size_t>(t) * x.side;
    if (w.group == 0) {
        const int32_t row_sum = reinterpret_cast<const int32_t*>(footer)[r];
        const int32_t acc = dot(q, row, x.padded) - x.spec.zero_point * row_sum;
        return static_cast<float>(acc) * (scale_x[0] * scale[r]);
    }
    float value = 0;
    for (int32_t g = 0; g < w.groups; ++g) {
        const int32_t first = g * w.group, count = std::min(w.group, x.padded - first);
        const float acc = static_cast<float>(dot(q + first, row + first, count));
        const int32_t at = w.scale_groups == 1 ? r : g * 16 + r;
        value = std::fmaf(acc * scale_x[g], w.half_scales ? half_to_float(halves[at]) : scale[at], value);
    }
    if (x.spec.mode == InputMode::int8_static)
        value = std::fmaf(-(static_cast<float>(x.spec.zero_point) * scale_x[0]), footer[r], value);
    return value;
}

float float_output(const Activations& x, int32_t t, const float* row) {
    float value = 0;
    for (int32_t j = 0; j < x.k; ++j) value = std::fmaf(x.x[static_cast<size_t>(t) * x.ldx + j], row[j], value);
    return value;
}

int32_t rows_of(const PackedMatrix& w, int32_t panel) { return std::min(kPanelRows, w.n - panel * kPanelRows); }

}  // namespace

void quantize_reference(const Activations& out, int32_t begin, int32_t end) {
    const bool fine = out.spec.mode == InputMode::int16;
    const int32_t span = out.spec.group == 0 ? out.k : out.spec.group;
    for (int32_t t = begin; t < end; ++t) {
        const float* x = out.x + static_cast<size_t>(t) * out.ldx;
        const size_t at = static_cast<size_t>(t) * out.stride;
        int16_t* wide = out.wide + static_cast<size_t>(t) * out.wide_stride;
        std::memset(out.hi + at, 0, out.plane);
        std::memset(out.lo + at, 0, out.plane);
        std::memset(wide, 0, out.plane * 2);
        for (int32_t g = 0; g < out.groups; ++g) {
            const int32_t first = g * span, last = std::min(out.k, first + span);
            const float scale = fine ? choose_scale(out.spec, x, first, last) : choose_scale(out.spec, x, 0, out.k);
            int32_t sum = 0;
            for (int32_t j = first; j < last; ++j) {
                const int32_t q = quantize_one(out.spec, x[j], scale), high = fine ? (q + 64) >> 7 : q;
                wide[j] = static_cast<int16_t>(q);
                out.hi[at + j] = static_cast<int8_t>(high);
                if (fine) out.lo[at + j] = static_cast<int8_t>(q - high * 128);
                sum += q;
            }
            out.scale[static_cast<size_t>(t) * out.side + g] = scale;
            out.sum[static_cast<size_t>(t) * out.side + g] = sum;
        }
    }
}

void run_integers_reference(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin,
                            int32_t end, void* scratch) {
    auto* weights = static_cast<int8_t*>(scratch);
    for (int32_t p = begin; p < end; ++p) {
        decode_integers(w, p, weights);
        for (int32_t r = 0; r < rows_of(w, p); ++r)
            for (int32_t t = 0; t < x.m; ++t)
                y[static_cast<size_t>(t) * ldy + p * kPanelRows + r] =
                    integer_output(w, x, p, r, t, weights + static_cast<size_t>(r) * x.padded);
    }
}

void run_floats_reference(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end,
                          void* scratch) {
    auto* weights = static_cast<float*>(scratch);
    for (int32_t p = begin; p < end; ++p) {
        decode_floats(w, p, weights);
        for (int32_t r = 0; r < rows_of(w, p); ++r)
            for (int32_t t = 0; t < x.m; ++t)
                y[static_cast<size_t>(t) * ldy + p * kPanelRows + r] =
                    float_output(x, t, weights + static_cast<size_t>(r) * x.k);
    }
}

}  // namespace paring::kernels

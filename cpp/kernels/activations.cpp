// Memory of the quantized input.

#include "packed.h"

namespace paring::kernels {
namespace {

size_t plane_bytes(int32_t k) { return round_up(static_cast<size_t>(k), kAlignment); }

size_t group_count(const InputSpec& spec, int32_t k) {
    const auto columns = static_cast<size_t>(k), group = static_cast<size_t>(spec.group);
    return group == 0 ? 1 : (columns + group - 1) / group;
}

}  // namespace

bool same_input(const InputSpec& a, const InputSpec& b) {
    return a.mode == b.mode && a.group == b.group && a.scale == b.scale && a.zero_point == b.zero_point;
}

size_t activation_bytes(const InputSpec& spec, int32_t k) {
    if (spec.mode == InputMode::f32) return 0;
    const size_t bytes = 4 * plane_bytes(k) + round_up(8 * group_count(spec, k), kAlignment);
    // An odd number of lines: the same columns of some tokens then are in different sets of a cache.
    return bytes / kAlignment % 2 == 0 ? bytes + kAlignment : bytes;
}

Activations bind_activations(void* memory, size_t stride, const InputSpec& spec, const float* x, size_t ldx, int32_t m,
                             int32_t k) {
    Activations a{};
    a.spec = spec;
    a.m = m;
    a.k = k;
    a.padded = static_cast<int32_t>(round_up(static_cast<size_t>(k), kStep));
    a.groups = 1;
    a.x = x;
    a.ldx = ldx;
    if (spec.mode == InputMode::f32) return a;
    a.groups = static_cast<int32_t>(group_count(spec, k));
    a.plane = plane_bytes(k);
    a.stride = stride;
    a.wide_stride = stride / sizeof *a.wide;
    a.side = stride / sizeof *a.scale;
    a.hi = static_cast<int8_t*>(memory);
    a.lo = a.hi + a.plane;
    a.wide = reinterpret_cast<int16_t*>(a.lo + a.plane);
    a.scale = reinterpret_cast<float*>(a.lo + 3 * a.plane);
    a.sum = reinterpret_cast<int32_t*>(a.scale + a.groups);
    return a;
}

}  // namespace paring::kernels

// Memory of the quantized input.

#include "packed.h"

namespace paring::kernels {
namespace {

struct Sizes {
    size_t stride, groups, plane, wide, side;
};

Sizes sizes(const InputSpec& spec, int32_t m, int32_t k) {
    const size_t tokens = static_cast<size_t>(m), columns = static_cast<size_t>(k);
    Sizes s;
    s.stride = round_up(columns, kAlignment);
    s.groups = spec.group == 0 ? 1 : (columns + static_cast<size_t>(spec.group) - 1) / static_cast<size_t>(spec.group);
    s.plane = tokens * s.stride + kAlignment;
    s.wide = round_up(tokens * s.stride * 2, kAlignment) + kAlignment;
    s.side = round_up(tokens * s.groups * 4, kAlignment);
    return s;
}

}  // namespace

bool same_input(const InputSpec& a, const InputSpec& b) {
    return a.mode == b.mode && a.group == b.group && a.scale == b.scale && a.zero_point == b.zero_point;
}

size_t activation_bytes(const InputSpec& spec, int32_t m, int32_t k) {
    if (spec.mode == InputMode::f32) return 0;
    const Sizes s = sizes(spec, m, k);
    return 2 * s.plane + s.wide + 2 * s.side;
}

Activations bind_activations(void* memory, const InputSpec& spec, const float* x, size_t ldx, int32_t m, int32_t k) {
    Activations a{};
    a.spec = spec;
    a.m = m;
    a.k = k;
    a.padded = static_cast<int32_t>(round_up(static_cast<size_t>(k), kStep));
    a.groups = 1;
    a.x = x;
    a.ldx = ldx;
    if (spec.mode == InputMode::f32) return a;
    const Sizes s = sizes(spec, m, k);
    a.groups = static_cast<int32_t>(s.groups);
    a.stride = s.stride;
    auto* at = static_cast<uint8_t*>(memory);
    a.hi = reinterpret_cast<int8_t*>(at);
    a.lo = reinterpret_cast<int8_t*>(at + s.plane);
    a.wide = reinterpret_cast<int16_t*>(at + 2 * s.plane);
    a.scale = reinterpret_cast<float*>(at + 2 * s.plane + s.wide);
    a.sum = reinterpret_cast<int32_t*>(at + 2 * s.plane + s.wide + s.side);
    return a;
}

}  // namespace paring::kernels

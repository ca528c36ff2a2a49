// Every kernel row against `reference`, bit for bit, without Python: for machines that are only emulated, and for
// sanitizers. Arguments: the rows that must have run (tests/engine/test_kernels_elsewhere.py).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels/packed.h"

namespace {

using namespace paring;
using namespace paring::kernels;
using Random = std::mt19937;

struct Case {
    int32_t n, k;
    const char* pattern;
    Layout layout;
    InputMode mode;
    int32_t group;
};

DType dtype_of(Layout layout) {
    const std::string name = layout_name(layout);
    return name[0] == 'f' ? (name[1] == '3' ? DType::f32 : DType::f16) : name[1] == '8' ? DType::i8 : DType::i4;
}

bool kept(const std::string& pattern, int32_t r, int32_t j, Random& random) {
    if (pattern == "zero") return false;
    if (pattern == "half" || pattern == "lowest") return random() % 2 == 0;
    if (pattern == "2:4") return j % 4 == r % 4 || j % 4 == (r / 4 + 1 + r) % 4;
    if (pattern == "4:16") return j % 16 / 4 == (r + j / 16) % 4;
    if (pattern == "n:16") return j % 16 < (r / 16 + j / 16) % 5 * 4;
    if (pattern == "pairs") return (r / 2 * 7 + j * 5) % 3 == 0;
    if (pattern == "columns") return j * 7 % 5 < 2;
    if (pattern == "1x4") return (r * 5 + j / 4 * 7) % 11 < 3;
    return true;  // dense
}

// Whether a layout of fixed windows can hold a pattern.
bool fits(const std::string& layout, const std::string& pattern) {
    if (layout.find("2of4") != std::string::npos) return pattern == "2:4" || pattern == "zero";
    if (layout.find("4of16") != std::string::npos) return pattern == "4:16" || pattern == "zero";
    return true;
}

struct Portable {
    std::vector<uint8_t> values, mask;
    std::vector<float> scales;
};

Portable portable(const Case& c, Random& random) {
    Portable p;
    const DType dtype = dtype_of(c.layout);
    const auto k = static_cast<size_t>(c.k);
    p.mask.assign(static_cast<size_t>(c.n) * ((k + 7) / 8), 0);
    for (int32_t r = 0; r < c.n; ++r) {
        size_t nibbles = 0;
        for (int32_t j = 0; j < c.k; ++j) {
            if (dtype != DType::f16 && !kept(c.pattern, r, j, random)) continue;
            const size_t byte = static_cast<size_t>(r) * ((k + 7) / 8) + static_cast<size_t>(j) / 8;
            p.mask[byte] |= static_cast<uint8_t>(1 << (j % 8));
            const uint32_t value = std::strcmp(c.pattern, "lowest") == 0 ? 0x88 : random() >> 8;
            if (dtype == DType::i4) {
                if (nibbles++ % 2 == 0) p.values.push_back(0);
                p.values.back() |= static_cast<uint8_t>((value & 15) << ((nibbles - 1) % 2 * 4));
            } else if (dtype == DType::i8) {
                p.values.push_back(static_cast<uint8_t>(std::strcmp(c.pattern, "lowest") == 0 ? 0x80 : value));
            } else if (dtype == DType::f16) {
                p.values.push_back(static_cast<uint8_t>(value));
                p.values.push_back(static_cast<uint8_t>((value >> 8 & 0x83) | 0x38));
            } else {
                const float number = static_cast<float>(static_cast<int32_t>(value << 8)) * 0x1p-30F;
                const auto* bytes = reinterpret_cast<const uint8_t*>(&number);
                p.values.insert(p.values.end(), bytes, bytes + 4);
            }
        }
    }
    if (c.mode != InputMode::f32) {
        const size_t groups = c.group == 0 ? 1 : (k + static_cast<size_t>(c.group) - 1) / static_cast<size_t>(c.group);
        const float unit = c.n % 2 == 0 ? 0x1p-17F : 1e-5F;  // scales that are exact in f16, and others
        for (size_t i = 0; i < static_cast<size_t>(c.n) * groups; ++i)
            p.scales.push_back(static_cast<float>(random() % 1000 + 1) * unit);
    }
    return p;
}

PackedMatrix packed(const Case& c, const Portable& p) {
    MatrixSource s{};
    s.n = c.n;
    s.k = c.k;
    s.dtype = dtype_of(c.layout);
    s.storage = s.dtype == DType::f16 ? Storage::dense : Storage::bitmask;
    s.group = c.group;
    s.values = p.values.data();
    s.values_bytes = p.values.size();
    if (s.storage == Storage::bitmask) {
        s.mask = p.mask.data();
        s.mask_bytes = p.mask.size();
    }
    s.scales = p.scales.empty() ? nullptr : p.scales.data();
    s.scales_count = p.scales.size();
    s.mode = c.mode;
    if (c.mode == InputMode::int8_static) {
        s.input_scale = 0.03F;
        s.input_zero_point = -7;
    }
    return pack(s, c.layout);
}

using Memory = std::unique_ptr<void, decltype(&std::free)>;

Memory garbage(size_t bytes) {
    Memory memory(std::aligned_alloc(kAlignment, round_up(bytes + 1, kAlignment)), std::free);
    std::memset(memory.get(), 0x5a, round_up(bytes + 1, kAlignment));
    return memory;
}

// The output, then everything quantize wrote.
std::vector<uint8_t> outcome(const KernelRow& row, const PackedMatrix& w, const std::vector<float>& x, int32_t m) {
    const Memory memory = garbage(static_cast<size_t>(m) * activation_bytes(w.input, w.k)), scratch = garbage(run_scratch_bytes(w));
    const auto k = static_cast<size_t>(w.k), n = static_cast<size_t>(w.n), tokens = static_cast<size_t>(m);
    const Activations a = bind_activations(memory.get(), activation_bytes(w.input, w.k), w.input, x.data(), k, m, w.k);
    std::vector<float> y(tokens * n, -1);
    if (w.input.mode != InputMode::f32) row.quantize(a, 0, m);
    for (int32_t part = 0; part < 2; ++part)
        row.run[static_cast<size_t>(w.layout)](w, a, y.data(), n, split_panels(w, part, 2),
                                               split_panels(w, part + 1, 2), scratch.get());
    const auto* bytes = reinterpret_cast<const uint8_t*>(y.data());
    std::vector<uint8_t> out(bytes, bytes + y.size() * 4);
    if (w.input.mode == InputMode::f32) return out;
    for (size_t t = 0; t < tokens; ++t) {
        const auto add = [&](const void* from, size_t count) {
            out.insert(out.end(), static_cast<const uint8_t*>(from), static_cast<const uint8_t*>(from) + count);
        };
        add(a.hi + t * a.stride, static_cast<size_t>(a.padded));
        if (w.input.mode == InputMode::int16) add(a.lo + t * a.stride, static_cast<size_t>(a.padded));
        for (size_t j = 0; j < static_cast<size_t>(a.padded); ++j) {
            const int8_t* hi = a.hi + t * a.stride;
            const auto q = static_cast<int16_t>(w.input.mode == InputMode::int16 ? hi[j] * 128 + a.lo[t * a.stride + j] : hi[j]);
            add(row.wide ? &a.wide[t * a.wide_stride + j] : &q, sizeof q);
        }
    }
    return out;
}

// Compares every row this machine has; returns how many runs differed.
size_t compare(const Case& c, Random& random, std::vector<size_t>& runs) {
    const PackedMatrix w = packed(c, portable(c, random));
    size_t wrong = 0;
    for (const int32_t m : {1, 2, 3, 9, 64}) {
        std::vector<float> x(static_cast<size_t>(m) * static_cast<size_t>(c.k));
        for (float& value : x) value = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-30F;
        if (m == 3) x[0] = std::strtof("nan", nullptr);
        const std::vector<uint8_t> expected = outcome(row_at(0), w, x, m);
        for (size_t i = 1; i < row_count(); ++i) {
            if (!row_supported(row_at(i)) || row_at(i).run[static_cast<size_t>(w.layout)] == nullptr) continue;
            ++runs[i];
            if (outcome(row_at(i), w, x, m) == expected) continue;
            ++wrong;
            std::printf("%s differs: %s %s %d x %d, mode %d, group %d, %d tokens\n", row_at(i).name,
                        layout_name(c.layout), c.pattern, c.n, c.k, static_cast<int>(c.mode), c.group, m);
        }
    }
    return wrong;
}

}  // namespace

int main(int count, char** names) {
    Random random(7);
    std::vector<size_t> runs(row_count());
    size_t wrong = 0;
    const std::vector<std::pair<InputMode, int32_t>> modes = {
        {InputMode::int8_dynamic, 0}, {InputMode::int8_static, 0}, {InputMode::int8_dynamic, 64},
        {InputMode::int8_static, 32}, {InputMode::int16, 0},       {InputMode::int16, 128}};
    const std::vector<std::pair<int32_t, int32_t>> shapes = {{1, 1},   {15, 16}, {16, 15}, {17, 17},  {33, 63},
                                                             {16, 64}, {20, 65}, {63, 40}, {40, 576}, {17, 1536}};
    for (size_t i = 0; i < static_cast<size_t>(Layout::count); ++i)
        for (const char* pattern :
             {"zero", "dense", "lowest", "half", "2:4", "4:16", "n:16", "pairs", "columns", "1x4"}) {
            const auto layout = static_cast<Layout>(i);
            if (!fits(layout_name(layout), pattern)) continue;
            const bool floats = dtype_of(layout) == DType::f32 || dtype_of(layout) == DType::f16;
            for (const auto& [n, k] : shapes) {
                if (floats) wrong += compare({n, k, pattern, layout, InputMode::f32, 0}, random, runs);
                for (const auto& [mode, group] : modes)
                    if (!floats) wrong += compare({n, k, pattern, layout, mode, group}, random, runs);
            }
        }
    for (size_t i = 1; i < row_count(); ++i) std::printf("%s: %zu runs\n", row_at(i).name, runs[i]);
    for (int i = 1; i < count; ++i) {
        bool ran = false;
        for (size_t row = 1; row < row_count(); ++row)
            ran |= names[i] == std::string(row_at(row).name) && runs[row] > 0;
        if (!ran) std::printf("%s did not run\n", names[i]);
        wrong += !ran;
    }
    return wrong == 0 ? 0 : 1;
}

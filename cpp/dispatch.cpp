#include "dispatch.h"

#include <stdexcept>

#include "kernels/rows.h"

namespace paring {
namespace {

using namespace kernels;

constexpr uint32_t kRowAvx2 = kAvx2 | kFma | kF16c;
constexpr uint32_t kRowVnni = kRowAvx2 | kAvx512 | kAvx512Vnni;

// Plainest first; every row names one function per layout, in the order of Layout, then its cycles. A row of an
// instruction set that the compiler could not build is absent (setup.py defines PARING_HAVE_*). The cycles were
// measured on Zen 5 with 512 x 576 matrices in its L2 cache.
constexpr KernelRow kRows[] = {
    {"reference",
     0,
     quantize_reference,
     {run_floats_reference, run_floats_reference, run_floats_reference, run_integers_reference, run_integers_reference,
      run_integers_reference, run_integers_reference, run_integers_reference, run_integers_reference},
     {}},
#if defined(PARING_HAVE_AVX2)
    {"avx2",
     kRowAvx2,
     quantize_avx2,
     {run_f32_dense_avx2, run_f16_dense_avx2, run_f32_bitmask_avx2, run_i8_dense_avx2, run_i4_dense_avx2,
      run_i8_bitmask_avx2, run_i4_bitmask_avx2, run_i8_block4_avx2, run_i4_block4_avx2},
     {15.0F, 15.0F, 17.0F, 4.3F, 6.6F, 12.9F, 33.0F, 7.4F, 11.3F}},
#endif
#if defined(PARING_HAVE_AVX512_VNNI) && defined(PARING_HAVE_AVX512)
    {"avx512_vnni",
     kRowVnni,
     quantize_avx512,
     {run_f32_dense_avx512, run_f16_dense_avx512, run_f32_bitmask_avx512, run_i8_dense_avx512_vnni,
      run_i4_dense_avx512_vnni, run_i8_bitmask_avx512_vnni, run_i4_bitmask_avx512_vnni, run_i8_block4_avx512_vnni,
      run_i4_block4_avx512_vnni},
     {8.5F, 8.0F, 14.0F, 1.7F, 1.6F, 13.8F, 27.0F, 3.3F, 4.2F}},
#if defined(PARING_HAVE_AVX512_VBMI2)
    {"avx512_vbmi2",
     kRowVnni | kAvx512Vbmi2,
     quantize_avx512,
     {run_f32_dense_avx512, run_f16_dense_avx512, run_f32_bitmask_avx512, run_i8_dense_avx512_vnni,
      run_i4_dense_avx512_vnni, run_i8_bitmask_avx512_vbmi2, run_i4_bitmask_avx512_vbmi2, run_i8_block4_avx512_vnni,
      run_i4_block4_avx512_vnni},
     {8.5F, 8.0F, 14.0F, 1.7F, 1.6F, 3.4F, 4.1F, 3.3F, 4.2F}},
#endif
#endif
};

uint32_t detect() {
    uint32_t found = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();  // looks at the operating system's part (XGETBV) too
    const bool avx2 = __builtin_cpu_supports("avx2");
    if (avx2) found |= kAvx2;
    if (avx2 && __builtin_cpu_supports("fma")) found |= kFma;
    if (avx2 && __builtin_cpu_supports("f16c")) found |= kF16c;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) found |= kAvx512;
    if (avx512 && __builtin_cpu_supports("avx512vnni")) found |= kAvx512Vnni;
    if (avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) found |= kAvx512Vbmi2;
#endif
    return found;
}

}  // namespace

uint32_t cpu_features() {
    static const uint32_t features = detect();
    return features;
}

size_t row_count() { return sizeof kRows / sizeof kRows[0]; }

const KernelRow& row_at(size_t index) { return kRows[index]; }

bool row_supported(const KernelRow& row) { return (row.features & ~cpu_features()) == 0; }

const KernelRow& select_row(const std::string& name) {
    std::string names;
    for (size_t i = row_count(); i-- > 0;) {
        const KernelRow& row = kRows[i];
        if (name == row.name && !row_supported(row))
            throw std::invalid_argument("kernels: this CPU can't run row '" + name + "'; use \"auto\"");
        if (name == row.name || (name == "auto" && row_supported(row))) return row;
        names += std::string(names.empty() ? "" : ", ") + row.name;
    }
    throw std::invalid_argument("kernels: no row '" + name + "'; there are auto, " + names);
}

}  // namespace paring

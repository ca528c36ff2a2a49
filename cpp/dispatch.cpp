#include "dispatch.h"

#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels/rows.h"

namespace paring {
namespace {

using namespace kernels;

constexpr uint32_t kRowAvx2 = kAvx2 | kFma | kF16c;
constexpr uint32_t kRowAvx512 = kRowAvx2 | kAvx512;
constexpr uint32_t kRowVnni = kRowAvx512 | kAvx512Vnni;

// Plainest first; every row names one function per layout, in the order of Layout, nullptr where it has none and
// nothing for the last ones, then its cycles. A row of an
// instruction set that the compiler could not build is absent (setup.py defines PARING_HAVE_*). The cycles are
// those measured with 512 x 576 matrices in the L2 cache, `columns` at 70 %, int4 with 8-bit inputs: those of AVX2 on
// Zen 3, which has nothing better, those of VBMI2 on Zen 4, the others on Zen 5.
#define PARING_FLOATS(isa) run_f32_dense_##isa, run_f16_dense_##isa, run_f32_bitmask_##isa
#define PARING_INTEGERS(layout, isa) run_i8_##layout##_##isa, run_i4_##layout##_##isa
#define PARING_REFERENCE run_integers_reference, run_integers_reference

constexpr KernelRow kRows[] = {
    {"reference",
     0,
     true,
     quantize_reference,
     {run_floats_reference, run_floats_reference, run_floats_reference, PARING_REFERENCE, PARING_REFERENCE,
      PARING_REFERENCE, PARING_REFERENCE, PARING_REFERENCE, PARING_REFERENCE, PARING_REFERENCE, PARING_REFERENCE,
      run_integers_reference, PARING_REFERENCE, PARING_REFERENCE},
     {}},
#if defined(PARING_HAVE_AVX2)
    {"avx2",
     kRowAvx2,
     true,
     quantize_avx2,
     {PARING_FLOATS(avx2), PARING_INTEGERS(dense, avx2), PARING_INTEGERS(bitmask, avx2), PARING_INTEGERS(block4, avx2),
      PARING_INTEGERS(2of4, avx2), PARING_INTEGERS(4of16, avx2), PARING_INTEGERS(n16, avx2),
      PARING_INTEGERS(pairs, avx2), PARING_INTEGERS(columns, avx2), nullptr, PARING_INTEGERS(lists, avx2),
      PARING_INTEGERS(lists4, avx2)},
     {15.0F, 14.0F, 40.0F, 3.9F, 3.7F, 18.8F, 24.2F, 15.5F, 17.1F, 5.1F, 4.7F, 2.7F, 2.4F, 17.4F, 15.8F,
      17.5F, 21.1F, 13.4F, 14.7F, 0.0F, 4.7F, 5.5F, 5.5F, 8.5F}},
#endif
#if defined(PARING_HAVE_AVX512)
    {"avx512",
     kRowAvx512,
     false,
     quantize_avx512,
     {PARING_FLOATS(avx512), PARING_INTEGERS(dense, avx512), PARING_INTEGERS(bitmask, avx512),
      PARING_INTEGERS(block4, avx512), PARING_INTEGERS(2of4, avx512), PARING_INTEGERS(4of16, avx512),
      PARING_INTEGERS(n16, avx512), PARING_INTEGERS(pairs, avx512), PARING_INTEGERS(columns, avx512)},
     {8.5F, 8.0F, 14.0F, 2.4F, 1.7F, 9.7F, 13.0F, 3.8F, 4.2F, 2.1F, 1.7F, 1.2F, 1.2F, 9.3F, 8.7F,
      8.6F, 9.5F, 3.3F, 3.9F}},
#endif
#if defined(PARING_HAVE_AVX512_VNNI) && defined(PARING_HAVE_AVX512)
    {"avx512_vnni",
     kRowVnni,
     false,
     quantize_avx512,
     {PARING_FLOATS(avx512), PARING_INTEGERS(dense, avx512_vnni), PARING_INTEGERS(bitmask, avx512_vnni),
      PARING_INTEGERS(block4, avx512_vnni), PARING_INTEGERS(2of4, avx512_vnni), PARING_INTEGERS(4of16, avx512_vnni),
      PARING_INTEGERS(n16, avx512_vnni), PARING_INTEGERS(pairs, avx512_vnni),
      PARING_INTEGERS(columns, avx512_vnni)},
     {8.5F, 8.0F, 14.0F, 1.5F, 1.4F, 7.2F, 12.0F, 2.9F, 3.6F, 0.9F, 1.2F, 0.7F, 1.0F, 6.6F, 7.4F,
      6.1F, 8.5F, 3.2F, 3.7F}},
#if defined(PARING_HAVE_AVX512_VBMI2)
    {"avx512_vbmi2",
     kRowVnni | kAvx512Vbmi2,
     false,
     quantize_avx512,
     {PARING_FLOATS(avx512), PARING_INTEGERS(dense, avx512_vnni), PARING_INTEGERS(bitmask, avx512_vbmi2),
      run_i8_block4_avx512_vnni, nullptr, PARING_INTEGERS(2of4, avx512_vnni), PARING_INTEGERS(4of16, avx512_vnni),
      PARING_INTEGERS(n16, avx512_vbmi2), PARING_INTEGERS(pairs, avx512_vbmi2),
      PARING_INTEGERS(columns, avx512_vbmi2), run_i4_words_avx512_vbmi2},
     {12.5F, 9.5F, 15.0F, 2.6F, 2.3F, 3.8F, 5.2F, 3.8F, 0.0F, 2.0F, 2.5F, 1.4F, 2.0F, 4.5F, 5.0F,
      4.6F, 5.0F, 1.7F, 3.4F, 3.1F}},
#endif
#endif
#if defined(PARING_HAVE_NEON)
#define PARING_NEON(isa) \
    {PARING_FLOATS(neon), PARING_INTEGERS(dense, isa), PARING_INTEGERS(bitmask, isa), PARING_INTEGERS(block4, isa), \
     PARING_INTEGERS(2of4, isa), PARING_INTEGERS(4of16, isa), PARING_INTEGERS(n16, isa), PARING_INTEGERS(pairs, isa), \
     PARING_INTEGERS(columns, isa)}
    // No machine to measure these on: only bytes count.
    {"neon", kNeon, false, quantize_neon, PARING_NEON(neon), {}},
#if defined(PARING_HAVE_NEON_DOTPROD)
    {"neon_dotprod", kNeon | kDotprod, false, quantize_neon, PARING_NEON(neon_dotprod), {}},
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
#elif defined(__aarch64__)
    found |= kNeon;  // part of the architecture
#if defined(__linux__)
    constexpr unsigned long dot_products = 1UL << 20;  // HWCAP_ASIMDDP
    if (getauxval(AT_HWCAP) & dot_products) found |= kDotprod;
#endif
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

const KernelRow& find_row(const std::string& name) {
    std::string names;
    for (size_t i = row_count(); i-- > 0;) {
        const KernelRow& row = kRows[i];
        if (name == row.name || (name == "auto" && row_supported(row))) return row;
        names += std::string(names.empty() ? "" : ", ") + row.name;
    }
    throw std::invalid_argument("kernels: no row '" + name + "'; there are auto, " + names);
}

const KernelRow& select_row(const std::string& name) {
    const KernelRow& row = find_row(name);
    if (!row_supported(row))
        throw std::invalid_argument("kernels: this CPU can't run row '" + name + "'; use \"auto\"");
    return row;
}

}  // namespace paring

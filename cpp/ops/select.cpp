#include "dispatch.h"
#include "ops/ops.h"

namespace paring::ops {

const OpsRow& select_ops(uint32_t features) {
#if defined(PARING_HAVE_AVX512)
    constexpr uint32_t wide = kAvx2 | kFma | kF16c | kAvx512;
#if defined(PARING_HAVE_AVX512_VNNI)
    if ((features & (wide | kAvx512Vnni)) == (wide | kAvx512Vnni)) return avx512_vnni_row;
#endif
    if ((features & wide) == wide) return avx512_row;
#endif
#if defined(PARING_HAVE_AVX2)
    constexpr uint32_t narrow = kAvx2 | kFma | kF16c;
    if ((features & narrow) == narrow) return avx2_row;
#endif
    (void)features;
    return portable_row;
}

}  // namespace paring::ops

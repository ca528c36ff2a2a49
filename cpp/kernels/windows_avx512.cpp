// n:16 int8 and int4 with AVX-512 without VNNI.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "dot_avx512.inc"
#include "integer_avx512.inc"
#include "sums_avx512.inc"
#include "digits_avx512.inc"
#include "windows_avx512.inc"

}  // namespace

PARING_RUN(run_i8_n16_avx512) { run_windows<false>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_n16_avx512) { run_windows<true>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

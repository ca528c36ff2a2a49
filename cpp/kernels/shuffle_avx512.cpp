// 2:4 and 4:16 int8 and int4 with AVX-512 without VNNI.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "dot_avx512.inc"
#include "integer_avx512.inc"
#include "sums_avx512.inc"
#include "shuffle_avx512.inc"

}  // namespace

PARING_RUN(run_i8_2of4_avx512) { run_two4<false>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_2of4_avx512) { run_two4<true>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_4of16_avx512) { run_shuffled<Four16<false>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_4of16_avx512) { run_shuffled<Four16<true>>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

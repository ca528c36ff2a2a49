// Masks shared by 2 or by 16 rows, int8 and int4, with AVX-512 without VNNI.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "dot_avx512.inc"
#include "integer_avx512.inc"
#include "sums_avx512.inc"
#include "digits_avx512.inc"
#include "pairs_avx512.inc"
#include "columns_avx512.inc"

}  // namespace

PARING_RUN(run_i8_pairs_avx512) { run_pairs<false>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_pairs_avx512) { run_pairs<true>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_columns_avx512) { run_columns<false>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_columns_avx512) { run_columns<true>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

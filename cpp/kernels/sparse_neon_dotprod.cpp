// Bitmask and 1x4 block int8 and int4 with NEON and its dot products.
#include <arm_neon.h>

#include "rows.h"

namespace paring::kernels {
namespace {

#include "integer_neon.inc"
#include "place_neon.inc"
#include "sparse_neon.inc"

}  // namespace

PARING_RUN(run_i8_bitmask_neon_dotprod) { run<Masked<false>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_bitmask_neon_dotprod) { run<Masked<true>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_block4_neon_dotprod) { run<Blocks<false>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_block4_neon_dotprod) { run<Blocks<true>>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

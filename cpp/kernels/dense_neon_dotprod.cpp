// Dense int8 and int4 with NEON and its dot products.
#include <arm_neon.h>

#include "rows.h"

namespace paring::kernels {
namespace {

#include "integer_neon.inc"
#include "dense_neon.inc"

}  // namespace

PARING_RUN(run_i8_dense_neon_dotprod) { run<DenseBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_dense_neon_dotprod) { run<DenseNibbles>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

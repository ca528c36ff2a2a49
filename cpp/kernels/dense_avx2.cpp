// Dense int8 and int4 with AVX2.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "dense_avx2.inc"

}  // namespace

PARING_RUN(run_i8_dense_avx2) { run<DenseBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_dense_avx2) { run<DenseNibbles>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

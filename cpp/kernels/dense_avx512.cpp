// Dense int8 and int4 with AVX-512 without VNNI.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "dot_avx512.inc"
#include "integer_avx512.inc"
#include "dense_avx512.inc"

}  // namespace

PARING_RUN(run_i8_dense_avx512) { run_bytes(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_dense_avx512) { run<NibbleBlocks>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

// Bitmask int8 and int4 with AVX-512 without VNNI, on CPUs without vpexpandb.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "dot_avx512.inc"
#include "integer_avx512.inc"
#include "digits_avx512.inc"
#include "bitmask_avx512.inc"

}  // namespace

PARING_RUN(run_i8_bitmask_avx512) { run<MaskedBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_bitmask_avx512) { run<MaskedNibbles>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

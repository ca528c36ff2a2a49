// Masks shared by 2 or by 16 rows, int8 and int4, with NEON without dot products.
#include <arm_neon.h>

#include "rows.h"

namespace paring::kernels {
namespace {

#include "integer_neon.inc"
#include "place_neon.inc"
#include "dense_neon.inc"
#include "shared_neon.inc"

}  // namespace

PARING_RUN(run_i8_pairs_neon) { run<Pairs<false>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_pairs_neon) { run<Pairs<true>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_columns_neon) { run_columns<DenseBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_columns_neon) { run_columns<DenseNibbles>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

// 2:4, 4:16 and n:16 int8 and int4 with NEON without dot products.
#include <arm_neon.h>

#include "rows.h"

namespace paring::kernels {
namespace {

#include "integer_neon.inc"
#include "place_neon.inc"
#include "windows_neon.inc"

}  // namespace

PARING_RUN(run_i8_2of4_neon) {
    (void)scratch;
    run_sums<Two4<false>>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_i4_2of4_neon) {
    (void)scratch;
    run_sums<Two4<true>>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_i8_4of16_neon) {
    (void)scratch;
    run_sums<Four16<false>>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_i4_4of16_neon) {
    (void)scratch;
    run_sums<Four16<true>>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_i8_n16_neon) { run<Windows<false>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_n16_neon) { run<Windows<true>>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

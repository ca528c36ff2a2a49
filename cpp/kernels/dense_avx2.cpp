// Dense int8 and int4 with AVX2.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "many_avx2.inc"
#include "dense_avx2.inc"
#include "nibbles_avx2.inc"

}  // namespace

PARING_RUN(run_i8_dense_avx2) {
    if (x.m <= kTokens && x.spec.mode != InputMode::int16)
        run<false, DenseUnsigned>(w, x, y, ldy, begin, end, scratch);
    else
        run<false, DenseBytes>(w, x, y, ldy, begin, end, scratch);
}
PARING_RUN(run_i4_dense_avx2) {
    for (int32_t p = begin; p < end; ++p) {
        const size_t header = static_cast<size_t>(w.scale_groups) * 64 + 64;
        const uint8_t* body = view(w, p).body;
        const Place at{w, x, p, 0, y, ldy};
        prefetch_start(body, header);
        if (x.m <= kTokens)
            nibbles_tokens(PackedNibbles(w, body, header), at);
        else
            run_decoded_nibbles(DenseNibbles(w, body, header), at, scratch);
    }
}

}  // namespace paring::kernels

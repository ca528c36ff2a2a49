// Dense int8 and int4 with AVX-512 VNNI.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx512.inc"

struct NibbleBlocks {
    const uint8_t* at;
    size_t ahead;
    static constexpr int kBias = 8;
    NibbleBlocks(const uint8_t* body, size_t header) : at(body), ahead(kAhead + header) {}
    void next(__m512i& a, __m512i& b) {
        const __m512i low = _mm512_set1_epi8(15), both = _mm512_load_si512(at);
        prefetch(at + ahead);
        a = _mm512_and_si512(both, low);
        b = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        at += 64;
    }
};

}  // namespace

PARING_RUN(run_i8_dense_avx512_vnni) { run<DenseBlocks>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }
PARING_RUN(run_i4_dense_avx512_vnni) { run<NibbleBlocks>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch)); }

}  // namespace paring::kernels

// Dense int8 and int4 with AVX2.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"

struct DenseBytes {
    const uint8_t* at;
    size_t ahead;
    DenseBytes(const uint8_t* body, size_t header) : at(body), ahead(kAhead + header) {}
    void next(__m128i piece[4]) {
        prefetch(at + ahead);
        for (int i = 0; i < 4; ++i) piece[i] = _mm_xor_si128(load(at + 16 * i), _mm_set1_epi8(static_cast<char>(128)));
        at += 64;
    }
};

struct DenseNibbles {
    const uint8_t* at;
    size_t ahead;
    bool second = false;
    DenseNibbles(const uint8_t* body, size_t header) : at(body), ahead(kAhead + header) {}
    void next(__m128i piece[4]) {
        if (!second) prefetch(at + ahead);
        const __m128i low = _mm_set1_epi8(15), bias = _mm_set1_epi8(8);
        for (int i = 0; i < 4; ++i) {
            const __m128i both = load(at + 16 * i);
            piece[i] = _mm_sub_epi8(_mm_and_si128(second ? _mm_srli_epi16(both, 4) : both, low), bias);
        }
        at += second ? 64 : 0;
        second = !second;
    }
};

}  // namespace

PARING_RUN(run_i8_dense_avx2) { run<DenseBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_dense_avx2) { run<DenseNibbles>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

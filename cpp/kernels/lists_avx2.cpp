// Lists of vectors of 8 rows x 4 weights, int8 and int4, with AVX2: a shuffle brings every weight the input it meets, so
// that the cost follows the kept weights. No branch depends on how many a window has.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "sums_avx2.inc"

constexpr size_t padded(size_t bytes) { return (bytes + 31) / 32 * 32; }

// 16 bytes of nibbles -> 32 bytes, the low ones first.
__m256i nibbles(const uint8_t* at) {
    const __m128i both = load(at);
    return low_nibbles(_mm256_set_m128i(_mm_srli_epi16(both, 4), both));
}

Wide wide(const uint8_t* at) {
    return {_mm256_cvtepi8_epi16(load(at)), _mm256_cvtepi8_epi16(load(at + 16))};
}

template <bool Nibbles>
struct Lists {
    static constexpr bool kNibbles = Nibbles;
    static constexpr size_t kBytes = Nibbles ? 32 : 48;
    static __m256i in_order(__m256i sums) { return sums; }
    const uint8_t *counts, *steps, *at;
    size_t ahead;  // for the L2 cache: measured on Zen 3, nearer and into the L1 cache it was slower
    Lists(const PackedMatrix& w, const uint8_t* body, size_t header) : counts(body), ahead(3 * (kAhead + header)) {
        const auto halves = 2 * static_cast<size_t>(w.groups);
        size_t vectors = 0;
        for (size_t half = 0; half < halves; ++half) vectors += count(half);
        steps = counts + padded(2 * halves);
        at = steps + padded(vectors);
    }
    size_t count(size_t half) const {
        uint16_t found;
        __builtin_memcpy(&found, counts + 2 * half, 2);
        return found;
    }
    template <class S>
    void add(S& sums, int32_t j, int32_t) {
        add_half(sums, 0, j);
        add_half(sums, 1, j);
        counts += 4;
    }
    template <class S>
    __attribute__((always_inline)) void add_half(S& sums, const int half, int32_t j) {
        const uint8_t* const last = steps + count(static_cast<size_t>(half));
        for (; steps != last; ++steps, at += kBytes) {
            j += 16 * *steps;
            _mm_prefetch(at + ahead, _MM_HINT_T1);
            if (Nibbles)
                sums.add(half, nibbles(at + 16), nibbles(at), j);
            else
                sums.add(half, wide(at + 16), nibbles(at), j);
        }
    }
};

}  // namespace

PARING_RUN(run_i8_lists_avx2) {
    (void)scratch;
    run_sums<Lists<false>>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_i4_lists_avx2) {
    (void)scratch;
    run_sums<Lists<true>>(w, x, y, ldy, begin, end);
}

}  // namespace paring::kernels

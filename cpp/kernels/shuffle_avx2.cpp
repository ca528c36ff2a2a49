// 2:4 and 4:16 int8 and int4 with AVX2: a shuffle brings every stored weight the input it meets.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "many_avx2.inc"
#include "sums_avx2.inc"

// 4 weights of every 16 columns, with 4-bit columns.
template <bool Nibbles>
struct Four16 {
    static constexpr bool kNibbles = Nibbles;
    static __m256i in_order(__m256i sums) { return sums; }
    const uint8_t* at;
    size_t ahead;
    Four16(const PackedMatrix&, const uint8_t* body, size_t header) : at(body), ahead(kAhead + header) {}
    template <class S>
    void add(S& sums, int32_t j, int32_t last) {
        for (; j < last; j += 16) {
            prefetch(at + ahead);
            if (!Nibbles) prefetch(at + ahead + 64);
            const __m256i columns = load32(at), a = load32(at + 32);
            const __m256i b = Nibbles ? _mm256_srli_epi16(a, 4) : load32(at + 64);
            sums.add(0, Nibbles ? low_nibbles(a) : a, low_nibbles(columns), j);
            sums.add(1, Nibbles ? low_nibbles(b) : b, low_nibbles(_mm256_srli_epi16(columns, 4)), j);
            at += Nibbles ? 64 : 96;
        }
    }
};

// 2 weights of every 4 columns, with 2-bit places.
template <bool Nibbles>
struct Two4 {
    static constexpr bool kNibbles = Nibbles;
    static __m256i in_order(__m256i sums) { return sums; }
    const uint8_t* at;
    size_t ahead;
    const uint8_t* places = nullptr;  // of the chunk being read
    int vector = 0, half = 0;         // next() comes to these
    Two4(const PackedMatrix&, const uint8_t* body, size_t header) : at(body), ahead(kAhead + header) {}

    __m256i places_of(int v, int row8) const {
        const __m128i shift = _mm_cvtsi32_si128(2 * v);
        return _mm256_and_si256(_mm256_srl_epi16(load32(places + 32 * row8), shift), _mm256_set1_epi8(3));
    }
    // 8 rows of vector v of the chunk, whose values begin at `at`.
    __m256i values_of(int v, int row8) const {
        if (!Nibbles) return load32(at + 64 * v + 32 * row8);
        const __m256i both = load32(at + 64 * (v / 2) + 32 * row8);
        return low_nibbles(v % 2 == 0 ? both : _mm256_srli_epi16(both, 4));
    }
    void open() {
        places = at;
        at += 64;
        for (size_t i = 0; i < (Nibbles ? 192 : 320); i += 64) prefetch(at + ahead + i);
    }
    template <class S>
    void add(S& sums, int32_t j, int32_t last) {
        for (; j < last; j += 32) {
            open();
            const int vectors = last - j < 32 ? 2 : 4;
            for (int v = 0; v < vectors; ++v) {
                const __m256i base = _mm256_set1_epi32(v % 2 == 0 ? 0x04040000 : 0x0c0c0808);
                for (int row8 = 0; row8 < 2; ++row8)
                    sums.add(row8, values_of(v, row8), _mm256_or_si256(places_of(v, row8), base), j + v / 2 * 16);
            }
            at += vectors * (Nibbles ? 32 : 64);
        }
    }

    // 4 columns of 8 rows, from weights 2 h, 2 h + 1 of each.
    __m256i expand(__m256i weights, __m256i place) const {
        const __m256i pick = _mm256_broadcastsi128_si256(
            _mm_add_epi8(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12),
                         _mm_set1_epi8(static_cast<char>(2 * half))));
        const __m256i other = _mm256_add_epi8(pick, _mm256_set1_epi8(1)), column = _mm256_set1_epi32(0x03020100);
        const __m256i first = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(place, pick), column);
        const __m256i second = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(place, other), column);
        return _mm256_or_si256(_mm256_and_si256(_mm256_shuffle_epi8(weights, pick), first),
                               _mm256_and_si256(_mm256_shuffle_epi8(weights, other), second));
    }
    void next(__m128i piece[4]) {
        if (vector == 0 && half == 0) open();
        const __m256i bias = _mm256_set1_epi8(static_cast<char>(Nibbles ? 8 : 128));
        for (int row8 = 0; row8 < 2; ++row8) {
            const __m256i weights = _mm256_sub_epi8(values_of(vector, row8), bias);
            const __m256i block = expand(weights, places_of(vector, row8));
            piece[2 * row8] = _mm256_castsi256_si128(block);
            piece[2 * row8 + 1] = _mm256_extracti128_si256(block, 1);
        }
        half = (half + 1) % 2;
        if (half == 0) vector = (vector + 1) % 4;
        if (vector == 0 && half == 0) at += Nibbles ? 128 : 256;
    }
};

// Many tokens are faster with weights expanded once.
template <bool Nibbles>
void run_two4(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end,
              void* scratch) {
    if (x.m <= 4) return run_sums<Two4<Nibbles>>(w, x, y, ldy, begin, end);
    for (int32_t p = begin; p < end; ++p) {
        const Two4<Nibbles> blocks(w, view(w, p).body, w.header);
        const Place at{w, x, p, 0, y, ldy};
        Nibbles ? run_decoded_nibbles(blocks, at, scratch) : run_decoded(blocks, at, scratch);
    }
}

}  // namespace

PARING_RUN(run_i8_2of4_avx2) { run_two4<false>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_2of4_avx2) { run_two4<true>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_4of16_avx2) {
    (void)scratch;
    run_sums<Four16<false>>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_i4_4of16_avx2) {
    (void)scratch;
    run_sums<Four16<true>>(w, x, y, ldy, begin, end);
}

}  // namespace paring::kernels

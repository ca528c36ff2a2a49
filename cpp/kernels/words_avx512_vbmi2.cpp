// 1x4 blocks of int4 with AVX-512 VBMI2: one vpexpandw puts the kept blocks of 16 rows x 8 columns in place.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "dot_avx512.inc"
#include "integer_avx512.inc"
#include "sums_avx512.inc"

// The kept blocks at `at`, which goes on behind them, each in its place; 8s where none is kept.
inline __m512i place_words(uint32_t mask, const uint8_t*& at) {
    const __m512i kept = _mm512_loadu_si512(at);
    at += 2 * _mm_popcnt_u32(mask);
    return _mm512_mask_expand_epi16(_mm512_set1_epi8(static_cast<char>(0x88)), mask, kept);
}

// For one token: sums straight from the words, a group of 64 columns at a time.
class OneToken {
public:
    OneToken(const uint8_t* body, size_t header, const int32_t* sum) : at_(body), ahead_(kAhead + header), sum_(sum) {}

    template <int T, bool Fine>
    void sums(const Inputs& x, int32_t j, int32_t last, __m512i total[T]) {
        static_assert(T == 1, "sum_ are those of one token");
        constexpr int kPlanes = Fine ? 2 : 1;
        __m512i low[kPlanes], high[kPlanes];
#pragma GCC unroll 2
        for (int plane = 0; plane < kPlanes; ++plane) low[plane] = high[plane] = _mm512_setzero_si512();
        low[kPlanes - 1] = _mm512_set1_epi32(-8 * *sum_++);
        while (j < last) {
            if (j % 128 == 0) {
                masks_ = at_;
                at_ += 64;
            }
            if (last - j >= 64)
                add<kPlanes, 64>(x, j, low, high);
            else
                add<kPlanes, 16>(x, j, low, high);
        }
        // High nibbles counted 16 times, which an int32 holds up to kMaxColumns.
        total[0] = _mm512_add_epi32(low[0], _mm512_srai_epi32(high[0], 4));
        if (!Fine) return;
        const __m512i fine = _mm512_add_epi32(low[kPlanes - 1], _mm512_srai_epi32(high[kPlanes - 1], 4));
        total[0] = _mm512_add_epi32(fine, _mm512_slli_epi32(total[0], 7));
    }

private:
    template <int Planes, int32_t Columns>
    __attribute__((always_inline)) void add(const Inputs& x, int32_t& j, __m512i* low, __m512i* high) {
#pragma GCC unroll 8
        for (int32_t i = 0; i < Columns; i += kPair) {
            uint32_t mask;
            __builtin_memcpy(&mask, masks_ + i / 2, sizeof mask);
            prefetch(at_ + ahead_);
            const __m512i words = place_words(mask, at_);
            const __m512i a = _mm512_and_si512(words, _mm512_set1_epi8(15));
            const __m512i b = _mm512_and_si512(words, _mm512_set1_epi8(static_cast<char>(0xf0)));
#pragma GCC unroll 2
            for (int plane = 0; plane < Planes; ++plane) {
                const int8_t* q = x.from(plane, 0, j + i);
                low[plane] = dot<8>(low[plane], a, inputs(q));
                high[plane] = dot<8>(high[plane], b, inputs(q + 4));
            }
        }
        masks_ += Columns / 2;
        j += Columns;
    }

    const uint8_t* at_;
    size_t ahead_;
    const uint8_t* masks_ = nullptr;
    const int32_t* sum_;
};

// Columns 0, 1, 4, 5 of every 8, then 2, 3, 6, 7: as the nibbles of two words come out.
struct Words {
    Chunks<uint32_t> chunks;
    static constexpr int kBias = 8;
    Words(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m512i& a, __m512i& b) {
        const uint32_t mask = chunks.next();
        const __m512i both = place_words(mask, chunks.at), nibbles = _mm512_set1_epi8(15);
        a = _mm512_and_si512(both, nibbles);
        b = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibbles);
    }
};

// Columns 0 .. 3, then 4 .. 7.
struct WordsInOrder : Words {
    using Words::Words;
    void next(__m512i& a, __m512i& b) {
        __m512i low, high;
        Words::next(low, high);
        a = _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
        b = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
    }
};

// Planes of all tokens in that order, one behind the other.
void reorder(const Activations& x, const int8_t* from, int8_t* to) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int32_t t = 0; t < x.m; ++t, from += x.stride, to += x.plane)
        for (size_t i = 0; i < x.plane; i += 64)
            _mm512_store_si512(to + i, _mm512_shuffle_epi8(_mm512_load_si512(from + i), order));
}

}  // namespace

PARING_RUN(run_i4_words_avx512_vbmi2) {
    if (x.m != 1 && x.m != 2 && x.m != 4 && x.m != 8)
        return run_decoded<WordsInOrder>(w, x, y, ldy, begin, end, static_cast<uint8_t*>(scratch));
    Activations reordered = x;
    reordered.stride = x.plane;
    reordered.hi = static_cast<int8_t*>(scratch);
    reordered.lo = reordered.hi + static_cast<size_t>(x.m) * x.plane;
    reorder(x, x.hi, reordered.hi);
    if (x.spec.mode == InputMode::int16) reorder(x, x.lo, reordered.lo);
    if (x.m > 1) return run_direct<Words>(w, reordered, y, ldy, begin, end);
    for (int32_t p = begin; p < end; ++p) {
        prefetch_start(view(w, p).body, w.header);
        sums_tokens<OneToken, 1>(OneToken(view(w, p).body, w.header, x.sum), w, reordered, p, 0, y, ldy);
    }
}

}  // namespace paring::kernels

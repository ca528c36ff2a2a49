// n:16 int8 and int4 with AVX2: weights go to their places through a table, 16 columns of 16 rows at a time.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "place_avx2.inc"

template <bool Nibbles>
struct Windows {
    const uint8_t* counts;  // of the windows not read yet
    const uint8_t* at;
    size_t ahead;
    int quad = 0;           // next() comes to these 4 columns
    __m128i pieces[4][4];   // of the window being read: 4 columns of 4 rows
    Windows(const PackedMatrix& w, const uint8_t* body, size_t header) : counts(body), ahead(kAhead + header) {
        const size_t windows = (static_cast<size_t>(w.k) + 15) / 16;
        at = body + (windows + 31) / 32 * 32;
    }
    void next(__m128i piece[4]) {
        if (quad == 0) open();
        for (int i = 0; i < 4; ++i) piece[i] = pieces[quad][i];
        quad = (quad + 1) % 4;
    }
    void open() {
        const size_t n = *counts++, bytes = Nibbles ? 8 * n : 16 * n;
        const uint8_t* masks = at;
        if (n % 16 != 0) at += 32;
        alignas(32) uint8_t nibbles[2 * 128 + 16];
        if (Nibbles) split(n, nibbles);
        const uint8_t* from = Nibbles ? nibbles : at;
        for (size_t i = 0; i < bytes; i += 64) prefetch(at + ahead + i);
        at += bytes;
        for (int i = 0; i < 4; ++i) {
            __m128i row[4];
            for (int r = 0; r < 4; ++r) {
                uint16_t mask = n == 16 ? 0xffff : 0;
                if (n % 16 != 0) __builtin_memcpy(&mask, masks + 8 * i + 2 * r, 2);
                row[r] = place(from, mask, _mm_set1_epi8(static_cast<char>(Nibbles ? 8 : 128)));
            }
            const __m128i a = _mm_unpacklo_epi32(row[0], row[1]), b = _mm_unpackhi_epi32(row[0], row[1]);
            const __m128i c = _mm_unpacklo_epi32(row[2], row[3]), d = _mm_unpackhi_epi32(row[2], row[3]);
            pieces[0][i] = _mm_unpacklo_epi64(a, c);
            pieces[1][i] = _mm_unpackhi_epi64(a, c);
            pieces[2][i] = _mm_unpacklo_epi64(b, d);
            pieces[3][i] = _mm_unpackhi_epi64(b, d);
        }
    }
    // 8 n bytes of nibbles: the low ones, then the high ones.
    void split(size_t n, uint8_t* to) const {
        for (size_t i = 0; i < 8 * n; i += 32) {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i));
            const __m256i low = _mm256_set1_epi8(15);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), _mm256_and_si256(both, low));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + 8 * n + i), high);
        }
    }
};

}  // namespace

PARING_RUN(run_i8_n16_avx2) { run<Windows<false>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_n16_avx2) { run<Windows<true>>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

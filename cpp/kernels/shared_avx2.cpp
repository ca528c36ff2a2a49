// Masks shared by 2 or by 16 rows, int8 and int4, with AVX2.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "many_avx2.inc"
#include "dense_avx2.inc"
#include "place_avx2.inc"

template <bool Nibbles>
struct Pairs {
    Chunks<uint64_t> chunks;
    bool second = false;
    __m128i held[4];  // the second 4 columns
    Pairs(const PackedMatrix&, const uint8_t* body, size_t header) : chunks(body, header) {}
    void next(__m128i piece[4]) {
        if (!second) open(piece);
        else
            for (int i = 0; i < 4; ++i) piece[i] = held[i];
        second = !second;
    }
    // 8 columns: 4 to `piece` and 4 to `held`.
    void open(__m128i piece[4]) {
        const uint64_t mask = chunks.next();
        const auto count = static_cast<size_t>(_mm_popcnt_u64(mask));
        alignas(32) uint8_t nibbles[2][64 + 32];
        for (int i = 0; Nibbles && i < 64; i += 32) {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunks.at + i));
            const __m256i low = _mm256_set1_epi8(15), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            _mm256_store_si256(reinterpret_cast<__m256i*>(nibbles[0] + i), _mm256_and_si256(both, low));
            _mm256_store_si256(reinterpret_cast<__m256i*>(nibbles[1] + i), high);
        }
        const uint8_t* even = Nibbles ? nibbles[0] : chunks.at;
        const uint8_t* odd = Nibbles ? nibbles[1] : chunks.at + count;
        chunks.at += Nibbles ? count : 2 * count;
        const __m128i bias = _mm_set1_epi8(static_cast<char>(Nibbles ? 8 : 128));
        for (int i = 0; i < 4; ++i) {  // two pairs of rows: lanes of 4 columns, two of each
            const __m128i a = place(even, mask >> (16 * i) & 0xffff, bias);
            const __m128i b = place(odd, mask >> (16 * i) & 0xffff, bias);
            const __m128i low = _mm_unpacklo_epi32(a, b), high = _mm_unpackhi_epi32(a, b);
            piece[i] = _mm_unpacklo_epi64(low, high);
            held[i] = _mm_unpackhi_epi64(low, high);
        }
    }
};

// The inputs of the kept columns of [j, last) for T tokens at `to`, then zeros for 8 more; returns how many there are.
template <int T>
int32_t gather(const Place& at, const uint8_t* masks, int32_t j, int32_t last, int16_t* to, size_t stride) {
    int32_t count = 0;
    for (; j < last; j += 32) {
        uint32_t mask;
        __builtin_memcpy(&mask, masks + j / 8, 4);
        for (; mask != 0; mask &= mask - 1, ++count)
            for (int t = 0; t < T; ++t) {
                const int16_t* from = at.x.wide + static_cast<size_t>(at.first + t) * at.x.wide_stride + j;
                to[static_cast<size_t>(t) * stride + count] = from[__builtin_ctz(mask)];
            }
    }
    for (int t = 0; t < T; ++t)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + static_cast<size_t>(t) * stride + count), _mm_setzero_si128());
    return count;
}

template <class Blocks, int T>
void columns_tile(const Place& at, int16_t* gathered) {
    const uint8_t* masks = view(at.w, at.panel).body;
    const size_t words = (static_cast<size_t>(at.w.k) + 31) / 32;
    Blocks blocks(at.w, masks + (words * 4 + 63) / 64 * 64, at.w.header);
    const size_t stride = static_cast<size_t>(at.w.group == 0 ? at.x.padded : at.w.group) + 16;
    tile<T>(at, [&](int32_t, int32_t j, int32_t last, __m256i sums[T][2]) {
        const int32_t count = gather<T>(at, masks, j, last, gathered, stride);
        __m256i acc[T][4];
        clear<T>(acc);
        accumulate<Blocks, T>(blocks, gathered, stride, 0, (count + Blocks::kColumns - 1) & -Blocks::kColumns, acc);
        for (int t = 0; t < T; ++t)
            for (int half = 0; half < 2; ++half) sums[t][half] = rows(acc[t], half);
    });
}

template <class Blocks>
void run_columns(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end,
                 void* scratch) {
    auto* gathered = static_cast<int16_t*>(scratch);
    for (int32_t p = begin; p < end; ++p) {
        prefetch_start(view(w, p).body, w.header);
        Place at{w, x, p, 0, y, ldy};
        for (; at.first + 2 <= x.m; at.first += 2) columns_tile<Blocks, 2>(at, gathered);
        if (at.first < x.m) columns_tile<Blocks, 1>(at, gathered);
    }
}

}  // namespace

PARING_RUN(run_i8_pairs_avx2) { run<false, Pairs<false>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_pairs_avx2) { run<true, Pairs<true>>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_columns_avx2) { run_columns<DenseBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_columns_avx2) { run_columns<DenseNibbles>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

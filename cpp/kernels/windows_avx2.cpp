// n:16 int8 and int4 with AVX2, 16 columns of 16 rows at a time. For a token or two the inputs go to the weights: a table
// turns masks into the columns of a shuffle. For more, the weights go to their places, once for all.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "many_avx2.inc"
#include "place_avx2.inc"
#include "sums_avx2.inc"

// Where the columns of n kept weights of a row are written: so many bytes apart.
constexpr size_t slot(size_t n) { return n == 12 ? 16 : n; }

// Writes the columns that 16 rows keep, N of each, at `to`. A store may run into the next rows' slots, which come later.
template <size_t N>
void write_columns(const uint8_t* masks, uint8_t* to) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r, to += slot(N)) {
        const uint64_t first = masks[2 * r], second = masks[2 * r + 1];
        __builtin_memcpy(to, kColumns.low[first], 8);
        __builtin_memcpy(to + _mm_popcnt_u64(first), kColumns.high[second], 8);
    }
}

// Lanes: see swap_middle.
template <bool Nibbles>
struct Windows {
    static constexpr bool kNibbles = Nibbles;
    static constexpr size_t kEarly = 2, kRing = 4;  // columns are written so many windows early: loads after stores wait
    struct Cursor {
        const uint8_t* counts;
        const uint8_t* at;
    };
    Cursor reading, writing;
    size_t ahead, left, written = 0, read = 0;  // windows: all, with columns written, read
    alignas(32) uint8_t ring[kRing][16 * 16 + 16];

    Windows(const PackedMatrix& w, const uint8_t* body, size_t header)
        : ahead(kAhead + header), left((static_cast<size_t>(w.k) + 15) / 16) {
        reading = writing = {body, body + (left + 31) / 32 * 32};
    }
    static __m256i in_order(__m256i sums) { return swap_middle(sums); }

    static const uint8_t* values(const uint8_t* window, size_t n) { return window + (n % 16 == 0 ? 0 : 32); }
    static size_t bytes(size_t n) { return Nibbles ? 8 * n : 16 * n; }

    void write() {
        const size_t n = *writing.counts++;
        const uint8_t* masks = writing.at;
        uint8_t* to = ring[written++ % kRing];
        if (n == 4) write_columns<4>(masks, to);
        if (n == 8) write_columns<8>(masks, to);
        if (n == 12) write_columns<12>(masks, to);
        writing.at = values(masks, n) + bytes(n);
        for (const uint8_t* line = masks; line < writing.at; line += 64) prefetch(line + ahead);
    }
    template <class S>
    void add(S& sums, int32_t j, int32_t last) {
        for (; j < last; j += 16) {
            while (written < left && written <= read + kEarly) write();
            const size_t n = *reading.counts++;
            const uint8_t* from = values(reading.at, n);
            const uint8_t* columns = ring[read++ % kRing];
            reading.at = from + bytes(n);
            if (n == 4) both([&](int half) { add4(sums, from, columns, half, j); });
            if (n == 8) both([&](int half) { add8(sums, from, columns, half, j); });
            if (n == 12) both([&](int half) { add_rows<12>(sums, from, columns, half, j); });
            if (n == 16) both([&](int half) { add_rows<16>(sums, from, columns, half, j); });
        }
    }
    template <class Act>
    static void both(Act act) {  // written out, so that sums stay in registers
        act(0);
        act(1);
    }
    // 32 weights from byte i on of those of 8 rows with n each.
    static __m256i weights(const uint8_t* from, size_t n, int half, size_t i) {
        if (!Nibbles) return load32(from + 8 * n * static_cast<size_t>(half) + i);
        return nibbles(load32(from + i), half);
    }
    static __m256i nibbles(__m256i both, int half) {
        return low_nibbles(half == 0 ? both : _mm256_srli_epi16(both, 4));
    }
    template <class S>
    static void add4(S& sums, const uint8_t* from, const uint8_t* columns, int half, int32_t j) {
        sums.add(half, in_order(weights(from, 4, half, 0)), in_order(load32(columns + 32 * half)), j);
    }
    template <class S>
    static void add8(S& sums, const uint8_t* from, const uint8_t* columns, int half, int32_t j) {
        const __m256i a = weights(from, 8, half, 0), b = weights(from, 8, half, 32);
        const __m256i c = load32(columns + 64 * half), d = load32(columns + 64 * half + 32);
        sums.add(half, even_lanes(a, b), even_lanes(c, d), j);
        sums.add(half, odd_lanes(a, b), odd_lanes(c, d), j);
    }
    template <size_t N, class S>
    static void add_rows(S& sums, const uint8_t* from, const uint8_t* columns, int half, int32_t j) {
        __m256i w[4], c[4];
        const auto first = static_cast<size_t>(Nibbles ? 0 : 8 * half);
        turn(from + N * first, N, w);
        if (N < 16) turn(columns + 128 * half, 16, c);
#pragma GCC unroll 4
        for (size_t v = 0; v < N / 4; ++v) {
            if (N == 16) c[v] = _mm256_set1_epi32(static_cast<int>(0x03020100 + 0x04040404 * v));
            sums.add(half, Nibbles ? nibbles(w[v], half) : w[v], c[v], j);
        }
    }
    // 8 rows of 16 bytes, so many apart -> the 4 bytes v of each in out[v].
    static void turn(const uint8_t* row, size_t stride, __m256i out[4]) {
        const auto pair = [&](size_t r) { return _mm256_set_m128i(load(row + (r + 2) * stride), load(row + r * stride)); };
        const __m256i a = pair(0), b = pair(1), c = pair(4), d = pair(5);
        const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
        out[0] = _mm256_unpacklo_epi64(ab, cd);
        out[1] = _mm256_unpackhi_epi64(ab, cd);
        const __m256i ab2 = _mm256_unpackhi_epi32(a, b), cd2 = _mm256_unpackhi_epi32(c, d);
        out[2] = _mm256_unpacklo_epi64(ab2, cd2);
        out[3] = _mm256_unpackhi_epi64(ab2, cd2);
    }
};

template <bool Nibbles>
struct PlacedWindows {
    const uint8_t* counts;  // of the windows not read yet
    const uint8_t* at;
    size_t ahead;
    int quad = 0;           // next() comes to these 4 columns
    __m128i pieces[4][4];   // of the window being read: 4 columns of 4 rows
    PlacedWindows(const PackedMatrix& w, const uint8_t* body, size_t header) : counts(body), ahead(kAhead + header) {
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

template <bool Nibbles>
void run_n16(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end,
             void* scratch) {
    if (x.m <= kTokens) return run_sums<Windows<Nibbles>>(w, x, y, ldy, begin, end);
    if (Nibbles)
        run<true, PlacedWindows<true>>(w, x, y, ldy, begin, end, scratch);
    else
        run<false, PlacedWindows<false>>(w, x, y, ldy, begin, end, scratch);
}

}  // namespace

PARING_RUN(run_i8_n16_avx2) { run_n16<false>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_n16_avx2) { run_n16<true>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

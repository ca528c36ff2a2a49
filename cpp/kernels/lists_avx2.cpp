// Lists of vectors of 8 rows x 4 weights or 1x4 blocks, int8 and int4, with AVX2: a shuffle brings every weight the input
// it meets, so that the cost follows the kept weights. No branch depends on how many a window has. For many tokens the
// weights go to their places in a panel, once. Blocks are read for every two tokens.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"
#include "many_avx2.inc"
#include "sums_avx2.inc"

// When it pays to expand a panel, measured on Zen 3: from so many tokens and from so many stored weights of one on.
constexpr int32_t kExpandTokens = 64;
constexpr double kExpandDensity = 0.4;

constexpr size_t padded(size_t bytes) { return (bytes + 31) / 32 * 32; }

// 16 bytes of nibbles -> 32 bytes, the low ones first.
__m256i nibbles(const uint8_t* at) {
    const __m128i both = load(at);
    return low_nibbles(_mm256_set_m128i(_mm_srli_epi16(both, 4), both));
}

Wide wide(const uint8_t* at) {
    return {_mm256_cvtepi8_epi16(load(at)), _mm256_cvtepi8_epi16(load(at + 16))};
}

// Where the inputs are that a vector meets: anywhere in 16 columns,
struct Columns {
    static constexpr size_t kBytes = 16;
    static constexpr int32_t kWindow = 16;
    static __m256i read(const uint8_t* at) { return nibbles(at); }
};

// or in blocks of 4 among 8.
struct Blocks {
    static constexpr size_t kBytes = 4;
    static constexpr int32_t kWindow = 32;
    __m256i places;
    static Blocks read(const uint8_t* at) {
        int eight;
        __builtin_memcpy(&eight, at, 4);
        const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        return {_mm256_srlv_epi32(_mm256_set1_epi32(eight), shift)};  // vpermd heeds the lowest 3 bits
    }
};

__m256i met(const int8_t* window, const Blocks& blocks) {
    return _mm256_permutevar8x32_epi32(load32(window), blocks.places);
}

template <bool Nibbles, class Where>
struct Lists {
    static constexpr bool kNibbles = Nibbles;
    static constexpr size_t kBytes = Where::kBytes + (Nibbles ? 16 : 32);
    static __m256i in_order(__m256i sums) { return sums; }
    const uint8_t *counts, *steps, *at;
    size_t ahead;  // for the L2 cache: measured on Zen 3, nearer and into the L1 cache it was slower
    Lists(const PackedMatrix& w, const uint8_t* body, size_t header) : counts(body), ahead(3 * (kAhead + header)) {
        const auto halves = 2 * static_cast<size_t>(w.groups);
        size_t vectors = 0;
        for (size_t half = 0; half < halves; ++half) vectors += count(half);
        steps = counts + padded(2 * halves);
        at = steps + padded(vectors);
        // walk() fetches ahead of the vectors; this is what it left out when it came from the last panel's.
        const size_t skipped = header + static_cast<size_t>(at - body);
        for (size_t i = 0; i < skipped; i += 64) _mm_prefetch(at + ahead - i, _MM_HINT_T1);
    }
    size_t count(size_t half) const {
        uint16_t found;
        __builtin_memcpy(&found, counts + 2 * half, 2);
        return found;
    }
    // Calls act(the vector's bytes, its first column) for all vectors of a half of a group that begins at column j.
    template <class Act>
    __attribute__((always_inline)) void walk(size_t half, int32_t j, const Act& act) {
        const uint8_t* const last = steps + count(half);
        for (; steps != last; ++steps, at += kBytes) {
            j += Where::kWindow * *steps;
            _mm_prefetch(at + ahead, _MM_HINT_T1);
            act(at, j);
        }
    }
    template <class S>
    void add(S& sums, int32_t j, int32_t) {
        walk(0, j, [&](const uint8_t* vector, int32_t first) { add_vector(sums, 0, vector, first); });
        walk(1, j, [&](const uint8_t* vector, int32_t first) { add_vector(sums, 1, vector, first); });
        counts += 4;
    }
    template <class S>
    __attribute__((always_inline)) static void add_vector(S& sums, int half, const uint8_t* vector, int32_t j) {
        const auto where = Where::read(vector);
        if (Nibbles)
            sums.add(half, nibbles(vector + Where::kBytes), where, j);
        else
            sums.add(half, wide(vector + Where::kBytes), where, j);
    }
    // The weights of a vector, row by row.
    static __m256i values(const uint8_t* vector) {
        const uint8_t* from = vector + Where::kBytes;
        if (Nibbles) return _mm256_sub_epi8(nibbles(from), _mm256_set1_epi8(8));
        const __m128i even = load(from), odd = load(from + 16);
        return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    }
};

// Where weights of 8 rows x 4 in 16 columns are in a panel, counted from the first of these rows and columns. What a row
// adds: see Pairs16 and Nibbles8.
__m256i places(Pairs16, __m256i columns) {
    const __m256i rows = _mm256_setr_epi32(0, 0x02020202, 0x08080808, 0x0a0a0a0a, 0x04040404, 0x06060606, 0x0c0c0c0c,
                                           0x0e0e0e0e);
    const __m256i pair = _mm256_slli_epi16(_mm256_and_si256(columns, _mm256_set1_epi8(14)), 4);
    return _mm256_add_epi8(_mm256_add_epi8(pair, rows), _mm256_and_si256(columns, _mm256_set1_epi8(1)));
}

__m256i places(Nibbles8, __m256i columns) {
    const __m256i rows = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0x10101010, 0x14141414, 0x18181818,
                                           0x1c1c1c1c);
    const __m256i four = _mm256_slli_epi16(_mm256_and_si256(columns, _mm256_set1_epi8(12)), 4);
    return _mm256_add_epi8(_mm256_add_epi8(four, rows), _mm256_and_si256(columns, _mm256_set1_epi8(3)));
}

size_t half_of(Pairs16) { return 16; }
size_t half_of(Nibbles8) { return 32; }

template <bool Nibbles, class Panel>
void expand(const Place& at, void* scratch) {
    using Value = typename Panel::Value;
    auto* panel = static_cast<Value*>(scratch);
    __builtin_memset(panel, Panel::kZero, static_cast<size_t>(at.x.padded) * kPanelRows * sizeof(Value));
    const int32_t span = at.w.group == 0 ? at.x.padded : at.w.group;
    Lists<Nibbles, Columns> lists(at.w, view(at.w, at.panel).body, at.w.header);
    for (int32_t g = 0; g < at.w.groups; ++g, lists.counts += 4)
        for (size_t half = 0; half < 2; ++half)
            lists.walk(half, g * span, [&](const uint8_t* vector, int32_t j) {
                alignas(32) uint8_t place[32];
                alignas(32) int8_t value[32];
                _mm256_store_si256(reinterpret_cast<__m256i*>(place), places(Panel{}, nibbles(vector)));
                _mm256_store_si256(reinterpret_cast<__m256i*>(value), Lists<Nibbles, Columns>::values(vector));
                Value* to = panel + static_cast<size_t>(j) * kPanelRows + half * half_of(Panel{});
                // Zeros that fill up lie where nothing is kept.
#pragma GCC unroll 32
                for (int i = 0; i < 32; ++i) to[place[i]] = static_cast<Value>(Panel::kZero + value[i]);
            });
    many_tokens<Panel>(scratch, at);
}

template <bool Nibbles>
void run_lists(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end,
               void* scratch) {
    const auto vectors = static_cast<double>(w.bytes) / Lists<Nibbles, Columns>::kBytes;
    const double density = 32 * vectors / (static_cast<double>(w.panels) * kPanelRows * x.padded);
    if (x.m < kExpandTokens || density < kExpandDensity) return run_sums<Lists<Nibbles, Columns>>(w, x, y, ldy, begin, end);
    for (int32_t p = begin; p < end; ++p) {
        const Place at{w, x, p, 0, y, ldy};
        if (Nibbles && x.spec.mode != InputMode::int16)
            expand<Nibbles, Nibbles8>(at, scratch);
        else
            expand<Nibbles, Pairs16>(at, scratch);
    }
}

}  // namespace

PARING_RUN(run_i8_lists_avx2) { run_lists<false>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_lists_avx2) { run_lists<true>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_lists4_avx2) {
    (void)scratch;
    run_sums<Lists<false, Blocks>>(w, x, y, ldy, begin, end);
}
PARING_RUN(run_i4_lists4_avx2) {
    (void)scratch;
    run_sums<Lists<true, Blocks>>(w, x, y, ldy, begin, end);
}

}  // namespace paring::kernels

// 2:4 and 4:16 int8 and int4 with AVX2: a shuffle brings every stored weight the input it meets.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"
#include "integer_avx2.inc"

__m256i load32(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

__m256i low_nibbles(__m256i both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }

// acc + the 4 products of each lane: unsigned weights w + 128 or, as Nibbles, w + 8, with their bias taken off.
template <bool Nibbles>
__m256i dot(__m256i acc, __m256i weights, __m256i x) {
    if (Nibbles) {  // vpmaddubsw stays under 2 * 15 * 128: it does not saturate
        const __m256i bias = _mm256_maddubs_epi16(_mm256_set1_epi8(8), x);
        const __m256i pairs = _mm256_sub_epi16(_mm256_maddubs_epi16(weights, x), bias);
        return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    const __m256i w = _mm256_xor_si256(weights, _mm256_set1_epi8(static_cast<char>(128)));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd = _mm256_srai_epi16(w, 8);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    const __m256i sum = _mm256_add_epi32(acc, _mm256_madd_epi16(even, x_even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, x_odd));
}

// Sums of T tokens from at.first on: 8 rows a half, lane = row; two planes of 15-bit inputs ("Fine").
template <bool Nibbles, int T, bool Fine>
struct Sums {
    static constexpr int P = Fine ? 2 : 1;
    const Place& at;
    __m256i acc[P][T][2];
    explicit Sums(const Place& place) : at(place) {
        for (int p = 0; p < P; ++p)
            for (int t = 0; t < T; ++t) acc[p][t][0] = acc[p][t][1] = _mm256_setzero_si256();
    }
    // 8 rows of weights, which meet these of the 16 inputs at column j.
    void add(int half, __m256i weights, __m256i columns, int32_t j) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) {
                const size_t from = static_cast<size_t>(at.first + t) * at.x.stride + static_cast<size_t>(j);
                const __m256i window = _mm256_broadcastsi128_si256(load((p == 0 ? at.x.hi : at.x.lo) + from));
                acc[p][t][half] = dot<Nibbles>(acc[p][t][half], weights, _mm256_shuffle_epi8(window, columns));
            }
    }
    __m256i total(int t, int half) const {
        if (!Fine) return acc[0][t][half];
        return _mm256_add_epi32(_mm256_slli_epi32(acc[0][t][half], 7), acc[P - 1][t][half]);
    }
};

// 4 weights of every 16 columns, with 4-bit columns.
template <bool Nibbles>
struct Four16 {
    static constexpr bool kNibbles = Nibbles;
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

template <class Reader, int T, bool Fine>
void sums_tile(Reader reader, const Place& at) {
    const PanelView v = view(at.w, at.panel);
    const int32_t span = at.w.group == 0 ? at.x.padded : at.w.group;
    __m256 value[T][2];
    for (int t = 0; t < T; ++t) value[t][0] = value[t][1] = _mm256_setzero_ps();
    for (int32_t g = 0, j = 0; g < at.w.groups; ++g, j += span) {
        Sums<Reader::kNibbles, T, Fine> sums(at);
        reader.add(sums, j, at.x.padded - j < span ? at.x.padded : j + span);
        for (int t = 0; t < T; ++t)
            for (int half = 0; half < 2; ++half) {
                if (at.w.group == 0)
                    finish_channel(at, v, t, half, sums.total(t, half));
                else
                    value[t][half] = add_group(at, v, t, half, g, sums.total(t, half), value[t][half]);
            }
    }
    if (at.w.group == 0) return;
    for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) finish_groups(at, v, t, half, value[t][half]);
}

template <class Reader, int T>
void sums_tokens(const Reader& reader, const Place& at) {
    if (at.x.spec.mode == InputMode::int16)
        sums_tile<Reader, T, true>(reader, at);
    else
        sums_tile<Reader, T, false>(reader, at);
}

template <class Reader>
void run_sums(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end) {
    const size_t header = static_cast<size_t>(w.scale_groups) * 64 + 64;
    for (int32_t p = begin; p < end; ++p) {
        prefetch_start(view(w, p).body, header);
        const Reader reader(w, view(w, p).body, header);
        Place at{w, x, p, 0, y, ldy};
        for (; at.first + 2 <= x.m; at.first += 2) sums_tokens<Reader, 2>(reader, at);
        if (at.first < x.m) sums_tokens<Reader, 1>(reader, at);
    }
}

// Many tokens are faster with weights expanded once.
template <bool Nibbles>
void run_two4(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end,
              void* scratch) {
    if (x.m <= 4) return run_sums<Two4<Nibbles>>(w, x, y, ldy, begin, end);
    const size_t header = static_cast<size_t>(w.scale_groups) * 64 + 64;
    for (int32_t p = begin; p < end; ++p)
        run_decoded(Two4<Nibbles>(w, view(w, p).body, header), Place{w, x, p, 0, y, ldy}, scratch);
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

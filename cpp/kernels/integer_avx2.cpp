// Integer layouts with AVX2. vpmaddubsw saturates for some int8 pairs, so weights widen to int16 and vpmaddwd adds
// pairs into int32: exact for every input, and enough to follow the memory. The same instruction takes 15-bit inputs.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

constexpr int32_t kTokens = 2;   // tokens that share one decoding of the weights
constexpr size_t kAhead = 1536;  // bytes prefetched ahead

void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0); }

__m128i load(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }

// Decoders hand out blocks of 16 rows x 4 columns as four pieces of 4 rows x 4 signed bytes.
struct DenseBytes {
    const uint8_t* at;
    DenseBytes(const uint8_t* body, int32_t) : at(body) {}
    void next(__m128i piece[4]) {
        prefetch(at);
        for (int i = 0; i < 4; ++i) piece[i] = _mm_xor_si128(load(at + 16 * i), _mm_set1_epi8(static_cast<char>(128)));
        at += 64;
    }
};

struct ScratchBytes {
    const uint8_t* at;
    ScratchBytes(const uint8_t* body, int32_t) : at(body) {}
    void next(__m128i piece[4]) {
        for (int i = 0; i < 4; ++i) piece[i] = load(at + 16 * i);
        at += 64;
    }
};

struct DenseNibbles {
    const uint8_t* at;
    bool second = false;
    DenseNibbles(const uint8_t* body, int32_t) : at(body) {}
    void next(__m128i piece[4]) {
        if (!second) prefetch(at);
        const __m128i low = _mm_set1_epi8(15), bias = _mm_set1_epi8(8);
        for (int i = 0; i < 4; ++i) {
            const __m128i both = load(at + 16 * i);
            piece[i] = _mm_sub_epi8(_mm_and_si128(second ? _mm_srli_epi16(both, 4) : both, low), bias);
        }
        at += second ? 64 : 0;
        second = !second;
    }
};

// 16 places from the kept bytes at `from` (values + bias); moves `from` past what it used. Pruned places are 0.
__m128i place(const uint8_t*& from, uint32_t mask, __m128i bias) {
    const uint32_t first = mask & 255, second = mask >> 8;
    const uint8_t* middle = from + _mm_popcnt_u32(first);
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(middle));
    const __m128i control_low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.low[first]));
    const __m128i control_high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.high[second]));
    from = middle + _mm_popcnt_u32(second);
    const __m128i values = _mm_sub_epi8(_mm_unpacklo_epi64(low, high), bias);
    return _mm_shuffle_epi8(values, _mm_unpacklo_epi64(control_low, control_high));
}

struct Masks {
    const uint8_t* at;
    uint64_t next() {
        uint64_t mask;
        __builtin_memcpy(&mask, at, 8);
        at += 8;
        return mask;
    }
};

const uint8_t* values_of(const uint8_t* body, int32_t columns) {
    return body + (static_cast<size_t>(columns) * 2 + 63) / 64 * 64;
}

struct MaskedBytes {
    Masks masks;
    const uint8_t* at;
    MaskedBytes(const uint8_t* body, int32_t columns) : masks{body}, at(values_of(body, columns)) {}
    void next(__m128i piece[4]) {
        prefetch(at);
        const uint64_t mask = masks.next();
        for (int i = 0; i < 4; ++i) piece[i] = place(at, mask >> (16 * i) & 0xffff, _mm_set1_epi8(static_cast<char>(128)));
    }
};

struct MaskedNibbles {
    Masks masks;
    const uint8_t* at;
    MaskedNibbles(const uint8_t* body, int32_t columns) : masks{body}, at(values_of(body, columns)) {}
    void next(__m128i piece[4]) {
        prefetch(at);
        const uint64_t mask = masks.next();
        alignas(32) uint8_t nibbles[64 + 16];
        for (int i = 0; i < 4; ++i) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * i));
            const __m128i both = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
            _mm_store_si128(reinterpret_cast<__m128i*>(nibbles + 16 * i), _mm_and_si128(both, _mm_set1_epi8(15)));
        }
        const uint8_t* from = nibbles;
        for (int i = 0; i < 4; ++i) piece[i] = place(from, mask >> (16 * i) & 0xffff, _mm_set1_epi8(8));
        at += (_mm_popcnt_u64(mask) + 1) / 2;
    }
};

struct PanelView {
    const float* scale;
    const float* footer;  // row sums (i32) or weighted row sums
    const uint8_t* body;
};

PanelView view(const PackedMatrix& w, int32_t panel) {
    const uint8_t* data = w.data + w.offset[panel];
    const uint8_t* footer = data + static_cast<size_t>(w.scale_groups) * 64;
    return {reinterpret_cast<const float*>(data), reinterpret_cast<const float*>(footer), footer + 64};
}

// Where one tile works: T tokens from `first` of one panel.
struct Place {
    const PackedMatrix& w;
    const Activations& x;
    int32_t panel, first;
    float* y;
    size_t ldy;
};

void store(const Place& at, int32_t token, int half, __m256 value) {
    const int32_t row = at.panel * kPanelRows + 8 * half, left = at.w.n - row;
    if (left <= 0) return;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(at.y + static_cast<size_t>(token) * at.ldy + row,
                        _mm256_cmpgt_epi32(_mm256_set1_epi32(left), lane), value);
}

// acc[piece]: two partial sums for each of 4 rows -> the sums of 8 rows in order.
__m256i rows(const __m256i* acc, int half) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[2 * half], acc[2 * half + 1]), 0xd8);
}

// Adds columns [j, last) of one panel into acc[token][piece].
template <class Blocks, int T>
inline void accumulate(Blocks& blocks, const int16_t* q, size_t stride, int32_t j, int32_t last, __m256i acc[T][4]) {
    for (; j < last; j += 4) {
        __m128i piece[4];
        blocks.next(piece);
        __m256i input[T];
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
            long long four;
            __builtin_memcpy(&four, q + static_cast<size_t>(t) * stride + j, 8);
            input[t] = _mm256_set1_epi64x(four);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m256i weights = _mm256_cvtepi8_epi16(piece[i]);
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) acc[t][i] = _mm256_add_epi32(acc[t][i], _mm256_madd_epi16(weights, input[t]));
        }
    }
}

template <int T>
inline void clear(__m256i acc[T][4]) {
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < 4; ++i) acc[t][i] = _mm256_setzero_si256();
}

template <class Blocks, int T>
void channel_tile(Blocks blocks, const Place& at) {
    const Activations& x = at.x;
    const PanelView v = view(at.w, at.panel);
    __m256i acc[T][4];
    clear<T>(acc);
    accumulate<Blocks, T>(blocks, x.wide + static_cast<size_t>(at.first) * x.stride, x.stride, 0, x.padded, acc);
    const __m256i zero_point = _mm256_set1_epi32(x.spec.zero_point);
    for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) {
            const __m256i sums = _mm256_load_si256(reinterpret_cast<const __m256i*>(v.footer + 8 * half));
            const __m256i total = _mm256_sub_epi32(rows(acc[t], half), _mm256_mullo_epi32(sums, zero_point));
            const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(x.scale[at.first + t]), _mm256_load_ps(v.scale + 8 * half));
            store(at, at.first + t, half, _mm256_mul_ps(_mm256_cvtepi32_ps(total), scale));
        }
}

template <class Blocks, int T>
void grouped_tile(Blocks blocks, const Place& at) {
    const PackedMatrix& w = at.w;
    const Activations& x = at.x;
    const PanelView v = view(w, at.panel);
    const float* scale_x = x.scale + static_cast<size_t>(at.first) * x.groups;
    __m256 value[T][2];
    for (int t = 0; t < T; ++t) value[t][0] = value[t][1] = _mm256_setzero_ps();
    for (int32_t g = 0, j = 0; g < w.groups; ++g, j += w.group) {
        const int32_t last = x.padded - j < w.group ? x.padded : j + w.group;
        __m256i acc[T][4];
        clear<T>(acc);
        accumulate<Blocks, T>(blocks, x.wide + static_cast<size_t>(at.first) * x.stride, x.stride, j, last, acc);
        const float* scale_w = v.scale + (w.scale_groups == 1 ? 0 : static_cast<size_t>(g) * 16);
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m256 scale = _mm256_set1_ps(scale_x[static_cast<size_t>(t) * x.groups + g]);
                const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(rows(acc[t], half)), scale);
                value[t][half] = _mm256_fmadd_ps(scaled, _mm256_load_ps(scale_w + 8 * half), value[t][half]);
            }
    }
    for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) {
            if (x.spec.mode == InputMode::int8_static) {
                const float shift = static_cast<float>(x.spec.zero_point) * scale_x[static_cast<size_t>(t) * x.groups];
                value[t][half] = _mm256_fmadd_ps(_mm256_set1_ps(-shift), _mm256_load_ps(v.footer + 8 * half), value[t][half]);
            }
            store(at, at.first + t, half, value[t][half]);
        }
}

template <class Blocks>
void tokens(const Blocks& start, Place at) {
    const bool channel = at.w.group == 0;
    for (; at.first + kTokens <= at.x.m; at.first += kTokens)
        channel ? channel_tile<Blocks, kTokens>(start, at) : grouped_tile<Blocks, kTokens>(start, at);
    if (at.first < at.x.m) channel ? channel_tile<Blocks, 1>(start, at) : grouped_tile<Blocks, 1>(start, at);
}

// Few tokens decode in registers; many read a panel that was decoded once into scratch.
template <class Blocks>
void run(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end, void* scratch) {
    for (int32_t p = begin; p < end; ++p) {
        Blocks blocks(view(w, p).body, x.padded);
        const Place at{w, x, p, 0, y, ldy};
        if (x.m <= kTokens) {
            tokens(blocks, at);
            continue;
        }
        auto* to = static_cast<__m128i*>(scratch);
        for (int32_t j = 0; j < x.padded; j += 4, to += 4) {
            __m128i piece[4];
            blocks.next(piece);
            for (int i = 0; i < 4; ++i) _mm_store_si128(to + i, piece[i]);
        }
        tokens(ScratchBytes(static_cast<const uint8_t*>(scratch), x.padded), at);
    }
}

}  // namespace

PARING_RUN(run_i8_dense_avx2) { run<DenseBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_dense_avx2) { run<DenseNibbles>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i8_bitmask_avx2) { run<MaskedBytes>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_i4_bitmask_avx2) { run<MaskedNibbles>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

// Float layouts with AVX2 and FMA: two ymm hold a column of a panel; every output is one fma chain over k.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "store_avx2.inc"
#include "stream.inc"

constexpr int32_t kTokens = 4;   // tokens that share one read of the weights

struct DenseF32 {
    const uint8_t* at;
    DenseF32(const uint8_t* body, size_t) : at(body) {}
    void next(__m256& low, __m256& high) {
        prefetch(at + kAhead);
        low = _mm256_load_ps(reinterpret_cast<const float*>(at));
        high = _mm256_load_ps(reinterpret_cast<const float*>(at) + 8);
        at += 64;
    }
};

struct DenseF16 {
    const uint8_t* at;
    DenseF16(const uint8_t* body, size_t) : at(body) {}
    void next(__m256& low, __m256& high) {
        prefetch(at + kAhead);
        low = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
        high = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(at) + 1));
        at += 32;
    }
};

struct BitmaskF32 {
    Chunks<uint16_t> chunks;
    BitmaskF32(const uint8_t* body, size_t header) : chunks(body, header) {}
    __m256 place(uint32_t kept) {
        const __m128i control = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.low[kept]));
        const __m256i from = _mm256_cvtepi8_epi32(control);  // negative where nothing is kept
        const __m256 values = _mm256_loadu_ps(reinterpret_cast<const float*>(chunks.at));
        chunks.at += 4 * _mm_popcnt_u32(kept);
        const __m256 pruned = _mm256_castsi256_ps(_mm256_srai_epi32(from, 31));
        return _mm256_andnot_ps(pruned, _mm256_permutevar8x32_ps(values, from));
    }
    void next(__m256& low, __m256& high) {
        const uint32_t kept = chunks.next();
        low = place(kept & 255);
        high = place(kept >> 8);
    }
};

template <class Columns, int T>
void tile(Columns columns, const PackedMatrix& w, const Activations& x, int32_t first, int32_t panel, float* y,
          size_t ldy) {
    const float* in = x.x + static_cast<size_t>(first) * x.ldx;
    __m256 low[T], high[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) low[t] = high[t] = _mm256_setzero_ps();
    for (int32_t j = 0; j < w.k; ++j) {
        __m256 a, b;
        columns.next(a, b);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const __m256 value = _mm256_set1_ps(in[static_cast<size_t>(t) * x.ldx + j]);
            low[t] = _mm256_fmadd_ps(value, a, low[t]);
            high[t] = _mm256_fmadd_ps(value, b, high[t]);
        }
    }
    const int32_t row = panel * kPanelRows;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        float* to = y + static_cast<size_t>(first + t) * ldy + row;
        store_part(to, w.n - row, low[t]);
        store_part(to + 8, w.n - row - 8, high[t]);
    }
}

template <class Columns>
void tokens(Columns start, const PackedMatrix& w, const Activations& x, int32_t panel, float* y, size_t ldy) {
    int32_t t = 0;
    for (; t + kTokens <= x.m; t += kTokens) tile<Columns, kTokens>(start, w, x, t, panel, y, ldy);
    switch (x.m - t) {
        case 1: return tile<Columns, 1>(start, w, x, t, panel, y, ldy);
        case 2: return tile<Columns, 2>(start, w, x, t, panel, y, ldy);
        case 3: return tile<Columns, 3>(start, w, x, t, panel, y, ldy);
        default: return;
    }
}

// Many tokens read panels that were decoded once into scratch; dense f32 is read where it lies.
template <class Columns>
void run(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end, void* scratch) {
    auto* decoded = static_cast<float*>(scratch);
    for (int32_t p = begin; p < end; ++p) {
        Columns columns(w.data + w.offset[p], 0);
        if (x.m <= kTokens) {
            tokens(columns, w, x, p, y, ldy);
            continue;
        }
        for (int32_t j = 0; j < w.k; ++j) {
            __m256 low, high;
            columns.next(low, high);
            _mm256_store_ps(decoded + static_cast<size_t>(j) * 16, low);
            _mm256_store_ps(decoded + static_cast<size_t>(j) * 16 + 8, high);
        }
        tokens(DenseF32(static_cast<const uint8_t*>(scratch), 0), w, x, p, y, ldy);
    }
}

}  // namespace

PARING_RUN(run_f32_dense_avx2) {
    static_cast<void>(scratch);
    for (int32_t p = begin; p < end; ++p) tokens(DenseF32(w.data + w.offset[p], 0), w, x, p, y, ldy);
}
PARING_RUN(run_f16_dense_avx2) { run<DenseF16>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_f32_bitmask_avx2) { run<BitmaskF32>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

// Float layouts with AVX-512: one zmm holds a column of a panel; every output is one fma chain over k.
#include "intrinsics.h"

#include "rows.h"

namespace paring::kernels {
namespace {

#include "stream.inc"

constexpr int32_t kTokens = 8;      // tokens that share one read of the weights

struct DenseF32 {
    const uint8_t* at;
    DenseF32(const uint8_t* body, size_t) : at(body) {}
    __m512 next() {
        const __m512 w = _mm512_load_ps(at);
        prefetch(at + kAhead);
        at += 64;
        return w;
    }
};

struct DenseF16 {
    const uint8_t* at;
    DenseF16(const uint8_t* body, size_t) : at(body) {}
    __m512 next() {
        const __m512 w = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
        prefetch(at + kAhead);
        at += 32;
        return w;
    }
};

struct BitmaskF32 {
    Chunks<uint16_t> chunks;
    BitmaskF32(const uint8_t* body, size_t header) : chunks(body, header) {}
    __m512 next() {
        const __mmask16 kept = chunks.next();
        const __m512 w = _mm512_maskz_expand_ps(kept, _mm512_loadu_ps(chunks.at));
        chunks.at += 4 * _mm_popcnt_u32(kept);
        return w;
    }
};

// T tokens from `first`, P panels from `panel`.
template <class Columns, int P, int T>
void tile(const Columns* start, const PackedMatrix& w, const Activations& x, int32_t first, int32_t panel, float* y,
          size_t ldy) {
    Columns columns[2] = {start[0], start[P - 1]};
    const float* in = x.x + static_cast<size_t>(first) * x.ldx;
    __m512 acc[P][T];
    for (int p = 0; p < P; ++p)
        for (int t = 0; t < T; ++t) acc[p][t] = _mm512_setzero_ps();
    for (int32_t j = 0; j < w.k; ++j) {
        __m512 weights[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) weights[p] = columns[p].next();
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m512 value = _mm512_set1_ps(in[static_cast<size_t>(t) * x.ldx + j]);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) acc[p][t] = _mm512_fmadd_ps(value, weights[p], acc[p][t]);
        }
    }
    for (int p = 0; p < P; ++p) {
        const int32_t row = (panel + p) * kPanelRows, left = w.n - row;
        const auto live = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1);
        for (int t = 0; t < T; ++t)
            _mm512_mask_storeu_ps(y + static_cast<size_t>(first + t) * ldy + row, live, acc[p][t]);
    }
}

template <class Columns, int P>
void tokens(const Columns* start, const PackedMatrix& w, const Activations& x, int32_t panel, float* y, size_t ldy) {
    int32_t t = 0;
    for (; t + kTokens <= x.m; t += kTokens) tile<Columns, P, kTokens>(start, w, x, t, panel, y, ldy);
    if (x.m & 4) tile<Columns, P, 4>(start, w, x, t, panel, y, ldy);
    t += x.m & 4;
    if (x.m & 2) tile<Columns, P, 2>(start, w, x, t, panel, y, ldy);
    t += x.m & 2;
    if (x.m & 1) tile<Columns, P, 1>(start, w, x, t, panel, y, ldy);
}

// Decodes `P` panels once when many tokens will read them; dense f32 is read where it lies.
template <class Columns, int P>
void panels(const PackedMatrix& w, const Activations& x, int32_t panel, float* y, size_t ldy, void* scratch) {
    const Columns start[2] = {Columns(w.data + w.offset[panel], 0), Columns(w.data + w.offset[panel + P - 1], 0)};
    if (x.m <= kTokens) return tokens<Columns, P>(start, w, x, panel, y, ldy);
    auto* decoded = static_cast<float*>(scratch);
    const size_t size = static_cast<size_t>(w.k) * 16;
    for (int p = 0; p < P; ++p) {
        Columns columns = start[p];
        float* to = decoded + p * size;
        for (int32_t j = 0; j < w.k; ++j, to += 16) _mm512_store_ps(to, columns.next());
    }
    const auto* bytes = static_cast<const uint8_t*>(scratch);
    const DenseF32 dense[2] = {DenseF32(bytes, 0), DenseF32(bytes + (P - 1) * size * 4, 0)};
    tokens<DenseF32, P>(dense, w, x, panel, y, ldy);
}

template <>
void panels<DenseF32, 1>(const PackedMatrix& w, const Activations& x, int32_t panel, float* y, size_t ldy, void*) {
    const DenseF32 start[2] = {DenseF32(w.data + w.offset[panel], 0), DenseF32(w.data + w.offset[panel], 0)};
    tokens<DenseF32, 1>(start, w, x, panel, y, ldy);
}

template <>
void panels<DenseF32, 2>(const PackedMatrix& w, const Activations& x, int32_t panel, float* y, size_t ldy, void*) {
    const DenseF32 start[2] = {DenseF32(w.data + w.offset[panel], 0), DenseF32(w.data + w.offset[panel + 1], 0)};
    tokens<DenseF32, 2>(start, w, x, panel, y, ldy);
}

template <class Columns>
void run(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end, void* scratch) {
    // Two panels at once hide the latency of the fma chains; float panels are long enough for two streams.
    int32_t p = begin;
    for (; p + 2 <= end; p += 2) panels<Columns, 2>(w, x, p, y, ldy, scratch);
    if (p < end) panels<Columns, 1>(w, x, p, y, ldy, scratch);
}

}  // namespace

PARING_RUN(run_f32_dense_avx512) { run<DenseF32>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_f16_dense_avx512) { run<DenseF16>(w, x, y, ldy, begin, end, scratch); }
PARING_RUN(run_f32_bitmask_avx512) { run<BitmaskF32>(w, x, y, ldy, begin, end, scratch); }

}  // namespace paring::kernels

// Everything of a decoder that is not a linear: norms, rope, gates, attention over a paged cache.
//
// The code is plain C++ on vectors of 16 floats (body.inc), compiled once per instruction set. Sums
// run in 16 fixed lanes and nothing is contracted, so every row gives the same bits, whatever the
// thread count and however many tokens come at once.
//
// This header is included by instruction-set units: plain structs and declarations only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paring::ops {

constexpr int64_t kPage = 64;     // tokens in a page of the cache
constexpr int64_t kChunk = 128;   // keys whose softmax is taken together; chunks merge in order
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kLanes = 16;

enum class NormKind : uint8_t { rms, layer };
enum class Curve : uint8_t { silu, gelu, gelu_tanh, relu };
enum class KvType : uint8_t { f32, f16, int8 };

// What a unit of an instruction set does not inline would be a weak symbol in its code.
#define PARING_ALWAYS __attribute__((always_inline))

PARING_ALWAYS constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
PARING_ALWAYS constexpr size_t kv_bytes(KvType type) {
    return type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1;
}

// Where a cache index keeps its keys and values inside every page: per kv head a key block
// [head_dim][kPage], then a value block [kPage][head_dim rounded up to kLanes]. int8 has pairs: keys
// [head_dim / 2][kPage][2], values [kPage / 2][..][2]; and adds what one step of each token's integers is worth: f32
// [kPage] for keys, then [kPage] for values.
struct KvLayout {
    KvType type;
    int64_t kv_heads, head_dim;
    size_t offset;  // bytes from the start of a page
    // int8 only, [kv_heads]: the scales to store by; null: the largest value of each token decides.
    const float* key_scales;
    const float* value_scales;

    PARING_ALWAYS constexpr int64_t padded() const { return round_up(head_dim, kLanes); }
    PARING_ALWAYS constexpr size_t key_bytes() const {
        return static_cast<size_t>(round_up(head_dim, 2) * kPage) * kv_bytes(type);
    }
    PARING_ALWAYS constexpr size_t value_bytes() const {
        return static_cast<size_t>(padded() * kPage) * kv_bytes(type);
    }
    PARING_ALWAYS constexpr size_t scale_bytes() const {
        return type == KvType::int8 ? 2 * kPage * sizeof(float) : 0;
    }
    PARING_ALWAYS constexpr size_t head_bytes() const { return key_bytes() + value_bytes() + scale_bytes(); }
    PARING_ALWAYS constexpr size_t bytes() const { return head_bytes() * static_cast<size_t>(kv_heads); }
};
#undef PARING_ALWAYS

// Attention of m tokens whose first stands at `position`; their keys and values are stored already.
// Row t of q is at q + t * q_stride, head h of it at + h * head_dim; likewise out.
struct Attention {
    KvLayout layout;
    uint8_t* const* pages;
    const float* q;
    size_t q_stride;
    float* out;
    size_t out_stride;
    int64_t heads;
    int64_t position;
    float scale;
    // Partial results, written by attend_chunk and read by merge, for token t, head h, chunk c:
    // [padded head_dim] weighted values, then the maximum and the sum of the exponentials.
    float* partial;
    int64_t chunks;
    // The block of keys and values that is read after this sequence's, and how many tokens its page has; or null.
    const uint8_t* next;
    int64_t next_count;

    constexpr int64_t partial_width() const { return layout.padded() + 2; }
    float* partial_at(int64_t token, int64_t head, int64_t chunk) const {
        return partial + ((token * heads + head) * chunks + chunk) * partial_width();
    }
};

struct OpsRow {
    const char* name;
    // y = weight * x / sqrt(mean(x^2) + eps) for rms; (x - mean) / sqrt(var + eps) for layer.
    // `bias` may be null. y may be x.
    void (*norm)(NormKind kind, const float* x, const float* weight, const float* bias, float eps,
                 int64_t n, float* y);
    // Turns the first 2 * half dimensions of every head by the angles of cos and sin [half]. y may
    // be x. Pairs (i, i + half), or (2i, 2i + 1) if interleaved.
    void (*rope)(const float* x, const float* cos, const float* sin, int64_t heads,
                 int64_t head_dim, int64_t half, bool interleaved, float* y);
    void (*activation)(Curve curve, const float* x, int64_t n, float* y);
    // `rows` rows of n: curve(gate) * up. Rows of gate and up are `from` floats apart, those of y `to`.
    void (*gate)(Curve curve, const float* gate, const float* up, int64_t from, int64_t n, int64_t rows, float* y,
                 int64_t to);
    void (*add)(const float* a, const float* b, int64_t n, float* y);
    // Puts one kv head of one token (k, v: [head_dim]) into slot `slot` of its page.
    void (*store)(const KvLayout& layout, uint8_t* page, int64_t kv_head, int64_t slot,
                  const float* k, const float* v);
    // All heads that read kv_head, tokens [begin, end), over all their keys.
    void (*attend)(const Attention& a, int64_t kv_head, int64_t begin, int64_t end);
    // The same for one chunk of keys, into `partial`; then merge gives what attend gives.
    void (*attend_chunk)(const Attention& a, int64_t kv_head, int64_t begin, int64_t end,
                         int64_t chunk);
    void (*merge)(const Attention& a, int64_t token, int64_t head);
    // out = row of an f16 matrix as f32.
    void (*widen)(const uint16_t* x, int64_t n, float* y);
};

extern const OpsRow portable_row;
extern const OpsRow avx2_row;
extern const OpsRow avx512_row;
extern const OpsRow avx512_vnni_row;

// The best row whose features (paring::Feature) are all in `features`.
const OpsRow& select_ops(uint32_t features);

}  // namespace paring::ops

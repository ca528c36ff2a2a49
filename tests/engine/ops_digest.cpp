// Prints a digest of what the ops of one row compute on fixed inputs: `ops_digest portable`. Every row on every machine
// must print the same lines. Left out is gelu, whose erf is the C library's.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ops/ops.h"

namespace {

using namespace paring::ops;

class Random {
   public:
    float next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<float>(static_cast<int32_t>(state_ >> 40) - (1 << 23)) / static_cast<float>(1 << 20);
    }
    std::vector<float> floats(int64_t n) {
        std::vector<float> found(static_cast<size_t>(n));
        for (float& x : found) x = next();
        return found;
    }

   private:
    uint64_t state_ = 1;
};

void print(const std::string& what, const std::vector<float>& values) {
    uint64_t digest = 14695981039346656037u;
    for (float value : values) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        digest = (digest ^ bits) * 1099511628211u;
    }
    std::printf("%s %016" PRIx64 "\n", what.c_str(), digest);
}

void elementwise(const OpsRow& row, Random& random) {
    for (int64_t n : {1, 15, 16, 17, 63, 576}) {
        const std::string size = " " + std::to_string(n);
        const std::vector<float> x = random.floats(n), w = random.floats(n), b = random.floats(n);
        std::vector<float> y(x.size());
        row.norm(NormKind::rms, x.data(), w.data(), nullptr, 1e-5F, n, y.data());
        print("rms" + size, y);
        row.norm(NormKind::layer, x.data(), w.data(), b.data(), 1e-5F, n, y.data());
        print("layer" + size, y);
        for (Curve curve : {Curve::silu, Curve::gelu_tanh, Curve::relu}) {
            row.activation(curve, x.data(), n, y.data());
            print("activation " + std::to_string(static_cast<int>(curve)) + size, y);
            row.gate(curve, x.data(), w.data(), 0, n, 1, y.data(), 0);
            print("gate " + std::to_string(static_cast<int>(curve)) + size, y);
        }
        row.add(x.data(), w.data(), n, y.data());
        print("add" + size, y);
        std::vector<uint16_t> halves(x.size());
        for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i * 1009 % 31744);  // finite
        row.widen(halves.data(), n, y.data());
        print("widen" + size, y);
    }
    for (bool interleaved : {false, true})
        for (int64_t half : {1, 8, 10, 32}) {
            const int64_t dim = 64, heads = 3;
            const std::vector<float> x = random.floats(heads * dim), cos = random.floats(half), sin = random.floats(half);
            std::vector<float> y(x.size());
            row.rope(x.data(), cos.data(), sin.data(), heads, dim, half, interleaved, y.data());
            print("rope " + std::to_string(half) + (interleaved ? " interleaved" : ""), y);
        }
}

void attention(const OpsRow& row, Random& random, KvType type, bool scales, int64_t dim, int64_t keys) {
    constexpr int64_t kv_heads = 2, heads = 6, tokens = 3;
    const std::vector<float> steps(kv_heads, 0.06F);
    const float* step = scales ? steps.data() : nullptr;
    const KvLayout layout{type, kv_heads, dim, 0, step, step};
    std::vector<uint8_t*> pages;
    for (int64_t page = 0; page * kPage < keys; ++page) {
        const size_t size = (layout.bytes() + 4096 + 63) / 64 * 64;
        auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, size));
        std::memset(memory, 0, size);
        pages.push_back(memory);
    }
    for (int64_t t = 0; t < keys; ++t)
        for (int64_t head = 0; head < kv_heads; ++head) {
            const std::vector<float> k = random.floats(dim), v = random.floats(dim);
            row.store(layout, pages[static_cast<size_t>(t / kPage)], head, t % kPage, k.data(), v.data());
        }
    const std::vector<float> q = random.floats(tokens * heads * dim);
    std::vector<float> out(q.size());
    Attention a{layout, pages.data(), q.data(), static_cast<size_t>(heads * dim), out.data(),
                static_cast<size_t>(heads * dim), heads, keys - tokens, 0.05F, nullptr, (keys + kChunk - 1) / kChunk, nullptr, 0};
    std::vector<float> partial(static_cast<size_t>(tokens * heads * a.chunks * a.partial_width()));
    a.partial = partial.data();
    const std::string what = "attention " + std::to_string(static_cast<int>(type)) + (scales ? " scales " : " ") +
                             std::to_string(dim) + " " + std::to_string(keys);
    for (int64_t head = 0; head < kv_heads; ++head) row.attend(a, head, 0, tokens);
    print(what, out);
    const std::vector<float> whole = out;
    for (int64_t head = 0; head < kv_heads; ++head)
        for (int64_t chunk = 0; chunk < a.chunks; ++chunk) row.attend_chunk(a, head, 0, tokens, chunk);
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t head = 0; head < heads; ++head) row.merge(a, token, head);
    if (out != whole) {
        std::printf("%s: in chunks it is something else\n", what.c_str());
        std::exit(1);
    }
    for (uint8_t* page : pages) std::free(page);
}

}  // namespace

int main(int count, char** names) {
    const OpsRow* const rows[] = {
        &portable_row,
#if defined(PARING_HAVE_AVX2)
        &avx2_row,
#endif
#if defined(PARING_HAVE_AVX512)
        &avx512_row,
#endif
#if defined(PARING_HAVE_AVX512_VNNI)
        &avx512_vnni_row,
#endif
    };
    for (const OpsRow* row : rows) {
        if (count != 2 || std::strcmp(row->name, names[1]) != 0) continue;
        Random random;
        elementwise(*row, random);
        for (int64_t dim : {20, 64, 128})
            for (int64_t keys : {3, 64, 200}) {
                for (KvType type : {KvType::f32, KvType::f16, KvType::int8})
                    attention(*row, random, type, false, dim, keys);
                attention(*row, random, KvType::int8, true, dim, keys);
            }
        return 0;
    }
    std::fprintf(stderr, "give one of the rows: portable, avx2, avx512, avx512_vnni\n");
    return 2;
}

// Runs a plan: tokens of one sequence or several in, logits out.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "cache.h"
#include "chunk.h"
#include "memory.h"
#include "plan.h"
#include "threads.h"

namespace paring {

// One set of weights with its threads and buffers. Any number of caches (sequences) may share a
// decoder; calls of forward from several threads take turns. Nothing is allocated per token but a
// page of the cache every 64 tokens.
class Decoder {
public:
    // Throws Fault when the graph is not valid.
    Decoder(std::unique_ptr<const Graph> graph, const kernels::KernelRow& kernels,
            uint32_t features, ops::KvType kv, int threads, bool pin);

    // An empty sequence.
    std::shared_ptr<Cache> new_cache() const;
    // Forgets the sequence's tokens from `length` on.
    void truncate(Cache& cache, int64_t length);
    // A sequence that begins with the first `length` tokens of another.
    std::shared_ptr<Cache> fork(const Cache& cache, int64_t length);

    // Appends tokens to sequences, all in one pass over the weights for every 128 tokens. What a
    // sequence gets is what it would get alone. Writes the logits that the parts ask for to
    // `logits`, rows of [vocabulary] in the parts' order; null is right where nobody asks.
    // Throws Fault on no parts, a sequence that is there twice, a part without tokens, a token
    // outside the vocabulary, or a full context; all sequences are then as they were.
    void forward(const std::vector<Part>& parts, float* logits);

    const Graph& graph() const { return *graph_; }
    const kernels::KernelRow& kernels() const { return kernels_; }
    ops::KvType kv() const { return kv_; }
    int threads() const { return pool_.threads(); }
    size_t page_bytes() const { return plan_.page_bytes; }
    size_t buffer_bytes() const { return buffer_bytes_; }

private:
    std::unique_ptr<const Graph> graph_;
    const kernels::KernelRow& kernels_;
    const ops::OpsRow& ops_;
    ops::KvType kv_;
    Plan plan_;
    Pool pool_;  // after what its workers fetch ahead
    std::vector<const std::vector<Range>*> ahead_;  // weights of the first linears from phase i on
    size_t buffer_bytes_ = 0;
    Aligned<float> values_;
    std::vector<float*> slots_;
    Aligned<uint8_t> planes_;            // quantized inputs; each phase lays out its own
    std::vector<size_t> plane_offsets_;  // of each input
    size_t plane_stride_ = 0;            // of the widest: a token's are in the same place in every phase
    std::vector<kernels::Activations> inputs_;
    int64_t bound_ = 0;  // tokens that inputs_ are laid out for
    Aligned<float> turns_;  // cos and sin: [angles][2][chunk][half]
    std::vector<float*> cos_, sin_;
    Aligned<uint8_t> scratch_;
    size_t scratch_bytes_ = 0;
    Aligned<float> gates_;  // what a gate reads: [threads][2][kGated]
    std::vector<const Cache*> taking_part_;
    Chunk chunk_;  // in the works
    std::vector<ops::Attention> attentions_;  // of its spans
    std::vector<std::atomic<int32_t>> unfinished_;  // chunks of keys, of [span][kv head]
    size_t most_kv_heads_ = 0;
    std::vector<float> partials_;

    void look_ahead();
    void allocate();
    void lay_out_planes();
    void bind(int64_t count);
    void check(const std::vector<Part>& parts);
    void set_angles();
    float* run_chunk(float* logits);
    void run(const TokenPhase& phase);
    void run(const LinearPhase& phase);
    void run(const AttentionPhase& phase);
    void run_head(float* logits);
    void linear(const Member& member, int32_t begin, int32_t end, const kernels::Activations& input,
                float* out, size_t stride, int thread);
    void gated(const LinearPhase& phase, const Unit& unit, int64_t begin, int64_t end, int thread);
    void token_step(const TokenStep& step, int64_t begin, int64_t end);
    void store(const AttentionPhase& phase, const Span& span, int64_t t, int64_t kv_head);
    void store_rows(const AttentionPhase& phase, int64_t begin, int64_t end);
    std::atomic<int32_t>& unfinished(size_t span, int64_t kv_head) {
        return unfinished_[span * most_kv_heads_ + static_cast<size_t>(kv_head)];
    }
    ops::Attention attention(const AttentionPhase& phase, const Span& span);

    float* at(Slot slot, int64_t token) const {
        return slots_[static_cast<size_t>(slot)] + token * stride(slot);
    }
    int64_t stride(Slot slot) const { return plan_.widths[static_cast<size_t>(slot)]; }
};

}  // namespace paring

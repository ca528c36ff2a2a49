// Runs a plan: tokens in, logits out.
#pragma once

#include <memory>
#include <vector>

#include "cache.h"
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
            uint32_t features, ops::KvType kv, int threads);

    // An empty sequence.
    std::shared_ptr<Cache> new_cache() const;
    // Forgets the sequence's tokens from `length` on.
    void truncate(Cache& cache, int64_t length);

    // Appends `count` tokens to the sequence. Writes to `logits` the logits after each of them
    // [count, vocabulary], after the last one [vocabulary] if `last_only`, or none if it is null.
    // Throws Fault on an empty input, a token outside the vocabulary, or a full context; the cache
    // is then as it was.
    void forward(Cache& cache, const int64_t* tokens, int64_t count, bool last_only, float* logits);

    const Graph& graph() const { return *graph_; }
    const kernels::KernelRow& kernels() const { return kernels_; }
    ops::KvType kv() const { return kv_; }
    int threads() const { return pool_.threads(); }
    size_t page_bytes() const { return plan_.page_bytes; }
    size_t buffer_bytes() const { return buffer_bytes_; }

private:
    // Tokens [0, count) of a chunk, whose first stands at `position`.
    struct Chunk {
        const int64_t* tokens;
        int64_t count;
        int64_t position;
        Cache* cache;
    };

    std::unique_ptr<const Graph> graph_;
    const kernels::KernelRow& kernels_;
    const ops::OpsRow& ops_;
    ops::KvType kv_;
    Pool pool_;
    Plan plan_;
    size_t buffer_bytes_ = 0;
    Aligned<float> values_;
    std::vector<float*> slots_;
    Aligned<uint8_t> planes_;            // quantized inputs; each phase lays out its own
    std::vector<size_t> plane_offsets_;  // of each input
    std::vector<kernels::Activations> inputs_;
    int64_t bound_ = 0;  // tokens that inputs_ are laid out for
    Aligned<float> turns_;  // cos and sin: [angles][2][chunk][half]
    std::vector<float*> cos_, sin_;
    Aligned<uint8_t> scratch_;
    size_t scratch_bytes_ = 0;
    std::vector<float> partials_;

    void allocate();
    void lay_out_planes();
    void bind(int64_t count);
    void set_angles(const Chunk& chunk);
    void run(const TokenPhase& phase, const Chunk& chunk);
    void run(const LinearPhase& phase, const Chunk& chunk);
    void run(const AttentionPhase& phase, const Chunk& chunk);
    void run_head(const Chunk& chunk, bool last_only, float* logits);
    void linear(const Member& member, const Unit& unit, const kernels::Activations& input,
                float* out, size_t stride, int thread);
    void token_step(const TokenStep& step, const Chunk& chunk, int64_t begin, int64_t end);

    float* at(Slot slot, int64_t token) const {
        return slots_[static_cast<size_t>(slot)] + token * stride(slot);
    }
    int64_t stride(Slot slot) const { return plan_.widths[static_cast<size_t>(slot)]; }
};

}  // namespace paring

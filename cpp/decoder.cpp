#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "fault.h"

namespace paring {
namespace {

using kernels::Activations;

constexpr int64_t kTokens = 128;     // most tokens that go through the plan together
constexpr int64_t kSplitTokens = 4;  // up to here attention is split by chunks of keys as well
constexpr int64_t kTokenBlock = 16;  // tokens of a unit of attention
constexpr int64_t kMergeAlone = 8;   // from so many chunks on, merging is worth a fork-join
constexpr size_t kAlign = 64;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

Decoder::Decoder(std::unique_ptr<const Graph> graph, const kernels::KernelRow& kernels,
                 uint32_t features, ops::KvType kv, int threads)
    : graph_(std::move(graph)),
      kernels_(kernels),
      ops_(ops::select_ops(features)),
      kv_(kv),
      pool_(threads),
      plan_(make_plan(*graph_, kv, threads)) {
    allocate();
}

void Decoder::truncate(Cache& cache, int64_t length) {
    const auto turn = pool_.enter();
    cache.truncate(length);
}

std::shared_ptr<Cache> Decoder::new_cache() const {
    return std::make_shared<Cache>(plan_.page_bytes, graph_->sizes.context);
}

// --- buffers -----------------------------------------------------------------------------------

void Decoder::allocate() {
    size_t floats = 0;
    for (const int64_t width : plan_.widths) floats += static_cast<size_t>(width * kTokens);
    values_ = allocate_aligned<float>(floats);
    float* next = values_.get();
    for (const int64_t width : plan_.widths) {
        slots_.push_back(next);
        next += width * kTokens;
    }
    size_t turns = 0;
    for (const Angles& angles : plan_.angles)
        turns += 2 * angles.inv_freq->size() * static_cast<size_t>(kTokens);
    turns_ = allocate_aligned<float>(turns);
    next = turns_.get();
    for (const Angles& angles : plan_.angles) {
        const auto size = static_cast<int64_t>(angles.inv_freq->size()) * kTokens;
        cos_.push_back(next);
        sin_.push_back(next + size);
        next += 2 * size;
    }
    lay_out_planes();
    const auto threads = static_cast<size_t>(pool_.threads());
    scratch_ = allocate_aligned<uint8_t>(scratch_bytes_ * threads);
    buffer_bytes_ += (floats + turns) * sizeof(float) + scratch_bytes_ * threads;
}

void Decoder::lay_out_planes() {
    plane_offsets_.assign(plan_.inputs.size(), 0);
    inputs_.resize(plan_.inputs.size());
    size_t most = 0;
    auto place = [&](const LinearPhase& phase) {
        size_t used = 0;
        std::vector<size_t> placed;
        for (const Member& member : phase.members) {
            scratch_bytes_ =
                std::max(scratch_bytes_, aligned(kernels::run_scratch_bytes(*member.matrix)));
            if (std::find(placed.begin(), placed.end(), member.input) != placed.end()) continue;
            placed.push_back(member.input);
            const LinearInput& input = plan_.inputs[member.input];
            plane_offsets_[member.input] = used;
            used += aligned(kernels::activation_bytes(input.spec, kTokens, input.width));
        }
        most = std::max(most, used);
    };
    for (const Phase& phase : plan_.phases)
        if (const auto* linears = std::get_if<LinearPhase>(&phase)) place(*linears);
    place(plan_.head);
    planes_ = allocate_aligned<uint8_t>(most);
    buffer_bytes_ += most;
}

// Lays the quantized inputs out for `count` tokens; the head's comes last and binds itself.
void Decoder::bind(int64_t count) {
    if (bound_ == count) return;
    for (size_t i = 0; i + 1 < plan_.inputs.size(); ++i) {
        const LinearInput& input = plan_.inputs[i];
        inputs_[i] = kernels::bind_activations(planes_.get() + plane_offsets_[i], input.spec,
                                               at(input.slot, 0),
                                               static_cast<size_t>(stride(input.slot)),
                                               static_cast<int32_t>(count), input.width);
    }
    bound_ = count;
}

// As Hugging Face computes it: the angle is a float32 product.
void Decoder::set_angles(const Chunk& chunk) {
    for (size_t i = 0; i < plan_.angles.size(); ++i) {
        const Vector& inv_freq = *plan_.angles[i].inv_freq;
        float *cos = cos_[i], *sin = sin_[i];
        for (int64_t t = 0; t < chunk.count; ++t) {
            for (const float frequency : inv_freq) {
                const float angle = static_cast<float>(chunk.position + t) * frequency;
                *cos++ = std::cos(angle) * plan_.angles[i].scale;
                *sin++ = std::sin(angle) * plan_.angles[i].scale;
            }
        }
    }
}

// --- forward -----------------------------------------------------------------------------------

void Decoder::forward(Cache& cache, const int64_t* tokens, int64_t count, bool last_only,
                      float* logits) {
    require(count > 0, "there are no tokens; give at least one");
    const int64_t vocabulary = graph_->sizes.vocabulary;
    for (int64_t t = 0; t < count; ++t)
        require(tokens[t] >= 0 && tokens[t] < vocabulary,
                "token " + std::to_string(t) + " is " + std::to_string(tokens[t]) +
                    ", outside the vocabulary of " + std::to_string(vocabulary));
    const auto turn = pool_.enter();
    cache.reserve(count);
    const int64_t chunks = (cache.length() + count) / ops::kChunk + 1;
    const auto partials = static_cast<size_t>(kSplitTokens * chunks * plan_.most_partials);
    if (partials_.size() < partials) partials_.resize(2 * partials);
    for (int64_t done = 0; done < count; done += kTokens) {
        const Chunk chunk{tokens + done, std::min(kTokens, count - done), cache.length(), &cache};
        bind(chunk.count);
        set_angles(chunk);
        for (const Phase& phase : plan_.phases)
            std::visit([&](const auto& fields) { run(fields, chunk); }, phase);
        cache.advance(chunk.count);
        if (!logits) continue;
        if (!last_only)
            run_head(chunk, false, logits + done * vocabulary);
        else if (done + chunk.count == count)
            run_head(chunk, true, logits);
    }
}

void Decoder::run(const TokenPhase& phase, const Chunk& chunk) {
    const int64_t block =
        chunk.count < 4 ? chunk.count
                        : std::max<int64_t>(1, chunk.count / (4 * pool_.threads()));
    pool_.run((chunk.count + block - 1) / block, [&](int64_t unit, int) {
        const int64_t begin = unit * block, end = std::min(begin + block, chunk.count);
        for (const TokenStep& step : phase.steps) token_step(step, chunk, begin, end);
    });
}

void Decoder::token_step(const TokenStep& step, const Chunk& chunk, int64_t begin, int64_t end) {
    auto each = [&](auto&& act) {
        for (int64_t t = begin; t < end; ++t) act(t);
    };
    if (const auto* s = std::get_if<QuantizeStep>(&step)) {
        kernels_.quantize(inputs_[s->input], static_cast<int32_t>(begin),
                          static_cast<int32_t>(end));
    } else if (const auto* s = std::get_if<NormStep>(&step)) {
        each([&](int64_t t) {
            ops_.norm(s->kind, at(s->in, t), s->weight, s->bias, s->eps, s->width, at(s->out, t));
        });
    } else if (const auto* s = std::get_if<RopeStep>(&step)) {
        const auto half = static_cast<int64_t>(plan_.angles[s->angles].inv_freq->size());
        const float *cos = cos_[s->angles], *sin = sin_[s->angles];
        each([&](int64_t t) {
            ops_.rope(at(s->in, t), cos + t * half, sin + t * half, s->heads, s->head_dim, half,
                      s->interleaved, at(s->out, t));
        });
    } else if (const auto* s = std::get_if<GateStep>(&step)) {
        each([&](int64_t t) {
            ops_.gate(s->curve, at(s->gate, t), at(s->up, t), s->width, at(s->out, t));
        });
    } else if (const auto* s = std::get_if<AddStep>(&step)) {
        each([&](int64_t t) { ops_.add(at(s->a, t), at(s->b, t), s->width, at(s->out, t)); });
    } else if (const auto* s = std::get_if<ActivationStep>(&step)) {
        each([&](int64_t t) { ops_.activation(s->curve, at(s->in, t), s->width, at(s->out, t)); });
    } else if (const auto* s = std::get_if<EmbeddingStep>(&step)) {
        each([&](int64_t t) { s->table->row(ops_, chunk.tokens[t], at(s->out, t)); });
    }
}

void Decoder::linear(const Member& member, const Unit& unit, const Activations& input, float* out,
                     size_t stride, int thread) {
    const kernels::PackedMatrix& matrix = *member.matrix;
    kernels_.run[static_cast<size_t>(matrix.layout)](
        matrix, input, out, stride, unit.begin, unit.end,
        scratch_.get() + scratch_bytes_ * static_cast<size_t>(thread));
    if (!member.bias) return;
    const int64_t first = int64_t{unit.begin} * kernels::kPanelRows;
    const int64_t last = std::min<int64_t>(int64_t{unit.end} * kernels::kPanelRows, matrix.n);
    for (int64_t t = 0; t < input.m; ++t) {
        float* row = out + static_cast<size_t>(t) * stride + first;
        ops_.add(row, member.bias + first, last - first, row);
    }
}

void Decoder::run(const LinearPhase& phase, const Chunk&) {
    pool_.run(static_cast<int64_t>(phase.units.size()), [&](int64_t index, int thread) {
        const Unit& unit = phase.units[static_cast<size_t>(index)];
        const Member& member = phase.members[unit.member];
        linear(member, unit, inputs_[member.input], at(member.out, 0),
               static_cast<size_t>(stride(member.out)), thread);
    });
}

void Decoder::run_head(const Chunk& chunk, bool last_only, float* logits) {
    const Member& member = plan_.head.members.front();
    const LinearInput& from = plan_.inputs[member.input];
    const int64_t first = last_only ? chunk.count - 1 : 0, count = chunk.count - first;
    const Activations input = kernels::bind_activations(
        planes_.get() + plane_offsets_[member.input], from.spec, at(from.slot, first),
        static_cast<size_t>(stride(from.slot)), static_cast<int32_t>(count), from.width);
    if (from.spec.mode != kernels::InputMode::f32)
        pool_.run(count, [&](int64_t t, int) {
            kernels_.quantize(input, static_cast<int32_t>(t), static_cast<int32_t>(t + 1));
        });
    pool_.run(static_cast<int64_t>(plan_.head.units.size()), [&](int64_t index, int thread) {
        linear(member, plan_.head.units[static_cast<size_t>(index)], input, logits,
               static_cast<size_t>(graph_->sizes.vocabulary), thread);
    });
}

// --- attention ---------------------------------------------------------------------------------

void Decoder::run(const AttentionPhase& phase, const Chunk& chunk) {
    const ops::KvLayout& layout = phase.layout;
    uint8_t* const* pages = chunk.cache->pages();
    auto store = [&](int64_t kv_head, int) {
        for (int64_t t = 0; t < chunk.count; ++t) {
            const int64_t place = chunk.position + t, from = kv_head * layout.head_dim;
            ops_.store(layout, pages[place / ops::kPage], kv_head, place % ops::kPage,
                       at(phase.k, t) + from, at(phase.v, t) + from);
        }
    };
    if (chunk.count == 1)
        for (int64_t head = 0; head < layout.kv_heads; ++head) store(head, 0);
    else
        pool_.run(layout.kv_heads, store);

    ops::Attention a{};
    a.layout = layout;
    a.pages = pages;
    a.q = at(phase.q, 0);
    a.q_stride = static_cast<size_t>(stride(phase.q));
    a.out = at(phase.out, 0);
    a.out_stride = static_cast<size_t>(stride(phase.out));
    a.heads = phase.heads;
    a.position = chunk.position;
    a.scale = phase.scale;
    a.chunks = (chunk.position + chunk.count + ops::kChunk - 1) / ops::kChunk;
    if (chunk.count > kSplitTokens || a.chunks == 1) {
        const int64_t blocks = (chunk.count + kTokenBlock - 1) / kTokenBlock;
        pool_.run(layout.kv_heads * blocks, [&](int64_t unit, int) {
            const int64_t begin = unit / layout.kv_heads * kTokenBlock;
            ops_.attend(a, unit % layout.kv_heads, begin,
                        std::min(begin + kTokenBlock, chunk.count));
        });
        return;
    }
    a.partial = partials_.data();
    pool_.run(layout.kv_heads * a.chunks, [&](int64_t unit, int) {
        ops_.attend_chunk(a, unit % layout.kv_heads, 0, chunk.count, unit / layout.kv_heads);
    });
    const int64_t rows = chunk.count * phase.heads;
    const int64_t block = a.chunks < kMergeAlone ? rows : 1;
    pool_.run((rows + block - 1) / block, [&](int64_t unit, int) {
        for (int64_t row = unit * block; row < std::min((unit + 1) * block, rows); ++row)
            ops_.merge(a, row / phase.heads, row % phase.heads);
    });
}

}  // namespace paring

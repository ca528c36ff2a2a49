#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "fault.h"

namespace paring {
namespace {

using kernels::Activations;

constexpr int64_t kTokens = Chunk::kTokens;
constexpr size_t kAlign = 64;

// From so many tokens for each thread on, threads divide the tokens, not a matrix's rows: what a thread computes then
// stays in its own cache. Each decodes all weights, so there must be work enough for one decoding.
constexpr int64_t kBlockTokens = 32;
constexpr int64_t kBlockStep = 8;  // tokens that kernels take at a time
// Values of a gate's two linears that are computed before the gate is taken: they stay in a first-level cache.
constexpr int64_t kGated = 4096;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The input of tokens [begin, end).
Activations some(const Activations& input, int64_t begin, int64_t end) {
    const auto first = static_cast<size_t>(begin);
    Activations a = input;
    a.m = static_cast<int32_t>(end - begin);
    a.x += first * a.ldx;
    if (a.spec.mode == kernels::InputMode::f32) return a;
    a.hi += first * a.stride;
    a.lo += first * a.stride;
    a.wide += first * a.wide_stride;
    a.scale += first * a.side;
    a.sum += first * a.side;
    return a;
}

}  // namespace

Decoder::Decoder(std::unique_ptr<const Graph> graph, const kernels::KernelRow& kernels,
                 uint32_t features, ops::KvType kv, int threads, bool pin)
    : graph_(std::move(graph)),
      kernels_(kernels),
      ops_(ops::select_ops(features)),
      kv_(kv),
      plan_(make_plan(*graph_, kv, std::max(threads, 1))),  // the pool refuses less
      pool_(threads, pin) {
    look_ahead();
    allocate();
}

void Decoder::truncate(Cache& cache, int64_t length) {
    const auto turn = pool_.enter();
    cache.truncate(length);
}

std::shared_ptr<Cache> Decoder::fork(const Cache& cache, int64_t length) {
    const auto turn = pool_.enter();
    return cache.fork(length);
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
    attentions_.resize(static_cast<size_t>(kTokens));
    for (const Phase& phase : plan_.phases)
        if (const auto* attention = std::get_if<AttentionPhase>(&phase))
            most_kv_heads_ = std::max(most_kv_heads_, static_cast<size_t>(attention->layout.kv_heads));
    unfinished_ = std::vector<std::atomic<int32_t>>(static_cast<size_t>(kTokens) * most_kv_heads_);
    const auto threads = static_cast<size_t>(pool_.threads());
    scratch_ = allocate_aligned<uint8_t>(scratch_bytes_ * threads);
    gates_ = allocate_aligned<float>(2 * kGated * threads);
    buffer_bytes_ += (floats + turns + 2 * kGated * threads) * sizeof(float) + scratch_bytes_ * threads;
}

void Decoder::lay_out_planes() {
    plane_offsets_.assign(plan_.inputs.size(), 0);
    inputs_.resize(plan_.inputs.size());
    for (const LinearInput& input : plan_.inputs)
        plane_stride_ = std::max(plane_stride_, kernels::activation_bytes(input.spec, input.width));
    const size_t size = aligned(plane_stride_ * static_cast<size_t>(kTokens));
    size_t most = 0;
    auto place = [&](const LinearPhase& phase) {
        size_t used = 0;
        std::vector<size_t> placed;
        for (const Member& member : phase.members) {
            scratch_bytes_ =
                std::max(scratch_bytes_, aligned(kernels::run_scratch_bytes(*member.matrix)));
            if (std::find(placed.begin(), placed.end(), member.input) != placed.end()) continue;
            placed.push_back(member.input);
            plane_offsets_[member.input] = used;
            used += size;
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
        inputs_[i] = kernels::bind_activations(planes_.get() + plane_offsets_[i], plane_stride_, input.spec,
                                               at(input.slot, 0), static_cast<size_t>(stride(input.slot)),
                                               static_cast<int32_t>(count), input.width);
    }
    bound_ = count;
}

// As Hugging Face computes it: the angle is a float32 product.
void Decoder::set_angles() {
    for (size_t i = 0; i < plan_.angles.size(); ++i) {
        const Vector& inv_freq = *plan_.angles[i].inv_freq;
        float *cos = cos_[i], *sin = sin_[i];
        for (const int64_t position : chunk_.positions()) {
            for (const float frequency : inv_freq) {
                const float angle = static_cast<float>(position) * frequency;
                *cos++ = std::cos(angle) * plan_.angles[i].scale;
                *sin++ = std::sin(angle) * plan_.angles[i].scale;
            }
        }
    }
}

// While phase i runs, idle workers fetch ahead_[i + 1]; behind the head the next token begins.
void Decoder::look_ahead() {
    ahead_.assign(plan_.phases.size() + 1, &plan_.head.weights);
    for (size_t i = plan_.phases.size(); i-- > 0;) {
        const auto* linears = std::get_if<LinearPhase>(&plan_.phases[i]);
        ahead_[i] = linears ? &linears->weights : ahead_[i + 1];
    }
}

// --- forward -----------------------------------------------------------------------------------

// All that can be wrong with a call, before anything is changed. Call only under enter().
void Decoder::check(const std::vector<Part>& parts) {
    require(!parts.empty(), "there are no sequences; give at least one");
    const int64_t vocabulary = graph_->sizes.vocabulary;
    for (size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        const std::string place =
            parts.size() == 1 ? "" : "sequence " + std::to_string(i) + " of the batch: ";
        require(part.count > 0, place + "there are no tokens; give at least one");
        for (int64_t t = 0; t < part.count; ++t)
            require(part.tokens[t] >= 0 && part.tokens[t] < vocabulary,
                    place + "token " + std::to_string(t) + " is " +
                        std::to_string(part.tokens[t]) + ", outside the vocabulary of " +
                        std::to_string(vocabulary));
        try {
            part.cache->check_room(part.count);
        } catch (const Fault& fault) {
            throw Fault(place + fault.what());
        }
    }
    taking_part_.clear();
    for (const Part& part : parts) taking_part_.push_back(part.cache);
    std::sort(taking_part_.begin(), taking_part_.end());
    require(std::adjacent_find(taking_part_.begin(), taking_part_.end()) == taking_part_.end(),
            "a sequence is in the batch twice; it takes part once");
}

void Decoder::forward(const std::vector<Part>& parts, float* logits) {
    const auto turn = pool_.enter();
    check(parts);
    // All memory is taken before anything is computed.
    for (const Part& part : parts) part.cache->reserve(part.count);
    chunk_.reserve(parts);
    const auto partials = static_cast<size_t>(chunk_.most_partials() * plan_.most_partials);
    if (partials_.size() < partials) partials_.resize(2 * partials);
    chunk_.clear();
    for (const Part& part : parts) {
        for (int64_t done = 0, count; done < part.count; done += count) {
            count = std::min(part.count - done, kTokens - chunk_.count());
            chunk_.add(part, done, count);
            if (chunk_.count() == kTokens) logits = run_chunk(logits);
        }
    }
    if (chunk_.count() > 0) run_chunk(logits);
}

// The chunk through all phases; returns where the next one's logits go.
float* Decoder::run_chunk(float* logits) {
    bind(chunk_.count());
    set_angles();
    for (size_t i = 0; i < plan_.phases.size(); ++i) {
        pool_.expect(*ahead_[i + 1]);
        std::visit([&](const auto& fields) { run(fields); }, plan_.phases[i]);
    }
    for (const Span& span : chunk_.spans()) span.cache->advance(span.count);
    const auto rows = static_cast<int64_t>(chunk_.wanted().size());
    pool_.expect(*ahead_[0]);
    if (rows > 0) run_head(logits);
    chunk_.clear();
    return rows > 0 ? logits + rows * graph_->sizes.vocabulary : logits;
}

void Decoder::run(const TokenPhase& phase) {
    const int64_t count = chunk_.count();
    const int64_t block =
        count < 4 ? count : std::max<int64_t>(1, count / (4 * pool_.threads()));
    pool_.run((count + block - 1) / block, [&](int64_t unit, int) {
        const int64_t begin = unit * block, end = std::min(begin + block, count);
        for (const TokenStep& step : phase.steps) token_step(step, begin, end);
    });
}

void Decoder::token_step(const TokenStep& step, int64_t begin, int64_t end) {
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
            ops_.gate(s->curve, at(s->gate, t), at(s->up, t), 0, s->width, 1, at(s->out, t), 0);
        });
    } else if (const auto* s = std::get_if<AddStep>(&step)) {
        each([&](int64_t t) { ops_.add(at(s->a, t), at(s->b, t), s->width, at(s->out, t)); });
    } else if (const auto* s = std::get_if<ActivationStep>(&step)) {
        each([&](int64_t t) { ops_.activation(s->curve, at(s->in, t), s->width, at(s->out, t)); });
    } else if (const auto* s = std::get_if<EmbeddingStep>(&step)) {
        const std::vector<int64_t>& tokens = chunk_.tokens();
        each([&](int64_t t) {
            s->table->row(ops_, tokens[static_cast<size_t>(t)], at(s->out, t));
        });
    }
}

void Decoder::linear(const Member& member, int32_t begin, int32_t end, const Activations& input, float* out,
                     size_t stride, int thread) {
    const kernels::PackedMatrix& matrix = *member.matrix;
    kernels_.run[static_cast<size_t>(matrix.layout)](
        matrix, input, out, stride, begin, end,
        scratch_.get() + scratch_bytes_ * static_cast<size_t>(thread));
    if (!member.bias) return;
    const int64_t first = int64_t{begin} * kernels::kPanelRows;
    const int64_t last = std::min<int64_t>(int64_t{end} * kernels::kPanelRows, matrix.n);
    for (int64_t t = 0; t < input.m; ++t) {
        float* row = out + static_cast<size_t>(t) * stride + first;
        ops_.add(row, member.bias + first, last - first, row);
    }
}

// Tokens [begin, end) of a unit of two linears and their gate, some panels at a time.
void Decoder::gated(const LinearPhase& phase, const Unit& unit, int64_t begin, int64_t end, int thread) {
    const int64_t rows = phase.members[0].matrix->n;
    const auto most = static_cast<int32_t>(kGated / kernels::kPanelRows / (end - begin));
    float* values[2] = {gates_.get() + 2 * kGated * thread, gates_.get() + 2 * kGated * thread + kGated};
    for (int32_t panel = unit.begin; panel < unit.end; panel += most) {
        const int32_t last = std::min(panel + most, unit.end);
        const int64_t first = int64_t{panel} * kernels::kPanelRows;
        const int64_t width = int64_t{last - panel} * kernels::kPanelRows;
        for (size_t m = 0; m < 2; ++m) {
            const Member& member = phase.members[m];
            // Kernels count rows from the matrix's first one.
            const auto from = reinterpret_cast<uintptr_t>(values[m]) - static_cast<size_t>(first) * sizeof(float);
            auto* out = reinterpret_cast<float*>(from);
            linear(member, panel, last, some(inputs_[member.input], begin, end), out, static_cast<size_t>(width), thread);
        }
        ops_.gate(phase.gate->curve, values[0], values[1], width, std::min(width, rows - first), end - begin,
                  at(phase.gate->out, begin) + first, stride(phase.gate->out));
    }
}

void Decoder::run(const LinearPhase& phase) {
    const int64_t count = chunk_.count(), units = static_cast<int64_t>(phase.units.size());
    const int64_t blocks = std::clamp<int64_t>(count / kBlockTokens, 1, pool_.threads());
    const int64_t block = ((count + blocks - 1) / blocks + kBlockStep - 1) / kBlockStep * kBlockStep;
    pool_.run(blocks * units, [&](int64_t index, int thread) {
        const int64_t begin = index / units * block, end = std::min(begin + block, count);
        if (begin >= end) return;
        const Unit& unit = phase.units[static_cast<size_t>(index % units)];
        if (phase.gate) return gated(phase, unit, begin, end, thread);
        const Member& member = phase.members[unit.member];
        linear(member, unit.begin, unit.end, some(inputs_[member.input], begin, end), at(member.out, begin),
               static_cast<size_t>(stride(member.out)), thread);
    });
}

// Rows that nobody asks about make room for those that count: the head is the value's last reader.
void Decoder::run_head(float* logits) {
    const Member& member = plan_.head.members.front();
    const LinearInput& from = plan_.inputs[member.input];
    const auto count = static_cast<int64_t>(chunk_.wanted().size());
    for (int64_t t = 0; t < count; ++t) {
        const int64_t row = chunk_.wanted()[static_cast<size_t>(t)];
        if (row != t) std::copy_n(at(from.slot, row), from.width, at(from.slot, t));
    }
    const Activations input = kernels::bind_activations(
        planes_.get() + plane_offsets_[member.input], plane_stride_, from.spec, at(from.slot, 0),
        static_cast<size_t>(stride(from.slot)), static_cast<int32_t>(count), from.width);
    if (from.spec.mode != kernels::InputMode::f32)
        pool_.run(count, [&](int64_t t, int) {
            kernels_.quantize(input, static_cast<int32_t>(t), static_cast<int32_t>(t + 1));
        });
    pool_.run(static_cast<int64_t>(plan_.head.units.size()), [&](int64_t index, int thread) {
        const Unit& unit = plan_.head.units[static_cast<size_t>(index)];
        linear(member, unit.begin, unit.end, input, logits, static_cast<size_t>(graph_->sizes.vocabulary), thread);
    });
}

// --- attention ---------------------------------------------------------------------------------

// Puts keys and values of one kv head of the span's t-th token into the cache.
void Decoder::store(const AttentionPhase& phase, const Span& span, int64_t t, int64_t kv_head) {
    const ops::KvLayout& layout = phase.layout;
    const int64_t from = kv_head * layout.head_dim, place = span.position + t;
    ops_.store(layout, span.cache->pages()[place / ops::kPage], kv_head, place % ops::kPage,
               at(phase.k, span.row + t) + from, at(phase.v, span.row + t) + from);
}

// The same of all kv heads and those of the chunk's rows [begin, end) whose spans have several tokens.
void Decoder::store_rows(const AttentionPhase& phase, int64_t begin, int64_t end) {
    for (const Span& span : chunk_.spans()) {
        if (span.count == 1) continue;
        const int64_t last = std::min(end, span.row + span.count);
        for (int64_t row = std::max(begin, span.row); row < last; ++row)
            for (int64_t kv_head = 0; kv_head < phase.layout.kv_heads; ++kv_head)
                store(phase, span, row - span.row, kv_head);
    }
}

ops::Attention Decoder::attention(const AttentionPhase& phase, const Span& span) {
    ops::Attention a{};
    a.layout = phase.layout;
    a.pages = span.cache->pages();
    a.q = at(phase.q, span.row);
    a.q_stride = static_cast<size_t>(stride(phase.q));
    a.out = at(phase.out, span.row);
    a.out_stride = static_cast<size_t>(stride(phase.out));
    a.heads = phase.heads;
    a.position = span.position;
    a.scale = phase.scale;
    a.chunks = span.key_chunks;
    a.partial = partials_.data() + span.partials * a.heads * a.partial_width();
    return a;
}

// A single token is stored by the unit that reads it; several, which several units read, beforehand. The last unit of
// a kv head to finish merges what all of them found.
void Decoder::run(const AttentionPhase& phase) {
    const std::vector<Span>& spans = chunk_.spans();
    const int64_t kv_heads = phase.layout.kv_heads;
    if (chunk_.count() > static_cast<int64_t>(spans.size()))
        pool_.run((chunk_.count() + kBlockStep - 1) / kBlockStep, [&](int64_t block, int) {
            store_rows(phase, block * kBlockStep, (block + 1) * kBlockStep);
        });
    for (size_t i = 0; i < spans.size(); ++i) {
        attentions_[i] = attention(phase, spans[i]);
        if (i + 1 < spans.size()) {
            attentions_[i].next = spans[i + 1].cache->pages()[0] + phase.layout.offset;
            attentions_[i].next_count = spans[i + 1].position + spans[i + 1].count;
        }
        for (int64_t head = 0; head < kv_heads; ++head)
            unfinished(i, head).store(static_cast<int32_t>(spans[i].key_chunks), std::memory_order_relaxed);
    }
    const std::vector<AttentionUnit>& units = chunk_.units();
    pool_.run(kv_heads * static_cast<int64_t>(units.size()), [&](int64_t index, int) {
        const AttentionUnit& unit = units[static_cast<size_t>(index / kv_heads)];
        const int64_t kv_head = index % kv_heads;
        const Span& span = spans[unit.span];
        const bool all = unit.keys == Chunk::kAllKeys;
        if (span.count == 1 && (all || unit.keys + 1 == span.key_chunks)) store(phase, span, 0, kv_head);
        const ops::Attention& a = attentions_[unit.span];
        if (all) return ops_.attend(a, kv_head, unit.begin, unit.end);
        ops_.attend_chunk(a, kv_head, unit.begin, unit.end, unit.keys);
        if (unfinished(unit.span, kv_head).fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        const int64_t group = phase.heads / kv_heads;
        for (int64_t t = unit.begin; t < unit.end; ++t)
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) ops_.merge(a, t, head);
    });
}

}  // namespace paring

// What the decoder executes: a graph's ops as phases over numbered buffers.
//
// A token phase is a run of ops that treat every token alone (one thread takes a token through all
// of them); a linear phase is every linear that reads one value, as one fork-join; an attention
// phase stores keys and values, then attends. A gate right after its two linears is part of their
// phase. Buffers are shared by values that never live at the same time.
#pragma once

#include <optional>
#include <variant>
#include <vector>

#include "graph.h"
#include "threads.h"

namespace paring {

using Slot = int;

struct EmbeddingStep {
    const Table* table;
    Slot out;
};
struct NormStep {
    ops::NormKind kind;
    const float* weight;
    const float* bias;  // or null
    float eps;
    int64_t width;
    Slot in, out;
};
struct RopeStep {
    size_t angles;  // index of Plan::angles
    int64_t heads, head_dim;
    bool interleaved;
    Slot in, out;
};
struct ActivationStep {
    ops::Curve curve;
    int64_t width;
    Slot in, out;
};
struct GateStep {
    ops::Curve curve;
    int64_t width;
    Slot gate, up, out;
};
struct AddStep {
    int64_t width;
    Slot a, b, out;
};
struct QuantizeStep {
    size_t input;  // index of Plan::inputs
};
using TokenStep =
    std::variant<EmbeddingStep, NormStep, RopeStep, ActivationStep, GateStep, AddStep, QuantizeStep>;

// A value in the form that a linear reads; shared by all linears of a phase with the same spec.
struct LinearInput {
    kernels::InputSpec spec;
    Slot slot;
    int32_t width;
};

struct Member {
    const kernels::PackedMatrix* matrix;
    const float* bias;  // or null
    size_t input;
    Slot out;  // unless a gate takes the value
};

// Panels [begin, end) of one member, or of both that a gate reads: what a thread takes at a time.
struct Unit {
    size_t member;
    int32_t begin, end;
};

// curve(members[0]) * members[1], taken where these were computed; their values are kept nowhere.
struct Gate {
    ops::Curve curve;
    Slot out;
};

struct TokenPhase {
    std::vector<TokenStep> steps;
};
struct LinearPhase {
    std::vector<Member> members;
    std::optional<Gate> gate;
    std::vector<Unit> units;
    std::vector<Range> weights;  // of the units
};
struct AttentionPhase {
    ops::KvLayout layout;
    int64_t heads;
    float scale;
    Slot q, k, v, out;
};
using Phase = std::variant<TokenPhase, LinearPhase, AttentionPhase>;

// Turns of rope: cos and sin of position * inv_freq, times scale.
struct Angles {
    const Vector* inv_freq;
    float scale;
};

struct Plan {
    std::vector<int64_t> widths;  // of each slot, a multiple of ops::kLanes
    std::vector<LinearInput> inputs;
    std::vector<Angles> angles;
    std::vector<Phase> phases;
    LinearPhase head;  // one member, whose `out` is not a slot
    size_t page_bytes;
    int64_t most_partials;  // floats that split attention needs per token and chunk of keys
};

// Throws Fault unless the graph is valid. The plan points into the graph.
Plan make_plan(const Graph& graph, ops::KvType kv, int threads);

}  // namespace paring

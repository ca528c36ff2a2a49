// A graph as the file tells it: typed ops over named values, and the weights they name.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "kernels/kernels.h"
#include "ops/ops.h"

namespace paring {

using Vector = std::vector<float>;

// Whether a matrix of floats holds no Inf or NaN; true for integers.
bool all_finite(const kernels::MatrixSource& source);

// Rows to look tokens up in. Values are borrowed from the caller, or owned when they had to be
// unpacked (bitmask, int4).
class Table {
public:
    // Throws std::invalid_argument, through kernels::validate, when sizes don't fit together.
    explicit Table(const kernels::MatrixSource& source);

    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }
    size_t bytes() const;
    void row(const ops::OpsRow& ops, int64_t index, float* out) const;

private:
    kernels::DType dtype_;  // f32, f16 or i8
    int64_t rows_, columns_, group_ = 0, groups_ = 0;
    const uint8_t* values_;
    std::vector<float> scales_;
    std::vector<uint8_t> owned_;

    void unpack(const kernels::MatrixSource& source);
};

struct Weights {
    std::unordered_map<std::string, Vector> vectors;
    std::unordered_map<std::string, kernels::PackedMatrix> matrices;
    std::unordered_map<std::string, Table> tables;
};

// The ops of docs/architecture.md; fields as in graph.json, an absent name is empty.
struct EmbeddingOp {
    std::string weight, out;
};
struct NormOp {
    ops::NormKind kind;
    std::string weight, bias;
    float eps;
    std::string in, out;
};
struct LinearOp {
    std::string weight, bias, in, out;
};
struct RopeOp {
    std::string in, out;
    int64_t heads, head_dim;
    std::string inv_freq;
    bool interleaved;
    float scale;
};
struct AttentionOp {
    std::string q, k, v, out;
    int64_t heads, kv_heads, head_dim;
    float scale;
    int64_t cache;
    std::string k_scale, v_scale;  // of an int8 cache; both or neither
};
struct GateOp {
    ops::Curve kind;
    std::string gate, up, out;
};
struct ActivationOp {
    ops::Curve kind;
    std::string in, out;
};
struct AddOp {
    std::string a, b, out;
};
struct HeadOp {
    std::string weight, bias, in, out;
};
using Op = std::variant<EmbeddingOp, NormOp, LinearOp, RopeOp, AttentionOp, GateOp, ActivationOp,
                        AddOp, HeadOp>;

struct Sizes {
    int64_t vocabulary, hidden, context, caches;
};

struct Graph {
    Sizes sizes;
    std::vector<Op> ops;
    Weights weights;
};

// Checks everything that running the ops relies on: names written once before they are read,
// widths that agree, weights of the right size and all finite, every cache used once, one head, at
// the end. Returns the width of each value. Throws Fault naming the op.
std::unordered_map<std::string, int64_t> validate(const Graph& graph);

}  // namespace paring

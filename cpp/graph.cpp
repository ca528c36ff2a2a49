// Checks of a graph's ops against its weights.
#include "graph.h"

#include <cmath>

#include "fault.h"

namespace paring {
namespace {

constexpr int64_t kMost = int64_t{1} << 24;  // of anything a graph counts


// Walks the ops once; every check throws with the op's place.
class Checker {
public:
    explicit Checker(const Graph& graph) : graph_(graph), used_(cache_count(graph), false) {}

    std::unordered_map<std::string, int64_t> run() {
        const Sizes& s = graph_.sizes;
        check(s.vocabulary >= 1 && s.vocabulary <= kMost, "vocab_size is out of range");
        check(s.hidden >= 1 && s.hidden <= kMost, "hidden_size is out of range");
        check(s.context >= 1 && s.context <= kMost, "context is out of range");
        for (const Op& op : graph_.ops) {
            check(!headed_, "the head must be the last op");
            std::visit([this](const auto& fields) { visit(fields); }, op);
            ++index_;
        }
        place_ = "ops";
        check(headed_, "there is no head");
        for (size_t cache = 0; cache < used_.size(); ++cache)
            check(used_[cache], "no attention uses cache " + std::to_string(cache));
        return std::move(widths_);
    }

private:
    const Graph& graph_;
    std::unordered_map<std::string, int64_t> widths_;
    std::vector<bool> used_;
    size_t index_ = 0;
    std::string place_ = "model";
    bool headed_ = false;

    static size_t cache_count(const Graph& graph) {
        require(graph.sizes.caches >= 0 && graph.sizes.caches <= 65536,
                "model: caches is out of range");
        return static_cast<size_t>(graph.sizes.caches);
    }

    void check(bool holds, const std::string& what) const {
        if (!holds) throw Fault(place_ + ": " + what);
    }

    void at(const char* op) { place_ = "op " + std::to_string(index_) + " (" + op + ")"; }

    int64_t read(const std::string& name) const {
        const auto found = widths_.find(name);
        check(found != widths_.end(), "reads '" + name + "' before any op has written it");
        return found->second;
    }

    void write(const std::string& name, int64_t width) {
        check(!name.empty(), "has no output");
        check(width >= 1 && width <= kMost, "has an output of width " + std::to_string(width));
        check(widths_.emplace(name, width).second, "writes '" + name + "' a second time");
    }

    const Vector& vector(const std::string& name) const {
        const auto found = graph_.weights.vectors.find(name);
        check(found != graph_.weights.vectors.end(), "there is no vector '" + name + "'");
        for (const float value : found->second)
            check(std::isfinite(value), "vector '" + name + "' has a value that is not finite");
        return found->second;
    }

    void vector_of(const std::string& name, int64_t width) const {
        const auto size = static_cast<int64_t>(vector(name).size());
        check(size == width, "vector '" + name + "' has " + std::to_string(size) +
                                 " values, expected " + std::to_string(width));
    }

    void same(const char* what, int64_t found, int64_t wanted) const {
        check(found == wanted, std::string(what) + " is " + std::to_string(found) +
                                   " wide, expected " + std::to_string(wanted));
    }

    void count(const char* what, int64_t value, int64_t most) const {
        check(value >= 1 && value <= most, std::string(what) + " is " + std::to_string(value) +
                                               "; it must be 1 to " + std::to_string(most));
    }

    int64_t linear(const std::string& weight, const std::string& bias, const std::string& in) {
        const auto found = graph_.weights.matrices.find(weight);
        check(found != graph_.weights.matrices.end(), "there is no matrix '" + weight + "'");
        const kernels::PackedMatrix& matrix = found->second;
        same(("input '" + in + "' of matrix '" + weight + "'").c_str(), read(in), matrix.k);
        if (!bias.empty()) vector_of(bias, matrix.n);
        return matrix.n;
    }

    void visit(const EmbeddingOp& op) {
        at("embedding");
        const auto found = graph_.weights.tables.find(op.weight);
        check(found != graph_.weights.tables.end(), "there is no table '" + op.weight + "'");
        check(found->second.rows() == graph_.sizes.vocabulary,
              "'" + op.weight + "' has " + std::to_string(found->second.rows()) +
                  " rows, but vocab_size is " + std::to_string(graph_.sizes.vocabulary));
        write(op.out, found->second.columns());
    }

    void visit(const NormOp& op) {
        at("norm");
        const int64_t width = read(op.in);
        vector_of(op.weight, width);
        if (!op.bias.empty()) vector_of(op.bias, width);
        check(std::isfinite(op.eps) && op.eps >= 0, "eps must be at least 0 and finite");
        write(op.out, width);
    }

    void visit(const LinearOp& op) {
        at("linear");
        const int64_t width = linear(op.weight, op.bias, op.in);
        write(op.out, width);
    }

    void visit(const RopeOp& op) {
        at("rope");
        count("heads", op.heads, 65536);
        count("head_dim", op.head_dim, ops::kMaxHeadDim);
        same("its input", read(op.in), op.heads * op.head_dim);
        const auto half = static_cast<int64_t>(vector(op.inv_freq).size());
        check(half >= 1 && 2 * half <= op.head_dim,
              "inv_freq has " + std::to_string(half) + " values, expected 1 to half of head_dim");
        check(std::isfinite(op.scale), "scale is not finite");
        write(op.out, op.heads * op.head_dim);
    }

    void visit(const AttentionOp& op) {
        at("attention");
        count("heads", op.heads, 65536);
        count("kv_heads", op.kv_heads, op.heads);
        count("head_dim", op.head_dim, ops::kMaxHeadDim);
        check(op.heads % op.kv_heads == 0, "heads must be a multiple of kv_heads");
        same("q", read(op.q), op.heads * op.head_dim);
        same("k", read(op.k), op.kv_heads * op.head_dim);
        same("v", read(op.v), op.kv_heads * op.head_dim);
        check(std::isfinite(op.scale), "scale is not finite");
        check(op.cache >= 0 && op.cache < graph_.sizes.caches,
              "cache " + std::to_string(op.cache) + " is not one of the model's " +
                  std::to_string(graph_.sizes.caches));
        check(!used_[static_cast<size_t>(op.cache)],
              "cache " + std::to_string(op.cache) + " is used a second time");
        used_[static_cast<size_t>(op.cache)] = true;
        cache_scales(op);
        write(op.out, op.heads * op.head_dim);
    }

    void cache_scales(const AttentionOp& op) const {
        check(op.k_scale.empty() == op.v_scale.empty(), "k_scale and v_scale go together");
        if (op.k_scale.empty()) return;
        for (const std::string* name : {&op.k_scale, &op.v_scale}) {
            vector_of(*name, op.kv_heads);
            for (const float scale : vector(*name))
                check(scale > 0, "'" + *name + "' has a scale that is not positive");
        }
    }

    void visit(const GateOp& op) {
        at("gate");
        const int64_t width = read(op.gate);
        same("up", read(op.up), width);
        write(op.out, width);
    }

    void visit(const ActivationOp& op) {
        at("activation");
        write(op.out, read(op.in));
    }

    void visit(const AddOp& op) {
        at("add");
        const int64_t width = read(op.a);
        same("b", read(op.b), width);
        write(op.out, width);
    }

    void visit(const HeadOp& op) {
        at("head");
        same("the head's output", linear(op.weight, op.bias, op.in), graph_.sizes.vocabulary);
        write(op.out, graph_.sizes.vocabulary);
        headed_ = true;
    }
};

}  // namespace

std::unordered_map<std::string, int64_t> validate(const Graph& graph) {
    return Checker(graph).run();
}

}  // namespace paring

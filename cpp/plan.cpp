#include "plan.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "fault.h"

namespace paring {
namespace {

using kernels::PackedMatrix;

constexpr size_t kUnitBytes = 16384;  // a unit of less isn't worth handing out
constexpr size_t kUnitsPerThread = 4;

// By bytes to read. A gate's two linears, of one shape, go together; the first one's bytes tell where.
std::vector<Unit> split(const LinearPhase& phase, int threads) {
    size_t total = 0;
    for (const Member& member : phase.members) total += member.matrix->bytes;
    const size_t target = std::max(kUnitBytes, total / (kUnitsPerThread * static_cast<size_t>(threads)));
    std::vector<Unit> units;
    for (size_t m = 0; m < (phase.gate ? 1 : phase.members.size()); ++m) {
        const PackedMatrix& matrix = *phase.members[m].matrix;
        const size_t bytes = phase.gate ? total : matrix.bytes;
        const auto wanted = static_cast<int32_t>((bytes + target / 2) / target);
        const int32_t parts = std::clamp(threads == 1 ? 1 : wanted, 1, matrix.panels);
        for (int32_t part = 0; part < parts; ++part) {
            const int32_t begin = kernels::split_panels(matrix, part, parts);
            const int32_t end = kernels::split_panels(matrix, part + 1, parts);
            if (begin < end) units.push_back({m, begin, end});
        }
    }
    return units;
}

std::vector<Range> ranges(const LinearPhase& phase) {
    std::vector<Range> found;
    for (const Unit& unit : phase.units) {
        const size_t last = phase.gate ? phase.members.size() : unit.member + 1;
        for (size_t m = unit.member; m < last; ++m) {
            const PackedMatrix& matrix = *phase.members[m].matrix;
            const auto* data = reinterpret_cast<const char*>(matrix.data);
            found.push_back({data + matrix.offset[unit.begin], matrix.offset[unit.end] - matrix.offset[unit.begin]});
        }
    }
    return found;
}

class Planner {
public:
    Planner(const Graph& graph, ops::KvType kv, int threads)
        : graph_(graph), kv_(kv), threads_(threads), widths_(validate(graph)) {}

    Plan run() {
        lay_out_caches();
        schedule();
        for (; position_ < items_.size(); ++position_) emit(items_[position_]);
        return std::move(plan_);
    }

private:
    // Ops that are emitted together: one, or all linears that read one value.
    using Item = std::vector<const Op*>;

    const Graph& graph_;
    ops::KvType kv_;
    int threads_;
    std::unordered_map<std::string, int64_t> widths_;
    Plan plan_{};
    std::vector<Item> items_;
    size_t position_ = 0;
    std::unordered_map<std::string, size_t> last_use_;  // index of an item
    std::unordered_map<std::string, Slot> slots_;
    std::vector<Slot> free_;
    std::vector<ops::KvLayout> caches_;

    void lay_out_caches() {
        caches_.resize(static_cast<size_t>(graph_.sizes.caches));
        for (const Op& op : graph_.ops)
            if (const auto* a = std::get_if<AttentionOp>(&op))
                caches_[static_cast<size_t>(a->cache)] = {
                    kv_, a->kv_heads, a->head_dim, 0, vector(a->k_scale), vector(a->v_scale)};
        for (ops::KvLayout& cache : caches_) {
            cache.offset = plan_.page_bytes;
            plan_.page_bytes += cache.bytes();
        }
    }

    // A linear moves up to the first one that reads the same value: values are written once, so
    // what it reads is there already.
    void schedule() {
        std::unordered_map<std::string, size_t> groups;
        for (const Op& op : graph_.ops) {
            const auto* linear = std::get_if<LinearOp>(&op);
            if (linear) {
                const auto [at, fresh] = groups.emplace(linear->in, items_.size());
                if (!fresh) {
                    items_[at->second].push_back(&op);
                    continue;
                }
            }
            items_.push_back({&op});
        }
        for (size_t i = 0; i < items_.size(); ++i)
            for (const Op* op : items_[i])
                for (const std::string* name : reads(*op)) last_use_[*name] = i;
    }

    static std::vector<const std::string*> reads(const Op& op) {
        struct {
            std::vector<const std::string*> operator()(const EmbeddingOp&) { return {}; }
            std::vector<const std::string*> operator()(const NormOp& o) { return {&o.in}; }
            std::vector<const std::string*> operator()(const LinearOp& o) { return {&o.in}; }
            std::vector<const std::string*> operator()(const RopeOp& o) { return {&o.in}; }
            std::vector<const std::string*> operator()(const AttentionOp& o) {
                return {&o.q, &o.k, &o.v};
            }
            std::vector<const std::string*> operator()(const GateOp& o) { return {&o.gate, &o.up}; }
            std::vector<const std::string*> operator()(const ActivationOp& o) { return {&o.in}; }
            std::vector<const std::string*> operator()(const AddOp& o) { return {&o.a, &o.b}; }
            std::vector<const std::string*> operator()(const HeadOp& o) { return {&o.in}; }
        } names;
        return std::visit(names, op);
    }

    // --- slots ---------------------------------------------------------------------------------

    Slot in(const std::string& name) const { return slots_.at(name); }

    // A free slot that needs to grow least, or a new one.
    Slot out(const std::string& name) {
        const int64_t width = ops::round_up(widths_.at(name), ops::kLanes);
        auto growth = [&](Slot s) { return std::abs(plan_.widths[static_cast<size_t>(s)] - width); };
        const auto best = std::min_element(
            free_.begin(), free_.end(), [&](Slot a, Slot b) { return growth(a) < growth(b); });
        Slot slot;
        if (best == free_.end()) {
            slot = static_cast<Slot>(plan_.widths.size());
            plan_.widths.push_back(width);
        } else {
            slot = *best;
            free_.erase(best);
            int64_t& kept = plan_.widths[static_cast<size_t>(slot)];
            kept = std::max(kept, width);
        }
        slots_[name] = slot;
        return slot;
    }

    // After this item nobody reads these values; ops that may write in place release first.
    void release(const Op& op) {
        for (const std::string* name : reads(op)) {
            const auto at = slots_.find(*name);
            if (at == slots_.end() || last_use_.at(*name) != position_) continue;
            free_.push_back(at->second);
            slots_.erase(at);
        }
    }

    // --- phases --------------------------------------------------------------------------------

    const float* vector(const std::string& name) const {
        return name.empty() ? nullptr : graph_.weights.vectors.at(name).data();
    }

    void step(TokenStep step) {
        if (plan_.phases.empty() || !std::holds_alternative<TokenPhase>(plan_.phases.back()))
            plan_.phases.emplace_back(TokenPhase{});
        std::get<TokenPhase>(plan_.phases.back()).steps.push_back(step);
    }

    void emit(const Item& item) {
        const Op& op = *item.front();
        if (std::holds_alternative<LinearOp>(op)) return linears(item);
        if (const auto* a = std::get_if<AttentionOp>(&op)) return attention(*a, op);
        if (const auto* h = std::get_if<HeadOp>(&op)) return head(*h);
        std::visit([&](const auto& fields) { token_op(fields, op); }, op);
    }

    void token_op(const EmbeddingOp& o, const Op&) {
        step(EmbeddingStep{&graph_.weights.tables.at(o.weight), out(o.out)});
    }
    void token_op(const NormOp& o, const Op& op) {
        const Slot from = in(o.in);
        release(op);
        step(NormStep{o.kind, vector(o.weight), vector(o.bias), o.eps, widths_.at(o.in), from,
                      out(o.out)});
    }
    void token_op(const RopeOp& o, const Op& op) {
        const Slot from = in(o.in);
        release(op);
        step(RopeStep{angles(o), o.heads, o.head_dim, o.interleaved, from, out(o.out)});
    }
    void token_op(const GateOp& o, const Op& op) {
        const Slot gate = in(o.gate), up = in(o.up);
        release(op);
        step(GateStep{o.kind, widths_.at(o.gate), gate, up, out(o.out)});
    }
    void token_op(const ActivationOp& o, const Op& op) {
        const Slot from = in(o.in);
        release(op);
        step(ActivationStep{o.kind, widths_.at(o.in), from, out(o.out)});
    }
    void token_op(const AddOp& o, const Op& op) {
        const Slot a = in(o.a), b = in(o.b);
        release(op);
        step(AddStep{widths_.at(o.a), a, b, out(o.out)});
    }
    // Emitted by emit() itself.
    void token_op(const LinearOp&, const Op&) {}
    void token_op(const AttentionOp&, const Op&) {}
    void token_op(const HeadOp&, const Op&) {}

    size_t angles(const RopeOp& o) {
        const Vector* inv_freq = &graph_.weights.vectors.at(o.inv_freq);
        for (size_t i = 0; i < plan_.angles.size(); ++i)
            if (*plan_.angles[i].inv_freq == *inv_freq && plan_.angles[i].scale == o.scale)
                return i;
        plan_.angles.push_back({inv_freq, o.scale});
        return plan_.angles.size() - 1;
    }

    // Index of the input that `matrix` wants of value `name`, among those since `first`.
    size_t input(const PackedMatrix& matrix, const std::string& name, size_t first) {
        for (size_t i = first; i < plan_.inputs.size(); ++i)
            if (kernels::same_input(plan_.inputs[i].spec, matrix.input)) return i;
        plan_.inputs.push_back({matrix.input, in(name), matrix.k});
        if (matrix.input.mode != kernels::InputMode::f32)
            step(QuantizeStep{plan_.inputs.size() - 1});
        return plan_.inputs.size() - 1;
    }

    // The gate that comes next, if it reads the two linears of this item, which nobody else does.
    const GateOp* gate_of(const Item& item) const {
        if (item.size() != 2 || position_ + 1 == items_.size()) return nullptr;
        const auto* gate = std::get_if<GateOp>(items_[position_ + 1].front());
        if (!gate) return nullptr;
        const std::string &a = std::get<LinearOp>(*item[0]).out, &b = std::get<LinearOp>(*item[1]).out;
        const bool both = (gate->gate == a && gate->up == b) || (gate->gate == b && gate->up == a);
        return both && last_use_.at(a) == position_ + 1 && last_use_.at(b) == position_ + 1 ? gate : nullptr;
    }

    void linears(Item item) {
        LinearPhase phase;
        const size_t first = plan_.inputs.size();
        const GateOp* gate = gate_of(item);
        if (gate && std::get<LinearOp>(*item[0]).out != gate->gate) std::swap(item[0], item[1]);
        for (const Op* op : item) {
            const auto& o = std::get<LinearOp>(*op);
            const PackedMatrix& matrix = graph_.weights.matrices.at(o.weight);
            const size_t from = input(matrix, o.in, first);
            phase.members.push_back({&matrix, vector(o.bias), from, gate ? -1 : out(o.out)});
        }
        // Before what is read goes: other threads still read it.
        if (gate) phase.gate = Gate{gate->kind, out(gate->out)};
        release(*item.front());
        if (gate) ++position_;
        phase.units = split(phase, threads_);
        phase.weights = ranges(phase);
        plan_.phases.emplace_back(std::move(phase));
    }

    void attention(const AttentionOp& o, const Op& op) {
        const Slot q = in(o.q), k = in(o.k), v = in(o.v), to = out(o.out);
        release(op);
        const ops::KvLayout& layout = caches_[static_cast<size_t>(o.cache)];
        plan_.most_partials =
            std::max(plan_.most_partials, o.heads * (layout.padded() + 2));
        plan_.phases.emplace_back(AttentionPhase{layout, o.heads, o.scale, q, k, v, to});
    }

    // Quantized by itself, for the tokens whose logits are asked for.
    void head(const HeadOp& o) {
        const PackedMatrix& matrix = graph_.weights.matrices.at(o.weight);
        plan_.inputs.push_back({matrix.input, in(o.in), matrix.k});
        plan_.head.members.push_back({&matrix, vector(o.bias), plan_.inputs.size() - 1, -1});
        plan_.head.units = split(plan_.head, threads_);
        plan_.head.weights = ranges(plan_.head);
    }
};

}  // namespace

Plan make_plan(const Graph& graph, ops::KvType kv, int threads) {
    return Planner(graph, kv, threads).run();
}

}  // namespace paring

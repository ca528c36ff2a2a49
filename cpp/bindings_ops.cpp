#include "bindings_ops.h"

#include <initializer_list>
#include <string>
#include <utility>

#include "fault.h"

namespace py = pybind11;

namespace paring {
namespace {

// The fields of one op; each is asked for once, and none may be left over.
class Fields {
public:
    Fields(size_t index, const py::handle& op) : place_("op " + std::to_string(index)) {
        check(py::isinstance<py::dict>(op), "must be a dictionary");
        fields_ = py::reinterpret_borrow<py::dict>(op);
        kind_ = text("op");
        place_ += " (" + kind_ + ")";
    }

    const std::string& kind() const { return kind_; }

    [[noreturn]] void refuse(const std::string& what) const { throw Fault(place_ + ": " + what); }

    std::string text(const char* key) {
        const py::object value = take(key);
        check(py::isinstance<py::str>(value), std::string(key) + " must be a string");
        return value.cast<std::string>();
    }

    // An absent name is empty.
    std::string name_or_none(const char* key) {
        if (!fields_.contains(key)) return {};
        if (fields_[key].is_none()) {
            ++taken_;
            return {};
        }
        const std::string name = text(key);
        check(!name.empty(), std::string(key) + " must not be empty");
        return name;
    }

    int64_t integer(const char* key) {
        const py::object value = take(key);
        check(py::isinstance<py::int_>(value) && !py::isinstance<py::bool_>(value),
              std::string(key) + " must be an integer");
        int overflow = 0;
        const int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
        check(overflow == 0, std::string(key) + " is out of range");
        return number;
    }

    float number(const char* key) {
        const py::object value = take(key);
        check(py::isinstance<py::float_>(value) ||
                  (py::isinstance<py::int_>(value) && !py::isinstance<py::bool_>(value)),
              std::string(key) + " must be a number");
        const double number = PyFloat_AsDouble(value.ptr());
        if (PyErr_Occurred()) {
            PyErr_Clear();
            refuse(std::string(key) + " is out of range");
        }
        return static_cast<float>(number);
    }

    template <class T>
    T choice(const char* key, std::initializer_list<std::pair<const char*, T>> choices) {
        const std::string found = text(key);
        std::string known;
        for (const auto& [name, value] : choices) {
            if (found == name) return value;
            known += known.empty() ? name : std::string(", ") + name;
        }
        refuse(std::string(key) + " is '" + found + "'; it must be one of " + known);
    }

    void finish() const {
        check(taken_ == fields_.size(), "has a field that this op doesn't know");
    }

private:
    std::string place_, kind_;
    py::dict fields_;
    size_t taken_ = 0;

    void check(bool holds, const std::string& what) const {
        if (!holds) refuse(what);
    }

    py::object take(const char* key) {
        check(fields_.contains(key), std::string("has no ") + key);
        ++taken_;
        return fields_[key];
    }
};

ops::Curve curve(Fields& f) {
    return f.choice<ops::Curve>("kind", {{"silu", ops::Curve::silu},
                                         {"gelu", ops::Curve::gelu},
                                         {"gelu_tanh", ops::Curve::gelu_tanh},
                                         {"relu", ops::Curve::relu}});
}

NormOp norm(Fields& f) {
    const auto kind = f.choice<ops::NormKind>(
        "kind", {{"rms", ops::NormKind::rms}, {"layer", ops::NormKind::layer}});
    return {kind,          f.text("weight"), f.name_or_none("bias"),
            f.number("eps"), f.text("in"),     f.text("out")};
}

RopeOp rope(Fields& f) {
    return {f.text("in"),
            f.text("out"),
            f.integer("heads"),
            f.integer("head_dim"),
            f.text("inv_freq"),
            f.choice<bool>("style", {{"half", false}, {"interleaved", true}}),
            f.number("scale")};
}

AttentionOp attention(Fields& f) {
    return {f.text("q"),           f.text("k"),         f.text("v"),
            f.text("out"),         f.integer("heads"),  f.integer("kv_heads"),
            f.integer("head_dim"), f.number("scale"),   f.integer("cache"),
            f.name_or_none("k_scale"), f.name_or_none("v_scale")};
}

Op op_from(Fields& f) {
    const std::string& kind = f.kind();
    if (kind == "embedding") return EmbeddingOp{f.text("weight"), f.text("out")};
    if (kind == "norm") return norm(f);
    if (kind == "linear")
        return LinearOp{f.text("weight"), f.name_or_none("bias"), f.text("in"), f.text("out")};
    if (kind == "rope") return rope(f);
    if (kind == "attention") return attention(f);
    if (kind == "gate") return GateOp{curve(f), f.text("gate"), f.text("up"), f.text("out")};
    if (kind == "activation") return ActivationOp{curve(f), f.text("in"), f.text("out")};
    if (kind == "add") return AddOp{f.text("a"), f.text("b"), f.text("out")};
    if (kind == "head")
        return HeadOp{f.text("weight"), f.name_or_none("bias"), f.text("in"), f.text("out")};
    f.refuse("is not an op that this engine knows");
}

}  // namespace

std::vector<Op> ops_from(const py::list& list) {
    std::vector<Op> ops;
    ops.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
        Fields fields(i, list[i]);
        ops.push_back(op_from(fields));
        fields.finish();
    }
    return ops;
}

}  // namespace paring

// The Python module paring.engine._core: loads weights, checks ops, runs the decoder.
//
// Nothing that Python passes is trusted: every array's dtype, shape and layout is checked here,
// every size, count and index by what it is handed to. A broken rule throws Fault, which is a
// GraphError in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings_kernels.h"
#include "bindings_ops.h"
#include "decoder.h"
#include "dispatch.h"
#include "fault.h"

namespace py = pybind11;

namespace paring {
namespace {

// The bytes of a contiguous array of one dtype ("<f4"), or none of an absent one.
struct Bytes {
    const void* data = nullptr;
    size_t size = 0;
};

Bytes bytes_of(const std::optional<py::array>& array, const char* dtype, const char* part) {
    if (!array) return {};
    require(array->dtype().equal(py::dtype(dtype)),
            std::string(part) + " must have dtype " + dtype);
    require((array->flags() & py::array::c_style) != 0,
            std::string(part) + " must be contiguous in memory");
    return {array->data(), static_cast<size_t>(array->nbytes())};
}

template <class T>
T choose(const char* what, const std::string& name,
         std::initializer_list<std::pair<const char*, T>> choices) {
    for (const auto& [known, value] : choices)
        if (name == known) return value;
    throw Fault(std::string("unknown ") + what + " '" + name + "'");
}

int32_t dimension(int64_t value, const char* what) {
    require(value >= 0 && value <= (int64_t{1} << 24),
            std::string(what) + " is " + std::to_string(value));
    return static_cast<int32_t>(value);
}

// Calls act and puts the tensor's name before its complaints.
template <class Act>
auto named(const std::string& name, const Act& act) {
    try {
        return act();
    } catch (const Fault& fault) {
        throw Fault("tensor '" + name + "': " + fault.what());
    } catch (const std::invalid_argument& fault) {
        throw Fault("tensor '" + name + "': " + fault.what());
    }
}

// A matrix as Python describes it; the arrays must outlive the source.
struct Matrix {
    int64_t rows, columns;
    std::string dtype;
    int64_t group, nonzeros;
    py::array values;
    std::optional<py::array> mask, scales;
    std::string mode;
    float input_scale;
    int32_t input_zero_point;

    kernels::MatrixSource source() const {
        using kernels::DType;
        using kernels::InputMode;
        kernels::MatrixSource s{};
        s.n = dimension(rows, "rows");
        s.k = dimension(columns, "columns");
        s.dtype = choose<DType>("dtype", dtype, {{"f32", DType::f32},
                                                 {"f16", DType::f16},
                                                 {"i8", DType::i8},
                                                 {"i4", DType::i4}});
        s.storage = mask ? kernels::Storage::bitmask : kernels::Storage::dense;
        s.group = dimension(group, "group");
        const char* const types[] = {"<f4", "<f2", "|i1", "|u1"};
        const Bytes v = bytes_of(values, types[static_cast<size_t>(s.dtype)], "values");
        const Bytes m = bytes_of(mask, "|u1", "mask");
        const Bytes c = bytes_of(scales, "<f4", "scales");
        s.values = v.data;
        s.values_bytes = v.size;
        s.mask = static_cast<const uint8_t*>(m.data);
        s.mask_bytes = m.size;
        s.scales = static_cast<const float*>(c.data);
        s.scales_count = c.size / 4;
        s.mode = choose<InputMode>("input mode", mode, {{"f32", InputMode::f32},
                                                        {"int8_dynamic", InputMode::int8_dynamic},
                                                        {"int8_static", InputMode::int8_static},
                                                        {"int16", InputMode::int16}});
        s.input_scale = input_scale;
        s.input_zero_point = input_zero_point;
        return s;
    }
};

// A sequence of a model, which it keeps alive.
struct Sequence {
    std::shared_ptr<Decoder> decoder;
    std::shared_ptr<Cache> cache;

    void truncate(int64_t length) const {
        py::gil_scoped_release release;
        decoder->truncate(*cache, length);
    }

    Sequence fork(int64_t length) const {
        py::gil_scoped_release release;
        return {decoder, decoder->fork(*cache, length)};
    }
};

constexpr const char* kKvNames[] = {"f32", "f16", "int8"};

struct Model {
    std::shared_ptr<Decoder> decoder;

    // (sequence, its next tokens, after which of them logits are wanted: "none", "last" or "all")
    using Request = std::tuple<Sequence, py::array, std::string>;

    void forward(const std::vector<Request>& requests, std::optional<py::array> logits) const {
        std::vector<Part> parts;
        std::vector<std::vector<int64_t>> ids;  // copies: without the GIL, Python may change its arrays after the check
        int64_t rows = 0;
        for (const auto& [sequence, tokens, wanted] : requests) {
            parts.push_back(part(sequence, tokens, wanted));
            Part& last = parts.back();
            last.tokens = ids.emplace_back(last.tokens, last.tokens + last.count).data();
            rows += last.rows();
        }
        require(rows == 0 || logits, "logits are wanted, but there is no array for them");
        float* out = nullptr;
        if (logits) {
            bytes_of(logits, "<f4", "logits");
            require(logits->writeable(), "logits must be writeable");
            const int64_t vocabulary = decoder->graph().sizes.vocabulary;
            require(logits->ndim() == 2 && logits->shape(0) == rows &&
                        logits->shape(1) == vocabulary,
                    "logits must have shape [" + std::to_string(rows) + ", " +
                        std::to_string(vocabulary) + "]: a row for each that is wanted");
            out = static_cast<float*>(logits->mutable_data());
        }
        py::gil_scoped_release release;
        decoder->forward(parts, out);
    }

    Part part(const Sequence& sequence, const py::array& tokens, const std::string& wanted) const {
        require(sequence.decoder == decoder, "the sequence belongs to another model");
        const Bytes ids = bytes_of(tokens, "<i8", "tokens");
        require(tokens.ndim() == 1, "tokens must be one row of ids");
        const auto logits = choose<Wanted>(
            "kind of logits", wanted,
            {{"none", Wanted::none}, {"last", Wanted::last}, {"all", Wanted::all}});
        return {sequence.cache.get(), static_cast<const int64_t*>(ids.data), tokens.size(), logits};
    }

    py::dict info() const {
        const Weights& weights = decoder->graph().weights;
        py::dict matrices;
        for (const auto& [name, matrix] : weights.matrices)
            matrices[py::str(name)] = py::dict(
                py::arg("rows") = matrix.n, py::arg("columns") = matrix.k,
                py::arg("layout") = kernels::layout_name(matrix.layout),
                py::arg("bytes") = matrix.bytes, py::arg("nonzeros") = matrix.nonzeros);
        size_t tables = 0;
        for (const auto& [name, table] : weights.tables) tables += table.bytes();
        return py::dict(
            py::arg("kernels") = decoder->kernels().name, py::arg("threads") = decoder->threads(),
            py::arg("matrices") = matrices, py::arg("table_bytes") = tables,
            py::arg("kv") = kKvNames[static_cast<size_t>(decoder->kv())],
            py::arg("page_bytes") = decoder->page_bytes(), py::arg("page_tokens") = ops::kPage,
            py::arg("buffer_bytes") = decoder->buffer_bytes());
    }
};

const kernels::KernelRow& row_named(const std::string& name) {
    try {
        return select_row(name);
    } catch (const std::invalid_argument& fault) {
        throw Fault(fault.what());
    }
}

// Packs weights, in several Python threads if they like, then becomes a Model. Tables point into
// the arrays they were given, which `borrowed` keeps.
class Loader {
public:
    explicit Loader(const std::string& kernels)
        : kernels_(row_named(kernels)), graph_(std::make_unique<Graph>()) {}

    void vector(const std::string& name, const py::array& values) {
        named(name, [&] {
            const Bytes bytes = bytes_of(values, "<f4", "values");
            require(values.ndim() == 1, "a vector must have one dimension");
            Vector copy(bytes.size / 4);
            if (bytes.size) std::memcpy(copy.data(), bytes.data, bytes.size);
            put(graph().weights.vectors, name, std::move(copy));
        });
    }

    void matrix(const std::string& name, const Matrix& matrix) {
        named(name, [&] {
            graph();
            const kernels::MatrixSource source = matrix.source();
            kernels::PackedMatrix packed = [&] {
                py::gil_scoped_release release;
                kernels::validate(source);
                require(all_finite(source), "a value is not finite");
                return kernels::pack(source, kernels::choose_layout(kernels_, source));
            }();
            require(!matrix.mask || packed.nonzeros == static_cast<size_t>(matrix.nonzeros),
                    "the mask keeps " + std::to_string(packed.nonzeros) +
                        " weights, but nonzeros is " + std::to_string(matrix.nonzeros));
            put(graph().weights.matrices, name, std::move(packed));
        });
    }

    void table(const std::string& name, const Matrix& matrix) {
        named(name, [&] {
            graph();
            const kernels::MatrixSource source = matrix.source();
            Table table = [&] {
                py::gil_scoped_release release;
                return Table(source);
            }();
            put(graph().weights.tables, name, std::move(table));
            borrowed_.append(matrix.values);
        });
    }

    Model finish(const py::list& ops, int64_t vocabulary, int64_t hidden, int64_t context,
                 int64_t caches, const std::string& kv, int threads, bool pin) {
        graph().sizes = {vocabulary, hidden, context, caches};
        graph().ops = ops_from(ops);
        const auto type = choose<ops::KvType>(
            "cache type", kv,
            {{"f32", ops::KvType::f32}, {"f16", ops::KvType::f16}, {"int8", ops::KvType::int8}});
        auto decoder = std::make_unique<Decoder>(std::move(graph_), kernels_, kernels_.features,
                                                 type, threads, pin);
        // A decoder may die without the interpreter's lock; what it borrows may not.
        PyObject* borrowed = borrowed_.release().ptr();
        return {std::shared_ptr<Decoder>(decoder.release(), [borrowed](Decoder* dying) {
            delete dying;
            const py::gil_scoped_acquire acquire;
            Py_DECREF(borrowed);
        })};
    }

    const char* kernels() const { return kernels_.name; }

private:
    const kernels::KernelRow& kernels_;
    std::unique_ptr<Graph> graph_;
    py::list borrowed_;

    Graph& graph() const {
        require(graph_ != nullptr, "the loader is finished");
        return *graph_;
    }

    template <class Value>
    static void put(std::unordered_map<std::string, Value>& into, const std::string& name,
                    Value&& value) {
        require(into.emplace(name, std::move(value)).second, "is given a second time");
    }
};

py::list rows() {
    py::list names;
    for (size_t i = 0; i < row_count(); ++i)
        if (row_supported(row_at(i))) names.append(row_at(i).name);
    return names;
}

}  // namespace
}  // namespace paring

PYBIND11_MODULE(_core, module) {
    using namespace paring;
    module.doc() = "The engine's kernels and decoder.";
    py::register_exception<Fault>(module, "CoreError",
                                  py::module_::import("paring.errors").attr("GraphError"));
    bind_kernels(module);
    module.def("rows", rows, "Names of the kernel rows this CPU runs, plainest first.");

    py::class_<Matrix>(module, "Matrix")
        .def(py::init([](int64_t rows, int64_t columns, const std::string& dtype, int64_t group,
                         int64_t nonzeros, const py::array& values,
                         const std::optional<py::array>& mask,
                         const std::optional<py::array>& scales, const std::string& mode,
                         float input_scale, int32_t input_zero_point) {
                 return Matrix{rows, columns, dtype, group,       nonzeros,        values,
                               mask, scales,  mode,  input_scale, input_zero_point};
             }),
             py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("dtype"),
             py::arg("group"), py::arg("nonzeros"), py::arg("values"), py::arg("mask"),
             py::arg("scales"), py::arg("mode"), py::arg("input_scale"),
             py::arg("input_zero_point"));
    py::class_<Sequence>(module, "Sequence")
        .def_property_readonly("length", [](const Sequence& s) { return s.cache->length(); })
        .def_property_readonly("bytes", [](const Sequence& s) { return s.cache->bytes(); })
        .def("truncate", &Sequence::truncate, py::arg("length"))
        .def("fork", &Sequence::fork, py::arg("length"));
    py::class_<Model>(module, "Model")
        .def("sequence", [](const Model& m) { return Sequence{m.decoder, m.decoder->new_cache()}; })
        .def("forward", &Model::forward, py::arg("parts"),
             py::arg("logits").noconvert().none(true))
        .def("info", &Model::info);
    py::class_<Loader>(module, "Loader")
        .def(py::init<const std::string&>(), py::arg("kernels"))
        .def_property_readonly("kernels", &Loader::kernels)
        .def("vector", &Loader::vector, py::arg("name"), py::arg("values"))
        .def("matrix", &Loader::matrix, py::arg("name"), py::arg("matrix"))
        .def("table", &Loader::table, py::arg("name"), py::arg("matrix"))
        .def("finish", &Loader::finish, py::kw_only(), py::arg("ops"), py::arg("vocabulary"),
             py::arg("hidden"), py::arg("context"), py::arg("caches"), py::arg("kv"),
             py::arg("threads"), py::arg("pin"));
}

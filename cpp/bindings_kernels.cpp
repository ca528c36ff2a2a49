// paring.engine._core.kernels: one kernel at a time, for tests and benchmarks.
#include "bindings_kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels/packed.h"

namespace py = pybind11;

namespace paring {
namespace {

using namespace kernels;

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

struct Aligned {
    explicit Aligned(size_t bytes)
        : memory(std::aligned_alloc(kAlignment, round_up(std::max<size_t>(bytes, 1), kAlignment)), std::free) {
        if (!memory) throw std::bad_alloc();
        // Garbage on purpose: quantize and run must write whatever they read.
        std::memset(memory.get(), 0x5a, round_up(std::max<size_t>(bytes, 1), kAlignment));
    }
    std::unique_ptr<void, decltype(&std::free)> memory;
};

template <class T>
T named(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, T>> known) {
    for (const auto& [text, value] : known)
        if (name == text) return value;
    throw std::invalid_argument(std::string(what) + ": unknown '" + name + "'");
}

Layout layout_named(const std::string& name) {
    for (size_t i = 0; i < static_cast<size_t>(Layout::count); ++i)
        if (name == layout_name(static_cast<Layout>(i))) return static_cast<Layout>(i);
    throw std::invalid_argument("layout: unknown '" + name + "'");
}

PackedMatrix pack_matrix(int32_t n, int32_t k, const std::string& dtype, const Bytes& values,
                         const std::optional<Bytes>& mask, const std::optional<Floats>& scales, int32_t group,
                         const std::string& mode, float input_scale, int32_t zero_point, const std::string& row,
                         const std::optional<std::string>& layout) {
    MatrixSource source{};
    source.n = n;
    source.k = k;
    source.dtype = named<DType>(
        "dtype", dtype, {{"f32", DType::f32}, {"f16", DType::f16}, {"i8", DType::i8}, {"i4", DType::i4}});
    source.storage = mask ? Storage::bitmask : Storage::dense;
    source.group = group;
    source.values = values.data();
    source.values_bytes = static_cast<size_t>(values.nbytes());
    source.mask = mask ? mask->data() : nullptr;
    source.mask_bytes = mask ? static_cast<size_t>(mask->nbytes()) : 0;
    source.scales = scales ? scales->data() : nullptr;
    source.scales_count = scales ? static_cast<size_t>(scales->size()) : 0;
    source.mode = named<InputMode>("mode", mode,
                                   {{"f32", InputMode::f32},
                                    {"int8_dynamic", InputMode::int8_dynamic},
                                    {"int8_static", InputMode::int8_static},
                                    {"int16", InputMode::int16}});
    source.input_scale = input_scale;
    source.input_zero_point = zero_point;
    validate(source);
    return pack(source, layout ? layout_named(*layout) : choose_layout(find_row(row), source));
}

// [n, k]: int8 for integer layouts, float32 for the others.
py::array unpack(const PackedMatrix& w) {
    const size_t n = static_cast<size_t>(w.n), k = static_cast<size_t>(w.k);
    const bool floats = w.input.mode == InputMode::f32;
    const size_t columns = floats ? k : round_up(k, kStep);
    py::array out = floats ? py::array(py::array_t<float>({n, k})) : py::array(py::array_t<int8_t>({n, k}));
    const size_t size = floats ? 4 : 1;
    std::vector<float> panel(16 * columns);
    for (int32_t p = 0; p < w.panels; ++p) {
        if (floats)
            decode_floats(w, p, panel.data());
        else
            decode_integers(w, p, reinterpret_cast<int8_t*>(panel.data()));
        for (size_t r = 0; r < 16 && static_cast<size_t>(p) * 16 + r < n; ++r)
            std::memcpy(static_cast<char*>(out.mutable_data()) + (static_cast<size_t>(p) * 16 + r) * k * size,
                        reinterpret_cast<const char*>(panel.data()) + r * columns * size, k * size);
    }
    return out;
}

// An input quantized by a row, with the memory it lives in.
struct Input {
    Input(const KernelRow& row, const PackedMatrix& w, const Floats& x)
        : memory(static_cast<size_t>(tokens(w, x)) * activation_bytes(w.input, w.k)),
          view(bind_activations(memory.memory.get(), activation_bytes(w.input, w.k), w.input, x.data(),
                                static_cast<size_t>(w.k), tokens(w, x), w.k)) {
        if (w.input.mode != InputMode::f32) row.quantize(view, 0, view.m);
    }

    static int32_t tokens(const PackedMatrix& w, const Floats& x) {
        if (x.ndim() != 2 || x.shape(1) != w.k || x.shape(0) < 1) throw std::invalid_argument("x must be [m >= 1, k]");
        return static_cast<int32_t>(x.shape(0));
    }

    Aligned memory;
    Activations view;
};

py::dict quantize(const std::string& name, const PackedMatrix& w, const Floats& x) {
    if (w.input.mode == InputMode::f32) throw std::invalid_argument("a float matrix has no quantized input");
    const KernelRow& row = select_row(name);
    const Input input(row, w, x);
    const Activations& a = input.view;
    const size_t m = static_cast<size_t>(a.m), groups = static_cast<size_t>(a.groups);
    const size_t padded = static_cast<size_t>(a.padded);
    py::array_t<int32_t> q({m, padded}), wide({m, padded}), sum({m, groups});
    py::array_t<float> scale({m, groups});
    for (size_t t = 0; t < m; ++t)
        for (size_t j = 0; j < padded; ++j) {
            const size_t at = t * a.stride + j;
            q.mutable_at(t, j) = a.spec.mode == InputMode::int16 ? a.hi[at] * 128 + a.lo[at] : a.hi[at];
            wide.mutable_at(t, j) = row.wide ? a.wide[t * a.wide_stride + j] : q.at(t, j);
        }
    for (size_t t = 0; t < m; ++t)
        for (size_t g = 0; g < groups; ++g) {
            sum.mutable_at(t, g) = a.sum[t * a.side + g];
            scale.mutable_at(t, g) = a.scale[t * a.side + g];
        }
    py::dict out;
    out["q"] = q;
    out["wide"] = wide;
    out["scale"] = scale;
    out["sum"] = sum;
    return out;
}

// y [m, n + 2 * guard]: the kernel writes the middle n columns, in `parts` slices of panels, last slice first.
py::array_t<float> linear(const std::string& name, const PackedMatrix& w, const Floats& x, int32_t parts,
                          size_t guard) {
    const KernelRow& row = select_row(name);
    const RunFn run = row.run[static_cast<size_t>(w.layout)];
    if (run == nullptr) throw std::invalid_argument("kernels: row '" + name + "' does not run this layout");
    if (parts < 1) throw std::invalid_argument("parts must be at least 1");
    if (guard > 4096) throw std::invalid_argument("guard must be at most 4096");
    const Input input(row, w, x);
    const Aligned scratch(run_scratch_bytes(w));
    const size_t m = static_cast<size_t>(input.view.m), width = static_cast<size_t>(w.n) + 2 * guard;
    py::array_t<float> y({m, width});
    std::fill_n(y.mutable_data(), m * width, -12345.0F);
    for (int32_t part = parts; part-- > 0;)
        run(w, input.view, y.mutable_data() + guard, width, split_panels(w, part, parts),
            split_panels(w, part + 1, parts), scratch.memory.get());
    return y;
}

std::vector<std::pair<std::string, bool>> list_rows() {
    std::vector<std::pair<std::string, bool>> out;
    for (size_t i = 0; i < row_count(); ++i) out.emplace_back(row_at(i).name, row_supported(row_at(i)));
    return out;
}

std::vector<std::string> row_layouts(const std::string& name) {
    std::vector<std::string> out;
    for (size_t i = 0; i < static_cast<size_t>(Layout::count); ++i)
        if (select_row(name).run[i] != nullptr) out.emplace_back(layout_name(static_cast<Layout>(i)));
    return out;
}

}  // namespace

void bind_kernels(py::module_& parent) {
    py::module_ module = parent.def_submodule("kernels", "One kernel at a time, for tests and benchmarks.");
    py::class_<PackedMatrix>(module, "Matrix", "A weight matrix packed for this machine.")
        .def_readonly("n", &PackedMatrix::n)
        .def_readonly("k", &PackedMatrix::k)
        .def_readonly("panels", &PackedMatrix::panels)
        .def_readonly("nonzeros", &PackedMatrix::nonzeros)
        .def_readonly("bytes", &PackedMatrix::bytes)
        .def_property_readonly("layout", [](const PackedMatrix& w) { return layout_name(w.layout); })
        .def("unpack", &unpack, "The weights [n, k]: int8 for integer layouts, else float32.");
    module.def("rows", &list_rows, "Every kernel row, plainest first, and whether this CPU runs it.");
    module.def("layouts", &row_layouts, py::arg("row"), "Names of the layouts a row runs.");
    module.def("pack", &pack_matrix, py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("values"),
               py::arg("mask") = py::none(), py::arg("scales") = py::none(), py::arg("group") = 0,
               py::arg("mode") = "f32", py::arg("input_scale") = 0.0F, py::arg("zero_point") = 0,
               py::arg("row") = "auto", py::arg("layout") = py::none(), "Checks and packs a portable matrix; ValueError says what is wrong.");
    module.def("quantize", &quantize, py::arg("row"), py::arg("matrix"), py::arg("x"),
               "The input as a row quantizes it: q and planes [m, padded k], scale and sum [m, groups].");
    module.def("linear", &linear, py::arg("row"), py::arg("matrix"), py::arg("x"), py::arg("parts") = 1,
               py::arg("guard") = 0, "y = x W^T float32 [m, n + 2 * guard]; the guard columns stay -12345.");
    bind_timing(module);
}

}  // namespace paring

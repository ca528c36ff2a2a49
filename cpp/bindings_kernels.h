#pragma once

#include <pybind11/pybind11.h>

namespace paring {

// Adds the submodule `kernels`: what tests and benchmarks need to drive one kernel at a time.
void bind_kernels(pybind11::module_& parent);

}  // namespace paring

#pragma once

#include <pybind11/pybind11.h>

namespace paring {

// Adds the submodule `kernels`: what tests and benchmarks need to drive one kernel at a time.
void bind_kernels(pybind11::module_& parent);

// Adds the timing functions to that submodule.
void bind_timing(pybind11::module_& module);

}  // namespace paring

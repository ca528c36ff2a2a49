// The Python module paring.engine._core.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_core, module) { module.doc() = "The engine's kernels and decoder."; }

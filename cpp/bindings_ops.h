// Ops as Python dictionaries (the fields of graph.json) to typed ops.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "graph.h"

namespace paring {

// Throws Fault naming the op and the field that is missing, unknown, or of the wrong type.
std::vector<Op> ops_from(const pybind11::list& ops);

}  // namespace paring

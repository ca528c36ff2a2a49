// The ordered table of kernel rows, and which of them this CPU can run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/kernels.h"

namespace paring {

// Bits of KernelRow::features.
enum Feature : uint32_t {
    kAvx2 = 1u << 0,
    kFma = 1u << 1,
    kF16c = 1u << 2,
    kAvx512 = 1u << 3,  // F, BW, DQ, VL
    kAvx512Vnni = 1u << 4,
    kAvx512Vbmi2 = 1u << 5,  // and VBMI
    kNeon = 1u << 6,
    kDotprod = 1u << 7,
};

// What this CPU and its operating system support (0 elsewhere than on x86-64 and Arm).
uint32_t cpu_features();

// Rows from plainest to best; row 0 is `reference` and runs everywhere.
size_t row_count();
const kernels::KernelRow& row_at(size_t index);
bool row_supported(const kernels::KernelRow& row);

// The row of a name, whether or not this CPU can run it: enough to pack for another machine. "auto": the last supported
// row. Throws std::invalid_argument naming the rows there are.
const kernels::KernelRow& find_row(const std::string& name);

// A row to run. Throws std::invalid_argument also where this CPU can't.
const kernels::KernelRow& select_row(const std::string& name);

}  // namespace paring

// The error that every check of the core throws; Python sees it as a GraphError.
#pragma once

#include <stdexcept>
#include <string>

namespace paring {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool holds, const std::string& message) {
    if (!holds) throw Fault(message);
}

}  // namespace paring

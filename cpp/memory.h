// Memory aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace paring {

struct FreeAligned {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

// Uninitialized, for trivial types only.
template <class T>
Aligned<T> allocate_aligned(size_t count) {
    return Aligned<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})));
}

}  // namespace paring

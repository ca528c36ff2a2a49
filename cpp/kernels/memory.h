// Memory for packed weights and for pages of the cache. Never included by an ISA unit.
#pragma once

#include <cstddef>

namespace paring::kernels {

// `bytes` aligned to kAlignment, side by side with what was asked for before, in pages as large as the system has: the
// matrices of a small model are far smaller than such a page, and with small pages reading them takes half as long
// again (Zen 3, in a virtual machine). What is given back is used again for the same size first, and returned to the
// system once everything beside it is free too. Any thread. Throws std::bad_alloc.
void* allocate_shared(size_t bytes);
void free_shared(void* memory, size_t bytes);

// Held across a fork, so that the child finds it free.
void lock_shared_memory();
void unlock_shared_memory();

}  // namespace paring::kernels

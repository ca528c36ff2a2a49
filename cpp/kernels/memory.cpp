#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "packed.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace paring::kernels {
namespace {

// Chunks begin at a multiple of their size, so that a pointer tells which it lies in. Only one that holds a single larger
// thing is longer.
constexpr size_t kChunk = size_t{16} << 20;

struct Chunk {
    size_t used, users;
};

std::mutex mutex;
Chunk* open = nullptr;  // the one that still has room
// By size: what was given back, in chunks that others still use. Never destroyed: at the end Python may still hold models.
std::map<size_t, std::vector<void*>>& holes() {
    static auto& all = *new std::map<size_t, std::vector<void*>>;
    return all;
}

Chunk* chunk_of(const void* memory) {
    return reinterpret_cast<Chunk*>(reinterpret_cast<uintptr_t>(memory) & ~uintptr_t{kChunk - 1});
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kTogether = false;  // each on its own, so that reading past it is seen
#else
constexpr bool kTogether = true;
#endif

Chunk* new_chunk(size_t bytes) {
    const size_t size = round_up(bytes, kChunk);
    void* memory = std::aligned_alloc(kChunk, size);  // what is never touched takes no memory
    if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(memory, size, MADV_HUGEPAGE);  // only a hint
#endif
    return new (memory) Chunk{round_up(sizeof(Chunk), kAlignment), 0};
}

}  // namespace

void lock_shared_memory() { mutex.lock(); }
void unlock_shared_memory() { mutex.unlock(); }

void* allocate_shared(size_t bytes) {
    const size_t needed = round_up(std::max(bytes, kAlignment), kAlignment);
    if (!kTogether) {
        void* memory = std::aligned_alloc(kAlignment, needed);
        if (memory == nullptr) throw std::bad_alloc();
        return memory;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = holes().find(needed);
    if (found != holes().end() && !found->second.empty()) {
        void* memory = found->second.back();
        found->second.pop_back();
        ++chunk_of(memory)->users;
        return memory;
    }
    const size_t header = round_up(sizeof(Chunk), kAlignment);
    Chunk* chunk = open;
    if (header + needed > kChunk)
        chunk = new_chunk(header + needed);
    else if (open == nullptr || kChunk - open->used < needed)
        chunk = open = new_chunk(kChunk);
    void* memory = reinterpret_cast<uint8_t*>(chunk) + chunk->used;
    chunk->used += needed;
    ++chunk->users;
    return memory;
}

void free_shared(void* memory, size_t bytes) {
    if (memory == nullptr) return;
    if (!kTogether) return std::free(memory);
    const std::lock_guard<std::mutex> lock(mutex);
    Chunk* chunk = chunk_of(memory);
    if (--chunk->users != 0) {
        holes()[round_up(std::max(bytes, kAlignment), kAlignment)].push_back(memory);
        return;
    }
    const auto inside = [&](const void* hole) { return chunk_of(hole) == chunk; };
    for (auto& [size, some] : holes()) some.erase(std::remove_if(some.begin(), some.end(), inside), some.end());
    if (chunk == open) open = nullptr;
    std::free(chunk);
}

}  // namespace paring::kernels

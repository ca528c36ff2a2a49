// Keys and values of one sequence, in pages of 64 tokens that are added as the sequence grows.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "ops/ops.h"

namespace paring {

// The type and place of every stored key and value follow from a KvLayout (ops/ops.h) alone.
class Cache {
public:
    // `page_bytes` holds every layout of the graph; `context` is the most tokens it may ever hold.
    Cache(size_t page_bytes, int64_t context);

    int64_t length() const { return length_; }
    int64_t context() const { return context_; }
    size_t bytes() const { return pages_.size() * page_bytes_; }
    uint8_t* const* pages() const { return pages_.data(); }

    // Pages for `tokens` more; throws Fault when that is beyond the context.
    void reserve(int64_t tokens);
    // The next `tokens` are stored.
    void advance(int64_t tokens) { length_ += tokens; }
    // Forgets everything from token `length` on.
    void truncate(int64_t length);

private:
    size_t page_bytes_;
    int64_t context_;
    int64_t length_ = 0;
    std::vector<Aligned<uint8_t>> owned_;
    std::vector<uint8_t*> pages_;
};

}  // namespace paring

// Keys and values of one sequence, in pages of 64 tokens that are added as the sequence grows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "memory.h"
#include "ops/ops.h"

namespace paring {

// The type and place of every stored key and value follow from a KvLayout (ops/ops.h) alone. A page
// may belong to several sequences that begin alike; whoever is to write into it takes a copy first.
class Cache {
public:
    // `page_bytes` holds every layout of the graph; `context` is the most tokens it may ever hold.
    Cache(size_t page_bytes, int64_t context);

    int64_t length() const { return length_; }
    int64_t context() const { return context_; }
    size_t bytes() const { return pages_.size() * page_bytes_; }
    uint8_t* const* pages() const { return pages_.data(); }

    // Throws Fault when `tokens` more are beyond the context.
    void check_room(int64_t tokens) const;
    // Pages for `tokens` more, which no other sequence has.
    void reserve(int64_t tokens);
    // The next `tokens` are stored.
    void advance(int64_t tokens) { length_ += tokens; }
    // Forgets everything from token `length` on.
    void truncate(int64_t length);
    // A sequence that begins with the first `length` tokens of this one, and shares their pages.
    std::shared_ptr<Cache> fork(int64_t length) const;

private:
    using Page = std::shared_ptr<uint8_t[]>;

    size_t page_bytes_;
    int64_t context_;
    int64_t length_ = 0;
    std::vector<Page> owned_;
    std::vector<uint8_t*> pages_;  // where those of owned_ are

    void check_length(int64_t length, const char* verb) const;
    Page new_page(const uint8_t* from) const;
};

}  // namespace paring

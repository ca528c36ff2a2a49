#include "cache.h"

#include <cstring>
#include <string>

#include "fault.h"

namespace paring {

Cache::Cache(size_t page_bytes, int64_t context) : page_bytes_(page_bytes), context_(context) {
    const auto pages = static_cast<size_t>(ops::round_up(context, ops::kPage) / ops::kPage);
    owned_.reserve(pages);
    pages_.reserve(pages);
}

void Cache::reserve(int64_t tokens) {
    require(tokens <= context_ - length_,
            "the sequence would have " + std::to_string(length_ + tokens) +
                " tokens, but the model's context length is " + std::to_string(context_) +
                "; shorten the prompt");
    while (static_cast<int64_t>(pages_.size()) * ops::kPage < length_ + tokens) {
        owned_.push_back(allocate_aligned<uint8_t>(page_bytes_));
        // Slots that hold no token yet are read too (with weight 0), so they must be finite.
        std::memset(owned_.back().get(), 0, page_bytes_);
        pages_.push_back(owned_.back().get());
    }
}

void Cache::truncate(int64_t length) {
    require(length >= 0 && length <= length_,
            "can't cut a sequence of " + std::to_string(length_) + " tokens to " +
                std::to_string(length));
    length_ = length;
}

}  // namespace paring

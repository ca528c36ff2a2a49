#include "cache.h"

#include <cstring>
#include <string>

#include "fault.h"
#include "kernels/memory.h"

namespace paring {
namespace {

size_t page_count(int64_t tokens) {
    return static_cast<size_t>(ops::round_up(tokens, ops::kPage) / ops::kPage);
}

}  // namespace

Cache::Cache(size_t page_bytes, int64_t context) : page_bytes_(page_bytes), context_(context) {
    owned_.reserve(page_count(context));
    pages_.reserve(page_count(context));
}

void Cache::check_room(int64_t tokens) const {
    require(tokens <= context_ - length_,
            "the sequence would have " + std::to_string(length_ + tokens) +
                " tokens, but the model's context length is " + std::to_string(context_) +
                "; shorten the prompt");
}

void Cache::reserve(int64_t tokens) {
    check_room(tokens);
    const size_t needed = page_count(length_ + tokens);
    for (auto i = static_cast<size_t>(length_ / ops::kPage); i < needed; ++i) {
        if (i == owned_.size()) {
            owned_.push_back(new_page(nullptr));
            pages_.push_back(owned_.back().get());
        } else if (owned_[i].use_count() > 1) {
            owned_[i] = new_page(pages_[i]);
            pages_[i] = owned_[i].get();
        }
    }
}

// A copy, or zeros: slots that hold no token yet are read too (with weight 0), so they must be
// finite.
Cache::Page Cache::new_page(const uint8_t* from) const {
    const auto give_back = [bytes = page_bytes_](uint8_t* memory) {
        kernels::free_shared(memory, bytes);
    };
    Page page(static_cast<uint8_t*>(kernels::allocate_shared(page_bytes_)), give_back);
    if (from)
        std::memcpy(page.get(), from, page_bytes_);
    else
        std::memset(page.get(), 0, page_bytes_);
    return page;
}

void Cache::check_length(int64_t length, const char* verb) const {
    require(length >= 0 && length <= length_,
            std::string("can't ") + verb + " a sequence of " + std::to_string(length_) +
                " tokens to " + std::to_string(length));
}

void Cache::truncate(int64_t length) {
    check_length(length, "cut");
    length_ = length;
}

std::shared_ptr<Cache> Cache::fork(int64_t length) const {
    check_length(length, "fork");
    auto made = std::make_shared<Cache>(page_bytes_, context_);
    const auto count = static_cast<std::ptrdiff_t>(page_count(length));
    made->owned_.assign(owned_.begin(), owned_.begin() + count);
    made->pages_.assign(pages_.begin(), pages_.begin() + count);
    made->length_ = length;
    return made;
}

}  // namespace paring

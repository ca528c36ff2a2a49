#include "chunk.h"

#include <algorithm>

namespace paring {
namespace {

constexpr int64_t kSplitTokens = 4;  // up to here attention is split by chunks of keys as well
constexpr int64_t kTokenBlock = 16;  // tokens of a unit of attention

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

Chunk::Chunk() {
    for (auto* rows : {&tokens_, &positions_, &wanted_}) rows->reserve(kTokens);
    spans_.reserve(kTokens);
}

void Chunk::reserve(const std::vector<Part>& parts) {
    int64_t units = 0;
    most_partials_ = 0;
    for (const Part& part : parts) {
        const int64_t keys = pieces(part.cache->length() + part.count, ops::kChunk);
        units += std::max(keys, pieces(std::min(part.count, kTokens), kTokenBlock));
        most_partials_ += std::min(part.count, kSplitTokens) * keys;
    }
    if (units_.capacity() < static_cast<size_t>(units)) units_.reserve(2 * static_cast<size_t>(units));
}

void Chunk::clear() {
    for (auto* rows : {&tokens_, &positions_, &wanted_}) rows->clear();
    spans_.clear();
    units_.clear();
    partials_ = 0;
}

void Chunk::add(const Part& part, int64_t first, int64_t count) {
    const int64_t position = part.cache->length(), row = this->count();
    spans_.push_back(
        {part.cache, row, count, position, pieces(position + count, ops::kChunk), partials_});
    for (int64_t t = 0; t < count; ++t) {
        tokens_.push_back(part.tokens[first + t]);
        positions_.push_back(position + t);
        const bool last = first + t + 1 == part.count;
        if (part.logits == Wanted::all || (part.logits == Wanted::last && last))
            wanted_.push_back(row + t);
    }
    attend(spans_.back());
}

void Chunk::attend(const Span& span) {
    const size_t index = spans_.size() - 1;
    if (span.count > kSplitTokens || span.key_chunks == 1) {
        for (int64_t begin = 0; begin < span.count; begin += kTokenBlock)
            units_.push_back({index, begin, std::min(begin + kTokenBlock, span.count), kAllKeys});
        return;
    }
    for (int64_t keys = 0; keys < span.key_chunks; ++keys)
        units_.push_back({index, 0, span.count, keys});
    partials_ += span.count * span.key_chunks;
}

}  // namespace paring

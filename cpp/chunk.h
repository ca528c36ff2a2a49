// Tokens that go through the plan together, of one sequence or of several.
#pragma once

#include <cstdint>
#include <vector>

#include "cache.h"

namespace paring {

enum class Wanted : uint8_t { none, last, all };

// What one sequence adds in a call, and after which of the tokens it wants logits.
struct Part {
    Cache* cache;
    const int64_t* tokens;
    int64_t count;
    Wanted logits;

    int64_t rows() const { return logits == Wanted::all ? count : logits == Wanted::last ? 1 : 0; }
};

// Consecutive rows of a chunk that belong to one sequence.
struct Span {
    Cache* cache;
    int64_t row, count;
    int64_t position;    // of the first in the sequence
    int64_t key_chunks;  // that its keys make
    int64_t partials;    // where those of split attention begin, in chunks of keys of a token
};

// Queries [begin, end) of a span, against one chunk of keys or all.
struct AttentionUnit {
    size_t span;
    int64_t begin, end;
    int64_t keys;  // or kAllKeys
};

class Chunk {
public:
    static constexpr int64_t kTokens = 128;  // most rows
    static constexpr int64_t kAllKeys = -1;

    Chunk();
    // Room for any chunk of these parts, whose caches are as before the call: add does not throw.
    void reserve(const std::vector<Part>& parts);
    void clear();
    // Tokens [first, first + count) of a part; their sequence has all before them.
    void add(const Part& part, int64_t first, int64_t count);

    int64_t count() const { return static_cast<int64_t>(tokens_.size()); }
    const std::vector<int64_t>& tokens() const { return tokens_; }
    const std::vector<int64_t>& positions() const { return positions_; }
    const std::vector<Span>& spans() const { return spans_; }
    const std::vector<int64_t>& wanted() const { return wanted_; }  // rows, ascending
    const std::vector<AttentionUnit>& units() const { return units_; }
    int64_t most_partials() const { return most_partials_; }  // after reserve

private:
    std::vector<int64_t> tokens_, positions_, wanted_;
    std::vector<Span> spans_;
    std::vector<AttentionUnit> units_;
    int64_t partials_ = 0, most_partials_ = 0;

    void attend(const Span& span);
};

}  // namespace paring

// Embedding rows.
#include <cstring>

#include "fault.h"
#include "graph.h"

namespace paring {
namespace {

using kernels::DType;

size_t element_bytes(DType dtype) {
    return dtype == DType::f32 ? 4 : dtype == DType::f16 ? 2 : 1;
}

}  // namespace

bool all_finite(const kernels::MatrixSource& source) {
    // An exponent of all ones is an Inf or a NaN. The loops have no branch, so they vectorize.
    const auto* x = static_cast<const uint8_t*>(source.values);
    uint32_t bad = 0;
    if (source.dtype == DType::f32) {
        for (size_t i = 0; i < source.values_bytes / 4; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + 4 * i, sizeof bits);
            bad |= static_cast<uint32_t>((bits & 0x7f800000) == 0x7f800000);
        }
    } else if (source.dtype == DType::f16) {
        for (size_t i = 0; i < source.values_bytes / 2; ++i) {
            uint16_t bits;
            std::memcpy(&bits, x + 2 * i, sizeof bits);
            bad |= static_cast<uint32_t>((bits & 0x7c00) == 0x7c00);
        }
    }
    return bad == 0;
}

Table::Table(const kernels::MatrixSource& source)
    : dtype_(source.dtype == DType::i4 ? DType::i8 : source.dtype),
      rows_(source.n),
      columns_(source.k),
      values_(static_cast<const uint8_t*>(source.values)) {
    kernels::validate(source);  // before dividing by anything it says
    group_ = source.group ? source.group : source.k;
    groups_ = (columns_ + group_ - 1) / group_;
    if (source.scales_count) {
        scales_.resize(source.scales_count);
        std::memcpy(scales_.data(), source.scales, source.scales_count * 4);
    }
    if (!all_finite(source)) throw std::invalid_argument("a value is not finite");
    if (source.storage == kernels::Storage::bitmask || source.dtype == DType::i4) unpack(source);
}

// To dense rows, int4 to int8.
void Table::unpack(const kernels::MatrixSource& source) {
    const bool nibbles = source.dtype == DType::i4;
    const size_t size = element_bytes(dtype_);
    const int64_t mask_row = (columns_ + 7) / 8;
    owned_.assign(static_cast<size_t>(rows_ * columns_) * size, 0);
    size_t next = 0;  // element, or nibble
    for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t c = 0; c < columns_; ++c) {
            if (source.mask && !(source.mask[r * mask_row + c / 8] >> (c % 8) & 1)) continue;
            uint8_t* to = owned_.data() + static_cast<size_t>(r * columns_ + c) * size;
            if (nibbles) {
                const int nibble = values_[next / 2] >> (next % 2 * 4) & 15;
                *to = static_cast<uint8_t>(nibble < 8 ? nibble : nibble - 16);
            } else {
                std::memcpy(to, values_ + next * size, size);
            }
            ++next;
        }
        if (nibbles) next = (next + 1) / 2 * 2;  // each row starts on a byte
    }
    values_ = owned_.data();
}

size_t Table::bytes() const {
    return static_cast<size_t>(rows_ * columns_) * element_bytes(dtype_) +
           scales_.size() * 4;
}

void Table::row(const ops::OpsRow& ops, int64_t index, float* out) const {
    const uint8_t* at = values_ + static_cast<size_t>(index * columns_) * element_bytes(dtype_);
    if (dtype_ == DType::f32) {
        std::memcpy(out, at, static_cast<size_t>(columns_) * 4);
    } else if (dtype_ == DType::f16) {
        ops.widen(reinterpret_cast<const uint16_t*>(at), columns_, out);
    } else {
        const float* scale = scales_.data() + index * groups_;
        for (int64_t c = 0; c < columns_; ++c)
            out[c] = static_cast<float>(static_cast<int8_t>(at[c])) * scale[c / group_];
    }
}

}  // namespace paring

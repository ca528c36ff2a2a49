// Checks of a portable matrix: after validate, pack may index without looking.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace paring::kernels {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("matrix: " + what); }

void expect(const char* what, size_t found, size_t wanted) {
    if (found != wanted)
        refuse(std::string(what) + " holds " + std::to_string(found) + ", expected " + std::to_string(wanted));
}

// Bytes of `kept` values of a row.
size_t row_bytes(DType dtype, size_t kept) {
    switch (dtype) {
        case DType::f32: return kept * 4;
        case DType::f16: return kept * 2;
        case DType::i8: return kept;
        case DType::i4: return (kept + 1) / 2;
    }
    refuse("unknown dtype");
}

size_t kept_bytes(const MatrixSource& s) {
    const size_t k = static_cast<size_t>(s.k), row = (k + 7) / 8;
    size_t bytes = 0;
    for (size_t r = 0; r < static_cast<size_t>(s.n); ++r) {
        size_t kept = 0;
        for (size_t i = 0; i < row; ++i) kept += static_cast<size_t>(__builtin_popcount(s.mask[r * row + i]));
        if (k % 8 != 0 && s.mask[r * row + row - 1] >> (k % 8) != 0)
            refuse("mask row " + std::to_string(r) + " has bits set past column " + std::to_string(k));
        bytes += row_bytes(s.dtype, kept);
    }
    return bytes;
}

void check_scales(const MatrixSource& s) {
    const size_t groups = s.group == 0 ? 1 : (static_cast<size_t>(s.k) + s.group - 1) / s.group;
    expect("scales (count)", s.scales_count, static_cast<size_t>(s.n) * groups);
    if (s.scales == nullptr) refuse("no scales");
    for (size_t i = 0; i < s.scales_count; ++i) {
        float scale;
        std::memcpy(&scale, reinterpret_cast<const char*>(s.scales) + 4 * i, 4);
        if (!std::isfinite(scale)) refuse("scale " + std::to_string(i) + " is not finite");
    }
}

void check_input(const MatrixSource& s) {
    if (s.mode == InputMode::int8_static) {
        if (!std::isfinite(s.input_scale) || s.input_scale <= 0) refuse("input scale must be positive and finite");
        if (s.input_zero_point < -128 || s.input_zero_point > 127) refuse("input zero point is outside -128 .. 127");
    } else if (s.input_scale != 0 || s.input_zero_point != 0) {
        refuse("input scale and zero point belong to static activations only");
    }
}

}  // namespace

void validate(const MatrixSource& s) {
    if (s.n < 1 || s.k < 1) refuse("shape must be at least 1 x 1");
    if (s.n > (1 << 24)) refuse("more than 2^24 rows");
    if (s.k > kMaxColumns) refuse("more than 65536 columns");
    if (s.dtype > DType::i4 || s.storage > Storage::bitmask || s.mode > InputMode::int16) refuse("unknown enumerator");
    const bool integer = s.dtype == DType::i8 || s.dtype == DType::i4;
    if (integer == (s.mode == InputMode::f32)) refuse("activation mode does not fit the dtype");
    if (s.dtype == DType::f16 && s.storage == Storage::bitmask) refuse("f16 with a bitmask is not supported");
    if (integer ? (s.group != 0 && s.group != 32 && s.group != 64 && s.group != 128) : s.group != 0)
        refuse("group must be 0, 32, 64 or 128 (0 for floats), got " + std::to_string(s.group));
    if (integer)
        check_scales(s);
    else if (s.scales_count != 0)
        refuse("float matrices have no scales");
    check_input(s);
    const size_t n = static_cast<size_t>(s.n), k = static_cast<size_t>(s.k);
    if (s.storage == Storage::dense) {
        expect("mask (bytes)", s.mask_bytes, 0);
        expect("values (bytes)", s.values_bytes, n * row_bytes(s.dtype, k));
    } else {
        expect("mask (bytes)", s.mask_bytes, n * ((k + 7) / 8));
        if (s.mask == nullptr) refuse("no mask");
        expect("values (bytes)", s.values_bytes, kept_bytes(s));
    }
    if (s.values == nullptr && s.values_bytes != 0) refuse("no values");
}

}  // namespace paring::kernels

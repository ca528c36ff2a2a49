// What packing, decoding and the reference share about packed panels. Never included by an ISA unit.
#pragma once

#include "kernels.h"

namespace paring::kernels {

size_t round_up(size_t value, size_t unit);

// Bits set of 32. Without an instruction set of its own the builtin is a call.
inline uint32_t count_bits(uint32_t bits) {
    bits -= bits >> 1 & 0x55555555;
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333);
    return ((bits + (bits >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24;
}

// Decodes one panel to weights[16][padded columns] (integers) or [16][k] (floats); padding rows and columns are 0.
void decode_integers(const PackedMatrix& w, int32_t panel, int8_t* weights);
void decode_windows(Layout layout, const uint8_t* body, size_t columns, int8_t* weights);
void decode_floats(const PackedMatrix& w, int32_t panel, float* weights);

float half_to_float(uint16_t half);
// Sets `half` to the f16 that equals a finite value; false if there is none.
bool exact_half(float value, uint16_t& half);

}  // namespace paring::kernels

// Every quantize and run function of every instruction set; dispatch.cpp makes the table of them.
#pragma once

#include "kernels.h"

namespace paring::kernels {

#define PARING_RUN(name) \
    void name(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end, \
              void* scratch)

void quantize_reference(const Activations& out, int32_t begin, int32_t end);
PARING_RUN(run_integers_reference);
PARING_RUN(run_floats_reference);

void quantize_avx2(const Activations& out, int32_t begin, int32_t end);
PARING_RUN(run_f32_dense_avx2);
PARING_RUN(run_f16_dense_avx2);
PARING_RUN(run_f32_bitmask_avx2);
PARING_RUN(run_i8_dense_avx2);
PARING_RUN(run_i4_dense_avx2);
PARING_RUN(run_i8_bitmask_avx2);
PARING_RUN(run_i4_bitmask_avx2);
PARING_RUN(run_i8_block4_avx2);
PARING_RUN(run_i4_block4_avx2);
PARING_RUN(run_i8_2of4_avx2);
PARING_RUN(run_i4_2of4_avx2);
PARING_RUN(run_i8_4of16_avx2);
PARING_RUN(run_i4_4of16_avx2);
PARING_RUN(run_i8_n16_avx2);
PARING_RUN(run_i4_n16_avx2);
PARING_RUN(run_i8_pairs_avx2);
PARING_RUN(run_i4_pairs_avx2);
PARING_RUN(run_i8_columns_avx2);
PARING_RUN(run_i4_columns_avx2);
PARING_RUN(run_i8_lists_avx2);
PARING_RUN(run_i4_lists_avx2);
PARING_RUN(run_i8_lists4_avx2);
PARING_RUN(run_i4_lists4_avx2);

void quantize_avx512(const Activations& out, int32_t begin, int32_t end);
PARING_RUN(run_f32_dense_avx512);
PARING_RUN(run_f16_dense_avx512);
PARING_RUN(run_f32_bitmask_avx512);
PARING_RUN(run_i8_dense_avx512);
PARING_RUN(run_i4_dense_avx512);
PARING_RUN(run_i8_bitmask_avx512);
PARING_RUN(run_i4_bitmask_avx512);
PARING_RUN(run_i8_block4_avx512);
PARING_RUN(run_i4_block4_avx512);
PARING_RUN(run_i8_2of4_avx512);
PARING_RUN(run_i4_2of4_avx512);
PARING_RUN(run_i8_4of16_avx512);
PARING_RUN(run_i4_4of16_avx512);
PARING_RUN(run_i8_n16_avx512);
PARING_RUN(run_i4_n16_avx512);
PARING_RUN(run_i8_pairs_avx512);
PARING_RUN(run_i4_pairs_avx512);
PARING_RUN(run_i8_columns_avx512);
PARING_RUN(run_i4_columns_avx512);

PARING_RUN(run_i8_dense_avx512_vnni);
PARING_RUN(run_i4_dense_avx512_vnni);
PARING_RUN(run_i8_bitmask_avx512_vnni);
PARING_RUN(run_i4_bitmask_avx512_vnni);
PARING_RUN(run_i8_block4_avx512_vnni);
PARING_RUN(run_i4_block4_avx512_vnni);
PARING_RUN(run_i8_2of4_avx512_vnni);
PARING_RUN(run_i4_2of4_avx512_vnni);
PARING_RUN(run_i8_4of16_avx512_vnni);
PARING_RUN(run_i4_4of16_avx512_vnni);
PARING_RUN(run_i8_n16_avx512_vnni);
PARING_RUN(run_i4_n16_avx512_vnni);
PARING_RUN(run_i8_pairs_avx512_vnni);
PARING_RUN(run_i4_pairs_avx512_vnni);
PARING_RUN(run_i8_columns_avx512_vnni);
PARING_RUN(run_i4_columns_avx512_vnni);

PARING_RUN(run_i8_bitmask_avx512_vbmi2);
PARING_RUN(run_i4_bitmask_avx512_vbmi2);
PARING_RUN(run_i8_n16_avx512_vbmi2);
PARING_RUN(run_i4_n16_avx512_vbmi2);
PARING_RUN(run_i8_pairs_avx512_vbmi2);
PARING_RUN(run_i4_pairs_avx512_vbmi2);
PARING_RUN(run_i8_columns_avx512_vbmi2);
PARING_RUN(run_i4_columns_avx512_vbmi2);
PARING_RUN(run_i4_words_avx512_vbmi2);

void quantize_neon(const Activations& out, int32_t begin, int32_t end);
PARING_RUN(run_f32_dense_neon);
PARING_RUN(run_f16_dense_neon);
PARING_RUN(run_f32_bitmask_neon);
PARING_RUN(run_i8_dense_neon);
PARING_RUN(run_i4_dense_neon);
PARING_RUN(run_i8_bitmask_neon);
PARING_RUN(run_i4_bitmask_neon);
PARING_RUN(run_i8_block4_neon);
PARING_RUN(run_i4_block4_neon);
PARING_RUN(run_i8_2of4_neon);
PARING_RUN(run_i4_2of4_neon);
PARING_RUN(run_i8_4of16_neon);
PARING_RUN(run_i4_4of16_neon);
PARING_RUN(run_i8_n16_neon);
PARING_RUN(run_i4_n16_neon);
PARING_RUN(run_i8_pairs_neon);
PARING_RUN(run_i4_pairs_neon);
PARING_RUN(run_i8_columns_neon);
PARING_RUN(run_i4_columns_neon);

PARING_RUN(run_i8_dense_neon_dotprod);
PARING_RUN(run_i4_dense_neon_dotprod);
PARING_RUN(run_i8_bitmask_neon_dotprod);
PARING_RUN(run_i4_bitmask_neon_dotprod);
PARING_RUN(run_i8_block4_neon_dotprod);
PARING_RUN(run_i4_block4_neon_dotprod);
PARING_RUN(run_i8_2of4_neon_dotprod);
PARING_RUN(run_i4_2of4_neon_dotprod);
PARING_RUN(run_i8_4of16_neon_dotprod);
PARING_RUN(run_i4_4of16_neon_dotprod);
PARING_RUN(run_i8_n16_neon_dotprod);
PARING_RUN(run_i4_n16_neon_dotprod);
PARING_RUN(run_i8_pairs_neon_dotprod);
PARING_RUN(run_i4_pairs_neon_dotprod);
PARING_RUN(run_i8_columns_neon_dotprod);
PARING_RUN(run_i4_columns_neon_dotprod);

// Which kept byte stands at place i of an 8-byte piece with a given mask, as a byte-shuffle control: 0x80 (gives 0)
// where none does. `low` for a piece in bytes 0..7 of the shuffled register, `high` for one in bytes 8..15.
struct ExpandTable {
    uint8_t low[256][8];
    uint8_t high[256][8];
};
extern const ExpandTable kExpand;

// The columns that an 8-bit mask keeps, ascending, then zeros: `low` for columns 0..7 of a window, `high` for 8..15.
struct ColumnTable {
    uint8_t low[256][8];
    uint8_t high[256][8];
};
extern const ColumnTable kColumns;

}  // namespace paring::kernels

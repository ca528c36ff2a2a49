// The linear-layer kernels: y = x W^T for the dtypes and storages of docs/architecture.md.
//
//   MatrixSource --validate, choose_layout, pack--> PackedMatrix     (once, at load)
//   x f32 [m, k] --quantize--> Activations                           (once per input, shared by q/k/v or gate/up)
//   run(PackedMatrix, Activations, y, panels [begin, end))           (every thread, a slice of panels each)
//
// Panels are 16 output rows. A weight matrix [n, k] has ceil(n / 16) panels; rows and columns are padded inside.
//
// Numerics, the same for every row of the dispatch table, so outputs are bit-identical between rows, between any
// split of the panels, and between m = 1 and m > 1 (fma is the correctly rounded one):
//   float          y = fma chain over k ascending, from 0, weights converted to f32
//   int8, group 0  acc = sum q_x q_w (int32, exact) - zero_point * sum q_w;  y = float(acc) * (scale_x * scale_w)
//   grouped        acc_g exact; y = fma(float(acc_g) * scale_x[g], scale_w[g], y) over g ascending, from 0;
//                  static zero point: then y = fma(-(float(zero_point) * scale_x), sum_g scale_w[g] * sum q_w, y)
//
// This header is the only one an ISA translation unit includes besides intrinsics, so it holds plain structs and
// declarations: nothing here may be emitted as a weak symbol in VEX or EVEX code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paring::kernels {

constexpr int32_t kPanelRows = 16;
constexpr int32_t kStep = 16;         // integer layouts pad k to a multiple of this
constexpr int32_t kMaxColumns = 65536;  // int32 accumulators stay exact up to here (checked by validate)
constexpr size_t kAlignment = 64;
constexpr size_t kOverread = 256;     // bytes readable past every packed buffer

enum class DType : uint8_t { f32, f16, i8, i4 };
enum class Storage : uint8_t { dense, bitmask };

// How the input of a linear is represented while its dot products are taken.
enum class InputMode : uint8_t {
    f32,           // float weights: x as it is
    int8_dynamic,  // symmetric, scale = amax / 127.5 per token
    int8_static,   // q = clamp(rne(x / scale) + zero_point, -128, 127)
    int16,         // weight-only: 15 bits per group of columns, q = rne(x / (amax_group / 16256))
};

// What quantize must produce. Two linears with the same input share one Activations when their specs are equal.
struct InputSpec {
    InputMode mode;
    int32_t group;       // columns per scale; 0 = one per token. int16 always has groups
    float scale;         // int8_static only, else 0
    int32_t zero_point;  // int8_static only, else 0
};

// A matrix as it stands in graph.safetensors (row-major, portable). Borrowed pointers, any alignment.
struct MatrixSource {
    int32_t n, k;            // out, in
    DType dtype;
    Storage storage;
    int32_t group;           // columns per weight scale; 0 = per output channel. 0 for f32/f16
    const void* values;      // dense [n, k] or the kept values; i4: nibbles, low first, each row starts on a byte
    size_t values_bytes;
    const uint8_t* mask;     // bitmask only: [n, ceil(k / 8)], least significant bit first; else null
    size_t mask_bytes;
    const float* scales;     // [n, ceil(k / group)] or [n, 1]; null for f32/f16
    size_t scales_count;
    InputMode mode;          // f32 for f32/f16 matrices, never for integers
    float input_scale;       // int8_static only
    int32_t input_zero_point;
};

// Packed forms. "Blocks" are 16 rows x 4 columns: byte 4 * row + column. Sparse panels are a sequence of chunks, each
// 64 bytes of masks and then the values they keep: one stream per panel, so that one prefetch pointer runs through
// everything. Masks of columns past the panel's are 0.
enum class Layout : uint8_t {
    f32_dense,     // [k][16] f32
    f16_dense,     // [k][16] f16
    f32_bitmask,   // chunks of 32 columns: u16 masks; kept f32
    i8_dense,      // [k/4] blocks of u8 = w + 128
    i4_dense,      // [k/8] blocks of u8 = (w + 8), low nibble columns 0..3, high nibble columns 4..7
    i8_bitmask,    // chunks of 8 blocks: u64 masks; kept u8 = w + 128, in block order
    i4_bitmask,    // chunks of 8 blocks: u64 masks; kept nibbles w + 8, low first, in block order; each block on a byte
    i8_block4,     // chunks of 32 blocks: u16 masks of the rows with anything kept; their 4 columns as u8 = w + 128
    i4_block4,     // the same with w + 8: 2 bytes, columns 0, 1 in the low nibbles, 2, 3 in the high ones
    // Fixed numbers of kept weights; where there are fewer, zeros fill up. "Vectors" are 16 rows x 4 kept weights.
    i8_2of4,       // chunks of 32 columns: 64 bytes, bits 2v, 2v + 1 of each the place in its 4 columns of a weight of
                   // vector v; vectors v < 4 of u8 = w + 128, of columns 8v .. 8v + 7. The last may be of 16 columns
    i4_2of4,       // the same with w + 8: low nibbles vector 2i, high nibbles 2i + 1
    i8_4of16,      // chunks of 16 columns: 32 bytes, low nibbles the columns of weights 0..31 of the vector, high ones
                   // of 32..63; one vector of u8 = w + 128
    i4_4of16,      // the same with w + 8: low nibbles weights 0..31, high ones 32..63
    i8_n16,        // u8 n in {0, 4, 8, 12, 16} per 16 columns, padded to 32 bytes; then for each: unless n is 0 or 16
                   // 16 u16 masks of a row each with n bits set; 16 x n u8 = w + 128
    i4_n16,        // the same with w + 8: 2 x 4n bytes; bytes i: low nibbles rows 4i .. 4i + 3, high ones 8 rows below
    // Shared masks: what any of the rows keeps is stored of all of them.
    i8_pairs,      // rows 2i, 2i + 1 share. Chunks of 64 columns: u64 masks of 8 pairs x 8 columns; for each the kept
                   // u8 = w + 128 of the even rows in mask order, then of the odd ones
    i4_pairs,      // the same with w + 8: even rows in the low nibbles, odd ones in the high
    i8_columns,    // all 16 rows share: u32 masks of 32 columns, padded to 64 bytes; then the kept columns as blocks of
                   // u8 = w + 128, each group's filled up with zeros to a block
    i4_columns,    // the same with w + 8, each group's filled up to two: low nibbles block 2i, high nibbles 2i + 1
    // i4_block4 for instructions that expand 16-bit words:
    i4_words,      // chunks of 16 pairs of blocks: u32 masks, bits 2r and 2r + 1 of row r's two; what i4_block4 stores of
                   // them, in mask order
    // Windows of 16 columns as often as 8 rows need them, 4 weights of each row at a time; zeros fill up.
    i8_lists,      // u16 for each group of columns (one if group = 0) and half of the rows: its vectors; padded to 32
                   // bytes. u8 for each vector: how many windows it is past the one before it, the first past the
                   // group's first (more than 255: empty vectors stand between); padded to 32. Then the vectors of 8
                   // rows x 4 weights: 16 bytes, low nibbles the columns of weights 0..15, high ones of 16..31; 32 i8,
                   // the even weights, then the odd ones
    i4_lists,      // the same with u4 = w + 8, 16 bytes: low nibbles weights 0..15, high ones 16..31
    // The same for 1x4 blocks: windows of 32 columns, and of each of the 8 rows a block of 4 at a time.
    i8_lists4,     // vectors of 4 bytes, nibble r the place among 8 of row r's block; 32 i8 as above
    i4_lists4,
    count,
};

// Owns one packed matrix. Immutable after pack; run reads it from any number of threads.
// Panel p occupies data[offset[p] .. offset[p + 1]): that is also its cost for balancing threads.
// Integer panels start with a header: 16 scales per group ([groups][16]), f16 if those of the whole matrix are exact in
// it and there are several groups, else f32, padded to 64 bytes; then 16 i32 row sums (group 0) or 16 f32 sums of
// scale * row sum (grouped); then the body described at Layout.
struct PackedMatrix {
    Layout layout;
    InputSpec input;
    int32_t n, k;
    int32_t panels;
    int32_t group;      // columns per step of the float accumulation; 0 = one int32 accumulation over k
    int32_t groups;     // ceil(k / group), 1 when group = 0
    int32_t scale_groups;  // weight scales stored per row: groups, or 1
    bool half_scales;   // they are f16; never where scale_groups is 1
    size_t header;      // bytes before a panel's body; 0 for floats
    size_t nonzeros;    // kept weights, as the source counts them
    size_t bytes;       // bytes one run over all panels reads
    uint8_t* data;
    uint64_t* offset;   // [panels + 1]

    PackedMatrix();
    ~PackedMatrix();
    PackedMatrix(PackedMatrix&& other) noexcept;
    PackedMatrix& operator=(PackedMatrix&& other) noexcept;
    PackedMatrix(const PackedMatrix&) = delete;
    PackedMatrix& operator=(const PackedMatrix&) = delete;
};

// The input of m tokens in every representation a kernel may read. A view over memory the caller owns.
struct Activations {
    InputSpec spec;
    int32_t m, k;
    int32_t padded;    // k rounded up to kStep; columns k.. are zero
    int32_t groups;    // ceil(k / spec.group), or 1
    const float* x;    // [m, ldx]: the float input itself (borrowed, not copied)
    size_t ldx;
    // What is a token's lies together, so that threads with tokens of their own never share a cache line.
    size_t plane;        // columns of a plane: padded rounded up to 64
    size_t stride;       // from token to token in hi and lo; bytes
    size_t wide_stride;  // the same in elements of wide,
    size_t side;         // and of scale and sum
    int8_t* hi;          // [m, plane]  q, or for int16 the high plane: q = 128 * hi + lo
    int8_t* lo;          // [m, plane]  int16 only: low plane, -64 .. 63
    int16_t* wide;       // [m, plane]  q itself, for rows that read it
    float* scale;        // [m, groups]
    int32_t* sum;        // [m, groups]  sum of q over the group
};

// x -> the planes of `out`, which bind_activations has laid out. Any x: a token (group) with an Inf or NaN gets
// scale NaN and q = 0, so its outputs are NaN; amax = 0 gives q = 0. Tokens [begin, end) only, for threads.
using QuantizeFn = void (*)(const Activations& out, int32_t begin, int32_t end);

// y[t * ldy + row] for t in [0, m) and rows of panels [begin, end); no other element of y is touched.
// `scratch` is run_scratch_bytes long, 64-byte aligned, one per thread. Never allocates.
using RunFn = void (*)(const PackedMatrix& w, const Activations& x, float* y, size_t ldy, int32_t begin, int32_t end,
                       void* scratch);

// One row of the dispatch table.
struct KernelRow {
    const char* name;
    uint32_t features;  // every bit must be in cpu_features()
    bool wide;          // its kernels read Activations::wide
    QuantizeFn quantize;
    RunFn run[static_cast<size_t>(Layout::count)];  // null: this row never chooses that layout
    // Cycles to decode and multiply 64 weights of each layout for one token, in cache (of lists: one vector): what
    // choose_layout weighs against the bytes to fetch. 0 where only bytes count.
    float cycles[static_cast<size_t>(Layout::count)];
};

// --- load time; plain C++, never in an ISA unit -------------------------------------------------------------

// Throws std::invalid_argument (what is wrong, with both numbers) unless every size, the mask's population and
// padding bits, group, scales and mode fit together.
void validate(const MatrixSource& source);

// The layout `row` should run fastest for this (valid) matrix by a small cost model over bytes and cycles.
// pack validates first. Throws std::bad_alloc.
Layout choose_layout(const KernelRow& row, const MatrixSource& source);
PackedMatrix pack(const MatrixSource& source, Layout layout);
const char* layout_name(Layout layout);

bool same_input(const InputSpec& a, const InputSpec& b);

// Memory for the input of one token of k columns; 0 for InputMode::f32, which needs none.
size_t activation_bytes(const InputSpec& spec, int32_t k);
// Lays the planes out in `memory`, 64-byte aligned, `stride` bytes for each token: activation_bytes or, to have tokens of
// several inputs in the same places, more, a multiple of 64.
Activations bind_activations(void* memory, size_t stride, const InputSpec& spec, const float* x, size_t ldx, int32_t m,
                             int32_t k);

// Scratch one thread needs for run on this matrix, whatever m.
size_t run_scratch_bytes(const PackedMatrix& matrix);

// First panel of part `part` of `parts`, balanced by bytes; split_panels(w, parts, parts) == w.panels.
int32_t split_panels(const PackedMatrix& matrix, int32_t part, int32_t parts);

}  // namespace paring::kernels

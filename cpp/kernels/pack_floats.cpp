// The bodies of float panels.
#include "tile.h"

namespace paring::kernels {
namespace {

template <class T>
void append_float_dense(std::vector<uint8_t>& out, const Tile<uint32_t>& tile, size_t k) {
    for (size_t j = 0; j < k; ++j)
        for (size_t r = 0; r < 16; ++r) {
            const T bits = static_cast<T>(tile.value[r * tile.columns + j]);
            append(out, &bits, sizeof bits);
        }
}

void append_float_bitmask(std::vector<uint8_t>& out, const Tile<uint32_t>& tile, size_t k) {
    Chunks<uint16_t> chunks(out);
    for (size_t j = 0; j < k; ++j) {
        uint32_t values[16];
        size_t used = 0;
        uint16_t mask = 0;
        for (size_t r = 0; r < 16; ++r) {
            if (!tile.kept[r * tile.columns + j]) continue;
            mask = static_cast<uint16_t>(mask | 1u << r);
            values[used++] = tile.value[r * tile.columns + j];
        }
        chunks.add(mask);
        append(out, values, used * 4);
    }
}

}  // namespace

void append_floats(std::vector<uint8_t>& out, Layout layout, const Tile<uint32_t>& tile, size_t k) {
    if (layout == Layout::f32_dense)
        append_float_dense<uint32_t>(out, tile, k);
    else if (layout == Layout::f16_dense)
        append_float_dense<uint16_t>(out, tile, k);
    else
        append_float_bitmask(out, tile, k);
}

}  // namespace paring::kernels

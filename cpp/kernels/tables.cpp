// Lookup tables that several instruction sets read.
#include "rows.h"

namespace paring::kernels {
namespace {

constexpr ExpandTable make_expand() {
    ExpandTable table{};
    for (int mask = 0; mask < 256; ++mask) {
        uint8_t next = 0;
        for (int i = 0; i < 8; ++i) {
            const bool kept = mask >> i & 1;
            table.low[mask][i] = kept ? next : 0x80;
            table.high[mask][i] = kept ? static_cast<uint8_t>(next + 8) : 0x80;
            next = static_cast<uint8_t>(next + kept);
        }
    }
    return table;
}

constexpr ColumnTable make_columns() {
    ColumnTable table{};
    for (int mask = 0; mask < 256; ++mask)
        for (int i = 0, next = 0; i < 8; ++i)
            if (mask >> i & 1) {
                table.low[mask][next] = static_cast<uint8_t>(i);
                table.high[mask][next++] = static_cast<uint8_t>(i + 8);
            }
    return table;
}

}  // namespace

constexpr ExpandTable kTable = make_expand();  // at compile time: no order of initialization to mind
const ExpandTable kExpand = kTable;
constexpr ColumnTable kColumnTable = make_columns();
const ColumnTable kColumns = kColumnTable;

}  // namespace paring::kernels

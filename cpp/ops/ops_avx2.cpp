#define PARING_OPS_ROW avx2_row
#define PARING_OPS_NAME "avx2"
#include "ops/body.inc"

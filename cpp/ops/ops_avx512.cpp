#define PARING_OPS_ROW avx512_row
#define PARING_OPS_NAME "avx512"
#include "ops/body.inc"

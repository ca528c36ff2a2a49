#define PARING_OPS_ROW avx512_vnni_row
#define PARING_OPS_NAME "avx512_vnni"
#include "ops/body.inc"

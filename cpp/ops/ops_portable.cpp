#define PARING_OPS_ROW portable_row
#define PARING_OPS_NAME "portable"
#include "ops/body.inc"

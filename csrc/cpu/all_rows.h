// Every row loop, for the instruction set that PYUNICTOKENS_LEVEL names. Included by rows_<level>.cpp and by nothing else.
// What is in here is compiled several times with different flags, so it must have internal linkage apart from the one
// table, and no template of the standard library may be used: its code, compiled for AVX, could be linked into the baseline.
#include "grpo_rows.h"
#include "head_rows.h"
#include "maskgit_rows.h"
#include "pointwise_rows.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {

const Rows rows{&maskgit_row,  &grpo_block,  kPanel,      &pack_tokens,       &pack_columns,
                &pack_weight,  &score_piece, &sums_panel, &gradient_panel,    &hidden_piece,
                &weight_piece, &bias_piece,  &gelu_block, &norm_rotary_block, &norm_rotary_slopes};

}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens

// The clipped-ratio GRPO loss over tokens whose log-probabilities are known: loss, statistics and gradient in one pass.
#pragma once

#include <cstdint>

#include "cpu_level.h"
#include "floats.h"

namespace pyunictokens {

struct GrpoLossArgs {
  const void *logp, *old_logp, *ref_logp;  // [tokens] each; ref_logp may be null
  FloatType logp_type, old_type, ref_type;
  std::int64_t tokens;                // >= 0
  std::int64_t tokens_per_advantage;  // >= 1; token j has advantages[j / tokens_per_advantage]
  const float* advantages;
  const float* alpha;         // [tokens], or one number if alpha_stride is 0
  std::int64_t alpha_stride;  // 0 or 1
  const bool* mask;           // [tokens] or null; what is read at a false token has no effect
  double rollouts;            // the loss is divided by it
  double clip_low, clip_high, beta;
  float* d_logp;  // [tokens]: gradient of the loss; null where none is wanted
  float* out;     // [5]: loss, clip fraction, mean k3, largest ratio, mean ratio
};

// Runs on at most `threads` threads; sums are formed over fixed blocks in a fixed order, whatever their number.
void grpo_loss_cpu(const GrpoLossArgs& args, int threads, CpuLevel level);

}  // namespace pyunictokens

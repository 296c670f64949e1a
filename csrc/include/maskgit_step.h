// One MaskGIT step over a batch: sample the unknown codes, score all of them, put the least confident back to the mask.
#pragma once

#include <cstdint>

#include "cpu_level.h"
#include "floats.h"

namespace pyunictokens {

struct MaskgitStepArgs {
  const void* logits;  // [B, N, K]; the last stride is 1
  FloatType type;
  std::int64_t batch, positions, entries;      // B, N, K >= 1
  std::int64_t stride_batch, stride_position;  // of logits, in elements
  const std::int64_t* codes;                   // [B, N], -1 where unknown, else in [0, K)
  const std::int64_t* mask_len;                // [B], >= 0
  const float* temperature;                    // [B], of the re-masking noise
  std::uint64_t seed;
  const std::int64_t* sample_ids;  // [B], >= 0
  const std::int64_t* step;        // [B], in [0, 65535]
  std::uint32_t stream;            // noise stream of the choices (noise.h)
  const float* token_gumbel;       // [B, N, K] or null: explicit noise instead of the generator's
  const float* rank_gumbel;        // [B, N] or null
  std::int64_t* out_codes;         // [B, N]
  std::int64_t* out_chosen;        // [B, N]
  float* out_logp;                 // [B, N]
  bool* out_masked;                // [B, N]
};

// Runs on at most `threads` threads (>= 1), the caller's being one of them. `level` must not exceed best_cpu_level().
void maskgit_step_cpu(const MaskgitStepArgs& args, int threads, CpuLevel level);

}  // namespace pyunictokens

// What the drivers (maskgit_step.cpp, grpo_loss.cpp, head.cpp) and the compilations of the *_rows.h files agree on: the
// functions that exist once per instruction set.
#pragma once

#include <cstdint>

#include "cpu_level.h"
#include "floats.h"
#include "grpo_loss.h"
#include "head.h"

namespace pyunictokens {

// maskgit_rows.h: one row of K logits -> one code and its log-probability.
struct RowTask {
  std::int64_t entries;  // K
  std::int64_t known;    // the code that stands here, or -1
  std::uint64_t seed, sample;
  std::uint32_t step, position, stream;
  const float* gumbel;  // K explicit values, or null
};

// grpo_rows.h: sums over a block of tokens.
struct GrpoSums {
  double loss, clipped, kl, ratio;
  float ratio_max;
  std::int64_t count;
};

struct Rows {
  // tile_max: scratch of at least K / 64 + 1 floats.
  void (*maskgit)(const void* logits, FloatType type, const RowTask& task, float* tile_max, std::int64_t* chosen,
                  float* logp);
  void (*grpo)(const GrpoLossArgs& args, std::int64_t first, std::int64_t last, GrpoSums* sums);
  void (*head_logprob)(const HeadArgs& args, std::int64_t row, float* lse, float* logp, float* entropy);
  void (*head_gradient)(const HeadArgs& args, std::int64_t row, float lse, float slope);
};

namespace baseline {
extern const Rows rows;
}
namespace avx2 {
extern const Rows rows;
}
namespace avx512 {
extern const Rows rows;
}

const Rows& rows_of(CpuLevel level);

}  // namespace pyunictokens

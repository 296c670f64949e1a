// What the drivers (maskgit_step.cpp, grpo_loss.cpp, head.cpp, pointwise.cpp) and the compilations of the *_rows.h files agree on: the
// functions that exist once per instruction set.
#pragma once

#include <cstdint>

#include "cpu_level.h"
#include "floats.h"
#include "grpo_loss.h"
#include "head.h"
#include "norm_rotary.h"

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

// One block of entries of a head: `weight`, `bias`, `scores` and `entries` are the block's, which begins at entry `first` of
// the head. A panel of scores has `lines` lines, of which the block's are one after the other.
struct HeadBlock : HeadArgs {
  std::int64_t first, lines;
};

// Of every token over the blocks so far: the highest logit, sum of e = exp(logit - top), sum of e (logit - top), and the
// logit of the target.
struct HeadSums {
  float top, chosen;
  double sum, weighted;
};

struct Rows {
  // tile_max: scratch of at least K / 64 + 1 floats.
  void (*maskgit)(const void* logits, FloatType type, const RowTask& task, float* tile_max, std::int64_t* chosen,
                  float* logp);
  void (*grpo)(const GrpoLossArgs& args, std::int64_t first, std::int64_t last, GrpoSums* sums);
  // head_products.h and head_rows.h: pieces of head.h. Tokens and columns are counted in panels of `panel`.
  int panel;
  void (*pack_tokens)(const HeadArgs& args, std::int64_t panel);
  void (*pack_columns)(const HeadArgs& args, std::int64_t panel);
  void (*pack_weight)(const HeadBlock& block, std::int64_t first, std::int64_t last);
  void (*score_piece)(const HeadBlock& block, std::int64_t first, std::int64_t last, std::int64_t first_panel,
                      std::int64_t last_panel);
  void (*sums_panel)(const HeadBlock& block, std::int64_t panel, HeadSums* sums, bool with_entropy);
  void (*gradient_panel)(const HeadBlock& block, std::int64_t panel, const float* lse, const float* slope);
  void (*hidden_piece)(const HeadBlock& block, std::int64_t first_column, std::int64_t last_column,
                       std::int64_t first_panel, std::int64_t last_panel, float* d_hidden);
  void (*weight_piece)(const HeadBlock& block, std::int64_t first, std::int64_t last, std::int64_t first_panel,
                       std::int64_t last_panel, float* d_weight);
  void (*bias_piece)(const HeadBlock& block, std::int64_t first, std::int64_t last, float* d_bias);
  // pointwise_rows.h: pieces of gelu.h and norm_rotary.h.
  void (*gelu)(const float* x, const float* grad, std::int64_t count, float* out);
  void (*norm_rotary)(const NormRotaryArgs& args, std::int64_t first, std::int64_t last, float* out,
                      const HeadStrides& out_strides);
  void (*norm_rotary_slopes)(const NormRotaryArgs& args, const NormRotaryGradients& gradients, std::int64_t first,
                             std::int64_t last, float* sums);
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

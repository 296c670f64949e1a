// A layer norm over the entries of a head, then a turn of the first of them by position: queries or keys of one layer.
#pragma once

#include <cstdint>

#include "cpu_level.h"

namespace pyunictokens {

// Strides of a tensor [batch, heads, length, width]; entries of a head lie one after another.
struct HeadStrides {
  std::int64_t batch, head, place;
};

struct NormRotaryArgs {
  const float* x;
  HeadStrides x_strides;
  std::int64_t batch, heads, length;  // >= 0 each
  std::int64_t width, rotary;         // E >= 1; R even, 0 < R <= E: entry e < R / 2 is turned with e + R / 2
  const float *cos, *sin;  // [length, rotary] of one batch row; the next lies `angle_batch` behind (may be 0)
  std::int64_t angle_batch;
  const float *weight, *bias;  // [width]
  float eps;
};

// On at most `threads` threads.
void norm_rotary_cpu(const NormRotaryArgs& args, float* out, const HeadStrides& out_strides, int threads,
                     CpuLevel level);

struct NormRotaryGradients {
  const float* grad;  // of the result
  HeadStrides grad_strides;
  float* d_x;
  HeadStrides d_x_strides;
  float* d_parameters;  // [2, width] of weight and of bias; null where they are not wanted
  float* sums;          // workspace for them: norm_rotary_sums(args) numbers
};

// Sums are formed over fixed blocks in a fixed order, whatever the number of threads.
void norm_rotary_backward_cpu(const NormRotaryArgs& args, const NormRotaryGradients& gradients, int threads,
                              CpuLevel level);
std::int64_t norm_rotary_sums(const NormRotaryArgs& args);

}  // namespace pyunictokens

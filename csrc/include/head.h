// A head over hidden states on the CPU, one chunk of tokens at a time: log-softmax of chosen entries, and its gradients. The
// scores W h are formed for a block of entries, used, and overwritten by the next block. The matrix products are this library's
// own (csrc/cpu/head_products.h). Guidance, masks and chunks are the caller's.
#pragma once

#include <cstdint>

#include "cpu_level.h"
#include "floats.h"

namespace pyunictokens {

// Workspaces are laid out in panels of up to this many tokens or columns; sizes are rounded up to a multiple of it.
constexpr std::int64_t kHeadPanel = 32;

constexpr std::int64_t padded(std::int64_t count) { return (count + kHeadPanel - 1) / kHeadPanel * kHeadPanel; }

// The products of a block go by this many of its entries at a time, whose weight is packed for them.
constexpr std::int64_t kHeadBlock = 512;

constexpr std::int64_t head_block(std::int64_t block) { return block < kHeadBlock ? block : kHeadBlock; }

struct HeadArgs {
  const float* hidden;       // [rows, width], contiguous
  std::int64_t rows, width;  // at least 1
  const void* weight;        // [entries, width], contiguous
  FloatType weight_type;
  std::int64_t entries;        // at least 1
  const float* bias;           // [entries] or null
  float inverse_temperature;   // logits = (W h + bias) * inverse_temperature
  const std::int64_t* target;  // [rows], in [0, entries)
  std::int64_t block;          // entries of a block, at least 1
  float* scores;               // workspace of min(block, entries) * padded(rows)
  float* packed;  // of padded(width) * (head_block(block) + padded(rows)); 2 padded(rows) for head_backward_cpu
};

// lse = log sum exp(logits), logp = logits[target] - lse, and the entropy of softmax(logits) in nats if it is not null.
void head_logprob_cpu(const HeadArgs& args, float* lse, float* logp, float* entropy, int threads, CpuLevel level);

// The gradient of sum slope * logp: d_hidden [rows, width] is written, d_weight [entries, width] and d_bias [entries] are added
// to; each may be null. held: the scores are still those that head_logprob_cpu left, which takes block >= entries; else they are
// formed again.
void head_backward_cpu(const HeadArgs& args, const float* lse, const float* slope, bool held, float* d_hidden,
                       float* d_weight, float* d_bias, int threads, CpuLevel level);

}  // namespace pyunictokens

// What follows the product of hidden states and head, on one chunk of rows: log-softmax of the chosen entries, and the
// gradient of the scores in their place. The products themselves are the caller's.
#pragma once

#include <cstdint>

#include "cpu_level.h"

namespace pyunictokens {

struct HeadArgs {
  float* scores;                   // [rows, entries], contiguous: W h
  std::int64_t rows, entries;      // rows >= 0, entries >= 1
  const float* bias;               // [entries] or null
  float inverse_temperature;       // logits = (scores + bias) * inverse_temperature
  const std::int64_t* target;      // [rows], in [0, entries)
};

// lse = log sum exp(logits), logp = logits[target] - lse, and the entropy of softmax(logits) in nats if it is not null.
void head_logprob_cpu(const HeadArgs& args, float* lse, float* logp, float* entropy, int threads, CpuLevel level);

// scores = d/d scores of sum slope * logp: slope * (onehot(target) - softmax(logits)) * inverse_temperature.
void head_gradient_cpu(const HeadArgs& args, const float* lse, const float* slope, int threads, CpuLevel level);

}  // namespace pyunictokens

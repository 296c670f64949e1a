// The inner loops of head.h: one row of scores -> log-sum-exp, log-probability of the chosen entry and entropy; and the
// gradient of the scores in their place. A row of a few thousand entries stays in the L1 or L2 cache between the passes.
#include "lanes.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

inline void logits_tile(const HeadArgs& args, const float* scores, std::int64_t start, float* x) {
  load(scores, start, args.entries, x);
  if (args.bias != nullptr) {
    float bias[kTile];
    load(args.bias, start, args.entries, bias, 0.0f);
    for (int i = 0; i < kTile; ++i) x[i] += bias[i];
  }
  for (int i = 0; i < kTile; ++i) x[i] *= args.inverse_temperature;
}

// Sums of e = exp(x - top) and, for the entropy, of e (x - top); float32 inside 32 tiles, double beyond.
template <bool with_entropy>
inline void sum_row(const HeadArgs& args, const float* scores, float top, double* sum, double* weighted) {
  const std::int64_t span = 32 * kTile;
  for (std::int64_t begin = 0; begin < args.entries; begin += span) {
    const std::int64_t end = begin + span < args.entries ? begin + span : args.entries;
    float sums[kTile] = {}, weights[kTile] = {}, x[kTile];
    for (std::int64_t start = begin; start < end; start += kTile) {
      logits_tile(args, scores, start, x);
      for (int i = 0; i < kTile; ++i) {
        const float below = x[i] - top, e = exp_negative(below);
        sums[i] += e;
        if (with_entropy) weights[i] += e * (below < -87.0f ? -87.0f : below);  // finite where e is as good as 0
      }
    }
    for (int i = 0; i < kTile; ++i) *sum += double(sums[i]);
    for (int i = 0; with_entropy && i < kTile; ++i) *weighted += double(weights[i]);
  }
}

void head_logprob_row(const HeadArgs& args, std::int64_t row, float* lse, float* logp, float* entropy) {
  const float* scores = args.scores + row * args.entries;
  float x[kTile], tops[kTile];
  for (int i = 0; i < kTile; ++i) tops[i] = -INFINITY;
  for (std::int64_t start = 0; start < args.entries; start += kTile) {
    logits_tile(args, scores, start, x);
    for (int i = 0; i < kTile; ++i) tops[i] = tops[i] < x[i] ? x[i] : tops[i];
  }
  const float top = max_of_tile(tops);
  double sum = 0.0, weighted = 0.0;
  if (entropy != nullptr)
    sum_row<true>(args, scores, top, &sum, &weighted);
  else
    sum_row<false>(args, scores, top, &sum, &weighted);
  const double log_sum = std::log(sum);
  const std::int64_t target = args.target[row];
  const float chosen = (scores[target] + (args.bias ? args.bias[target] : 0.0f)) * args.inverse_temperature;
  lse[row] = float(double(top) + log_sum);
  logp[row] = float(double(chosen) - double(top) - log_sum);
  if (entropy != nullptr) entropy[row] = float(log_sum - weighted / sum);
}

void head_gradient_row(const HeadArgs& args, std::int64_t row, float lse, float slope) {
  float* scores = args.scores + row * args.entries;
  const float factor = -slope * args.inverse_temperature;
  for (std::int64_t start = 0; start < args.entries; start += kTile) {
    float x[kTile];
    logits_tile(args, scores, start, x);
    for (int i = 0; i < kTile; ++i) {
      const float below = x[i] - lse, e = exp_negative(below);
      x[i] = factor * (below < -87.0f ? 0.0f : e);
    }
    const std::int64_t count = args.entries - start < kTile ? args.entries - start : kTile;
    if (count == kTile)
      std::memcpy(scores + start, x, sizeof(x));
    else
      for (std::int64_t i = 0; i < count; ++i) scores[start + i] = x[i];
  }
  scores[args.target[row]] -= factor;
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens

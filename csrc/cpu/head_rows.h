// The softmax of head.h: a panel of scores -> sums of exponentials of its tokens; and the gradient of the scores in their place.
// Lanes are tokens, so nothing is summed across lanes (layout: head_products.h).
#include "head_products.h"
#include "lanes.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

typedef std::int32_t WideInt __attribute__((vector_size(4 * kWide)));
typedef std::uint32_t WideBits __attribute__((vector_size(4 * kWide)));

// exp_negative of lanes.h, a lane each. Bits are unsigned: x may be infinite or no number, and nothing may overflow then.
inline Wide exp_negative(Wide x) {
  x = x < -87.0f ? Wide{} - 87.0f : x;
  const Wide shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const Wide r = (x - n * kLog2High) - n * kLog2Low;
  const Wide p = (exp_remainder(r) * r) * r + r + 1.0f;
  return reinterpret_cast<Wide>(reinterpret_cast<WideBits>(p) +
                                ((reinterpret_cast<WideBits>(shifted) - 0x4B400000u) << 23));
}

inline Wide& at(float* address) { return *reinterpret_cast<Wide*>(address); }
inline const Wide& at(const float* address) { return *reinterpret_cast<const Wide*>(address); }

// (score + bias) * inverse_temperature, for the scores of one entry or for one number.
template <typename T>
inline T logit(const HeadBlock& block, T score, std::int64_t entry) {
  return (block.bias != nullptr ? score + block.bias[entry] : score) * block.inverse_temperature;
}

// Sums of e = exp(x - top) and, for the entropy, of e (x - top); float32 inside 64 entries, double beyond.
template <bool with_entropy>
inline void sum_lanes(const HeadBlock& block, const float* line, Wide top, double* sum, double* weighted) {
  for (std::int64_t begin = 0; begin < block.entries; begin += 64) {
    const std::int64_t end = begin + 64 < block.entries ? begin + 64 : block.entries;
    Wide sums{}, weights{};
    for (std::int64_t entry = begin; entry < end; ++entry, line += kPanel) {
      const Wide below = logit(block, at(line), entry) - top, e = exp_negative(below);
      sums += e;
      if (with_entropy) weights += e * (below < -87.0f ? Wide{} - 87.0f : below);  // finite where e is as good as 0
    }
    for (int i = 0; i < kWide; ++i) sum[i] += double(sums[i]);
    for (int i = 0; with_entropy && i < kWide; ++i) weighted[i] += double(weights[i]);
  }
}

// Takes another block's sums, which are relative to another highest logit, into those so far.
inline void join(HeadSums* so_far, float top, double sum, double weighted) {
  if (top == -INFINITY && sum == sum) return;  // every entry is excluded; a sum that is not a number is passed on
  const float highest = so_far->top < top ? top : so_far->top;
  const double here = std::exp(double(top) - double(highest));
  const double before = so_far->sum == 0.0 ? 0.0 : std::exp(double(so_far->top) - double(highest));
  weighted += sum * (double(top) - double(highest));
  if (so_far->sum != 0.0) so_far->weighted += so_far->sum * (double(so_far->top) - double(highest));
  so_far->weighted = so_far->weighted * before + weighted * here;
  so_far->sum = so_far->sum * before + sum * here;
  so_far->top = highest;
}

// Tokens [token, token + kWide), whose scores are the columns at `scores`.
inline void sums_lanes(const HeadBlock& block, std::int64_t token, const float* scores, HeadSums* sums,
                       bool with_entropy) {
  Wide top = Wide{} - INFINITY;
  for (std::int64_t entry = 0; entry < block.entries; ++entry) {
    const Wide x = logit(block, at(scores + entry * kPanel), entry);
    top = top < x ? x : top;
  }
  // Excluded entries are -inf, and no distance from -inf is a number.
  const Wide origin = top == -INFINITY ? Wide{} : top;
  double sum[kWide] = {}, weighted[kWide] = {};
  if (with_entropy)
    sum_lanes<true>(block, scores, origin, sum, weighted);
  else
    sum_lanes<false>(block, scores, origin, sum, weighted);
  for (std::int64_t i = 0; i < kWide && token + i < block.rows; ++i) {
    join(&sums[token + i], top[i], sum[i], weighted[i]);
    const std::int64_t target = block.target[token + i] - block.first;
    if (target >= 0 && target < block.entries)
      sums[token + i].chosen = logit(block, scores[target * kPanel + i], target);
  }
}

inline void gradient_lanes(const HeadBlock& block, std::int64_t token, float* scores, const float* lse,
                           const float* slope) {
  Wide sums{}, factor{};
  WideInt there{};
  for (std::int64_t i = 0; i < kWide && token + i < block.rows; ++i) {
    there[i] = -1;
    sums[i] = lse[token + i];
    factor[i] = -slope[token + i] * block.inverse_temperature;
  }
  for (std::int64_t entry = 0; entry < block.entries; ++entry) {
    Wide& line = at(scores + entry * kPanel);
    const Wide below = logit(block, line, entry) - sums, e = exp_negative(below);
    line = there ? factor * (below < -87.0f ? Wide{} : e) : Wide{};  // past the last token 0, whatever the weight is
  }
  for (std::int64_t i = 0; i < kWide && token + i < block.rows; ++i) {
    const std::int64_t target = block.target[token + i] - block.first;
    if (target >= 0 && target < block.entries) scores[target * kPanel + i] -= factor[i];
  }
}

void sums_panel(const HeadBlock& block, std::int64_t panel, HeadSums* sums, bool with_entropy) {
  for (int start = 0; start < kPanel; start += kWide)
    sums_lanes(block, panel * kPanel + start, block.scores + panel * block.lines * kPanel + start, sums, with_entropy);
}

void gradient_panel(const HeadBlock& block, std::int64_t panel, const float* lse, const float* slope) {
  for (int start = 0; start < kPanel; start += kWide)
    gradient_lanes(block, panel * kPanel + start, block.scores + panel * block.lines * kPanel + start, lse, slope);
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens

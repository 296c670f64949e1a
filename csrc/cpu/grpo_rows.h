// The inner loop of grpo_loss.h: one pass over a block of tokens, 64 at a time. Values are float32 per token; what is summed
// over more than four tokens is summed in double.
#include "lanes.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

constexpr int kLanes = 16;

// exp(x) of any x, one tile.
inline void exp_tile(const float* x, float* value) {
  for (int i = 0; i < kTile; ++i) {
    const float bounded = x[i] < -87.0f ? -87.0f : x[i], inside = bounded > 88.72284f ? 88.72284f : bounded;
    float r;
    const float shifted = split_exponent(inside, &r);
    const float e = times_power_of_two((exp_remainder(r) * r) * r + r + 1.0f, shifted);
    const float low = x[i] < -87.0f ? 0.0f : e, high = x[i] > 88.72284f ? INFINITY : low;
    value[i] = x[i] == x[i] ? high : x[i];
  }
}

// exp(x) - 1 and exp(x) - 1 - x, which keep full relative precision where x is near 0.
inline void exp_minus_tile(const float* x, float* minus_one, float* rest) {
  exp_tile(x, minus_one);
  for (int i = 0; i < kTile; ++i) {
    const float inside = x[i] < -1.0f ? -1.0f : x[i] > 1.0f ? 1.0f : x[i];
    const float near = (exp_remainder(inside) * inside) * inside, far = minus_one[i] - 1.0f;
    const float size = x[i] < 0.0f ? -x[i] : x[i];
    rest[i] = size < 0.34f ? near : far - x[i];
    minus_one[i] = size < 0.34f ? near + inside : far;
  }
}

inline void load_tokens(const void* from, FloatType type, std::int64_t start, std::int64_t end, float* to) {
  if (type == FloatType::kFloat32)
    load(static_cast<const float*>(from), start, end, to, 0.0f);
  else if (type == FloatType::kBFloat16)
    load(static_cast<const BFloat16*>(from), start, end, to, 0.0f);
  else
    load(static_cast<const Float16*>(from), start, end, to, 0.0f);
}

inline void add_tile(const float* terms, double* lanes) {
  for (int i = 0; i < kLanes; ++i)
    lanes[i] += double((terms[i] + terms[i + kLanes]) + (terms[i + 2 * kLanes] + terms[i + 3 * kLanes]));
}

inline double total(const double* lanes) {
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

void grpo_block(const GrpoLossArgs& args, std::int64_t first, std::int64_t last, GrpoSums* sums) {
  const float low = float(1.0 - args.clip_low), high = float(1.0 + args.clip_high), beta = float(args.beta);
  const float per_rollout = float(-1.0 / args.rollouts);
  double loss[kLanes] = {}, clipped[kLanes] = {}, kl[kLanes] = {}, ratios[kLanes] = {};
  float largest[kTile] = {};
  std::int64_t count = 0;
  for (std::int64_t start = first; start < last; start += kTile) {
    float logp[kTile], old[kTile], ref[kTile], advantage[kTile], share[kTile], slope[kTile];
    float term[kTile], clip[kTile], ratio[kTile];
    std::int32_t kept[kTile];
    const std::int64_t here = last - start < kTile ? last - start : kTile;
    load_tokens(args.logp, args.logp_type, start, last, logp);
    load_tokens(args.old_logp, args.old_type, start, last, old);
    if (args.ref_logp != nullptr)
      load_tokens(args.ref_logp, args.ref_type, start, last, ref);
    else
      std::memcpy(ref, logp, sizeof(ref));
    if (args.tokens_per_advantage == 1) {
      load(args.advantages, start, last, advantage, 0.0f);
    } else {
      const std::int64_t row = start / args.tokens_per_advantage, row_end = (row + 1) * args.tokens_per_advantage;
      for (int i = 0; i < kTile; ++i) advantage[i] = args.advantages[row];
      for (std::int64_t i = row_end - start; i < here; ++i)
        advantage[i] = args.advantages[(start + i) / args.tokens_per_advantage];
    }
    if (args.alpha_stride != 0)
      load(args.alpha, start, last, share, 0.0f);
    else
      for (int i = 0; i < kTile; ++i) share[i] = *args.alpha;
    for (int i = 0; i < kTile; ++i) kept[i] = i < here;
    if (args.mask != nullptr)
      for (std::int64_t i = 0; i < here; ++i) kept[i] = args.mask[start + i];
    float gap[kTile] = {}, pull[kTile] = {}, rest[kTile] = {};
    for (int i = 0; i < kTile; ++i) gap[i] = ref[i] - logp[i];
    for (int i = 0; i < kTile; ++i) old[i] = logp[i] - old[i];
    exp_tile(old, ratio);
    if (args.ref_logp != nullptr) exp_minus_tile(gap, pull, rest);
    std::int32_t kept_here = 0;
    for (int i = 0; i < kTile; ++i) {
      const float a = advantage[i], d = ratio[i];
      const float above = d < low ? low : d, inside = above > high ? high : above;
      const float free = d * a, bounded = inside * a;
      const bool stopped = ((a > 0.0f) & (d > high)) | ((a < 0.0f) & (d < low));
      const float value = free > bounded ? bounded : free;
      term[i] = value;
      slope[i] = stopped ? 0.0f : free;
      clip[i] = stopped ? 1.0f : 0.0f;
    }
    // Without a penalty k3 must not enter at all: it may be infinite.
    for (int i = 0; beta != 0.0f && i < kTile; ++i) {
      term[i] -= beta * rest[i];
      slope[i] += beta * pull[i];
    }
    for (int i = 0; i < kTile; ++i) {
      const float weight = per_rollout * share[i];
      term[i] = kept[i] ? weight * term[i] : 0.0f;
      slope[i] = kept[i] ? weight * slope[i] : 0.0f;
      clip[i] = kept[i] ? clip[i] : 0.0f;
      rest[i] = kept[i] ? rest[i] : 0.0f;
      ratio[i] = kept[i] ? ratio[i] : 0.0f;
      largest[i] = largest[i] < ratio[i] ? ratio[i] : largest[i];
      kept_here += kept[i];
    }
    count += kept_here;
    add_tile(term, loss);
    add_tile(clip, clipped);
    add_tile(rest, kl);
    add_tile(ratio, ratios);
    if (here == kTile)
      std::memcpy(args.d_logp + start, slope, sizeof(slope));
    else
      for (std::int64_t i = 0; i < here; ++i) args.d_logp[start + i] = slope[i];
  }
  *sums = {total(loss), total(clipped), total(kl), total(ratios), max_of_tile(largest), count};
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens

// The inner loop of grpo_loss.h: one pass over a block of tokens, 64 at a time. Values are float32 per token; what is summed
// over more than four tokens is summed in double.
#include "lanes.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

constexpr int kLanes = 16;

// exp(x) of any x. `q`, where given, becomes x^2 (1/2 + x/6 + ...) = exp(x) - 1 - x, which holds for |x| < 0.34 alone.
inline float exp_any(float x, float* q = nullptr) {
  const float bounded = x < -87.0f ? -87.0f : x, inside = bounded > 88.72284f ? 88.72284f : bounded;
  float r;
  const float shifted = split_exponent(inside, &r);
  const float near = (exp_remainder(r) * r) * r;  // for such x the exponent is 0, so r is x
  if (q != nullptr) *q = near;
  const float e = times_power_of_two(near + r + 1.0f, shifted);
  const float low = x < -87.0f ? 0.0f : e;
  return x <= 88.72284f ? low : x + INFINITY;  // NaN stays
}

// exp(x) - 1 and exp(x) - 1 - x, which keep full relative precision where x is near 0.
inline void exp_minus(float x, float* minus_one, float* rest) {
  float near;
  const float far = exp_any(x, &near) - 1.0f, size = x < 0.0f ? -x : x;
  *rest = size < 0.34f ? near : far - x;
  *minus_one = size < 0.34f ? near + x : far;
}

// Tokens [start, start + 64) as float32: where they lie if that is what they are and they are all there, else in `tile`.
inline const float* tokens_of(const void* from, FloatType type, std::int64_t start, std::int64_t end, float* tile) {
  if (type == FloatType::kFloat32) {
    if (start + kTile <= end) return static_cast<const float*>(from) + start;
    load(static_cast<const float*>(from), start, end, tile, 0.0f);
  } else if (type == FloatType::kBFloat16) {
    load(static_cast<const BFloat16*>(from), start, end, tile, 0.0f);
  } else {
    load(static_cast<const Float16*>(from), start, end, tile, 0.0f);
  }
  return tile;
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

// What one tile gives, per token.
struct GrpoTile {
  float term[kTile], slope[kTile], clip[kTile], k3[kTile], ratio[kTile];
};

// The numbers that are the same for all tokens.
struct GrpoNumbers {
  float low, high, beta, per_rollout;
};

// One tile, in one loop, so that nothing between inputs and results leaves the registers. kWhole: every token counts.
template <bool kGradient, bool kReference, bool kPenalty, bool kWhole>
inline void grpo_tile(const GrpoNumbers& n, const float* logp, const float* old, const float* ref,
                      const float* advantage, const float* share, const std::int32_t* kept, GrpoTile* out) {
  for (int i = 0; i < kTile; ++i) {
    const float a = advantage[i], d = exp_any(logp[i] - old[i]);
    float pull = 0.0f, rest = 0.0f;
    if (kReference) exp_minus(ref[i] - logp[i], &pull, &rest);
    const float above = d < n.low ? n.low : d, inside = above > n.high ? n.high : above;
    const float free = d * a, bounded = inside * a;
    const bool stopped = (d - inside) * a > 0.0f;  // beyond a bound, and on the side where that ends the gain
    // Without a penalty k3 must not enter at all: it may be infinite.
    const float value = (free > bounded ? bounded : free) - (kPenalty ? n.beta * rest : 0.0f);
    const float weight = n.per_rollout * share[i];
    const bool counts = kWhole || kept[i];
    out->term[i] = counts ? weight * value : 0.0f;
    out->clip[i] = counts & stopped ? 1.0f : 0.0f;
    out->k3[i] = counts ? rest : 0.0f;
    out->ratio[i] = counts ? d : 0.0f;
    if (kGradient) {
      const float slope = (stopped ? 0.0f : free) + (kPenalty ? n.beta * pull : 0.0f);
      out->slope[i] = counts ? weight * slope : 0.0f;
    }
  }
}

template <bool kGradient, bool kReference, bool kPenalty>
void grpo_tokens(const GrpoLossArgs& args, std::int64_t first, std::int64_t last, GrpoSums* sums) {
  const GrpoNumbers numbers = {float(1.0 - args.clip_low), float(1.0 + args.clip_high), float(args.beta),
                               float(-1.0 / args.rollouts)};
  double loss[kLanes] = {}, clipped[kLanes] = {}, kl[kLanes] = {}, ratios[kLanes] = {};
  float largest[kTile] = {}, advantage[kTile], share[kTile];
  std::int64_t count = 0, of_row = -1;
  for (int i = 0; i < kTile; ++i) share[i] = *args.alpha;
  for (std::int64_t start = first; start < last; start += kTile) {
    float tiles[3][kTile];
    std::int32_t kept[kTile];
    GrpoTile out;
    const std::int64_t here = last - start < kTile ? last - start : kTile;
    const float* logp = tokens_of(args.logp, args.logp_type, start, last, tiles[0]);
    const float* old = tokens_of(args.old_logp, args.old_type, start, last, tiles[1]);
    const float* ref = kReference ? tokens_of(args.ref_logp, args.ref_type, start, last, tiles[2]) : nullptr;
    if (args.tokens_per_advantage == 1) {
      load(args.advantages, start, last, advantage, 0.0f);
    } else {
      const std::int64_t row = start / args.tokens_per_advantage, row_end = (row + 1) * args.tokens_per_advantage;
      if (row != of_row)
        for (int i = 0; i < kTile; ++i) advantage[i] = args.advantages[row];
      of_row = row;
      for (std::int64_t i = row_end - start; i < here; ++i) {
        advantage[i] = args.advantages[(start + i) / args.tokens_per_advantage];
        of_row = -1;
      }
    }
    if (args.alpha_stride != 0) load(args.alpha, start, last, share, 0.0f);
    if (args.mask == nullptr && here == kTile) {
      grpo_tile<kGradient, kReference, kPenalty, true>(numbers, logp, old, ref, advantage, share, kept, &out);
      count += kTile;
    } else {
      for (int i = 0; i < kTile; ++i) kept[i] = i < here;
      if (args.mask != nullptr)
        for (std::int64_t i = 0; i < here; ++i) kept[i] = args.mask[start + i];
      grpo_tile<kGradient, kReference, kPenalty, false>(numbers, logp, old, ref, advantage, share, kept, &out);
      for (int i = 0; i < kTile; ++i) count += kept[i];
    }
    for (int i = 0; i < kTile; ++i) largest[i] = largest[i] < out.ratio[i] ? out.ratio[i] : largest[i];
    add_tile(out.term, loss);
    add_tile(out.clip, clipped);
    add_tile(out.k3, kl);
    add_tile(out.ratio, ratios);
    if (kGradient) std::memcpy(args.d_logp + start, out.slope, sizeof(float) * std::size_t(here));
  }
  *sums = {total(loss), total(clipped), total(kl), total(ratios), max_of_tile(largest), count};
}

void grpo_block(const GrpoLossArgs& args, std::int64_t first, std::int64_t last, GrpoSums* sums) {
  const bool reference = args.ref_logp != nullptr, penalty = reference && args.beta != 0.0;
  const auto with = penalty     ? grpo_tokens<true, true, true>
                    : reference ? grpo_tokens<true, true, false>
                                : grpo_tokens<true, false, false>;
  const auto without = penalty     ? grpo_tokens<false, true, true>
                       : reference ? grpo_tokens<false, true, false>
                                   : grpo_tokens<false, false, false>;
  const auto block = args.d_logp != nullptr ? with : without;
  block(args, first, last, sums);
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens

// The inner loops of gelu.h and norm_rotary.h, which read and write every number once. All in float32.
#include "lanes.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

constexpr float kGelu = 1.5957691216057308f, kGeluCube = 0.044715f;  // 2 sqrt(2 / pi), and its x^3

// 1 / (1 + exp(-z)) and 1 minus that, each with full relative precision.
inline void logistic(float z, float* value, float* rest) {
  const float below = z < 0.0f ? z : -z;
  const float power = exp_negative(below), e = below < -87.0f ? 0.0f : power, most = 1.0f / (1.0f + e);
  *value = z < 0.0f ? e * most : most;
  *rest = z < 0.0f ? most : e * most;
}

void gelu_block(const float* x, const float* grad, std::int64_t count, float* out) {
  if (grad == nullptr) {
    for (std::int64_t i = 0; i < count; ++i) {
      float value, rest;
      logistic(kGelu * x[i] * (1.0f + kGeluCube * x[i] * x[i]), &value, &rest);
      out[i] = x[i] * value;
    }
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    float value, rest;
    const float square = kGeluCube * x[i] * x[i];
    logistic(kGelu * x[i] * (1.0f + square), &value, &rest);
    out[i] = grad[i] * (value + x[i] * value * rest * kGelu * (1.0f + 3.0f * square));
  }
}

constexpr int kSumLanes = 16;

inline float total_of_lanes(const float* lanes) {
  float eight[8], four[4];
  for (int i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Sum of term(e) over e < width.
template <typename Term>
inline float sum_of(std::int64_t width, const Term& term) {
  float lanes[kSumLanes] = {};
  std::int64_t e = 0;
  for (; e + kSumLanes <= width; e += kSumLanes)
    for (int i = 0; i < kSumLanes; ++i) lanes[i] += term(e + i);
  for (int i = 0; e < width; ++i, ++e) lanes[i] += term(e);
  return total_of_lanes(lanes);
}

// Mean, and 1 over the standard deviation, of one head.
struct Moments {
  float mean, scale;
  Moments(const float* x, std::int64_t width, float eps) {
    mean = sum_of(width, [x](std::int64_t e) { return x[e]; }) / float(width);
    const float m = mean;
    const float squares = sum_of(width, [x, m](std::int64_t e) { return (x[e] - m) * (x[e] - m); });
    scale = 1.0f / std::sqrt(squares / float(width) + eps);
  }
};

// Head number `line` of [batch, heads, length], and those behind it.
struct HeadPlace {
  std::int64_t row, head, place;
  HeadPlace(const NormRotaryArgs& args, std::int64_t line)
      : row(line / args.length / args.heads), head(line / args.length % args.heads), place(line % args.length) {}
  void next(const NormRotaryArgs& args) {
    if (++place < args.length) return;
    place = 0;
    if (++head < args.heads) return;
    head = 0;
    ++row;
  }
  std::int64_t at(const HeadStrides& strides) const {
    return row * strides.batch + head * strides.head + place * strides.place;
  }
  std::int64_t angle(const NormRotaryArgs& args) const { return row * args.angle_batch + place * args.rotary; }
};

void norm_rotary_block(const NormRotaryArgs& args, std::int64_t first, std::int64_t last, float* out,
                       const HeadStrides& out_strides) {
  const std::int64_t width = args.width, half = args.rotary / 2;
  const float* __restrict weight = args.weight, * __restrict bias = args.bias;
  HeadPlace head(args, first);
  for (std::int64_t line = first; line < last; ++line, head.next(args)) {
    const float* __restrict x = args.x + head.at(args.x_strides);
    const float* __restrict cos = args.cos + head.angle(args), * __restrict sin = args.sin + head.angle(args);
    float* __restrict to = out + head.at(out_strides);
    const Moments moments(x, width, args.eps);
    for (std::int64_t e = 0; e < width; ++e) to[e] = (x[e] - moments.mean) * moments.scale * weight[e] + bias[e];
    float* __restrict partner = to + half;
    for (std::int64_t e = 0; e < half; ++e) {
      const float a = to[e], b = partner[e];
      to[e] = a * cos[e] - b * sin[e];
      partner[e] = b * cos[e + half] + a * sin[e + half];
    }
  }
}

// sums: [2, width] of weight and bias over these lines, or null.
void norm_rotary_slopes(const NormRotaryArgs& args, const NormRotaryGradients& gradients, std::int64_t first,
                        std::int64_t last, float* sums) {
  const std::int64_t width = args.width, half = args.rotary / 2;
  const float* __restrict weight = args.weight;
  for (std::int64_t e = 0; sums != nullptr && e < 2 * width; ++e) sums[e] = 0.0f;
  HeadPlace head(args, first);
  for (std::int64_t line = first; line < last; ++line, head.next(args)) {
    const float* __restrict x = args.x + head.at(args.x_strides);
    const float* __restrict cos = args.cos + head.angle(args), * __restrict sin = args.sin + head.angle(args);
    const float* __restrict given = gradients.grad + head.at(gradients.grad_strides);
    float* __restrict to = gradients.d_x + head.at(gradients.d_x_strides);
    const Moments moments(x, width, args.eps);
    const float mean = moments.mean, scale = moments.scale;
    // First of the norm's result: the turn back.
    float* __restrict partner = to + half;
    for (std::int64_t e = 0; e < half; ++e) {
      const float a = given[e], b = given[e + half];
      to[e] = a * cos[e] + b * sin[e + half];
      partner[e] = b * cos[e + half] - a * sin[e];
    }
    for (std::int64_t e = args.rotary; e < width; ++e) to[e] = given[e];
    if (sums != nullptr)
      for (std::int64_t e = 0; e < width; ++e) {
        sums[e] += to[e] * ((x[e] - mean) * scale);
        sums[width + e] += to[e];
      }
    const float level = sum_of(width, [=](std::int64_t e) { return to[e] * weight[e]; }) / float(width);
    const float along =
        sum_of(width, [=](std::int64_t e) { return to[e] * weight[e] * ((x[e] - mean) * scale); }) / float(width);
    for (std::int64_t e = 0; e < width; ++e)
      to[e] = scale * (to[e] * weight[e] - level - (x[e] - mean) * scale * along);
  }
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens

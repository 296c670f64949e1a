// gelu.h and norm_rotary.h on the CPU: fixed blocks shared among threads.
#include <algorithm>

#include "gelu.h"
#include "norm_rotary.h"
#include "rows.h"
#include "threads.h"

namespace pyunictokens {

namespace {

constexpr std::int64_t kNumbers = 8192, kLines = 128;  // of one block: of a GELU, of heads

std::int64_t lines_of(const NormRotaryArgs& args) { return args.batch * args.heads * args.length; }

}  // namespace

void gelu_cpu(const float* x, const float* grad, std::int64_t count, float* out, int threads, CpuLevel level) {
  const auto block = rows_of(level).gelu;
  parallel_for(count, kNumbers, threads, [&](std::int64_t first, std::int64_t last) {
    block(x + first, grad == nullptr ? nullptr : grad + first, last - first, out + first);
  });
}

void norm_rotary_cpu(const NormRotaryArgs& args, float* out, const HeadStrides& out_strides, int threads,
                     CpuLevel level) {
  const auto block = rows_of(level).norm_rotary;
  parallel_for(lines_of(args), kLines, threads,
               [&](std::int64_t first, std::int64_t last) { block(args, first, last, out, out_strides); });
}

std::int64_t norm_rotary_sums(const NormRotaryArgs& args) {
  return (lines_of(args) + kLines - 1) / kLines * 2 * args.width;
}

void norm_rotary_backward_cpu(const NormRotaryArgs& args, const NormRotaryGradients& gradients, int threads,
                              CpuLevel level) {
  const auto block = rows_of(level).norm_rotary_slopes;
  const std::int64_t each = 2 * args.width, sums = norm_rotary_sums(args);
  const bool wanted = gradients.d_parameters != nullptr;
  parallel_for(lines_of(args), kLines, threads, [&](std::int64_t first, std::int64_t last) {
    block(args, gradients, first, last, wanted ? gradients.sums + first / kLines * each : nullptr);
  });
  for (std::int64_t e = 0; wanted && e < each; ++e) {
    double sum = 0.0;
    for (std::int64_t at = e; at < sums; at += each) sum += double(gradients.sums[at]);
    gradients.d_parameters[e] = float(sum);
  }
}

}  // namespace pyunictokens

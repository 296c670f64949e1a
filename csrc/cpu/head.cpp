// head.h on the CPU: rows shared among threads. A row's result does not depend on the others, so neither on the threads.
#include "head.h"

#include <algorithm>

#include "rows.h"
#include "threads.h"

namespace pyunictokens {
namespace {

std::int64_t grain(const HeadArgs& args) { return std::max<std::int64_t>(1, 32768 / args.entries); }

}  // namespace

void head_logprob_cpu(const HeadArgs& args, float* lse, float* logp, float* entropy, int threads, CpuLevel level) {
  const auto row = rows_of(level).head_logprob;
  parallel_for(args.rows, grain(args), threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) row(args, r, lse, logp, entropy);
  });
}

void head_gradient_cpu(const HeadArgs& args, const float* lse, const float* slope, int threads, CpuLevel level) {
  const auto row = rows_of(level).head_gradient;
  parallel_for(args.rows, grain(args), threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) row(args, r, lse[r], slope[r]);
  });
}

}  // namespace pyunictokens
